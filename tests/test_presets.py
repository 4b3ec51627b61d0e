"""Each preset holds the grid that it is named for, and its variants are what they say."""

import copy

import pytest
import torch
from mmengine.config import Config
from tiny_detector import make_coco, write_config
from torch import nn

from dn_mmdet import DNB, DNC, ScaledBN
from dn_mmdet.checks.preflight import ConfigError, check_model
from dn_mmdet.convert import batch_norms, dn_layers, swap_norm
from dn_mmdet.experiments.compare import NamedConfig, check, configured, differences
from dn_mmdet.experiments.controls import BNSE, StaticDN
from dn_mmdet.experiments.presets import CONTROLS, PRESETS, SC_FACTORS, points_of, widened
from dn_mmdet.experiments.recording import norm_counts
from dn_mmdet.kernels.choice import compiled_kernels


@pytest.fixture(scope='module')
def bn(tmp_path_factory):
    root = tmp_path_factory.mktemp('tiny')
    (root / 'images').mkdir()
    make_coco(root)
    path = write_config(root)
    return NamedConfig('tiny_bn', str(path), Config.fromfile(path))


def grid(name, bn, seeds=(0, 1), lr=None, batch=None, epochs=None):
    return points_of(name, bn, seeds, lr, batch, epochs)


def variants(points):
    return {point.variant.name: point.variant for point in points}


def parameters(cfg):
    return sum(parameter.numel() for parameter in check_model(cfg).parameters())


@pytest.mark.parametrize('preset', PRESETS)
def test_a_config_without_batch_norm_is_refused(preset, bn):
    for norm in ('DNB', 'DNC'):
        dn = NamedConfig('tiny', 'tiny.py', swap_norm(bn.cfg, norm))
        with pytest.raises(ConfigError, match=f'--preset {preset}: .* builds 66 DN layers'):
            points_of(preset, dn, [0], None, None, None)
    rewritten = copy.deepcopy(bn.cfg)
    for part in ('backbone', 'neck', 'bbox_head'):
        rewritten.model[part].norm_cfg = dict(type='ScaledBN', rate=3)
    with pytest.raises(ConfigError, match='tiny.py builds none'):
        points_of(preset, NamedConfig('tiny', 'tiny.py', rewritten), [0], None, None, None)
    gn = copy.deepcopy(bn.cfg)
    for part in ('backbone', 'neck', 'bbox_head'):
        gn.model[part].norm_cfg = dict(type='GN', num_groups=2)
    with pytest.raises(ConfigError, match='tiny.py builds none'):
        points_of(preset, NamedConfig('tiny', 'tiny.py', gn), [0], None, None, None)


def test_robustness_is_four_norms_at_four_rates_and_at_five_batches(bn):
    points = grid('robustness', bn)
    assert len(points) == len(set(points)) == 2 * 4 * (4 + 5)
    assert {(p.lr_factor, p.batch) for p in points} == {
        *((factor, None) for factor in (1, 4, 16, 64)),
        *((1, batch) for batch in (2, 4, 8, 32, 128)),
    }
    checked = check([point for point in points if point.seed == 0])  # only norms differ
    counts = {}
    for name, variant in variants(checked).items():
        model = check_model(variant.cfg)
        layers = (
            list(dn_layers(model).values())
            + list(batch_norms(model).values())
            + [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        )
        counts[name] = ({type(layer) for layer in layers}, len(layers))
    assert counts == {
        'tiny_bn': ({nn.BatchNorm2d}, 66),
        'dnb': ({DNB}, 66),
        'dnc': ({DNC}, 66),
        'gn': ({nn.GroupNorm}, 66),
    }


def test_batches_run_at_the_rate_in_proportion(bn):
    rates = {
        point.batch: configured(point)[1]['lr']
        for point in grid('robustness', bn)
        if point.batch is not None
    }
    assert rates == pytest.approx({2: 0.01, 4: 0.02, 8: 0.04, 32: 0.16, 128: 0.64})


def test_the_ablation_changes_one_factor_of_sc_at_a_time(bn):
    points = grid('sc-ablation', bn, seeds=[0])
    assert {point.lr_factor for point in points} == {1, 8}
    found = variants(points)
    assert set(found) == {'tiny_bn', 'dnb', *SC_FACTORS}
    assert {
        'inputs-standardized',
        'bound-none',
        'bound-0.5',
        'bound-1',
        'reduction-8',
        'reduction-128',
        'channelwise',
        'hidden-normalized',
        '2-sigmoid-1',
        'default-init',
        'mean-only',
        'std-only',
        'scale-only',
        'shift-only',
    } == set(SC_FACTORS)
    default = DNB(640).sc
    for name, changed in SC_FACTORS.items():
        assert differences(bn.cfg, found[name].cfg) == []
        assert repr(DNB(640, **changed).sc) != repr(default)
        norm_cfg = dict(found[name].cfg.model.backbone.norm_cfg)
        assert norm_cfg == dict(type='DNB', eps=0.001, momentum=0.03, **changed)


def test_dnc_loses_one_suspect_at_a_time(bn):
    points = grid('dnc-failure', bn, seeds=[0])
    checked = check(points)  # only norms differ
    layers = {
        name: dn_layers(check_model(variant.cfg)) for name, variant in variants(checked).items()
    }
    assert {name: {type(layer) for layer in found.values()} for name, found in layers.items()} == {
        'tiny_bn': set(),
        'dnb': {DNB},
        **{
            name: {DNC}
            for name in (
                'dnc',
                'dnc-batch-statistics',
                'dnc-no-feedback',
                'dnc-bound-0.1',
                'dnc-unbounded',
                'dnc-unbounded-no-feedback',
            )
        },
    }
    first = {name: next(iter(found.values()), None) for name, found in layers.items()}
    assert first['dnc'].track_running_stats
    assert not first['dnc-batch-statistics'].track_running_stats
    assert first['dnc-no-feedback'].sc.choices['gradient'] == 'stopped'
    assert first['dnc-unbounded'].sc.bound is None
    assert first['dnc-unbounded-no-feedback'].sc.bound is None
    assert first['dnc-unbounded-no-feedback'].sc.choices['gradient'] == 'stopped'
    assert {(p.variant.name, p.batch) for p in points if p.batch} == {('tiny_bn', 8), ('dnc', 8)}


def test_causes_are_separated_one_at_a_time(bn):
    found = variants(grid('causes', bn, seeds=[0]))
    for name in ('dnb', *CONTROLS):  # in all 66 places, and in nothing else
        assert differences(bn.cfg, found[name].cfg) == []
        model = check_model(found[name].cfg)
        made = norm_counts(model)
        assert list(made.values()) == [66], name
    classes = {
        name: {type(m) for m in check_model(found[name].cfg).modules()}
        for name in ('static', 'bn-rate-10')
    }
    assert StaticDN in classes['static'] and ScaledBN in classes['bn-rate-10']
    sc = {
        name: next(iter(dn_layers(check_model(found[name].cfg)).values())).sc
        for name in ('dnb-stopped', 'dnb-shuffled', 'dnb-scale', 'dnb-shift', 'dnb-bound-0.5')
    }
    assert sc['dnb-stopped'].choices['gradient'] == 'stopped'
    assert sc['dnb-shuffled'].choices['sample'] == 'other'
    assert sc['dnb-scale'].choices['outputs'] == 'scale'
    assert sc['dnb-shift'].choices['outputs'] == 'shift'
    assert sc['dnb-bound-0.5'].bound == 0.5
    assert differences(bn.cfg, found['bn-no-decay'].cfg) == [
        'optim_wrapper.paramwise_cfg.norm_decay_mult: not set and 0.0'
    ]


@pytest.mark.parametrize(
    'name,part',
    [
        ('dnb-depthwise', 'depthwise_conv'),
        ('dnb-expansions', 'expand_conv'),
        ('dnb-projections', 'linear_conv'),
        ('dnb-head', 'bbox_head'),
    ],
)
def test_where_is_where_the_name_says(name, part, bn):
    cfg = variants(grid('causes', bn, seeds=[0]))[name].cfg
    model = check_model(cfg)
    layers, plain = dn_layers(model), batch_norms(model)
    assert layers and len(layers) + len(plain) == 66
    assert all(part in layer for layer in layers) and not any(part in bn for bn in plain)
    names = check_model(bn.cfg).state_dict()
    ours = {key.replace('.bn.bn.', '.bn.') for key in model.state_dict() if '.sc.' not in key}
    assert ours == set(names)  # a checkpoint with BatchNorm fits


def test_wider_models_have_more_parameters(bn):
    found = variants(grid('causes', bn, seeds=[0]))
    sizes = [parameters(found[name].cfg) for name in ('tiny_bn', 'bn-wide-1.1', 'bn-wide-1.28')]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]


def test_backends_are_all_that_run_here_and_nothing_else_differs(bn):
    found = variants(grid('backends', bn))
    backends = {
        name: {layer.backend for layer in dn_layers(check_model(variant.cfg)).values()}
        for name, variant in found.items()
    }
    assert next(iter(found)) == 'dnb-reference' and 'dnb-torch' in found
    assert backends == {name: {name.removeprefix('dnb-')} for name in found}
    assert ('dnb-cpp' in found) == (
        compiled_kernels() is not None and not torch.cuda.is_available()
    )


@pytest.mark.slow
def test_the_controls_have_the_parameters_of_dnb(bn):
    found = variants(grid('fair-controls', bn, seeds=[0]))
    assert set(found) == {'tiny_bn', 'dnb', 'bn-wide', 'bn-se'}
    target = parameters(found['dnb'].cfg)
    assert target > 2 * parameters(bn.cfg)
    for name in ('bn-wide', 'bn-se'):
        assert parameters(found[name].cfg) == pytest.approx(target, rel=0.02)
        model = check_model(found[name].cfg).eval()
        assert not dn_layers(model)
        images = torch.randn(1, 3, 64, 64)
        assert model(images, mode='tensor')  # neck and head fit the wider backbone
    assert sum(isinstance(m, BNSE) for m in model.modules()) == 66


def test_a_backbone_without_a_width_cannot_be_widened(bn):
    cfg = Config(
        dict(
            model=dict(
                backbone=dict(type='ResNet', depth=18),
                type='RetinaNet',
                neck=None,
                bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=64),
            )
        )
    )
    with pytest.raises(ConfigError, match='ResNet: has no widen_factor'):
        widened(NamedConfig('r', 'r.py', cfg), 10**7)


def test_the_se_control_starts_as_batch_norm_and_then_gates(close):
    layer = BNSE(8)
    x = torch.randn(4, 8, 5, 5)
    close(layer(x), layer.bn(x))
    nn.init.normal_(layer.w_out)
    z = layer.eval().bn(x)
    gates = layer(x) / z
    close(gates, gates.mean((2, 3), keepdim=True).expand_as(gates), torch.float16)
    assert gates.std(0).max() > 0.01  # another one for each sample
