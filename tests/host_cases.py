"""What the tests of the compiled GPU host share: layers and their twins, maps, options, checks.

The files test_host_*.py test which calls the host takes, and that what it gives is the
reference's: on a GPU where there is one, everywhere else in Triton's interpreter; see
`emulated_gpu`. Maps are tiny: what large ones need is in test_triton_ops.py. Each of the files
needs `pytestmark` and `no_error_of_a_kernel_is_lost` of this module under the same names.
"""

import copy

import pytest
import torch
from conftest import TOLERANCE, awake
from parity import INTERPRETED

from dn_mmdet import DNB, DNC
from dn_mmdet.kernels import choice

pytest.importorskip('triton', reason='needs Triton, which is not made for this system')
if choice.gpu_host() is None:
    pytest.skip('the compiled host was not built', allow_module_level=True)
from dn_mmdet.kernels import host  # noqa: E402

if INTERPRETED:
    import emulated_gpu

    FAKE = emulated_gpu.install()
slow = pytest.mark.slow
# the interpreter's own, of numpy
pytestmark = pytest.mark.filterwarnings('ignore:Conversion of an array with ndim')
# of `test_in_the_interpreter` where a file has slow tests; the other files run all in one go
FAST_AND_SLOW = pytest.mark.parametrize(
    'marker',
    [
        'not slow and not gpu',
        pytest.param('slow and not gpu', marks=[slow, pytest.mark.timeout(2400)]),
    ],
)
NAMES = ('x', 'bn.weight', 'bn.bias', 'sc.w_in', 'sc.b_in', 'sc.w_out', 'sc.b_out')
KINDS = pytest.mark.parametrize(
    'cls, kwargs',
    [(DNB, {}), (DNB, dict(inputs='standardized')), (DNC, {})],
    ids=['raw', 'standardized', 'dnc'],
)
MODES = pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])


@pytest.fixture(autouse=True)
def no_error_of_a_kernel_is_lost():
    yield
    if INTERPRETED:
        errors = emulated_gpu.errors[:]
        emulated_gpu.errors.clear()
        assert not errors, errors[0]


def pair(device, cls=DNB, channels=3, training=True, dtype=torch.float64, **kwargs):
    """A layer as after training, to be run by the host, and its twin, by the reference."""
    layer = awake(cls(channels, backend='cpp', **kwargs), std=0.3)
    bn = layer.bn
    with torch.no_grad():
        for t in (bn.weight, bn.running_var):
            if t is not None:
                t.uniform_(0.5, 2)
        for t in (bn.bias, bn.running_mean):
            if t is not None:
                t.normal_()
    layer.train(training).to(device, dtype)
    return layer, twin_of(layer)


def twin_of(layer):
    twin = copy.deepcopy(layer).double()
    twin.backend = 'reference'
    return twin


def by_host(y):
    """Whether the host made y, which needs a gradient."""
    return y.grad_fn.name() == 'DynamicNormBackward'


def taken(layer, x):
    """Whether the host takes this call; it runs then."""
    return host.call(x, layer.bn, layer.sc, layer.batch_shared, layer.ndims) is not None


def leaves_of(layer, x):
    leaves = {'x': x, **dict(layer.named_parameters())}
    return {name: t for name, t in leaves.items() if t.requires_grad}


def results(layer, x, dy, y=None):
    """y, the gradients of all that need one, and the buffers, by name."""
    leaves = leaves_of(layer, x)
    y = layer(x) if y is None else y
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return dict(
        zip(('y', *leaves), (y.detach(), *gradients), strict=True),
        **{name: t.clone() for name, t in layer.named_buffers()},
    )


def assert_same(actual, expected, like):
    """like: a map, for small things are made in float32 where maps have less than float64."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        dtype = actual[name].dtype
        if dtype == torch.float64 and like.dtype != torch.float64:
            dtype = torch.float32
        tolerance = TOLERANCE[dtype] if dtype.is_floating_point else dict(rtol=0, atol=0)
        torch.testing.assert_close(
            actual[name].double(), wanted.double(), **tolerance, msg=lambda m, n=name: f'{n}: {m}'
        )


def check(layer, twin, x, host=True, steps=1):
    """Steps of both, from the same x, whose gradient is compared too."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        wide = x.detach().double().requires_grad_()
        dy = torch.randn(x.shape, device=x.device, dtype=x.dtype)
        y = layer(x)
        assert by_host(y) == host
        assert y.shape == x.shape and y.dtype == x.dtype
        assert_same(results(layer, x, dy, y), results(twin, wide, dy.double()), x)


def values(device, *shape):
    return torch.randn(shape, dtype=torch.float64, device=device) * 2 + 1


def odd(device, sizes, strides):
    return values(device, 400).as_strided(sizes, strides)


MAPS = {
    'plain': lambda d: values(d, 2, 3, 2, 3),
    'not aligned': lambda d: values(d, 25)[1:].view(2, 3, 2, 2),
    'not aligned, channels_last': lambda d: values(d, 25)[1:].view(2, 2, 2, 3).permute(0, 3, 1, 2),
    'sliced': lambda d: values(d, 2, 5, 4, 6)[:, 1:4, ::2, 1:4],
    'part of a batch': lambda d: values(d, 5, 3, 1, 1)[1:3],
    'channels_last, sliced': lambda d: values(d, 2, 4, 6, 3).permute(0, 3, 1, 2)[..., ::2, 1:],
    'transposed': lambda d: values(d, 2, 3, 4, 2).mT,
    'batch transposed': lambda d: values(d, 3, 2, 2, 2).transpose(0, 1),
    'expanded': lambda d: values(d, 2, 3, 1, 4).expand(2, 3, 3, 4),
    'expanded channels': lambda d: values(d, 2, 1, 2, 2).expand(2, 3, 2, 2),
    'channels_last': lambda d: values(d, 2, 3, 2, 3).contiguous(memory_format=torch.channels_last),
    '1 x 1': lambda d: values(d, 4, 3, 1, 1),
    '1 x 1, channels_last': lambda d: values(d, 4, 3, 1, 1).contiguous(
        memory_format=torch.channels_last
    ),
    'odd strides of sizes 1': lambda d: odd(d, (2, 3, 1, 1), (3, 1, 7, 0)),
    'odd strides of sizes 1, channels_last': lambda d: odd(d, (1, 3, 2, 2), (99, 1, 6, 3)),
    'one channel, odd stride': lambda d: odd(d, (3, 1, 2, 2), (4, 50, 2, 1)),
    '2-d': lambda d: values(d, 4, 3),
    '2-d, transposed': lambda d: values(d, 3, 4).t(),
    '2-d, not aligned': lambda d: values(d, 13)[1:].view(4, 3),
    '3-d': lambda d: values(d, 2, 3, 5),
    '3-d, channels innermost': lambda d: values(d, 2, 5, 3).mT,
    '5-d': lambda d: values(d, 2, 3, 2, 1, 3),
    '5-d, channels_last_3d': lambda d: values(d, 2, 3, 2, 3, 2).contiguous(
        memory_format=torch.channels_last_3d
    ),
}
OPTIONS = {
    'plain': {},
    'not affine': dict(affine=False),
    'no bound': dict(bound=None),
    'cumulative': dict(momentum=None),
    'frozen averages': dict(momentum=0),
    'last batch': dict(momentum=1),
    'integers': dict(bound=1, momentum=1, eps=1),
    'no averages': dict(track_running_stats=False),
    'many hidden units': dict(min_channels=70),
    'very many hidden units': dict(min_channels=135),
    'one hidden unit': dict(min_channels=1),
}


def handed_over(device, mode=None, dtype=torch.float64):
    """Arguments of `host.forward`: x, parameters, state, mode, eps, momentum, bound."""
    n, c, hidden = 3, 5, 7
    x = torch.randn(n, c, 2, 3, dtype=dtype, device=device)
    sizes = (c,), (c,), (hidden, 2 * c), (hidden,), (2 * c, hidden), (2 * c,)
    parameters = tuple(x.new_empty(size).normal_() for size in sizes)
    state = (x.new_zeros(c), x.new_ones(c), torch.tensor(3, device=device))
    mode = host.BATCH | host.UPDATE | host.BOUNDED if mode is None else mode
    return [x, parameters, state, mode, 1e-5, 0.1, 0.25]


def backward_of(given, kept):
    x, parameters, _, mode, eps, _, bound = given
    return [torch.randn_like(x), x, kept, parameters, mode, eps, bound, True]
