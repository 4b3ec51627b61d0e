"""BatchNorm -> Dynamic Normalization, for a model, a config and a checkpoint.

A converted layer computes what the BatchNorm did, until its SC is trained.
"""

import copy
import fnmatch
import functools
import inspect
import itertools
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .config_tree import add_imports
from .inner_norm import is_torch_batch_norm
from .layers import (
    BATCH_NORM_KEYS,
    DNB,
    DNC,
    DNB1d,
    DNB3d,
    DNC1d,
    DNC3d,
    DynamicNorm,
    SyncDNB,
    SyncDNC,
    dn_layers_in,
)
from .messages import some
from .registered import resolve
from .sc import SC
from .scaled_bn import RewrittenBN

# A BatchNorm's class says what inputs it takes through this method. Synchronised
# ones, and those that a reverted SyncBatchNorm becomes, take any.
_CHECKS = {
    nn.BatchNorm1d._check_input_dim: 0,
    nn.BatchNorm2d._check_input_dim: 1,
    nn.BatchNorm3d._check_input_dim: 2,
}
FAMILIES = {'DNB': (DNB1d, DNB, DNB3d, SyncDNB), 'DNC': (DNC1d, DNC, DNC3d, SyncDNC)}

# The rest of a layer's arguments is the BatchNorm's own.
ARGUMENTS = ('reduction', 'min_channels', 'inputs', 'bound', 'bn_requires_grad', 'sc', 'backend')

# Methods that fold a BatchNorm into a convolution or a linear, as timm, mmpretrain, torchvision
# and the YOLOs call them.
_FOLDING_METHOD = re.compile(
    r'_?fuse|_?(fuse|fold|merge|absorb)_\w*(bn|norm|conv|kernel|model|block|rep)\w*|\w*to_deploy'
    r'|deploy|_?re_?param\w*|get_equivalent_\w*'
)


class NoBatchNormInConfig(ValueError):
    """A model has BatchNorms, but its classes create all of them whatever the config says."""


class DNBAct(DNB):
    """DN-B in place of timm's BatchNormAct2d: norm, then drop, then activation."""

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class DNCAct(DNC):
    """DN-C in place of timm's BatchNormAct2d: norm, then drop, then activation."""

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def convert_norm(
    model: nn.Module,
    norm: str = 'DNB',
    *,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    sc_requires_grad: bool = True,
    **args: Any,
) -> nn.Module:
    """Puts Dynamic Normalization in the place of every BatchNorm of a model.

    Each layer takes the name of a BatchNorm and contains this BatchNorm: weights,
    running statistics, eps, momentum, mode, device, dtype and ``requires_grad``
    are kept. A module that is used twice stays one module. The output of the model does
    not change. 1d, 2d, 3d and synchronised norms get a layer of the same kind. Frozen
    norms (FrozenBatchNorm2d) stay frozen inside their layer.

    Convert a model before an optimizer or DDP takes its parameters. Otherwise these miss
    the new parameters. If a module can fold its BatchNorms into convolutions (``fuse``,
    ``reparameterize``, ``switch_to_deploy``), there is a warning, because folding has to
    come before the conversion.

    Args:
        model: any torch model, or a BatchNorm.
        norm: ``'DNB'`` or ``'DNC'``.
        only: patterns of the norms to convert (one string or several), as for file
            names: ``'backbone.*'``, ``'*.bn3'``. A pattern that matches the name of a
            module stands for everything inside it: ``'neck'``.
        skip: patterns of the norms to leave as they are.
        sc_requires_grad: False freezes SC, so that g = h = 0 until it is unfrozen.
        **args: other arguments of the layers, such as ``reduction`` and ``bound`` (see
            `DNB`); ``bn_requires_grad`` freezes or unfreezes all inner norms.

    Returns:
        the model, changed in place (or the new layer, if the model is a BatchNorm).

    Raises:
        ValueError: an unknown norm, a pattern that matches nothing, no BatchNorm
            at all, or one that cannot be converted: it has a forward of its own or
            forward or backward hooks, or is lazy; or there are only layers of the other
            kind. Nothing was changed then.
        TypeError: an argument that does not exist.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> convert_norm(model, 'DNB')[1]
        DNB(
          (sc): SC(8, hidden=8, inputs='raw', bound=0.25)
          (bn): BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
        )
    """
    family = _family(norm)
    _check_arguments(args)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            'expected a plain model, got one inside DistributedDataParallel, which '
            'would not synchronise the new parameters: convert it first'
        )
    found = batch_norms(model)
    layers = dn_layers(model)
    chosen = _choose(found, layers, only, skip)
    if not chosen:
        if found and not _choose(layers, found, only, skip):
            raise ValueError(
                f'only, skip: expected patterns that leave a BatchNorm to convert, and these '
                f'leave none of {len(found)}: {some(found)}'
            )
        if not layers:
            raise ValueError(
                f'found no BatchNorm to convert in {type(model).__name__}{norms_in_words(model)}'
            )
        others = {type(each).__name__ for each in layers.values() if not isinstance(each, family)}
        if others:
            raise ValueError(
                f'{type(model).__name__} holds {", ".join(sorted(others))} and no BatchNorm to '
                f'convert to {norm}: build the model with BatchNorm, and convert that'
            )
        unused = ''.join(f', nor was {name} set' for name in args)
        warnings.warn(
            f'{type(model).__name__} is already converted: it holds {len(layers)} '
            f'DN layers and no BatchNorm to convert; nothing was changed{unused}',
            stacklevel=2,
        )
        return model
    for name, bn in chosen.items():
        _check_convertible(name, bn)
    new = {bn: _layer_around(bn, family, model, args) for bn in dict.fromkeys(chosen.values())}
    for bn, layer in new.items():
        _adopt(layer, bn, args)
        layer.sc.requires_grad_(sc_requires_grad)
    if model in new:
        return new[model]
    for name, bn in chosen.items():
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, new[bn])
    _warn_of_folding(model, chosen)
    return model


def _warn_of_folding(model, converted):
    for name in misfolded(model):
        warnings.warn(
            f'{name}: this BatchNorm follows a converted norm inside one module, and '
            f"mmcv's fuse_conv_bn would fold it into the wrong convolution; convert "
            f'it as well, or do not fuse this model',
            stacklevel=3,  # whoever called convert_norm
        )
    folding = _folding_methods(model, converted)
    if folding:
        warnings.warn(
            f'{folding} can fold BatchNorms, but converted ones cannot be folded: '
            f'call it before the conversion, or after dn_mmdet.fold.fold_norm',
            stacklevel=3,
        )


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorms of a model by name, except those inside DN layers and rewritten norms."""
    inside = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (DynamicNorm, RewrittenBN))
    }
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_batch_norm(module) and name.rpartition('.')[0] not in inside
    }


def dn_layers(model: nn.Module) -> dict[str, DynamicNorm]:
    """The DN layers of a model by name."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, DynamicNorm)
    }


def swap_norm(cfg: Config, norm: str = 'DNB', **args: Any) -> Config:
    """Puts Dynamic Normalization in the place of BatchNorm in a config of MMDetection.

    It changes every dict of the model with a BatchNorm as its ``type``. Some classes
    (ResNet, most YOLO necks) have a BatchNorm as the default of an argument that the
    config leaves out. This default is written into the config and changed too. eps,
    momentum and similar arguments are kept. ``requires_grad=False`` would freeze SC
    with g = h = 0 for ever, so it becomes ``bn_requires_grad=False``.

    The model is built once, to count the layers. Some classes of mmdet create BatchNorms
    whatever the config says. These stay, and the log names them.

    Args:
        cfg: a whole config; it is not changed.
        norm: ``'DNB'`` or ``'DNC'``.
        **args: arguments of the layers as in `convert_norm`, for every norm.

    Returns:
        a new and complete config, which imports dn_mmdet when it is loaded.

    Raises:
        ValueError: an unknown norm, no model, no BatchNorm that a config reaches, or DN layers
            of the other kind or with other arguments.
        TypeError: an argument that does not exist.
    """
    family = _family(norm)
    _check_arguments(args)
    if not isinstance(cfg.get('model'), dict):
        raise ValueError(
            f'expected a config with a model, found only {", ".join(cfg) or "nothing"}'
        )
    cfg = copy.deepcopy(cfg)
    with in_scope_of(cfg):
        _check_existing(cfg.model, norm, family, args)
        found = list(batch_norm_cfgs(cfg.model, 'model'))
        for _, node in found:
            _swap(node, family, args)
        model = MODELS.build(copy.deepcopy(cfg.model))
    _report(model, norm, found, cfg.model)
    if found:
        add_imports(cfg, 'dn_mmdet')
    return cfg


def in_scope_of(cfg: Config) -> AbstractContextManager:
    """Where the types in a config are looked up: mmdet, unless the config says otherwise."""
    return DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmdet')


def batch_norm_cfgs(node: Any, path: str) -> Iterator[tuple[str, dict]]:
    """Path and dict of every BatchNorm in a model's config, its classes' defaults written out.

    A dict that stands in several places is there once, by its first path.
    """
    return _cfgs_of(_is_batch_norm_class, node, path, set())


def _cfgs_of(is_wanted, node, path, seen):
    """The same of any classes."""
    if isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from _cfgs_of(is_wanted, child, f'{path}.{i}', seen)
    if not isinstance(node, dict) or id(node) in seen:
        return
    seen.add(id(node))
    cls = resolve(MODELS, node.get('type'))
    if is_wanted(cls):
        yield path, node
        return
    for name, default in _defaults(cls):
        if (
            name not in node
            and isinstance(default, dict)
            and is_wanted(resolve(MODELS, default.get('type')))
        ):
            node[name] = copy.deepcopy(default)
    for key, child in node.items():
        if key != 'init_cfg':  # its types are names of layers to initialise
            yield from _cfgs_of(is_wanted, child, f'{path}.{key}', seen)


def _check_existing(model_cfg, norm, family, args):
    """Raises ValueError where a config has DN layers that are not those that are asked for."""
    for path, node in _cfgs_of(_is_dn_class, model_cfg, 'model', set()):
        cls = resolve(MODELS, node['type'])
        if cls.batch_shared != family[0].batch_shared:
            raise ValueError(
                f'{path}: expected BatchNorm or {norm}, got {cls.__name__}: set its type there'
            )
        parameters = inspect.signature(cls).parameters
        for name, value in args.items():
            now = node.get(name, getattr(parameters.get(name), 'default', value))
            if now != value:
                raise ValueError(
                    f'{path}: holds {cls.__name__} with {name}={now!r} already, and only '
                    f'BatchNorms are swapped; {name}={value!r} was asked for: set it there'
                )


def _is_dn_class(cls):
    return inspect.isclass(cls) and issubclass(cls, DynamicNorm)


def _is_batch_norm_class(cls):
    """torch's BatchNorms, and MMCV's synchronised one, which shares the name alone."""
    return inspect.isclass(cls) and (
        issubclass(cls, _BatchNorm) or cls.__name__ == 'SyncBatchNorm'
    )


def _defaults(cls):
    """Arguments of a class with their defaults, as far up as ``**kwargs`` hands them."""
    if not inspect.isclass(cls):
        return
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        yield from ((p.name, p.default) for p in parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return


def _swap(node, family, args):
    """Changes one norm_cfg in place."""
    cls = resolve(MODELS, node.get('type'))
    synchronised = not issubclass(cls, _BatchNorm) or issubclass(cls, nn.SyncBatchNorm)
    if not synchronised and cls.forward is not _BatchNorm.forward:
        raise ValueError(
            f'{cls.__module__}.{cls.__qualname__} has a forward of its own, which '
            f"conversion would lose: use type='BN' there"
        )
    layer = family[3 if synchronised else _CHECKS.get(cls._check_input_dim, 3)]
    if node.pop('requires_grad', True) is False:
        node['bn_requires_grad'] = False
    node.update(args, type=layer.__name__)


def _report(model, norm, found, model_cfg):
    """Tells which norms of a model were swapped, and which were not."""
    layers, left = dn_layers(model), list(batch_norms(model))
    hard_coded = _by_owner(model, left, model_cfg)
    if found:
        options = ', '.join(path for path, _ in found)
        _tell(f'{norm} in place of BatchNorm in {len(layers)} layers, set by {options}')
    elif layers:
        _tell(
            f'already converted: this config builds {len(layers)} DN layers; nothing was changed'
        )
    elif left:
        raise NoBatchNormInConfig(
            f'found no BatchNorm that this config could change: {len(left)} are hard-coded, '
            f'{hard_coded}; use dn_mmdet.convert.convert_norm on the model'
        )
    else:
        raise ValueError(
            f'found no BatchNorm that this config could change in {type(model).__name__}'
            f'{norms_in_words(model)}'
        )
    frozen = ', '.join(path for path, node in found if node.get('bn_requires_grad') is False)
    if frozen:
        _tell(
            f'bn_requires_grad=False in {frozen}: the weights of the inner BatchNorm are '
            f'frozen, and SC is trained'
        )
    folding = _folding_methods(model, layers)
    if folding:
        _tell(
            f'{folding} can fold BatchNorms, but DN layers cannot be folded: call it only '
            f'after dn_mmdet.fold.fold_norm'
        )
    if left:
        _tell(f'{len(left)} BatchNorms stay, because no config reaches them: {hard_coded}')


def _tell(text):
    print_log(text, logger='current')


def _by_owner(model, names, model_cfg):
    """'3 in ResNet (such as backbone.bn1); ...': norms by the part of the config for them."""
    owners = [_config_path(name, model_cfg) for name in names]
    return '; '.join(
        f'{owners.count(owner)} in {type(model.get_submodule(owner)).__name__} '
        f'(such as {names[owners.index(owner)]})'
        for owner in dict.fromkeys(owners)
    )


def _config_path(name, model_cfg):
    """The name of the module around the norm ``name`` that a dict of the config builds."""
    parts, node = [], model_cfg
    for part in name.split('.')[:-1]:
        if isinstance(node, (list, tuple)):  # which need not be the modules of that name
            node = node[int(part)] if part.isdecimal() and int(part) < len(node) else None
        else:
            node = node.get(part)
        if not isinstance(node, (dict, list, tuple)):
            break
        parts.append(part)
    return '.'.join(parts)


def convert_checkpoint(
    checkpoint: dict, model: nn.Module | None = None, reduction: int = 32, min_channels: int = 8
) -> dict:
    """Turns the checkpoint of a BatchNorm model into one of the same model with DN layers.

    It looks only at the keys, so it works for detectors as well as for the backbones of
    torchvision and mmpretrain. DN-B and DN-C have the same keys. What is stored beside
    the weights is kept, except for the state of the optimizer and schedulers, because
    it does not include SC's parameters.

    Args:
        checkpoint: what `torch.load` returns: weights, or a dict with them under
            ``state_dict`` (and an average of them under ``ema_state_dict``).
        model: a model with DN layers. It determines which BatchNorms are converted,
            and their SC. Without a model, all are converted.
        reduction, min_channels: arguments of `SC`, if there is no model.

    Returns:
        a new checkpoint; the tensors are shared.

    Raises:
        ValueError: it holds no weights or no BatchNorm, or it holds DN layers already.
    """
    args = dict(reduction=reduction, min_channels=min_channels)
    sc = {} if model is None else {name: layer.sc for name, layer in dn_layers(model).items()}
    if 'state_dict' not in checkpoint:
        return _convert_state(checkpoint, sc, args, model is None)
    converted = {
        key: value
        for key, value in checkpoint.items()
        if key not in ('optimizer', 'param_schedulers')
    }
    for key in ('state_dict', 'ema_state_dict'):
        if key in checkpoint:
            converted[key] = _convert_state(checkpoint[key], sc, args, model is None)
    return converted


def _convert_state(state, sc, args, everywhere):
    """One state dict; ``sc`` gathers the SC of each layer that comes without one."""
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f'expected weights, or a dict with weights under "state_dict", found '
            f'{", ".join(map(str, list(state)[:8])) or "nothing"}'
        )
    if dn_layers_in(state):
        raise ValueError(
            'this checkpoint already has Dynamic Normalization. The weights alone are not enough '
            'to go back to BatchNorm, because the scale and shift that a trained SC makes differ '
            'from image to image. tools/fold.py freezes them at their mean over images'
        )
    new, metadata = OrderedDict(), dict(getattr(state, '_metadata', {}))
    started = set()
    for key, value in state.items():
        prefix, _, leaf = key.rpartition('.')
        name = prefix.removeprefix('module.')
        mean = state.get(f'{prefix}.running_mean')
        if mean is None or leaf not in BATCH_NORM_KEYS or not (everywhere or name in sc):
            new[key] = value
            continue
        if name not in sc:
            sc[name] = SC(len(mean), **args, dtype=mean.dtype)
        if prefix not in started:
            started.add(prefix)
            new.update(sc[name].identity_state_dict(f'{prefix}.sc.'))
            if prefix in metadata:  # the version by which torch's BatchNorm reads its keys
                metadata[f'{prefix}.bn'] = metadata.pop(prefix)
        new[f'{prefix}.bn.{leaf}'] = value
    if not started:
        raise ValueError(
            f'found no BatchNorm to convert among {len(state)} weights (such as '
            f'{next(iter(state))})'
        )
    if metadata:
        new._metadata = metadata
    return new


def _is_batch_norm(module):
    return (
        isinstance(module, _BatchNorm)
        or is_frozen_batch_norm(module)
        or (type(module).__name__ == 'SyncBatchNorm')
    )


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """The classes of torchvision, mmdet and detectron2 have only the name in common."""
    return type(module).__name__ == 'FrozenBatchNorm2d'


def _is_timm_norm_act(module):
    timm_layers = sys.modules.get('timm.layers')
    return timm_layers is not None and type(module) is timm_layers.BatchNormAct2d


def _family(norm):
    if norm not in FAMILIES:
        raise ValueError(
            f'norm: expected one of {tuple(FAMILIES)} (each BatchNorm decides whether its '
            f'layer is 1d, 2d, 3d or synchronised), got {norm!r}'
        )
    return FAMILIES[norm]


def _check_arguments(args):
    for name in args:
        if name not in ARGUMENTS:
            raise TypeError(
                f'{name}: no such argument; expected some of {ARGUMENTS}. The other '
                f'arguments are those of each BatchNorm'
            )


def _choose(found, layers, only, skip):
    """The norms that the patterns leave, each pattern checked to match something."""
    chosen = found
    for patterns, keep in ((only, True), (skip, False)):
        if patterns is None:
            continue
        matched = set()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            names = {name for name in itertools.chain(found, layers) if matches(name, pattern)}
            if not names:
                listed = ', '.join(itertools.islice(itertools.chain(found, layers), 5))
                raise ValueError(
                    f'{"only" if keep else "skip"}: {pattern!r} matches none of '
                    f'{len(found) + len(layers)} norms ({listed}, ...)'
                )
            matched |= names
        chosen = {name: bn for name, bn in chosen.items() if (name in matched) == keep}
    return chosen


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of `convert_norm` matches the norm of this name."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f'{pattern}.*')


def norms_in_words(model):
    """', which holds 12 LayerNorm': this says why there is nothing to convert."""
    kinds = [
        type(module).__name__
        for module in model.modules()
        if 'Norm' in type(module).__name__ and list(module.parameters(recurse=False))
    ]
    counts = ', '.join(f'{kinds.count(kind)} {kind}' for kind in sorted(set(kinds)))
    return f', which holds {counts}' if counts else ''


def _check_convertible(name, bn):
    what = f'{name or "the model"}: {type(bn).__module__}.{type(bn).__qualname__}'
    instead = f'leave it out with skip={name!r}'
    if isinstance(bn, LazyModuleMixin):
        raise ValueError(
            f'{what} does not know its number of channels yet: run the model once on an '
            f'input before you convert it, or {instead}'
        )
    own_forward = not (
        is_torch_batch_norm(bn) or is_frozen_batch_norm(bn) or _is_timm_norm_act(bn)
    )
    if own_forward or 'forward' in vars(bn):
        raise ValueError(
            f'{what} has a forward of its own, which conversion would lose: '
            f'use a plain BatchNorm there, or {instead}'
        )
    if bn._forward_hooks or bn._forward_pre_hooks or bn._backward_hooks or bn._backward_pre_hooks:
        raise ValueError(
            f'{what} has hooks on its forward or backward. Inside a DN layer they would '
            f'see the output of the BatchNorm and not of the layer. Remove them, and '
            f'register them on the converted layer or on its .bn, or {instead}'
        )


def _layer_around(bn, family, model, args):
    """A DN layer for bn's channels, inputs, device and dtype."""
    if _is_timm_norm_act(bn):
        cls = DNBAct if family is FAMILIES['DNB'] else DNCAct
    elif is_frozen_batch_norm(bn):
        cls = family[1]
    else:
        cls = family[_CHECKS.get(type(bn)._check_input_dim, 3)]
    tensor = next(itertools.chain(bn.parameters(), bn.buffers(), model.parameters()), None)
    factory = {} if tensor is None else dict(device=tensor.device, dtype=tensor.dtype)
    num_features = len(bn.weight) if is_frozen_batch_norm(bn) else bn.num_features
    return cls(num_features, **args, **factory)


def _adopt(layer, bn, args):
    """Makes bn the layer's inner norm, with all that it carries."""
    layer.train(bn.training)
    if _is_timm_norm_act(bn):
        layer.drop, layer.act = bn.drop, bn.act
        bn = _plain_batch_norm(bn)
    if 'bn_requires_grad' in args:
        bn.requires_grad_(args['bn_requires_grad'])
    layer.bn_requires_grad = all(p.requires_grad for p in bn.parameters())
    layer.bn = bn


def _plain_batch_norm(norm_act):
    """A BatchNorm2d that shares the parameters and buffers of timm's BatchNormAct2d."""
    bn = nn.BatchNorm2d(
        norm_act.num_features,
        norm_act.eps,
        norm_act.momentum,
        norm_act.affine,
        norm_act.track_running_stats,
    )
    bn.train(norm_act.training)
    for name, tensor in itertools.chain(
        norm_act.named_parameters(recurse=False), norm_act.named_buffers(recurse=False)
    ):
        setattr(bn, name, tensor)
    return bn


def _folding_methods(model, names):
    """'RepVggBlock.reparameterize (stem)': what folds norms of these names, each once, or ''."""
    found = {}
    for name in names:
        while name:
            name = name.rpartition('.')[0]
            module = model.get_submodule(name)
            for method in _folding_methods_of(type(module)):
                found.setdefault(f'{type(module).__name__}.{method}', name or 'the model')
    return ', '.join(f'{method} ({name})' for method, name in found.items())


@functools.cache
def _folding_methods_of(cls):
    return [
        name
        for name in dir(cls)
        if _FOLDING_METHOD.fullmatch(name)
        and not hasattr(nn.Module, name)
        and callable(getattr(cls, name))
    ]


def misfolded(model: nn.Module) -> Iterator[str]:
    """Names of BatchNorms that mmcv's fuse_conv_bn folds into a convolution before a DN layer.

    It remembers a module's last convolution until a BatchNorm comes, and knows
    no other norm that could have come between.
    """
    for parent_name, parent in model.named_modules():
        last_conv, norm_between = None, False
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d):
                last_conv, norm_between = child, False
            elif isinstance(child, DynamicNorm):
                norm_between = True
            elif isinstance(child, _BatchNorm) and last_conv is not None:
                if norm_between:
                    yield f'{parent_name}.{name}' if parent_name else name
                last_conv = None
