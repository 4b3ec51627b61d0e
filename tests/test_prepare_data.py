"""Real data sets are laid out as the configs expect, whole or not at all."""

import io
import json
import re
import runpy
import tarfile
from pathlib import Path

import pytest
from mmdet.datasets import VOCDataset
from mmengine.config import Config
from pycocotools.coco import COCO

ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / 'tools' / 'prepare_data.py'))
SHARED = ROOT.parent / 'shared' / 'data'


def test_the_classes_of_voc_are_the_configs_and_mmdets():
    """The tool needs nothing but Python, and a base config holds its classes as text."""
    written = Config.fromfile(ROOT / 'configs/_base_/datasets/voc07.py').voc07.metainfo.classes
    assert TOOL['VOC_CLASSES'] == tuple(written) == VOCDataset.METAINFO['classes']


def annotation(number, image_id, **fields):
    return dict(
        id=number,
        image_id=image_id,
        category_id=1,
        bbox=[0, 0, 4, 4],
        area=16,
        iscrowd=0,
        **fields,
    )


def source_files(num_images=3, difficult=True):
    """Three images; the second has one box, a difficult one, the others an ordinary one more."""
    fields = [dict(difficult=d) if difficult else {} for d in (0, 1)]
    files = {}
    for split in ('train', 'val'):
        images = [
            dict(id=i, file_name=f'{split}{i}.jpg', width=8, height=8) for i in range(num_images)
        ]
        annotations = [annotation(i, i, **fields[i % 2]) for i in range(num_images)]
        annotations += [
            annotation(num_images + i, i, **fields[0]) for i in range(0, num_images, 2)
        ]
        files[f'instances_{split}.json'] = json.dumps(
            dict(images=images, annotations=annotations, categories=[dict(id=1, name='cat')])
        )
        files.update({f'images/{image["file_name"]}': 'jpg' for image in images})
    return files


def pack(folder, files):
    folder.mkdir()
    with tarfile.open(folder / 'data.tar', 'w') as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return folder


def run(*argv):
    """Exit code of the tool; 0 where it returns."""
    try:
        TOOL['main'](list(map(str, argv)))
    except SystemExit as end:
        return end.code
    return 0


def check_error(capsys, pattern):
    error = capsys.readouterr().err
    assert re.search(pattern, error), error


def load(path):
    return json.loads(path.read_text())


def test_difficult_objects_are_dropped_in_training_and_ignored_in_evaluation(tmp_path):
    source = pack(tmp_path / 'source', source_files())
    assert run('voc07', '--source', source, '--out', tmp_path / 'out') == 0
    train = load(tmp_path / 'out/instances_train.json')['annotations']
    val = load(tmp_path / 'out/instances_val.json')['annotations']
    assert [a['image_id'] for a in train] == [0, 2, 0, 2]
    assert [(a['image_id'], a['iscrowd']) for a in val] == [(0, 0), (1, 1), (2, 0), (0, 0), (2, 0)]


def voc(folder, hard_one='tvmonitor'):
    """VOC 2007's own layout: one image in trainval and one in test, with two objects each."""
    for name in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (folder / name).mkdir(parents=True)
    for number, part in ((5, 'trainval'), (7, 'test')):
        name = f'00000{number}'
        (folder / f'ImageSets/Main/{part}.txt').write_text(f'{name}\n')
        (folder / f'JPEGImages/{name}.jpg').write_text('jpg')
        things = ''.join(
            f'<object><name>{kind}</name><difficult>{hard}</difficult><bndbox><xmin>3</xmin>'
            f'<ymin>1</ymin><xmax>10</xmax><ymax>4</ymax></bndbox></object>'
            for kind, hard in (('dog', 0), (hard_one, 1))
        )
        (folder / f'Annotations/{name}.xml').write_text(
            f'<annotation><size><width>20</width><height>9</height></size>{things}</annotation>'
        )
    return folder


def test_vocs_own_files_become_coco_json(tmp_path):
    assert run('voc07', '--source', voc(tmp_path / 'VOC2007'), '--out', tmp_path / 'out') == 0
    train, val = (COCO(tmp_path / f'out/instances_{split}.json') for split in ('train', 'val'))
    (dog,) = train.anns.values()  # the difficult one is dropped
    assert train.cats[dog['category_id']]['name'] == 'dog'
    assert dog['bbox'] == [2, 0, 8, 4] and dog['area'] == 32  # VOC counts pixels from 1
    image = train.imgs[dog['image_id']]
    assert (image['width'], image['height']) == (20, 9)
    assert (tmp_path / 'out/images' / image['file_name']).is_file()
    assert [(val.cats[a['category_id']]['name'], a['iscrowd']) for a in val.anns.values()] == [
        ('dog', 0),
        ('tvmonitor', 1),
    ]
    assert list(val.imgs) == [7]


def test_a_voc_without_its_test_part_is_refused(tmp_path, capsys):
    source = voc(tmp_path / 'VOC2007')
    (source / 'ImageSets/Main/test.txt').unlink()
    assert run('voc07', '--source', source, '--out', tmp_path / 'out') == 2
    assert 'expected the list ImageSets/Main/test.txt' in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_class_that_voc_does_not_have_is_refused(tmp_path, capsys):
    source = voc(tmp_path / 'VOC2007', hard_one='unicorn')
    assert run('voc07', '--source', source, '--out', tmp_path / 'out') == 2
    assert "000005.xml: expected one of VOC's 20 classes, got 'unicorn'" in capsys.readouterr().err


def test_tiny_imagenet_becomes_folders_of_every_second_class(tmp_path, capsys):
    source = tmp_path / 'tiny-imagenet-200'
    wnids = ['n04', 'n01', 'n03', 'n02']
    (source / 'val/images').mkdir(parents=True)
    (source / 'wnids.txt').write_text('\n'.join(wnids))
    lines = []
    for wnid in wnids:
        (source / f'train/{wnid}/images').mkdir(parents=True)
        (source / f'train/{wnid}/images/{wnid}_0.JPEG').write_text(wnid)
        (source / f'val/images/val_{wnid}.JPEG').write_text(wnid)
        lines.append(f'val_{wnid}.JPEG\t{wnid}\t0\t0\t9\t9')
    (source / 'val/val_annotations.txt').write_text('\n'.join(lines))
    assert run('tinyin100', '--source', source, '--out', tmp_path / 'out') == 0
    files = [
        path.relative_to(tmp_path / 'out').as_posix()
        for path in sorted((tmp_path / 'out').rglob('*.JPEG'))
    ]
    assert files == [
        'train/n01/n01_0.JPEG',
        'train/n03/n03_0.JPEG',
        'val/n01/val_n01.JPEG',
        'val/n03/val_n03.JPEG',
    ]
    assert run('tinyin100', '--source', tmp_path / 'out', '--out', tmp_path / 'other') == 2
    assert 'expected the folder tiny-imagenet-200' in capsys.readouterr().err


def test_the_overfit_subset_has_32_images_with_their_boxes(tmp_path):
    source = pack(tmp_path / 'source', source_files(num_images=40, difficult=False))
    assert run('coco_mini', '--source', source, '--out', tmp_path / 'out') == 0
    subset = load(tmp_path / 'out/instances_train32.json')
    assert [image['id'] for image in subset['images']] == list(range(32))
    assert {a['image_id'] for a in subset['annotations']} == set(range(32))
    whole = load(tmp_path / 'out/instances_train.json')
    assert len(whole['images']) == 40 and subset['categories'] == whole['categories']


def without(name):
    return {key: text for key, text in source_files().items() if key != name}


@pytest.mark.parametrize(
    'name, files, message',
    [
        ('voc07', without('instances_val.json'), 'expected instances_val.json'),
        ('voc07', {**source_files(), 'instances_train.json': '{"images": ['}, 'damaged'),
        ('voc07', without('images/val2.jpg'), '1 of the 3 images.*val2.jpg'),
        ('voc07', source_files(difficult=False), 'expected a field "difficult".*5 have none'),
        ('coco_mini', source_files(difficult=False), 'at least 32 images.*found 3'),
        ('voc07', None, 'found none; name it with --source'),
    ],
)
def test_a_wrong_source_is_named_and_nothing_is_left(name, files, message, tmp_path, capsys):
    source = tmp_path / 'source'
    if files is not None:
        pack(source, files)
    assert run(name, '--source', source, '--out', tmp_path / 'out') == 2
    check_error(capsys, message)
    assert sorted(tmp_path.iterdir()) == ([source] if files is not None else [])


def test_a_truncated_tar_is_named_and_nothing_is_left(tmp_path, capsys):
    source = pack(tmp_path / 'source', source_files())
    whole = (source / 'data.tar').read_bytes()
    (source / 'data.tar').write_bytes(whole[:900])
    assert run('voc07', '--source', source, '--out', tmp_path / 'out') == 2
    check_error(capsys, 'data.tar: cannot be unpacked')
    assert sorted(tmp_path.iterdir()) == [source]


def test_what_is_there_is_not_replaced(tmp_path, capsys):
    source = pack(tmp_path / 'source', source_files())
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'mine.txt').write_text('mine')
    assert run('voc07', '--source', source, '--out', out) == 2
    check_error(capsys, 'exists already')
    assert [path.name for path in out.iterdir()] == ['mine.txt']


@pytest.mark.parametrize(
    'name, counts',
    [
        ('voc07', dict(train=(4000, 10076), val=(1500, 4588))),
        ('coco_mini', dict(train=(343, 2964), val=(328, 2640), train32=(32, 209))),
    ],
)
def test_the_real_data(name, counts, tmp_path, capsys):
    source = SHARED / f'{name}_320'
    if not source.is_dir():
        pytest.skip(f'{source} is not here')
    assert run(name, '--source', source, '--out', tmp_path / 'out') == 0
    for split, expected in counts.items():
        coco = COCO(str(tmp_path / f'out/instances_{split}.json'))
        assert (len(coco.imgs), len(coco.anns)) == expected
