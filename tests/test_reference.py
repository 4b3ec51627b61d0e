"""The three plain lines, against numpy in float64 and against torch."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dn_mmdet import reference


@pytest.mark.parametrize('shape', [(3, 5), (3, 5, 7), (3, 5, 4, 7), (2, 3, 2, 3, 4), (2, 3, 1, 1)])
def test_moments_are_numpys_mean_and_population_variance(shape, close):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    m, v = reference.moments(x)
    values = x.numpy().reshape(*shape[:2], -1)
    close(m, torch.from_numpy(values.mean(-1)))
    close(v, torch.from_numpy(values.var(-1)))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_moments_are_float32_at_least(dtype, close):
    x = (torch.randn(2, 3, 40, 40) * 100).to(dtype)  # the sum of squares overflows float16
    m, v = reference.moments(x)
    assert m.dtype == v.dtype == torch.float32
    exact = x.double().flatten(2)
    close(m.double(), exact.mean(-1), torch.float32)
    close(v.double(), exact.var(-1, correction=0), torch.float32)


def test_moments_keep_a_small_variance_beside_a_large_mean():
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64) + 1e4
    v = reference.moments(x.float())[1]
    exact = x.float().double().flatten(2).var(-1, correction=0)
    torch.testing.assert_close(v.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize('shape', [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3)])
def test_moments_of_no_value_are_zero(shape):
    x = torch.zeros(shape, requires_grad=True)
    m, v = reference.moments(x)
    assert m.shape == v.shape == shape[:2]
    assert not m.any() and not v.any()
    assert m.requires_grad  # else a process with an empty batch would miss the all-reduce


def test_normalize_is_batch_norms_formula(close):
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    mu, var, w, b = torch.rand(4, 3, dtype=torch.float64) + 0.1
    expected = F.batch_norm(x, mu, var, w, b, training=False, eps=1e-3)
    close(reference.normalize(x, mu, torch.sqrt(var + 1e-3), w, b), expected)


@pytest.mark.parametrize('samples', [1, 4])
def test_modulate_takes_coefficients_of_each_sample_or_of_the_batch(samples, close):
    z = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    g, h = torch.randn(2, samples, 3, dtype=torch.float64)
    expected = np.empty_like(z.numpy())
    for n in range(4):
        for c in range(3):
            i = n % samples
            expected[n, c] = (1 + g[i, c].item()) * z[n, c].numpy() + h[i, c].item()
    close(reference.modulate(z, g, h), torch.from_numpy(expected))
