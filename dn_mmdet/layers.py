"""The layers DN-B and DN-C, as configs name them, and the state they hold."""

import re
import sys
import warnings
from typing import Any

import torch
import torch.fx
from mmengine.registry import MODELS
from torch import Tensor, nn

from .functional import dynamic_norm
from .inner_norm import check_eps
from .kernels.choice import check_backend
from .sc import SC

# A graph traced by torch.fx holds one call per layer: the shape checks and the
# choice by mode inside need values that a trace does not have.
torch.fx.wrap('dynamic_norm')

# What a BatchNorm checkpoint holds for a layer of the same name.
BATCH_NORM_KEYS = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
# How functions are called that fold a BatchNorm into a convolution or a linear: those of
# torch, timm, mmpretrain and the YOLOs, and what others would call theirs.
FOLDING = re.compile(
    '(^|_)(fus(e|ing|ion)|fold|merge|absorb|re_?param|deploy)'
    '|Fus(e|ing|ion)|Fold|Merge|Absorb|Re_?[Pp]aram|Deploy'
)
# By which of these the code of such functions, whatever they are called, takes the root of the
# variance and eps.
ROOTS = {'sqrt', 'rsqrt', 'pow', 'float_power', 0.5, -0.5}


def _build_sc(cfg, arguments):
    if cfg is None:
        return SC(**arguments)
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise TypeError(f"sc: expected the config of a module, as dict(type='SC'), got {cfg!r}")
    return MODELS.build(cfg, default_args=arguments)


class _DynamicNorm(nn.Module):
    """What DN-B and DN-C share, of which `DNB` has the documentation.

    The layer contains a BatchNorm instead of being one, because frameworks fold,
    convert and bypass subclasses of ``_BatchNorm`` without regard to what a
    subclass adds.
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
        if self.batch_shared and inputs != 'raw':
            raise ValueError(
                f'inputs: {type(self).__name__} makes its scale and shift from '
                f"the batch statistics themselves: expected 'raw', got "
                f'{inputs!r}'
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
        """As in torch, but without those that ``bn_requires_grad=False`` froze.

        mmcv's `build_norm_layer` sets ``requires_grad`` on all that this yields,
        after the layer is made, and would thaw them. A model's own ``parameters()``
        does not come through here and misses none; nor does this any longer, once
        they were thawed (``layer.bn.requires_grad_()``, ``model.requires_grad_()``).
        """
        for name, parameter in self.named_parameters(recurse=recurse):
            if self.bn_requires_grad or parameter.requires_grad or not name.startswith('bn.'):
                yield parameter

    def reset_running_stats(self):
        """As in torch: the inner norm's averages as at the start."""
        self.bn.reset_running_stats()

    def reset_parameters(self):
        """As in torch: the inner norm as at the start, and SC as at identity."""
        self.bn.reset_parameters()
        self.sc.reset_parameters()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        # Not by a hook: a bound method that the layer holds would be a reference cycle.
        assign = local_metadata.get('assign_to_params_buffers', False)
        self._accept_batch_norm_checkpoint(state_dict, prefix, assign)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _accept_batch_norm_checkpoint(self, state_dict, prefix, assign):
        """Lets the keys of a BatchNorm of this layer's name stand for those of `bn`."""
        found = [key for key in BATCH_NORM_KEYS if prefix + key in state_dict]
        if not found:
            return
        device = state_dict[prefix + found[0]].device if assign else None
        for key in found:
            state_dict[f'{prefix}bn.{key}'] = state_dict.pop(prefix + key)
        if not any(key.startswith(f'{prefix}sc.') for key in state_dict):
            state_dict.update(self.sc.identity_state_dict(f'{prefix}sc.', device))

    def __prepare_scriptable__(self):
        raise TypeError(
            f'{type(self).__name__} cannot be scripted, its forward chooses by device '
            f'and mode: use torch.jit.trace or torch.export instead'
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
        """The inner norm's. Code that would fold it, and so lose SC, is told or refused."""
        if not torch.compiler.is_compiling():
            self._refuse_to_be_folded(sys._getframe(1))
        return self.bn.running_var

    def _refuse_to_be_folded(self, frame):
        codes = [frame.f_code]
        while frame.f_code.co_name.startswith('<') and frame.f_back:  # a lambda, a comprehension
            frame = frame.f_back
            codes.append(frame.f_code)
        name = codes[-1].co_name
        named = FOLDING.search(name)
        if not (named or any(map(_seems_to_fold, codes))) or self.sc.is_identity():
            return
        kind = type(self).__name__
        remedy = (
            'make BatchNorms of the layers first, by dn_mmdet.fold.fold_norm, or leave this '
            'one as it is. Code that only reads it finds the inner BatchNorm as .bn'
        )
        if named:
            raise TypeError(
                f'{name}: expected a BatchNorm to fold, got {kind}, whose scale and '
                f'shift follow the input and would be lost: {remedy}'
            )
        warnings.warn(
            f'{name} reads what functions read that fuse a BatchNorm into a '
            f'convolution. Of a {kind} they would lose the scale and shift that follow '
            f'the input: {remedy}',
            stacklevel=3,
        )

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


def _seems_to_fold(code):
    """Whether a function that reads a norm's attributes takes the root of its variance and eps.

    Or hands both to a function that folds. One that knows of ``sc`` computes the layer.
    """
    called = code.co_names + code.co_freevars
    names = {*called, *code.co_consts}
    return (
        code.co_name != '<module>'
        and {'running_var', 'eps'} <= names
        and 'sc' not in names
        and (not names.isdisjoint(ROOTS) or any(map(FOLDING.search, called)))
    )


def _register(cls):
    """Registers in mmengine's root registry, which every OpenMMLab scope falls back to.

    Importing this file again replaces its own classes; a class of the same name
    from elsewhere is left in place and mmengine's error names it.
    """
    existing = MODELS.module_dict.get(cls.__name__)
    own = existing is not None and existing.__module__ == cls.__module__
    MODELS.register_module(module=cls, force=own)
    return cls


_register(SC)


class _DNB(_DynamicNorm):
    batch_shared = False


class _DNC(_DynamicNorm):
    batch_shared = True


@_register
class DNB(_DNB):
    """DN-B over (N, C, H, W): a BatchNorm whose scale and shift follow each sample.

    Source: Liu, Gao, Lv, "Dynamic Normalization", arXiv 2101.06073. The paper's
    public text leaves the layers of the SC module open; see `SC`.

        y = (1 + g) z + h,    z = w (x - mu) / sqrt(var + eps) + b

    ``z`` is the output of the inner norm ``bn``. The module ``sc`` makes ``g`` and
    ``h`` for each sample and channel, from the mean and std of that sample's
    channel. A new layer has ``g = h = 0`` and computes what BatchNorm does. A
    BatchNorm checkpoint loads by name and leaves it so.

    In training ``mu, var`` are batch statistics, in eval mode the running ones. The
    mode that counts is that of ``bn``, so that frozen statistics (``norm_eval``,
    ``momentum=0``, ``track_running_stats=False``) mean what they mean in torch. SC
    adapts to each input in both modes.

    Args:
        num_features (int): channels C of the input.
        eps (float): added to variances before the square root.
        momentum (float | None): step of the running averages; None averages
            cumulatively.
        affine (bool): whether the inner norm has ``w`` and ``b``.
        track_running_stats (bool): whether it keeps running averages.
        reduction (int): SC's hidden layer has ``C // reduction`` units,
        min_channels (int): but never fewer than this.
        inputs (str): ``'raw'`` or ``'standardized'`` statistics for SC. DN-C has
            no batch to be relative to and takes only ``'raw'``.
        bound (float | None): ``g`` and ``h`` lie in (-bound, bound); None for no
            bound, which diverges at high learning rates.
        sc (dict | None): the config of a registered module in the place of `SC`, as
            ``dict(type='MySC', depth=2)``. It is given SC's arguments, those of this
            layer, unless the config has others; see `SC` for what it has to do.
        bn_requires_grad (bool): False freezes ``w`` and ``b`` and leaves SC
            trainable. (mmcv's own ``requires_grad=False`` freezes both.)
        backend (str): which implementation runs; see `dynamic_norm`. All
            compute the same.
        device: of all parameters and buffers.
        dtype: of all parameters and buffers.

    Raises:
        ValueError: an argument out of range, or an input of wrong shape.
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
    """DN-B over (N, C, ...), with batch statistics over all processes; else as `DNB`."""

    bn_type, ndims = nn.SyncBatchNorm, ()


@_register
class DNC(_DNC):
    """DN-C over (N, C, H, W): a BatchNorm whose scale and shift follow the batch.

    As `DNB`, with its arguments, but there is one ``g`` and one ``h`` for each
    channel, made from ``mu`` and ``sqrt(var + eps)``. In eval mode these are the running
    averages, so that ``g`` and ``h`` are constants. ``inputs`` has to be ``'raw'``.

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
    """DN-C over (N, C, ...), with batch statistics over all processes; else as `DNC`."""

    bn_type, ndims = nn.SyncBatchNorm, ()
