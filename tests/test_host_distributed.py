"""The compiled GPU host: synchronised statistics, in two processes against one."""

import host_cases
import pytest
import test_distributed
import torch
from host_cases import FAST_AND_SLOW, NAMES, by_host, pair, results, slow, twin_of
from parity import DEVICES, INTERPRETED, assert_interpreted_tests_pass
from torch import nn
from torch.utils.checkpoint import checkpoint

from dn_mmdet import SyncDNB, SyncDNC

pytestmark = host_cases.pytestmark
no_error_of_a_kernel_is_lost = host_cases.no_error_of_a_kernel_is_lost
two_processes = test_distributed.two_processes


if not INTERPRETED:

    @FAST_AND_SLOW
    def test_in_the_interpreter(marker):
        assert_interpreted_tests_pass(__file__, marker)


def half(
    rank, device, sizes, cls, kwargs, map_needs_gradient=True, size=(2, 2), checkpointed=False
):
    """In a process of its own: a step with a part of the batch."""
    torch.manual_seed(4)
    layer, _ = pair(device, cls, **kwargs)
    x, dy = (t.to(device).split(sizes)[rank] for t in batch(sum(sizes), size))
    found = {}
    for _ in range(2):
        x = x.detach().requires_grad_(map_needs_gradient)
        if checkpointed:
            y = checkpoint(layer, x, use_reentrant=False)
        else:
            y = layer(x)
            assert by_host(y) == (sizes[rank] > 0)
        found = results(layer, x, dy, y)
    return {name: t.cpu() for name, t in found.items()}


def batch(n, size=(2, 2)):
    generator = torch.Generator().manual_seed(5)
    x, dy = torch.randn(2, n, 3, *size, dtype=torch.float64, generator=generator)
    return x * torch.arange(1, n + 1).view(-1, 1, 1, 1) + 3, dy


def whole(device, sizes, cls, kwargs, map_needs_gradient=True, size=(2, 2)):
    torch.manual_seed(4)
    twin = pair(device, cls, **kwargs)[1]
    x, dy = (t.to(device) for t in batch(sum(sizes), size))
    for _ in range(2):
        found = results(twin, x.detach().requires_grad_(map_needs_gradient), dy)
    return found


SYNCHRONISED = {
    'raw': (SyncDNB, {}),
    'standardized': (SyncDNB, dict(inputs='standardized')),
    'dnc': (SyncDNC, {}),
    'cumulative': (SyncDNB, dict(momentum=None, affine=False)),
}


@DEVICES
@pytest.mark.parametrize(
    'kind, sizes, map_needs_gradient',
    [
        *((kind, (2, 2), True) for kind in SYNCHRONISED),
        *((kind, (1, 4), True) for kind in SYNCHRONISED),
        ('raw', (3, 0), True),
        ('dnc', (0, 3), True),
        ('raw', (1, 2), False),
        ('standardized', (2, 0), False),
        ('dnc', (0, 3), False),
    ],
)
def test_synchronised_statistics(two_processes, kind, sizes, map_needs_gradient, device):
    """An empty batch runs on the reference: the same all-reduces there, or both would hang."""
    arguments = device, sizes, *SYNCHRONISED[kind], map_needs_gradient
    halves = two_processes(half, *arguments)
    assert_halves(halves, whole(*arguments))


@DEVICES
@pytest.mark.parametrize(
    'kind',
    ['raw', *(pytest.param(kind, marks=slow) for kind in ('standardized', 'dnc', 'cumulative'))],
)
def test_synchronised_statistics_of_maps_in_parts(two_processes, kind, device):
    """Sums over a map split among programs, and more hidden units than one program takes."""
    cls, kwargs = SYNCHRONISED[kind]
    arguments = device, (1, 2), cls, dict(kwargs, min_channels=70), True, (61, 83)
    assert_halves(two_processes(half, *arguments), whole(*arguments))


@DEVICES
def test_synchronised_statistics_under_checkpointing(two_processes, device):
    arguments = device, (2, 1), *SYNCHRONISED['raw'], True, (2, 2)
    first = two_processes(half, *arguments)
    again = two_processes(half, *arguments, True)
    for one, other in zip(first, again, strict=True):
        assert other.pop('bn.num_batches_tracked') == 2 * one.pop('bn.num_batches_tracked')
        for name in ('y', 'x', *NAMES[1:]):
            torch.testing.assert_close(*(torch.as_tensor(t[name]) for t in (one, other)))


def assert_halves(halves, expected):
    for name, wanted in expected.items():
        parts = [torch.as_tensor(each[name]) for each in halves]
        wanted = wanted.cpu()
        if name in ('x', 'y'):
            torch.testing.assert_close(torch.cat(parts), wanted)
        elif name in NAMES:  # each process has its own part of the sum
            torch.testing.assert_close(sum(parts), wanted)
        else:
            for part in parts:
                torch.testing.assert_close(part, wanted)


def second(rank, device):
    layer, _ = pair(device, SyncDNB)
    torch.manual_seed(6)
    for p in layer.parameters():
        nn.init.normal_(p)
    layer.bn.running_mean.zero_(), layer.bn.running_var.fill_(1)
    x, dy = (t.to(device).split((2, 1))[rank] for t in batch(3))
    x.requires_grad_()
    found = {}
    for name, each in dict(host=layer, reference=twin_of(layer)).items():
        y = each(x)
        (first,) = torch.autograd.grad(y.square(), x, dy, create_graph=True)
        found[name] = torch.autograd.grad(first.square().sum(), x)[0]
    return {name: t.cpu() for name, t in found.items()}


@DEVICES
def test_second_gradients_across_processes(two_processes, device):
    for result in two_processes(second, device):
        torch.testing.assert_close(*(torch.as_tensor(t) for t in result.values()))
