"""A type in a config is what the registry makes of it, however it is written."""

import sys

import pytest
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import Resize
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.registry import DATASETS, HOOKS, MODELS, TRANSFORMS
from mmengine.dataset import BaseDataset
from mmengine.registry import DefaultScope
from torch import nn

from dn_mmdet import DNB, DNC
from dn_mmdet.registered import is_of, loaded, name_of, resolve


@pytest.fixture(autouse=True)
def scope_of_mmdet():
    """Names without a scope are looked up in the current one, which a test before may have set."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.mark.parametrize(
    'registry, kind, expected',
    [
        (HOOKS, 'DetVisualizationHook', DetVisualizationHook),
        (HOOKS, 'mmdet.DetVisualizationHook', DetVisualizationHook),
        (HOOKS, 'mmdet.engine.hooks.DetVisualizationHook', DetVisualizationHook),
        (HOOKS, DetVisualizationHook, DetVisualizationHook),
        (MODELS, 'DNB', DNB),
        (MODELS, 'mmengine.DNB', DNB),
        (MODELS, 'dn_mmdet.DNC', DNC),
        (MODELS, 'dn_mmdet.layers.DNC', DNC),
        (MODELS, 'torch.nn.GELU', nn.GELU),
        (TRANSFORMS, 'mmdet.Resize', Resize),
        (DATASETS, 'mmdet.CocoDataset', CocoDataset),
    ],
)
def test_names_scopes_paths_and_classes_are_resolved(registry, kind, expected):
    assert resolve(registry, kind) is expected


@pytest.mark.parametrize(
    'kind', ['DNX', 'mmdet.DNX', 'nowhere.DNX', 'torch.nn.DNX', 'a b', '', None, 3, print]
)
def test_what_is_no_class_is_none(kind):
    assert resolve(MODELS, kind) is None


@pytest.mark.parametrize(
    'node, expected',
    [
        (dict(type='CocoDataset'), True),
        (dict(type='mmdet.LVISV1Dataset'), True),
        (dict(type=CocoDataset, ann_file='x'), True),
        (dict(type='mmdet.XMLDataset'), False),
        (dict(type='NoDataset'), False),
        (dict(), False),
        (None, False),
        ([], False),
    ],
)
def test_subclasses_count(node, expected):
    assert is_of(DATASETS, node, CocoDataset) is expected
    assert is_of(DATASETS, node, (CocoDataset, BaseDataset)) is (
        expected or node == dict(type='mmdet.XMLDataset')
    )


@pytest.mark.parametrize(
    'name, expected',
    [
        ('DNB', DNB),
        ('mmengine.DNB', DNB),
        ('dn_mmdet.layers.DNB', DNB),
        ('dn_mmdet.DNC', DNC),
        ('DNX', None),
        ('mmdet.DNX', None),
        ('nowhere.DNX', None),
        ('', None),
    ],
)
def test_a_class_that_is_loaded_is_found_by_its_name(name, expected):
    assert loaded(MODELS, name) is expected


def test_nothing_is_imported_for_a_name(tmp_path, monkeypatch):
    """A checkpoint could name any module that is installed."""
    (tmp_path / 'never_imported.py').write_text('class Norm: pass')
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('never_imported.Norm', 'never_imported'):
        assert loaded(MODELS, name) is None
    assert 'never_imported' not in sys.modules
    assert resolve(MODELS, 'never_imported.Norm') is not None  # a config may
    del sys.modules['never_imported']


def test_messages_call_a_class_by_its_name():
    assert [name_of(kind) for kind in (DNB, 'DNB', 3)] == ['DNB', 'DNB', '3']
