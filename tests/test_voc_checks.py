"""What is wrong in data as VOC writes them is found before a training, or told."""

import logging

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope

from dn_mmdet.checks import voc
from dn_mmdet.messages import ConfigError

CLASSES = ('cat', 'dog')
XML = """<annotation>{size}
<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin>
<ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object></annotation>"""
SIZE = '<size><width>64</width><height>48</height></size>'


def write(root, number, corners=(10, 10, 40, 40), name='cat', difficult=0, size=SIZE, ext='jpg'):
    for folder in ('Annotations', 'JPEGImages'):
        (root / 'VOC2007' / folder).mkdir(parents=True, exist_ok=True)
    text = XML.format(*corners, name=name, difficult=difficult, size=size)
    (root / 'VOC2007' / 'Annotations' / f'{number:06}.xml').write_text(text)
    cv2.imwrite(
        str(root / 'VOC2007' / 'JPEGImages' / f'{number:06}.{ext}'),
        np.zeros((48, 64, 3), np.uint8),
    )
    with open(root / 'VOC2007' / 'train.txt', 'a') as file:
        file.write(f'{number:06}\n')


def dataset(root, pipeline=(), **more):
    init_default_scope('mmdet')
    cfg = dict(
        type='VOCDataset',
        data_root=str(root),
        ann_file='VOC2007/train.txt',
        data_prefix=dict(sub_data_root='VOC2007'),
        metainfo=dict(classes=CLASSES),
        filter_cfg=dict(filter_empty_gt=True, min_size=0),
        pipeline=[dict(type='LoadImageFromFile'), *pipeline],
        lazy_init=True,
    )
    return DATASETS.build(dict(cfg, **more))


def checked(root, training=True, **more):
    made = dataset(root, **more)
    assert voc.reads_voc(made)
    return voc.check_voc('train_dataloader.dataset', made, training)


def test_what_is_right_passes_and_counts_as_mmdet_counts(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, name='dog', difficult=1)
    write(tmp_path, 2, name='owl')
    write(tmp_path, 3, size='')
    made = dataset(tmp_path)
    ids = checked(tmp_path)
    made.full_init()
    assert ids == [made.get_data_info(i)['img_id'] for i in range(len(made))]
    assert ids == ['000000', '000001', '000003']
    assert len(checked(tmp_path, training=False)) == 4
    every = dict(filter_empty_gt=False, min_size=0)
    assert len(checked(tmp_path, filter_cfg=every)) == 4
    assert checked(tmp_path, filter_cfg=dict(every, min_size=50)) == []
    assert checked(tmp_path, indices=2) == ['000000', '000001']
    assert checked(tmp_path, indices=[-1], training=False) == ['000003']


def test_what_mmdet_does_not_look_at_is_not_looked_at(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, name='owl', difficult='Unspecified', size=SIZE)
    change(tmp_path, 'Annotations/000001.xml', 'bndbox', 'box')
    write(tmp_path, 2, (10, 10, 10, 40), ext='png')
    assert checked(tmp_path, indices=1) == ['000000']
    change(tmp_path, 'Annotations/000002.xml', '<width>64', '<width>4')
    assert checked(tmp_path, filter_cfg=dict(min_size=40, filter_empty_gt=True)) == ['000000']


def test_a_folder_without_a_prefix_is_the_current_one(tmp_path, monkeypatch):
    write(tmp_path, 0)
    monkeypatch.chdir(tmp_path / 'VOC2007')
    layout = dict(type='XMLDataset', data_prefix=dict(), data_root='', ann_file='train.txt')
    assert checked(tmp_path, **layout) == ['000000']


def change(root, path, old, new):
    path = root / 'VOC2007' / path
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    'wrong, message',
    [
        (lambda root: write(root, 1, (40, 10, 10, 40)), r'000001.xml: expected boxes .*\(40, 10,'),
        (lambda root: write(root, 1, (10, 10, 10, 40)), 'with a width and a height above 0'),
        (lambda root: change(root, 'train.txt', '000000', '000000.jpg'), 'an id, without .jpg'),
        (
            lambda root: (root / 'VOC2007/Annotations/000000.xml').unlink(),
            r'000000.xml: no such file.*set by train_dataloader.dataset.data_prefix.sub_data_root',
        ),
        (lambda root: write(root, 1, ext='png'), r'000001.jpg: no such image'),
        (lambda root: change(root, 'Annotations/000000.xml', 'cat', 'owl'), 'boxes of owl, none'),
        (
            lambda root: write(root, 1, name='Dog'),
            r"1 boxes are of the class 'Dog', and .*metainfo.classes has 'dog'",
        ),
        (lambda root: change(root, 'Annotations/000000.xml', '</object>', ''), 'ParseError'),
        (lambda root: change(root, 'Annotations/000000.xml', '40', 'inf'), 'expected an XML file'),
        (lambda root: change(root, 'Annotations/000000.xml', 'bndbox', 'box'), 'name and bndbox'),
        (
            lambda root: change(root, 'Annotations/000000.xml', '<width>64', '<width>99'),
            r'000000.xml: id .* the width 99 and the height 48, .*has 64 and 48',
        ),
        (lambda root: (root / 'VOC2007/train.txt').write_text(''), 'expected ids of images'),
    ],
)
def test_mistakes_are_told_before_a_training(wrong, message, tmp_path):
    write(tmp_path, 0)
    wrong(tmp_path)
    with pytest.raises(ConfigError, match=message):
        checked(tmp_path)


def test_a_prefix_without_the_folder_of_voc_is_told(tmp_path):
    write(tmp_path, 0)
    with pytest.raises(ConfigError, match='data_prefix: expected sub_data_root.*JPEGImages'):
        checked(tmp_path, type='XMLDataset', data_prefix=dict(img='VOC2007/JPEGImages'))


def test_thin_boxes_that_the_pipeline_drops_are_none(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, (10, 10, 10, 40))
    drops = dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1))
    masks = dict(drops, by_box=False, by_mask=True)
    with pytest.raises(ConfigError, match='with a width and a height'):
        checked(tmp_path, pipeline=[masks])
    assert voc.drops_thin_boxes(drops) and not voc.drops_thin_boxes(masks)
    assert len(checked(tmp_path, pipeline=[drops])) == 2
    assert len(checked(tmp_path, filter_cfg=dict(bbox_min_size=2))) == 2
    assert len(checked(tmp_path, training=False)) == 2


def test_what_loses_boxes_is_told(tmp_path, caplog):
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance('voc')
    logger.addHandler(caplog.handler)
    write(tmp_path, 0)
    write(tmp_path, 1, (10, 10, 400, 40))
    write(tmp_path, 2, name='owl')
    with caplog.at_level(logging.WARNING):
        checked(tmp_path)
    assert 'boxes of other classes are left out: 1 of owl' in caplog.text
    assert '1 boxes reach out of their image' in caplog.text


def test_another_reader_of_xml_is_left_to_itself(tmp_path):
    from mmdet.datasets import VOCDataset

    class Own(VOCDataset):
        def parse_data_info(self, info):
            return super().parse_data_info(info)

    write(tmp_path, 0)
    assert not voc.reads_voc(
        Own(
            data_root=str(tmp_path),
            ann_file='VOC2007/train.txt',
            data_prefix=dict(sub_data_root='VOC2007'),
            pipeline=[],
            lazy_init=True,
        )
    )
