"""The compiled GPU host: copies and transforms of a layer, and what it leaves to operators.

It takes no call where something is registered on the inner norm or on SC, or stands in its
place: hooks, parametrizations, pruning, subclasses.
"""

import copy
import io
import pickle

import host_cases
import pytest
import torch
from host_cases import by_host, check, pair, taken, twin_of, values
from parity import DEVICES, INTERPRETED, assert_interpreted_tests_pass
from torch import nn
from torch.nn.utils import prune

from dn_mmdet import SC

pytestmark = host_cases.pytestmark
no_error_of_a_kernel_is_lost = host_cases.no_error_of_a_kernel_is_lost


if not INTERPRETED:

    def test_in_the_interpreter():
        assert_interpreted_tests_pass(__file__, 'not gpu')


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
