"""Pictures and one COCO json of what is found; a broken image does not stop the others."""

import json

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from tiny_detector import CLASSES, make_coco, write_config
from tool_process import refuse, succeed

from dn_mmdet.checks import preflight
from dn_mmdet.checks.preflight import ConfigError
from dn_mmdet.cli.predict import find_images

# The weights are random: each class has about a third. Drawing many boxes takes time.
ALL = ('--score-thr', '0.1', '--cfg-options', 'model.test_cfg.max_per_img=5')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A data set, a config, and weights that are random."""
    root = tmp_path_factory.mktemp('predict')
    make_coco(root)
    torch.manual_seed(0)
    model = preflight.check_model(Config.fromfile(write_config(root, 'DNB')))
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=CLASSES))),
        root / 'weights.pth',
    )
    return root


@pytest.fixture
def arguments(root):
    return 'predict', root / 'tiny_dnb.py', root / 'weights.pth'


def read(folder):
    """predictions.json, checked as far as every one has to hold."""
    content = json.loads((folder / 'predictions.json').read_text())
    images = {image['id']: image for image in content['images']}
    assert len(images) == len(content['images'])
    assert [category['id'] for category in content['categories']] == [0, 1]
    ids = [annotation['id'] for annotation in content['annotations']]
    assert len(set(ids)) == len(ids)
    for annotation in content['annotations']:
        image = images[annotation['image_id']]
        x, y, w, h = annotation['bbox']
        assert x >= 0 and y >= 0 and w > 0 and h > 0
        assert x + w <= image['width'] + 1e-3 and y + h <= image['height'] + 1e-3
        assert annotation['area'] == w * h
        assert annotation['category_id'] in (0, 1) and 0 < annotation['score'] < 1
    return content


def drawn(folder):
    return sorted(path.name for path in (folder / 'vis').iterdir())


def test_finds_an_image_or_the_images_of_a_folder(root, tmp_path):
    one = root / 'images' / '0.png'
    assert find_images(one) == [one]
    assert find_images(root / 'images') == [root / 'images' / f'{i}.png' for i in range(4)]
    odd = tmp_path / 'no suffix'
    odd.touch()
    assert find_images(odd) == [odd]  # named itself
    (tmp_path / 'B.JPG').touch()
    (tmp_path / 'folder.png').mkdir()
    assert find_images(str(tmp_path)) == [tmp_path / 'B.JPG']


def test_no_images_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match='absent.png: no such image or folder'):
        find_images(tmp_path / 'absent.png')
    (tmp_path / 'notes.txt').touch()
    with pytest.raises(ConfigError, match='holds no images .*\\.jpg'):
        find_images(tmp_path)


def test_an_image_of_another_size_and_shape(arguments, tmp_path):
    """Boxes are in its own pixels; a grey image is one like others."""
    mmcv.imwrite(
        np.random.default_rng(0).integers(0, 255, (48, 200), np.uint8),
        str(tmp_path / 'a grey ünit.png'),
    )
    succeed(*arguments, 'a grey ünit.png', *ALL, cwd=tmp_path)
    content = read(tmp_path / 'predictions')
    assert content['images'] == [dict(id=0, file_name='a grey ünit.png', height=48, width=200)]
    assert len(content['annotations']) > 0
    assert max(a['bbox'][0] + a['bbox'][2] for a in content['annotations']) > 64
    picture = mmcv.imread(str(tmp_path / 'predictions' / 'vis' / 'a grey ünit.png'))
    assert picture.shape == (48, 200, 3)
    assert len(set(map(tuple, picture.reshape(-1, 3)))) > 256  # coloured: boxes are drawn


def test_broken_images_are_named_and_the_others_done(arguments, root, tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    good = (root / 'images' / '0.png').read_bytes()
    (folder / '1 good.png').write_bytes(good)
    (folder / '2 text.jpg').write_text('no image')
    (folder / '3 empty.png').touch()
    (folder / '4 half.png').write_bytes(good[: len(good) // 2])
    (folder / '5 good.png').write_bytes((root / 'images' / '1.png').read_bytes())
    message = refuse(*arguments, 'images', '--out-dir', 'out', *ALL, cwd=tmp_path)
    assert message.startswith('3 of 5 files cannot be read as images and were left out: ')
    assert all(name in message for name in ('2 text.jpg', '3 empty.png', '4 half.png'))
    content = read(tmp_path / 'out')
    assert [image['file_name'] for image in content['images']] == ['1 good.png', '5 good.png']
    assert {a['image_id'] for a in content['annotations']} == {0, 1}
    assert [category['name'] for category in content['categories']] == ['cat', 'dog']
    assert drawn(tmp_path / 'out') == ['1 good.png', '5 good.png']


def test_the_threshold_leaves_out_weaker_detections(arguments, root, tmp_path):
    succeed(*arguments, root / 'images', '--score-thr', '0.99', cwd=tmp_path)
    content = read(tmp_path / 'predictions')
    assert len(content['images']) == 4 and content['annotations'] == []


@pytest.mark.slow
def test_classes_come_from_the_config_where_the_checkpoint_names_none(arguments, root, tmp_path):
    """mmdet would take COCO's: a cat would be a person."""
    state = torch.load(root / 'weights.pth')['state_dict']
    torch.save(state, tmp_path / 'bare.pth')
    succeed(*arguments[:2], 'bare.pth', root / 'images' / '0.png', *ALL, cwd=tmp_path)
    content = read(tmp_path / 'predictions')
    assert [category['name'] for category in content['categories']] == ['cat', 'dog']


@pytest.mark.parametrize('name', ['predictions.json', 'vis/2.png'])
def test_no_file_is_replaced(arguments, root, tmp_path, name):
    mine = tmp_path / 'found' / name
    mine.parent.mkdir(parents=True)
    mine.write_text('mine')
    message = refuse(*arguments, root / 'images', '--out-dir', 'found', cwd=tmp_path)
    assert f'found/{name}: exists already; name another folder with --out-dir' in message
    assert mine.read_text() == 'mine'


def test_a_prediction_may_be_made_again(arguments, root, tmp_path):
    for _ in range(2):
        succeed(*arguments, root / 'images', '--out-dir', 'found', cwd=tmp_path)


@pytest.mark.parametrize(
    'images, options, expected',
    [
        ('absent', (), 'absent: no such image or folder'),
        ('.', (), 'holds no images'),
        ('{root}/images', ('--out-dir', 'file/x'), 'file/x: cannot be written to'),
        ('{root}/images', ('--cfg-options', 'model.bbox_head.num_classes=3'), 'of another size'),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_written(
    arguments, root, tmp_path, images, options, expected
):
    (tmp_path / 'file').touch()
    message = refuse(*arguments, images.format(root=root), *options, cwd=tmp_path)
    assert expected in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file']
