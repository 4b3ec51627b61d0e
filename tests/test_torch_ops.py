"""The torch backend is as accurate as plain PyTorch in every dtype, shape and layout."""
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
    assert_as_accurate_as_plain_pytorch,
    assert_equals_reference,
    assert_primitives,
    make_layer,
    step,
)

from dn_mmdet.kernels import torch_ops

DEVICES = ['cpu', CUDA]
DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16],
                                 ids=['fp32', 'fp16', 'bf16'])
CASES = [((3, 5, 7, 3), 'channels_last'), ((2, 7, 13, 11), 'transposed'),
         ((4, 6, 1, 1), 'contiguous'), ((1, 4, 9, 5), 'contiguous'),
         ((2, 3, 41, 37), 'contiguous'), ((2, 3, 41, 37), 'channels_last')]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('shape, layout', CASES, ids=str)
@DTYPES
@MODES
@pytest.mark.parametrize('kind', KINDS)
def test_errors_are_within_twice_plain_pytorchs(kind, training, dtype, shape, layout, device):
    assert_as_accurate_as_plain_pytorch('torch', kind, shape, layout, dtype, training, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('layout', LAYOUTS)
@DTYPES
@MODES
@pytest.mark.parametrize('kind', KINDS)
def test_also_where_the_mean_is_large(kind, training, dtype, layout, device):
    assert_as_accurate_as_plain_pytorch('torch', kind, (4, 5, 12, 11), layout, dtype, training,
                                        device, offset=OFFSETS[dtype])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [False, True], ids=['centred', 'large-mean'])
@pytest.mark.parametrize('dtype', OFFSETS, ids=str)
@pytest.mark.parametrize('shape', [(3, 5, 7), (3, 5, 7, 3), (2, 7, 47, 43), (2, 3, 3, 4, 5)],
                         ids=str)
def test_each_primitive_in_each_layout(shape, dtype, offset, device):
    offset = OFFSETS[dtype] if offset else 0.
    x = (torch.randn(shape, device=device) + offset).to(dtype)
    assert_primitives(torch_ops, x, offset)
    assert_primitives(torch_ops, x.mT.contiguous().mT, offset)
    if x.dim() > 3:
        memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        assert_primitives(torch_ops, x.contiguous(memory_format=memory_format), offset)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_gradient_of_any_strides(layout, close):
    x, a, dy = torch.randn(3, 4, 6, 5, 7, dtype=torch.float64)
    x = LAYOUTS[layout](x)
    m = torch.randn(4, 6, dtype=torch.float64)
    for view in (dy, dy.mT.contiguous().mT, dy[:1].expand_as(dy), dy[:, :, :1, :1].expand_as(dy),
                 dy.contiguous(memory_format=torch.channels_last)):
        expected = torch_ops.reduce(view.contiguous(), x.contiguous(), m)
        for actual, wanted in zip(torch_ops.reduce(view, x, m), expected, strict=True):
            close(actual, wanted)
        coefficients = torch.randn(3, 4, 6, dtype=torch.float64)
        close(torch_ops.input_gradient(view, x, m, *coefficients),
              torch_ops.input_gradient(view.contiguous(), x.contiguous(), m, *coefficients))


@MODES
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kind', KINDS)
def test_nothing_reads_uninitialised_memory(kind, layout, training):
    layer = make_layer(kind, 5, 'torch', training)
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


@given(n=st.integers(1, 5), c=st.integers(1, 9), height=st.integers(1, 40),
       width=st.integers(1, 40), kind=st.sampled_from(list(KINDS)), training=st.booleans(),
       layout=st.sampled_from(list(LAYOUTS)))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_shape(n, c, height, width, kind, training, layout):
    if training and n * height * width == 1:
        height = 2  # BatchNorm needs more than one value per channel
    x = LAYOUTS[layout](torch.randn(n, c, height, width, dtype=torch.float64))
    assert_equals_reference('torch', kind, x, training)
