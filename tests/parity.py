"""How every fused backend is held against the float64 reference, on any device."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from conftest import TOLERANCE, awake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dn_mmdet import DNB, DNC

CUDA = pytest.param(
    'cuda',
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
    ],
)

# Whether this process runs Triton's kernels on the CPU, in Triton's interpreter.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICES = pytest.mark.parametrize('device', ['cpu'] if INTERPRETED else [CUDA])
KINDS = {
    'dnb-raw': (DNB, dict(inputs='raw')),
    'dnb-standardized': (DNB, dict(inputs='standardized')),
    'dnc': (DNC, {}),
}
LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.mT.contiguous().mT,
}
# The mean, in standard deviations, up to which accuracy is asked for: the most that leaves
# the values of a dtype apart.
OFFSETS = {torch.float64: 1e4, torch.float32: 1e4, torch.float16: 1e2, torch.bfloat16: 10}
# What a result may be off, in units in the last place of its norm, where plain PyTorch's
# own error happens to be smaller still: sums of a thousand values are rounded so.
FEW = 8
MODES = pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])


def assert_interpreted_tests_pass(file, marker):
    """Runs a file's tests with this marker in a process that has Triton's interpreter."""
    env = {name: value for name, value in os.environ.items() if not name.startswith('PYTEST')}
    process = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', marker, file],
        env=dict(env, TRITON_INTERPRET='1'),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert ' passed' in process.stdout and 'skipped' not in process.stdout, process.stdout


def make_layer(kind, channels, backend, training, offset=0.0, **kwargs):
    """A layer as after training on features of this mean, SC neither asleep nor saturated."""
    cls, more = KINDS[kind]
    layer = awake(cls(channels, backend=backend, **more, **kwargs), std=0.3).train(training)
    with torch.no_grad():
        layer.sc.w_in[:, :channels] /= max(offset, 1)
        if layer.affine:
            layer.bn.weight.uniform_(0.5, 2)
            layer.bn.bias.normal_()
        if layer.track_running_stats:
            layer.bn.running_mean.normal_(offset)
            layer.bn.running_var.uniform_(0.5, 2)
    return layer


def step(layer, x, dy):
    """Output, gradients of x and of all parameters, and buffers, by name."""
    x = x.detach().requires_grad_()
    parameters = dict(layer.named_parameters())
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, *parameters.values()), dy)
    return dict(
        zip(('y', 'dx', *parameters), (y.detach(), *gradients), strict=True),
        **dict(layer.named_buffers()),
    )


def assert_as_accurate_as_plain_pytorch(
    backend, kind, shape, layout, dtype, training, device, offset=0.0, draws=5
):
    """Errors against float64 of all that a step gives are within twice plain PyTorch's.

    In norms, over several draws together: a single draw can be lucky for either. The
    reference in the same dtype is plain PyTorch.
    """
    errors, plain_errors, norms = ({} for _ in range(3))
    for _ in range(draws):
        layer = make_layer(kind, shape[1], backend, training, offset).to(device)
        plain, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
        plain.backend = exact.backend = 'reference'
        x, dy = torch.randn(2, *shape, device=device)
        x = LAYOUTS[layout]((x + offset).to(dtype))
        dy = dy.to(dtype)
        actual, by_plain = step(layer, x, dy), step(plain, x, dy)
        for name, wanted in step(exact, x.double(), dy.double()).items():
            assert actual[name].dtype == by_plain[name].dtype, name
            for sums, value in (
                (errors, actual[name] - wanted),
                (plain_errors, by_plain[name] - wanted),
                (norms, wanted),
            ):
                sums[name] = sums.get(name, 0) + value.double().square().sum().item()
    for name in errors:
        stored_in = dtype if name in ('y', 'dx') else torch.float32
        eps = torch.finfo(stored_in).eps * (max(offset, 1) if stored_in == torch.float32 else 1)
        allowed = max(2 * plain_errors[name] ** 0.5, FEW * eps * norms[name] ** 0.5)
        assert errors[name] ** 0.5 <= allowed, (
            f'{name}: off by {errors[name] ** 0.5:.3g} of {norms[name] ** 0.5:.3g}; allowed '
            f'{allowed:.3g}, plain PyTorch {plain_errors[name] ** 0.5:.3g}'
        )


def assert_equals_reference(backend, kind, x, training, **kwargs):
    """In float64, all that a step gives is the reference's."""
    layer = make_layer(kind, x.shape[1], backend, training, **kwargs).double().to(x.device)
    reference = copy.deepcopy(layer)
    reference.backend = 'reference'
    dy = torch.randn_like(x)
    actual = step(layer, x, dy)
    for name, wanted in step(reference, x, dy).items():
        torch.testing.assert_close(
            actual[name].double(),
            wanted.double(),
            **TOLERANCE[torch.float64],
            msg=lambda m, n=name: f'{n}: {m}',
        )


def assert_primitives(ops, x, offset=0.0):
    """Each primitive's result is float64's within x's dtype, in x's dtype and layout."""
    n, c = x.shape[:2]
    dense = x if x.is_contiguous() or _is_channels_last(x) else x.contiguous()
    wide = torch.promote_types(x.dtype, torch.float32)
    dy = torch.randn(x.shape, device=x.device).to(x.dtype)
    a, shift, p, q = torch.randn(4, n, c, dtype=wide, device=x.device)
    m, v = ops.moments(x)
    results = dict(m=m, v=v, y=ops.affine(x, m, a, shift))
    results['da'], results['dc'] = ops.reduce(dy, x, m)
    results['dx'] = ops.input_gradient(dy, x, m, a, p, q)
    for name in ('y', 'dx'):
        assert results[name].dtype == x.dtype and results[name].stride() == dense.stride(), name
    flat, flat_dy = x.double().flatten(2), dy.double().flatten(2)
    centre, a, shift, p, q = (t.double()[..., None] for t in (m, a, shift, p, q))
    centred = flat - centre
    expected = dict(
        m=flat.mean(2),
        v=flat.var(2, correction=0),
        y=(a * centred + shift).view(x.shape),
        da=(flat_dy * centred).sum(2),
        dc=flat_dy.sum(2),
        dx=(a * flat_dy + p * centred + q).view(x.shape),
    )
    for name, wanted in expected.items():
        stored_in = x.dtype if name in ('y', 'dx') else wide
        tolerance = TOLERANCE[stored_in]['rtol'] * max(wanted.abs().max().item(), 1)
        if name == 'y':  # a x + (c - a m) in torch's kernel
            tolerance += FEW * offset * torch.finfo(wide).eps
        if name in ('da', 'dc'):  # sums of flat.shape[2] terms of size 1
            tolerance *= flat.shape[2] ** 0.5
        assert results[name].dtype == stored_in, name
        error = (results[name].double() - wanted).abs().max().item()
        assert error <= tolerance, f'{name}: off by {error:.3g}, allowed {tolerance:.3g}'


class WritesApart(TorchDispatchMode):
    """Fails where an operator may write to memory that another of its arguments shows.

    Some operators ignore such an output on one device and use it as memory on another, so
    that a wrong value shows on the other alone.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(zip(function._schema.arguments, args, strict=False))
        given += [(a, kwargs[a.name]) for a in function._schema.arguments if a.name in kwargs]
        seen = {}
        for argument, value in given:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(value):
                if isinstance(t, torch.Tensor):
                    where = t.untyped_storage()._cdata
                    name, written = seen.setdefault(where, (argument.name, writes))
                    assert name == argument.name or not (writes or written), (
                        f'{function}: {name} and {argument.name} are the same memory'
                    )
        return function(*args, **kwargs)


def _is_channels_last(x):
    return (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    )
