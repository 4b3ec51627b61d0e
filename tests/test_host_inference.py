"""The compiled GPU host: which kernels a forward pass takes, and passes without a gradient."""

import host_cases
import pytest
import torch
from conftest import TOLERANCE
from host_cases import FAST_AND_SLOW, MAPS, OPTIONS, assert_same, check, pair, slow, taken, values
from parity import DEVICES, INTERPRETED, assert_interpreted_tests_pass

from dn_mmdet import DNB, DNC

if INTERPRETED:
    import emulated_gpu
pytestmark = host_cases.pytestmark
no_error_of_a_kernel_is_lost = host_cases.no_error_of_a_kernel_is_lost
BY_SAMPLE = 'sample_moments_kernel', 'sample_affine_kernel'
IN_THREE = 'sample_moments_kernel', 'coefficients_kernel', 'affine_kernel'
IN_FOUR = 'moments_kernel', 'statistics_kernel', 'coefficients_kernel', 'affine_kernel'
SAMPLES = {  # what each is there for: batch, channels, height, width
    'one block': (2, 3, 2, 3),
    '1 x 1': (3, 5, 1, 1),
    'blocks of channels, the last not full': (2, 70, 2, 2),
    'more hidden units than a block': (1, 90, 2, 1),
    'several parts': (1, 65, 5, 7),
    'steps within a part': (140, 3, 18, 18),
}


if not INTERPRETED:

    @FAST_AND_SLOW
    def test_in_the_interpreter(marker):
        assert_interpreted_tests_pass(__file__, marker)


# ---------------------------------------------------------------- by the sample


@DEVICES
@pytest.mark.skipif(not INTERPRETED, reason='launches are counted where they are emulated')
def test_how_many_kernels_a_forward_takes(device):
    def launched_by(layer, x):
        with emulated_gpu.launches() as launched:
            layer(x)
        return tuple(launched)

    small, large = values(device, 2, 3, 2, 2), values(device, 1, 3, 41, 40)
    assert launched_by(pair(device)[0], small) == IN_THREE
    assert launched_by(pair(device, training=False)[0], small) == IN_THREE
    assert launched_by(pair(device)[0], large) == IN_FOUR
    standardized, _ = pair(device, inputs='standardized')
    assert launched_by(standardized, small) == IN_FOUR
    assert launched_by(standardized.eval(), small) == IN_THREE
    assert launched_by(pair(device, momentum=None)[0], small) == IN_FOUR
    assert launched_by(pair(device, DNC)[0], small) == IN_FOUR


@DEVICES
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('shape', [(35, 5, 2, 1), (2, 70, 2, 2), (3, 40, 5, 7)], ids=str)
def test_steps_by_the_sample(shape, training, memory_format, device):
    """More samples than a program takes at once, more channels, several steps of columns."""
    layer, twin = pair(device, DNB, shape[1], training)
    check(layer, twin, values(device, *shape).to(memory_format=memory_format), steps=2)


# ---------------------------------------------------------------- inference


def check_inference(layer, twin, x, kernels):
    """y without a gradient, and by which kernels; in another process's GPU, y alone."""
    with torch.no_grad():
        expected = twin(x.double())
        if INTERPRETED:
            with emulated_gpu.launches() as launched:
                y = layer(x)
            assert launched == list(kernels)
        y = layer(x)
    assert not y.requires_grad and y.dtype == x.dtype and y.stride() == x.stride()
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[x.dtype])
    assert taken(layer, x)


@DEVICES
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('inputs', ['raw', 'standardized'])
@pytest.mark.parametrize(
    'name',
    [*(n for n in SAMPLES if 'steps' not in n), pytest.param('steps within a part', marks=slow)],
)
def test_inference_of_small_maps_takes_two_launches(name, inputs, memory_format, device):
    shape = SAMPLES[name]
    layer, twin = pair(
        device,
        DNB,
        shape[1],
        training=False,
        inputs=inputs,
        min_channels=70 if 'hidden' in name else 2,
    )
    x = values(device, *shape).to(memory_format=memory_format)
    check_inference(layer, twin, x, BY_SAMPLE)


@DEVICES
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', ['plain', 'channels_last', 'sliced', 'not aligned', '1 x 1'])
def test_inference_in_every_dtype_and_layout(layout, dtype, device):
    x = MAPS[layout](device).to(dtype)
    layer, twin = pair(device, training=False, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), twin(x.double()), **TOLERANCE[dtype])


@DEVICES
@pytest.mark.parametrize('name', [n for n in OPTIONS if n != 'no averages'])
def test_inference_with_every_option(name, device):
    layer, twin = pair(device, DNB, training=False, **OPTIONS[name])
    check_inference(layer, twin, values(device, 2, 3, 2, 2), BY_SAMPLE)


@DEVICES
def test_inference_that_takes_more_than_two_launches(device):
    """Large maps, statistics of the batch, DN-C, whose g and h no map changes."""
    large = values(device, 1, 2, 41, 40)
    small = values(device, 2, 3, 2, 2)
    check_inference(*pair(device, DNB, 2, training=False), large, IN_FOUR)
    layer, twin = pair(device, track_running_stats=False, training=False)
    check_inference(layer, twin, small, IN_THREE)
    check_inference(*pair(device, DNC, training=False), small, IN_FOUR[1:])


@DEVICES
def test_a_step_of_the_averages_without_a_gradient(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    with torch.no_grad():
        y, expected = layer(x), twin(x)
    assert_same(
        dict(y=y, **dict(layer.named_buffers())), dict(y=expected, **dict(twin.named_buffers())), x
    )


@DEVICES
def test_a_frozen_layer_needs_no_backward_pass(device):
    """Nothing that it is given needs a gradient, though gradients are on."""
    layer, twin = pair(device, training=False)
    for each in (layer, twin):
        each.requires_grad_(False)
    x = values(device, 2, 3, 2, 2)
    y = layer(x)
    assert y.grad_fn is None
    torch.testing.assert_close(y, twin(x).detach())
    check(layer, twin, x)  # x needs one now


@DEVICES
def test_nan_stays_in_its_sample(device):
    layer, twin = pair(device, training=False)
    x = values(device, 3, 3, 2, 2)
    x[1, 2, 0, 0] = float('nan')
    with torch.no_grad():
        y, expected = layer(x), twin(x)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    torch.testing.assert_close(y, expected, equal_nan=True)


@DEVICES
def test_inference_mode(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    expected = twin(x).detach()
    with torch.inference_mode():
        y = layer(x)
        assert y.is_inference()
        torch.testing.assert_close(y.clone(), expected)
        inside = x.clone()
        assert taken(layer, inside) and layer.num_batches_tracked == 2
    with torch.no_grad():
        assert taken(layer, inside)
    with pytest.raises(RuntimeError, match='Inference tensors cannot be saved for backward'):
        layer(inside)
