"""The layers are found by name from every scope, once, and take no foreign place."""

import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import awake
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.registry import MODELS, DefaultScope, Registry
from torch import nn

import dn_mmdet
from dn_mmdet import layers

NAMES = ['DNB', 'DNC', 'DNB1d', 'DNC1d', 'DNB3d', 'DNC3d', 'SyncDNB', 'SyncDNC']


@pytest.fixture
def other_project():
    """A project of OpenMMLab's kind, with a registry and a scope of its own."""
    yield Registry('model', parent=MODELS, scope='otherproject')
    MODELS.children.pop('otherproject')


@pytest.mark.parametrize('scope', [None, 'mmengine', 'mmdet', 'mmcv', 'otherproject'])
@pytest.mark.parametrize('name', NAMES)
def test_build_norm_layer_finds_it_from_every_scope(name, scope, other_project):
    with DefaultScope.overwrite_default_scope(scope):
        attribute, layer = build_norm_layer(dict(type=name, momentum=0.03), 32, postfix=1)
    assert attribute == 'bn1'
    assert type(layer) is getattr(dn_mmdet, name)
    assert (layer.num_features, layer.eps, layer.momentum) == (32, 1e-5, 0.03)


def test_other_registries_find_it(other_project):
    import mmdet.registry

    assert mmdet.registry.MODELS.get('DNB') is dn_mmdet.DNB
    assert other_project.get('DNB') is dn_mmdet.DNB
    assert isinstance(other_project.build(dict(type='DNB', num_features=8)), dn_mmdet.DNB)


def test_the_class_itself_can_be_the_type():
    name, layer = build_norm_layer(dict(type=dn_mmdet.DNB), 8)
    assert name == 'bn' and isinstance(layer, dn_mmdet.DNB)


def test_every_argument_reaches_the_layer():
    cfg = dict(
        type='DNB',
        eps=1e-3,
        momentum=None,
        affine=False,
        track_running_stats=False,
        reduction=2,
        min_channels=3,
        inputs='standardized',
        bound=None,
    )
    layer = build_norm_layer(cfg, 32)[1]
    assert (layer.eps, layer.momentum, layer.affine, layer.track_running_stats) == (
        1e-3,
        None,
        False,
        False,
    )
    assert (len(layer.sc.b_in), layer.sc.inputs, layer.sc.bound) == (16, 'standardized', None)


def test_a_misspelt_argument_is_refused():
    with pytest.raises(TypeError, match='momentun'):
        build_norm_layer(dict(type='DNB', momentun=0.1), 8)


class HalfSC(dn_mmdet.SC):
    """As somebody's own module: g and h half as large."""

    def __init__(self, *args, factor=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def forward(self, mean, std):
        return tuple(self.factor * t for t in super().forward(mean, std))


@pytest.mark.parametrize('cls', [dn_mmdet.DNB, dn_mmdet.SyncDNC])
def test_a_registered_module_takes_the_place_of_sc(cls, monkeypatch, close):
    monkeypatch.setitem(MODELS.module_dict, 'HalfSC', HalfSC)
    norm = dict(type=cls.__name__, reduction=2, eps=1e-3)
    half = build_norm_layer(dict(norm, sc=dict(type='HalfSC', factor=0.25, bound=1.0)), 8)[1]
    whole = build_norm_layer(dict(norm, sc=dict(type='SC', bound=1.0)), 8)[1]
    assert type(half.sc) is HalfSC and type(whole.sc) is dn_mmdet.SC
    assert len(half.sc.b_in) == 8 and half.sc.bound == whole.sc.bound == 1.0 and half.eps == 1e-3
    half.load_state_dict(awake(whole).state_dict())
    x = torch.randn(4, 8, 5, 5)
    z = F.batch_norm(x, None, None, training=True, eps=1e-3)
    close(half.eval().train()(x) - z, 0.25 * (whole(x) - z))


@pytest.mark.parametrize('sc', ['SC', dict(bound=1.0), dn_mmdet.SC])
def test_what_is_no_config_of_an_sc_is_refused(sc):
    with pytest.raises(TypeError, match=r'sc: expected the config of a module, .* got '):
        dn_mmdet.DNB(8, sc=sc)


def test_conv_module_calls_it_bn():
    module = ConvModule(3, 8, 3, norm_cfg=dict(type='DNB'))
    assert module.norm_name == 'bn' and isinstance(module.bn, dn_mmdet.DNB)
    assert not module.with_bias  # bias='auto': none before a norm


def test_registering_again_changes_nothing():
    assert layers._register(dn_mmdet.DNB) is dn_mmdet.DNB
    assert MODELS.get('DNB') is dn_mmdet.DNB


def test_importing_the_file_again_replaces_its_own_classes():
    spec = importlib.util.spec_from_file_location('dn_mmdet.layers', layers.__file__)
    again = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(again)
        assert MODELS.get('DNB') is again.DNB is not dn_mmdet.DNB
    finally:
        for name in NAMES:
            MODELS.register_module(module=getattr(dn_mmdet, name), force=True)


def test_a_foreign_class_of_the_name_stays_and_is_an_error(monkeypatch):
    foreign = type('DNB', (nn.Module,), {'__module__': 'somewhere.else'})
    monkeypatch.setitem(MODELS.module_dict, 'DNB', foreign)
    with pytest.raises(KeyError, match='DNB is already registered.*somewhere.else'):
        layers._register(dn_mmdet.DNB)
    assert MODELS.get('DNB') is foreign


def test_the_one_line_of_the_readme():
    line = (
        'import dn_mmdet; from mmcv.cnn import build_norm_layer; '
        "print(build_norm_layer(dict(type='DNB'), 32))"
    )
    done = subprocess.run([sys.executable, '-c', line], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("('bn', DNB(")
