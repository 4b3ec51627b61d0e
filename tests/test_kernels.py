"""The torch and cpp backends are as accurate as plain PyTorch in every dtype, shape, layout."""

import copy
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import (
    CUDA,
    KINDS,
    LAYOUTS,
    MODES,
    OFFSETS,
    WritesApart,
    assert_as_accurate_as_plain_pytorch,
    assert_equals_reference,
    assert_primitives,
    make_layer,
    step,
)

import dn_mmdet.kernels
from dn_mmdet import DNB
from dn_mmdet.inner_norm import SC_PARAMETERS
from dn_mmdet.kernels import choice, torch_ops

try:
    from dn_mmdet.kernels import _cpp, cpp_ops
except ImportError:
    cpp_ops = None
OPS = dict(torch=torch_ops, cpp=cpp_ops)
CPP = pytest.mark.skipif(cpp_ops is None, reason='the compiled kernels were not built')
PLACES = pytest.mark.parametrize(
    'backend, device',
    [
        ('torch', 'cpu'),
        pytest.param('cpp', 'cpu', marks=CPP),
        pytest.param('torch', 'cuda', marks=CUDA.marks),
    ],
)
ON_CPUS = pytest.mark.parametrize('backend', ['torch', pytest.param('cpp', marks=CPP)])
DTYPES = pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16], ids=['fp32', 'fp16', 'bf16']
)
CASES = [
    ((3, 5, 7, 3), 'channels_last'),
    ((2, 7, 13, 11), 'transposed'),
    ((4, 6, 1, 1), 'contiguous'),
    ((1, 4, 9, 5), 'contiguous'),
    ((2, 3, 41, 37), 'contiguous'),
    ((2, 3, 41, 37), 'channels_last'),
]


@PLACES
@pytest.mark.parametrize('shape, layout', CASES, ids=str)
@DTYPES
@MODES
@pytest.mark.parametrize('kind', KINDS)
def test_errors_are_within_twice_plain_pytorchs(
    kind, training, dtype, shape, layout, backend, device
):
    assert_as_accurate_as_plain_pytorch(backend, kind, shape, layout, dtype, training, device)


@PLACES
@pytest.mark.parametrize('layout', LAYOUTS)
@DTYPES
@MODES
@pytest.mark.parametrize('kind', KINDS)
def test_also_where_the_mean_is_large(kind, training, dtype, layout, backend, device):
    assert_as_accurate_as_plain_pytorch(
        backend, kind, (4, 5, 12, 11), layout, dtype, training, device, offset=OFFSETS[dtype]
    )


@PLACES
@pytest.mark.parametrize('offset', [False, True], ids=['centred', 'large-mean'])
@pytest.mark.parametrize('dtype', OFFSETS, ids=str)
@pytest.mark.parametrize(
    'shape', [(3, 5, 7), (3, 5, 7, 3), (2, 7, 47, 43), (2, 3, 3, 4, 5)], ids=str
)
def test_each_primitive_in_each_layout(shape, dtype, offset, backend, device):
    offset = OFFSETS[dtype] if offset else 0.0
    x = (torch.randn(shape, device=device) + offset).to(dtype)
    assert_primitives(OPS[backend], x, offset)
    assert_primitives(OPS[backend], x.mT.contiguous().mT, offset)
    if x.dim() > 3:
        memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        assert_primitives(OPS[backend], x.contiguous(memory_format=memory_format), offset)


def test_one_memory_for_two_outputs_is_noticed():
    x, m, unused = torch.randn(1, 4, 6), torch.randn(4), torch.empty(0)
    with WritesApart(), pytest.raises(AssertionError, match='save_mean and save_invstd'):
        torch.native_batch_norm(
            x, m, m, m, torch.ones(4), False, 0.0, 0.0, out=(torch.empty_like(x), unused, unused)
        )


@pytest.mark.parametrize('shape', [(2, 4, 6), (2, 4, 6, 5), (2, 4, 3, 6, 5)], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@MODES
@pytest.mark.parametrize('kind', KINDS)
def test_stock_operators_write_to_memory_of_their_own(kind, training, layout, shape):
    x, dy = torch.randn(2, *shape)
    if layout != 'channels_last' or x.dim() == 4:
        x = LAYOUTS[layout](x)
    layer = make_layer(kind, shape[1], 'torch', training)
    bn, sc = layer.bn, layer.sc
    averages = bn.running_mean, bn.running_var
    with WritesApart(), torch.no_grad():
        m, v = torch_ops.moments(x)
        small = torch_ops.Coefficients(
            m,
            v,
            x[0, 0].numel(),
            None if training else averages,
            (*averages, 0.1) if training else None,
            bn.weight,
            bn.bias,
            list(sc.parameters()),
            eps=bn.eps,
            bound=sc.bound,
            standardized=sc.inputs == 'standardized',
            batch_shared=layer.batch_shared,
            keep=True,
        )
        torch_ops.affine(x, m, small.a, small.c)
        p, q, *_ = small.backward(
            *torch_ops.reduce(dy, x, m), bn.weight, bn.bias, *sc.parameters()
        )
        torch_ops.input_gradient(dy, x, m, small.a, p, q)


@ON_CPUS
@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_gradient_of_any_strides(layout, backend, close):
    ops = OPS[backend]
    x, a, dy = torch.randn(3, 4, 6, 5, 7, dtype=torch.float64)
    x = LAYOUTS[layout](x)
    m = torch.randn(4, 6, dtype=torch.float64)
    for view in (
        dy,
        dy.mT.contiguous().mT,
        dy[:1].expand_as(dy),
        dy[:, :, :1, :1].expand_as(dy),
        dy.contiguous(memory_format=torch.channels_last),
    ):
        expected = ops.reduce(view.contiguous(), x.contiguous(), m)
        for actual, wanted in zip(ops.reduce(view, x, m), expected, strict=True):
            close(actual, wanted)
        coefficients = torch.randn(3, 4, 6, dtype=torch.float64)
        close(
            ops.input_gradient(view, x, m, *coefficients),
            ops.input_gradient(view.contiguous(), x.contiguous(), m, *coefficients),
        )


@ON_CPUS
@MODES
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kind', KINDS)
def test_nothing_reads_uninitialised_memory(kind, layout, training, backend):
    layer = make_layer(kind, 5, backend, training)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x, dy = torch.randn(2, 3, 5, 41, 37)
    expected = step(layer, LAYOUTS[layout](x), dy)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    layer.load_state_dict(state)
    try:
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()  # what is not written shows
        actual = step(layer, LAYOUTS[layout](x), dy)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, wanted in expected.items():
        assert torch.equal(actual[name], wanted), name


@ON_CPUS
@given(
    n=st.integers(1, 5),
    c=st.integers(1, 9),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    kind=st.sampled_from(list(KINDS)),
    training=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_shape(backend, n, c, height, width, kind, training, layout):
    if training and n * height * width == 1:
        height = 2  # BatchNorm needs more than one value per channel
    x = LAYOUTS[layout](torch.randn(n, c, height, width, dtype=torch.float64))
    assert_equals_reference(backend, kind, x, training)


def eval_layer(kind, channels, backend, **kwargs):
    return make_layer(kind, channels, backend, training=False, **kwargs)


@CPP
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    'shape', [(1, 5, 9, 7), (2, 5, 1, 1), (3, 40, 33, 31), (17, 3, 2, 2), (0, 5, 3, 3)], ids=str
)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('args', [{}, dict(bound=None), dict(affine=False)], ids=str)
def test_inference_at_one_call_equals_the_reference(kind, args, shape, dtype, close):
    layer = eval_layer(kind, shape[1], 'cpp', **args).to(dtype)
    reference = copy.deepcopy(layer).double()
    reference.backend = 'reference'
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        close(layer(x).double(), reference(x.double()), dtype)


@CPP
def test_one_call_is_what_inference_makes(monkeypatch):
    layer, calls = eval_layer('dnb-raw', 5, 'auto'), []
    infer = cpp_ops.infer
    monkeypatch.setattr(
        cpp_ops, 'infer', lambda *args, **kwargs: calls.append(1) or infer(*args, **kwargs)
    )
    x = torch.randn(2, 5, 4, 4)
    layer(x)
    assert not calls  # a gradient may be asked for
    with torch.no_grad():
        layer(x)
        assert calls == [1]
        layer.train()(x)
    assert calls == [1]


@CPP
@pytest.mark.parametrize('threads', [1, 2, 3])
def test_threads_change_nothing(threads, close):
    x, dy = torch.randn(2, 5, 24, 40, 41)
    layer = make_layer('dnb-raw', 24, 'cpp', True)
    expected = step(copy.deepcopy(layer), x, dy)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = step(copy.deepcopy(layer), x, dy)
        for name, wanted in expected.items():
            close(actual[name].float(), wanted.float())
        with torch.no_grad():
            whole = layer.eval()(x)
            for samples in (1, 2):  # fewer than threads
                close(layer(x[:samples]), whole[:samples])
    finally:
        torch.set_num_threads(before)


@CPP
def test_tanh_of_the_compiled_sc():
    """By way of its bias: the output of an SC whose weights are zero."""
    values = torch.cat(
        (
            torch.linspace(-12, 12, 4001),
            torch.logspace(-8, 30, 401),
            torch.tensor([0.0, -0.0, float('inf'), -float('inf')]),
        )
    ).repeat(2)
    channels = len(values) // 2
    layer = DNB(channels, bound=1.0, affine=False, backend='cpp').eval()
    layer.sc.b_out.data = values
    with torch.no_grad():
        layer.bn.running_var.fill_(1 - layer.eps)
        y = layer(torch.zeros(1, channels, 1, 1))  # h
        assert (y.flatten() - values[channels:].double().tanh()).abs().max() <= 1.5e-7
        layer.sc.b_out.data.fill_(float('nan'))
        assert layer(torch.zeros(1, channels, 1, 1)).isnan().all()


def calls_of_the_kernels():
    """{name: the arguments of a call that fits}, by name of each argument."""
    n, c, h = 2, 3, 8
    x, dy = torch.randn(2, n, c, 4, 4)
    m, a, shift, p, q, v, da, dc = torch.rand(8, n, c) + 0.5
    w, b, mu, var = torch.rand(4, c) + 0.5
    sc = dict(
        w_in=torch.randn(h, 2 * c),
        b_in=torch.randn(h),
        w_out=torch.randn(2 * c, h),
        b_out=torch.randn(2 * c),
    )
    small = dict(eps=1e-5, bound=0.25, standardized=False, batch_shared=False)
    running = dict(running_mean=mu, running_var=var)
    return dict(
        moments=dict(x=x),
        affine=dict(x=x, m=m, a=a, c=shift),
        reduce=dict(dy=dy, x=x, m=m),
        input_gradient=dict(dy=dy, x=x, m=m, a=a, p=p, q=q),
        coefficients=dict(
            m=m,
            v=v,
            size=16,
            mean=None,
            var=None,
            **running,
            momentum=0.1,
            w=w,
            b=b,
            **sc,
            **small,
        ),
        coefficients_backward=dict(
            da=da,
            dc=dc,
            m=m,
            a=a,
            mu=mu,
            sigma=var,
            inputs=torch.randn(n, 2 * c),
            hidden=torch.rand(n, h),
            out=torch.randn(n, 2 * c),
            size=16,
            w=w,
            b=b,
            **sc,
            **small,
            training=True,
        ),
        infer=dict(x=x, **running, w=w, b=b, **sc, **small),
    )


def run_kernel(name, arguments):
    arguments = dict(arguments)
    if 'w_in' in arguments:
        sc = [arguments.pop(part) for part in SC_PARAMETERS]
        before = list(arguments).index('b') + 1
        values = list(arguments.values())
        return getattr(_cpp, name)(*values[:before], sc, *values[before:])
    return getattr(_cpp, name)(*arguments.values())


def misfits(t):
    """Tensors that do not lie as a kernel reads t."""
    yield 'smaller', t[..., :-1].contiguous()
    yield 'empty', t[:0]
    yield 'of another device', t.to('meta')
    yield 'of integers', t.long()
    yield 'sparse', t.to_sparse()
    yield 'without memory', torch._efficientzerotensor(t.shape)
    if t.dim() > 1:
        yield 'flat', t.flatten()


@CPP
@pytest.mark.parametrize(
    'name',
    [
        'moments',
        'affine',
        'reduce',
        'input_gradient',
        'coefficients',
        'coefficients_backward',
        'infer',
    ],
)
def test_the_compiled_kernels_check_what_they_are_given(name):
    arguments = calls_of_the_kernels()[name]
    run_kernel(name, arguments)
    for key in [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]:
        for kind, misfit in misfits(arguments[key]):
            if key == 'x' and name in ('moments', 'affine', 'infer') and kind == 'smaller':
                continue  # a map is of any size
            try:
                run_kernel(name, arguments | {key: misfit})
            except RuntimeError:
                continue
            raise AssertionError(f'{key}: {kind} was accepted')
    if name in ('coefficients', 'infer'):
        with pytest.raises(RuntimeError, match='running_mean should have the shape .3. not .1.'):
            run_kernel(name, arguments | dict(running_mean=torch.ones(1)))


@CPP
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_no_number_spreads_as_in_the_reference(value):
    x = torch.randn(3, 4, 6, 6)
    x[1, 2, 3, 3] = value
    for training in (True, False):
        layer = make_layer('dnb-raw', 4, 'cpp', training)
        reference = copy.deepcopy(layer)
        reference.backend = 'reference'
        with torch.no_grad():
            assert torch.equal(layer(x).isfinite(), reference(x).isfinite())


@CPP
def test_an_outlier_in_the_middle_costs_no_accuracy(close):
    x = torch.randn(2, 3, 64, 65)
    x.flatten(2)[..., 64 * 65 // 2] = 1e4  # the value that the sums are centred on
    (m, v), wide = cpp_ops.moments(x), x.double().flatten(2)
    close(m.double(), wide.mean(2), torch.float32)
    close(v.double() / wide.var(2, correction=0), torch.ones(2, 3).double(), torch.float32)
    constant = torch.full((2, 3, 64, 65), 0.1)
    m, v = cpp_ops.moments(constant)
    assert torch.equal(m, constant[..., 0, 0]) and not v.any()


@pytest.fixture
def forgets_the_kernels():
    choice.compiled_kernels.cache_clear()
    yield
    choice.compiled_kernels.cache_clear()


@pytest.mark.usefixtures('forgets_the_kernels')
def test_without_the_compiled_kernels_the_stock_operators_run(monkeypatch, recwarn):
    monkeypatch.delattr(dn_mmdet.kernels, 'cpp_ops', raising=False)
    monkeypatch.delitem(sys.modules, 'dn_mmdet.kernels.cpp_ops', raising=False)
    monkeypatch.setitem(sys.modules, 'dn_mmdet.kernels._cpp', None)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(DNB(3)(x), DNB(3, backend='torch')(x))
    assert not recwarn.list
    with pytest.raises(ImportError, match="backend='cpp'.*pip install --no-build-isolation"):
        DNB(3, backend='cpp')(x)


@pytest.mark.usefixtures('forgets_the_kernels')
def test_kernels_of_another_torch_are_said_once(monkeypatch):
    def broken():
        try:
            raise ImportError('undefined symbol: _ZN2at4')
        except ImportError as error:
            raise ImportError("backend='cpp': undefined symbol: _ZN2at4") from error

    monkeypatch.setattr(choice, '_cpp_ops', broken)
    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match='undefined symbol.*slower') as caught:
        assert torch.equal(DNB(3)(x), DNB(3, backend='torch')(x))
        DNB(3)(x)
    assert len(caught) == 1
