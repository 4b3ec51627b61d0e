"""The compiled GPU host: maps of every layout, parameters of every dtype, every option."""

import host_cases
import pytest
import torch
from host_cases import (
    FAST_AND_SLOW,
    KINDS,
    MAPS,
    MODES,
    OPTIONS,
    check,
    pair,
    slow,
    taken,
    twin_of,
    values,
)
from parity import DEVICES, INTERPRETED, assert_interpreted_tests_pass
from torch import nn

from dn_mmdet import DNB, DNC, DNB1d, DNB3d, DNC1d, DNC3d

pytestmark = host_cases.pytestmark
no_error_of_a_kernel_is_lost = host_cases.no_error_of_a_kernel_is_lost
CLASSES = {2: (DNB1d, DNC1d), 3: (DNB1d, DNC1d), 4: (DNB, DNC), 5: (DNB3d, DNC3d)}


if not INTERPRETED:

    @FAST_AND_SLOW
    def test_in_the_interpreter(marker):
        assert_interpreted_tests_pass(__file__, marker)


# ---------------------------------------------------------------- maps


@DEVICES
@pytest.mark.parametrize('layout', MAPS)
def test_every_layout(layout, device):
    x = MAPS[layout](device)
    if 'not aligned' in layout:
        assert x.data_ptr() % 16
    cls, cls_c = CLASSES[x.dim()]
    check(*pair(device, cls, x.shape[1]), x)
    check(*pair(device, cls_c, x.shape[1], training=False), x)


@DEVICES
@slow
@KINDS
@MODES
@pytest.mark.parametrize('layout', [name for name in MAPS if name[1] != '-'])
def test_every_layout_of_2d_maps_in_every_layer(layout, training, cls, kwargs, device):
    x = MAPS[layout](device)
    check(*pair(device, cls, x.shape[1], training, **kwargs), x)


@DEVICES
@pytest.mark.parametrize('layout', ['sliced', 'channels_last'])
def test_gradients_of_any_layout(layout, device):
    """dy expanded (as of a sum), sliced, of the other memory format or not aligned."""
    layer, twin = pair(device)
    x = MAPS[layout](device).requires_grad_()
    wide = x.detach().requires_grad_()
    y, expected = layer(x), twin(wide)
    n = y.numel()
    for dy in (
        torch.ones((), device=device, dtype=x.dtype).expand(y.shape),
        values(device, *y.shape[:3], 2 * y.shape[3])[..., ::2],
        values(device, *y.shape).contiguous(),
        values(device, n + 1)[1:].view(y.shape),
    ):
        actual, wanted = (
            torch.autograd.grad(t, leaf, dy, retain_graph=True)[0]
            for t, leaf in ((y, x), (expected, wide))
        )
        torch.testing.assert_close(actual, wanted)


@DEVICES
def test_an_empty_batch(device):
    layer, twin = pair(device)
    check(layer, twin, torch.zeros(0, 3, 2, 2, dtype=torch.float64, device=device), host=False)


@DEVICES
def test_a_negated_view(device):
    layer, twin = pair(device)
    x = torch.randn(2, 3, 2, 2, dtype=torch.complex128, device=device).conj().imag
    assert x.is_neg() and not taken(layer, x)
    check(layer, twin, x, host=False)
    y, expected = layer(-x), twin(-x)
    dy = torch.randn(2, 3, 2, 2, dtype=torch.complex128, device=device).conj().imag
    for actual, wanted in zip(
        torch.autograd.grad(y, list(layer.parameters()), dy),
        torch.autograd.grad(expected, list(twin.parameters()), dy),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


@DEVICES
def test_a_zero_tensor_has_no_memory_to_read(device):
    layer, twin = pair(device)
    x = torch._efficientzerotensor((2, 3, 2, 2), dtype=torch.float64, device=device)
    assert x._is_zerotensor() and not taken(layer, x)
    check(layer, twin, x, host=False)
    dense = torch.randn(2, 3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    y = layer(dense)
    y.backward(x)
    assert not dense.grad.any() and not any(p.grad.any() for p in layer.parameters())


@DEVICES
def test_more_values_in_a_channel_than_its_numbers_hold(device):
    """The sizes of a launch are of 32 bits; the general path passes others on."""
    layer, _ = pair(device, channels=1)
    x = torch.zeros((), dtype=torch.float16, device=device).expand(1, 1, 2**16, 2**15)
    assert not taken(layer, x)


# ---------------------------------------------------------------- parameters


@DEVICES
@pytest.mark.parametrize(
    'x_dtype, dtype',
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float64),
    ],
    ids=str,
)
def test_parameters_of_another_dtype(x_dtype, dtype, device):
    layer, twin = pair(device, dtype=dtype)
    check(layer, twin, values(device, 3, 3, 2, 2).to(x_dtype))


@DEVICES
def test_each_part_of_another_dtype(device):
    layer, _ = pair(device, dtype=torch.float32)
    layer.sc.w_in.data = layer.sc.w_in.data.half()
    layer.sc.b_out.data = layer.sc.b_out.data.bfloat16()
    layer.bn.bias.data = layer.bn.bias.data.double()
    layer.bn.running_var = layer.bn.running_var.double()
    twin = twin_of(layer)
    check(layer, twin, values(device, 3, 3, 2, 2).float())
    check(layer.eval(), twin.eval(), values(device, 3, 3, 2, 2).float())


def move_into(layer, place):
    for module in (layer.bn, layer.sc):
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(place(p.detach())))
    return layer


@DEVICES
@KINDS
def test_parameters_that_are_not_contiguous(cls, kwargs, device):
    layer, twin = pair(device, cls, **kwargs)

    def place(t):
        spread = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2]
        return spread.copy_(t)

    move_into(layer, place)
    assert not any(p.is_contiguous() for p in layer.parameters())
    check(layer, twin, values(device, 2, 3, 2, 2))


@DEVICES
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_parameters_in_one_flat_buffer(dtype, device):
    layer, twin = pair(device, dtype=dtype)
    flat = torch.zeros(1000, dtype=dtype, device=device)
    at = [1]

    def place(t):
        view = flat[at[0] : at[0] + t.numel()].view(t.shape).copy_(t)
        at[0] += t.numel() + t.numel() % 2  # the next is at an odd place again
        return view

    move_into(layer, place)
    for name in ('running_mean', 'running_var'):
        setattr(layer.bn, name, place(getattr(layer.bn, name)))
    assert all(p.data_ptr() % 16 for p in layer.parameters())
    check(layer, twin, values(device, 2, 3, 2, 2).to(torch.float32), steps=2)


@DEVICES
@pytest.mark.parametrize('name', OPTIONS)
def test_every_option(name, device):
    x = values(device, 3, 3, 2, 2)
    check(*pair(device, DNB, **OPTIONS[name]), x, steps=2)
    check(*pair(device, DNC, training=False, **OPTIONS[name]), x)


@DEVICES
@slow
@KINDS
@MODES
@pytest.mark.parametrize('name', OPTIONS)
def test_every_option_of_every_layer(name, training, cls, kwargs, device):
    check(
        *pair(device, cls, training=training, **kwargs, **OPTIONS[name]),
        values(device, 3, 3, 2, 2),
        steps=2,
    )


@DEVICES
@KINDS
@pytest.mark.parametrize('missing', ['weight', 'bias'])
def test_only_one_of_weight_and_bias(missing, cls, kwargs, device):
    layer, _ = pair(device, cls, **kwargs)
    setattr(layer.bn, missing, None)
    check(layer, twin_of(layer), values(device, 2, 3, 2, 2))


@DEVICES
@MODES
def test_without_a_counter(training, device):
    layer, _ = pair(device, training=training)
    layer.bn.num_batches_tracked = None
    check(layer, twin_of(layer), values(device, 2, 3, 2, 2), steps=2)


@DEVICES
def test_cumulative_without_a_counter(device):
    """Torch's rule there: the averages stay."""
    layer, _ = pair(device, momentum=None)
    layer.bn.num_batches_tracked = None
    check(layer, twin_of(layer), values(device, 2, 3, 2, 2), host=False)


@DEVICES
def test_averages_that_are_there_and_not_tracked(device):
    """In training nothing moves; eval mode uses them."""
    layer, _ = pair(device)
    layer.track_running_stats = False
    twin = twin_of(layer)
    before = layer.running_mean.clone()
    check(layer, twin, values(device, 2, 3, 2, 2))
    assert torch.equal(layer.running_mean, before) and layer.num_batches_tracked == 0
    check(layer.eval(), twin.eval(), values(device, 2, 3, 2, 2))


@DEVICES
def test_averages_that_are_a_lazy_copy(device):
    """What they were copied from keeps its values."""
    layer, twin = pair(device)
    first = layer.running_mean
    before = first.clone()
    layer.bn.running_mean = torch._lazy_clone(first)
    check(layer, twin, values(device, 2, 3, 2, 2))
    assert torch.equal(first, before)


@DEVICES
def test_averages_that_were_removed(device):
    layer, _ = pair(device, training=False)
    layer.bn.running_mean = layer.bn.running_var = None
    check(layer, twin_of(layer), values(device, 2, 3, 2, 2))


@DEVICES
def test_numbers_and_flags_can_be_changed(device):
    """Nothing of the first call sticks."""
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    check(layer, twin, x)
    for each in (layer, twin):
        each.eps, each.momentum, each.sc.bound = 0.5, 0.7, 2.0
    check(layer, twin, x)
    for each in (layer, twin):
        each.sc.inputs, each.sc.bound = 'standardized', None
        each.bn.eval()  # norm_eval
    check(layer, twin, x)


@DEVICES
@pytest.mark.parametrize('flag', ['training', 'track_running_stats'])
def test_a_flag_that_is_true_without_being_True(flag, device):
    layer, twin = pair(device)
    for each in (layer, twin):
        setattr(each.bn, flag, 1)
    x = values(device, 2, 3, 2, 2)
    torch.testing.assert_close(layer(x), twin(x))
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
