"""The Triton backend: the kernels of `triton_kernels`, launched from Python.

The primitives and `Coefficients` of the package's docstring. A launch from Python
costs 20 to 40 us of the host's time, more than most maps take a GPU, so that `host` launches
the same kernels from C++ where it was built; this module serves layers whose SC or statistics
are not the plain ones, machines without the compiled host, and Triton's interpreter.
"""

import os

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from . import plans, triton_kernels
from .torch_ops import as_dense, in_layout_of

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}


def check_runs_on(x: Tensor) -> None:
    """Raises ValueError where Triton has nothing to run kernels on x with."""
    if not (x.is_cuda or os.environ.get('TRITON_INTERPRET') == '1'):
        raise ValueError(
            f"backend='triton': expected a tensor on a GPU, got one on "
            f"{x.device}; use backend='auto'"
        )


def shape_of(x: Tensor) -> plans.Shape:
    """Of a dense x (N, C, ...) that is contiguous or channels_last."""
    n, c = x.shape[:2]
    return plans.Shape(n, c, x.numel() // (n * c), not x.is_contiguous(), x.dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = as_dense(x)
    shape = shape_of(x)
    launch, splits, split_size = plans.moments(shape)
    m, v = _small(x, (2, splits, *x.shape[:2]))
    run_launch(launch, dict(x=x, m_part=m, v_part=v))
    if splits == 1:
        return m[0], v[0]
    share = m.new_full((splits, 1, 1), split_size / shape.size)  # no copy: graphs capture it
    share[-1] = 1 - (splits - 1) * split_size / shape.size
    centred = m - m[0]
    rest = (centred * share).sum(0)
    return m[0] + rest, ((v + (centred - rest).square()) * share).sum(0)


def affine(x: Tensor, m: Tensor, a: Tensor, c: Tensor) -> Tensor:
    x = as_dense(x)
    y = torch.empty_like(x)
    run_launch(plans.affine(shape_of(x)), dict(x=x, y=y, m=m, a=a, c=c))
    return y


def reduce(dy: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    x = as_dense(x)
    dy = in_layout_of(x, dy)
    launch, splits, _ = plans.reduce(shape_of(x))
    sums = _small(x, (2, splits, *m.shape))
    run_launch(launch, dict(dy=dy, x=x, m=m, da_part=sums[0], dc_part=sums[1]))
    da, dc = sums.sum(1) if splits > 1 else sums[:, 0]
    return da, dc


def input_gradient(dy: Tensor, x: Tensor, m: Tensor, a: Tensor, p: Tensor, q: Tensor) -> Tensor:
    x = as_dense(x)
    dy = in_layout_of(x, dy)
    dx = torch.empty_like(x)
    run_launch(plans.input_gradient(shape_of(x)), dict(dy=dy, x=x, dx=dx, m=m, a=a, p=p, q=q))
    return dx


class Coefficients:
    """a, c of equation (7) and their gradients; see `torch_ops.Coefficients`.

    Two launches forward, two backward.
    """

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
        shape = plans.Shape(*m.shape, size, False, m.dtype)
        mean, var, momentum = averages or (*(running or (None, None)), 0.0)
        options = plans.Options(
            hidden=len(sc_parameters[1]),
            batch=running is None,
            update=averages is not None,
            cumulative=False,
            shared=batch_shared,
            standardized=standardized,
            bounded=bound is not None,
        )
        given = dict(
            w=w,
            b=b,
            running_mean=mean,
            running_var=var,
            **dict(zip(('w_in', 'b_in', 'w_out', 'b_out'), sc_parameters, strict=True)),
        )
        self.given = {name: t.contiguous() for name, t in given.items() if t is not None}
        missing = {name for name, t in given.items() if t is None} | {'tracked'}
        self.small = plans.SmallPart(shape, options, frozenset(missing))
        self.scalars = dict(eps=eps, momentum=momentum, bound=bound or 0.0)
        self.m = m
        kept = self._allot('m', 'v', 'mu', 'sigma', 'r', 'a', 'c', 'g', 'h', 'up')
        self._run(self.small.statistics(1, size), dict(kept, m_part=m, v_part=v))
        self._run(self.small.coefficients(), kept)
        if averages is not None:  # autograd is to notice, as it does an operator's write
            for t, name in ((mean, 'running_mean'), (var, 'running_var')):
                if self.given[name] is not t:
                    t.copy_(self.given[name])
                else:
                    torch.autograd.graph.increment_version(t)
        self.a, self.c = (kept.pop(name).view_as(m) for name in ('a', 'c'))
        del kept['up']
        self.kept = kept if keep else None

    def backward(self, da: Tensor, dc: Tensor, *parameters: Tensor | None):
        """p, q of equation (8), and the gradients of w, b and SC's four parameters."""
        self.given |= {
            name: t.contiguous()
            for name, t in zip(plans.PARAMETERS, parameters, strict=True)
            if t is not None
        }
        gradients = {
            name: torch.empty_like(self.given[name])
            for name in plans.PARAMETERS
            if name in self.given
        }
        tensors = dict(
            self.kept,
            **{f'd{name}': t for name, t in gradients.items()},
            **self._allot('dmu', 'dsigma', 'dr', 'p', 'q'),
        )
        self._run(
            self.small.output_gradient(1),
            dict(tensors, da_part=da.contiguous(), dc_part=dc.contiguous()),
        )
        self._run(self.small.moments_gradient(), tensors)
        return (
            tensors['p'].view_as(self.m),
            tensors['q'].view_as(self.m),
            *(gradients.get(name) for name in plans.PARAMETERS),
        )

    def _allot(self, *names):
        sizes = self.small.sizes()
        return {name: self.m.new_empty(sizes[name]) for name in names}

    def _run(self, launch, tensors):
        run_launch(launch, dict(self.given, **tensors), self.scalars)


def run_launch(launch: plans.Launch, tensors: dict[str, Tensor], scalars=None) -> None:
    """One kernel, on the current stream. tensors: by the names in a plan; scalars: eps, ...."""
    arguments = dict(launch.constants, ACC=ACCUMULATORS[launch.constants['ACC']])
    for name in plans.argument_names(launch):
        if plans.is_pointer(name):
            t = tensors[name.removesuffix('_ptr')]
            arguments[name] = t if t.dim() > 2 else t.contiguous()
        elif name in plans.SCALARS:
            arguments[name] = _scalar(scalars[name])
        else:
            arguments[name] = launch.numbers[name]
    if launch.registers:
        arguments['maxnreg'] = launch.registers
    first = next(t for t in arguments.values() if isinstance(t, Tensor))
    kernel = getattr(triton_kernels, launch.kernel)
    with torch.cuda.device_of(first):  # Triton launches on the current device
        kernel[(launch.grid,)](**arguments, num_warps=launch.warps, num_stages=2)


def _scalar(value):
    """A float64 argument; Triton's interpreter alone would round it to float32."""
    if os.environ.get('TRITON_INTERPRET') != '1':
        return float(value)
    from triton.runtime.interpreter import TensorHandle

    return tl.tensor(TensorHandle(np.array([value], np.float64), tl.float64), tl.float64)


def _small(x, shape):
    return torch.empty(shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
