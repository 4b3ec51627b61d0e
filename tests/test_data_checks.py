"""Data that would train wrong labels, give a wrong AP or end a run later are refused at first."""

import copy
import json
import shutil
from pathlib import Path

import mmcv
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.dataset import RepeatDataset
from tiny_detector import make_coco, write_config
from torch import nn

from dn_mmdet.checks import coco, data_checks, images, paths, pipelines, preflight
from dn_mmdet.checks.preflight import ConfigError


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('coco')
    make_coco(root)
    return root


@pytest.fixture(scope='module')
def original(root):
    return Config.fromfile(write_config(root, 'DNB'))


@pytest.fixture
def cfg(original):
    return copy.deepcopy(original)


@pytest.fixture(scope='module')
def model(original):
    return preflight.check_model(original)


@pytest.fixture
def annotations(root, cfg, tmp_path):
    """Writes changed annotations for the training data; returns their path."""
    content = json.loads((root / 'instances.json').read_text())
    path = tmp_path / 'changed.json'
    cfg.train_dataloader.dataset.ann_file = str(path)

    def write(change=None, text=None):
        if change is not None:
            change(content)
        path.write_text(json.dumps(content) if text is None else text)
        return path

    return write


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_whole_data_pass(cfg, model, split):
    preflight.check_data(cfg, split, model)


def test_a_split_that_is_not_there_is_no_error(cfg, model):
    cfg.pop('train_dataloader')
    preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize(
    'option, value, what',
    [
        ('data_root', '/absent/', 'data folder'),
        ('ann_file', 'absent.json', 'annotation file'),
        ('data_prefix', dict(img='absent/'), 'data folder'),
    ],
)
def test_missing_data_are_named_with_path_and_option(cfg, model, split, option, value, what):
    cfg[f'{split}_dataloader'].dataset[option] = value
    option += '.img' if option == 'data_prefix' else ''
    with pytest.raises(ConfigError) as raised:
        preflight.check_data(cfg, split, model)
    message = str(raised.value)
    assert f'no such {what} (set by {split}_dataloader.dataset.{option};' in message
    assert 'absent' in message.split(':')[0] and str(Path.cwd()) in message
    assert f'--cfg-options {split}_dataloader.dataset.{option}=PATH' in message


def test_wrappers_are_looked_into(cfg, model):
    inner = cfg.train_dataloader.dataset
    inner.ann_file = 'absent.json'
    cfg.train_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[dict(type='RepeatDataset', times=2, dataset=inner)]
    )
    with pytest.raises(ConfigError, match=r'train_dataloader.dataset.datasets.0.dataset.ann_file'):
        preflight.check_data(cfg, 'train', model)


def test_a_missing_image_is_named(cfg, model, annotations):
    path = annotations(lambda content: content['images'][0].update(file_name='absent.png'))
    with pytest.raises(ConfigError, match=f'images/absent.png: no such image, which {path}'):
        preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize(
    'text', ['{"images": [', '', 'no json', '\x00\x01', '{"images": [], "annotations": 1']
)
def test_an_annotation_file_that_is_no_json_is_told(cfg, model, annotations, text):
    path = annotations(text=text)
    with pytest.raises(
        ConfigError, match=f'{path}: cannot be read as json.*train_dataloader.dataset.ann_file'
    ):
        preflight.check_data(cfg, 'train', model)


def test_an_annotation_file_that_is_no_text_is_told(cfg, model, annotations):
    path = annotations()
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ConfigError, match='cannot be read as json'):
        preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize(
    'text, expected',
    [
        ('[]', 'a list of images'),
        ('{"images": [], "annotations": [], "categories": []}', 'lists no images'),
        ('{"images": {}, "annotations": [], "categories": []}', 'a list of images'),
        ('{"images": [], "annotations": []}', 'a list of categories'),
        ('{"images": [], "categories": []}', 'a list of annotations'),
        ('{"images": [1], "annotations": [], "categories": []}', 'each of images; number 0 is 1'),
    ],
)
def test_a_json_that_is_not_coco_is_told(cfg, model, annotations, text, expected):
    path = annotations(text=text)
    with pytest.raises(ConfigError, match=f'{path}: .*{expected}'):
        preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize(
    'part, key', [(part, key) for part, keys in coco.KEYS.items() for key in sorted(keys)]
)
def test_an_entry_without_what_mmdet_reads_is_named(cfg, model, annotations, part, key):
    annotations(lambda content: content[part][1].pop(key))
    with pytest.raises(ConfigError, match=f'{key}.* in each of {part}; number 1 is '):
        preflight.check_data(cfg, 'train', model)


def test_test_images_need_no_annotations(cfg, model, annotations):
    path = annotations(lambda content: content.pop('annotations'))
    cfg.test_dataloader.dataset.ann_file = str(path)
    preflight.check_data(cfg, 'test', model)


@pytest.mark.parametrize('split', ['val', 'test'])
def test_the_evaluators_annotations_are_checked_too(cfg, model, split, tmp_path):
    path = tmp_path / 'other.json'
    cfg[f'{split}_evaluator'].ann_file = str(path)
    with pytest.raises(ConfigError, match=f'{path}: no such.*{split}_evaluator.ann_file'):
        preflight.check_data(cfg, split, model)
    path.write_text('{"images"')
    with pytest.raises(ConfigError, match=f'{path}: cannot be read as json.*{split}_evaluator'):
        preflight.check_data(cfg, split, model)


def test_another_number_of_classes_than_the_models_is_told(cfg, root):
    cfg.model.bbox_head.num_classes = 80
    with pytest.raises(
        ConfigError,
        match=r'model.bbox_head.num_classes is 80, but the data set '
        r'has 2 classes .*metainfo.classes.*cat, dog',
    ):
        preflight.check_data(cfg, 'train', preflight.check_model(cfg))


def test_coco_classes_on_other_data_are_told(cfg, root):
    """The forgotten metainfo: mmdet would train on no boxes at all."""
    cfg.model.bbox_head.num_classes = 80
    del cfg.train_dataloader.dataset.metainfo
    with pytest.raises(
        ConfigError,
        match=r'has 2 classes \(cat, dog\). Of the 80 that are expected, person, .* are missing',
    ):
        preflight.check_data(cfg, 'train', preflight.check_model(cfg))


def test_a_single_class_without_its_comma_is_told(cfg, model):
    cfg.train_dataloader.dataset.metainfo = dict(classes='cat')
    with pytest.raises(ConfigError, match=r"a single class needs a comma: \('cat',\)|classes"):
        preflight.check_data(cfg, 'train', model)


@pytest.fixture
def told(monkeypatch):
    """What is told and no error."""
    lines = []
    for module in (data_checks, images, pipelines):
        monkeypatch.setattr(module, 'tell', lines.append)
    return lines


def change_all(content, **fields):
    for annotation in content['annotations']:
        annotation.update(fields)


WRONG = [
    (lambda content: content['annotations'][1].update(bbox=[]), 'number 1 .*bbox'),
    (lambda content: content['annotations'][1].update(area=None), 'number 1 .*area'),
    (lambda content: content['annotations'][1].update(id=1), 'numbers 0 and 1 both'),
    (lambda content: content['annotations'][1].update(category_id=0), 'number 1 .*category_id'),
    (lambda content: content['categories'].reverse(), 'has the order dog, cat, .*cat, dog'),
    (lambda content: content['categories'].append(dict(id=9, name='dog')), '2 have the name'),
    (lambda content: content['images'][1].update(width=0), 'number 1 .*width'),
]


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize('change, expected', WRONG, ids=[name for _, name in WRONG])
def test_a_file_that_would_be_misread_is_named_with_its_option(
    cfg, model, annotations, split, change, expected
):
    path = annotations(change)
    cfg[f'{split}_dataloader'].dataset.ann_file = str(path)
    with pytest.raises(
        ConfigError,
        match=f'^{path}: .*{expected}.* The file is set by {split}_dataloader.dataset.ann_file$',
    ):
        preflight.check_data(cfg, split, model)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda inner: dict(type='RepeatDataset', times=2, dataset=inner),
        lambda inner: dict(type='mmengine.RepeatDataset', times=2, dataset=inner),
        lambda inner: dict(type=RepeatDataset, times=2, dataset=inner),
        lambda inner: dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=inner),
        lambda inner: dict(type='MultiImageMixDataset', dataset=inner, pipeline=[]),
        lambda inner: dict(type='ConcatDataset', datasets=[inner, inner]),
        lambda inner: dict(
            type='ConcatDataset', datasets=[dict(type='RepeatDataset', times=2, dataset=inner)]
        ),
    ],
    ids=['Repeat', 'scope', 'class', 'ClassBalanced', 'MultiImageMix', 'Concat', 'both'],
)
@pytest.mark.parametrize('kind', ['CocoDataset', 'mmdet.CocoDataset', CocoDataset])
def test_a_wrapper_or_a_class_for_a_name_hides_nothing(cfg, model, annotations, wrap, kind):
    path = annotations(lambda content: content['categories'].reverse())
    cfg.train_dataloader.dataset.type = kind
    cfg.train_dataloader.dataset = wrap(cfg.train_dataloader.dataset)
    with pytest.raises(ConfigError, match=f'^{path}: categories: .* order'):
        preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize('split', ['val', 'test'])
@pytest.mark.parametrize(
    'wrap',
    [
        lambda inner: dict(type='RepeatDataset', times=2, dataset=inner),
        lambda inner: dict(type=RepeatDataset, times=2, dataset=inner),
        lambda inner: dict(
            type='mmengine.ClassBalancedDataset', oversample_thr=0.1, dataset=inner
        ),
        lambda inner: dict(
            type='ConcatDataset', datasets=[dict(type='RepeatDataset', times=2, dataset=inner)]
        ),
    ],
    ids=['Repeat', 'class', 'ClassBalanced', 'Concat'],
)
def test_images_that_would_be_evaluated_several_times_are_told(cfg, model, split, wrap):
    cfg[f'{split}_dataloader'].dataset = wrap(cfg[f'{split}_dataloader'].dataset)
    with pytest.raises(
        ConfigError,
        match=f'^{split}_dataloader.dataset.*: .*(Repeat|Balanced)'
        'Dataset gives images several times.*Set ',
    ):
        preflight.check_data(cfg, split, model)


def test_a_wrapper_that_repeats_nothing_may_be_evaluated(cfg, model):
    cfg.val_dataloader.dataset = dict(
        type='RepeatDataset', times=1, dataset=cfg.val_dataloader.dataset
    )
    preflight.check_data(cfg, 'val', model)


@pytest.mark.parametrize(
    'change, expected',
    [
        (lambda data: data.update(dataset=None), 'dataset: expected a data set.*got none'),
        (lambda data: data.pop('dataset'), 'dataset: expected a data set.*got none'),
        (
            lambda data: data.update(dataset=dict(type='ConcatDataset', datasets=[])),
            r'dataset\.datasets: expected at least one',
        ),
        (
            lambda data: data.update(
                dataset=dict(type='RepeatDatset', times=1, dataset=data.dataset)
            ),
            r"dataset\.type: there is no data set 'RepeatDatset'",
        ),
        (lambda data: data.dataset.update(ann_file=''), r'dataset\.ann_file: expected.*Set it'),
        (
            lambda data: data.dataset.update(data_prefix='images/'),
            r"dataset\.data_prefix: expected.*dict\(img='images/'\)",
        ),
        (
            lambda data: data.dataset.update(indices=[0, 9]),
            r'dataset\.indices: expected.*among the 4 .*\[0, 9\]',
        ),
    ],
    ids=['None', 'absent', 'empty', 'wrapper', 'ann_file', 'prefix', 'indices'],
)
def test_a_data_set_that_cannot_be_read_is_told(cfg, model, change, expected):
    change(cfg.train_dataloader)
    with pytest.raises(ConfigError, match=f'^train_dataloader.{expected}'):
        preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize(
    'name, meant', [('CocoDatset', 'CocoDataset'), ('mmdet.CocoDatset', 'CocoDataset')]
)
def test_a_data_set_that_does_not_exist_is_told(cfg, model, name, meant):
    cfg.train_dataloader.dataset.type = name
    with pytest.raises(
        ConfigError,
        match=rf"dataset.type: there is no data set '{name}'; did you "
        rf"mean .*'{meant}'",
    ):
        preflight.check_data(cfg, 'train', model)


def test_a_transform_that_does_not_exist_is_told(cfg, model):
    cfg.val_dataloader.dataset.pipeline[2].type = 'mmdet.Rezise'
    with pytest.raises(ConfigError, match='^val_dataloader.dataset: .*Rezise'):
        preflight.check_data(cfg, 'val', model)


def test_the_folder_of_the_images_needs_its_key(cfg, model):
    cfg.train_dataloader.dataset.data_prefix = dict(img_path='images/')
    with pytest.raises(ConfigError, match='data_prefix: expected img, the folder .*img_path'):
        preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize('name', ['instances.txt', 'instances'])
def test_a_coco_file_may_have_any_name(cfg, model, root, tmp_path, name):
    path = tmp_path / name
    cfg.train_dataloader.dataset.ann_file = str(path)
    path.write_text((root / 'instances.json').read_text())
    preflight.check_data(cfg, 'train', model)
    path.write_text('no json')
    with pytest.raises(ConfigError, match=f'{path}: cannot be read as json'):
        preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize(
    'change, reason',
    [
        (dict(iscrowd=1), r'4 crowds \(iscrowd=1\)'),
        (dict(area=0), '4 of area 0'),
        (dict(ignore=1), '4 marked ignore'),
        (dict(bbox=[64, 3, 9, 9]), '4 outside of their image'),
        (dict(bbox=[3, 3, 9, 0.5]), '4 smaller than a pixel'),
    ],
)
def test_nothing_to_train_on_is_told_with_the_reason(cfg, model, annotations, change, reason):
    path = annotations(lambda content: change_all(content, **change))
    with pytest.raises(ConfigError, match=f'^{path}: holds no box to train on: of 4, {reason}'):
        preflight.check_data(cfg, 'train', model)


def test_no_boxes_at_all_are_told(cfg, model, annotations):
    annotations(lambda content: content.update(annotations=[]))
    with pytest.raises(ConfigError, match='holds no box to train on: of 0, none'):
        preflight.check_data(cfg, 'train', model)


def test_a_data_set_of_background_beside_another_is_no_error(cfg, model, annotations):
    """Pictures without objects are trained on, too."""
    background = copy.deepcopy(cfg.train_dataloader.dataset)
    annotations(lambda content: content.update(annotations=[]))
    whole = dict(background, ann_file='instances.json')
    background = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[whole, background])
    preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize(
    'filter_cfg, change',
    [
        (dict(min_size=65), dict()),
        (dict(filter_empty_gt=True, min_size=100), dict()),
        (dict(filter_empty_gt=True), dict(category_id=3)),
    ],
)
def test_a_filter_that_leaves_no_image_is_told(cfg, model, annotations, filter_cfg, change):
    def edit(content):
        content['categories'].append(dict(id=3, name='cup'))
        change_all(content, **change)

    path = annotations(edit)
    cfg.train_dataloader.dataset.filter_cfg = filter_cfg
    with pytest.raises(ConfigError, match=f'^{path}: train_dataloader.dataset.filter_cfg .*all 4'):
        preflight.check_data(cfg, 'train', model)


def test_a_filter_that_leaves_only_images_without_boxes_is_told(cfg, model, annotations):
    def edit(content):
        content['images'][3].update(width=640, height=640)
        content['annotations'].pop()

    annotations(edit)
    cfg.train_dataloader.dataset.filter_cfg = dict(min_size=100)
    cfg.train_dataloader.dataset.pipeline = []  # the picture has another size
    with pytest.raises(ConfigError, match='no box to train on: .*3 in images that filter_cfg'):
        preflight.check_data(cfg, 'train', model)


def test_a_filter_is_not_used_in_testing(cfg, model):
    """mmdet's own rule."""
    cfg.val_dataloader.dataset.filter_cfg = dict(min_size=100)
    preflight.check_data(cfg, 'val', model)


@pytest.mark.parametrize('nested', [False, True])
def test_masks_that_a_pipeline_loads_have_to_be_there(cfg, model, annotations, nested):
    load = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
    cfg.train_dataloader.dataset.pipeline[1] = (
        load if not nested else dict(type='RandomChoice', transforms=[[load], [load]])
    )
    path = annotations(lambda content: change_all(content, segmentation=[[0, 0, 9, 0, 9, 9]]))
    preflight.check_data(cfg, 'train', model)
    annotations(lambda content: content['annotations'][2].pop('segmentation'))
    with pytest.raises(ConfigError, match=f'^{path}: annotations: id 3 has no segmentation'):
        preflight.check_data(cfg, 'train', model)


SQUARE = [[4, 4, 20, 4, 20, 20, 4, 20]]
FIRST_MASKS = [
    (SQUARE + [[1, 2]], 'parts of fewer than three points, which are left out'),
    ([[80, 4, 90, 4, 90, 9]], 'no area, or lie outside of their image'),
]


@pytest.mark.parametrize('first, expected', FIRST_MASKS, ids=['short', 'outside'])
def test_masks_that_are_lost_are_told_and_no_error(cfg, model, annotations, told, first, expected):
    def edit(content):
        change_all(content, segmentation=SQUARE)
        content['annotations'][0]['segmentation'] = first

    line = f'1 segmentations have {expected} (the first has the id 1)'
    cfg.train_dataloader.dataset.pipeline[1].with_mask = True
    path = annotations(edit)
    preflight.check_data(cfg, 'train', model)
    assert told == [f'{path}: {line}']
    cfg.val_dataloader.dataset.ann_file = str(path)
    cfg.val_evaluator.update(ann_file=str(path), metric=['bbox', 'segm'])
    told.clear()
    finding = copy.deepcopy(model)
    finding.mask_head = nn.Identity()
    preflight.check_data(cfg, 'val', finding)
    assert told == [f'{path}: {line}']


def test_run_lengths_where_polygons_are_read_are_told(cfg, model, annotations, told):
    """mmdet marks their boxes as regions to ignore."""
    runs = dict(size=[64, 64], counts=[9, 9, 64 * 64 - 18])
    load = cfg.train_dataloader.dataset.pipeline[1]
    load.update(with_mask=True, poly2mask=False)
    path = annotations(lambda content: change_all(content, segmentation=SQUARE))
    preflight.check_data(cfg, 'train', model)
    assert told == []
    annotations(lambda content: content['annotations'][1].update(segmentation=runs))
    preflight.check_data(cfg, 'train', model)
    assert len(told) == 1 and '1 of 4 segmentations are run lengths' in told[0]
    assert '(the first has the id 2)' in told[0]
    annotations(lambda content: change_all(content, segmentation=runs))
    with pytest.raises(ConfigError, match=f'^{path}: 4 of 4 segmentations .*Leave poly2mask out'):
        preflight.check_data(cfg, 'train', model)
    load.poly2mask = True
    preflight.check_data(cfg, 'train', model)


def test_masks_of_other_images_are_told(cfg, model, annotations):
    cfg.train_dataloader.dataset.pipeline[1].with_mask = True
    mask = dict(size=[128, 128], counts=[128 * 128])
    path = annotations(lambda content: change_all(content, segmentation=mask))
    with pytest.raises(
        ConfigError,
        match=rf'^{path}: .*the size \[128, 128\].*height 64 and .*'
        'The file is set by train_dataloader.dataset.ann_file$',
    ):
        preflight.check_data(cfg, 'train', model)


def test_every_missing_image_is_found(cfg, model, annotations):
    annotations(lambda content: content['images'][2].update(file_name='absent/2.png'))
    with pytest.raises(ConfigError, match='images/absent/2.png: no such image'):
        preflight.check_data(cfg, 'train', model)


def test_a_picture_that_cannot_be_read_is_told(cfg, model, annotations, root, tmp_path):
    shutil.copytree(root / 'images', tmp_path / 'images')
    (tmp_path / 'images' / '0.png').write_bytes(b'no picture')
    annotations()
    cfg.train_dataloader.dataset.data_prefix.img = str(tmp_path / 'images')
    with pytest.raises(ConfigError, match='0.png: cannot be read as an image'):
        preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize('number', [0, 1])
def test_a_file_that_is_no_picture_is_told(cfg, model, annotations, root, tmp_path, number):
    """Also one that is not among those that are opened."""
    shutil.copytree(root / 'images', tmp_path / 'images')
    path = tmp_path / 'images' / f'{number}.png'
    annotations()
    cfg.train_dataloader.dataset.data_prefix.img = str(tmp_path / 'images')
    path.write_bytes(b'')
    with pytest.raises(ConfigError, match=f'{path}: expected an image, got a file of 0 bytes'):
        preflight.check_data(cfg, 'train', model)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=f'{path}: no such image'):
        preflight.check_data(cfg, 'train', model)
    path.rmdir()
    path.symlink_to(root / 'images' / '2.png')
    preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize('width, height, refused', [(128, 128, True), (64, 65, True)])
def test_sizes_of_other_pictures_are_told(cfg, model, annotations, width, height, refused):
    path = annotations(lambda content: content['images'][0].update(width=width, height=height))
    with pytest.raises(
        ConfigError,
        match=f'{path}: images: id 0 has the width {width} and the '
        f'height {height}, .*0.png has 64 and 64: its boxes',
    ):
        preflight.check_data(cfg, 'train', model)


def test_turned_pictures_are_told_and_no_error(cfg, model, annotations, root, tmp_path, told):
    shutil.copytree(root / 'images', tmp_path / 'images')
    mmcv.imwrite(np.zeros((96, 64, 3), np.uint8), str(tmp_path / 'images' / '0.png'))
    annotations(lambda content: content['images'][0].update(width=96, height=64))
    cfg.train_dataloader.dataset.data_prefix.img = str(tmp_path / 'images')
    preflight.check_data(cfg, 'train', model)
    assert len(told) == 1 and 'EXIF' in told[0]


def test_what_is_left_out_is_told_and_no_error(cfg, model, annotations, told):
    def edit(content):
        content['annotations'][0].update(area=0)
        content['annotations'][1].update(image_id=99)
        content['annotations'][2].update(bbox=[50, 3, 20, 9])
        content['annotations'][3].update(category_id=1)

    path = annotations(edit)
    preflight.check_data(cfg, 'train', model)
    assert told == [
        f'{path}: 1 boxes are not trained on, of area 0 (the first has the id 1)',
        f'{path}: 1 boxes are not trained on, of images that are not in the file (the first has '
        f'the id 2)',
        f'{path}: 1 boxes reach out of their image (the first has the id 3)',
        f'{path}: no box of 1 of the 2 classes (dog)',
    ]


def test_nothing_is_told_of_whole_data(cfg, model, told):
    for split in ('train', 'val', 'test'):
        preflight.check_data(cfg, split, model)
    preflight.check_same_classes(cfg, ('train', 'val', 'test'))
    assert not told


@pytest.mark.parametrize(
    'classes, expected',
    [
        (('cat', 'cat'), "'cat' is there 2 times"),
        ({'cat', 'dog'}, 'expected a tuple of names'),
        (('cat', 3), 'expected a tuple of names'),
        ('cat', 'a single class needs a comma'),
    ],
)
def test_classes_that_give_no_labels_are_told(cfg, model, classes, expected):
    cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
    with pytest.raises(ConfigError, match=rf'^train_dataloader[.\w]*\.classes: .*{expected}'):
        preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize('key', ['CLASSES', 'Classes'])
def test_classes_in_capital_letters_are_told(cfg, model, key):
    """As in the configs of mmdet 2; mmdet 3 ignores them."""
    cfg.train_dataloader.dataset.metainfo = {key: ('cat', 'dog')}
    with pytest.raises(ConfigError, match=f'metainfo.{key}: mmdet reads classes, .*person'):
        preflight.check_data(cfg, 'train', model)


def test_classes_may_be_a_list_or_a_file(cfg, model, tmp_path):
    path = tmp_path / 'classes.txt'
    path.write_text('cat\ndog\n')
    for classes in (['cat', 'dog'], str(path)):
        cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
        preflight.check_data(cfg, 'train', model)
        preflight.check_same_classes(cfg, ('train', 'val'))


def test_concatenated_data_sets_of_other_metainfo_are_told(cfg, model):
    """mmengine's own rule, before anything is written."""
    inner = cfg.train_dataloader.dataset
    other = dict(inner, metainfo=dict(classes=['cat', 'dog']))
    cfg.train_dataloader.dataset = dict(type='mmengine.ConcatDataset', datasets=[inner, other])
    with pytest.raises(ConfigError, match='^train_dataloader.dataset: .*type'):
        preflight.check_data(cfg, 'train', model)


def test_an_evaluator_finds_no_classes_in_data_sets_of_other_metainfo(cfg, model):
    inner = cfg.val_dataloader.dataset
    other = dict(inner, metainfo=dict(classes=['cat', 'dog']))
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner, other])
    with pytest.raises(ConfigError, match=r'^val_dataloader.dataset.datasets.1.metainfo: differs'):
        preflight.check_data(cfg, 'val', model)


def with_classes_of(cfg, split, classes, annotations):
    """Gives a split classes of its own, and a file in their order."""

    def edit(content):
        content['categories'].sort(key=lambda category: classes.index(category['name']))

    path = annotations(edit)
    cfg.train_dataloader.dataset.ann_file = 'instances.json'
    dataset = cfg[f'{split}_dataloader'].dataset
    dataset.ann_file, dataset.metainfo = str(path), dict(classes=classes)
    cfg[f'{split}_evaluator'].ann_file = str(path)


def test_training_and_validation_number_their_labels_alike(cfg, model, annotations):
    """Each of both is right for itself, and AP would be wrong."""
    with_classes_of(cfg, 'val', ('dog', 'cat'), annotations)
    for split in ('train', 'val'):
        preflight.check_data(cfg, split, model)
    with pytest.raises(
        ConfigError,
        match='^val_dataloader.dataset.metainfo.classes: dog, cat .* '
        'where train_dataloader.dataset.metainfo.classes has '
        'cat, dog',
    ):
        preflight.check_same_classes(cfg, ('train', 'val'))


def test_other_names_of_the_same_classes_are_told_and_no_error(cfg, told):
    cfg.val_dataloader.dataset.metainfo = dict(classes=('cat', 'hound'))
    preflight.check_same_classes(cfg, ('train', 'val'))
    assert len(told) == 1 and 'cat, hound where' in told[0]


@pytest.mark.parametrize(
    'trained, refused',
    [
        (('cat', 'dog'), False),
        (['cat', 'dog'], False),
        (('dog', 'cat'), True),
        (('cat', 'dog', 'cup'), True),
        (None, False),
    ],
)
def test_a_checkpoint_knows_its_classes(cfg, trained, refused):
    checkpoint = dict(meta=dict(dataset_meta=dict(classes=trained)))
    if not refused:
        return preflight.check_trained_classes(cfg, 'test', checkpoint, 'x.pth')
    with pytest.raises(ConfigError, match=r'^test_dataloader.dataset.metainfo.classes: .*x\.pth'):
        preflight.check_trained_classes(cfg, 'test', checkpoint, 'x.pth')


def test_a_checkpoint_may_know_nothing(cfg):
    for checkpoint in (dict(), dict(meta=None), dict(meta=dict(dataset_meta=None))):
        preflight.check_trained_classes(cfg, 'test', checkpoint, 'x.pth')


EVALUATORS = {
    'dict': lambda metric: metric,
    'list': lambda metric: [dict(type='VOCMetric'), metric],
    'metrics': lambda metric: dict(metrics=[metric]),
    'scope': lambda metric: dict(metric, type='mmdet.CocoMetric'),
    'class': lambda metric: dict(metric, type=CocoMetric),
}


@pytest.fixture(params=EVALUATORS.values(), ids=EVALUATORS)
def evaluator(request, cfg, root, tmp_path):
    """Gives both evaluation splits a changed file in all forms of an evaluator."""

    metrics = {split: dict(cfg[f'{split}_evaluator']) for split in ('val', 'test')}

    def write(change, path=tmp_path / 'other.json', **options):
        content = json.loads((root / 'instances.json').read_text())
        change(content)
        path.write_text(json.dumps(content))
        for split, metric in metrics.items():
            cfg[f'{split}_evaluator'] = request.param(dict(metric, ann_file=str(path), **options))
        return path

    return write


@pytest.mark.parametrize('split', ['val', 'test'])
@pytest.mark.parametrize(
    'change, expected',
    [
        (
            lambda content: content['annotations'][0].update(bbox=[0, 0, 8, 8]),
            'annotation id 1 is',
        ),
        (lambda content: content['images'].pop(), '1 images of the data are not in it'),
        (lambda content: content['annotations'][0].update(iscrowd=1), 'annotation id 1 is'),
        (lambda content: content['annotations'][0].update(area=5), 'annotation id 1 is'),
    ],
    ids=['box', 'image', 'crowd', 'area'],
)
def test_an_evaluator_of_other_data_is_told(cfg, model, evaluator, split, change, expected):
    path = evaluator(change)
    with pytest.raises(
        ConfigError,
        match=f'^{path}: the evaluator reads this file, .*{expected}.*'
        rf'Set {split}_evaluator[.a-z0-9]*\.ann_file and '
        f'{split}_dataloader.dataset.ann_file',
    ):
        preflight.check_data(cfg, split, model)


@pytest.mark.parametrize(
    'change, expected',
    [
        (lambda content: content['annotations'][0].pop('iscrowd'), 'id 1 has no iscrowd'),
        (lambda content: content['annotations'][0].update(id=0), 'the id 0'),
        (lambda content: change_all(content, iscrowd=1), 'no box of cat, dog to compare with'),
        (lambda content: content.update(annotations=[]), 'no box of cat, dog to compare with'),
        (lambda content: content['categories'].reverse(), 'order'),
        (lambda content: content['annotations'][0].update(bbox=[]), 'bbox'),
        (
            lambda content: change_all(content, bbox=[99, 99, 9, 9]),
            'all 4 boxes of cat, dog have no',
        ),
    ],
    ids=['iscrowd', 'id', 'crowds', 'none', 'order', 'bbox', 'outside'],
)
def test_what_pycocotools_cannot_evaluate_is_told(cfg, model, evaluator, change, expected):
    path = evaluator(change)
    with pytest.raises(
        ConfigError,
        match=rf'^{path}: .*{expected}.* The file is set by '
        r'val_evaluator[.a-z0-9]*\.ann_file$',
    ):
        preflight.check_data(cfg, 'val', model)


def test_a_box_that_no_detection_can_match_is_told_and_no_error(cfg, model, evaluator, told):
    path = evaluator(lambda content: content['annotations'][1].update(bbox=[99, 9, 9, 9]))
    cfg.val_dataloader.dataset.ann_file = str(path)
    preflight.check_data(cfg, 'val', model)
    assert [
        line
        for line in told
        if 'no detection can match them (the first has the id 2)' in line
        and line.startswith(f'{path}: 1 boxes')
    ] == told


@pytest.mark.parametrize(
    'change, expected',
    [
        (dict(ignore=1), 'are marked ignore: mmdet does not train on them, and pycocotools'),
        (dict(area=1e7), 'have an area larger than their image'),
    ],
)
def test_what_counts_against_a_detector_is_told_and_no_error(
    cfg, model, evaluator, told, change, expected
):
    path = evaluator(lambda content: content['annotations'][1].update(change))
    cfg.val_dataloader.dataset.ann_file = str(path)
    preflight.check_data(cfg, 'val', model)
    assert [line for line in told if f'{path}: 1 boxes {expected}' in line] == told != []
    assert all('(the first has the id 2)' in line for line in told)


MOVING = {
    'flip': dict(type='RandomFlip', prob=0.5),
    'flips': dict(type='RandomFlip', prob=[0.5, 0.2], direction=['horizontal', 'vertical']),
    'crop': dict(type='RandomCrop', crop_size=(32, 32)),
    'affine': dict(type='RandomAffine'),
    'mosaic': dict(type='Mosaic', img_scale=(64, 64)),
    'rotation': dict(type='Rotate'),
    'inside': dict(type='RandomApply', transforms=[dict(type='Expand')]),
}


@pytest.mark.parametrize('transform', MOVING.values(), ids=MOVING)
def test_a_pipeline_of_evaluation_moves_nothing(cfg, model, transform):
    cfg.val_dataloader.dataset.pipeline.insert(3, transform)
    with pytest.raises(
        ConfigError, match=r'^val_dataloader\.dataset\.pipeline: \w+ moves objects.* Leave it out'
    ):
        preflight.check_data(cfg, 'val', model)


@pytest.mark.parametrize(
    'transform',
    [
        dict(type='RandomFlip', prob=0.0),
        dict(type='RandomChoiceResize', scales=[(64, 64), (32, 32)]),
        dict(type='PhotoMetricDistortion'),
        dict(
            type='RandomCenterCropPad',
            crop_size=None,
            ratios=None,
            border=None,
            mean=[0, 0, 0],
            std=[1, 1, 1],
            to_rgb=True,
            test_mode=True,
            test_pad_mode=['logical_or', 127],
        ),
    ],
    ids=lambda transform: transform['type'],
)
def test_a_pipeline_of_evaluation_may_change_what_is_taken_back(cfg, model, transform):
    cfg.val_dataloader.dataset.pipeline.insert(3, transform)
    preflight.check_data(cfg, 'val', model)


def test_views_of_an_image_may_be_flipped(cfg, model):
    """Test-time augmentation flips the boxes back."""
    load, *others, pack = cfg.val_dataloader.dataset.pipeline
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    cfg.val_dataloader.dataset.pipeline = [
        load,
        dict(type='TestTimeAug', transforms=[*([other] for other in others), flips, [pack]]),
    ]
    preflight.check_data(cfg, 'val', model)


def test_a_metric_that_does_not_exist_is_told(cfg, model):
    cfg.val_evaluator = [cfg.val_evaluator, dict(type='CocoMetrik')]
    with pytest.raises(
        ConfigError,
        match=r'^val_evaluator\.1\.type: there is no metric '
        "'CocoMetrik'; did you mean 'CocoMetric'",
    ):
        preflight.check_data(cfg, 'val', model)


def test_a_copy_or_a_link_is_the_same_data(cfg, model, evaluator, root, tmp_path):
    evaluator(lambda content: content['annotations'].reverse())
    preflight.check_data(cfg, 'val', model)
    (tmp_path / 'link.json').symlink_to(root / 'instances.json')
    evaluator(lambda content: None, tmp_path / 'link.json')
    preflight.check_data(cfg, 'val', model)


def test_evaluated_masks_have_to_be_there(cfg, model, evaluator):
    evaluator(lambda content: None, metric=['bbox', 'segm'])
    with pytest.raises(ConfigError, match='id 1 has no segmentation'):
        preflight.check_data(cfg, 'val', model)


def test_results_alone_need_no_boxes(cfg, model, evaluator):
    """As for a test server."""
    path = evaluator(
        lambda content: content.pop('annotations'), format_only=True, outfile_prefix='x'
    )
    cfg.test_dataloader.dataset.ann_file = str(path)
    preflight.check_data(cfg, 'test', model)


def test_a_part_of_the_evaluators_images_is_told(cfg, model):
    cfg.val_dataloader.dataset.indices = 2
    with pytest.raises(ConfigError, match='2 of its images are not in the data; AP would be'):
        preflight.check_data(cfg, 'val', model)


def test_an_evaluator_for_each_of_several_data_sets(cfg, model, root, tmp_path):
    content = json.loads((root / 'instances.json').read_text())
    content['images'] = content['images'][:2]
    (tmp_path / 'part.json').write_text(json.dumps(content))
    whole = cfg.val_dataloader.dataset
    part = dict(whole, ann_file=str(tmp_path / 'part.json'))
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[whole, part])
    metrics = [
        dict(cfg.val_evaluator, ann_file=path)
        for path in (cfg.val_evaluator.ann_file, part['ann_file'])
    ]
    cfg.val_evaluator = dict(
        type='MultiDatasetsEvaluator', metrics=metrics, dataset_prefixes=['whole', 'part']
    )
    preflight.check_data(cfg, 'val', model)
    metrics.reverse()
    cfg.val_evaluator.metrics = metrics
    with pytest.raises(ConfigError, match='evaluator reads this file'):
        preflight.check_data(cfg, 'val', model)
    cfg.val_evaluator = metrics[1]
    with pytest.raises(ConfigError, match='image id 0 is in several data sets'):
        preflight.check_data(cfg, 'val', model)


def test_formats_that_only_inherit_from_coco_are_left_alone(cfg, model, root, tmp_path):
    """LVIS and panoptic files have other fields."""

    class Other(CocoDataset):
        def load_data_list(self):
            return []

    path = tmp_path / 'other.json'
    path.write_text('[]')
    cfg.train_dataloader.dataset.update(type=Other, ann_file=str(path))
    preflight.check_data(cfg, 'train', model)


def test_each_file_is_read_once(cfg, model, monkeypatch):
    """The largest take ten seconds."""
    read = []
    monkeypatch.setattr(
        paths,
        '_read_json',
        lambda option, path: read.append(path) or json.loads(Path(path).read_text()),
    )
    preflight.check_data(cfg, 'val', model)
    assert len(read) == 1
