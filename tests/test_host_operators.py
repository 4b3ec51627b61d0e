"""The compiled GPU host: calls of the operators, which hand over tensors and no layer."""

import gc
import sys
import weakref

import host_cases
import pytest
import torch
from host_cases import backward_of, handed_over
from parity import DEVICES, INTERPRETED, assert_interpreted_tests_pass

from dn_mmdet.kernels import host

pytestmark = host_cases.pytestmark
no_error_of_a_kernel_is_lost = host_cases.no_error_of_a_kernel_is_lost


if not INTERPRETED:

    def test_in_the_interpreter():
        assert_interpreted_tests_pass(__file__, 'not gpu')


def replaced(given, place, value):
    """given with a part in another's stead. place: an index, or two into a tuple of tensors."""
    given = list(given)
    if isinstance(place, int):
        given[place] = value
    else:
        part = list(given[place[0]])
        part[place[1]] = value
        given[place[0]] = tuple(part)
    return given


X, PARAMETERS, TENSORS_OF_STATE, MODE = range(4)
UNFIT = {
    'x is None': (X, lambda x: None, TypeError, 'x: expected a tensor, got NoneType'),
    'x of integers': (X, lambda x: x.int(), ValueError, 'x: expected a map'),
    'x without values': (X, lambda x: x[:0], ValueError, 'x: expected a map'),
    'x of one dimension': (X, lambda x: x[0, 0, 0], ValueError, 'x: expected a map'),
    'x elsewhere': (X, lambda x: x.to('meta'), ValueError, 'x: expected a'),
    'x sparse': (X, lambda x: x.to_sparse(), ValueError, 'x: expected a plain, dense tensor'),
    'x of too many values': (
        X,
        lambda x: x[:1, :, :1, :1].expand(1, 5, 2**16, 2**15),
        ValueError,
        'x: expected less than',
    ),
    'five parameters': (PARAMETERS, lambda p: p[:5], ValueError, 'expected 6 tensors, w and so'),
    'one average': (TENSORS_OF_STATE, lambda s: s[:1], ValueError, 'expected 3 tensors, running'),
    'w of another size': ((PARAMETERS, 0), lambda w: w[:4], ValueError, 'w: expected sizes'),
    'b of integers': ((PARAMETERS, 1), lambda b: b.long(), ValueError, 'b: expected sizes'),
    'b elsewhere': ((PARAMETERS, 1), lambda b: b.to('meta'), ValueError, 'b: expected '),
    'w_in transposed': ((PARAMETERS, 2), lambda w: w.t(), ValueError, 'w_in: expected sizes'),
    'no w_in': ((PARAMETERS, 2), lambda w: None, ValueError, 'w_in: expected a tensor, got None'),
    'no b_in': ((PARAMETERS, 3), lambda b: None, ValueError, 'b_in: expected a tensor, got None'),
    'b_in without units': ((PARAMETERS, 3), lambda b: b[:0], ValueError, 'b_in: expected sizes'),
    'w_out cut': ((PARAMETERS, 4), lambda w: w[:-1], ValueError, 'w_out: expected sizes'),
    'b_out is a number': ((PARAMETERS, 5), lambda b: 1.0, TypeError, 'b_out: expected a tensor'),
    'mean cut': ((TENSORS_OF_STATE, 0), lambda t: t[1:], ValueError, 'running_mean: expected si'),
    'mean in parts': (
        (TENSORS_OF_STATE, 0),
        lambda t: t.repeat(2)[::2],
        ValueError,
        r'running_mean: expected sizes.* with strides \[2\]',
    ),
    'no mean': ((TENSORS_OF_STATE, 0), lambda t: None, ValueError, 'expected both, got the seco'),
    'no var': ((TENSORS_OF_STATE, 1), lambda t: None, ValueError, 'expected both, got the first'),
    'no averages': (TENSORS_OF_STATE, lambda s: (None, None, s[2]), ValueError, 'both, got none'),
    'a counter of floats': ((TENSORS_OF_STATE, 2), lambda t: t.float(), ValueError, 'tracked: ex'),
    'two counters': ((TENSORS_OF_STATE, 2), lambda t: t.repeat(2), ValueError, 'tracked: expec'),
}


@DEVICES
@pytest.mark.parametrize('name', UNFIT)
def test_tensors_that_do_not_fit(name, device):
    """An error that says which; nothing is launched, nothing changed."""
    place, change, error, match = UNFIT[name]
    given = handed_over(device)
    host.forward(*given)  # the plan is there
    versions = [t._version for t in given[2]]
    before = given[place] if isinstance(place, int) else given[place[0]][place[1]]
    with pytest.raises(error, match=match):
        host.forward(*replaced(given, place, change(before)))
    assert [t._version for t in given[2]] == versions
    assert host.kernels_run_on(0)


@DEVICES
def test_modes_that_need_what_is_not_there(device):
    given = handed_over(device, 0)
    with pytest.raises(ValueError, match='running_mean, running_var: expected both, got none'):
        host.forward(*replaced(given, 2, (None, None, None)))
    given = handed_over(device, host.BATCH | host.UPDATE | host.CUMULATIVE)
    with pytest.raises(ValueError, match='tracked: expected a counter'):
        host.forward(*replaced(given, (2, 2), None))


UNFIT_BACKWARD = {
    'dy of fewer samples': (0, lambda dy: dy[:2], ValueError, 'dy: expected the sizes and device'),
    'dy elsewhere': (0, lambda dy: dy.to('meta'), ValueError, 'dy: expected '),
    'no dy': (0, lambda dy: None, TypeError, 'dy: expected a tensor'),
    'x of fewer samples': (1, lambda x: x[:2], ValueError, 'dy: expected the sizes and device'),
    'kept cut': (2, lambda kept: kept[1:], ValueError, 'kept: expected what the forward pass'),
    'kept of float32': (2, lambda kept: kept.float(), ValueError, 'kept: expected what the forw'),
    'kept elsewhere': (2, lambda kept: kept.to('meta'), ValueError, 'kept: expected '),
    'w_in cut': ((3, 2), lambda w: w[:, 1:], ValueError, 'w_in: expected sizes'),
}


@DEVICES
@pytest.mark.parametrize('name', UNFIT_BACKWARD)
def test_gradients_and_kept_tensors_that_do_not_fit(name, device):
    place, change, error, match = UNFIT_BACKWARD[name]
    given = handed_over(device)
    given = backward_of(given, host.forward(*given)[1])
    host.backward(*given)
    before = given[place] if isinstance(place, int) else given[place[0]][place[1]]
    with pytest.raises(error, match=match):
        host.backward(*replaced(given, place, change(before)))
    assert host.kernels_run_on(0)


@DEVICES
def test_tensors_that_lie_anywhere(device):
    """Parameters in parts, and maps, gradients and kept tensors that are not aligned."""

    def spread(t):
        return t.new_empty(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)

    def shifted(t):
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)

    given = handed_over(device, host.BATCH)
    y, kept = host.forward(*given)
    x, parameters = shifted(given[0]), tuple(spread(p) for p in given[1])
    assert x.data_ptr() % 16 and not any(p.is_contiguous() for p in parameters)
    other = host.forward(x, parameters, *given[2:])
    assert torch.equal(other[0], y)
    first = backward_of(given, kept)
    wanted = host.backward(*first)
    for dy in (
        shifted(first[0]),
        spread(first[0]),
        first[0].contiguous(memory_format=torch.channels_last),
    ):
        for k in (shifted(kept), spread(kept)):
            found = host.backward(dy, x, k, parameters, *first[4:])
            assert all(
                torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, wanted, strict=True)
            )


@DEVICES
def test_what_an_operators_call_gives(device):
    """Of an operator: outside autograd, of its own memory, and None where nothing is wanted."""
    given = handed_over(device)
    for t in (given[0], *given[1]):
        t.requires_grad_()
    x, parameters, state, mode, *numbers = given
    versions = [t._version for t in state]
    y, kept = host.forward(*given)
    assert not y.requires_grad and not kept.requires_grad and kept.dim() == 1
    assert [t._version for t in state] == [version + 1 for version in versions]
    assert host.forward(x, parameters, state, mode & ~host.UPDATE, *numbers)[1].shape == kept.shape
    nothing = host.forward(x, parameters, state, host.INFERENCE, *numbers)[1]
    assert nothing.shape == (0,) and nothing.dtype == kept.dtype
    assert [t._version for t in state] == [version + 1 for version in versions]
    given = backward_of(given, kept)
    found = host.backward(*given)
    assert [d.shape for d in found] == [x.shape, *(p.shape for p in parameters)]
    assert len({d.untyped_storage().data_ptr() for d in found}) == 7
    rest = host.backward(*given[:-1], False)
    assert rest[0] is None and all(map(torch.equal, rest[1:], found[1:]))
    without = host.backward(*replaced(replaced(given, (3, 0), None), (3, 1), None))
    assert [d is None for d in without] == [False, True, True, False, False, False, False]


@DEVICES
def test_an_operators_call_leaves_nothing_behind(device):
    given = handed_over(device)
    first = backward_of(given, host.forward(*given)[1])
    objects = [given[0], given[1], given[2], *given[1], *given[2], *first[:3]]
    for _ in range(2):  # the first makes the plans
        before = [sys.getrefcount(o) for o in objects]
        for _ in range(5):
            things = *host.forward(*given), *host.backward(*first)
            with pytest.raises(ValueError, match='w: expected'):
                host.forward(*replaced(given, (1, 0), given[1][2]))
            with pytest.raises(ValueError, match='kept: expected'):
                host.backward(*replaced(first, 2, first[0]))
        gc.collect()
    assert [sys.getrefcount(o) for o in objects] == before
    things = [weakref.ref(t) for t in things]
    assert not any(thing() is not None for thing in things)
