"""Dynamic Normalization in plain PyTorch: the specification.

Source: Liu, Gao, Lv, "Dynamic Normalization", arXiv 2101.06073. Only its abstract is public
as text. Where it leaves something open, this is this project's own design.

The function `dynamic_norm` is the whole specification, and is never optimised. Every backend is
tested against it. It runs wherever autograd has to see each operation (export, transforms,
double backward).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Statistics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def batch_statistics(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """mu, var (C,) by equations (1) and (2); for an empty batch, zeros and not NaN."""
    if m.numel() == 0:
        return m.sum(0), v.sum(0)
    mu = m.mean(0)
    return mu, (v + (m - mu).square()).mean(0)


def dynamic_norm(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    sc: nn.Module,
    *,
    eps: float,
    batch_shared: bool,
    statistics: Statistics = batch_statistics,
) -> Tensor:
    """DN-B or DN-C of a map x (N, C, ...).

    With ``m, v`` (N, C) the mean and population variance of each sample's channel and
    ``s = sqrt(v + eps)``::

        mu  = mean_n m                                                          (1)
        var = mean_n v + mean_n (m - mu)^2                                      (2)
        z   = w (x - mu) / sigma + b,  sigma = sqrt(var + eps)    BatchNorm     (3)
        g, h = SC(m', s')                            DN-B, (N, C) each          (4)
        g, h = SC(mu, sigma)                         DN-C, (1, C) each          (5)
        y   = (1 + g) z + h                                                     (6)

    ``m', s'`` are ``m, s`` themselves (``inputs='raw'``) or ``(m - mu) / sigma`` and
    ``s / sigma - 1`` (``'standardized'``).

    Args:
        w, b: (C,), BatchNorm's weight and bias; None for ones and zeros.
        sc: the SC module.
        batch_shared: False for DN-B (4), True for DN-C (5).
        statistics: a function that returns mu and var (C,) for m and v. If a BatchNorm uses
            its running statistics, or those of several processes, it returns these.

    Shape: x (N, C, ...) -> the same, in the dtype of x.
    """
    m, v = moments(x)
    mu, var = statistics(m, v)
    sigma = torch.sqrt(var + eps)
    z = normalize(x, mu, sigma, *affine_parameters(w, b, like=mu))
    g, h = call_sc(sc, m, v, mu, sigma, eps, batch_shared)
    return modulate(z, g, h).to(x.dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each sample's channel, in float32 at least.

    Shape: x (N, C, ...) -> m, v (N, C). A 2-d x has one value per channel, so
    its variance is zero. If x has no values, both are zero.
    """
    x = widen(x)
    if x.dim() == 2:
        return x, torch.zeros_like(x)
    spatial = tuple(range(2, x.dim()))
    if x.numel() == 0:  # sums, not NaN, and still part of the graph
        return x.sum(spatial), x.sum(spatial)
    return x.mean(spatial), x.var(spatial, correction=0)


def normalize(x: Tensor, mu: Tensor, sigma: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """``z = w (x - mu) / sigma + b`` (3): BatchNorm with the given statistics (C,)."""
    mu, sigma, w, b = (_over(x, t) for t in (mu, sigma, w, b))
    return w * (widen(x) - mu) / sigma + b


def call_sc(
    sc: nn.Module,
    m: Tensor,
    v: Tensor,
    mu: Tensor,
    sigma: Tensor,
    eps: float,
    batch_shared: bool,
) -> tuple[Tensor, Tensor]:
    """g, h by equation (4), (N, C) each, or (5), (1, C) each.

    Raises:
        RuntimeError: the outputs of sc have a wrong shape, and would be broadcast.
    """
    if batch_shared:
        inputs = mu[None], sigma[None]
    else:
        s = torch.sqrt(v + eps)
        inputs = (m, s) if sc.inputs == 'raw' else ((m - mu) / sigma, s / sigma - 1)
    g, h = sc(*inputs)
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        for name, t in (('g', g), ('h', h)):
            if t.shape != inputs[0].shape:
                raise RuntimeError(
                    f'{name}, made by {type(sc).__name__}, should have the shape '
                    f'{tuple(inputs[0].shape)} not {tuple(t.shape)}'
                )
    return g, h


def modulate(z: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """``y = (1 + g) z + h`` (6), with g and h (N, C) in DN-B and (1, C) in DN-C."""
    return (1 + _over(z, g)) * z + _over(z, h)


def affine_parameters(w: Tensor | None, b: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """w and b in the dtype of `like` (C,), or ones and zeros where a norm has none."""
    return (
        torch.ones_like(like) if w is None else w.to(like.dtype),
        torch.zeros_like(like) if b is None else b.to(like.dtype),
    )


def widen(x: Tensor) -> Tensor:
    """x in float32 at least, because float16 and bfloat16 lose the statistics."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over(x, t):
    """(C,) or (N, C) coefficients, to be broadcast over x's spatial positions."""
    return t.view(-1, x.shape[1], *(1,) * (x.dim() - 2))
