"""The Triton kernels: on a GPU where there is one, everywhere else in Triton's interpreter.

The interpreter runs kernels on the CPU, one program after the other, in a process that
starts with TRITON_INTERPRET=1; `test_in_the_interpreter` starts it on this file. Both ways
to launch them are tested: from Python ('triton'), and from C++ ('cpp'), there by a driver
that `emulated_gpu` puts in CUDA's place.
"""

import copy
import re
import subprocess
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import (
    CUDA,
    DEVICES,
    INTERPRETED,
    KINDS,
    LAYOUTS,
    MODES,
    OFFSETS,
    assert_as_accurate_as_plain_pytorch,
    assert_equals_reference,
    assert_interpreted_tests_pass,
    assert_primitives,
    make_layer,
    step,
)

from dn_mmdet.kernels import choice

triton = pytest.importorskip('triton', reason='needs Triton, which is not made for this system')
import triton.language as tl  # noqa: E402

from dn_mmdet.kernels import plans, triton_kernels  # noqa: E402

HOST = choice.gpu_host() is not None
if INTERPRETED and HOST:
    import emulated_gpu

    emulated_gpu.install()
BACKENDS = pytest.mark.parametrize('backend', ['triton', 'cpp'] if HOST else ['triton'])
# Of the long lists of cases, the interpreter, which is slow, runs the way that GPUs take.
NUMERICS = BACKENDS if not (INTERPRETED and HOST) else pytest.mark.parametrize('backend', ['cpp'])
ROUNDED = pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16], ids=['fp32', 'fp16', 'bf16']
)
slow = pytest.mark.slow
# the interpreter's own, of numpy
pytestmark = pytest.mark.filterwarnings('ignore:Conversion of an array with ndim')

# Maps of several tiles; sums split over several programs; channels that fill no tile.
CASES = [
    ((3, 5, 7, 3), 'channels_last'),
    ((2, 7, 13, 11), 'transposed'),
    ((4, 6, 1, 1), 'contiguous'),
    ((1, 4, 9, 5), 'contiguous'),
    ((1, 2, 95, 97), 'contiguous'),
    ((1, 3, 95, 97), 'channels_last'),
    ((35, 70, 2, 3), 'channels_last'),
]


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


@NUMERICS
@slow
@DEVICES
@pytest.mark.parametrize('shape, layout', CASES, ids=str)
@ROUNDED
@MODES
@pytest.mark.parametrize('kind', KINDS)
def test_errors_are_within_twice_plain_pytorchs(
    backend, kind, training, dtype, shape, layout, device
):
    assert_as_accurate_as_plain_pytorch(
        backend, kind, shape, layout, dtype, training, device, draws=2 if INTERPRETED else 5
    )


@NUMERICS
@slow
@DEVICES
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@ROUNDED
@MODES
@pytest.mark.parametrize('kind', KINDS)
def test_also_where_the_mean_is_large(backend, kind, training, dtype, layout, device):
    assert_as_accurate_as_plain_pytorch(
        backend,
        kind,
        (4, 5, 12, 11),
        layout,
        dtype,
        training,
        device,
        offset=OFFSETS[dtype],
        draws=2 if INTERPRETED else 5,
    )


@DEVICES
@pytest.mark.parametrize('offset', [False, True], ids=['centred', 'large-mean'])
@pytest.mark.parametrize('dtype', OFFSETS, ids=str)
@pytest.mark.parametrize(
    'shape',
    [
        (3, 5, 7, 3),
        *(
            pytest.param(shape, marks=slow)
            for shape in ((3, 5, 7), (1, 2, 95, 97), (2, 3, 3, 4, 5))
        ),
    ],
    ids=str,
)
def test_each_primitive_in_each_layout(shape, dtype, offset, device):
    from dn_mmdet.kernels import triton_ops

    offset = OFFSETS[dtype] if offset else 0.0
    x = (torch.randn(shape, device=device) + offset).to(dtype)
    assert_primitives(triton_ops, x, offset)
    assert_primitives(triton_ops, x.mT.contiguous().mT, offset)
    if x.dim() > 3:
        memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        assert_primitives(triton_ops, x.contiguous(memory_format=memory_format), offset)


@BACKENDS
@DEVICES
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(affine=False),
        dict(bound=None),
        dict(reduction=1),
        dict(momentum=None),
        dict(track_running_stats=False),
        dict(bn_requires_grad=True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    'kind, training',
    [
        ('dnb-raw', True),
        *(
            pytest.param(kind, training, marks=slow)
            for kind in KINDS
            for training in (True, False)
            if (kind, training) != ('dnb-raw', True)
        ),
    ],
)
def test_every_argument_of_the_layer(backend, kind, training, kwargs, device):
    x = torch.randn(3, 70, 2, 3, dtype=torch.float64, device=device)
    assert_equals_reference(backend, kind, x, training, **kwargs)


@BACKENDS
@slow
@DEVICES
@MODES
@pytest.mark.parametrize('kind', KINDS)
def test_gradcheck(backend, kind, training, device):
    layer = make_layer(kind, 3, backend, training, min_channels=2).double().to(device)
    names, parameters = zip(*dict(layer.named_parameters()).items(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(3, 3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@BACKENDS
@DEVICES
@pytest.mark.parametrize('kind', KINDS)
def test_gradients_of_only_some(backend, kind, device, close):
    layer = make_layer(kind, 5, backend, True).double().to(device)
    x = torch.randn(3, 5, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    every = torch.autograd.grad(layer(x).pow(3).sum(), [x, *layer.parameters()])
    alone = torch.autograd.grad(layer(x.detach()).pow(3).sum(), list(layer.parameters()))
    for actual, wanted in zip(alone, every[1:], strict=True):
        close(actual, wanted)
    layer.requires_grad_(False)
    close(torch.autograd.grad(layer(x).pow(3).sum(), x)[0], every[0])


@BACKENDS
@DEVICES
@pytest.mark.parametrize('kind', KINDS)
def test_inference_computes_what_training_code_does_in_eval(backend, kind, device, close):
    layer = make_layer(kind, 5, backend, False).to(device)
    x = torch.randn(3, 5, 4, 3, device=device)
    expected = layer(x).detach()
    with torch.no_grad():
        close(layer(x), expected)
    with torch.inference_mode():
        close(layer(x), expected)


@BACKENDS
@DEVICES
def test_an_sc_that_was_pruned_to_no_hidden_unit(backend, device, close):
    layer = make_layer('dnb-raw', 3, backend, training=True).double().to(device)
    with torch.no_grad():
        for name, size in (('w_in', (0, 6)), ('b_in', (0,)), ('w_out', (6, 0))):
            setattr(
                layer.sc,
                name,
                torch.nn.Parameter(torch.zeros(size, dtype=torch.float64, device=device)),
            )
    reference = copy.deepcopy(layer)
    reference.backend = 'reference'
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device)
    close(layer(x), reference(x))
    close(layer.eval()(x), reference.eval()(x))


@BACKENDS
@DEVICES
def test_a_module_in_scs_place_is_called(backend, device, close):
    """The fused small part knows one SC; hooks and other modules go through autograd."""
    layer = make_layer('dnb-raw', 5, backend, True).double().to(device)
    x = torch.randn(3, 5, 4, 3, dtype=torch.float64, device=device)
    expected = layer(x)
    calls = []
    layer.sc.register_forward_hook(lambda *_: calls.append(1))
    close(layer(x), expected)
    assert calls


@BACKENDS
@DEVICES
def test_a_backward_in_a_later_mode_of_the_running_averages(backend, device, close):
    """In eval mode, training steps between a forward and its backward do not count."""
    layer = make_layer('dnb-standardized', 5, backend, False).double().to(device)
    x = torch.randn(3, 5, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    expected = torch.autograd.grad(layer(x).pow(3).sum(), x)[0]
    loss = layer(x).pow(3).sum()
    layer.train()(torch.randn_like(x) * 3)
    close(torch.autograd.grad(loss, x)[0], expected)


@BACKENDS
@DEVICES
@pytest.mark.parametrize(
    'kind, layout, training',
    [
        ('dnb-standardized', 'channels_last', True),
        ('dnc', 'contiguous', True),
        ('dnb-raw', 'contiguous', False),
    ],
)
def test_nothing_reads_uninitialised_memory(backend, kind, layout, training, device):
    layer = make_layer(kind, 35, backend, training).to(device)
    x, dy = torch.randn(2, 3, 35, 5, 7, device=device)
    x = LAYOUTS[layout](x)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    expected = {name: tensor.clone() for name, tensor in step(layer, x, dy).items()}
    layer.load_state_dict(state)
    try:
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3, device=device).isnan().all()  # what is not written shows
        actual = step(layer, x, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, wanted in expected.items():
        assert torch.equal(actual[name], wanted), name


@NUMERICS
@DEVICES
@slow
@given(
    n=st.integers(1, 40),
    c=st.integers(1, 70),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kind=st.sampled_from(list(KINDS)),
    training=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape(backend, device, n, c, height, width, kind, training, layout):
    if training and n * height * width == 1:
        height = 2  # BatchNorm needs more than one value per channel
    x = torch.randn(n, c, height, width, dtype=torch.float64, device=device)
    assert_equals_reference(backend, kind, LAYOUTS[layout](x), training)


@triton.jit
def sum_of_tiles_kernel(part_ptr, sum_ptr, parts, size):
    tile = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    b_sum = triton_kernels._sum_parts(part_ptr, parts, size, tile, tile < 16, 4, 4, tl.float32)
    tl.store(sum_ptr + tile, b_sum)


@DEVICES
def test_partial_sums_past_two_billion_values(device, tmp_path):
    """As of 131,072 images in 4,096 channels."""
    size, parts = 2**28, 9
    count = size * (parts - 1) + 16
    if device == 'cpu':  # a file that is empty but for its end
        values = torch.from_file(str(tmp_path / 'zeros'), shared=True, size=count)
    else:
        values = torch.zeros(count, device=device)
    values[-16:] = torch.arange(16, device=device)
    found = torch.empty(16, device=device)
    sum_of_tiles_kernel[(1,)](values, found, parts, size)
    assert found.tolist() == [*range(16)]


if not INTERPRETED:

    @pytest.mark.parametrize('device', [CUDA])
    @pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
    def test_past_two_billion_elements(layout, device):
        """The last sample, whose offsets need 64 bits, gets what it gets alone."""
        from dn_mmdet.kernels import triton_ops

        if torch.cuda.get_device_properties(device).total_memory < 3e10:
            pytest.skip('needs 30 GB of GPU memory')
        shape = (3, 64, 4096, 2801)
        x = torch.empty(
            shape,
            dtype=torch.float16,
            device=device,
            memory_format=getattr(torch, layout + '_format', None) or torch.channels_last,
        ).normal_()
        assert x.numel() > 2**31
        m, v = triton_ops.moments(x)
        y = triton_ops.affine(x, m, v, m)
        da, dc = triton_ops.reduce(y, x, m)
        last, y_last = x[-1:].clone(), y[-1:].clone()
        m_last, v_last = triton_ops.moments(last)
        torch.testing.assert_close(m[-1:], m_last)
        torch.testing.assert_close(v[-1:], v_last)
        assert_ends_close(y_last, triton_ops.affine(last, m_last, v_last, m_last))
        alone = triton_ops.reduce(y_last, last, m_last)
        torch.testing.assert_close((da[-1:], dc[-1:]), alone, rtol=1e-4, atol=1)
        del last
        y = triton_ops.input_gradient(y, x, m, v, m, m)
        expected = triton_ops.input_gradient(
            y_last, x[-1:].clone(), m_last, v_last, m_last, m_last
        )
        assert_ends_close(y[-1:], expected)

    @slow
    @pytest.mark.skipif(not HOST, reason='the compiled host was not built')
    @pytest.mark.parametrize('capability', [80, 90, 100])
    def test_kernels_compile_for_gpus_that_are_not_here(capability):
        """To machine code, as for real layers; Triton's compiler needs no GPU."""
        compiled = set()
        for plan in PLANS:
            for launch in plan.launches():
                host = choice.gpu_host()
                binary = host.compile_kernel(host.Signature.of(plan, launch), capability)
                registers, spilled = resources(binary)
                print(
                    capability,
                    launch.kernel,
                    launch.constants,
                    f'shared memory '
                    f'{binary.metadata.shared}, registers {registers}, spilled {spilled}',
                )
                assert binary.metadata.shared <= 64 * 1024  # the least that these GPUs give
                assert spilled == 0
                compiled.add(launch.kernel)
        assert compiled == {name for name in vars(triton_kernels) if name.endswith('_kernel')}


def assert_ends_close(actual, expected):
    """First and last rows of huge maps: to compare all takes several times their memory."""
    for rows in (slice(8), slice(-8, None)):
        torch.testing.assert_close(actual[..., rows, :], expected[..., rows, :])


def plan(
    shape,
    dtype=torch.float32,
    missing=(),
    layer_dtype=torch.float32,
    channels_last=False,
    **options,
):
    n, c, s = shape
    dtypes = {name: layer_dtype for name in (*plans.PARAMETERS, *plans.STATE)}
    dtypes['tracked'] = torch.int64
    usual = dict(
        hidden=max(c // 32, 8),
        batch=True,
        update=True,
        cumulative=False,
        shared=False,
        standardized=False,
        bounded=True,
    )
    return plans.Plan(
        plans.Shape(n, c, s, channels_last, dtype),
        plans.Options(**dict(usual, **options)),
        {name: t for name, t in dtypes.items() if name not in missing},
    )


PLANS = [
    plan((24, 96, 160 * 160), torch.float16, channels_last=True),
    plan((24, 1280, 100), torch.float16, channels_last=True),
    plan((2, 37, 80 * 80), torch.bfloat16, standardized=True),
    plan((40, 70, 6), missing=('w', 'b', 'tracked'), bounded=False, shared=True),
    plan((1, 1, 2), torch.float16, layer_dtype=torch.float16, cumulative=True, hidden=1),
    plan((3, 70, 6), hidden=100, world=2, rank=1),
    plan(
        (24, 384, 400),
        torch.float16,
        channels_last=True,
        batch=False,
        update=False,
        inference=True,
    ),
    plan(
        (2, 70, 6),
        missing=('w', 'b'),
        batch=False,
        update=False,
        inference=True,
        standardized=True,
        bounded=False,
    ),
    plan((3, 70, 6), torch.float64, layer_dtype=torch.float64, batch=False, update=False),
]


def resources(binary):
    """Registers and bytes spilled to memory of a thread, by the compiled code itself."""
    binaries = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(binary.asm['cubin'])
        file.flush()
        usage = subprocess.run(
            [binaries / 'cuobjdump', '-res-usage', file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return tuple(int(re.search(rf'{name}:(\d+)', usage).group(1)) for name in ('REG', 'LOCAL'))
