"""Every backend computes what the reference does: outputs, gradients and state."""
import copy
import sys

import pytest
import torch
from conftest import awake
from torch import nn

from dn_mmdet import DNB, DNC, DNB1d, DNB3d, kernels

FUSED = ('torch', 'auto')
LAYERS = {'dnb-raw': (DNB, dict(inputs='raw')),
          'dnb-standardized': (DNB, dict(inputs='standardized')),
          'dnc': (DNC, {})}
SHAPES = [(3, 5, 7, 3), (2, 3, 40, 40), (1, 4, 2, 2), (4, 6, 1, 1), (13, 1, 11, 5)]
LAYOUTS = {'contiguous': lambda x: x,
           'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
           'transposed': lambda x: x.mT.contiguous().mT,
           'sliced': lambda x: torch.cat((x, x), 1)[:, :x.shape[1]]}


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


@pytest.mark.parametrize('cls, shape', [(DNB1d, (5, 3)), (DNB1d, (2, 3, 7)),
                                        (DNB3d, (2, 3, 3, 4, 5))], ids=str)
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
def test_auto_on_a_gpu_is_the_torch_backend_until_the_kernels_have_passed_there():
    layer = trained(DNB(3)).cuda()
    x = torch.randn(2, 3, 4, 4, device='cuda')
    auto = layer.eval()(x)
    layer.backend = 'torch'
    assert torch.equal(auto, layer(x))
