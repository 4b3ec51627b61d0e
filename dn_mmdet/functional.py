"""The maths of Dynamic Normalization, and how it meets the state of a BatchNorm.

Source: Liu, Gao, Lv, "Dynamic Normalization", arXiv 2101.06073. Only its
abstract is public as text; what it leaves open is this project's own design.

For x of shape (N, C, ...), with ``m, v`` (N, C) the mean and population variance
of each sample's channel and ``s = sqrt(v + eps)``::

    mu  = mean_n m                                                          (1)
    var = mean_n v + mean_n (m - mu)^2                                      (2)
    z   = w (x - mu) / sigma + b,  sigma = sqrt(var + eps)    BatchNorm     (3)
    g, h = SC(m', s')                            DN-B, (N, C) each          (4)
    g, h = SC(mu, sigma)                         DN-C, (1, C) each          (5)
    y   = (1 + g) z + h                                                     (6)

``m', s'`` are ``m, s`` themselves (``inputs='raw'``) or ``(m - mu) / sigma`` and
``s / sigma - 1`` (``'standardized'``). Where the inner BatchNorm would use its
running statistics, they stand for mu and var.
"""
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from . import reference


def dynamic_norm(x: Tensor, bn: nn.Module, sc: nn.Module, *, batch_shared: bool,
                 ndims: tuple[int, ...] = ()) -> Tensor:
    """Normalises x by equations (1) to (6) and updates bn's running averages.

    Args:
        x: the feature map, of any floating-point dtype.
        bn: the inner norm. A torch BatchNorm, synchronised or not, keeps torch's
            meaning of its mode, buffers, eps and momentum. Any module with a
            forward of its own is called for equation (3).
        sc: the SC module.
        batch_shared: False for DN-B (4), True for DN-C (5).
        ndims: the numbers of dimensions that x may have; empty for any.

    Shape:
        - x: (N, C, ...)
        - output: the same shape and dtype

    Raises:
        ValueError: x has a wrong number of dimensions or of channels, or one
            value per channel where batch statistics are needed.
    """
    _check_shape(x, sc.num_features, ndims)
    if not is_torch_batch_norm(bn):
        return _around_another_norm(x, bn, sc, batch_shared)
    m, v = reference.moments(x)
    mu, var, count = statistics(bn, m, v, x)
    sigma = torch.sqrt(var + bn.eps)
    z = reference.normalize(x, mu, sigma, *affine_parameters(bn, m))
    g, h = generate(sc, m, torch.sqrt(v + bn.eps), mu, sigma, batch_shared)
    if count is not None:
        update_running_averages(bn, mu, var, count)
    return reference.modulate(z, g, h).to(x.dtype)


def is_torch_batch_norm(bn: nn.Module) -> bool:
    """Whether bn computes what torch's (Sync)BatchNorm does, so that (1) to (3) hold.

    Conversions replace the inner norm: mmengine's `revert_sync_batchnorm` by a
    subclass without a forward of its own, mmdet's and torchvision's freezing by
    another class.
    """
    return type(bn).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def statistics(bn: nn.Module, m: Tensor, v: Tensor, x: Tensor):
    """mu, var (C,) that bn would use, and the number of values behind them.

    The count is None where the statistics are the running ones, and a tensor
    where they were reduced over processes.
    """
    if _uses_running_statistics(bn):
        return bn.running_mean.to(m.dtype), bn.running_var.to(m.dtype), None
    group = _process_group(bn)
    if group is not None:
        return synchronized_statistics(m, v, x.numel() // x.shape[1], group)
    count = x.numel() // x.shape[1]
    if count == 1:
        raise ValueError(f'Expected more than 1 value per channel when training, got input '
                         f'size {tuple(x.shape)}; use larger batches or inputs, or eval()')
    return *batch_statistics(m, v), count


def batch_statistics(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """mu, var (C,) by equations (1) and (2); zeros, not NaN, of an empty batch."""
    samples = max(len(m), 1)
    mu = m.sum(0) / samples
    return mu, (v + (m - mu).square()).sum(0) / samples


def synchronized_statistics(m: Tensor, v: Tensor, count: int, group):
    """Equations (1) and (2) over all processes of a group, weighted by their counts.

    Every process writes (count, mean, variance) into its own row of a table of
    zeros; one differentiable all-reduce of the table then tells all of them.
    Combining variances about the common mean keeps channels with |mean| >> std
    accurate, which a sum of squares would not. A process with an empty batch takes
    part with weight 0.

    Returns:
        mu (C,), var (C,), count (0-d tensor).
    """
    row = torch.cat((m.new_full((1, ), count), *batch_statistics(m, v)))
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    table = torch.zeros(world_size, len(row), dtype=row.dtype, device=row.device)
    table = torch.cat((table[:rank], row[None], table[rank + 1:]))
    counts, means, variances = all_reduce(table, group=group).split(
        (1, m.shape[1], m.shape[1]), dim=1)
    total = counts.sum().detach()
    share = counts.detach() / total.clamp(min=1)
    mu = (share * means).sum(0)
    return mu, (share * (variances + (means - mu).square())).sum(0), total


def affine_parameters(bn: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """bn's w and b (C,), or ones and zeros where it has none, in the dtype of `like`."""
    if bn.weight is None:
        return like.new_ones(bn.num_features), like.new_zeros(bn.num_features)
    return bn.weight.to(like.dtype), bn.bias.to(like.dtype)


def generate(sc: nn.Module, m: Tensor, s: Tensor, mu: Tensor, sigma: Tensor,
             batch_shared: bool) -> tuple[Tensor, Tensor]:
    """g, h by equation (4), (N, C) each, or (5), (1, C) each."""
    if batch_shared:
        return sc(mu[None], sigma[None])
    if sc.inputs == 'standardized':
        return sc((m - mu) / sigma, s / sigma - 1)
    return sc(m, s)


@torch.no_grad()
def update_running_averages(bn: nn.Module, mu: Tensor, var: Tensor, count) -> None:
    """One step of bn's running averages, by torch's rule: the unbiased variance."""
    if not (bn.training and bn.track_running_stats):
        return
    bn.num_batches_tracked.add_(1)
    momentum = bn.momentum
    if momentum is None:  # cumulative average
        momentum = 1 / bn.num_batches_tracked.item()
    if isinstance(count, Tensor):  # no process had a value: leave the averages
        momentum = momentum * (count > 0)
        unbiased = var * count / (count - 1).clamp(min=1)
    elif count == 0:
        return
    else:
        unbiased = var * (count / (count - 1))
    for running, value in ((bn.running_mean, mu), (bn.running_var, unbiased)):
        running.copy_(running + momentum * (value - running))


def _check_shape(x, num_features, ndims):
    if x.dim() < 2 or (ndims and x.dim() not in ndims):
        expected = ' or '.join(f'{n}D' for n in ndims) or 'at least 2D'
        raise ValueError(f'expected {expected} input (got {x.dim()}D input of size '
                         f'{tuple(x.shape)})')
    if x.shape[1] != num_features:
        raise ValueError(f'expected {num_features} channels in dimension 1 (got {x.shape[1]} '
                         f'channels, input size {tuple(x.shape)}); num_features is set '
                         f'where the layer is built')


def _uses_running_statistics(bn):
    never_updates = not hasattr(bn, 'momentum')  # mmdet's and torchvision's FrozenBatchNorm2d
    return (getattr(bn, 'running_mean', None) is not None
            and (never_updates or not bn.training))


def _process_group(bn):
    """The group over which bn's batch statistics are to be reduced, or None."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available()
            and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _around_another_norm(x, norm, sc, batch_shared):
    """Equation (6) with z from an inner norm of unknown type."""
    m, v = reference.moments(x)
    eps = getattr(norm, 'eps', 1e-5)
    if _uses_running_statistics(norm):
        mu, var = norm.running_mean.to(m.dtype), norm.running_var.to(m.dtype)
    else:
        mu, var = batch_statistics(m, v)
    z = reference.widen(norm(x))
    g, h = generate(sc, m, torch.sqrt(v + eps), mu, torch.sqrt(var + eps), batch_shared)
    return reference.modulate(z, g, h).to(x.dtype)
