"""The built-in digits: the same for the same seed, whole or absent, rightly annotated."""

import json
import multiprocessing

import numpy as np
import pytest
from mmdet.registry import DATASETS

from dn_mmdet.datasets import digits
from dn_mmdet.datasets.digits import CLASSES, IMAGE_SIZE, VERSION, DigitsDataset, make_digits

FEW = dict(num_train=4, num_val=2)


def content(root):
    return {
        path.relative_to(root): path.read_bytes() for path in root.rglob('*') if path.is_file()
    }


@pytest.fixture(scope='module')
def sources():
    return digits._sources()


@pytest.fixture
def few_by_default(monkeypatch):
    monkeypatch.setattr(make_digits, '__defaults__', (0, 4, 2))


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        make_digits(tmp_path / name, seed=seed, **FEW)
    a, b, c = (content(tmp_path / name) for name in 'abc')
    assert a == b
    assert a != c
    assert len(a) == 4 + 2 + 3  # images, two json, version


def test_train_and_val_share_no_digit(sources):
    inks, _ = sources
    train, val = digits._split(inks, np.random.default_rng(0))
    assert len(train) + len(val) == len(inks) == 1797
    assert not {id(ink) for ink, _ in train} & {id(ink) for ink, _ in val}
    for part in (train, val):
        assert {label for _, label in part} == set(range(10))


def test_boxes_are_exactly_what_was_drawn(sources, monkeypatch):
    inks, _ = sources
    grey = np.full((427, 640, 3), 128, np.uint8)
    for seed in range(20):
        pixels, boxes = digits.draw(inks, [grey], np.random.default_rng(seed))
        changed = (pixels != 128).any(-1)
        free = changed.copy()
        for _, (x, y, w, h) in boxes:
            assert 0 <= x and 0 <= y and x + w <= IMAGE_SIZE and y + h <= IMAGE_SIZE
            inside = changed[y : y + h, x : x + w]
            assert inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()
            assert free[y : y + h, x : x + w].any()  # no box lies over another
            free[y : y + h, x : x + w] = False
        assert not free.any()


def test_is_a_coco_data_set(tmp_path):
    make_digits(tmp_path / 'digits', **FEW)
    dataset = DATASETS.build(
        dict(
            type='mmdet.DigitsDataset',
            data_root=str(tmp_path / 'digits'),
            ann_file='instances_train.json',
            data_prefix=dict(img='images/'),
            pipeline=[],
        )
    )
    assert isinstance(dataset, DigitsDataset)
    assert dataset.metainfo['classes'] == CLASSES
    assert len(dataset) == 4
    annotations = json.loads((tmp_path / 'digits' / 'instances_train.json').read_text())
    expected = [a['category_id'] for a in annotations['annotations'] if a['image_id'] == 0]
    assert [i['bbox_label'] for i in dataset.get_data_info(0)['instances']] == expected


def test_is_made_when_annotations_are_first_needed(tmp_path, few_by_default):
    arguments = dict(
        data_root=str(tmp_path / 'digits'),
        ann_file='instances_val.json',
        data_prefix=dict(img='images/'),
        pipeline=[],
    )
    dataset = DigitsDataset(**arguments, lazy_init=True)
    assert not (tmp_path / 'digits').exists()
    dataset.full_init()
    assert len(dataset) == 2


def test_several_processes_make_it_once(tmp_path):
    processes = [
        multiprocessing.get_context('fork').Process(
            target=make_digits, args=(tmp_path / 'digits',), kwargs=FEW
        )
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    make_digits(tmp_path / 'alone', **FEW)
    assert content(tmp_path / 'digits') == content(tmp_path / 'alone')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['alone', 'digits']


def test_nothing_half_made_is_left(tmp_path, monkeypatch):
    def full_disk(pixels, path):
        raise OSError(28, 'No space left on device', path)

    monkeypatch.setattr(digits.mmcv, 'imwrite', full_disk)
    with pytest.raises(OSError, match='No space'):
        make_digits(tmp_path / 'digits', **FEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'name, text, found',
    [('holiday.txt', 'mine', 'nothing of this kind'), ('version.txt', '0\n', '0')],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f'version {VERSION}, found {found}; remove'):
        make_digits(tmp_path, **FEW)
    assert content(tmp_path) == {(tmp_path / name).relative_to(tmp_path): text.encode()}
