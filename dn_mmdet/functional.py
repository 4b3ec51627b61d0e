"""Dynamic Normalization, fast: the fused passes, their backward, and where the reference runs.

Equations (1) to (6) are `reference.dynamic_norm`. A fused pass reads x twice and writes y once.
Between the two passes everything is (N, C) small, and makes the a and c of ::

    y  = a (x - m) + c,       a = (1 + g) w / sigma,    c = (1 + g) b + h + a (m - mu)    (7)

The backward pass reduces dy to da and dc, takes them through that small graph to dm and dv,
and needs one more pass over dy and x, with S the values behind each m::

    dx = a dy + p (x - m) + q,       p = 2 dv / S,            q = (dm - a dc) / S         (8)
"""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import reference
from .inner_norm import (
    PER_CHANNEL,
    PLAIN,
    check_eps,
    check_map,
    check_parts,
    has_registered,
    is_torch_batch_norm,
    parts_of_norm,
    parts_of_sc,
)
from .kernels import operators  # noqa: F401 (they are registered)
from .kernels.choice import (
    FUSED_DTYPES,
    backend_for,
    check_backend,
    gpu_host,
    kept_by_compile,
)
from .sc import g_and_h
from .statistics import (
    Call,
    check_count,
    count_batch,
    is_synchronised,
    process_group,
    running_statistics,
    statistics,
    steps,
    update_running_averages,
)

LARGEST = 2**30  # the kernels' integers


def dynamic_norm(
    x: Tensor,
    bn: nn.Module,
    sc: nn.Module,
    *,
    batch_shared: bool,
    ndims: tuple[int, ...] = (),
    backend: str = 'auto',
) -> Tensor:
    """Normalises x by equations (1) to (6) and updates bn's running averages.

    The equations are in `dn_mmdet.reference.dynamic_norm`. Every backend computes the
    same. The fused backends keep only x for the backward pass, and read it as often as
    BatchNorm does. `torch.compile` keeps each of them as one operator in the forward
    pass and one in the backward pass.

    The reference runs instead of a fused backend wherever autograd has to see each
    operation: in tracing, export, `torch.func` transforms and double backward, and where
    gradients are taken through a module in SC's place or something registered on SC.
    `torch.compile` also uses the reference with backend ``'torch'``.

    The inner norm is called as a module, for equation (3), if it is not a torch
    BatchNorm, if something is registered on it (hooks, pruning, parametrizations, a
    forward of its own), or if `torch.jit.trace` or `make_fx` records the calls.

    Args:
        x: the feature map, of any floating-point dtype.
        bn: the inner norm. In a torch BatchNorm, synchronised or not, the mode, buffers,
            eps and momentum have the same meaning as in torch.
        sc: the SC module.
        batch_shared: False for DN-B (4), True for DN-C (5).
        ndims: the numbers of dimensions that x may have; empty for any.
        backend: ``'reference'`` (plain autograd), ``'torch'`` (fused, from stock
            operators), ``'cpp'`` (fused and compiled: kernels for CPUs; on a GPU, the
            Triton kernels launched from C++), ``'triton'`` (the same Triton kernels,
            launched from Python) or ``'auto'``, which chooses by the device and by what
            is installed.

    Shape:
        - x: (N, C, ...)
        - output: the same shape and dtype

    Raises:
        ValueError: x has a wrong number of dimensions or channels, or only one
            value per channel where batch statistics are needed; eps is not above
            zero; or backend is unknown or cannot run on x.
        TypeError: x is not of a floating-point dtype.
        RuntimeError: the size, dtype or device of a parameter or buffer of bn or sc
            does not fit x.
        ImportError: backend is ``'triton'`` and Triton is not installed, or backend is
            ``'cpp'`` and was not compiled.
    """
    check_backend(backend)
    if x.is_cuda and backend in ('auto', 'cpp') and not torch.compiler.is_compiling():
        host = gpu_host()
        y = host and host.call(x, bn, sc, batch_shared, ndims)
        if y is not None:  # else a case that is not the plain one, or an error to be told
            return y
    check_map(x, sc.num_features, ndims)
    seen = _autograd_must_see(x)
    if not is_torch_batch_norm(bn) or has_registered(bn) or seen and _is_recorded(bn):
        return _around_the_inner_norm(x, bn, sc, batch_shared)
    check_eps(bn.eps)  # type: ignore[arg-type]
    w, b, mean, var = norm_parts = parts_of_norm(bn)
    sc_parts = parts_of_sc(sc)
    plain = check_parts(x, sc, norm_parts, sc_parts, read=not seen)
    running = None if bn.training or mean is None else (mean, var)
    call = Call(bn, running, process_group(bn), sc, sc_parts, batch_shared)
    check_count(x, call)
    kernels = plain and seen and _kernels_of_operator(call, x, w, b, backend)
    fused = (
        plain
        and not seen
        and (x.is_cpu or _integers_hold(x, sc_parts))
        and not (torch.is_grad_enabled() and _is_left_to_autograd(call, w, b))
    )
    ops = backend_for(x, backend) if fused else None
    if ops is None and not kernels:
        return _reference(call, x, w, b, step=True)
    planes = x if x.dim() > 2 else x.unsqueeze(2)
    if kernels:
        y = _by_operator(kernels, call, planes, w, b)
    elif torch.is_grad_enabled():
        y = _FusedNorm.apply(call, ops, planes.resolve_neg(), w, b, *sc_parts)
    else:
        y = _without_gradients(call, ops, planes.resolve_neg(), w, b)
    return y if x.dim() > 2 else y.squeeze(2)


class _FusedNorm(torch.autograd.Function):
    """Equations (7) and (8), which keep x and what is (N, C) small.

    A backward that is itself to be differentiated, or transformed (batched gradients), goes
    through the reference.
    """

    @staticmethod
    def forward(ctx, call, ops, x, w, b, *sc_parameters):
        if call.running is not None:  # they may have moved when backward comes
            call = call._replace(running=_copied(call.running))
        m, v = _moments(call, ops, x)
        if _small_part_is_fused(call, w, b):
            small = _coefficients_by_kernels(call, ops, m, v, x, (w, b, *sc_parameters), keep=True)
        else:
            small = _CoefficientsByAutograd(
                call, m, v, x, ctx.needs_input_grad[2:], (w, b, *sc_parameters)
            )
        ctx.save_for_backward(x, w, b, *sc_parameters)
        ctx.call, ctx.ops, ctx.small = call, ops, small
        ctx.settings = call.bn.eps, call.sc.inputs, call.sc.bound  # they may change as well
        return ops.affine(x, m, small.a, small.c)

    @staticmethod
    def backward(ctx, dy):
        x, *parameters = ctx.saved_tensors
        needed, small = ctx.needs_input_grad[2:], ctx.small
        stale = isinstance(small, _CoefficientsByAutograd) and small.is_stale()
        if torch.is_grad_enabled() or _autograd_must_see(dy) or dy._is_zerotensor() or stale:
            eps, *settings = ctx.settings
            call = ctx.call._replace(bn=SimpleNamespace(eps=eps), sc=_PlainSC(*settings))
            return None, None, *_backward_by_the_reference(call, needed, dy, x, *parameters)
        dy = dy.resolve_neg()
        p, q, *rest = small.backward(*ctx.ops.reduce(dy, x, small.m), *parameters)
        if not needed[0]:
            dx = None
        elif _is_constant(ctx.call):
            zero = torch.zeros_like(small.a)
            dx = ctx.ops.affine(dy, zero, small.a, zero)
        else:
            dx = ctx.ops.input_gradient(dy, x, small.m, small.a, p, q)
        return (
            None,
            None,
            dx,
            *(d if needs else None for d, needs in zip(rest, needed[1:], strict=True)),
        )


class _CoefficientsByAutograd:
    """a, c of equation (7), the small graph behind them, and a step of the averages.

    Args:
        needed: whether x, w, b and each of SC's parameters needs a gradient.
        parameters: w, b and SC's.
    """

    def __init__(self, call, m, v, x, needed, parameters):
        # Aliases, so that gradient hooks on the parameters run once, in the outer graph.
        self.leaves = [
            None if t is None else t.detach().requires_grad_(needs)
            for t, needs in zip((m, v, *parameters), (needed[0], *needed), strict=True)
        ]
        # This graph keeps its tensors: under gradient checkpointing they would be computed
        # again, with all of the layer, once for this graph and once for the outer one.
        with torch.enable_grad(), saved_tensors_hooks(_detached, _as_it_is):
            sc = _PlainSC(call.sc.inputs, call.sc.bound, self.leaves[4:])
            a, c, *observed = coefficients(
                call._replace(sc=sc), *self.leaves[:2], x, *self.leaves[2:4]
            )
        update_running_averages(call.bn, *observed)
        self.versions = _versions(self.leaves)
        self.outputs = a, c
        self.m, self.a, self.c = m, a.detach(), c.detach()
        self.size = x.numel() // m.numel()

    def is_stale(self) -> bool:
        """Whether a parameter changed since: hooks on saved tensors keep copies, this does not."""
        return _versions(self.leaves) != self.versions

    def backward(self, da: Tensor, dc: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """p, q of equation (8), where x needs a gradient, and the gradients of parameters."""
        through = [
            (t, dt) for t, dt in zip(self.outputs, (da, dc), strict=True) if t.requires_grad
        ]
        outputs, gradients = zip(*through, strict=True)
        dm, dv, *rest = _gradients(outputs, gradients, self.leaves)
        if not self.leaves[0].requires_grad:
            return None, None, *rest
        p = torch.zeros_like(dm) if dv is None else dv * (2 / self.size)
        return p, (dm - self.a * dc) / self.size, *rest


def _versions(tensors):
    return [None if t is None or t.is_inference() else t._version for t in tensors]


def _detached(tensor):
    return tensor.detach()  # an operator that keeps its own output would keep itself alive


def _as_it_is(tensor):
    return tensor


def _is_left_to_autograd(call, w, b):
    """Whether gradients may flow through code that `_FusedNorm` does not see.

    That is another module in SC's place, or a hook: it may lead to other parameters, or to
    other losses. Also where hooks on saved tensors are forbidden, because
    `_CoefficientsByAutograd` uses them.
    """
    return call.sc_parts is None or not (
        torch._C._autograd._saved_tensors_hooks_is_enabled() or _small_part_is_fused(call, w, b)
    )


def _is_constant(call):
    """Whether a and c depend on nothing of x: in DN-C by running statistics."""
    return call.batch_shared and call.running is not None


def _moments(call, ops, x):
    """m, v of x. Where nothing depends on them, any m will do, and no pass is made for it.

    It is mu then, which keeps what is no number in x from spreading over its channel.
    """
    if not _is_constant(call):
        return ops.moments(x)
    mu = call.running[0].to(torch.promote_types(x.dtype, torch.float32))
    m = mu.expand(x.shape[:2]).contiguous()
    return m, torch.zeros_like(m)


def _small_part_is_fused(call, w, b):
    """Whether a backend's `Coefficients` can stand for `coefficients` under autograd.

    Not across processes (an all-reduce is autograd's), not with a cumulative average (its
    momentum is another at each step), not with only one of w and b, and only for SC as it is:
    another module, hooks and parametrizations are called. Nor without any hidden unit.
    """
    return _is_plain(call, w, b) and not (call.bn.training and call.bn.momentum is None)


def _is_plain(call, w, b):
    """Whether a layer is of the kind that has kernels for its small part."""
    return (
        call.group is None
        and (w is None) == (b is None)
        and call.sc_parts is not None
        and len(call.sc_parts[1]) > 0
    )


def _coefficients_by_kernels(call, ops, m, v, x, parameters, keep):
    w, b, *sc_parameters = parameters
    bn = call.bn
    averages = None
    if bn.training and bn.track_running_stats:
        momentum = count_batch(bn)
        if bn.running_mean is not None:
            averages = bn.running_mean, bn.running_var, momentum
    return ops.Coefficients(
        m,
        v,
        x.numel() // m.numel(),
        call.running,
        averages,
        w,
        b,
        sc_parameters,
        keep=keep,
        **_options(call),
    )


def _options(call):
    return dict(
        eps=call.bn.eps,
        bound=call.sc.bound,
        batch_shared=call.batch_shared,
        standardized=call.sc.inputs == 'standardized' and not call.batch_shared,
    )


def _without_gradients(call, ops, x, w, b):
    fused = _small_part_is_fused(call, w, b)
    if fused and call.running is not None and hasattr(ops, 'infer'):
        y = ops.infer(x, call.running, w, b, call.sc_parts, **_options(call))
        if y is not None:
            return y
    m, v = _moments(call, ops, x)
    if fused:
        small = _coefficients_by_kernels(call, ops, m, v, x, (w, b, *call.sc_parts), keep=False)
        a, c = small.a, small.c
    else:
        a, c, *observed = coefficients(call, m, v, x, w, b)
        update_running_averages(call.bn, *observed)
    return ops.affine(x, m, a, c)


class _PlainSC(NamedTuple):
    """SC as it was in a call, without a module: what is changed on one later is not in it."""

    inputs: str
    bound: float | None
    parameters: Sequence[Tensor] = ()

    def __call__(self, mean, std):
        return g_and_h(mean, std, *self.parameters, self.bound)


def _backward_by_the_reference(call, needed, dy, x, w, b, *sc_parameters):
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [
            t.view_as(t) if needs else t
            for t, needs in zip((x, w, b, *sc_parameters), needed, strict=True)
        ]
        sc = call.sc._replace(parameters=aliases[3:])
        y = _reference(call._replace(sc=sc), *aliases[:3])
        wanted = [t if needs else None for t, needs in zip(aliases, needed, strict=True)]
        return _gradients((y,), (dy,), wanted, create_graph=create_graph)


def replayed_backward(
    dy: Tensor,
    x: Tensor,
    mu: Tensor,
    sigma: Tensor,
    parameters: Sequence[Tensor | None],
    needed: Sequence[bool],
    *,
    batch: bool,
    batch_shared: bool,
    standardized: bool,
    eps: float,
    bound: float | None,
    group: str,
) -> tuple[Tensor | None, ...]:
    """A differentiable backward pass for what keeps no modules: the GPU host and the operators.

    Args:
        mu, sigma: (C,), what the forward pass normalised by, unless batch.
        parameters: w, b (None where missing) and SC's four.
        needed: whether x and each parameter needs a gradient.
        group: the name of the processes that reduce statistics, or empty.

    Returns:
        A tuple: the gradient, or None, of x and of each parameter.
    """
    resolve = dist.distributed_c10d._resolve_process_group
    processes = resolve(group) if group else None  # type: ignore[arg-type]
    call = Call(
        SimpleNamespace(eps=eps),
        None if batch else (mu, sigma.square() - eps),
        processes,
        _PlainSC('standardized' if standardized else 'raw', bound),
        None,
        batch_shared,
    )
    return tuple(_backward_by_the_reference(call, needed, dy, x, *parameters))


def _gradients(outputs, output_gradients, inputs, create_graph=False):
    """`torch.autograd.grad`, with None for each input that is None or needs none.

    The graph is kept: a caller may come back with `retain_graph`.
    """
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            outputs,
            wanted,
            output_gradients,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _autograd_must_see(x):
    """Whether something looks at, or transforms, the operations one by one."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_in_torch_dispatch_mode()
        or type(x) not in PLAIN
        or x.layout != torch.strided
        or not torch._C._has_storage(x)
    )  # a batch of gradients, to torch.autograd.grad


def _is_recorded(bn):
    """Whether calls are written down to be replayed on batches of any size.

    The inner norm is one operator then, which finds sizes by itself where Python numbers
    would stay those of the example, and which counters of operations know. Not where it
    synchronises its statistics: torch's refuses CPUs.
    """
    if torch.compiler.is_compiling():  # sizes are symbols
        return False
    return (torch.jit.is_tracing() or get_proxy_mode() is not None) and not is_synchronised(bn)


def _reference(call, x, w, b, step=False):
    """y by equations (1) to (6), with a step of the running averages or without.

    The step comes before most tensors are saved for backward: gradient checkpointing
    stops its second forward pass at the last one, and BatchNorm steps in both passes.
    """

    def observed(m, v):
        mu, var, count = statistics(call, m, v, x)
        if step:
            update_running_averages(call.bn, mu, var, count)
        return mu, var

    return reference.dynamic_norm(
        x,
        w,
        b,
        call.sc,
        eps=call.bn.eps,
        batch_shared=call.batch_shared,
        statistics=observed,
    )


def coefficients(
    call: Call,
    m: Tensor,
    v: Tensor,
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
) -> tuple:
    """a, c (N, C) of equation (7); mu, var, count.

    Of x only the shape is used.
    """
    mu, var, count = statistics(call, m, v, x)
    sigma = torch.sqrt(var + call.bn.eps)
    w, b = reference.affine_parameters(w, b, like=mu)
    g, h = reference.call_sc(call.sc, m, v, mu, sigma, call.bn.eps, call.batch_shared)
    scale = 1 + g
    a = scale * (w / sigma)
    c = torch.addcmul(h, scale, b) + a * (m - mu)
    return a.expand_as(m).to(m.dtype), c.to(m.dtype), mu, var, count


def _kernels_of_operator(call, x, w, b, backend):
    """Which kernels torch.compile is to keep this layer for as one operator, or ''.

    See `kernels.operators`.
    """
    if not torch.compiler.is_compiling():
        return ''
    state = [
        t
        for t in (call.bn.running_mean, call.bn.running_var, call.bn.num_batches_tracked)
        if t is not None
    ]
    if (
        x.dtype not in FUSED_DTYPES
        or not _is_plain(call, w, b)
        or (steps(call.bn) and call.bn.running_mean is None)
        or not all(t.is_contiguous() and t.device == x.device for t in state)
        or x.numel() == 0
        or not _integers_hold(x, call.sc_parts)
    ):
        return ''
    return kept_by_compile(backend, x.device.type, x.device.index)


def _integers_hold(x, sc_parts):
    """Whether the GPU kernels can count the values of a channel, and of SC in a batch."""
    n, c = x.shape[:2]
    units = len(sc_parts[1]) if sc_parts else 0
    return n * max(c, units) < LARGEST and x.numel() < n * c * LARGEST


def _by_operator(kernels, call, x, w, b):
    bn, sc = call.bn, call.sc
    parts = x, w, b, *call.sc_parts, bn.running_mean, bn.running_var
    options = (
        float(bn.eps),
        None if sc.bound is None else float(sc.bound),
        call.running is None,
        call.batch_shared,
        sc.inputs == 'standardized' and not call.batch_shared,
        torch.is_grad_enabled(),
        kernels,
    )
    if not steps(bn):
        return torch.ops.dn_mmdet.dynamic_norm(*parts, *options)[0]
    momentum = bn.momentum
    if momentum is not None:
        momentum = float(momentum)
    elif bn.num_batches_tracked is None:
        momentum = 0.0  # torch's rule
    return torch.ops.dn_mmdet.dynamic_norm_step(
        *parts, bn.num_batches_tracked, momentum, *options
    )[0]


def _around_the_inner_norm(x, norm, sc, batch_shared):
    """Equation (6) with z from a call of the inner norm, and SC by the statistics it used."""
    if isinstance(norm, nn.Identity):
        raise TypeError(
            'the inner norm is an Identity: something has folded it into a '
            'convolution, and SC would get the statistics of another map. Make '
            'BatchNorms of the layers first, by dn_mmdet.fold.fold_norm'
        )
    if not torch.jit.is_tracing():  # where sizes are no numbers
        _check_called(x, norm, sc)
    z, x, running = _watched_call(norm, x)
    if not isinstance(z, Tensor):
        raise TypeError(
            f'expected the inner {type(norm).__name__} to give a tensor, got a '
            f'{type(z).__name__}; see the hooks that are registered on it'
        )
    if not torch.jit.is_tracing() and z.shape != x.shape:
        raise ValueError(
            f'expected the inner {type(norm).__name__} to keep the shape '
            f'{tuple(x.shape)} of its input, got {tuple(z.shape)} from it'
        )
    call = Call(norm, running, process_group(norm), sc, None, batch_shared)
    m, v = reference.moments(x)
    mu, var, _ = statistics(call, m, v, x)
    eps = getattr(norm, 'eps', 1e-5)
    g, h = reference.call_sc(sc, m, v, mu, torch.sqrt(var + eps), eps, batch_shared)
    return reference.modulate(reference.widen(z), g, h).to(x.dtype)


def _check_called(x, norm, sc):
    """What a norm of unknown type would broadcast, and what is read beside it."""
    parts = [getattr(norm, name, None) for name in PER_CHANNEL[2:]]
    own = not is_torch_batch_norm(norm) and parts[0] is not None
    affine = [getattr(norm, name, None) for name in PER_CHANNEL[:2]] if own else [None, None]
    check_parts(x, sc, (*affine, *parts), parts_of_sc(sc), read=not _autograd_must_see(x))


_registering = threading.Lock()


def _watched_call(norm, x):
    """norm(x), the input after the pre-hooks, and the running statistics by which it went."""
    if norm._forward_pre_hooks or torch_module._global_forward_pre_hooks:
        return _call_with_a_last_hook(norm, x)
    running = _copied(running_statistics(norm))
    return norm(x), x, running


def _copied(running):
    return running and tuple(t.clone() for t in running)


@_disable_dynamo  # which would leave out the hook
def _call_with_a_last_hook(norm, x):
    seen, thread = [], threading.get_ident()

    def look(norm, args, keywords=None):  # without keywords while another thread removes its own
        if threading.get_ident() == thread:  # threads share the norm and its hooks
            given = [*args, *(keywords or {}).values()][0]  # a hook may give it by name
            seen[:] = given, _copied(running_statistics(norm))

    with _registering:  # torch counts its handles without a lock
        handle = norm.register_forward_pre_hook(look, with_kwargs=True)  # the last one
    try:
        return norm(x), *seen
    finally:
        with _registering:
            handle.remove()
