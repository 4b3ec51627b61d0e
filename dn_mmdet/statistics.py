"""The statistics of the inner BatchNorm: of a batch, over processes, and their averages."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from . import reference


class Call(NamedTuple):
    """What a call read from the layer's modules, for a backward that comes later."""

    bn: Any  # a BatchNorm, or what a conversion put in its place
    running: tuple[Tensor, Tensor] | None  # running mean and variance, where bn uses them
    group: Any  # of processes over which to reduce batch statistics, or None
    sc: Any  # the SC module, or what computes the same
    sc_parts: tuple[Tensor, ...] | None  # of an SC as it is, None of one that is to be called
    batch_shared: bool


def statistics(call: Call, m: Tensor, v: Tensor, x: Tensor) -> tuple:
    """mu, var (C,) that the inner BatchNorm uses, and the number of values behind them.

    The count is None where the statistics are the running ones, and a tensor
    where they were reduced over processes.
    """
    if call.running is not None:
        return *(t.to(m.dtype) for t in call.running), None
    count = _values_per_channel(x)
    if call.group is not None:
        return synchronized_statistics(m, v, count, call.group)
    return *reference.batch_statistics(m, v), count


def synchronized_statistics(
    m: Tensor, v: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (1) and (2) over all processes of a group, weighted by their counts.

    Every process writes (count, mean, variance) into its own row of a table of
    zeros; one differentiable all-reduce of the table then tells all of them.
    Combining variances about the common mean keeps channels with |mean| >> std
    accurate, which a sum of squares would not. A process with an empty batch takes
    part with weight 0.

    Returns:
        mu (C,), var (C,), count (0-d tensor).
    """
    row = torch.cat((m.new_full((1,), count), *reference.batch_statistics(m, v)))
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    table = torch.zeros(world_size, len(row), dtype=row.dtype, device=row.device)
    table = torch.cat((table[:rank], row[None], table[rank + 1 :]))
    counts, means, variances = all_reduce(table, group=group).split(
        (1, m.shape[1], m.shape[1]), dim=1
    )
    total = counts.sum().detach()
    share = counts.detach() / total.clamp(min=1)
    mu = (share * means).sum(0)
    return mu, (share * (variances + (means - mu).square())).sum(0), total


def update_running_averages(bn: Any, mu: Tensor, var: Tensor, count: Any) -> None:
    """One step of bn's running averages, by torch's rule: the unbiased variance."""
    if not steps(bn):
        return  # before no_grad, which in eval mode would be a region of its own to torch.export
    with torch.no_grad():
        momentum = count_batch(bn)
        if bn.running_mean is None:
            return
        if isinstance(count, Tensor):  # no process had a value: leave the averages
            momentum = momentum * (count > 0).to(count.dtype)  # a bool tensor would round it
            unbiased = var * count / (count - 1).clamp(min=1)
        elif count == 0:
            return
        else:
            unbiased = var * (count / (count - 1))
        for running, value in ((bn.running_mean, mu), (bn.running_var, unbiased)):
            running.copy_(running + momentum * (value - running))


def steps(bn):
    return bn.training and bn.track_running_stats


def count_batch(bn):
    """Counts a batch, if bn has a counter, and gives the step of the running averages."""
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    if bn.momentum is not None:
        return bn.momentum
    if bn.num_batches_tracked is None:
        return 0.0  # torch's rule
    return 1 / bn.num_batches_tracked.item()  # cumulative average


def check_count(x, call):
    if call.running is None and call.group is None and _values_per_channel(x) == 1:
        raise ValueError(
            f'Expected more than 1 value per channel when training, got input '
            f'size {tuple(x.shape)}; use larger batches or inputs, or eval()'
        )


def _values_per_channel(x):
    return x.numel() // x.shape[1]


def running_statistics(bn):
    """The running mean and variance where bn normalises by them, or None."""
    never_updates = not hasattr(bn, 'momentum')  # mmdet's and torchvision's FrozenBatchNorm2d
    if getattr(bn, 'running_mean', None) is None or (bn.training and not never_updates):
        return None
    return bn.running_mean, bn.running_var


def is_synchronised(bn):
    return (
        isinstance(bn, nn.SyncBatchNorm)
        and bn.training
        and dist.is_available()
        and dist.is_initialized()
    )


def process_group(bn: Any) -> dist.ProcessGroup | None:
    """The group over which bn's batch statistics are to be reduced, or None."""
    if not is_synchronised(bn):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
