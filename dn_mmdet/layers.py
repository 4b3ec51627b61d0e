"""The layers DN-B and DN-C, as configs name them, and the state they hold."""

import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx
from mmengine.registry import MODELS
from torch import Tensor, nn

from .folding_guard import refuse_to_be_folded
from .functional import dynamic_norm
from .inner_norm import check_eps, check_momentum
from .kernels.choice import check_backend
from .sc import SC

# A graph traced by torch.fx holds one call per layer: the shape checks and the
# choice by mode inside need values that a trace does not have.
torch.fx.wrap('dynamic_norm')

# What a BatchNorm checkpoint holds for a layer of the same name.
BATCH_NORM_KEYS = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


def dn_layers_in(keys: Iterable[str]) -> set[str]:
    """Names of the DN layers whose weights have these keys, whatever their SC is.

    A layer holds ``bn`` and ``sc``. A block that calls its shortcut so has convolutions too, or
    the shortcut is one.
    """
    parts: dict = defaultdict(set)
    for key in keys:
        path = key.split('.')
        for depth, part in enumerate(path):
            parts['.'.join(path[:depth])].add(part)

    def of_sc(name):
        return parts[f'{name}.sc' if name else 'sc']

    return {
        name
        for name, found in list(parts.items())
        if 'sc' in found
        and ('w_in' in of_sc(name) or found == {'bn', 'sc'} and of_sc(name) - {'weight', 'bias'})
    }


def _build_sc(cfg, arguments):
    if cfg is None:
        return SC(**arguments)
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise TypeError(
            f"sc: expected the config of a module, such as dict(type='SC'), got {cfg!r}"
        )
    return MODELS.build(cfg, default_args=arguments)


class DynamicNorm(nn.Module):
    """What DN-B and DN-C share. `DNB` documents it.

    The layer contains a BatchNorm and is not a subclass of it, because frameworks fold,
    convert and bypass subclasses of ``_BatchNorm``, and would drop what a subclass adds.
    """

    _abbr_ = 'bn'  # mmcv names the attribute after it: BN checkpoints keep their keys
    bn: Any  # a BatchNorm, or what a conversion put in its place
    sc: SC  # or a module with its interface
    backend: str
    bn_type: type[nn.Module]
    batch_shared: bool
    ndims: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        reduction: int = 32,
        min_channels: int = 8,
        inputs: str = 'raw',
        bound: float | None = 0.25,
        bn_requires_grad: bool = True,
        backend: str = 'auto',
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        sc: dict | None = None,
    ):
        super().__init__()
        check_eps(eps)
        check_momentum(momentum)
        if self.batch_shared and inputs != 'raw':
            raise ValueError(
                f"inputs: expected 'raw', got {inputs!r}: {type(self).__name__} makes its "
                f'scale and shift from the batch statistics, which cannot be relative to '
                f'themselves'
            )
        self.sc = _build_sc(
            sc,
            dict(
                num_features=num_features,
                reduction=reduction,
                min_channels=min_channels,
                inputs=inputs,
                bound=bound,
                device=device,
                dtype=dtype,
            ),
        )
        self.bn = self.bn_type(
            self.sc.num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
        )
        check_backend(backend)
        self.backend = backend
        self.bn_requires_grad = bn_requires_grad
        self.bn.requires_grad_(bn_requires_grad)

    def __setattr__(self, name, value):
        # The mode is that of bn. A wrapper such as torch.compile's sets the same one again, which
        # is to leave a bn that norm_eval froze as it is.
        if name == 'training' and value != self.training and 'bn' in self._modules:
            self.bn.train(value)  # which some models replace, to freeze it
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        # As attributes, both would cost as much as the whole compiled call.
        parts: dict[str, Any] = self._modules
        return dynamic_norm(
            x,
            parts['bn'],
            parts['sc'],
            batch_shared=self.batch_shared,
            ndims=self.ndims,
            backend=self.backend,
        )

    def parameters(self, recurse=True):
        """As in torch, but without the parameters that ``bn_requires_grad=False`` froze.

        mmcv's `build_norm_layer` makes the layer and then sets ``requires_grad`` on all
        parameters that this method yields, which would unfreeze them. A model's own
        ``parameters()`` does not use this method, so it yields all of them. Once they are
        unfrozen (``layer.bn.requires_grad_()``, ``model.requires_grad_()``), this method
        yields them too.
        """
        for name, parameter in self.named_parameters(recurse=recurse):
            if self.bn_requires_grad or parameter.requires_grad or not name.startswith('bn.'):
                yield parameter

    def reset_running_stats(self):
        """As in torch: resets the running averages of the inner norm."""
        self.bn.reset_running_stats()

    def reset_parameters(self):
        """As in torch: resets the inner norm, and SC so that g = h = 0."""
        self.bn.reset_parameters()
        self.sc.reset_parameters()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        # Not by a hook: a bound method that the layer holds would be a reference cycle.
        assign = local_metadata.get('assign_to_params_buffers', False)
        self._accept_batch_norm_checkpoint(state_dict, prefix, assign)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _accept_batch_norm_checkpoint(self, state_dict, prefix, assign):
        """Lets the keys of a BatchNorm of this layer's name stand for those of `bn`.

        With them comes an SC that does nothing, but not with running statistics alone: these
        leave SC as it is.
        """
        found = [key for key in BATCH_NORM_KEYS if prefix + key in state_dict]
        if not found:
            return
        device = state_dict[prefix + found[0]].device if assign else None
        of_a_layer = any(key.startswith((f'{prefix}sc.', f'{prefix}bn.')) for key in state_dict)
        has_affine = getattr(self.bn, 'weight', None) is not None
        statistics_alone = has_affine and {'weight', 'bias'}.isdisjoint(found)
        for key in found:
            state_dict.setdefault(f'{prefix}bn.{key}', state_dict.pop(prefix + key))
        if not (of_a_layer or statistics_alone):
            state_dict.update(self.sc.identity_state_dict(f'{prefix}sc.', device))

    def __prepare_scriptable__(self):
        raise TypeError(
            f'{type(self).__name__} cannot be scripted, because its forward depends on '
            f'device and mode: use torch.jit.trace or torch.export instead'
        )

    def extra_repr(self):
        shown = [] if self.bn_requires_grad else ['bn_requires_grad=False']
        if self.backend != 'auto':
            shown.append(f'backend={self.backend!r}')
        return ', '.join(shown)

    # Code that reads a norm layer (DetectoRS' constant_init, pruning, logging) expects
    # BatchNorm's attributes on it. They belong to `bn`; what are settings can be set here.
    weight = property(lambda self: self.bn.weight)
    bias = property(lambda self: self.bn.bias)
    running_mean = property(lambda self: self.bn.running_mean)
    num_batches_tracked = property(lambda self: self.bn.num_batches_tracked)
    num_features = property(lambda self: self.sc.num_features)
    affine = property(lambda self: self.bn.affine)

    @property
    def running_var(self):
        """The running variance of the inner norm.

        Code that would fold the norm, and so lose SC, gets an error or a warning.
        """
        if not torch.compiler.is_compiling():
            refuse_to_be_folded(self, sys._getframe(1))
        return self.bn.running_var

    @property
    def eps(self):
        return self.bn.eps

    @eps.setter
    def eps(self, value):
        check_eps(value)
        self.bn.eps = value

    @property
    def momentum(self):
        return self.bn.momentum

    @momentum.setter
    def momentum(self, value):
        self.bn.momentum = value

    @property
    def track_running_stats(self):
        return self.bn.track_running_stats

    @track_running_stats.setter
    def track_running_stats(self, value):
        self.bn.track_running_stats = value


def _register(cls):
    """Registers in mmengine's root registry, in which every OpenMMLab scope looks last.

    Importing this file again replaces its own classes. A class of the same name from
    another package stays, and mmengine's error names it.
    """
    existing = MODELS.module_dict.get(cls.__name__)
    own = existing is not None and existing.__module__ == cls.__module__
    MODELS.register_module(module=cls, force=own)
    return cls


_register(SC)


class _DNB(DynamicNorm):
    batch_shared = False


class _DNC(DynamicNorm):
    batch_shared = True


@_register
class DNB(_DNB):
    """DN-B over (N, C, H, W): BatchNorm with a scale and a shift that follow each sample.

    Source: Liu, Gao, Lv, "Dynamic Normalization", arXiv 2101.06073. The paper's
    public text leaves the layers of the SC module open; see `SC`.

        y = (1 + g) z + h,    z = w (x - mu) / sqrt(var + eps) + b

    ``z`` is the output of the BatchNorm ``bn`` inside the layer, the inner norm. The
    module ``sc`` makes ``g`` and ``h`` for each sample and channel, from the mean and
    std of that sample's channel. A new layer has ``g = h = 0`` and computes the same as
    BatchNorm. It still does so after a BatchNorm checkpoint is loaded, which loads by
    name.

    In training, ``mu, var`` are batch statistics; in eval mode they are running ones.
    The layer uses the mode of ``bn``, so frozen statistics (``norm_eval``,
    ``momentum=0``, ``track_running_stats=False``) have the same meaning as in torch. SC
    adapts to each input in both modes.

    Args:
        num_features (int): channels C of the input.
        eps (float): added to variances before the square root.
        momentum (float | None): step of the running averages; None for a cumulative
            average.
        affine (bool): whether the inner norm has ``w`` and ``b``.
        track_running_stats (bool): whether it keeps running averages.
        reduction (int): SC's hidden layer has ``C // reduction`` units,
        min_channels (int): but never fewer than this.
        inputs (str): which statistics SC gets. ``'raw'``: mean and std as they are.
            ``'standardized'``: relative to those of the batch. DN-C takes only
            ``'raw'``, because its statistics are those of the batch.
        bound (float | None): ``g`` and ``h`` lie in (-bound, bound); None for no
            bound, with which DN-B hardly trained.
        sc (dict | None): the config of a registered module to use in place of `SC`,
            such as ``dict(type='MySC', depth=2)``. It gets the arguments that SC would
            get, unless the config sets them. `SC` says what such a module needs.
        bn_requires_grad (bool): False freezes ``w`` and ``b`` and leaves SC
            trainable. (mmcv's own ``requires_grad=False`` freezes both.)
        backend (str): which implementation runs; see `dynamic_norm`. All
            compute the same.
        device: of all parameters and buffers.
        dtype: of all parameters and buffers.

    Raises:
        ValueError: an argument is out of range, or an input has a wrong shape.
        TypeError: an argument that does not exist.

    Example:
        >>> layer = DNB(16)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    bn_type, ndims = nn.BatchNorm2d, (4,)


@_register
class DNB1d(_DNB):
    """DN-B over (N, C) or (N, C, L); the arguments are those of `DNB`."""

    bn_type, ndims = nn.BatchNorm1d, (2, 3)


@_register
class DNB3d(_DNB):
    """DN-B over (N, C, D, H, W); the arguments are those of `DNB`."""

    bn_type, ndims = nn.BatchNorm3d, (5,)


@_register
class SyncDNB(_DNB):
    """DN-B over (N, C, ...), with batch statistics over all processes; otherwise as `DNB`."""

    bn_type, ndims = nn.SyncBatchNorm, ()


@_register
class DNC(_DNC):
    """DN-C over (N, C, H, W): BatchNorm with a scale and a shift that follow the batch.

    It is like `DNB` and has the same arguments, but makes one ``g`` and one ``h`` for
    each channel, from ``mu`` and ``sqrt(var + eps)``. In eval mode these are running
    averages, so ``g`` and ``h`` are constants. ``inputs`` has to be ``'raw'``.

    Example:
        >>> layer = DNC(16)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    bn_type, ndims = nn.BatchNorm2d, (4,)


@_register
class DNC1d(_DNC):
    """DN-C over (N, C) or (N, C, L); the arguments are those of `DNB`."""

    bn_type, ndims = nn.BatchNorm1d, (2, 3)


@_register
class DNC3d(_DNC):
    """DN-C over (N, C, D, H, W); the arguments are those of `DNB`."""

    bn_type, ndims = nn.BatchNorm3d, (5,)


@_register
class SyncDNC(_DNC):
    """DN-C over (N, C, ...), with batch statistics over all processes; otherwise as `DNC`."""

    bn_type, ndims = nn.SyncBatchNorm, ()
