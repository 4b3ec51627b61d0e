"""Dynamic Normalization -> BatchNorm, after training, for layers in which g and h hardly vary.

With ``g, h`` constant, ``y = (1 + g) z + h`` is a BatchNorm of weight ``w (1 + g)`` and bias
``b (1 + g) + h``. In a trained model most layers make nearly the same g and h of every image.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import Any, NamedTuple

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .convert import (
    DNBAct,
    DNCAct,
    is_frozen_batch_norm,
    matches,
    misfolded,
    norms_in_words,
)
from .inner_norm import is_torch_batch_norm, parts_of_sc
from .layers import BATCH_NORM_KEYS, DynamicNorm
from .messages import some
from .reference import call_sc
from .scaled_bn import RewrittenBN

MOST = 0.75  # of the layers are 'most of them': those that vary least


class LayerReport(NamedTuple):
    """What was done with a layer; g_std, h_std and share are means over its channels."""

    name: str
    kind: str  # as DNB
    images: int  # samples behind g and h; 0 where they are constants, or never seen
    g_std: float  # standard deviation of g over the images
    h_std: float
    share: float  # of the output's variance that folding takes away; 0 where it is exact
    folded: bool


@dataclass
class Outputs:
    """What the SC of a layer made of many images.

    Args:
        count: images.
        mean: (2, C), of g and h.
        sums: (3, C), over images, of the squares of g and of h and of their product, each
            without its mean.
    """

    count: int
    mean: Tensor
    sums: Tensor

    @classmethod
    def of(cls, g: Tensor, h: Tensor) -> 'Outputs':
        """Of g, h (N, C)."""
        values = torch.stack((g, h)).detach().cpu().double()
        first = values[:, :1]  # subtracted, so that constants have a spread of exactly 0
        mean = (values - first).mean(1, keepdim=True)
        dg, dh = values - first - mean
        return cls(
            len(g),
            (first + mean)[:, 0],
            torch.stack((dg.square().sum(0), dh.square().sum(0), (dg * dh).sum(0))),
        )

    def __add__(self, other):
        count = self.count + other.count
        dg, dh = moved = other.mean - self.mean
        between = torch.stack((dg.square(), dh.square(), dg * dh))
        return Outputs(
            count,
            self.mean + moved * (other.count / count),
            self.sums + other.sums + between * (self.count * other.count / count),
        )

    def std(self) -> list[float]:
        """Of g and of h over images, averaged over channels."""
        return (self.sums[:2] / self.count).sqrt().mean(1).tolist()

    def share(self, bn: nn.Module) -> float:
        """The part of the layer's variance that comes from g and h not being their means.

        Of z, which they act on, it is taken that it has mean b and std w in every image.
        """
        w, b = affine_of(bn, self.mean[0])
        var_g, var_h, both = self.sums / self.count
        lost = (var_g * (w.square() + b.square()) + 2 * b * both + var_h).sum().item()
        kept = ((1 + self.mean[0]) * w).square().sum().item()
        return lost / (lost + kept) if lost > 0 else 0.0


@torch.no_grad()
def fold_norm(
    model: nn.Module,
    batches: Iterable | None = None,
    *,
    keep: int | Sequence[str] | None = None,
    max_change: float | None = None,
) -> list[LayerReport]:
    """Turns DN layers into BatchNorms, with g and h frozen at their mean over some images.

    Each BatchNorm takes the name of a layer. It is of the same kind as the layer's inner
    norm (1d, 2d, 3d, synchronised, frozen), and has the same eps, momentum, running
    statistics, dtype, device, mode and ``requires_grad``.

    Folding is exact where g and h are constants: in DN-C, in layers with an SC that is not
    trained, and in `ScaledBN` and the control `StaticDN`. No images are needed for these.
    The more g and h vary, the more folding changes; measure on a test set by how much. The
    images have to be like those that the model will see. If an optimizer or DDP holds the
    old parameters, make it again.

    Args:
        model: the model; it is changed in place.
        batches: inputs of the model's forward (each a tensor, or a tuple or dict of
            arguments). For a model of mmengine, what its data loader gives.
        keep: the layers that stay dynamic: patterns of names as in :func:`convert_norm`, or
            a number of layers. A number keeps the layers that vary most.
        max_change: layers with a `LayerReport.share` above this number stay dynamic.

    Returns:
        a report for each layer, in the order of the model. Layers that no batch reached stay
        dynamic, with ``images=0``.

    Raises:
        TypeError: batches is a single batch and not several.
        ValueError: there is no DN layer; batches are needed but missing; the model cannot
            take a batch, or a batch holds NaN; a pattern matches nothing; or a layer is
            more than a DN layer. Nothing was changed then.

    Example:
        >>> from dn_mmdet.convert import convert_norm
        >>> model = convert_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 'DNC')
        >>> fold_norm(model)[0].folded, model[1]
        (True, BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True))
    """
    layers = foldable(model)
    if max_change is not None and not max_change >= 0:
        raise ValueError(f'max_change: expected a share of at least 0, got {max_change!r}')
    keep = int(keep) if isinstance(keep, Integral) else keep  # numpy's
    by_name = named(layers, keep)
    varying = [name for layer, (name, *_) in layers.items() if constant(layer) is None]
    outputs = {}
    if batches is not None and varying:
        outputs = calibrate(model, batches)
    elif set(varying) - set(by_name):
        raise ValueError(
            f'batches: expected images, got none: {len(varying)} layers (such as {varying[0]}) '
            f'make their scale and shift from each image. Give some hundred images like '
            f'those that the model will see'
        )
    report = measure(model, outputs)
    kept = set(most_varying(report, keep) if isinstance(keep, int) else by_name)
    if max_change is not None:
        once = [row.name for row in report if row.images == 1 and row.name not in kept]
        if once:
            raise ValueError(
                f'max_change: expected several images (for DN-C: batches), over which g and h '
                f'can vary, got one for {some(once)}'
            )
        kept |= {row.name for row in report if row.share > max_change}
    return replace_layers(model, outputs, report, kept)


def foldable(model: nn.Module) -> dict[DynamicNorm | RewrittenBN, list[str]]:
    """The layers that can become BatchNorms, each with all names that it has in the model.

    Raises:
        ValueError: there is none, the model is one itself, or one is more than a DN layer.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            'expected a plain model, got one inside DistributedDataParallel: fold its .module'
        )
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (DynamicNorm, RewrittenBN)):
            found.setdefault(module, []).append(name)
    if not found:
        raise ValueError(
            f'found no DN layer to fold in {type(model).__name__}{norms_in_words(model)}'
        )
    if model in found:
        raise ValueError(
            f'expected a model that holds DN layers, got a single {type(model).__name__}, '
            f'which cannot replace itself: put it into nn.Sequential'
        )
    for layer, (name, *_) in found.items():
        _check_foldable(name, layer)
    return found


def _check_foldable(name, layer):
    bn = layer.bn
    if not (is_torch_batch_norm(bn) or is_frozen_batch_norm(bn)):
        raise ValueError(
            f'{name}: expected a BatchNorm inside the layer, got {type(bn).__module__}.'
            f'{type(bn).__qualname__}, which cannot be folded'
        )
    own = (DNBAct.forward, DNCAct.forward, DynamicNorm.forward, RewrittenBN.forward)
    if type(layer).forward not in own or 'forward' in vars(layer) or 'forward' in vars(bn):
        raise ValueError(
            f'{name}: {type(layer).__name__} has a forward of its own, which folding would lose'
        )
    if bn._modules or any(
        getattr(module, f'_{kind}_hooks')
        for module in (layer, bn)
        for kind in ('forward', 'forward_pre', 'backward', 'backward_pre')
    ):
        raise ValueError(
            f'{name}: has hooks or parametrizations on the layer or on its .bn, '
            f'which folding would lose: remove them first'
        )


def constant(layer: DynamicNorm | RewrittenBN) -> Outputs | None:
    """The g, h of a layer in eval mode where they are the same for every input."""
    if isinstance(layer, RewrittenBN):  # its scale and shift are all of weight and bias
        nothing = torch.zeros(1, layer.bn.num_features)
        return Outputs.of(nothing, nothing)
    bn, sc = layer.bn, layer.sc
    like = next(chain(sc.parameters(), bn.buffers()))
    dtype = torch.promote_types(like.dtype, torch.float32)
    if layer.batch_shared and getattr(bn, 'running_mean', None) is not None:
        mu, var = bn.running_mean.to(dtype), bn.running_var.to(dtype)
        eps = getattr(bn, 'eps', 1e-5)
        return Outputs.of(*call_sc(sc, mu[None], var[None], mu, torch.sqrt(var + eps), eps, True))
    w_out = getattr(sc, 'w_out', None)
    if w_out is None or w_out.any():
        return None
    if parts_of_sc(sc) is None and not sc.is_identity():  # it has a forward of its own, or hooks
        return None
    statistics = torch.ones(1, layer.num_features, dtype=dtype, device=like.device)
    return Outputs.of(*sc(statistics, statistics))


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable, forward: Callable | None = None
) -> dict[str, Outputs]:
    """What the SCs make of the images in some batches, by layer; the model in eval mode.

    A layer that has several names goes by the first.

    Args:
        batches: see :func:`fold_norm`.
        forward: called with each batch in place of the model.

    Raises:
        TypeError: one batch in place of several.
        ValueError: no batches, or one that the model cannot take or that holds NaN.
    """
    if isinstance(batches, (Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f'batches: expected a list or a loader of batches, got '
            f'{type(batches).__name__}: put a single batch into a list'
        )
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, DynamicNorm)
    }
    found: dict[str, Outputs] = {}
    owners: dict[nn.Module, list[str]] = {}  # several layers may share an SC
    for name, layer in layers.items():
        owners.setdefault(layer.sc, []).append(name)
    running: list[str] = []

    def enter(name):
        return lambda layer, given: running.append(name)

    def leave(layer, given, output):
        running.pop()

    def keep(sc, statistics, outputs):
        name = owners[sc][0]
        if len(owners[sc]) > 1:
            if not running:  # called outside of its layers
                return
            name = running[-1]
        if not all(t.isfinite().all() for t in outputs):
            raise _NotFinite(
                f'the statistics in {name} are not finite: the batch holds NaN or infinity, '
                f'or the model makes them from it'
            )
        if len(outputs[0]):
            more = Outputs.of(*outputs)
            found[name] = found[name] + more if name in found else more

    handles = [sc.register_forward_hook(keep) for sc in owners]
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(enter(name)))
        handles.append(layer.register_forward_hook(leave))
    try:
        with _modes_kept(model), _as_reference(layers.values()):
            model.eval()
            for at, batch in enumerate(batches):
                _run(model, batch, at, forward)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError('batches: expected images that reach the DN layers, got none')
    return found


class _NotFinite(ValueError):
    """Statistics of a batch are NaN or infinite."""


def _run(model, batch, at, forward):
    try:
        if forward is not None:
            forward(batch)
        elif isinstance(batch, Mapping):
            model.test_step(batch) if isinstance(model, BaseModel) else model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)
    except _NotFinite as error:
        raise ValueError(f'batch {at}: {error}') from None
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f'batch {at}: the model cannot take it: {reason}. Expected what the forward '
            f'of the model takes, or what its data loader gives'
        ) from error


@contextlib.contextmanager
def _as_reference(layers):
    """Meanwhile layers run as the reference does, which calls SC, and so its hooks."""
    backends = {layer: layer.backend for layer in layers}
    for layer in backends:
        layer.backend = 'reference'
    try:
        yield
    finally:
        for layer, backend in backends.items():
            layer.backend = backend


@contextlib.contextmanager
def _modes_kept(model):
    """Afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable, forward: Callable | None = None) -> None:
    """Estimates the running statistics again, as their mean over some batches.

    Meanwhile BatchNorms, also those inside DN layers, use batch statistics. BatchNorms with
    ``momentum=0`` keep their statistics, and so do those that no batch reaches. If a batch
    fails, all keep them.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.momentum != 0
    ]
    momenta = [bn.momentum for bn in norms]
    buffers = [{k: t.clone() for k, t in bn.named_buffers(recurse=False)} for bn in norms]
    done = False
    with _modes_kept(model):
        model.eval()
        for bn in norms:
            bn.reset_running_stats()
            bn.momentum = None
            bn.training = True
        try:
            for at, batch in enumerate(batches):
                _run(model, batch, at, forward)
            done = True
        finally:
            for bn, momentum, before in zip(norms, momenta, buffers, strict=True):
                bn.momentum = momentum
                if not (done and bn.num_batches_tracked):
                    for name, value in before.items():
                        getattr(bn, name).copy_(value)


def measure(model: nn.Module, outputs: dict[str, Outputs]) -> list[LayerReport]:
    """The report of all layers, none of them folded yet."""
    report = []
    for layer, (name, *_) in foldable(model).items():
        exact, seen = constant(layer), outputs.get(name)
        if exact is not None:
            count, g_std, h_std, share = 0, 0.0, 0.0, 0.0
        elif seen is not None:
            count, share = seen.count, seen.share(layer.bn)
            g_std, h_std = seen.std()
        else:
            count, g_std, h_std, share = 0, math.nan, math.nan, math.nan
        report.append(
            LayerReport(name, type(layer).__name__, count, g_std, h_std, share, folded=False)
        )
    return report


@torch.no_grad()
def values_of_maps(model: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """How many values the maps of each layer have in a run of the model, added up over calls."""
    found = {}

    def look(name):
        def hook(layer, given):
            found[name] += given[0].numel()

        return hook

    handles = []
    for layer, (name, *_) in foldable(model).items():
        found[name] = 0
        handles.append(layer.register_forward_pre_hook(look(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def most_varying(report: list[LayerReport], number: int) -> list[str]:
    """The names of the layers that folding would change most, in descending order."""
    seen = [row for row in report if not math.isnan(row.share)]
    return [row.name for row in sorted(seen, key=lambda row: -row.share)[:number]]


def dynamic_of_most(report: list[LayerReport]) -> list[str]:
    """The names of the layers that stay dynamic where `MOST` of those that images reach fold."""
    reached = sum(not math.isnan(row.share) for row in report)
    return most_varying(report, reached - round(MOST * reached))


def named(layers: dict[Any, list[str]], keep: int | Sequence[str] | None) -> list[str]:
    """The first name of each layer that ``keep`` names. If ``keep`` is a number, none.

    Raises:
        ValueError: a pattern matches nothing, or a number is larger than the number of layers.
    """
    if isinstance(keep, int) and not 0 <= keep <= len(layers):
        raise ValueError(f'keep: expected 0 to {len(layers)} layers, got {keep}')
    if keep is None or isinstance(keep, int):
        return []
    kept = []
    for pattern in (keep,) if isinstance(keep, str) else keep:
        found = [
            names[0] for names in layers.values() if any(matches(name, pattern) for name in names)
        ]
        if not found:
            raise ValueError(
                f'keep: {pattern!r} matches none of {len(layers)} layers '
                f'({some(name for name, *_ in layers.values())})'
            )
        kept += found
    return kept


@torch.no_grad()
def replace_layers(
    model: nn.Module, outputs: dict[str, Outputs], report: list[LayerReport], kept: Collection[str]
) -> list[LayerReport]:
    """Replaces all layers with BatchNorms, except those with their first name in ``kept``.

    Returns:
        the report, with what was folded.
    """
    layers, done = foldable(model), []
    new = {}
    for (layer, names), row in zip(layers.items(), report, strict=True):
        seen = constant(layer) or outputs.get(names[0])
        if names[0] not in kept and seen is not None:
            new[layer] = batch_norm_of(layer, *seen.mean)
        done.append(row._replace(folded=layer in new))
    for layer, bn in new.items():
        for name in layers[layer]:
            put(model, name, bn)
    if len(new) < len(layers):
        for name in misfolded(model):
            warnings.warn(
                f'{name}: this BatchNorm follows a dynamic layer inside one module, '
                f"and mmcv's fuse_conv_bn would fold it into the wrong convolution; "
                f'do not fuse this model',
                stacklevel=3,
            )
    return done


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def batch_norm_of(layer: nn.Module, g: Tensor, h: Tensor) -> nn.Module:
    """The BatchNorm that computes what a layer does where its SC gives g, h (C,)."""
    if isinstance(layer, RewrittenBN):
        weight, bias = layer.scale_and_shift()
    else:
        w, b = affine_of(layer.bn, g.double())
        weight, bias = w * (1 + g), b * (1 + g) + h
    bn = _with_affine(layer, weight, bias)
    if isinstance(layer, (DNBAct, DNCAct)):
        return _with_activation(layer, bn)
    return bn


def affine_of(bn, like):
    """Weight and bias (C,) of a BatchNorm, ones and zeros where it has none."""
    return [
        torch.full_like(like, fill) if t is None else t.detach().to(like)
        for t, fill in ((bn.weight, 1), (bn.bias, 0))
    ]


def _with_affine(layer, weight, bias):
    """A copy of a layer's inner norm with other weight and bias."""
    bn = layer.bn
    group = getattr(bn, 'process_group', None)  # cannot be copied
    new = copy.deepcopy(bn, {id(group): group})
    given = next(chain(bn.parameters(), bn.buffers(), layer.parameters()))
    for name, value in (('weight', weight), ('bias', bias)):
        if getattr(new, name) is None:
            trained = any(p.requires_grad for p in layer.parameters())
            setattr(new, name, nn.Parameter(value.to(given), trained))
        else:
            getattr(new, name).copy_(value)
    if hasattr(new, 'affine'):
        new.affine = True
    return new


def _with_activation(layer, bn):
    """The norm with an activation of timm that the layer has replaced."""
    from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct

    if is_frozen_batch_norm(bn):
        norm_act = FrozenBatchNormAct2d(layer.num_features, bn.eps)
    elif isinstance(bn, nn.SyncBatchNorm):
        norm_act = SyncBatchNormAct(
            bn.num_features,
            bn.eps,
            bn.momentum,
            bn.affine,
            bn.track_running_stats,
            bn.process_group,
        )
    else:
        norm_act = BatchNormAct2d(
            bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats
        )
    for name in BATCH_NORM_KEYS:
        if hasattr(norm_act, name) and hasattr(bn, name):
            setattr(norm_act, name, getattr(bn, name))
    norm_act.drop, norm_act.act = layer.drop, layer.act
    norm_act.training = bn.training
    return norm_act


@MODELS.register_module()
def PartlyFolded(part, dynamic, **more):
    """A part of a model (backbone, neck, head) with BatchNorms in place of most DN layers.

    It is made for a checkpoint of `tools/fold.py`, which has the weights.

    Args:
        part (dict): the config of that part, with Dynamic Normalization.
        dynamic (list[str]): the names of the layers, in the part, that stay dynamic.
        **more: options that the model around it passes to the part.

    Returns:
        nn.Module: the part itself, so that its parameters keep their names.

    Raises:
        ValueError: the part has no DN layer with such a name.
    """
    model = MODELS.build(dict(part, **more))
    layers = foldable(model)
    unknown = set(dynamic) - set(chain.from_iterable(layers.values()))
    if unknown:
        raise ValueError(
            f'dynamic: there are no DN layers {some(sorted(unknown))} in {type(model).__name__}'
        )
    for layer, names in layers.items():
        if not set(names) & set(dynamic):
            nothing = torch.zeros(layer.bn.num_features)
            bn = batch_norm_of(layer, nothing, nothing)
            for name in names:
                put(model, name, bn)
    return model
