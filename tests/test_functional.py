"""Every backend computes what the reference does: outputs, gradients and state."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import awake
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

from dn_mmdet import DNB, DNC, SC, DNB1d, DNB3d, functional, kernels
from dn_mmdet.inner_norm import SC_PARAMETERS, parts_of_sc
from dn_mmdet.kernels import choice

FUSED = ('torch', 'auto')
LAYERS = {
    'dnb-raw': (DNB, dict(inputs='raw')),
    'dnb-standardized': (DNB, dict(inputs='standardized')),
    'dnc': (DNC, {}),
}
SHAPES = [(3, 5, 7, 3), (2, 3, 40, 40), (1, 4, 2, 2), (4, 6, 1, 1), (13, 1, 11, 5)]
LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.mT.contiguous().mT,
    'sliced': lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
}


def trained(layer):
    """The layer with every parameter and buffer away from its initial value."""
    awake(layer)
    if layer.bn.weight is not None:
        nn.init.normal_(layer.bn.weight)
        nn.init.normal_(layer.bn.bias)
    if layer.bn.running_mean is not None:
        nn.init.normal_(layer.bn.running_mean)
        nn.init.uniform_(layer.bn.running_var, 0.5, 2)
    return layer


def twins(cls, *args, backend, dtype=torch.float64, **kwargs):
    """Two equal layers: one of this backend, and the reference."""
    layer = trained(cls(*args, backend=backend, **kwargs)).to(dtype)
    other = copy.deepcopy(layer)
    other.backend = 'reference'
    return layer, other


def step(layer, x, dy):
    """All that a training step shows: output, gradients, buffers."""
    x = x.clone().requires_grad_()
    parameters = list(dict(layer.named_parameters()).values())
    y = layer(x)
    buffers = [buffer.to(x.dtype) for buffer in layer.buffers()]  # one of them counts
    return y, *torch.autograd.grad(y, (x, *parameters), dy), *buffers


@pytest.mark.parametrize('backend', FUSED)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('kind', LAYERS)
def test_equals_the_reference(kind, training, shape, layout, backend, close):
    cls, kwargs = LAYERS[kind]
    layer, expected = twins(cls, shape[1], backend=backend, **kwargs)
    layer.train(training)
    expected.train(training)
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64) + 0.5)
    dy = torch.randn(shape, dtype=torch.float64)
    for actual, wanted in zip(step(layer, x, dy), step(expected, x, dy), strict=True):
        close(actual, wanted)
    with torch.no_grad():
        close(layer.eval()(x), expected.eval()(x))


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('backend', FUSED)
def test_gradients_of_gradients(backend, kind, training):
    cls, kwargs = LAYERS[kind]
    layer = trained(cls(3, backend=backend, **kwargs)).double().train(training)
    names, parameters = zip(*dict(layer.named_parameters()).items(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


@pytest.mark.parametrize(
    'cls, shape', [(DNB1d, (5, 3)), (DNB1d, (2, 3, 7)), (DNB3d, (2, 3, 3, 4, 5))], ids=str
)
@pytest.mark.parametrize('backend', FUSED)
def test_other_numbers_of_dimensions(cls, shape, backend, close):
    layer, expected = twins(cls, 3, backend=backend)
    x, dy = torch.randn(2, *shape, dtype=torch.float64)
    for actual, wanted in zip(step(layer, x, dy), step(expected, x, dy), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_an_explicit_backend_says_that_it_cannot_run(backend):
    x = torch.randn(2, 3, 4, 4)
    layer = DNB(3, backend=backend)
    with pytest.raises(ValueError, match=f"backend='{backend}'.*float8_e5m2.*'reference'"):
        layer(x.to(torch.float8_e5m2))
    with pytest.raises(ValueError, match=f"backend='{backend}'.*on meta.*'reference'"):
        layer.to('meta')(x.to('meta'))
    assert DNB(3).to('meta')(x.to('meta')).shape == x.shape  # auto: the reference


def test_triton_without_a_gpu_or_without_triton(monkeypatch):
    layer, x = DNB(3, backend='triton'), torch.randn(2, 3, 4, 4)
    monkeypatch.delattr(kernels, 'triton_ops', raising=False)
    monkeypatch.setitem(sys.modules, 'dn_mmdet.kernels.triton_ops', None)
    with pytest.raises(ImportError, match="backend='triton'.*pip install triton"):
        layer(x)
    monkeypatch.undo()
    pytest.importorskip('triton', reason='needs Triton, which is not made for this system')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(ValueError, match="backend='triton'.*GPU.*on cpu.*'auto'"):
        layer(x)
    layer.backend = 'auto'
    assert layer(x).shape == x.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_auto_on_a_gpu_is_the_fastest_backend_that_runs_there():
    layer = trained(DNB(3)).cuda()
    x = torch.randn(2, 3, 4, 4, device='cuda')
    auto = layer.eval()(x)
    layer.backend = choice.fused_backends('cuda')[-1]
    assert torch.equal(auto, layer(x))
    assert auto.grad_fn.name() == layer(x).grad_fn.name()


BACKENDS = pytest.mark.parametrize('backend', ['reference', 'torch', 'auto'])
KINDS = pytest.mark.parametrize('kind', LAYERS)
MODES = pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
CHANNELS = 4096


def shortened(part):
    """A layer for 4096 channels of which one part is for another number of them."""

    def make(backend):
        layer = DNB(CHANNELS, backend=backend)
        owner = layer.sc if part in SC_PARAMETERS else layer.bn
        t = getattr(owner, part)
        short = t.detach()[:1].clone() if part != 'w_in' else t.detach()[:, :1].clone()
        setattr(owner, part, nn.Parameter(short) if part in owner._parameters else short)
        return layer

    return make


@pytest.mark.parametrize(
    'shape, fits',
    [
        ((2**27 - 1, 3, 1), True),
        ((2**27, 3, 1), False),  # 8 hidden units in each
        ((2**20, 2**10, 1), False),
        ((1, 1, 2**30 - 1), True),
        ((1, 1, 2**30), False),
    ],
)
def test_gpu_kernels_are_for_what_their_integers_hold(shape, fits):
    x = torch.empty(1).expand(shape)
    assert functional._integers_hold(x, parts_of_sc(DNB(1).sc)) == fits
    # with something registered on SC, no kernel counts its units
    assert functional._integers_hold(x, None) == (fits or shape == (2**27, 3, 1))


def with_another_norm(backend):
    layer = DNB(CHANNELS, backend=backend)
    layer.bn = nn.BatchNorm2d(1)
    return layer


def with_a_frozen_norm(backend):
    layer = DNB(CHANNELS, backend=backend)
    layer.bn = FrozenBatchNorm2d(1)
    return layer


def in_two_dimensions(backend):
    layer = DNB(CHANNELS, backend=backend)
    layer.bn.weight = nn.Parameter(torch.ones(CHANNELS, 1))
    return layer


@pytest.mark.parametrize(
    'make, said',
    [
        (shortened('weight'), 'weight should contain 4096 elements not 1'),
        (shortened('bias'), 'bias should contain 4096 elements not 1'),
        (shortened('running_mean'), 'running_mean should contain 4096 elements not 1'),
        (shortened('running_var'), 'running_var should contain 4096 elements not 1'),
        (with_another_norm, 'weight should contain 4096 elements not 1'),
        (with_a_frozen_norm, 'weight should contain 4096 elements not 1'),
        (in_two_dimensions, r'weight should have the shape \(4096,\) not \(4096, 1\)'),
        (shortened('w_in'), r'w_in should have the shape \(128, 8192\) not \(128, 1\)'),
        (shortened('b_in'), 'b_in should contain 128 elements not 1'),
        (shortened('w_out'), r'w_out should have the shape \(8192, 128\) not \(1, 128\)'),
        (shortened('b_out'), 'b_out should contain 8192 elements not 1'),
    ],
)
@MODES
@pytest.mark.parametrize('grad', [True, False], ids=['grad', 'no grad'])
@BACKENDS
def test_a_part_of_another_size_is_named_and_not_read(backend, grad, training, make, said):
    layer = make(backend).train(training)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=said):
        layer(torch.randn(2, CHANNELS, 2, 2))


@BACKENDS
def test_also_where_a_hook_has_the_norm_called(backend):
    layer = shortened('running_mean')(backend).eval()
    layer.bn.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match='running_mean should contain 4096 elements not 1'):
        layer(torch.randn(2, CHANNELS, 2, 2))


class Narrow(SC):
    """An SC that gives less than it has to: one number for all channels, or one row."""

    def forward(self, mean, std):
        g, h = super().forward(mean, std)
        return (g, h[:1]) if self.inputs == 'raw' else (g[:, :1], h)


@BACKENDS
@MODES
@pytest.mark.parametrize('grad', [True, False], ids=['grad', 'no grad'])
@pytest.mark.parametrize(
    'inputs, said',
    [
        ('raw', r'h, made by Narrow, should have the shape \(2, 3\) not \(1, 3\)'),
        ('standardized', r'g, made by Narrow, should have the shape \(2, 3\) not \(2, 1\)'),
    ],
)
def test_what_another_sc_makes_is_not_broadcast(backend, training, grad, inputs, said):
    layer = DNB(3, backend=backend).train(training)
    layer.sc = Narrow(3, inputs=inputs)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=said):
        layer(torch.randn(2, 3, 4, 4))


@BACKENDS
@MODES
def test_an_sc_that_has_lost_all_its_hidden_units(backend, training, close):
    layer = DNB(3, backend=backend, bound=None).double().train(training)
    for name, shape in (('w_in', (0, 6)), ('b_in', (0,)), ('w_out', (6, 0))):
        setattr(layer.sc, name, nn.Parameter(torch.empty(shape, dtype=torch.float64)))
    nn.init.normal_(layer.sc.b_out)
    g, h = layer.sc.b_out.detach().view(2, 3, 1, 1)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = (1 + g) * copy.deepcopy(layer.bn)(x) + h
    close(copy.deepcopy(layer)(x), expected)
    with torch.no_grad():
        close(layer(x), expected)


@BACKENDS
@pytest.mark.parametrize('part', ['bn', 'sc'])
def test_parts_on_another_device_are_named(backend, part):
    layer = DNB(3, backend=backend)
    getattr(layer, part).to('meta')
    name = 'weight' if part == 'bn' else 'w_in'
    with pytest.raises(RuntimeError, match=f'same device, but {name} is on meta.*input on cpu'):
        layer(torch.randn(2, 3, 4, 4))


@BACKENDS
def test_statistics_are_numbers_with_a_point_and_come_in_pairs(backend):
    layer = DNB(3, backend=backend).eval()
    layer.bn.running_var = torch.ones(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match='running_var: expected a floating-point.*int64'):
        layer(torch.randn(2, 3, 4, 4))
    layer.bn.running_var = None
    with pytest.raises(ValueError, match='running_var: expected both or neither'):
        layer(torch.randn(2, 3, 4, 4))


@BACKENDS
@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_only_floating_point_maps_are_taken(backend, dtype):
    with pytest.raises(TypeError, match=f'expected a floating-point map, got one of {dtype}'):
        DNB(1, backend=backend)(torch.ones(2, 1, 2, 2).to(dtype))


@BACKENDS
@MODES
@pytest.mark.parametrize('grad', [True, False], ids=['grad', 'no grad'])
def test_a_zero_tensor_has_no_memory_to_read(backend, training, grad, close):
    layer = awake(DNB(3, backend=backend)).train(training)
    zeros = torch._efficientzerotensor((2, 3, 4, 4))
    with torch.set_grad_enabled(grad):
        close(copy.deepcopy(layer)(zeros), copy.deepcopy(layer)(torch.zeros(2, 3, 4, 4)))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    layer(x).backward(zeros)
    assert not x.grad.any() and not any(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize('eps', [0, -1.0, float('nan'), '1e-5', None])
def test_eps_is_above_zero(eps):
    with pytest.raises(ValueError, match='eps must be positive, but got'):
        DNB(3, eps=eps)
    layer = DNB(3)
    with pytest.raises(ValueError, match='eps must be positive, but got'):
        layer.eps = eps
    layer.bn.eps = eps
    with pytest.raises(ValueError, match='eps must be positive, but got'):
        layer(torch.randn(2, 3, 4, 4))


class Absolute(nn.Module):
    def forward(self, weight):
        return weight.abs()


class Counted(nn.Module):
    """A parametrization that is another at each call, as spectral norm's is in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, weight):
        self.calls += 1
        return weight * self.calls


def own_forward(bn):
    bn.forward = lambda x: nn.BatchNorm2d.forward(bn, x).square()


def set_averages(bn, inputs, *_):
    bn.running_mean.copy_(inputs[0].detach().mean((0, 2, 3)))


def everywhere(hook):
    return lambda bn: torch_module.register_module_forward_hook(
        lambda module, inputs, output: hook(output) if module is bn else None
    )


class Doubled(nn.BatchNorm2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


def call_of_its_own(bn):
    bn.__class__ = Doubled


REGISTERED = {
    'forward hook': lambda bn: bn.register_forward_hook(lambda m, i, output: 2 * output),
    'forward hook that is always called': lambda bn: bn.register_forward_hook(
        lambda m, i, output: 2 * output, always_call=True
    ),
    'forward hook with keywords': lambda bn: bn.register_forward_hook(
        lambda m, i, k, output: 2 * output, with_kwargs=True
    ),
    'forward pre-hook': lambda bn: bn.register_forward_pre_hook(lambda m, i: (3 * i[0].tanh(),)),
    'pre-hook that gives the input by name': lambda bn: bn.register_forward_pre_hook(
        lambda m, i, k: ((), dict(input=3 * i[0].tanh())), with_kwargs=True
    ),
    'pre-hook that sets the averages': lambda bn: bn.register_forward_pre_hook(set_averages),
    'full backward hook': lambda bn: bn.register_full_backward_hook(
        lambda m, dx, dy: (dx[0] * 2,)
    ),
    'full backward pre-hook': lambda bn: bn.register_full_backward_pre_hook(
        lambda m, dy: (dy[0] * 2,)
    ),
    'hook on all modules': everywhere(lambda output: 2 * output),
    'forward of its own': own_forward,
    'call of its own': call_of_its_own,
    'pruning': lambda bn: prune.l1_unstructured(bn, 'weight', amount=0.5),
    'parametrization': lambda bn: parametrize.register_parametrization(bn, 'weight', Absolute()),
    'parametrization with a state': lambda bn: parametrize.register_parametrization(
        bn, 'bias', Counted()
    ),
    'weight norm': lambda bn: parametrizations.weight_norm(bn, dim=None),
    'spectral norm': parametrizations.spectral_norm,
}


@pytest.mark.shows('hooks, pruning, parametrizations and FSDP2 on the inner norm')
@MODES
@BACKENDS
@pytest.mark.parametrize('registered', REGISTERED)
def test_what_is_registered_on_the_inner_norm_acts_as_on_a_batch_norm(
    registered, backend, training, close
):
    bn = nn.BatchNorm2d(4).double()
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    layer = DNB(4, backend=backend).double()
    layer.bn.load_state_dict(bn.state_dict())
    results = []
    for module, inner in ((bn, bn), (layer, layer.bn)):
        torch.manual_seed(1)  # spectral norm's first vector
        handle = REGISTERED[registered](inner)
        module.train(training)
        result = []
        for x, dy in torch.randn(3, 2, 5, 4, 3, 3, dtype=torch.float64):
            x.requires_grad_()
            y = module(x)
            y.backward(dy)
            result += [y, x.grad]
        result += [p.grad for p in inner.parameters()] + list(inner.buffers())
        results.append(result)
        if hasattr(handle, 'remove') and not isinstance(handle, nn.Module):
            handle.remove()
    for actual, expected in zip(*reversed(results), strict=True):
        close(actual.double(), expected.double())


@MODES
@KINDS
def test_a_hook_that_changes_nothing_changes_nothing(kind, training, close):
    cls, kwargs = LAYERS[kind]
    layer, hooked = twins(cls, 5, backend='auto', **kwargs)
    calls = []
    hooked.bn.register_forward_pre_hook(lambda *_: calls.append('before'))
    hooked.bn.register_forward_hook(lambda *_: calls.append('after'))
    x, dy = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64)
    expected = step(layer.train(training), x, dy)
    for actual, wanted in zip(step(hooked.train(training), x, dy), expected, strict=True):
        close(actual, wanted)
    assert calls == ['before', 'after']


@MODES
@KINDS
def test_sc_sees_what_the_norm_saw_after_a_pre_hook(kind, training, close):
    cls, kwargs = LAYERS[kind]
    layer, hooked = twins(cls, 5, backend='auto', **kwargs)
    hooked.bn.register_forward_pre_hook(lambda bn, inputs: (2 * inputs[0].exp(),))
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    close(hooked.train(training)(x), layer.train(training)(2 * x.exp()))


def test_threads_that_share_a_layer_with_a_pre_hook_do_not_see_each_others_maps(close):
    """One is in the norm, and the other comes and goes, before the first reads what SC gets."""
    layer, _ = twins(DNB, 5, backend='auto')
    prune.identity(layer.bn, 'weight')
    x, other = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64)
    expected = layer.eval()(x)
    inside, passed = threading.Event(), threading.Event()

    def wait(bn, inputs, output):
        if torch.equal(inputs[0], x):
            inside.set()
            assert passed.wait(60)

    layer.bn.register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(layer, x)
        assert inside.wait(60)
        layer(other)
        passed.set()
        close(found.result(60), expected)
    assert len(layer.bn._forward_pre_hooks) == 1  # of the pruning


def test_a_scripted_norm_is_called(close):
    layer, twin = twins(DNB, 5, backend='auto')
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    layer.eval()
    layer.bn = torch.jit.script(layer.bn)
    close(layer(x), twin.eval()(x))


@BACKENDS
def test_what_a_hook_makes_of_the_norms_output_has_to_be_a_map(backend):
    layer = DNB(4, backend=backend)
    layer.bn.register_forward_hook(lambda bn, inputs, output: (output, inputs))
    with pytest.raises(TypeError, match='inner BatchNorm2d to give a tensor, got a tuple; see.*h'):
        layer(torch.randn(2, 4, 3, 3))


@BACKENDS
@MODES
def test_an_inner_norm_that_was_folded_away_is_told(backend, training):
    layer = DNB(4, backend=backend).train(training)
    layer.bn = nn.Identity()
    with pytest.raises(TypeError, match='inner norm is an Identity: something has folded it'):
        layer(torch.randn(2, 4, 3, 3))


@torch.no_grad()
def test_sc_is_given_the_averages_of_before_a_hook_that_sets_them(close):
    layer, hooked = twins(DNC, 5, backend='auto')
    hooked.bn.register_forward_hook(set_averages)
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    close(hooked.eval()(x), layer.eval()(x))
    close(hooked.bn.running_mean, x.mean((0, 2, 3)))


@BACKENDS
def test_precise_bn_by_hooks_gives_the_batchs_statistics(backend, close):
    """As fvcore's update_bn_stats does it: momentum 1, the averages read after each forward."""
    layer = awake(DNB(4, backend=backend)).double()
    layer.bn.momentum, seen = 1.0, []
    layer.bn.register_forward_hook(
        lambda bn, inputs, output: seen.append((inputs[0], bn.running_mean.clone()))
    )
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    layer(x)
    ((inputs, mean),) = seen
    close(inputs, x)
    close(mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize('register', ['register_forward_hook', 'own forward'])
@BACKENDS
def test_what_is_registered_on_sc_runs(backend, register):
    layer, calls = DNB(4, backend=backend), []
    if register == 'own forward':

        def forward(mean, std):
            calls.append(1)
            return SC.forward(layer.sc, mean, std)

        layer.sc.forward = forward
    else:
        getattr(layer.sc, register)(lambda *_: calls.append(1))
    for training in (True, False):
        layer.train(training)(torch.randn(2, 4, 3, 3))
        with torch.no_grad():
            layer(torch.randn(2, 4, 3, 3))
    assert len(calls) == 4


@BACKENDS
@pytest.mark.parametrize('gone', ['weight', 'bias'])
@pytest.mark.parametrize('kind', LAYERS)
def test_only_a_weight_or_only_a_bias(kind, gone, backend, close):
    cls, kwargs = LAYERS[kind]
    bn = nn.BatchNorm2d(4).double()
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    layer = cls(4, backend=backend, **kwargs).double()
    layer.bn = copy.deepcopy(bn)
    for norm in (bn, layer.bn):
        setattr(norm, gone, None)
    x, dy = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    for training in (True, False):
        close(layer.train(training)(x), bn.train(training)(x))
        with torch.no_grad():
            close(layer(x), bn(x))
    awake(layer).train()
    reference = copy.deepcopy(layer)
    reference.backend = 'reference'
    for actual, wanted in zip(step(layer, x, dy), step(reference, x, dy), strict=True):
        close(actual, wanted)


@BACKENDS
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize(
    'gone',
    [
        ('num_batches_tracked',),
        ('running_mean', 'running_var'),
        ('num_batches_tracked', 'running_mean', 'running_var'),
    ],
    ids=str,
)
def test_a_norm_without_some_of_its_buffers_does_what_torchs_does(gone, momentum, backend, close):
    bn, layer = nn.BatchNorm2d(4, momentum=momentum), DNB(4, momentum=momentum, backend=backend)
    for norm in (bn, layer.bn):
        for name in gone:
            setattr(norm, name, None)
    for training in (True, True, False):
        x = torch.randn(3, 4, 5, 5) + 1
        close(layer.train(training)(x), bn.train(training)(x))
        with torch.no_grad():
            close(layer(x), bn(x))
    assert layer.bn.state_dict().keys() == bn.state_dict().keys()
    for name, value in bn.state_dict().items():
        close(layer.bn.state_dict()[name].float(), value.float())


def flipped(t):
    """Equal to t, but its memory holds -t and its sign is to be flipped."""
    view = torch._neg_view(-t)
    assert view.is_neg()
    return view


@BACKENDS
@MODES
@KINDS
def test_views_with_a_flipped_sign(kind, training, backend, close):
    cls, kwargs = LAYERS[kind]
    layer, expected = twins(cls, 5, backend=backend, **kwargs)
    for owner, names in ((layer.bn, ('weight', 'bias')), (layer.sc, SC_PARAMETERS)):
        for name in names:
            setattr(owner, name, nn.Parameter(flipped(getattr(owner, name).detach())))
    layer.bn.running_mean = flipped(layer.bn.running_mean)
    layer.train(training), expected.train(training)
    x, dy = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        close(copy.deepcopy(layer)(flipped(x)), copy.deepcopy(expected)(x))
    assert flipped(x).is_neg() and flipped(dy).is_neg()
    flipped_x = flipped(x).requires_grad_()
    y = layer(flipped_x)
    got = torch.autograd.grad(y, (flipped_x, *layer.parameters()), flipped(dy))
    wanted = step(expected, x, dy)
    for actual, value in zip(
        (y, *got, layer.bn.running_mean, layer.bn.running_var), wanted[:-1], strict=True
    ):
        close(actual, value)


@BACKENDS
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_no_number_stays_where_it_is_in_dncs_eval(value, backend):
    layer = trained(DNC(4, backend=backend)).eval()
    x = torch.randn(3, 4, 5, 5)
    x[1, 2, 3, 3] = value
    alone = torch.ones_like(x, dtype=torch.bool)
    alone[1, 2, 3, 3] = False
    with torch.no_grad():
        assert torch.equal(layer(x).isfinite(), alone)
    y = layer(x.requires_grad_())
    assert torch.equal(y.isfinite(), alone)
    y[alone].sum().backward()
    assert x.grad[alone].isfinite().all()


@BACKENDS
@MODES
@KINDS
def test_batched_gradients(kind, training, backend, close):
    cls, kwargs = LAYERS[kind]
    layer = trained(cls(3, backend=backend, **kwargs)).double().train(training)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    y = layer(x)
    before = [buffer.clone() for buffer in layer.buffers()]
    dy = torch.randn(4, *y.shape, dtype=torch.float64)
    batched = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in dy]
    for actual, *wanted in zip(batched, *one_by_one, strict=True):
        close(actual, torch.stack(wanted))
    assert all(map(torch.equal, layer.buffers(), before))


def test_a_vectorized_jacobian(close):
    layer = trained(DNB(2)).double().eval()
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    close(
        torch.autograd.functional.jacobian(layer, x, vectorize=True),
        torch.autograd.functional.jacobian(layer, x),
    )


# ---------------------------------------------------------------- gradients outside of the layer


def in_every_backend(run):
    """What run(backend) gives with each backend, the reference's first."""
    return [run(backend) for backend in ('reference', 'torch', 'auto')]


def assert_all_alike(found):
    for others in found[1:]:
        for actual, expected in zip(others, found[0], strict=True):
            assert (actual is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(actual, expected)


def seeded(backend, **options):
    torch.manual_seed(0)
    return awake(DNB(3, backend=backend, **options).double())


def test_a_loss_of_what_a_hook_on_sc_saw():
    def run(backend):
        layer, seen = seeded(backend), []
        layer.sc.register_forward_hook(lambda sc, given, made: seen.extend(made))
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
        (layer(x).square().mean() + seen[0].square().sum() + seen[1].square().sum()).backward()
        return x.grad, *(p.grad for p in layer.parameters())

    assert_all_alike(in_every_backend(run))


def test_a_parameter_from_outside_in_a_hook_on_sc():
    def run(backend):
        layer = seeded(backend)
        s = nn.Parameter(torch.full((), 0.5, dtype=torch.float64))
        layer.sc.register_forward_hook(lambda sc, given, made: (made[0] * s, made[1]))
        layer(torch.randn(4, 3, 5, 5, dtype=torch.float64)).square().mean().backward()
        return s.grad, layer.sc.w_out.grad

    assert_all_alike(in_every_backend(run))


class Shared(SC):
    """An SC with a module that is not registered, a buffer, and noise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.others = [nn.Linear(3, 3).double()]
        self.factor = torch.ones(())

    def forward(self, mean, std):
        g, h = super().forward(mean, std)
        return nn.functional.dropout(self.others[0](g) * self.factor, 0.5, self.training), h


def with_shared(backend):
    layer = seeded(backend)
    layer.sc = Shared(3).double()
    return awake(layer)


def test_a_module_that_an_sc_has_not_registered():
    def run(backend):
        layer = with_shared(backend)
        torch.manual_seed(1)
        layer(torch.randn(4, 3, 5, 5, dtype=torch.float64)).square().mean().backward()
        return layer.sc.others[0].weight.grad, layer.sc.w_in.grad

    assert_all_alike(in_every_backend(run))


def test_noise_in_an_sc_is_drawn_once_though_its_gradient_is_differentiated():
    def run(backend):
        layer = with_shared(backend)
        torch.manual_seed(1)
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
        y = layer(x).square().mean()
        first = torch.autograd.grad(y, x, retain_graph=True)
        return *first, *torch.autograd.grad(y, x, create_graph=True)

    found = in_every_backend(run)
    torch.testing.assert_close(*found[0])
    assert_all_alike(found)


@BACKENDS
def test_a_change_of_what_an_sc_has_used_is_noticed(backend):
    layer = with_shared(backend)
    y = layer(torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)).square().mean()
    layer.sc.factor.mul_(0.1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.backward()


def test_a_parametrization_that_is_cached_over_two_calls():
    class Halved(nn.Module):
        def forward(self, w):
            return w / 2

    def run(backend):
        layer = seeded(backend)
        parametrize.register_parametrization(layer.sc, 'w_out', Halved())
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        with parametrize.cached():
            (layer(x) * layer(2 * x)).square().mean().backward()
        return (layer.sc.parametrizations.w_out.original.grad,)

    assert_all_alike(in_every_backend(run))


@BACKENDS
@pytest.mark.parametrize('options', [dict(), dict(momentum=None), dict(affine=False)], ids=str)
def test_hooks_on_saved_tensors_that_copy_are_given_their_copies_back(backend, options, close):
    layer = seeded(backend, **options)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    dy = torch.randn_like(x)
    expected = torch.autograd.grad(copy.deepcopy(layer)(x), x, dy)
    wanted = torch.autograd.grad(layer(x), inputs, dy)
    close(wanted[0], expected[0])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y = layer(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3)
    for actual, expected in zip(torch.autograd.grad(y, inputs, dy), wanted, strict=True):
        close(actual, expected)


@BACKENDS
def test_settings_that_change_before_a_backward_that_is_differentiated(backend, close):
    layer = seeded(backend)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x).square().mean()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    layer.eps, layer.sc.bound = 1.0, None
    (actual,) = torch.autograd.grad(y, x, create_graph=True)
    close(actual, expected)


@BACKENDS
@pytest.mark.parametrize('momentum', [0.1, None])
def test_where_hooks_on_saved_tensors_are_forbidden(backend, momentum):
    layer = seeded(backend, momentum=momentum)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.disable_saved_tensors_hooks('none here'):
        layer(x).sum().backward()
    assert x.grad is not None


@BACKENDS
def test_an_sc_of_which_nothing_needs_a_gradient(backend):
    class Constant(SC):
        @torch.no_grad()
        def forward(self, mean, std):
            return super().forward(mean, std)

    layer = seeded(backend)
    layer.sc = Constant(3).double()
    layer.bn.requires_grad_(False)
    conv = nn.Conv2d(3, 2, 1).double()
    conv(layer(torch.randn(4, 3, 5, 5, dtype=torch.float64))).sum().backward()
    assert conv.weight.grad is not None


# ---------------------------------------------------------------- rare inputs


FREED = ['input', 'weight', 'running_mean', 'running_var', 'w_in', 'b_out']


@BACKENDS
@MODES
@pytest.mark.parametrize('name', FREED)
def test_memory_that_was_freed_is_not_read(backend, training, name):
    layer, x = DNB(3, backend=backend).train(training), torch.randn(2, 3, 4, 4)
    freed = x if name == 'input' else getattr(layer.bn, name, None)
    freed = getattr(layer.sc, name) if freed is None else freed
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f'{name}: expected values in memory.*freed'):
        layer(x)


@BACKENDS
def test_a_variance_that_float16_cannot_hold_is_not_yet_the_average(backend):
    layer, bn = DNB(4, backend=backend).half(), nn.BatchNorm2d(4).half()
    x = (300 * torch.randn(8, 4, 6, 6)).half()
    layer(x)
    bn(x)
    assert layer.running_var.isfinite().all()
    torch.testing.assert_close(layer.running_var, bn.running_var, rtol=2e-3, atol=0)


@BACKENDS
@pytest.mark.parametrize('cls', [DNB, DNC])
def test_a_hundred_thousand_samples(backend, cls):
    """As regions or points are; sums in float32, one after the other, would be off by 1e-2."""
    torch.manual_seed(0)
    layer = cls(2, backend=backend) if cls is DNC else DNB1d(2, backend=backend)
    shape = (100_000, 2, 2, 2) if cls is DNC else (100_000, 2, 4)
    x = (0.1 + 0.01 * torch.randn(shape)).requires_grad_()
    dy = torch.randn(shape)
    twin = copy.deepcopy(awake(layer)).double()
    twin.backend = 'reference'
    wide = x.detach().double().requires_grad_()
    y, expected = layer(x), twin(wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), twin.running_var, rtol=1e-6, atol=1e-8)
    y.backward(dy)
    expected.backward(dy.double())
    for name in ('weight', 'bias'):
        actual, wanted = (getattr(part.bn, name).grad.double() for part in (layer, twin))
        assert (actual - wanted).norm() < 1e-3 * wanted.norm(), name


@BACKENDS
@MODES
@pytest.mark.parametrize('x_dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_parameters_wider_than_the_map(backend, training, x_dtype):
    layer = seeded(backend).train(training)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64).to(x_dtype).requires_grad_()
    expected = copy.deepcopy(layer)(x.detach().double())
    y = layer(x)
    tolerance = 1e-5 if x_dtype == torch.float32 else 5e-2
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    y.sum().backward()
    assert x.grad.dtype == x_dtype and layer.bn.weight.grad.dtype == torch.float64


@BACKENDS
def test_a_bound_below_the_smallest_float_is_one(backend, close):
    layer = awake(DNB(3, backend=backend, bound=1e-50))
    x = torch.randn(4, 3, 5, 5)
    close(layer(x), nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True))


@BACKENDS
@pytest.mark.parametrize('name', SC_PARAMETERS)
def test_a_parameter_of_sc_that_is_none_is_named(backend, name):
    layer = DNB(3, backend=backend)
    setattr(layer.sc, name, None)
    with pytest.raises(RuntimeError, match=f'sc.{name}: expected a parameter, got None'):
        layer(torch.randn(2, 3, 4, 4))


def test_quantized_and_complex_maps_are_told_what_to_do():
    with pytest.raises(TypeError, match='x.dequantize'):
        DNB(3)(torch.quantize_per_tensor(torch.randn(2, 3, 4, 4), 0.1, 0, torch.qint8))
    with pytest.raises(TypeError, match='real and imaginary parts'):
        DNB(3)(torch.randn(2, 3, 4, 4, dtype=torch.complex64))
