"""Ready grids of tools/compare.py, each made from one config with BatchNorm.

The norms of the config are swapped, so that a preset works for any model, for
detection and classification alike.
"""

import copy
import fnmatch

import torch

from ..checks.preflight import check_model
from ..config_tree import add_imports
from ..convert import batch_norm_cfgs, batch_norms, dn_layers, in_scope_of, swap_norm
from ..kernels.choice import fused_backends
from ..messages import ConfigError
from .compare import NamedConfig, Point, product


def variant_sc(**choices) -> dict:
    """The config of an SC with other choices; see `VariantSC`."""
    return dict(type='dn_mmdet.experiments.ablation.VariantSC', **choices)


# One factor at a time around the default SC; see `SC` and `VariantSC`.
SC_FACTORS = {
    'inputs-standardized': dict(inputs='standardized'),
    'bound-none': dict(bound=None),
    'bound-0.5': dict(bound=0.5),
    'bound-1': dict(bound=1.0),
    'reduction-8': dict(reduction=8),
    'reduction-128': dict(reduction=128),
    'channelwise': dict(sc=variant_sc(hidden='channelwise')),
    'hidden-normalized': dict(sc=variant_sc(hidden='normalized')),
    '2-sigmoid-1': dict(bound=1.0, sc=variant_sc(squash='sigmoid')),
    'default-init': dict(sc=variant_sc(init='default')),
    'mean-only': dict(sc=variant_sc(statistics='mean')),
    'std-only': dict(sc=variant_sc(statistics='std')),
    'scale-only': dict(sc=variant_sc(outputs='scale')),
    'shift-only': dict(sc=variant_sc(outputs='shift')),
}
# What separates the causes of a gain: for each, BatchNorm replaced in all layers by this one.
CONTROLS = {
    # Is SC needed at all? And if constants do as well, by their low rank?
    'static': dict(type='StaticDN'),
    'static-low-rank': dict(type='StaticDN', rank='low'),
    # Is it only a learning rate?
    'bn-rate-3': dict(type='ScaledBN', rate=3),
    'bn-rate-10': dict(type='ScaledBN', rate=10),
    'bn-rate-30': dict(type='ScaledBN', rate=30),
    # The noise of the batch, the gradient through the statistics, the image itself?
    'dnc': dict(type='DNC'),
    'dnb-stopped': dict(type='DNB', sc=variant_sc(gradient='stopped')),
    'dnb-shuffled': dict(type='DNB', sc=variant_sc(sample='other')),
    # Which output?
    'dnb-scale': dict(type='DNB', sc=variant_sc(outputs='scale')),
    'dnb-shift': dict(type='DNB', sc=variant_sc(outputs='shift')),
    'dnb-bound-0.5': dict(type='DNB', bound=0.5),
}
# Where? DN-B after these convolutions alone, by their names in MobileNetV2, SSDNeck and heads.
PLACES = {
    'dnb-depthwise': '*depthwise_conv*',
    'dnb-expansions': '*expand_conv*',
    'dnb-projections': '*linear_conv*',
    'dnb-head': 'bbox_head.*',
}
LAST_CONVOLUTION = 'backbone.conv2.*'  # what 'dnb-head' means for a classifier
# What a user would pick instead: as slow as DN-B, as large as DN-B.
WIDTHS = {'bn-wide-1.1': 1.1, 'bn-wide-1.28': 1.28}
GROUPS = 8  # of GroupNorm: divides every width of MobileNetV2


def robustness(bn, seeds, lr_factors, batches, epochs):
    """Learning rates at the usual batch, and batches at the rate in proportion."""
    variants = [bn, _swapped(bn, 'dnb', 'DNB'), _swapped(bn, 'dnc', 'DNC'), _group_norm(bn)]
    points = product(variants, seeds, lr_factors or [1.0, 4.0, 16.0, 64.0], [None], epochs)
    points += product(variants, seeds, [1.0], batches or [2, 4, 8, 32, 128], epochs)
    return points


def sc_ablation(bn, seeds, lr_factors, batches, epochs):
    """BN, the default DN-B and one factor of its SC at a time, at the usual and a high rate."""
    variants = [bn, _swapped(bn, 'dnb', 'DNB')]
    variants += [_swapped(bn, name, 'DNB', **args) for name, args in SC_FACTORS.items()]
    return product(variants, seeds, lr_factors or [1.0, 8.0], batches or [None], epochs)


def fair_controls(bn, seeds, lr_factors, batches, epochs):
    """DN-B against a wider BN and against BN with squeeze-and-excitation, at its size."""
    dnb = _swapped(bn, 'dnb', 'DNB')
    variants = [
        bn,
        dnb,
        widened(bn, _parameters(dnb.cfg)),
        _with_norm(
            bn,
            'bn-se',
            lambda node: dict(node, type='BNSE'),
            imports=['dn_mmdet.experiments.controls'],
        ),
    ]
    return product(variants, seeds, lr_factors or [1.0], batches or [None], epochs)


def dnc_failure(bn, seeds, lr_factors, batches, epochs):
    """DN-C, and DN-C without one of what may keep it from training.

    The gap between training and evaluation (batch statistics in both), the feedback from
    scale and shift into the statistics (no gradient through them), the size of its outputs
    (also without the feedback), the noise of a batch (4 times as large, at the rate in
    proportion).
    """
    variants = [
        bn,
        _swapped(bn, 'dnb', 'DNB'),
        _swapped(bn, 'dnc', 'DNC'),
        _with_norm(
            bn,
            'dnc-batch-statistics',
            lambda node: dict(node, type='DNC', track_running_stats=False),
            imports=['dn_mmdet'],
        ),
        _swapped(bn, 'dnc-no-feedback', 'DNC', sc=variant_sc(gradient='stopped')),
        _swapped(bn, 'dnc-bound-0.1', 'DNC', bound=0.1),
        _swapped(bn, 'dnc-unbounded', 'DNC', bound=None),
        _swapped(
            bn, 'dnc-unbounded-no-feedback', 'DNC', bound=None, sc=variant_sc(gradient='stopped')
        ),
    ]
    points = product(variants, seeds, lr_factors or [1.0], [None], epochs)
    large = batches or [4 * bn.cfg.train_dataloader.batch_size]
    return points + product([bn, variants[2]], seeds, lr_factors or [1.0], large, epochs)


def causes(bn, seeds, lr_factors, batches, epochs):
    """BN, DN-B and controls that each lack one of the causes that DN-B's gain may have."""
    variants = [bn, _swapped(bn, 'dnb', 'DNB')]
    for name, norm in CONTROLS.items():
        variants.append(
            _with_norm(
                bn,
                name,
                lambda node, norm=norm: dict(node, **norm),
                imports=['dn_mmdet', 'dn_mmdet.experiments.controls'],
            )
        )
    variants.append(_without_decay(bn))
    variants += [_in_places(bn, name, pattern) for name, pattern in PLACES.items()]
    for name, factor in WIDTHS.items():
        cfg = _widen(bn.cfg, bn.cfg.model.backbone.get('widen_factor', 1.0) * factor)
        variants.append(NamedConfig(name, bn.file, cfg))
    return product(variants, seeds, lr_factors or [1.0], batches or [None], epochs)


def backends(bn, seeds, lr_factors, batches, epochs):
    """DN-B in each backend that runs here: if their curves differ early, one of them is wrong."""
    fused = fused_backends('cuda' if torch.cuda.is_available() else 'cpu')
    variants = [
        _swapped(bn, f'dnb-{backend}', 'DNB', backend=backend) for backend in ('reference', *fused)
    ]
    return product(variants, seeds, lr_factors or [1.0], batches or [None], epochs)


PRESETS = {
    'robustness': robustness,
    'sc-ablation': sc_ablation,
    'fair-controls': fair_controls,
    'dnc-failure': dnc_failure,
    'causes': causes,
    'backends': backends,
}


def points_of(preset: str, bn: NamedConfig, *grid) -> list[Point]:
    """The points of a preset; ``grid`` are seeds, factors of the rate, batches and epochs.

    Raises:
        ConfigError: the config does not build BatchNorms, in whose place the variants' norms go.
    """
    model = check_model(bn.cfg)
    layers = dn_layers(model)
    if layers or not batch_norms(model):
        found = f'{len(layers)} DN layers (such as {min(layers)})' if layers else 'none'
        raise ConfigError(
            f'--preset {preset}: expected a config with BatchNorm, which the preset replaces; '
            f'{bn.file} builds {found}'
        )
    return PRESETS[preset](bn, *grid)


def _swapped(bn, name, norm, **args):
    return NamedConfig(name, bn.file, swap_norm(bn.cfg, norm, **args))


def _group_norm(bn):
    def swap(node):
        kept = {key: value for key, value in node.items() if key in ('eps', 'requires_grad')}
        return dict(type='GN', num_groups=GROUPS, **kept)

    return _with_norm(bn, 'gn', swap)


def _with_norm(bn, name, swap, imports=()):
    """A variant in which every norm_cfg of the model is what ``swap`` makes of it."""
    cfg = copy.deepcopy(bn.cfg)
    with in_scope_of(cfg):
        found = list(batch_norm_cfgs(cfg.model, 'model'))
        if not found:
            raise ConfigError(
                f'{name}: expected a norm_cfg with BatchNorm to replace in {bn.file}; its classes '
                f'create their BatchNorms themselves'
            )
        for _, node in found:
            new = swap(dict(node))
            node.clear()
            node.update(new)
    if imports:
        add_imports(cfg, *imports)
    return NamedConfig(name, bn.file, cfg)


def _without_decay(bn):
    """BatchNorm whose weight and bias do not decay."""
    cfg = copy.deepcopy(bn.cfg)
    paramwise = dict(cfg.optim_wrapper.get('paramwise_cfg') or {}, norm_decay_mult=0.0)
    cfg.optim_wrapper.paramwise_cfg = paramwise
    return NamedConfig('bn-no-decay', bn.file, cfg)


def _in_places(bn, name, pattern):
    """DN-B in the norms whose name in the model matches, BatchNorm in the others."""
    found = list(batch_norms(check_model(bn.cfg)))
    if name == 'dnb-head' and not fnmatch.filter(found, pattern):
        pattern = LAST_CONVOLUTION
    parts = dict.fromkeys(norm.partition('.')[0] for norm in fnmatch.filter(found, pattern))
    if not parts:
        raise ConfigError(
            f'{name}: no norm of {bn.name} is called {pattern}; choose others with --variants'
        )
    cfg = copy.deepcopy(bn.cfg)
    for part in parts:
        cfg.model[part] = dict(
            type='PartlyConverted',
            part=cfg.model[part],
            norm='DNB',
            only=pattern.removeprefix(f'{part}.'),
        )
    add_imports(cfg, 'dn_mmdet', 'dn_mmdet.experiments.controls')
    return NamedConfig(name, bn.file, cfg)


def widened(bn: NamedConfig, parameters: int, tolerance=0.02) -> NamedConfig:
    """The BN model with a wider backbone, of about that many parameters.

    Channels of neck and heads that are those of the backbone's outputs follow.

    Raises:
        ConfigError: the backbone has no ``widen_factor``, or no factor gives the
            number within ``tolerance``.
    """
    low = bn.cfg.model.get('backbone', {}).get('widen_factor', 1.0)
    high = 2 * low
    while _parameters(_widen(bn.cfg, high)) < parameters:
        low, high = high, 2 * high
    for _ in range(16):
        factor = (low + high) / 2
        cfg = _widen(bn.cfg, factor)
        found = _parameters(cfg)
        if abs(found - parameters) <= tolerance * parameters / 4:
            break
        low, high = (factor, high) if found < parameters else (low, factor)
    if abs(found - parameters) > tolerance * parameters:
        raise ConfigError(
            f'{bn.name}: no widen_factor of its backbone gives {parameters} '
            f'parameters within {tolerance:.0%}; the nearest, {factor:.4f}, gives '
            f'{found}'
        )
    return NamedConfig('bn-wide', bn.file, cfg)


def _widen(cfg, factor):
    cfg = copy.deepcopy(cfg)
    before = _out_channels(cfg)
    cfg.model.backbone.widen_factor = factor
    after = _out_channels(cfg)
    for part in ('neck', 'bbox_head', 'head'):
        node = cfg.model.get(part)
        for key in ('in_channels', 'out_channels') if isinstance(node, dict) else ():
            channels = node.get(key)
            if isinstance(channels, int) and [channels] == before[-1:]:
                node[key] = after[-1]
            elif isinstance(channels, (list, tuple)) and list(channels[: len(before)]) == before:
                node[key] = type(channels)((*after, *channels[len(before) :]))
    return cfg


def _out_channels(cfg):
    """Channels of the feature maps that the backbone of a config hands on."""
    backbone = check_model(cfg).backbone
    if not hasattr(backbone, 'widen_factor'):
        raise ConfigError(f'{type(backbone).__name__}: has no widen_factor to make it wider by')
    return [_last_width(getattr(backbone, backbone.layers[i])) for i in backbone.out_indices]


def _last_width(module):
    return [
        child.out_channels
        for child in module.modules()
        if hasattr(child, 'out_channels') and hasattr(child, 'kernel_size')
    ][-1]


def _parameters(cfg):
    return sum(parameter.numel() for parameter in check_model(cfg).parameters())
