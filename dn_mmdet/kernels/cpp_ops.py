"""The four primitives, compiled for CPUs; see the package's docstring.

Stock operators pay on small maps for each of the thirty that a layer needs, and read large
ones more often than necessary. Compiled are contiguous maps of float32 and float64; any
others, and GPUs, run through `torch_ops`.
"""

import torch
from torch import Tensor

from . import _cpp, torch_ops
from ._cpp import affine as _affine
from ._cpp import coefficients, coefficients_backward
from ._cpp import fits as fits
from ._cpp import infer as _infer
from ._cpp import input_gradient as _input_gradient
from ._cpp import moments as _moments
from ._cpp import reduce as _reduce

INTERFACE = 1  # cpu.cpp's
if getattr(_cpp, 'INTERFACE', None) != INTERFACE:
    raise ImportError(f'{_cpp.__file__} was built from other sources of this package')
COMPILED = (torch.float32, torch.float64)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = torch_ops.as_dense(x)
    return _moments(x) if _is_compiled(x) else torch_ops.moments(x)


def affine(x: Tensor, m: Tensor, a: Tensor, c: Tensor) -> Tensor:
    x = torch_ops.as_dense(x)
    if not _is_compiled(x):
        return torch_ops.affine(x, m, a, c)
    return _affine(x, m.contiguous(), a.contiguous(), c.contiguous())


def reduce(dy: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    x = torch_ops.as_dense(x)
    if not _is_compiled(x):
        return torch_ops.reduce(dy, x, m)
    return _reduce(dy.contiguous(), x, m.contiguous())


def input_gradient(dy: Tensor, x: Tensor, m: Tensor, a: Tensor, p: Tensor, q: Tensor) -> Tensor:
    x = torch_ops.as_dense(x)
    if not _is_compiled(x):
        return torch_ops.input_gradient(dy, x, m, a, p, q)
    return _input_gradient(dy.contiguous(), x, *(t.contiguous() for t in (m, a, p, q)))


def infer(
    x: Tensor, running, w, b, sc_parameters, *, eps, bound, standardized, batch_shared
) -> Tensor | None:
    """y where statistics are the running ones and nothing needs a gradient, at one call.

    None where x is not of the compiled kind.
    """
    if not _is_compiled(x):
        return None
    return _infer(x, *running, w, b, sc_parameters, eps, bound, standardized, batch_shared)


class Coefficients:
    """a, c of equation (7) and their gradients; see `torch_ops.Coefficients`."""

    def __init__(
        self,
        m,
        v,
        size,
        running,
        averages,
        w,
        b,
        sc_parameters,
        *,
        eps,
        bound,
        standardized,
        batch_shared,
        keep,
    ):
        self.a, self.c, *kept = coefficients(
            m,
            v,
            size,
            *(running or (None, None)),
            *(averages or (None, None, 0.0)),
            w,
            b,
            sc_parameters,
            eps,
            bound,
            standardized,
            batch_shared,
        )
        self.m = m
        if keep:
            self.kept = kept
            self.size = size
            self.options = eps, bound, standardized, batch_shared, running is None

    def backward(self, da: Tensor, dc: Tensor, *parameters: Tensor | None):
        """p, q of equation (8), and the gradients of w, b and SC's four parameters."""
        w, b, *sc_parameters = parameters
        p, q, *gradients = coefficients_backward(
            da, dc, self.m, self.a, *self.kept, self.size, w, b, sc_parameters, *self.options
        )
        return (
            p,
            q,
            *(
                d if d is None or d.dtype == like.dtype else d.to(like.dtype)
                for d, like in zip(gradients, parameters, strict=True)
            ),
        )


def check_runs_on(x: Tensor) -> None:
    """Raises ValueError for tensors that are not on a CPU."""
    if not x.is_cpu:
        raise ValueError(
            f"backend='cpp': expected a tensor on a CPU, got one on {x.device}; use backend='auto'"
        )


def _is_compiled(x):
    return x.dtype in COMPILED and x.is_cpu and x.is_contiguous()
