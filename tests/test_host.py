"""The compiled GPU host: which calls it takes, and that what it gives is the reference's.

On a GPU where there is one, everywhere else in Triton's interpreter; see `emulated_gpu`. Maps
are tiny: what large ones need is in test_triton_ops.py.
"""
import copy
import gc
import itertools
import threading
import weakref

import pytest
import torch
from conftest import TOLERANCE, awake
from parity import DEVICES, INTERPRETED, assert_interpreted_tests_pass
from torch import nn

from dn_mmdet import DNB, DNC, SC, DNB1d, DNB3d, DNC1d, DNC3d, functional

pytest.importorskip('triton', reason='needs Triton, which is not made for this system')
if functional.gpu_host() is None:
    pytest.skip('the compiled host was not built', allow_module_level=True)
from dn_mmdet.kernels import _host, host, plans  # noqa: E402

if INTERPRETED:
    import emulated_gpu
    FAKE = emulated_gpu.install()
slow = pytest.mark.slow
# the interpreter's own, of numpy
pytestmark = pytest.mark.filterwarnings('ignore:Conversion of an array with ndim')
NAMES = ('x', 'bn.weight', 'bn.bias', 'sc.w_in', 'sc.b_in', 'sc.w_out', 'sc.b_out')
KINDS = pytest.mark.parametrize('cls, kwargs', [
    (DNB, {}), (DNB, dict(inputs='standardized')), (DNC, {})], ids=['raw', 'standardized', 'dnc'])
MODES = pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])


@pytest.fixture(autouse=True)
def no_error_of_a_kernel_is_lost():
    yield
    if INTERPRETED:
        errors = emulated_gpu.errors[:]
        emulated_gpu.errors.clear()
        assert not errors, errors[0]


if not INTERPRETED:

    @pytest.mark.parametrize('marker', [
        'not slow and not gpu', pytest.param('slow and not gpu', marks=slow)])
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
    return dict(zip(('y', *leaves), (y.detach(), *gradients), strict=True),
                **{name: t.clone() for name, t in layer.named_buffers()})


def assert_same(actual, expected, like):
    """like: a map, for small things are made in float32 where maps have less than float64."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        dtype = actual[name].dtype
        if dtype == torch.float64 and like.dtype != torch.float64:
            dtype = torch.float32
        tolerance = TOLERANCE[dtype] if dtype.is_floating_point else dict(rtol=0, atol=0)
        torch.testing.assert_close(actual[name].double(), wanted.double(), **tolerance,
                                   msg=lambda m, n=name: f'{n}: {m}')


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
    'channels_last': lambda d: values(d, 2, 3, 2, 3).contiguous(
        memory_format=torch.channels_last),
    '1 x 1': lambda d: values(d, 4, 3, 1, 1),
    '1 x 1, channels_last': lambda d: values(d, 4, 3, 1, 1).contiguous(
        memory_format=torch.channels_last),
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
        memory_format=torch.channels_last_3d),
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
    for dy in (torch.ones((), device=device, dtype=x.dtype).expand(y.shape),
               values(device, *y.shape[:3], 2 * y.shape[3])[..., ::2],
               values(device, *y.shape).contiguous(), values(device, n + 1)[1:].view(y.shape)):
        actual, wanted = (torch.autograd.grad(t, leaf, dy, retain_graph=True)[0]
                          for t, leaf in ((y, x), (expected, wide)))
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
    for actual, wanted in zip(torch.autograd.grad(y, list(layer.parameters()), dy),
                              torch.autograd.grad(expected, list(twin.parameters()), dy),
                              strict=True):
        torch.testing.assert_close(actual, wanted)


@DEVICES
def test_more_values_in_a_channel_than_its_numbers_hold(device):
    """The sizes of a launch are of 32 bits; the general path passes others on."""
    layer, _ = pair(device, channels=1)
    x = torch.zeros((), dtype=torch.float16, device=device).expand(1, 1, 2**16, 2**15)
    assert not taken(layer, x)


# ---------------------------------------------------------------- parameters


@DEVICES
@pytest.mark.parametrize('x_dtype, dtype', [
    (torch.float32, torch.float16), (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64), (torch.float64, torch.float32),
    (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float64)], ids=str)
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
        view = flat[at[0]:at[0] + t.numel()].view(t.shape).copy_(t)
        at[0] += t.numel() + t.numel() % 2  # the next is at an odd place again
        return view

    move_into(layer, place)
    for name in ('running_mean', 'running_var'):
        setattr(layer.bn, name, place(getattr(layer.bn, name)))
    assert all(p.data_ptr() % 16 for p in layer.parameters())
    check(layer, twin, values(device, 2, 3, 2, 2).to(torch.float32), steps=2)


OPTIONS = {'plain': {}, 'not affine': dict(affine=False), 'no bound': dict(bound=None),
           'cumulative': dict(momentum=None), 'frozen averages': dict(momentum=0),
           'last batch': dict(momentum=1), 'integers': dict(bound=1, momentum=1, eps=1),
           'no averages': dict(track_running_stats=False),
           'many hidden units': dict(min_channels=70),
           'very many hidden units': dict(min_channels=135),
           'one hidden unit': dict(min_channels=1)}


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
    check(*pair(device, cls, training=training, **kwargs, **OPTIONS[name]),
          values(device, 3, 3, 2, 2), steps=2)


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
        each.eps, each.momentum, each.sc.bound = 0.5, 0.7, 2.
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

EVERY_SUBSET = [frozenset(chosen) for size in range(len(NAMES) + 1)
                for chosen in itertools.combinations(NAMES, size)]


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
@pytest.mark.parametrize('needed', [s for s in EVERY_SUBSET if len(s) in (0, 1, 6, 7)],
                         ids=lambda s: ' '.join(sorted(s)) or 'nothing')
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
@pytest.mark.parametrize('layout', ['plain', 'sliced', 'channels_last', 'not aligned'])
@KINDS
@MODES
def test_second_gradients(training, cls, kwargs, layout, device):
    """Also where the running statistics have moved on since the forward pass."""
    layer, twin = pair(device, cls, training=training, **kwargs)
    x = MAPS[layout](device)
    found = []
    dy, ddx = (torch.randn(2, *x.shape, dtype=torch.float64, device=device))
    for each in (layer, twin):
        leaf = x.clone().requires_grad_() if layout == 'plain' else x.detach().requires_grad_()
        y = each(leaf)
        with torch.no_grad():
            if not training and each is layer:
                each.running_mean.add_(3)
                each.bn.running_var.mul_(2)
        leaves = [leaf, *each.parameters()]
        first = torch.autograd.grad(y.square(), leaves, dy, create_graph=True)
        second = torch.autograd.grad(first[0], leaves, ddx, allow_unused=True,
                                     materialize_grads=True)
        found.append((*first, *second))
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-8)


@DEVICES
@pytest.mark.parametrize('cls, kwargs, training', [
    (DNB, {}, True), *(pytest.param(*case, marks=slow) for case in (
        (DNB, dict(inputs='standardized'), True), (DNC, {}, True), (DNB, {}, False),
        (DNC, {}, False)))])
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
    from torch.utils.checkpoint import checkpoint
    layer, twin = pair(device, cls, **kwargs)
    found = []
    x = values(device, 2, 3, 2, 2)
    for each in (layer, twin):
        leaf = x.clone().requires_grad_()
        y = checkpoint(each, leaf, use_reentrant=use_reentrant)
        y.square().sum().backward()
        assert each.num_batches_tracked == 2
        found.append((y.detach(), leaf.grad, *(p.grad for p in each.parameters()),
                      *each.buffers()))
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

    for context in (torch.autograd.graph.saved_tensors_hooks(pack, unpack),
                    torch.autograd.graph.save_on_cpu()):
        leaf = x.detach().requires_grad_()
        with context:
            y = layer(leaf)
        assert by_host(y)
        dy = torch.randn_like(y)
        assert_same(results(layer, leaf, dy, y), results(twin, x.detach().requires_grad_(), dy),
                    x)
    assert sorted(packed) == sorted([x.shape, *(p.shape for p in layer.parameters())])


@DEVICES
@pytest.mark.parametrize('wrong', [lambda t: t[..., :1], lambda t: t.float(),
                                   lambda t: t.to('meta')], ids=['size', 'dtype', 'device'])
@pytest.mark.parametrize('which', range(7))
def test_a_hook_on_saved_tensors_that_gives_back_something_else(which, wrong, device):
    layer, _ = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    count = itertools.count()
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (next(count), t), lambda pair: wrong(pair[1]) if pair[0] == which
            else pair[1]):
        y = layer(x)
    with pytest.raises(RuntimeError, match='expected the saved tensor'):
        y.sum().backward()


@DEVICES
def test_a_hook_on_saved_tensors_that_fails(device):
    layer, _ = pair(device)

    def fail(t):
        raise ZeroDivisionError

    x = values(device, 2, 3, 2, 2)
    with (torch.autograd.graph.saved_tensors_hooks(fail, lambda t: t),
          pytest.raises(ZeroDivisionError)):
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
        each.bn.bias.register_post_accumulate_grad_hook(
            lambda p, of=each: calls.append(of))
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
        with pytest.raises(RuntimeError, match="'DynamicNormBackward' returned nan"), \
                pytest.warns(UserWarning, match='Error detected in DynamicNormBackward'):
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
