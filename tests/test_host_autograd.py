"""The compiled GPU host: gradients, second gradients, saved tensors and hooks."""

import itertools

import host_cases
import pytest
import torch
from host_cases import (
    FAST_AND_SLOW,
    KINDS,
    MAPS,
    MODES,
    NAMES,
    assert_same,
    by_host,
    check,
    pair,
    results,
    slow,
    twin_of,
    values,
)
from parity import DEVICES, INTERPRETED, assert_interpreted_tests_pass
from torch.utils.checkpoint import checkpoint

from dn_mmdet import DNB, DNC

pytestmark = host_cases.pytestmark
no_error_of_a_kernel_is_lost = host_cases.no_error_of_a_kernel_is_lost
EVERY_SUBSET = [
    frozenset(chosen)
    for size in range(len(NAMES) + 1)
    for chosen in itertools.combinations(NAMES, size)
]


if not INTERPRETED:

    @FAST_AND_SLOW
    def test_in_the_interpreter(marker):
        assert_interpreted_tests_pass(__file__, marker)


def check_subset(needed, device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 1, 2)
    expected = results(twin, x.clone().requires_grad_(), dy := torch.randn_like(x))
    x.requires_grad_('x' in needed)
    for name, p in layer.named_parameters():
        p.requires_grad_(name in needed)
    y = layer(x)
    assert y.requires_grad == bool(needed)
    torch.testing.assert_close(y, expected['y'], check_dtype=False)
    if needed:
        assert by_host(y)
        y.backward(dy)
    for name, t in dict(layer.named_parameters(), x=x).items():
        assert (t.grad is not None) == (name in needed), name
        if t.grad is not None:
            torch.testing.assert_close(t.grad, expected[name])


@DEVICES
@pytest.mark.parametrize(
    'needed',
    [s for s in EVERY_SUBSET if len(s) in (0, 1, 6, 7)],
    ids=lambda s: ' '.join(sorted(s)) or 'nothing',
)
def test_exactly_the_gradients_that_are_needed(needed, device):
    check_subset(needed, device)


@DEVICES
@slow
def test_every_subset_that_may_need_gradients(device):
    for needed in EVERY_SUBSET:
        check_subset(needed, device)


@DEVICES
def test_a_graph_that_is_kept_can_be_used_again_and_again(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    leaves = [x, *layer.parameters()]
    y = layer(x)
    dy = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    third = torch.autograd.grad(y, leaves, dy)
    for each in zip(first, second, third, strict=True):
        assert torch.equal(each[0], each[1]) and torch.equal(each[0], each[2])
    with pytest.raises(RuntimeError, match='backward through the graph a second time'):
        torch.autograd.grad(y, leaves, dy)


@DEVICES
@pytest.mark.parametrize('name', NAMES)
def test_what_changed_in_place_before_the_backward_pass_is_an_error(name, device):
    layer, _ = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    map_ = x * 1
    y = layer(map_)
    with torch.no_grad():
        (map_ if name == 'x' else layer.get_parameter(name)).mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


@DEVICES
def test_a_step_of_the_averages_is_seen_as_a_change_in_place(device):
    """By whoever saved them for a backward pass."""
    layer, _ = pair(device)
    a = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
    for buffer in (layer.running_mean, layer.bn.running_var):
        product = (a * buffer).sum()
        layer(values(device, 2, 3, 2, 2))
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            product.backward()


@DEVICES
@pytest.mark.parametrize(
    'layout',
    [
        'plain',
        'sliced',
        *(pytest.param(layout, marks=slow) for layout in ('channels_last', 'not aligned')),
    ],
)
@KINDS
@MODES
def test_second_gradients(training, cls, kwargs, layout, device):
    """Also where the running statistics have moved on since the forward pass."""
    layer, twin = pair(device, cls, training=training, **kwargs)
    x = MAPS[layout](device)
    found = []
    dy, ddx = torch.randn(2, *x.shape, dtype=torch.float64, device=device)
    for each in (layer, twin):
        leaf = x.detach().requires_grad_()
        y = each(leaf)
        with torch.no_grad():
            if not training and each is layer:
                each.running_mean.add_(3)
                each.bn.running_var.mul_(2)
        leaves = [leaf, *each.parameters()]
        first = torch.autograd.grad(y.square(), leaves, dy, create_graph=True)
        second = torch.autograd.grad(
            first[0], leaves, ddx, allow_unused=True, materialize_grads=True
        )
        found.append((*first, *second))
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-8)


@DEVICES
@pytest.mark.parametrize(
    'cls, kwargs, training',
    [
        (DNB, {}, True),
        *(
            pytest.param(*case, marks=slow)
            for case in (
                (DNB, dict(inputs='standardized'), True),
                (DNC, {}, True),
                (DNB, {}, False),
                (DNC, {}, False),
            )
        ),
    ],
)
def test_gradgradcheck(cls, kwargs, training, device):
    layer, _ = pair(device, cls, 2, training, min_channels=2, **kwargs)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    x = values(device, 2, 2, 1, 2).requires_grad_()
    assert by_host(run(x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)


@DEVICES
@pytest.mark.parametrize('layout', ['plain', 'channels_last', 'sliced'])
def test_a_batch_of_gradients(layout, device):
    layer, twin = pair(device)
    x = MAPS[layout](device).requires_grad_()
    y = layer(x)
    leaves = [x, *layer.parameters()]
    dy = torch.randn(2, *y.shape, dtype=y.dtype, device=device)
    batched = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        single = torch.autograd.grad(y, leaves, dy[i], retain_graph=True)
        for actual, wanted in zip(batched, single, strict=True):
            torch.testing.assert_close(actual[i], wanted)


@DEVICES
@pytest.mark.parametrize('use_reentrant', [True, False])
@KINDS
def test_gradient_checkpointing(use_reentrant, cls, kwargs, device):
    """The averages step in both forward passes, as BatchNorm's do."""
    layer, twin = pair(device, cls, **kwargs)
    found = []
    x = values(device, 2, 3, 2, 2)
    for each in (layer, twin):
        leaf = x.clone().requires_grad_()
        y = checkpoint(each, leaf, use_reentrant=use_reentrant)
        y.square().sum().backward()
        assert each.num_batches_tracked == 2
        found.append(
            (y.detach(), leaf.grad, *(p.grad for p in each.parameters()), *each.buffers())
        )
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, check_dtype=False)


@DEVICES
@pytest.mark.parametrize('layout', ['plain', 'channels_last', 'sliced', 'not aligned'])
def test_hooks_on_saved_tensors(layout, device):
    """They may give back another tensor, in another layout."""
    layer, twin = pair(device)
    x = MAPS[layout](device)
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.detach().cpu().numpy().copy(order='C')

    def unpack(array):
        flat = torch.zeros(array.size + 1, dtype=torch.float64, device=device)
        return flat[1:].view(array.shape).copy_(torch.from_numpy(array))

    for context in (
        torch.autograd.graph.saved_tensors_hooks(pack, unpack),
        torch.autograd.graph.save_on_cpu(),
    ):
        leaf = x.detach().requires_grad_()
        with context:
            y = layer(leaf)
        assert by_host(y)
        dy = torch.randn_like(y)
        assert_same(results(layer, leaf, dy, y), results(twin, x.detach().requires_grad_(), dy), x)
    assert sorted(packed) == sorted([x.shape, *(p.shape for p in layer.parameters())])


@DEVICES
@pytest.mark.parametrize(
    'wrong',
    [lambda t: t[..., :1], lambda t: t.float(), lambda t: t.to('meta')],
    ids=['size', 'dtype', 'device'],
)
@pytest.mark.parametrize('which', range(7))
def test_a_hook_on_saved_tensors_that_gives_back_something_else(which, wrong, device):
    layer, _ = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    count = itertools.count()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (next(count), t), lambda pair: wrong(pair[1]) if pair[0] == which else pair[1]
    ):
        y = layer(x)
    with pytest.raises(RuntimeError, match='expected the saved tensor'):
        y.sum().backward()


@DEVICES
def test_a_hook_on_saved_tensors_that_fails(device):
    layer, _ = pair(device)

    def fail(t):
        raise ZeroDivisionError

    x = values(device, 2, 3, 2, 2)
    with (
        torch.autograd.graph.saved_tensors_hooks(fail, lambda t: t),
        pytest.raises(ZeroDivisionError),
    ):
        layer(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, fail):
        y = layer(x)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()


@DEVICES
def test_hooks_on_parameters_on_y_and_on_x(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    found, calls = [], []
    for each in (layer, twin):
        leaf = x.clone().requires_grad_()
        each.sc.w_in.register_hook(lambda d: 2 * d)
        each.bn.bias.register_post_accumulate_grad_hook(lambda p, of=each: calls.append(of))
        leaf.register_hook(lambda d: d + 1)
        y = each(leaf)
        y.register_hook(lambda d: 3 * d)
        y.square().sum().backward()
        found.append((leaf.grad, *(p.grad for p in each.parameters())))
    assert calls == [layer, twin]
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted)


@DEVICES
def test_gradients_add_up_and_each_has_memory_that_can_be_written(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    for each in (layer, twin):
        each(x).square().sum().backward()
        each.bn.weight.grad.mul_(2)  # does not reach another
        each.sc.b_in.grad.zero_()
        each(x).square().sum().backward()
    for (name, p), wanted in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, wanted.grad, msg=lambda m, n=name: f'{n}: {m}')


@DEVICES
def test_anomaly_mode(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    with torch.autograd.set_detect_anomaly(True):
        check(layer, twin, x)
        with (
            pytest.raises(RuntimeError, match="'DynamicNormBackward' returned nan"),
            pytest.warns(UserWarning, match='Error detected in DynamicNormBackward'),
        ):
            layer(x).backward(torch.full_like(x, float('nan')))


@DEVICES
@pytest.mark.parametrize('layout', ['plain', 'channels_last', 'sliced', 'not aligned'])
def test_nothing_reads_uninitialised_memory(layout, device):
    layer, twin = pair(device)
    try:
        torch.use_deterministic_algorithms(True)
        check(layer, twin, MAPS[layout](device))
    finally:
        torch.use_deterministic_algorithms(False)


@DEVICES
def test_autocast(device):
    layer, twin = pair(device, dtype=torch.float32)
    x = values(device, 2, 3, 2, 2)
    with torch.autocast(device, torch.bfloat16):
        check(layer, twin, x.bfloat16())
        check(layer, twin_of(layer), x.float())
