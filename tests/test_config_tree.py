"""A config's dicts are found wherever they are, and its imports are edited in one way."""

import pytest
from mmengine.config import Config

from dn_mmdet.config_tree import add_imports, dicts, imports_of, remove_imports


def test_dicts_come_outer_ones_first_with_their_options():
    node = dict(neck=[dict(a=1), (dict(b=dict(c=2)),)], depth=3)
    assert [option for option, _ in dicts(node, 'model')] == [
        'model',
        'model.neck.0',
        'model.neck.1.0',
        'model.neck.1.0.b',
    ]


def test_what_is_changed_on_the_way_is_what_is_visited():
    node = dict(a=dict(old=dict(x=1)))
    for _, each in dicts(node, 'model'):
        if 'old' in each:
            each['new'] = each.pop('old')
    assert [option for option, _ in dicts(node, 'model')] == ['model', 'model.a', 'model.a.new']


@pytest.mark.parametrize(
    'before, names',
    [
        ({}, []),
        (dict(custom_imports=None), []),
        (dict(custom_imports=dict(imports='some')), ['some']),
        (dict(custom_imports=dict(imports=['some', 'dn_mmdet'])), ['some', 'dn_mmdet']),
    ],
)
def test_imports_are_added_once_behind_those_that_are_there(before, names):
    cfg = Config(before)
    assert imports_of(cfg) == names
    add_imports(cfg, 'dn_mmdet', 'dn_mmdet.fold')
    assert cfg.custom_imports.imports == list(dict.fromkeys([*names, 'dn_mmdet', 'dn_mmdet.fold']))


def test_what_a_config_says_on_failed_imports_stays():
    cfg = Config(dict(custom_imports=dict(imports=['a'], allow_failed_imports=True)))
    add_imports(cfg, 'b')
    assert cfg.custom_imports.allow_failed_imports is True
    cfg = Config()
    add_imports(cfg, 'b')
    assert cfg.custom_imports.allow_failed_imports is False


def test_imports_are_removed_under_their_old_names_too():
    cfg = Config(dict(custom_imports=dict(imports=['dn_mmdet.controls', 'mine', 'dn_mmdet.fold'])))
    remove_imports(cfg, 'dn_mmdet.experiments.controls', 'dn_mmdet.fold')
    assert imports_of(cfg) == ['mine']
