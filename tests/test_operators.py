"""The operators that torch.compile keeps: their schemas, sizes and gradients, and what it makes.

Those of Triton's kernels run on a GPU where there is one, everywhere else in Triton's
interpreter, in a process that `test_in_the_interpreter` starts on this file. They are launched
by the compiled host (there, against the driver of `emulated_gpu`), some also from Python.
"""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from conftest import TOLERANCE, awake
from parity import INTERPRETED, MODES, assert_interpreted_tests_pass
from torch import nn

from dn_mmdet import DNB, DNC, DNB1d, DNC1d, SyncDNB
from dn_mmdet.kernels import choice, operators

if INTERPRETED:
    KERNELS, DEVICE = 'triton', 'cpu'
elif torch.cuda.is_available():
    KERNELS, DEVICE = 'triton', 'cuda'
else:
    KERNELS, DEVICE = 'cpp', 'cpu'
BACKEND = 'triton' if KERNELS == 'triton' else 'auto'
if KERNELS == 'cpp' and choice.compiled_kernels() is None:
    pytest.skip('the compiled kernels were not built', allow_module_level=True)
# the interpreter's own, of numpy
pytestmark = [
    pytest.mark.filterwarnings('ignore:Conversion of an array with ndim'),
    *([pytest.mark.gpu] if DEVICE == 'cuda' else []),
]
slow = pytest.mark.slow
LAUNCHERS = ['C++', 'Python'] if KERNELS == 'triton' and choice.gpu_host() else ['Python']
if 'C++' in LAUNCHERS:
    from dn_mmdet.kernels import host, triton_ops

    if INTERPRETED:
        import emulated_gpu

        emulated_gpu.install()
BY_EACH = pytest.mark.parametrize('launched_by', LAUNCHERS, indirect=True)
# N = 4 and C = 4: what is kept has no gaps then, whose values would be any
N, C, HIDDEN = 4, 4, 8
OPS = torch.ops.dn_mmdet


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()  # else the eighth layer counts as a recompilation too many


@pytest.fixture(autouse=True)
def launched_by(request, monkeypatch):
    by = getattr(request, 'param', LAUNCHERS[0])
    if by == 'C++' and INTERPRETED:
        monkeypatch.setattr(operators, '_host_for', lambda kernels, device: host)
    elif 'C++' in LAUNCHERS and by == 'Python':
        monkeypatch.setattr(operators, '_host_for', lambda kernels, device: None)
    yield by
    if 'C++' in LAUNCHERS and INTERPRETED:
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
    @pytest.mark.skipif(DEVICE == 'cuda', reason='a GPU runs the kernels themselves')
    def test_in_the_interpreter(marker):
        pytest.importorskip('triton', reason='needs Triton, which is not made for this system')
        assert_interpreted_tests_pass(__file__, marker)


def arguments(affine, grad, dtype=torch.float64):
    """x, the parameters and the running averages."""
    shapes = dict(
        x=(N, C, 3, 2),
        w=(C,),
        b=(C,),
        w_in=(HIDDEN, 2 * C),
        b_in=(HIDDEN,),
        w_out=(2 * C, HIDDEN),
        b_out=(2 * C,),
    )
    found = [
        torch.randn(size, dtype=dtype, device=DEVICE).requires_grad_(grad)
        for size in shapes.values()
    ]
    if not affine:
        found[1] = found[2] = None
    return found, [
        torch.randn(C, dtype=dtype, device=DEVICE),
        torch.rand(C, dtype=dtype, device=DEVICE) + 1,
    ]


# (affine, bound, batch, batch_shared, standardized, keep)
OPTIONS = {
    'dnb': (True, 0.25, True, False, False, True),
    'standardized, unbounded': (False, None, False, False, True, True),
    'dnc': (True, 0.5, True, True, False, True),
    'dnc, running': (True, 0.5, False, True, False, True),
    'inference': (True, 0.25, False, False, False, False),
}


@slow
@BY_EACH
@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('name', ['dynamic_norm', 'dynamic_norm_step', 'dynamic_norm_backward'])
def test_an_operator_is_what_it_says(name, options, launched_by):
    """Schema, sizes, autograd and tracing, by torch's own checks."""
    affine, bound, batch, batch_shared, standardized, keep = OPTIONS[options]
    tensors, averages = arguments(affine, keep)
    more = 1e-5, bound, batch, batch_shared, standardized, keep, KERNELS
    if name == 'dynamic_norm':
        torch.library.opcheck(OPS.dynamic_norm, (*tensors, *averages, *more))
    elif name == 'dynamic_norm_step':
        counter = torch.tensor(3, device=DEVICE)
        for tracked, momentum in ((counter, None), (counter, 0.1), (None, 0.1)):
            torch.library.opcheck(
                OPS.dynamic_norm_step,
                (*tensors, *averages, tracked, momentum, *more[:2], True, *more[3:]),
            )
    elif keep:
        kept = OPS.dynamic_norm(*tensors, *averages, *more)[1]
        tensors = [t if t is None else t.detach() for t in tensors]
        dy = torch.randn_like(tensors[0])
        for x_needs_gradient in (True, False):
            torch.library.opcheck(
                OPS.dynamic_norm_backward,
                (dy, tensors[0], kept, *tensors[1:], *more, x_needs_gradient),
            )


if 'C++' in LAUNCHERS:

    @pytest.mark.parametrize('refused', [(), ('forward',), ('backward',)], ids=str)
    def test_who_launches(refused, monkeypatch):
        """The compiled host; Python where the host cannot, each way for itself."""
        by_python = []
        real_launch, real_add = triton_ops.run_launch, host._add_plan

        def run_launch(launch, *args):
            by_python.append(launch.kernel)
            return real_launch(launch, *args)

        def add_plan(key):
            way = 'backward' if key[5] & host.BACKWARD else 'forward'
            return way not in refused and real_add(key)

        monkeypatch.setattr(triton_ops, 'run_launch', run_launch)
        monkeypatch.setattr(host, '_add_plan', add_plan)
        host._host.forget_plans()
        layer, twin = pair()
        x = values().requires_grad_()
        dy = torch.randn_like(x)
        run = torch.compile(layer, fullgraph=True, backend='aot_eager')
        for _ in range(2):
            assert_same(step(run, layer, x, dy), step(twin, twin, x, dy))
        ways = {'reduce_kernel': 'backward', 'affine_kernel': 'forward'}
        assert {ways[kernel] for kernel in by_python if kernel in ways} == set(refused)

    def test_what_an_operator_gives_has_memory_of_its_own():
        """Torch's rule; a compiled model writes into what it no longer needs."""
        tensors, averages = arguments(True, False)
        options = 1e-5, 0.25, True, False, False, True, KERNELS
        y, kept = OPS.dynamic_norm(*tensors, *averages, *options)
        found = (
            y,
            kept,
            *OPS.dynamic_norm_backward(y, tensors[0], kept, *tensors[1:], *options, True),
        )
        assert len({t.untyped_storage().data_ptr() for t in (*tensors, *found)}) == 16
        for t in found:
            assert t.is_contiguous() and t.storage_offset() == 0


@pytest.mark.parametrize('batch_shared', [False, True])
def test_what_is_kept_lies_where_a_plan_puts_it(batch_shared):
    plans = pytest.importorskip('dn_mmdet.kernels.plans')
    for n, c, hidden in ((1, 1, 1), (3, 5, 8), (2, 7, 9), (4, 33, 70)):
        options = plans.Options(hidden, True, False, False, batch_shared, False, True)
        plan = plans.Plan(plans.Shape(n, c, 6, False, torch.float32), options, {})
        sizes = operators.kept_sizes('triton', n, c, hidden, batch_shared)
        memory = torch.arange(plan.kept_size)
        views = operators.unpack(memory, sizes)
        assert {name: int(view[0]) for name, view in views.items()} == plan.kept
        assert {name: len(view) for name, view in views.items()} == {
            name: plan.sizes[name] for name in views
        }
        x = torch.empty(n, c, 6, 1, device='meta')
        _, kept = operators._sizes_forward(
            x,
            *[None] * 2,
            torch.empty(hidden, 2 * c, device='meta'),
            *[torch.empty(hidden, device='meta')] * 5,
            batch_shared,
            False,
            True,
            'triton',
        )
        assert len(kept) == plan.kept_size


# ---------------------------------------------------------------- what a compiled model runs


class Counting:
    """A backend of torch.compile that keeps the graphs; autograd's are among them or not."""

    def __init__(self, autograd=False):
        self.graphs, self.autograd = [], autograd

    def keep(self, graph, example):
        self.graphs.append(graph)
        return graph

    def __call__(self, graph, example):
        if not self.autograd:
            return self.keep(graph, example)
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)(graph, example)

    def calls(self):
        """The operators of dn_mmdet in all graphs, in order."""
        found = []
        for graph in self.graphs:
            for node in graph.graph.nodes:
                for argument in (node.target, *node.args[:1]):
                    name = str(argument)
                    if name.startswith('dn_mmdet.'):
                        found.append(name.removeprefix('dn_mmdet.').removesuffix('.default'))
        return found


LAYERS = {
    'dnb': (DNB, {}),
    'standardized': (DNB, dict(inputs='standardized')),
    'dnc': (DNC, {}),
    'unbounded': (DNB, dict(bound=None)),
    'not affine': (DNB, dict(affine=False)),
    'cumulative': (DNB, dict(momentum=None)),
    'without averages': (DNC, dict(track_running_stats=False)),
    'dnb1d': (DNB1d, {}),
    'dnc1d': (DNC1d, {}),
}


def pair(cls=DNB, training=True, dtype=torch.float64, **kwargs):
    """A layer that torch.compile keeps as an operator, and the same with the reference."""
    layer = awake(cls(C, backend=BACKEND, **kwargs)).to(DEVICE, dtype).train(training)
    if layer.track_running_stats:
        nn.init.normal_(layer.bn.running_mean)
        nn.init.uniform_(layer.bn.running_var, 0.5, 2)
    twin = copy.deepcopy(layer)
    twin.backend = 'reference'
    return layer, twin


def values(cls=DNB, n=3, dtype=torch.float64):
    return torch.randn(
        *((n, C) if cls in (DNB1d, DNC1d) else (n, C, 5, 3)), dtype=dtype, device=DEVICE
    )


def step(run, layer, x, dy):
    """Output, gradients and buffers by name; None where nothing needs a gradient."""
    leaf = x.detach().clone().requires_grad_(x.requires_grad)
    layer.zero_grad()
    y = run(leaf)
    if y.requires_grad:
        y.backward(dy)
    return dict(
        y=y,
        dx=leaf.grad,
        **{name: p.grad for name, p in layer.named_parameters()},
        **{name: t.clone() for name, t in layer.named_buffers()},
    )


def assert_same(found, wanted, dtype=torch.float64):
    for name, value in wanted.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(
                found[name].double(),
                value.double(),
                **TOLERANCE[dtype],
                msg=lambda message, name=name: f'{name}: {message}',
            )


@pytest.mark.shows('`torch.compile` keeps the fused kernels')
@MODES
@BY_EACH
@pytest.mark.parametrize('kind', LAYERS)
def test_a_compiled_step_is_one_operator_each_way(kind, training, launched_by):
    cls, kwargs = LAYERS[kind]
    layer, twin = pair(cls, training, **kwargs)
    graphs = Counting(autograd=True)
    run = torch.compile(layer, fullgraph=True, backend=graphs)
    for _ in range(2):  # the second step finds the averages of the first
        x = values(cls).requires_grad_()
        dy = torch.randn_like(x)
        assert_same(step(run, layer, x, dy), step(twin, twin, x, dy))
    steps = training and layer.track_running_stats
    assert graphs.calls() == [
        'dynamic_norm_step' if steps else 'dynamic_norm',
        'dynamic_norm_backward',
    ]


@pytest.mark.parametrize(
    'frozen',
    [
        ['x'],
        ['bn.weight', 'bn.bias'],
        ['x', 'bn.weight', 'sc.w_in', 'sc.b_in'],
        ['sc.w_in', 'sc.b_in', 'sc.w_out', 'sc.b_out', 'bn.weight', 'bn.bias'],
        ['x', 'sc.w_in', 'sc.b_in', 'sc.w_out', 'sc.b_out', 'bn.weight', 'bn.bias'],
    ],
    ids=str,
)
def test_frozen_parts(frozen):
    layer, twin = pair()
    for each in (layer, twin):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name not in frozen)
    x = values().requires_grad_('x' not in frozen)
    dy = torch.randn_like(x)
    run = torch.compile(layer, fullgraph=True, backend='aot_eager')
    assert_same(step(run, layer, x, dy), step(twin, twin, x, dy))


def test_frozen_statistics_in_training():
    """The inner norm in eval mode, as `norm_eval` leaves it."""
    layer, twin = pair()
    layer.bn.eval()
    twin.bn.eval()
    x = values().requires_grad_()
    dy = torch.randn_like(x)
    run = torch.compile(layer, fullgraph=True, backend='aot_eager')
    assert_same(step(run, layer, x, dy), step(twin, twin, x, dy))


@MODES
@BY_EACH
def test_without_gradients(training, launched_by):
    layer, twin = pair(training=training)
    graphs = Counting(autograd=True)
    run = torch.compile(layer, fullgraph=True, backend=graphs)
    x = values()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(run(x), twin(x))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    assert set(graphs.calls()) == {'dynamic_norm_step' if training else 'dynamic_norm'}


@BY_EACH
def test_the_running_averages_move_once_and_are_seen_to(launched_by):
    layer, twin = pair()
    run = torch.compile(layer, fullgraph=True, backend='aot_eager')
    version = layer.running_mean._version
    x = values()
    for _ in range(3):
        run(x)
        twin(x)
    assert layer.running_mean._version > version
    assert layer.num_batches_tracked == 3
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    torch.testing.assert_close(layer.running_var, twin.running_var)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'transposed'])
@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16, torch.float32], ids=['fp16', 'bf16', 'fp32']
)
def test_dtypes_and_layouts_under_autocast(dtype, layout):
    layer, twin = pair(dtype=torch.float32)
    twin.backend = BACKEND  # eager, by the same kernels
    x = dict(
        contiguous=lambda x: x,
        transposed=lambda x: x.mT,
        channels_last=lambda x: x.contiguous(memory_format=torch.channels_last),
    )[layout](torch.randn(3, C, 5, 4, device=DEVICE)).to(dtype)
    dy = torch.randn_like(x)
    run = torch.compile(layer, fullgraph=True, backend='aot_eager')
    with torch.autocast(DEVICE, torch.bfloat16 if DEVICE == 'cpu' else torch.float16):
        found = step(run, layer, x.requires_grad_(), dy)
        assert_same(found, step(twin, twin, x, dy), dtype)
    assert found['y'].dtype == found['dx'].dtype == dtype


def test_any_batch_and_size_in_one_graph():
    layer, twin = pair()
    graphs = Counting()
    run = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for n, h, w in ((3, 6, 5), (2, 4, 7), (6, 3, 9)):  # no two of the first equal
        x = torch.randn(n, C, h, w, dtype=torch.float64, device=DEVICE).requires_grad_()
        dy = torch.randn_like(x)
        assert_same(step(run, layer, x, dy), step(twin, twin, x, dy))
    assert len(graphs.graphs) == 1
    assert graphs.calls() == ['dynamic_norm_step']


def test_any_batch_through_autograd():
    layer, twin = pair()
    run = torch.compile(layer, fullgraph=True, dynamic=True, backend='aot_eager')
    for n in (3, 2, 6):
        x = values(n=n).requires_grad_()
        dy = torch.randn_like(x)
        assert_same(step(run, layer, x, dy), step(twin, twin, x, dy))


def test_many_layers_are_one_graph_and_compiled_once():
    model = awake(nn.Sequential(*(DNB(C, backend=BACKEND) for _ in range(12)))).to(DEVICE)
    graphs = Counting()
    run = torch.compile(model, fullgraph=True, backend=graphs)
    for _ in range(3):
        run(torch.randn(2, C, 3, 3, device=DEVICE)).sum().backward()
    assert len(graphs.graphs) == 1 and graphs.calls() == ['dynamic_norm_step'] * 12


# ---------------------------------------------------------------- where the reference stays


def calls_of(layer, function, x):
    graphs = Counting()
    torch.compile(function, fullgraph=True, backend=graphs)(x)
    return graphs.calls()


def test_an_explicit_reference_is_traced():
    _, twin = pair()
    assert calls_of(twin, twin, values()) == []


@pytest.mark.parametrize(
    'change',
    [
        lambda layer: layer.sc.register_forward_hook(lambda *_: None),
        lambda layer: setattr(layer.bn, 'running_mean', layer.bn.running_mean.repeat(2)[::2]),
        lambda layer: layer.bn.register_parameter('bias', None),
    ],
    ids=['a hook on SC', 'averages in parts', 'no bias'],
)
def test_what_is_not_the_plain_case_is_traced(change):
    layer, twin = pair()
    change(layer)
    change(twin)
    x = values()
    torch.testing.assert_close(torch.compile(layer, backend='aot_eager')(x), twin(x))
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    assert calls_of(layer, layer, x) == []


def test_an_empty_batch_is_traced():
    layer, _ = pair(training=False)
    assert calls_of(layer, layer, values()[:0]) == []


def test_synchronised_layers_of_one_process():
    layer, twin = pair(SyncDNB)
    x = values().requires_grad_()
    dy = torch.randn_like(x)
    run = torch.compile(layer, fullgraph=True, backend='aot_eager')
    assert_same(step(run, layer, x, dy), step(twin, twin, x, dy))


@pytest.mark.filterwarnings('ignore:`isinstance.treespec, LeafSpec.` is deprecated')  # torch's own
@pytest.mark.parametrize('strict', [False, True])
def test_an_exported_program_holds_torchs_own_operators(strict):
    layer, twin = pair(training=False)
    x = values()
    program = torch.export.export(layer, (x,), strict=strict)
    assert not any('dn_mmdet' in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), twin(x))


def test_transforms_of_functions():
    layer, twin = pair(training=False)
    x = values()

    def gradient(of):
        return torch.func.grad(lambda x: of(x).square().sum())

    graphs = Counting()
    found = torch.compile(gradient(layer), fullgraph=True, backend=graphs)(x)
    torch.testing.assert_close(found, gradient(twin)(x))
    assert graphs.calls() == []
    run = torch.compile(torch.func.vmap(lambda x: layer(x)), fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(run(torch.stack((x, 2 * x))), torch.stack((twin(x), twin(2 * x))))


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_a_tangent_that_a_compiled_layer_would_lose_is_an_error(backend):
    layer, _ = pair(training=False)
    layer.requires_grad_(False)
    x = values()
    run = torch.compile(layer, backend=backend)
    run(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match='forward-mode'):
        run(forward_ad.make_dual(x, torch.ones_like(x)))


def test_a_second_gradient_is_right_or_an_error():
    layer, twin = pair()
    x = values().requires_grad_()

    def second(run):
        (gradient,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(
            gradient.square().sum(), (x, layer.sc.w_in) if run is not twin else (x, twin.sc.w_in)
        )

    wanted = second(twin)
    run = torch.compile(layer, fullgraph=True, backend='eager')  # the operator, by autograd itself
    torch.testing.assert_close(second(run), wanted)
    with pytest.raises(RuntimeError, match='double backward'):
        second(torch.compile(layer, fullgraph=True, backend='aot_eager'))
    tensors, averages = arguments(True, True)
    kept = OPS.dynamic_norm(*tensors, *averages, 1e-5, 0.25, True, False, False, True, KERNELS)[1]
    with pytest.raises(RuntimeError, match='expected no gradient of this operator'):
        OPS.dynamic_norm_backward(
            tensors[0],
            tensors[0],
            kept,
            *tensors[1:],
            1e-5,
            0.25,
            True,
            False,
            False,
            True,
            KERNELS,
            True,
        )


def test_gradient_checkpointing():
    layer, twin = pair()
    x = values().requires_grad_()
    dy = torch.randn_like(x)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(
            lambda x: layer(x.tanh()).tanh(), x, use_reentrant=False
        )

    found = step(torch.compile(checkpointed, fullgraph=True, backend='aot_eager'), layer, x, dy)
    wanted = step(lambda x: twin(x.tanh()).tanh(), twin, x, dy)
    assert_same(found, wanted)


@slow
@MODES
def test_code_that_inductor_makes(training):
    """The averages are changed where they are, not copied; nothing stands between launches."""
    from torch._inductor.utils import run_and_get_code

    model = awake(nn.Sequential(nn.Conv2d(3, C, 3), DNB(C, backend=BACKEND), nn.ReLU()))
    model = model.to(DEVICE, torch.float64).train(training)
    twin = copy.deepcopy(model)
    twin[1].backend = 'reference'
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, device=DEVICE)

    def train(run, model):
        y = run(x)
        y.square().sum().backward()
        return [y, *(p.grad for p in model.parameters()), *model.buffers()]

    found, code = run_and_get_code(train, torch.compile(model, fullgraph=True), model)
    for value, wanted in zip(found, train(twin, twin), strict=True):
        torch.testing.assert_close(value.double(), wanted.double())
    called = [
        line
        for part in code
        for line in part.splitlines()
        if 'torch.ops.dn_mmdet' in line and 'default(' in line
    ]
    assert len(called) == 2, called
    assert not any('.copy_(' in part for part in code)
