"""torch.compile and torch.export take whole detectors with DN-B; traces fit any batch."""

import copy

import pytest
import torch
from conftest import awake
from mmengine.registry import MODELS
from tiny_detector import write_config
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from dn_mmdet import DNB, DNC, DNB1d, SyncDNB
from dn_mmdet.cli import command_line


@pytest.fixture
def detector(tmp_path):
    """An SSDLite of a tenth of the width, and images for it."""
    model = awake(MODELS.build(command_line.load_config(write_config(tmp_path, 'DNB')).model), 0.1)
    assert sum(isinstance(module, DNB) for module in model.modules()) > 50
    return model.double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)


def flat(outputs):
    return torch.cat([level.flatten() for kind in outputs for level in kind])


def step(model, run, x):
    """Output, gradients and buffers of a step, in the mode that the model is in."""
    y = flat(run(x))
    y.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return y, gradients, dict(model.named_buffers())


@pytest.mark.shows('`torch.compile(fullgraph=True)`, `torch.export`')
@pytest.mark.slow
@pytest.mark.parametrize('training', [True, False])
def test_compile_makes_one_graph_of_a_detector(detector, training, close):
    """Down to the operators of autograd; generating code for them is torch's own matter."""
    model, x = detector
    model.train(training)
    compiled = copy.deepcopy(model)
    run = torch.compile(lambda x: compiled(x, mode='tensor'), fullgraph=True, backend='aot_eager')
    expected = step(model, lambda x: model(x, mode='tensor'), x)
    got = step(compiled, run, x)
    close(got[0], expected[0])
    for part, expected_part in zip(got[1:], expected[1:], strict=True):
        assert part.keys() == expected_part.keys()
        for name, value in expected_part.items():
            close(part[name].double(), value.double())
    moved = compiled.backbone.conv1.bn.num_batches_tracked == 1
    assert bool(moved) == training


@pytest.mark.slow
@pytest.mark.parametrize('cls', [DNB, DNC])
@pytest.mark.parametrize('training', [True, False])
def test_compiled_code_computes_the_same(cls, training, close):
    model = awake(nn.Sequential(nn.Conv2d(3, 8, 3), cls(8), nn.ReLU())).double().train(training)
    compiled = copy.deepcopy(model)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)

    def step(net, run):
        y = run(x)
        y.square().sum().backward()
        return [y, *(parameter.grad for parameter in net.parameters()), *net.buffers()]

    got = step(compiled, torch.compile(compiled, fullgraph=True))
    for value, expected in zip(got, step(model, model), strict=True):
        close(value.double(), expected.double())


class Tensors(nn.Module):
    """A detector as a function of a tensor."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, x):
        return self.detector(x, mode='tensor')


@pytest.mark.shows('`torch.compile(fullgraph=True)`, `torch.export`')
@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:`isinstance.treespec, LeafSpec.` is deprecated')  # torch's own
def test_export_keeps_a_detector_through_a_file_for_any_batch(detector, tmp_path, close):
    model, x = detector
    model = Tensors(model.eval())
    batch = torch.export.Dim('batch')
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / 'detector.pt2')
    loaded = torch.export.load(tmp_path / 'detector.pt2').module()
    for images in (x, x[:1], torch.cat((x, x + 1))):
        with torch.no_grad():
            close(flat(loaded(images)), flat(model(images)))


KINDS = {
    'dnb': (DNB, {}),
    'dnb-standardized': (DNB, dict(inputs='standardized')),
    'dnc': (DNC, {}),
    'sync': (SyncDNB, {}),
    'without averages': (DNB, dict(affine=False, track_running_stats=False)),
}
RECORDERS = {
    'jit.trace': lambda layer, x: torch.jit.trace(layer, x, check_trace=False),
    'make_fx': lambda layer, x: make_fx(layer)(x),
    'make_fx symbolic': lambda layer, x: make_fx(
        layer, tracing_mode='symbolic', _allow_non_fake_inputs=True
    )(x),
    'export': lambda layer, x: torch.export.export(
        layer, (x,), dynamic_shapes=({0: torch.export.Dim('n', min=2, max=64)},), strict=False
    ).module(),
}


@pytest.mark.shows('`torch.jit.trace`, `make_fx` and `torch.export` for any batch')
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('record', RECORDERS)
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # shapes are checked in Python
@pytest.mark.filterwarnings('ignore:`isinstance.treespec, LeafSpec.` is deprecated')  # torch's own
def test_what_was_recorded_is_right_for_another_batch(record, kind, training, close):
    """The output, and in training the running averages, which count the values behind them."""
    cls, kwargs = KINDS[kind]
    layer = awake(cls(6, **kwargs)).double().train(training)
    recorded_layer = copy.deepcopy(layer)
    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        recorded = RECORDERS[record](recorded_layer, torch.randn(4, 6, 5, 7, dtype=torch.float64))
        recorded_layer.load_state_dict(state)  # recording runs the layer once
        if record == 'export':
            recorded.load_state_dict(state)
        for size in (2, 5):
            x = torch.randn(size, 6, 5, 7, dtype=torch.float64)
            close(recorded(x), layer(x))
    buffers = (recorded if record == 'export' else recorded_layer).state_dict()
    for name, value in layer.state_dict().items():
        close(buffers[name].double(), value.double())


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_a_trace_of_vectors_is_right_for_another_batch(close):
    layer = awake(DNB1d(6)).double()
    traced = torch.jit.trace(layer, torch.randn(4, 6, dtype=torch.float64), check_trace=False)
    x = torch.randn(3, 6, dtype=torch.float64)
    close(traced(x), copy.deepcopy(layer)(x))


@pytest.mark.slow
@pytest.mark.parametrize('register', ['register_forward_hook', 'register_forward_pre_hook'])
def test_hooks_on_the_inner_norm_are_compiled(register, close):
    layer = awake(DNB(4)).double()
    if register == 'register_forward_hook':
        layer.bn.register_forward_hook(lambda bn, inputs, output: 2 * output)
    else:
        layer.bn.register_forward_pre_hook(lambda bn, inputs: (inputs[0].tanh(),))
    compiled = copy.deepcopy(layer)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    close(torch.compile(compiled, backend='aot_eager')(x), layer(x))
