"""The specification, against numpy in float64 and against torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import awake

from dn_mmdet import SC, reference


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


@pytest.mark.parametrize(
    'batch_shared, inputs', [(False, 'raw'), (False, 'standardized'), (True, 'raw')]
)
@pytest.mark.parametrize('affine', [True, False])
def test_dynamic_norm_is_the_equations_written_as_loops(batch_shared, inputs, affine, close):
    N, C, eps = 4, 3, 1e-3
    x = torch.randn(N, C, 5, 6, dtype=torch.float64) * 2 + 1
    sc = awake(SC(C, inputs=inputs, dtype=torch.float64))
    w, b = torch.randn(2, C, dtype=torch.float64) if affine else (None, None)
    y = reference.dynamic_norm(x, w, b, sc, eps=eps, batch_shared=batch_shared)

    values = x.numpy()
    mu, var = values.mean((0, 2, 3)), values.var((0, 2, 3))  # of the whole batch at once
    sigma = np.sqrt(var + eps)
    weights = [getattr(sc, name).detach().numpy() for name in ('w_in', 'b_in', 'w_out', 'b_out')]
    for n in range(N):
        m, s = values[n].mean((1, 2)), np.sqrt(values[n].var((1, 2)) + eps)
        if batch_shared:
            m, s = mu, sigma
        elif inputs == 'standardized':
            m, s = (m - mu) / sigma, s / sigma - 1
        hidden = np.maximum(weights[0] @ np.concatenate((m, s)) + weights[1], 0)
        made = sc.bound * np.tanh(weights[2] @ hidden + weights[3])
        for c in range(C):
            z = (values[n, c] - mu[c]) / sigma[c]
            if affine:
                z = w[c].item() * z + b[c].item()
            close(y[n, c], torch.from_numpy((1 + made[c]) * z + made[C + c]))


def test_dynamic_norm_by_given_statistics(close):
    x, sc = torch.randn(4, 3, 5, 6, dtype=torch.float64), SC(3, dtype=torch.float64)
    mean, var = torch.rand(2, 3, dtype=torch.float64)
    y = reference.dynamic_norm(
        x, None, None, sc, eps=1e-5, batch_shared=False, statistics=lambda m, v: (mean, var)
    )
    close(y, F.batch_norm(x, mean, var))  # a fresh SC
