"""Dynamic Normalization in three plain lines of PyTorch: the specification.

Never optimised. Every backend is tested against it, and it runs wherever
autograd has to see each operation (export, transforms, double backward).
"""
import torch
from torch import Tensor


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each sample's channel, in float32 at least.

    Shape: x (N, C, ...) -> m, v (N, C). A 2-d x has one value per channel, so
    its variance is zero; of no value at all, both are zero.
    """
    x = widen(x)
    if x.dim() == 2:
        return x, torch.zeros_like(x)
    spatial = tuple(range(2, x.dim()))
    if x.numel() == 0:  # sums, not NaN, and still part of the graph
        return x.sum(spatial), x.sum(spatial)
    return x.mean(spatial), x.var(spatial, correction=0)


def normalize(x: Tensor, mu: Tensor, sigma: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """``z = w (x - mu) / sigma + b``: BatchNorm, given its statistics (C,)."""
    mu, sigma, w, b = (_over(x, t) for t in (mu, sigma, w, b))
    return w * (widen(x) - mu) / sigma + b


def modulate(z: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """``y = (1 + g) z + h``, with g and h (N, C) in DN-B and (1, C) in DN-C."""
    return (1 + _over(z, g)) * z + _over(z, h)


def widen(x: Tensor) -> Tensor:
    """x in float32 at least: float16 and bfloat16 lose the statistics."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over(x, t):
    """(C,) or (N, C) coefficients, to be broadcast over x's spatial positions."""
    return t.view(-1, x.shape[1], *(1, ) * (x.dim() - 2))
