"""The compiled GPU host on a GPU alone: streams, graphs, contexts, memory, very large maps."""

import gc
import threading

import host_cases
import pytest
import torch
from host_cases import (
    KINDS,
    MAPS,
    assert_same,
    backward_of,
    by_host,
    check,
    handed_over,
    pair,
    results,
    twin_of,
    values,
)
from parity import CUDA, INTERPRETED

from dn_mmdet.kernels import host

if INTERPRETED:
    pytest.skip("Triton's interpreter runs on the CPU", allow_module_level=True)
pytestmark = host_cases.pytestmark
no_error_of_a_kernel_is_lost = host_cases.no_error_of_a_kernel_is_lost
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
    wanted, wanted_kept = host.forward(*given)
    torch.testing.assert_close(y, wanted)
    # not what is kept, which has gaps; the gradients are made of it
    torch.testing.assert_close(gradients, host.backward(dy, x, wanted_kept, *more))


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
