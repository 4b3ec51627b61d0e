"""Precision, odd shapes, and everything that autograd and torch do around a layer."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import awake
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from dn_mmdet import DNB, DNC, DNB1d, DNC1d, SyncDNB, SyncDNC
from dn_mmdet.experiments.ablation import VariantSC

VARIANTS = [(DNB, 'raw'), (DNB, 'standardized'), (DNC, 'raw')]
variants = pytest.mark.parametrize('cls, inputs', VARIANTS)


def pair(cls, inputs='raw', dtype=torch.float32, **kwargs):
    """A layer of a dtype, and its float64 copy."""
    layer = awake(cls(8, inputs=inputs, **kwargs), std=0.2).to(dtype)
    return layer, copy.deepcopy(layer).double()


@pytest.mark.shows('mixed precision, float16 and bfloat16')
@variants
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_dtype_and_the_precision(cls, inputs, dtype, close):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), awake(cls(8, inputs=inputs), std=0.2))
    exact = copy.deepcopy(model[1]).double()
    x = torch.randn(4, 3, 9, 9)
    with torch.autocast('cpu', dtype):
        features = model[0](x)
        y = model[1](features)
    assert features.dtype == y.dtype == dtype
    close(y.double(), exact(features.double()), dtype)
    close(model[1].running_mean.double(), exact.running_mean, torch.float32)
    close(model[1].running_var.double(), exact.running_var, torch.float32)
    y.float().square().sum().backward()
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters()
    )


@variants
@pytest.mark.parametrize('backend', ['torch', 'auto'])
def test_autocast_narrows_nothing_inside_a_layer(cls, inputs, backend):
    layer = awake(cls(8, inputs=inputs, backend=backend))
    other, x = copy.deepcopy(layer), torch.randn(4, 8, 5, 5)
    layer(x).square().sum().backward()
    with torch.autocast('cpu', torch.bfloat16):  # around the backward pass too
        other(x).square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@variants
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_models(cls, inputs, dtype, close):
    layer, exact = pair(cls, inputs, dtype)
    x = torch.randn(4, 8, 5, 5).to(dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, expected = layer(x), exact(x64)
    assert y.dtype == dtype and layer.running_mean.dtype == dtype
    close(y.double(), expected, dtype)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream.double())
    close(x.grad.double(), x64.grad, dtype)
    for (name, p), q in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == dtype, name
        size = q.grad.abs().max()
        close(p.grad.double() / size, q.grad / size, dtype)


@pytest.mark.parametrize('cls', [DNB, DNC])
def test_mixed_precision_like_batch_norm(cls):
    layer, bn = cls(8), nn.BatchNorm2d(8)  # float32 state under a float16 feature map
    x = torch.randn(4, 8, 5, 5).half()
    torch.testing.assert_close(layer(x), bn(x))


@pytest.mark.shows('mixed precision, float16 and bfloat16')
@variants
@pytest.mark.parametrize('training', [True, False])
def test_large_activations_do_not_overflow_float16(cls, inputs, training):
    layer = awake(cls(8, inputs=inputs)).train(training)
    x = (torch.randn(4, 8, 9, 9) * 2e4).clamp(-6e4, 6e4).half()
    with torch.autocast('cpu', torch.float16):
        y = layer(x.requires_grad_())
    if training:  # in eval the output is as large as the input over its running std
        assert y.isfinite().all() and y.abs().max() < 100
    else:
        assert not y.isnan().any()
    y.float().mean().backward()
    assert not x.grad.isnan().any()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@variants
@pytest.mark.parametrize('training', [True, False])
def test_a_large_mean_costs_no_more_precision_than_in_batch_norm(cls, inputs, training):
    layer, exact = pair(cls, inputs)
    bn, bn_exact = nn.BatchNorm2d(8), nn.BatchNorm2d(8).double()
    x = torch.randn(4, 8, 16, 16) + 100
    for module in (layer, exact, bn, bn_exact):
        module.train(training).running_mean.fill_(100)
    error = (layer(x) - exact(x.double())).abs().max()
    allowed = (bn(x) - bn_exact(x.double())).abs().max()
    assert error < 4 * allowed + 1e-5


@pytest.mark.parametrize('cls', [DNB, DNC, SyncDNB, SyncDNC])
def test_1x1_maps(cls, close):
    layer = awake(cls(8)).double()  # an unbiased std of one value would be NaN
    x = torch.randn(4, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    vector = awake(DNB1d(8) if cls in (DNB, SyncDNB) else DNC1d(8)).double()
    vector.load_state_dict(
        {**layer.state_dict(), 'bn.running_mean': torch.zeros(8), 'bn.running_var': torch.ones(8)}
    )
    close(vector(x.detach().flatten(1)), y.flatten(1))


@pytest.mark.parametrize('cls', [DNB, DNC, SyncDNB, SyncDNC])
def test_constant_channels_have_finite_gradients(cls):
    layer = awake(cls(8))
    x = torch.ones(4, 8, 3, 3, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    'cls, shape',
    [(DNB, (1, 8, 1, 1)), (DNC, (1, 8, 1, 1)), (DNB1d, (1, 8)), (SyncDNB, (1, 8, 1, 1))],
)
def test_one_value_per_channel_fails_in_training_as_in_torch(cls, shape):
    layer = cls(8)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        layer(torch.randn(shape))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer.eval()(torch.randn(shape)).shape == shape


@pytest.mark.parametrize(
    'kwargs', [dict(), dict(momentum=None), dict(affine=False), dict(track_running_stats=False)]
)
@pytest.mark.parametrize('shape', [(0, 8, 4, 4), (2, 8, 0, 4)])
@pytest.mark.parametrize('cls', [DNB, DNC, SyncDNB, SyncDNC])
def test_an_empty_batch_follows_torch(cls, shape, kwargs, close):
    layer, bn = awake(cls(8, **kwargs)), nn.BatchNorm2d(8, **kwargs)
    full = torch.randn(2, 8, 4, 4)
    layer(full)
    bn(full)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == bn(x).shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    for name, parameter in layer.named_parameters():
        assert not parameter.grad.any(), name
    for name, buffer in bn.named_buffers():
        close(layer.bn.get_buffer(name).double(), buffer.double(), torch.float32)
    layer(full)  # the next batch is averaged as in torch
    bn(full)
    for name, buffer in bn.named_buffers():
        close(layer.bn.get_buffer(name).double(), buffer.double(), torch.float32)
    assert layer.eval()(x).shape == shape


@pytest.mark.shows('channels_last')
@variants
def test_channels_last_gives_the_same(cls, inputs, close):
    layer, twin = (pair(cls, inputs)[1] for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(4, 8, 5, 6, dtype=torch.float64)
    y, y2 = layer(x), twin.to(memory_format=torch.channels_last)(x2)
    assert y2.is_contiguous(memory_format=torch.channels_last)
    y.backward(upstream)
    y2.backward(upstream.to(memory_format=torch.channels_last))
    close(y2, y)
    close(x2.grad, x.grad)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        close(q.grad, p.grad)


@variants
def test_strided_and_expanded_inputs(cls, inputs, close):
    _, layer = pair(cls, inputs, track_running_stats=False)
    whole = torch.randn(4, 16, 10, 7, dtype=torch.float64)
    for x in (
        whole[:, ::2, 1::3],
        whole[:, :8].transpose(2, 3),
        whole[:1, :8].expand(4, -1, -1, -1),
    ):
        close(layer(x), layer(x.contiguous()))


@variants
def test_retain_graph_and_autograd_grad_agree(cls, inputs, close):
    _, layer = pair(cls, inputs)
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    y = layer(x).square().sum()
    first = torch.autograd.grad(y, wanted, retain_graph=True)
    second = torch.autograd.grad(y, wanted, retain_graph=True)
    y.backward(retain_graph=True)
    y.backward()
    for a, b, tensor in zip(first, second, wanted, strict=True):
        close(a, b)
        close(2 * a, tensor.grad)


@variants
def test_gradients_of_only_some(cls, inputs, close):
    _, layer = pair(cls, inputs)
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    every = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    y = layer(x.detach()).square().sum()  # an input that needs no gradient
    for a, b in zip(every[1:], torch.autograd.grad(y, list(layer.parameters())), strict=True):
        close(a, b)
    layer.requires_grad_(False)  # parameters that need none
    close(torch.autograd.grad(layer(x).square().sum(), x)[0], every[0])
    assert not layer(x.detach()).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad


@variants
def test_a_second_forward_before_the_backward(cls, inputs, close):
    """Siamese use: the running averages move between a forward and its backward."""
    _, layer = pair(cls, inputs)
    a, b = torch.randn(2, 4, 8, 5, 5, dtype=torch.float64).requires_grad_().unbind()
    together = torch.autograd.grad(
        layer(a).square().sum() + layer(b).pow(3).sum(), list(layer.parameters())
    )
    apart = zip(
        torch.autograd.grad(layer(a).square().sum(), list(layer.parameters())),
        torch.autograd.grad(layer(b).pow(3).sum(), list(layer.parameters())),
        strict=True,
    )
    for got, (one, two) in zip(together, apart, strict=True):
        close(got, one + two)


@pytest.mark.shows('gradient checkpointing, `with_cp=True`')
@pytest.mark.parametrize('use_reentrant', [True, False])
@variants
def test_gradient_checkpointing(cls, inputs, use_reentrant, close):
    _, layer = pair(cls, inputs)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), layer, nn.ReLU()).double()
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    model.zero_grad()
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, gradient in zip([x, *model.parameters()], expected, strict=True):
        close(tensor.grad, gradient)


def test_checkpoint_sequential(close):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), pair(DNB)[1], nn.Conv2d(8, 8, 3), pair(DNC)[1])
    model.double()
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    checkpoint_sequential(model, 2, x, use_reentrant=False).square().sum().backward()
    close(x.grad, expected)


@variants
def test_batch_norms_in_place_successors(cls, inputs):
    """ReLU(inplace=True) after the layer may overwrite its output."""
    layer = pair(cls, inputs)[0]
    x = torch.randn(4, 8, 5, 5)
    nn.Sequential(layer, nn.ReLU(inplace=True))(x).sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    nn.Sequential(layer, nn.ReLU())(x).sum().backward()
    for p, gradient in zip(layer.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)


@variants
def test_the_input_is_left_as_it_was(cls, inputs):
    x = torch.randn(4, 8, 5, 5)
    before = x.clone()
    pair(cls, inputs)[0](x)
    assert torch.equal(x, before)


def test_track_running_stats_switched_off_later(close):
    """As in torch, the flag set on a built layer stops the averages, not their use in eval."""
    _, layer = pair(DNB)
    layer.bn.track_running_stats = False
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64) + 3
    layer(x)
    assert not layer.running_mean.any()
    bn = nn.BatchNorm2d(8).double().eval()
    fresh = DNB(8).double().eval()
    fresh.bn.track_running_stats = False
    close(fresh(x), bn(x))


@pytest.mark.parametrize('cls', [SyncDNB, SyncDNC])
@pytest.mark.parametrize('training', [True, False])
def test_sync_layers_without_processes_are_the_plain_ones(cls, training, close):
    sync = awake(cls(8)).double().train(training)
    plain = (DNB if cls is SyncDNB else DNC)(8).double().train(training)
    plain.load_state_dict(sync.state_dict())
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    close(sync(x), plain(x))
    close(sync.running_var, plain.running_var)


@pytest.mark.parametrize('backend', ['reference', 'torch', 'auto'])
@pytest.mark.parametrize('momentum', [0.1, None])  # None differentiates the small part by autograd
@pytest.mark.parametrize('use_reentrant', [False, True])
def test_a_checkpointed_layer_is_computed_twice_as_batch_norm_is(
    backend, momentum, use_reentrant, close
):
    layer = DNB(6, momentum=momentum, backend=backend).double()
    bn = nn.BatchNorm2d(6, momentum=momentum).double()
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64, requires_grad=True)
    for module in (layer, bn):
        checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
    assert layer.num_batches_tracked == bn.num_batches_tracked == 2
    close(layer.running_mean, bn.running_mean)
    close(layer.running_var, bn.running_var)


@variants
@pytest.mark.parametrize('backend', ['reference', 'torch', 'auto'])
def test_running_statistics_may_move_between_forward_and_backward(cls, inputs, backend, close):
    layer = awake(cls(8, inputs=inputs, backend=backend, dtype=torch.float64)).eval()
    layer.bn.running_mean.normal_()
    layer.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    wanted = (x, *dict(layer.named_parameters()).values())
    expected = torch.autograd.grad(layer(x).square().sum(), wanted)
    loss = layer(x).square().sum()
    if backend != 'reference':  # plain autograd refuses to go on
        layer.bn.running_mean.add_(1)
        layer.bn.running_var.mul_(2)
    for actual, value in zip(torch.autograd.grad(loss, wanted), expected, strict=True):
        close(actual, value)


@pytest.mark.parametrize(
    'kwargs',
    [{}, dict(momentum=None), dict(sc=dict(type=VariantSC, hidden='normalized'))],
    ids=str,
)
@pytest.mark.parametrize('cls', [DNB, DNC])
@pytest.mark.parametrize('backend', ['reference', 'torch', 'auto'])
@pytest.mark.parametrize('through', ['backward', 'forward'])
def test_a_step_leaves_no_memory_behind(cls, kwargs, backend, through):
    layer = awake(cls(8, backend=backend, **kwargs))
    memory = [
        np.random.default_rng(0).normal(size=shape).astype(np.float32)
        for shape in ((4, 8, 5, 5), (16, 8))
    ]
    alive = [weakref.ref(each) for each in memory]  # as long as a tensor or a graph uses it
    x, layer.sc.w_out.data = map(torch.from_numpy, memory)
    y = layer(x.requires_grad_())
    if through == 'backward':
        y.sum().backward()
    del memory, x, y, layer
    gc.collect()  # the layer's own
    assert [each() for each in alive] == [None, None]
