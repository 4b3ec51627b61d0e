"""A layer as operators of torch.library, so that a compiled model calls the fused kernels.

`torch.compile` cannot look into compiled kernels; it keeps an operator whose output sizes and
gradient it is told. There are three::

    dynamic_norm(x, ...) -> y, kept            which leaves the running averages as they are
    dynamic_norm_step(x, ...) -> y, kept       the same, and a step of the running averages
    dynamic_norm_backward(dy, x, kept, ...)    -> the gradients of x, w, b and SC's parameters

A step writes to the averages, as its schema says. torch.library takes no autograd formula of
an operator that writes, so that the formula is registered here in the way that it does it
itself. What is kept for the backward pass is one flat tensor, by `kept_sizes`. A gradient that
is missing or not wanted is an empty tensor.

``kernels`` is 'triton', a GPU's kernels, or 'cpp', the kernels for CPUs. The former are launched
by the compiled host where it was built and knows this Triton, and from Python elsewhere.
"""

import functools
import operator

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _after_autograd_keyset, _AutoDispatchBelowAutograd

from .choice import gpu_host
from .torch_ops import as_dense, in_layout_of

PARAMETERS = ('w', 'b', 'w_in', 'b_in', 'w_out', 'b_out')
STATE = ('running_mean', 'running_var', 'tracked')
_PARAMETERS = 'Tensor? w, Tensor? b, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out'
_OPTIONS = (
    'float eps, float? bound, bool batch, bool batch_shared, bool standardized, '
    'bool keep, str kernels'
)
_library = torch.library.Library('dn_mmdet', 'DEF')
for _schema in (
    f'dynamic_norm(Tensor x, {_PARAMETERS}, Tensor? running_mean, Tensor? running_var, '
    f'{_OPTIONS}) -> (Tensor y, Tensor kept)',
    # without momentum: the cumulative average
    f'dynamic_norm_step(Tensor x, {_PARAMETERS}, Tensor(a!) running_mean, '
    f'Tensor(b!) running_var, Tensor(c!)? tracked, float? momentum, {_OPTIONS}) '
    f'-> (Tensor y, Tensor kept)',
    f'dynamic_norm_backward(Tensor dy, Tensor x, Tensor kept, {_PARAMETERS}, {_OPTIONS}, '
    f'bool x_needs_gradient) -> (Tensor dx, Tensor dw, Tensor db, Tensor dw_in, '
    f'Tensor db_in, Tensor dw_out, Tensor db_out)',
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def kept_sizes(kernels: str, n, c, hidden: int, batch_shared: bool) -> dict:
    """The sizes of what is kept for the backward pass; n may be a symbol.

    For Triton's kernels as `plans.Plan` lays it out.
    """
    rows = 1 if batch_shared else n
    if kernels == 'triton':
        return dict(
            dict.fromkeys(('m', 'v', 'a', 'g', 'h'), (n * c,)),
            mu=(c,),
            sigma=(c,),
            r=(rows * (-(-hidden // 4) * 4),),
        )
    return dict(
        m=(n, c),
        a=(n, c),
        mu=(c,),
        sigma=(c,),
        inputs=(rows, 2 * c),
        hidden=(rows, hidden),
        out=(rows, 2 * c),
    )


def _places(sizes):
    """Where each of the sizes begins and how long it is in one flat tensor; and its length."""
    places, at = [], 0
    for size in sizes.values():
        length = functools.reduce(operator.mul, size)
        places.append((at, length))
        at += (length + 3) // 4 * 4  # 16 bytes at least
    return places, at


def unpack(kept: Tensor, sizes: dict) -> dict[str, Tensor]:
    """name -> a view of its part of what was kept."""
    return {
        name: kept[at : at + length].view(size)
        for (name, size), (at, length) in zip(sizes.items(), _places(sizes)[0], strict=True)
    }


# ---------------------------------------------------------------- what runs


def _forward(x, *args):
    parameters, running, options = args[:6], args[6:8], args[8:]
    return _run(x, parameters, (*running, None), None, *options)


def _step(x, *args):
    parameters, state, (momentum, *options) = args[:6], args[6:9], args[9:]
    return _run(x, parameters, state, (momentum,), *options)


def _run(x, parameters, state, step, eps, bound, batch, batch_shared, standardized, keep, kernels):
    """y and what is kept. step: None, or the momentum, itself None for a cumulative average."""
    x = as_dense(x)
    host = _host_for(kernels, x.device.type)
    if host is not None:
        mode = _mode(host, batch, batch_shared, standardized, bound)
        if step:
            mode |= host.UPDATE if step[0] is not None else host.UPDATE | host.CUMULATIVE
        found = host.forward(
            x,
            parameters,
            state,
            mode if keep else mode | host.INFERENCE,
            eps,
            (step and step[0]) or 0.0,
            bound or 0.0,
        )
        if found is not None:
            return found
    run = _run_triton if kernels == 'triton' else _run_cpp
    y, kept = run(
        x,
        parameters,
        state,
        step,
        keep,
        dict(eps=eps, bound=bound, batch_shared=batch_shared, standardized=standardized),
        batch,
    )
    for t in state if step else ():  # autograd is to notice, as it does an operator's write
        if t is not None and not t.is_inference():
            torch.autograd.graph.increment_version(t)
    return y, kept if keep else x.new_empty(0, dtype=_wide(x))


def _host_for(kernels, device):
    """The module that launches the kernels from C++, or None."""
    if kernels != 'triton' or device != 'cuda':
        return None
    return gpu_host()


def _mode(host, batch, batch_shared, standardized, bound):
    return (
        (host.BATCH if batch else 0)
        | (host.SHARED if batch_shared else 0)
        | (host.STANDARDIZED if standardized else 0)
        | (0 if bound is None else host.BOUNDED)
    )


def _run_triton(x, parameters, state, step, keep, options, batch):
    given = {**_given(parameters), **_present(STATE, state)}
    plan = _plan(x, given, batch, step, options, inference=not keep)
    y, kept = torch.empty_like(x), x.new_empty(plan.kept_size, dtype=_wide(x))
    scratch = kept.new_empty(plan.scratch_size)
    tensors = dict(
        given, x=x, y=y, **_parts(plan, kept, plan.kept), **_parts(plan, scratch, plan.scratch)
    )
    _launch(plan.forward, tensors, options, (step and step[0]) or 0.0)
    return y, kept


def _run_cpp(x, parameters, state, step, keep, options, batch):
    from . import cpp_ops

    w, b, *sc = parameters
    mean, var, tracked = state
    running = None if batch else (mean, var)
    if not keep and running:
        y = cpp_ops.infer(x, running, w, b, sc, **options)
        if y is not None:
            return y, None
    if options['batch_shared'] and running:  # nothing depends on m, v: see functional._moments
        m = mean.to(_wide(x)).expand(x.shape[:2]).contiguous()
        v = torch.zeros_like(m)
    else:
        m, v = cpp_ops.moments(x)
    averages = (None, None, 0.0)
    if step:
        if tracked is not None:
            tracked.add_(1)
        averages = mean, var, 1 / tracked.item() if step[0] is None else step[0]
    a, c, *rest = cpp_ops.coefficients(
        m,
        v,
        x.numel() // m.numel(),
        *(running or (None, None)),
        *averages,
        w,
        b,
        sc,
        *(options[name] for name in ('eps', 'bound', 'standardized', 'batch_shared')),
    )
    y = cpp_ops.affine(x, m, a, c)
    if not keep:
        return y, None
    sizes = kept_sizes('cpp', *x.shape[:2], len(sc[1]), options['batch_shared'])
    kept = m.new_zeros(_places(sizes)[1])
    for part, t in zip(unpack(kept, sizes).values(), (m, a, *rest), strict=True):
        part.copy_(t)
    return y, kept


def _backward(dy, x, kept, *args):
    parameters, (eps, bound, batch, batch_shared, standardized, _, kernels, x_needs_gradient) = (
        args[:6],
        args[6:],
    )
    x = as_dense(x)
    host = _host_for(kernels, x.device.type)
    found = host and host.backward(
        dy,
        x,
        kept,
        parameters,
        _mode(host, batch, batch_shared, standardized, bound),
        eps,
        bound or 0.0,
        x_needs_gradient,
    )
    if found is None:
        run = _run_triton_backward if kernels == 'triton' else _run_cpp_backward
        dx, gradients = run(
            in_layout_of(x, dy),
            x,
            kept,
            parameters,
            dict(eps=eps, bound=bound, batch_shared=batch_shared, standardized=standardized),
            batch,
            x_needs_gradient,
        )
        found = (
            dx,
            *(
                d if t is None else d.to(t.dtype)
                for d, t in zip(gradients, parameters, strict=True)
            ),
        )
    return tuple(x.new_empty(0) if d is None else d for d in found)


def _run_triton_backward(dy, x, kept, parameters, options, batch, x_needs_gradient):
    given = _given(parameters)
    state = {} if batch else dict.fromkeys(STATE[:2], kept)  # a plan's; no kernel here reads it
    plan = _plan(x, dict(given, **state), batch, None, options)
    scratch = kept.new_empty(plan.backward_scratch_size)
    gradients = _gradients_like(x, parameters)
    tensors = dict(
        given,
        x=x,
        dy=dy,
        **_parts(plan, kept, plan.kept),
        **_parts(plan, scratch, plan.backward_scratch),
        **{f'd{name}': t for name, t in zip(PARAMETERS, gradients, strict=True)},
    )
    launches = plan.backward
    if x_needs_gradient:
        tensors['dx'] = torch.empty_like(x)
    else:
        launches = launches[:-1]
    _launch(launches, tensors, options)
    return tensors.get('dx'), gradients


def _run_cpp_backward(dy, x, kept, parameters, options, batch, x_needs_gradient):
    from . import cpp_ops

    w, b, *sc = parameters
    m, a, *rest = unpack(
        kept, kept_sizes('cpp', *x.shape[:2], len(sc[1]), options['batch_shared'])
    ).values()
    p, q, *gradients = cpp_ops.coefficients_backward(
        *cpp_ops.reduce(dy, x, m),
        m,
        a,
        *rest,
        x.numel() // m.numel(),
        w,
        b,
        sc,
        *(options[name] for name in ('eps', 'bound', 'standardized', 'batch_shared')),
        batch,
    )
    dx = cpp_ops.input_gradient(dy, x, m, a, p, q) if x_needs_gradient else None
    return dx, gradients


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _present(names, tensors):
    return {name: t for name, t in zip(names, tensors, strict=True) if t is not None}


def _given(parameters):
    return {name: t.contiguous() for name, t in _present(PARAMETERS, parameters).items()}


def _plan(x, given, batch, step, options, inference=False):
    from . import triton_ops

    return _plan_of(
        triton_ops.shape_of(x),
        len(given['b_in']),
        batch,
        step is not None,
        step == (None,),
        options['batch_shared'],
        options['standardized'],
        options['bound'] is not None,
        inference,
        tuple((name, t.dtype) for name, t in given.items()),
    )


@functools.lru_cache(maxsize=1 << 12)
def _plan_of(
    shape,
    hidden,
    batch,
    update,
    cumulative,
    batch_shared,
    standardized,
    bounded,
    inference,
    dtypes,
):
    from . import plans

    options = plans.Options(
        hidden, batch, update, cumulative, batch_shared, standardized, bounded, inference=inference
    )
    return plans.Plan(shape, options, dict(dtypes))


def _parts(plan, memory, places):
    return {name: memory[at : at + plan.sizes[name]] for name, at in places.items()}


def _launch(launches, tensors, options, momentum=0.0):
    from . import triton_ops

    scalars = dict(eps=options['eps'], bound=options['bound'] or 0.0, momentum=momentum)
    for launch in launches:
        triton_ops.run_launch(launch, tensors, scalars)


def _gradients_like(x, parameters):
    return [
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in parameters
    ]


# ---------------------------------------------------------------- what is known beforehand


def _sizes_forward(x, *args):
    batch_shared, _, keep, kernels = args[-4:]
    sizes = kept_sizes(kernels, *x.shape[:2], args[3].shape[0], batch_shared)
    size = _places(sizes)[1] if keep else 0
    return torch.empty_like(as_dense(x)), x.new_empty(size, dtype=_wide(x))


def _sizes_backward(dy, x, kept, *args):
    dx = torch.empty_like(as_dense(x)) if args[-1] else x.new_empty(0)
    return dx, *_gradients_like(x, args[:6])


# ---------------------------------------------------------------- autograd


class _Formula(torch.autograd.Function):
    """Calls a forward operator below autograd; its gradient is the backward operator."""

    @staticmethod
    def forward(ctx, op, keyset, *args):
        with _AutoDispatchBelowAutograd():
            y, kept = op.redispatch(keyset & _after_autograd_keyset, *args)
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept, *args[:7])
        ctx.options = args[-7:]
        return y, kept

    @staticmethod
    def backward(ctx, dy, _):
        kept, x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:9]
        if dy is None:
            found = [None] * 7
        elif torch.is_grad_enabled():  # a gradient of this gradient may be asked for
            found = _differentiable(dy, x, kept, parameters, needed, *ctx.options)
        else:
            found = torch.ops.dn_mmdet.dynamic_norm_backward(
                dy, x, kept, *parameters, *ctx.options, needed[0]
            )
        found = [d if needs else None for d, needs in zip(found, needed, strict=True)]
        return None, None, *found, *[None] * (len(ctx.needs_input_grad) - 9)


def _differentiable(
    dy, x, kept, parameters, needed, eps, bound, batch, batch_shared, standardized, _, kernels
):
    from dn_mmdet import functional

    sizes = kept_sizes(kernels, *x.shape[:2], len(parameters[3]), batch_shared)
    views = unpack(kept, sizes)
    return functional.replayed_backward(
        dy,
        x,
        views['mu'],
        views['sigma'],
        parameters,
        needed,
        batch=batch,
        batch_shared=batch_shared,
        standardized=standardized,
        eps=eps,
        bound=bound,
        group='',
    )


def _with_formula(op):
    def forward(keyset, *args):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise NotImplementedError(
                'DN layers in a compiled model have no forward-mode gradients: call the model '
                'without torch.compile, or use torch.func.jvp'
            )
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _Formula.apply(op, keyset, *args)
        with _AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _after_autograd_keyset, *args)

    return forward


def _has_tangent(argument):
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _without_formula(op):
    """Of the backward operator: `_Formula` does not call it where it would be differentiated."""

    def backward(keyset, *args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise RuntimeError(
                f'{op}: expected no gradient of this operator to be needed; '
                f'differentiate the layer twice without torch.compile'
            )
        with _AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _after_autograd_keyset, *args)

    return backward


for _name, _function, _sizes, _autograd in (
    ('dynamic_norm', _forward, _sizes_forward, _with_formula),
    ('dynamic_norm_step', _step, _sizes_forward, _with_formula),
    ('dynamic_norm_backward', _backward, _sizes_backward, _without_formula),
):
    _library.impl(_name, _function, 'CPU')
    _library.impl(_name, _function, 'CUDA')
    torch.library.register_fake(f'dn_mmdet::{_name}', _sizes, lib=_library)
    _library.impl(
        _name, _autograd(getattr(torch.ops.dn_mmdet, _name).default), 'Autograd', with_keyset=True
    )
