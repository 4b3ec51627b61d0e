"""The compiled GPU host: which calls it takes, and that what it gives is the reference's.

On a GPU where there is one, everywhere else in Triton's interpreter; see `emulated_gpu`. Maps
are tiny: what large ones need is in test_triton_ops.py.
"""

import copy
import gc
import io
import itertools
import pickle
import struct
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import test_distributed
import torch
from conftest import TOLERANCE, awake
from parity import CUDA, DEVICES, INTERPRETED, assert_interpreted_tests_pass
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from dn_mmdet import DNB, DNC, SC, DNB1d, DNB3d, DNC1d, DNC3d, SyncDNB, SyncDNC
from dn_mmdet.kernels import choice

pytest.importorskip('triton', reason='needs Triton, which is not made for this system')
if choice.gpu_host() is None:
    pytest.skip('the compiled host was not built', allow_module_level=True)
from dn_mmdet.kernels import _host, host  # noqa: E402

if INTERPRETED:
    import emulated_gpu

    FAKE = emulated_gpu.install()
slow = pytest.mark.slow
# the interpreter's own, of numpy
pytestmark = pytest.mark.filterwarnings('ignore:Conversion of an array with ndim')
NAMES = ('x', 'bn.weight', 'bn.bias', 'sc.w_in', 'sc.b_in', 'sc.w_out', 'sc.b_out')
KINDS = pytest.mark.parametrize(
    'cls, kwargs',
    [(DNB, {}), (DNB, dict(inputs='standardized')), (DNC, {})],
    ids=['raw', 'standardized', 'dnc'],
)
MODES = pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])


@pytest.fixture(autouse=True)
def no_error_of_a_kernel_is_lost():
    yield
    if INTERPRETED:
        errors = emulated_gpu.errors[:]
        emulated_gpu.errors.clear()
        assert not errors, errors[0]


if not INTERPRETED:

    @pytest.mark.parametrize(
        'marker',
        [
            'not slow and not gpu',
            pytest.param('slow and not gpu', marks=[slow, pytest.mark.timeout(2400)]),
        ],
    )
    def test_in_the_interpreter(marker):
        assert_interpreted_tests_pass(__file__, marker)


def pair(device, cls=DNB, channels=3, training=True, dtype=torch.float64, **kwargs):
    """A layer as after training, to be run by the host, and its twin, by the reference."""
    layer = awake(cls(channels, backend='cpp', **kwargs), std=0.3)
    bn = layer.bn
    with torch.no_grad():
        for t in (bn.weight, bn.running_var):
            if t is not None:
                t.uniform_(0.5, 2)
        for t in (bn.bias, bn.running_mean):
            if t is not None:
                t.normal_()
    layer.train(training).to(device, dtype)
    return layer, twin_of(layer)


def twin_of(layer):
    twin = copy.deepcopy(layer).double()
    twin.backend = 'reference'
    return twin


def by_host(y):
    """Whether the host made y, which needs a gradient."""
    return y.grad_fn.name() == 'DynamicNormBackward'


def taken(layer, x):
    """Whether the host takes this call; it runs then."""
    return host.call(x, layer.bn, layer.sc, layer.batch_shared, layer.ndims) is not None


def leaves_of(layer, x):
    leaves = {'x': x, **dict(layer.named_parameters())}
    return {name: t for name, t in leaves.items() if t.requires_grad}


def results(layer, x, dy, y=None):
    """y, the gradients of all that need one, and the buffers, by name."""
    leaves = leaves_of(layer, x)
    y = layer(x) if y is None else y
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return dict(
        zip(('y', *leaves), (y.detach(), *gradients), strict=True),
        **{name: t.clone() for name, t in layer.named_buffers()},
    )


def assert_same(actual, expected, like):
    """like: a map, for small things are made in float32 where maps have less than float64."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        dtype = actual[name].dtype
        if dtype == torch.float64 and like.dtype != torch.float64:
            dtype = torch.float32
        tolerance = TOLERANCE[dtype] if dtype.is_floating_point else dict(rtol=0, atol=0)
        torch.testing.assert_close(
            actual[name].double(), wanted.double(), **tolerance, msg=lambda m, n=name: f'{n}: {m}'
        )


def check(layer, twin, x, host=True, steps=1):
    """Steps of both, from the same x, whose gradient is compared too."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        wide = x.detach().double().requires_grad_()
        dy = torch.randn(x.shape, device=x.device, dtype=x.dtype)
        y = layer(x)
        assert by_host(y) == host
        assert y.shape == x.shape and y.dtype == x.dtype
        assert_same(results(layer, x, dy, y), results(twin, wide, dy.double()), x)


# ---------------------------------------------------------------- maps


def values(device, *shape):
    return torch.randn(shape, dtype=torch.float64, device=device) * 2 + 1


def odd(device, sizes, strides):
    return values(device, 400).as_strided(sizes, strides)


MAPS = {
    'plain': lambda d: values(d, 2, 3, 2, 3),
    'not aligned': lambda d: values(d, 25)[1:].view(2, 3, 2, 2),
    'not aligned, channels_last': lambda d: values(d, 25)[1:].view(2, 2, 2, 3).permute(0, 3, 1, 2),
    'sliced': lambda d: values(d, 2, 5, 4, 6)[:, 1:4, ::2, 1:4],
    'part of a batch': lambda d: values(d, 5, 3, 1, 1)[1:3],
    'channels_last, sliced': lambda d: values(d, 2, 4, 6, 3).permute(0, 3, 1, 2)[..., ::2, 1:],
    'transposed': lambda d: values(d, 2, 3, 4, 2).mT,
    'batch transposed': lambda d: values(d, 3, 2, 2, 2).transpose(0, 1),
    'expanded': lambda d: values(d, 2, 3, 1, 4).expand(2, 3, 3, 4),
    'expanded channels': lambda d: values(d, 2, 1, 2, 2).expand(2, 3, 2, 2),
    'channels_last': lambda d: values(d, 2, 3, 2, 3).contiguous(memory_format=torch.channels_last),
    '1 x 1': lambda d: values(d, 4, 3, 1, 1),
    '1 x 1, channels_last': lambda d: values(d, 4, 3, 1, 1).contiguous(
        memory_format=torch.channels_last
    ),
    'odd strides of sizes 1': lambda d: odd(d, (2, 3, 1, 1), (3, 1, 7, 0)),
    'odd strides of sizes 1, channels_last': lambda d: odd(d, (1, 3, 2, 2), (99, 1, 6, 3)),
    'one channel, odd stride': lambda d: odd(d, (3, 1, 2, 2), (4, 50, 2, 1)),
    '2-d': lambda d: values(d, 4, 3),
    '2-d, transposed': lambda d: values(d, 3, 4).t(),
    '2-d, not aligned': lambda d: values(d, 13)[1:].view(4, 3),
    '3-d': lambda d: values(d, 2, 3, 5),
    '3-d, channels innermost': lambda d: values(d, 2, 5, 3).mT,
    '5-d': lambda d: values(d, 2, 3, 2, 1, 3),
    '5-d, channels_last_3d': lambda d: values(d, 2, 3, 2, 3, 2).contiguous(
        memory_format=torch.channels_last_3d
    ),
}
CLASSES = {2: (DNB1d, DNC1d), 3: (DNB1d, DNC1d), 4: (DNB, DNC), 5: (DNB3d, DNC3d)}


@DEVICES
@pytest.mark.parametrize('layout', MAPS)
def test_every_layout(layout, device):
    x = MAPS[layout](device)
    if 'not aligned' in layout:
        assert x.data_ptr() % 16
    cls, cls_c = CLASSES[x.dim()]
    check(*pair(device, cls, x.shape[1]), x)
    check(*pair(device, cls_c, x.shape[1], training=False), x)


@DEVICES
@slow
@KINDS
@MODES
@pytest.mark.parametrize('layout', [name for name in MAPS if name[1] != '-'])
def test_every_layout_of_2d_maps_in_every_layer(layout, training, cls, kwargs, device):
    x = MAPS[layout](device)
    check(*pair(device, cls, x.shape[1], training, **kwargs), x)


@DEVICES
@pytest.mark.parametrize('layout', ['sliced', 'channels_last'])
def test_gradients_of_any_layout(layout, device):
    """dy expanded (as of a sum), sliced, of the other memory format or not aligned."""
    layer, twin = pair(device)
    x = MAPS[layout](device).requires_grad_()
    wide = x.detach().requires_grad_()
    y, expected = layer(x), twin(wide)
    n = y.numel()
    for dy in (
        torch.ones((), device=device, dtype=x.dtype).expand(y.shape),
        values(device, *y.shape[:3], 2 * y.shape[3])[..., ::2],
        values(device, *y.shape).contiguous(),
        values(device, n + 1)[1:].view(y.shape),
    ):
        actual, wanted = (
            torch.autograd.grad(t, leaf, dy, retain_graph=True)[0]
            for t, leaf in ((y, x), (expected, wide))
        )
        torch.testing.assert_close(actual, wanted)


@DEVICES
def test_an_empty_batch(device):
    layer, twin = pair(device)
    check(layer, twin, torch.zeros(0, 3, 2, 2, dtype=torch.float64, device=device), host=False)


@DEVICES
def test_a_negated_view(device):
    layer, twin = pair(device)
    x = torch.randn(2, 3, 2, 2, dtype=torch.complex128, device=device).conj().imag
    assert x.is_neg() and not taken(layer, x)
    check(layer, twin, x, host=False)
    y, expected = layer(-x), twin(-x)
    dy = torch.randn(2, 3, 2, 2, dtype=torch.complex128, device=device).conj().imag
    for actual, wanted in zip(
        torch.autograd.grad(y, list(layer.parameters()), dy),
        torch.autograd.grad(expected, list(twin.parameters()), dy),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


@DEVICES
def test_more_values_in_a_channel_than_its_numbers_hold(device):
    """The sizes of a launch are of 32 bits; the general path passes others on."""
    layer, _ = pair(device, channels=1)
    x = torch.zeros((), dtype=torch.float16, device=device).expand(1, 1, 2**16, 2**15)
    assert not taken(layer, x)


# ---------------------------------------------------------------- parameters


@DEVICES
@pytest.mark.parametrize(
    'x_dtype, dtype',
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float64),
    ],
    ids=str,
)
def test_parameters_of_another_dtype(x_dtype, dtype, device):
    layer, twin = pair(device, dtype=dtype)
    check(layer, twin, values(device, 3, 3, 2, 2).to(x_dtype))


@DEVICES
def test_each_part_of_another_dtype(device):
    layer, _ = pair(device, dtype=torch.float32)
    layer.sc.w_in.data = layer.sc.w_in.data.half()
    layer.sc.b_out.data = layer.sc.b_out.data.bfloat16()
    layer.bn.bias.data = layer.bn.bias.data.double()
    layer.bn.running_var = layer.bn.running_var.double()
    twin = twin_of(layer)
    check(layer, twin, values(device, 3, 3, 2, 2).float())
    check(layer.eval(), twin.eval(), values(device, 3, 3, 2, 2).float())


def move_into(layer, place):
    for module in (layer.bn, layer.sc):
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(place(p.detach())))
    return layer


@DEVICES
@KINDS
def test_parameters_that_are_not_contiguous(cls, kwargs, device):
    layer, twin = pair(device, cls, **kwargs)

    def place(t):
        spread = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2]
        return spread.copy_(t)

    move_into(layer, place)
    assert not any(p.is_contiguous() for p in layer.parameters())
    check(layer, twin, values(device, 2, 3, 2, 2))


@DEVICES
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_parameters_in_one_flat_buffer(dtype, device):
    layer, twin = pair(device, dtype=dtype)
    flat = torch.zeros(1000, dtype=dtype, device=device)
    at = [1]

    def place(t):
        view = flat[at[0] : at[0] + t.numel()].view(t.shape).copy_(t)
        at[0] += t.numel() + t.numel() % 2  # the next is at an odd place again
        return view

    move_into(layer, place)
    for name in ('running_mean', 'running_var'):
        setattr(layer.bn, name, place(getattr(layer.bn, name)))
    assert all(p.data_ptr() % 16 for p in layer.parameters())
    check(layer, twin, values(device, 2, 3, 2, 2).to(torch.float32), steps=2)


OPTIONS = {
    'plain': {},
    'not affine': dict(affine=False),
    'no bound': dict(bound=None),
    'cumulative': dict(momentum=None),
    'frozen averages': dict(momentum=0),
    'last batch': dict(momentum=1),
    'integers': dict(bound=1, momentum=1, eps=1),
    'no averages': dict(track_running_stats=False),
    'many hidden units': dict(min_channels=70),
    'very many hidden units': dict(min_channels=135),
    'one hidden unit': dict(min_channels=1),
}


@DEVICES
@pytest.mark.parametrize('name', OPTIONS)
def test_every_option(name, device):
    x = values(device, 3, 3, 2, 2)
    check(*pair(device, DNB, **OPTIONS[name]), x, steps=2)
    check(*pair(device, DNC, training=False, **OPTIONS[name]), x)


@DEVICES
@slow
@KINDS
@MODES
@pytest.mark.parametrize('name', OPTIONS)
def test_every_option_of_every_layer(name, training, cls, kwargs, device):
    check(
        *pair(device, cls, training=training, **kwargs, **OPTIONS[name]),
        values(device, 3, 3, 2, 2),
        steps=2,
    )


@DEVICES
@KINDS
@pytest.mark.parametrize('missing', ['weight', 'bias'])
def test_only_one_of_weight_and_bias(missing, cls, kwargs, device):
    layer, _ = pair(device, cls, **kwargs)
    setattr(layer.bn, missing, None)
    check(layer, twin_of(layer), values(device, 2, 3, 2, 2))


@DEVICES
@MODES
def test_without_a_counter(training, device):
    layer, _ = pair(device, training=training)
    layer.bn.num_batches_tracked = None
    check(layer, twin_of(layer), values(device, 2, 3, 2, 2), steps=2)


@DEVICES
def test_cumulative_without_a_counter(device):
    """Torch's rule there: the averages stay."""
    layer, _ = pair(device, momentum=None)
    layer.bn.num_batches_tracked = None
    check(layer, twin_of(layer), values(device, 2, 3, 2, 2), host=False)


@DEVICES
def test_averages_that_are_there_and_not_tracked(device):
    """In training nothing moves; eval mode uses them."""
    layer, _ = pair(device)
    layer.track_running_stats = False
    twin = twin_of(layer)
    before = layer.running_mean.clone()
    check(layer, twin, values(device, 2, 3, 2, 2))
    assert torch.equal(layer.running_mean, before) and layer.num_batches_tracked == 0
    check(layer.eval(), twin.eval(), values(device, 2, 3, 2, 2))


@DEVICES
def test_averages_that_are_a_lazy_copy(device):
    """What they were copied from keeps its values."""
    layer, twin = pair(device)
    first = layer.running_mean
    before = first.clone()
    layer.bn.running_mean = torch._lazy_clone(first)
    check(layer, twin, values(device, 2, 3, 2, 2))
    assert torch.equal(first, before)


@DEVICES
def test_averages_that_were_removed(device):
    layer, _ = pair(device, training=False)
    layer.bn.running_mean = layer.bn.running_var = None
    check(layer, twin_of(layer), values(device, 2, 3, 2, 2))


@DEVICES
def test_numbers_and_flags_can_be_changed(device):
    """Nothing of the first call sticks."""
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    check(layer, twin, x)
    for each in (layer, twin):
        each.eps, each.momentum, each.sc.bound = 0.5, 0.7, 2.0
    check(layer, twin, x)
    for each in (layer, twin):
        each.sc.inputs, each.sc.bound = 'standardized', None
        each.bn.eval()  # norm_eval
    check(layer, twin, x)


@DEVICES
@pytest.mark.parametrize('flag', ['training', 'track_running_stats'])
def test_a_flag_that_is_true_without_being_True(flag, device):
    layer, twin = pair(device)
    for each in (layer, twin):
        setattr(each.bn, flag, 1)
    x = values(device, 2, 3, 2, 2)
    torch.testing.assert_close(layer(x), twin(x))
    torch.testing.assert_close(layer.running_mean, twin.running_mean)


# ---------------------------------------------------------------- autograd

EVERY_SUBSET = [
    frozenset(chosen)
    for size in range(len(NAMES) + 1)
    for chosen in itertools.combinations(NAMES, size)
]


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
def test_inference_mode(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    expected = twin(x).detach()
    with torch.inference_mode():
        y = layer(x)
        assert y.is_inference()
        torch.testing.assert_close(y.clone(), expected)
        inside = x.clone()
        assert taken(layer, inside) and layer.num_batches_tracked == 2
    with torch.no_grad():
        assert taken(layer, inside)
    with pytest.raises(RuntimeError, match='Inference tensors cannot be saved for backward'):
        layer(inside)


@DEVICES
def test_autocast(device):
    layer, twin = pair(device, dtype=torch.float32)
    x = values(device, 2, 3, 2, 2)
    with torch.autocast(device, torch.bfloat16):
        check(layer, twin, x.bfloat16())
        check(layer, twin_of(layer), x.float())


# ---------------------------------------------------------------- by the sample


@DEVICES
@pytest.mark.skipif(not INTERPRETED, reason='launches are counted where they are emulated')
def test_how_many_kernels_a_forward_takes(device):
    def launched_by(layer, x):
        with emulated_gpu.launches() as launched:
            layer(x)
        return tuple(launched)

    small, large = values(device, 2, 3, 2, 2), values(device, 1, 3, 41, 40)
    assert launched_by(pair(device)[0], small) == IN_THREE
    assert launched_by(pair(device, training=False)[0], small) == IN_THREE
    assert launched_by(pair(device)[0], large) == IN_FOUR
    standardized, _ = pair(device, inputs='standardized')
    assert launched_by(standardized, small) == IN_FOUR
    assert launched_by(standardized.eval(), small) == IN_THREE
    assert launched_by(pair(device, momentum=None)[0], small) == IN_FOUR
    assert launched_by(pair(device, DNC)[0], small) == IN_FOUR


@DEVICES
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('shape', [(35, 5, 2, 1), (2, 70, 2, 2), (3, 40, 5, 7)], ids=str)
def test_steps_by_the_sample(shape, training, memory_format, device):
    """More samples than a program takes at once, more channels, several steps of columns."""
    layer, twin = pair(device, DNB, shape[1], training)
    check(layer, twin, values(device, *shape).to(memory_format=memory_format), steps=2)


# ---------------------------------------------------------------- inference


def check_inference(layer, twin, x, kernels):
    """y without a gradient, and by which kernels; in another process's GPU, y alone."""
    with torch.no_grad():
        expected = twin(x.double())
        if INTERPRETED:
            with emulated_gpu.launches() as launched:
                y = layer(x)
            assert launched == list(kernels)
        y = layer(x)
    assert not y.requires_grad and y.dtype == x.dtype and y.stride() == x.stride()
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[x.dtype])
    assert taken(layer, x)


BY_SAMPLE = 'sample_moments_kernel', 'sample_affine_kernel'
IN_THREE = 'sample_moments_kernel', 'coefficients_kernel', 'affine_kernel'
IN_FOUR = 'moments_kernel', 'statistics_kernel', 'coefficients_kernel', 'affine_kernel'
SAMPLES = {  # what each is there for: batch, channels, height, width
    'one block': (2, 3, 2, 3),
    '1 x 1': (3, 5, 1, 1),
    'blocks of channels, the last not full': (2, 70, 2, 2),
    'more hidden units than a block': (1, 90, 2, 1),
    'several parts': (1, 65, 5, 7),
    'steps within a part': (140, 3, 18, 18),
}


@DEVICES
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('inputs', ['raw', 'standardized'])
@pytest.mark.parametrize(
    'name',
    [*(n for n in SAMPLES if 'steps' not in n), pytest.param('steps within a part', marks=slow)],
)
def test_inference_of_small_maps_takes_two_launches(name, inputs, memory_format, device):
    shape = SAMPLES[name]
    layer, twin = pair(
        device,
        DNB,
        shape[1],
        training=False,
        inputs=inputs,
        min_channels=70 if 'hidden' in name else 2,
    )
    x = values(device, *shape).to(memory_format=memory_format)
    check_inference(layer, twin, x, BY_SAMPLE)


@DEVICES
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', ['plain', 'channels_last', 'sliced', 'not aligned', '1 x 1'])
def test_inference_in_every_dtype_and_layout(layout, dtype, device):
    x = MAPS[layout](device).to(dtype)
    layer, twin = pair(device, training=False, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), twin(x.double()), **TOLERANCE[dtype])


@DEVICES
@pytest.mark.parametrize('name', [n for n in OPTIONS if n != 'no averages'])
def test_inference_with_every_option(name, device):
    layer, twin = pair(device, DNB, training=False, **OPTIONS[name])
    check_inference(layer, twin, values(device, 2, 3, 2, 2), BY_SAMPLE)


@DEVICES
def test_inference_that_takes_more_than_two_launches(device):
    """Large maps, statistics of the batch, DN-C, whose g and h no map changes."""
    large = values(device, 1, 2, 41, 40)
    small = values(device, 2, 3, 2, 2)
    check_inference(*pair(device, DNB, 2, training=False), large, IN_FOUR)
    layer, twin = pair(device, track_running_stats=False, training=False)
    check_inference(layer, twin, small, IN_THREE)
    check_inference(*pair(device, DNC, training=False), small, IN_FOUR[1:])


@DEVICES
def test_a_step_of_the_averages_without_a_gradient(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    with torch.no_grad():
        y, expected = layer(x), twin(x)
    assert_same(
        dict(y=y, **dict(layer.named_buffers())), dict(y=expected, **dict(twin.named_buffers())), x
    )


@DEVICES
def test_a_frozen_layer_needs_no_backward_pass(device):
    """Nothing that it is given needs a gradient, though gradients are on."""
    layer, twin = pair(device, training=False)
    for each in (layer, twin):
        each.requires_grad_(False)
    x = values(device, 2, 3, 2, 2)
    y = layer(x)
    assert y.grad_fn is None
    torch.testing.assert_close(y, twin(x).detach())
    check(layer, twin, x)  # x needs one now


@DEVICES
def test_nan_stays_in_its_sample(device):
    layer, twin = pair(device, training=False)
    x = values(device, 3, 3, 2, 2)
    x[1, 2, 0, 0] = float('nan')
    with torch.no_grad():
        y, expected = layer(x), twin(x)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    torch.testing.assert_close(y, expected, equal_nan=True)


# ---------------------------------------------------------------- copies and transforms


@DEVICES
@pytest.mark.parametrize(
    'copied',
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: through_a_file(layer),
        lambda layer: loaded(layer),
    ],
    ids=['deepcopy', 'pickle', 'torch.save', 'state dict'],
)
def test_copies_of_a_layer_that_has_run(copied, device):
    layer, _ = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    layer(x).sum().backward()
    layer.zero_grad()
    other = copied(layer)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    check(other, twin_of(layer), x)
    with torch.no_grad():  # of the copy, not of the layer
        other.sc.b_out.add_(1)
    check(other, twin_of(other), x)
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]), name


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(layer):
    other, _ = pair(layer.bn.weight.device)
    other.load_state_dict(layer.state_dict())
    return other


@DEVICES
def test_functional_call(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    found = []
    for each in (layer, twin):
        given = {name: p.detach().clone().requires_grad_() for name, p in each.named_parameters()}
        # not leaves
        y = torch.func.functional_call(each, {name: 2 * p for name, p in given.items()}, x)
        found.append((y, *torch.autograd.grad(y.square().sum(), list(given.values()))))
        assert by_host(y) == (each is layer)
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted)


@DEVICES
def test_transforms(device):
    layer, twin = pair(device, training=False)
    x = values(device, 2, 2, 3, 2, 2)
    torch.testing.assert_close(torch.vmap(layer)(x), torch.vmap(twin)(x))
    for transform in (torch.func.grad, torch.func.hessian):
        small = x[0, :1, :, :1]
        torch.testing.assert_close(
            *(transform(lambda x, f=f: f(x).square().sum())(small) for f in (layer, twin))
        )
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, sample[None]).square().sum()

    of_samples = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x[0])
    for i, sample in enumerate(x[0]):
        expected = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for actual, wanted in zip(of_samples.values(), expected, strict=True):
            torch.testing.assert_close(actual[i], wanted)


@DEVICES
def test_forward_mode_gradients(device):
    layer, twin = pair(device)
    x, tangent = values(device, 2, 2, 3, 2, 2)
    found = []
    for each in (layer, twin):
        with torch.autograd.forward_ad.dual_level():
            y = each(torch.autograd.forward_ad.make_dual(x, tangent))
            found.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*found)


@DEVICES
def test_compiled(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    check(layer, twin, x)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    check(layer, twin, x)


# ---------------------------------------------------------------- what is not the plain case


def with_hook(part, register):

    def modify(layer):
        getattr(getattr(layer, part), register)(lambda *_: None)

    return modify


class CalledSC(SC):
    def forward(self, mean, std):
        g, h = super().forward(mean, std)
        return 2 * g, h - 1


def with_own_forward(layer):
    layer.bn.forward = type(layer.bn).forward.__get__(layer.bn)


def with_another_sc(layer):
    layer.sc.__class__ = CalledSC


def parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer.sc, 'w_in', nn.Tanh())


def pruned(layer):
    prune.l1_unstructured(layer.sc, 'w_out', 5)


def norm_pruned(layer):
    prune.l1_unstructured(layer.bn, 'weight', 1)


class Tagged(torch.Tensor):
    def new_empty(self, *args, **kwargs):
        return super().new_empty(*args, **kwargs).as_subclass(Tagged)


def with_a_subclass(layer):
    layer.sc.b_in = nn.Parameter(layer.sc.b_in.detach().as_subclass(Tagged))


def with_an_attribute(layer):
    """As in nn.DataParallel's replicas."""
    bias = layer.bn._parameters.pop('bias')
    object.__setattr__(layer.bn, 'bias', 2 * bias.detach())


MODIFIED = dict(
    {
        f'{register} on {part}': with_hook(part, register)
        for part in ('bn', 'sc')
        for register in (
            'register_forward_hook',
            'register_forward_pre_hook',
            'register_full_backward_hook',
            'register_full_backward_pre_hook',
        )
    },
    **{
        f.__name__: f
        for f in (
            with_own_forward,
            with_another_sc,
            parametrized,
            pruned,
            norm_pruned,
            with_a_subclass,
            with_an_attribute,
        )
    },
)


@DEVICES
@pytest.mark.parametrize('name', MODIFIED)
def test_something_registered_on_a_part(name, device):
    layer, _ = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    layer(x)  # a plan is there
    twin = twin_of(layer)
    for each in (layer, twin):
        MODIFIED[name](each)
    state = {key: t.clone() for key, t in layer.named_buffers()}
    assert not taken(layer, x)
    for key, t in layer.named_buffers():
        assert torch.equal(t, state[key])
    y, expected = layer(x), twin(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
    )
    torch.testing.assert_close(layer.running_mean, twin.running_mean)


@DEVICES
def test_hooks_on_all_modules(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m)):
        assert not taken(layer, x)
        y = layer(x)
    assert seen == [layer.bn, layer.sc, layer]
    torch.testing.assert_close(y, twin(x))
    check(layer, twin, x)


@DEVICES
def test_an_sc_or_norm_that_only_has_another_name(device):

    class MySC(SC):
        pass

    class MyNorm(nn.BatchNorm2d):
        pass

    layer, twin = pair(device)
    layer.sc.__class__, layer.bn.__class__ = MySC, MyNorm
    check(layer, twin, values(device, 2, 3, 2, 2))


@DEVICES
def test_another_norm_or_sc(device):
    from torchvision.ops import FrozenBatchNorm2d

    x = values(device, 2, 3, 2, 2).float()
    layer, _ = pair(device, dtype=torch.float32)
    frozen = FrozenBatchNorm2d(3).to(device)
    frozen.load_state_dict(
        {
            name: getattr(layer.bn, name).detach()
            for name in ('weight', 'bias', 'running_mean', 'running_var')
        }
    )
    layer.eval()
    expected = layer(x)
    layer.bn = frozen
    assert not taken(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer, _ = pair(
        device,
        dtype=torch.float32,
        sc=dict(type='dn_mmdet.experiments.ablation.VariantSC', squash='sigmoid'),
    )
    assert not taken(layer, x)
    twin = copy.deepcopy(layer)
    twin.backend = 'reference'
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-5, atol=1e-5)


@DEVICES
def test_a_map_of_a_subclass(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2).as_subclass(Tagged)
    assert not taken(layer, x)
    y = layer(x)
    assert type(y) is Tagged
    torch.testing.assert_close(y.as_subclass(torch.Tensor), twin(x.as_subclass(torch.Tensor)))


@DEVICES
def test_dispatch_modes_see_the_operators(device):
    from torch.utils._python_dispatch import TorchDispatchMode

    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        assert not taken(layer, x)
        y = layer(x)
    assert len(seen) > 10
    torch.testing.assert_close(y, twin(x))


@DEVICES
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # shapes are checked in Python
def test_traces_hold_operators(device):
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, twin = pair(device, training=False)
    x, other = values(device, 2, 2, 3, 2, 2)
    layer(x)
    for traced in (torch.jit.trace(layer, x), make_fx(layer)(x)):
        torch.testing.assert_close(traced(other), twin(other))


# ---------------------------------------------------------------- what cannot run


def broken_by(**attributes):

    def modify(layer):
        for name, value in attributes.items():
            module, name = name.split('_', 1)
            setattr(getattr(layer, module), name, value)

    return modify


def parameter(*shape, **kwargs):
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64, **kwargs))


ERRORS = {
    'weight of another size': (broken_by(bn_weight=parameter(2)), RuntimeError, 'weight'),
    'bias of another size': (broken_by(bn_bias=parameter(4)), RuntimeError, 'bias'),
    'w_in of another size': (broken_by(sc_w_in=parameter(8, 5)), RuntimeError, 'w_in'),
    'w_in of fewer units': (broken_by(sc_w_in=parameter(7, 6)), RuntimeError, 'b_in'),
    'w_out of another size': (broken_by(sc_w_out=parameter(6, 7)), RuntimeError, 'w_out'),
    'b_out of another size': (broken_by(sc_b_out=parameter(3)), RuntimeError, 'b_out'),
    'running_mean of another size': (
        broken_by(bn_running_mean=torch.zeros(2)),
        RuntimeError,
        'running_mean',
    ),
    'running_var alone': (broken_by(bn_running_mean=None), ValueError, 'running_mean'),
    'weight elsewhere': (
        broken_by(bn_weight=parameter(3, device='meta')),
        RuntimeError,
        'same device',
    ),
    'w_in elsewhere': (
        broken_by(sc_w_in=parameter(8, 6, device='meta')),
        RuntimeError,
        'same device',
    ),
    'averages elsewhere': (
        broken_by(bn_running_mean=torch.zeros(3, device='meta')),
        RuntimeError,
        'same device',
    ),
    'integers': (
        broken_by(bn_running_mean=torch.zeros(3, dtype=torch.int64)),
        RuntimeError,
        'floating',
    ),
    'eps': (broken_by(bn_eps=0.0), ValueError, 'eps'),
    'eps that is no number': (broken_by(bn_eps=float('nan')), ValueError, 'eps'),
}


@DEVICES
@pytest.mark.parametrize('name', ERRORS)
def test_parts_that_do_not_fit(name, device):
    modify, error, match = ERRORS[name]
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    check(layer, twin, x)
    modify(layer)
    for t in (layer.bn._buffers, layer.bn._parameters, layer.sc._parameters):
        for key, value in t.items():
            if value is not None and value.device.type == 'cpu':
                t[key] = value.to(device)
    assert not taken(layer, x)
    with pytest.raises(error, match=match):
        layer(x)


@DEVICES
@pytest.mark.parametrize(
    'x, error, match',
    [
        (torch.zeros(2, 4, 2, 2), ValueError, 'expected 3 channels'),
        (torch.zeros(2, 3, 2), ValueError, 'expected 4D input'),
        (torch.zeros(3), ValueError, 'expected 4D input'),
        (torch.zeros(()), ValueError, 'expected 4D input'),
        (torch.zeros(2, 3, 2, 2, dtype=torch.int32), TypeError, 'floating-point'),
        (torch.zeros(2, 3, 2, 2, dtype=torch.complex64), TypeError, 'floating-point'),
        (torch.zeros(2, 3, 2, 2).to(torch.float8_e4m3fn), ValueError, 'float8'),
        (torch.zeros(1, 3, 1, 1), ValueError, 'more than 1 value per channel'),
    ],
    ids=lambda v: f'{tuple(v.shape)} {v.dtype}' if isinstance(v, torch.Tensor) else '',
)
def test_maps_that_do_not_fit(x, error, match, device):
    layer, _ = pair(device)
    assert not taken(layer, x := x.to(device))
    with pytest.raises(error, match=match):
        layer(x)


@DEVICES
def test_a_map_on_another_device(device):
    layer, _ = pair('meta')
    with pytest.raises(RuntimeError, match='same device'):
        layer(values(device, 2, 3, 2, 2))
    layer, _ = pair(device)
    with pytest.raises((RuntimeError, ValueError), match='device|CUDA'):
        layer(values('meta', 2, 3, 2, 2))


if INTERPRETED:

    @pytest.fixture
    def refusing():
        """Lets the driver answer every launch and every module with an error."""

        def refuse(code):
            FAKE.fake_set_callback(None if code else emulated_gpu.on_launch)
            FAKE.fake_refuse(code)

        yield refuse
        refuse(0)

    def test_a_launch_that_fails(refusing):
        """A clear error, nothing else changed, and the layer works afterwards."""
        layer, twin = pair('cpu')
        x = values('cpu', 2, 3, 2, 2).requires_grad_()
        check(layer, twin, x)
        y = layer(x)
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        refusing(719)
        for call in (lambda: layer(x), lambda: y.sum().backward(retain_graph=True)):
            with pytest.raises(RuntimeError, match=r'^cuLaunchKernel: CUDA error 719 \(the fake'):
                call()
        assert x.grad is None
        for name, t in layer.state_dict().items():
            assert torch.equal(t, state[name]), name
        refusing(0)
        y.sum().backward()
        twin(x)
        check(layer, twin, x)

    @pytest.mark.parametrize('error, by_python', [('driver', False), ('abi', True)])
    def test_kernels_that_cannot_be_loaded(error, by_python, refusing, monkeypatch):
        """One warning, and right values by the slower path."""

        def compiled(signature, capability):
            if error == 'abi':
                raise host.UnknownTriton('another version')
            assert capability == 90
            return SimpleNamespace(
                hash='hash',
                asm=dict(cubin=b''),
                metadata=SimpleNamespace(name='kernel', shared=1 << 16),
            )

        logged = []
        monkeypatch.setattr(host, '_load', emulated_gpu.load_by_driver)
        monkeypatch.setattr(host, '_unusable', {})
        monkeypatch.setattr(host, '_loaded', {})
        monkeypatch.setattr(host, 'compile_kernel', compiled)
        monkeypatch.setattr(host, 'print_log', lambda text, **kwargs: logged.append(text))
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
        assert choice.on_gpu(0) is not None  # nothing is known against it yet
        refusing(209)
        for shape in ((2, 3, 1, 13), (2, 3, 1, 15)):  # nobody else's
            for layer, twin in (pair('cpu'), pair('cpu', DNC)):
                check(layer, twin, values('cpu', *shape), host=False)
        assert len(logged) == 1 and 'slower' in logged[0]
        assert ('another version' if error == 'abi' else 'CUDA error 209') in logged[0]
        assert host.kernels_run_on(0) == by_python and host.kernels_run_on(1)
        assert (choice.on_gpu(0) is not None) == by_python
        refusing(0)
        check(*pair('cpu'), values('cpu', 2, 3, 2, 2))  # those that are there run

    def test_a_full_memory_is_no_fault_of_the_gpu(refusing, monkeypatch):
        """It is told as torch tells it, and the next call runs."""
        binary = SimpleNamespace(
            hash='hash',
            asm=dict(cubin=b''),
            metadata=SimpleNamespace(name='kernel', shared=1 << 10),
        )
        monkeypatch.setattr(host, '_load', emulated_gpu.load_by_driver)
        monkeypatch.setattr(host, '_unusable', {})
        monkeypatch.setattr(host, '_loaded', {})
        monkeypatch.setattr(host, 'compile_kernel', lambda *args: binary)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
        layer, twin = pair('cpu')
        x = values('cpu', 2, 3, 1, 17)  # nobody else's
        refusing(2)
        with pytest.raises(torch.OutOfMemoryError, match='no memory left for the kernels'):
            layer(x)
        assert host.kernels_run_on(0)
        refusing(0)
        monkeypatch.setattr(host, '_load', emulated_gpu.load)
        check(layer, twin, x)

    def test_kernels_are_loaded_once(monkeypatch):
        binary = SimpleNamespace(
            hash='some',
            asm=dict(cubin=b'\0'),
            metadata=SimpleNamespace(name='kernel', shared=1 << 16),
        )
        monkeypatch.setattr(host, '_loaded', {})
        monkeypatch.setattr(host, 'compile_kernel', lambda *args: binary)
        monkeypatch.setattr(host.Signature, 'of', lambda plan, launch: 'one kernel')
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
        first, second = (emulated_gpu.load_by_driver(None, None, 0) for _ in range(2))
        assert first == second and first[1] == 1 << 16
        assert emulated_gpu.load_by_driver(None, None, 1) != first  # each GPU its own


def test_another_way_to_pass_arguments_is_noticed():
    known = dict(
        num_ctas=1,
        launch_cooperative_grid=False,
        launch_pdl=False,
        global_scratch_size=0,
        profile_scratch_size=0,
    )
    ptx = '.visible .entry k(.param .u64 .ptr .global k_0, .param .u32 k_1, {}) .reqntid 128'
    pair_ = '.param .u64 k_2, .param .u64 k_3'
    for extra, changed in (
        ('.param .u64 k_2', {}),
        (pair_ + ', .param .u64 k_4', {}),
        (pair_, dict(num_ctas=2)),
        (pair_, dict(launch_pdl=True)),
        (pair_, dict(global_scratch_size=4)),
    ):
        binary = SimpleNamespace(
            metadata=SimpleNamespace(**dict(known, **changed)), asm=dict(ptx=ptx.format(extra))
        )
        with pytest.raises(host.UnknownTriton, match='this version of Triton is not known'):
            host._check_arguments(binary, ['*fp32', 'i32'])
    binary = SimpleNamespace(metadata=SimpleNamespace(**known), asm=dict(ptx=ptx.format(pair_)))
    host._check_arguments(binary, ['*fp32', 'i32'])


# ---------------------------------------------------------------- what operators hand over


def handed_over(device, mode=None, dtype=torch.float64):
    """Arguments of `host.forward`: x, parameters, state, mode, eps, momentum, bound."""
    n, c, hidden = 3, 5, 7
    x = torch.randn(n, c, 2, 3, dtype=dtype, device=device)
    sizes = (c,), (c,), (hidden, 2 * c), (hidden,), (2 * c, hidden), (2 * c,)
    parameters = tuple(x.new_empty(size).normal_() for size in sizes)
    state = (x.new_zeros(c), x.new_ones(c), torch.tensor(3, device=device))
    mode = host.BATCH | host.UPDATE | host.BOUNDED if mode is None else mode
    return [x, parameters, state, mode, 1e-5, 0.1, 0.25]


def backward_of(given, kept):
    x, parameters, _, mode, eps, _, bound = given
    return [torch.randn_like(x), x, kept, parameters, mode, eps, bound, True]


def replaced(given, place, value):
    """given with a part in another's stead. place: an index, or two into a tuple of tensors."""
    given = list(given)
    if isinstance(place, int):
        given[place] = value
    else:
        part = list(given[place[0]])
        part[place[1]] = value
        given[place[0]] = tuple(part)
    return given


X, PARAMETERS, TENSORS_OF_STATE, MODE = range(4)
UNFIT = {
    'x is None': (X, lambda x: None, TypeError, 'x: expected a tensor, got NoneType'),
    'x of integers': (X, lambda x: x.int(), ValueError, 'x: expected a map'),
    'x without values': (X, lambda x: x[:0], ValueError, 'x: expected a map'),
    'x of one dimension': (X, lambda x: x[0, 0, 0], ValueError, 'x: expected a map'),
    'x elsewhere': (X, lambda x: x.to('meta'), ValueError, 'x: expected a'),
    'x sparse': (X, lambda x: x.to_sparse(), ValueError, 'x: expected a plain, dense tensor'),
    'x of too many values': (
        X,
        lambda x: x[:1, :, :1, :1].expand(1, 5, 2**16, 2**15),
        ValueError,
        'x: expected less than',
    ),
    'five parameters': (PARAMETERS, lambda p: p[:5], ValueError, 'expected 6 tensors, w and so'),
    'one average': (TENSORS_OF_STATE, lambda s: s[:1], ValueError, 'expected 3 tensors, running'),
    'w of another size': ((PARAMETERS, 0), lambda w: w[:4], ValueError, 'w: expected sizes'),
    'b of integers': ((PARAMETERS, 1), lambda b: b.long(), ValueError, 'b: expected sizes'),
    'b elsewhere': ((PARAMETERS, 1), lambda b: b.to('meta'), ValueError, 'b: expected '),
    'w_in transposed': ((PARAMETERS, 2), lambda w: w.t(), ValueError, 'w_in: expected sizes'),
    'no w_in': ((PARAMETERS, 2), lambda w: None, ValueError, 'w_in: expected a tensor, got None'),
    'no b_in': ((PARAMETERS, 3), lambda b: None, ValueError, 'b_in: expected a tensor, got None'),
    'b_in without units': ((PARAMETERS, 3), lambda b: b[:0], ValueError, 'b_in: expected sizes'),
    'w_out cut': ((PARAMETERS, 4), lambda w: w[:-1], ValueError, 'w_out: expected sizes'),
    'b_out is a number': ((PARAMETERS, 5), lambda b: 1.0, TypeError, 'b_out: expected a tensor'),
    'mean cut': ((TENSORS_OF_STATE, 0), lambda t: t[1:], ValueError, 'running_mean: expected si'),
    'mean in parts': (
        (TENSORS_OF_STATE, 0),
        lambda t: t.repeat(2)[::2],
        ValueError,
        r'running_mean: expected sizes.* with strides \[2\]',
    ),
    'no mean': ((TENSORS_OF_STATE, 0), lambda t: None, ValueError, 'expected both, got the seco'),
    'no var': ((TENSORS_OF_STATE, 1), lambda t: None, ValueError, 'expected both, got the first'),
    'no averages': (TENSORS_OF_STATE, lambda s: (None, None, s[2]), ValueError, 'both, got none'),
    'a counter of floats': ((TENSORS_OF_STATE, 2), lambda t: t.float(), ValueError, 'tracked: ex'),
    'two counters': ((TENSORS_OF_STATE, 2), lambda t: t.repeat(2), ValueError, 'tracked: expec'),
}


@DEVICES
@pytest.mark.parametrize('name', UNFIT)
def test_tensors_that_do_not_fit(name, device):
    """An error that says which; nothing is launched, nothing changed."""
    place, change, error, match = UNFIT[name]
    given = handed_over(device)
    host.forward(*given)  # the plan is there
    versions = [t._version for t in given[2]]
    before = given[place] if isinstance(place, int) else given[place[0]][place[1]]
    with pytest.raises(error, match=match):
        host.forward(*replaced(given, place, change(before)))
    assert [t._version for t in given[2]] == versions
    assert host.kernels_run_on(0)


@DEVICES
def test_modes_that_need_what_is_not_there(device):
    given = handed_over(device, 0)
    with pytest.raises(ValueError, match='running_mean, running_var: expected both, got none'):
        host.forward(*replaced(given, 2, (None, None, None)))
    given = handed_over(device, host.BATCH | host.UPDATE | host.CUMULATIVE)
    with pytest.raises(ValueError, match='tracked: expected a counter'):
        host.forward(*replaced(given, (2, 2), None))


UNFIT_BACKWARD = {
    'dy of fewer samples': (0, lambda dy: dy[:2], ValueError, 'dy: expected the sizes and device'),
    'dy elsewhere': (0, lambda dy: dy.to('meta'), ValueError, 'dy: expected '),
    'no dy': (0, lambda dy: None, TypeError, 'dy: expected a tensor'),
    'x of fewer samples': (1, lambda x: x[:2], ValueError, 'dy: expected the sizes and device'),
    'kept cut': (2, lambda kept: kept[1:], ValueError, 'kept: expected what the forward pass'),
    'kept of float32': (2, lambda kept: kept.float(), ValueError, 'kept: expected what the forw'),
    'kept elsewhere': (2, lambda kept: kept.to('meta'), ValueError, 'kept: expected '),
    'w_in cut': ((3, 2), lambda w: w[:, 1:], ValueError, 'w_in: expected sizes'),
}


@DEVICES
@pytest.mark.parametrize('name', UNFIT_BACKWARD)
def test_gradients_and_kept_tensors_that_do_not_fit(name, device):
    place, change, error, match = UNFIT_BACKWARD[name]
    given = handed_over(device)
    given = backward_of(given, host.forward(*given)[1])
    host.backward(*given)
    before = given[place] if isinstance(place, int) else given[place[0]][place[1]]
    with pytest.raises(error, match=match):
        host.backward(*replaced(given, place, change(before)))
    assert host.kernels_run_on(0)


@DEVICES
def test_tensors_that_lie_anywhere(device):
    """Parameters in parts, and maps, gradients and kept tensors that are not aligned."""

    def spread(t):
        return t.new_empty(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)

    def shifted(t):
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)

    given = handed_over(device, host.BATCH)
    y, kept = host.forward(*given)
    x, parameters = shifted(given[0]), tuple(spread(p) for p in given[1])
    assert x.data_ptr() % 16 and not any(p.is_contiguous() for p in parameters)
    other = host.forward(x, parameters, *given[2:])
    assert torch.equal(other[0], y)
    first = backward_of(given, kept)
    wanted = host.backward(*first)
    for dy in (
        shifted(first[0]),
        spread(first[0]),
        first[0].contiguous(memory_format=torch.channels_last),
    ):
        for k in (shifted(kept), spread(kept)):
            found = host.backward(dy, x, k, parameters, *first[4:])
            assert all(
                torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, wanted, strict=True)
            )


@DEVICES
def test_what_an_operators_call_gives(device):
    """Of an operator: outside autograd, of its own memory, and None where nothing is wanted."""
    given = handed_over(device)
    for t in (given[0], *given[1]):
        t.requires_grad_()
    x, parameters, state, mode, *numbers = given
    versions = [t._version for t in state]
    y, kept = host.forward(*given)
    assert not y.requires_grad and not kept.requires_grad and kept.dim() == 1
    assert [t._version for t in state] == [version + 1 for version in versions]
    assert host.forward(x, parameters, state, mode & ~host.UPDATE, *numbers)[1].shape == kept.shape
    nothing = host.forward(x, parameters, state, host.INFERENCE, *numbers)[1]
    assert nothing.shape == (0,) and nothing.dtype == kept.dtype
    assert [t._version for t in state] == [version + 1 for version in versions]
    given = backward_of(given, kept)
    found = host.backward(*given)
    assert [d.shape for d in found] == [x.shape, *(p.shape for p in parameters)]
    assert len({d.untyped_storage().data_ptr() for d in found}) == 7
    rest = host.backward(*given[:-1], False)
    assert rest[0] is None and all(map(torch.equal, rest[1:], found[1:]))
    without = host.backward(*replaced(replaced(given, (3, 0), None), (3, 1), None))
    assert [d is None for d in without] == [False, True, True, False, False, False, False]


@DEVICES
def test_an_operators_call_leaves_nothing_behind(device):
    given = handed_over(device)
    first = backward_of(given, host.forward(*given)[1])
    objects = [given[0], given[1], given[2], *given[1], *given[2], *first[:3]]
    for _ in range(2):  # the first makes the plans
        before = [sys.getrefcount(o) for o in objects]
        for _ in range(5):
            things = *host.forward(*given), *host.backward(*first)
            with pytest.raises(ValueError, match='w: expected'):
                host.forward(*replaced(given, (1, 0), given[1][2]))
            with pytest.raises(ValueError, match='kept: expected'):
                host.backward(*replaced(first, 2, first[0]))
        gc.collect()
    assert [sys.getrefcount(o) for o in objects] == before
    things = [weakref.ref(t) for t in things]
    assert not any(thing() is not None for thing in things)


# ---------------------------------------------------------------- plans, memory, threads


@DEVICES
def test_more_than_one_shape_and_mode(device):
    layer, twin = pair(device)
    for shape in ((2, 3, 2, 2), (3, 3, 2, 2), (2, 3, 3, 1), (2, 3, 2, 2)):
        check(layer, twin, values(device, *shape))
        check(layer.eval(), twin.eval(), values(device, *shape))
        layer.train(), twin.train()


@DEVICES
def test_more_plans_than_are_kept(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    dy = torch.randn_like(x)
    y, expected = layer(x), twin(x)
    for i in range(1 << 14):
        _host.add_plan((1000, i, *range(7)), struct.pack('<16q', *[0] * 16))
    for actual, wanted in zip(
        torch.autograd.grad(y, [x, *layer.parameters()], dy),
        torch.autograd.grad(expected, [x, *twin.parameters()], dy),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)
    check(layer, twin, x)


@pytest.mark.parametrize(
    'blob', [b'', struct.pack('<15q', *[0] * 15), struct.pack('<17q', *[0] * 17)]
)
def test_a_plan_that_is_cut_off(blob):
    with pytest.raises(RuntimeError, match='plan too'):
        _host.add_plan((1000, *range(8)), blob)


@DEVICES
@pytest.mark.parametrize('dense', [True, False])
def test_a_step_leaves_nothing_behind(dense, device):
    gc.collect()
    gc.disable()  # nothing waits for it
    try:
        layer, _ = pair(device)
        x = values(device, 2, 3, 4, 2).requires_grad_()
        map_ = x * 1
        y = layer(map_ if dense else map_[:, :, ::2])
        node, saved = y.grad_fn, weakref.ref(map_)
        y.backward(torch.ones_like(y))
        del map_
        assert saved() is None
        things = [weakref.ref(t) for t in (x, y, layer, *layer.parameters(), *layer.buffers())]
        del x, y, layer, node
        assert not any(thing() is not None for thing in things)
    finally:
        gc.enable()


@DEVICES
def test_a_graph_without_a_backward_pass_is_freed(device):
    layer, _ = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    map_ = x * 1
    y = layer(map_)
    gone = weakref.ref(map_)
    del map_
    assert gone() is not None  # saved
    del y
    assert gone() is None


@DEVICES
def test_references_do_not_pile_up(device):
    layer, _ = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    objects = [layer.bn, layer.sc, layer.bn.weight, layer.bn._parameters, x]
    layer(x).sum().backward()
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(5):
        y = layer(x)
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
        y.sum().backward()
        host.call(x.int(), layer.bn, layer.sc, False, (4,))
        del y
    assert [sys.getrefcount(o) for o in objects] == before


@DEVICES
def test_two_threads(device):
    pairs = [pair(device, cls) for cls in (DNB, DNC)]
    maps = [values(device, 2, 3, 2, 2), values(device, 3, 3, 1, 2)]
    failed = []

    def work(i):
        try:
            for j in range(4):
                check(*pairs[i], maps[(i + j) % 2])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not failed, failed


# ---------------------------------------------------------------- synchronised statistics

two_processes = test_distributed.two_processes


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


# ---------------------------------------------------------------- on a GPU alone

if not INTERPRETED:
    GPU = pytest.mark.parametrize('device', [CUDA])

    @pytest.fixture
    def side():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        yield stream
        torch.cuda.synchronize()

    @GPU
    @pytest.mark.parametrize('layout', ['plain', 'sliced'])
    def test_on_a_side_stream(side, layout, device):
        """Behind what was put on that stream before, both ways."""
        layer, twin = pair(device)
        x = MAPS[layout](device)
        layer(x)  # so that nothing is compiled while the stream sleeps
        twin(x)
        late, dy = torch.zeros_like(x), torch.zeros_like(x)
        wanted_dy = torch.randn_like(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            late.copy_(x)
            leaf = late.detach().requires_grad_()
            y = layer(leaf)
            torch.cuda._sleep(100_000_000)
            dy.copy_(wanted_dy)
            actual = results(layer, leaf, dy, y)
        torch.cuda.synchronize()
        assert_same(actual, results(twin, x.detach().requires_grad_(), wanted_dy), x)

    @GPU
    @pytest.mark.parametrize('layout', ['plain', 'channels_last', 'sliced'])
    @KINDS
    def test_a_cuda_graph(side, layout, cls, kwargs, device):
        """Each replay is a step, of the averages too."""
        layer, _ = pair(device, cls, **kwargs)
        x = MAPS[layout](device).detach().requires_grad_()
        dy = torch.randn_like(x)
        leaves = [x, *layer.parameters()]
        with torch.cuda.stream(side):
            for _ in range(3):
                torch.autograd.grad(layer(x), leaves, dy)
        torch.cuda.synchronize()
        twin = twin_of(layer)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            y = layer(x)
            gradients = torch.autograd.grad(y, leaves, dy)
        for _ in range(3):
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
                dy.copy_(torch.randn_like(x))
            graph.replay()
            torch.cuda.synchronize()
            expected = results(twin, x.detach().requires_grad_(), dy)
            actual = dict(
                zip(
                    ('y', 'x', *dict(layer.named_parameters())),
                    (y.detach(), *gradients),
                    strict=True,
                ),
                **dict(layer.named_buffers()),
            )
            assert_same(actual, expected, x)

    @GPU
    def test_the_first_call_under_capture(side, device):
        """Its kernels are loaded while the stream is being captured."""
        layer, twin = pair(device, training=False)
        x = values(device, 2, 3, 7, 9)  # nobody else's
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            with torch.cuda.graph(graph, stream=side):
                y = layer(x)
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(y, twin(x))

    @GPU
    def test_an_operators_call_under_capture(side, device):
        given = handed_over(device, host.BATCH | host.BOUNDED)
        dy, x, _, *more = backward_of(given, None)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            y, kept = host.forward(*given)
            gradients = host.backward(dy, x, kept, *more)
        x.copy_(torch.randn_like(x))
        dy.copy_(torch.randn_like(x))
        graph.replay()
        wanted = host.forward(*given)
        torch.testing.assert_close([y, kept], wanted)
        torch.testing.assert_close(gradients, host.backward(dy, x, wanted[1], *more))

    @GPU
    def test_in_a_thread_that_has_no_context_yet(device):
        layer, twin = pair(device)
        x = values(device, 2, 3, 2, 2)
        check(layer, twin, x)
        y = layer(leaf := x.clone().requires_grad_())
        expected = twin(wide := x.clone().requires_grad_())
        found = []

        def work():
            found.append(torch.autograd.grad(y.square().sum(), leaf)[0])
            found.append(layer(x))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        torch.testing.assert_close(found[0], torch.autograd.grad(expected.square().sum(), wide)[0])
        torch.testing.assert_close(found[1], twin(x))

    @GPU
    def test_on_a_gpu_that_is_not_the_current_one(device):
        if torch.cuda.device_count() < 2:
            pytest.skip('needs two GPUs')
        for index in (1, 0, 1):
            check(*pair(f'cuda:{index}'), values(f'cuda:{index}', 2, 3, 2, 2))
        assert torch.cuda.current_device() == 0
        layer, _ = pair('cuda:1')
        with pytest.raises(RuntimeError, match='same device'):
            layer(values('cuda:0', 2, 3, 2, 2))

    @pytest.fixture
    def little_memory():
        """Leaves this process some megabytes more than it has."""

        def limit(more):
            gc.collect()
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(
                min((torch.cuda.memory_reserved() + more) / total, 1.0)
            )

        yield limit
        torch.cuda.set_per_process_memory_fraction(1.0)

    @GPU
    def test_a_full_memory(little_memory, device):
        """Torch's own error; nothing changed, and the layer works afterwards."""
        layer, twin = pair(device, dtype=torch.float32)
        x = torch.randn(64, 3, 512, 512, device=device).requires_grad_()  # 201 MB
        dy = torch.randn_like(x)
        y = layer(x)  # compiles
        torch.autograd.grad(y, x, dy, retain_graph=True)
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        little_memory(100 << 20)
        with pytest.raises(torch.OutOfMemoryError):
            layer(x)
        with pytest.raises(torch.OutOfMemoryError):
            y.backward(dy, retain_graph=True)
        for name, t in layer.state_dict().items():
            assert torch.equal(t, state[name]), name
        torch.cuda.set_per_process_memory_fraction(1.0)
        y.backward(dy)
        assert x.grad is not None
        del y
        twin.load_state_dict(state)
        check(layer, twin, values(device, 2, 3, 2, 2).float())

    @GPU
    @pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
    def test_past_two_billion_values(layout, device):
        """The last sample, whose offsets need 64 bits, gets what it gets alone."""
        if torch.cuda.get_device_properties(device).total_memory < 3e10:
            pytest.skip('needs 30 GB of GPU memory')
        layer, _ = pair(device, channels=64, training=False, dtype=torch.float32)
        x = torch.empty(3, 64, 4096, 2801, dtype=torch.float16, device=device)
        if layout == 'channels_last':
            x = torch.empty_like(x, memory_format=torch.channels_last)
        assert x.normal_().numel() > 2**31
        y = layer(x.requires_grad_())
        assert by_host(y)
        (dx,) = torch.autograd.grad(y, x, y.detach())
        last = x[-1:].detach().clone().requires_grad_()
        alone = layer(last)
        torch.testing.assert_close(y[-1:], alone)
        # the same dy: where y and its twin are rounded to neighbours, their gradients are too
        torch.testing.assert_close(
            dx[-1:], torch.autograd.grad(alone, last, y[-1:].detach())[0], rtol=2e-3, atol=2e-3
        )
