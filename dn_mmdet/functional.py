"""Dynamic Normalization, fast: what to run on which input, and the state of the BatchNorm.

Equations (1) to (6) are `reference.dynamic_norm`. A fused pass reads x twice and writes y once.
Between the two passes everything is (N, C) small, and makes the a and c of ::

    y  = a (x - m) + c,       a = (1 + g) w / sigma,    c = (1 + g) b + h + a (m - mu)    (7)

The backward pass reduces dy to da and dc, takes them through that small graph to dm and dv,
and needs one more pass over dy and x, with S the values behind each m::

    dx = a dy + p (x - m) + q,       p = 2 dv / S,            q = (dm - a dc) / S         (8)
"""

import functools
import logging
import os
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.nn.functional import all_reduce
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import reference
from .kernels import Backend, operators, torch_ops  # noqa: F401 (operators are registered)
from .sc import SC

BACKENDS = ('auto', 'reference', 'torch', 'cpp', 'triton')
FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = 2**30  # the kernels' integers
# What of a norm has one value per channel.
PER_CHANNEL = ('weight', 'bias', 'running_mean', 'running_var')
SC_PARAMETERS = ('w_in', 'b_in', 'w_out', 'b_out')
PLAIN = {Tensor, nn.Parameter, type(None)}


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

    Every backend computes the same. The fused ones keep only x for the backward
    pass and read it as often as BatchNorm does. `torch.compile` keeps them as one
    operator each way. The reference runs in their place wherever autograd has to
    see each operation (tracing, export, `torch.func` transforms, double backward),
    and is what `torch.compile` takes with backend ``'torch'``. The inner norm is called for
    equation (3) where it is not a torch BatchNorm, where something is registered
    on it (hooks, pruning, parametrizations, a forward of its own), and where
    `torch.jit.trace` or `make_fx` records what is called.

    Args:
        x: the feature map, of any floating-point dtype.
        bn: the inner norm. A torch BatchNorm, synchronised or not, keeps torch's
            meaning of its mode, buffers, eps and momentum.
        sc: the SC module.
        batch_shared: False for DN-B (4), True for DN-C (5).
        ndims: the numbers of dimensions that x may have; empty for any.
        backend: ``'reference'`` (plain autograd), ``'torch'`` (fused, from stock
            operators), ``'cpp'`` (fused, compiled: kernels for CPUs, and on a GPU the
            Triton kernels launched from C++), ``'triton'`` (the same kernels, launched from
            Python) or ``'auto'``, which chooses by device and by what is installed.

    Shape:
        - x: (N, C, ...)
        - output: the same shape and dtype

    Raises:
        ValueError: x has a wrong number of dimensions or of channels, or one
            value per channel where batch statistics are needed; eps is not above
            zero; or backend is unknown or cannot run on x.
        TypeError: x is not of a floating-point dtype.
        RuntimeError: a parameter or buffer of bn or sc does not fit x: its size, its
            dtype or its device.
        ImportError: backend is ``'triton'``, which is not installed, or ``'cpp'``,
            which was not compiled.
    """
    check_backend(backend)
    if x.is_cuda and backend in ('auto', 'cpp') and not torch.compiler.is_compiling():
        host = gpu_host()
        y = host and host.call(x, bn, sc, batch_shared, ndims)
        if y is not None:  # else a case that is not the plain one, or an error to be told
            return y
    _check_map(x, sc.num_features, ndims)
    seen = _autograd_must_see(x)
    if not is_torch_batch_norm(bn) or has_registered(bn) or seen and _is_recorded(bn):
        return _around_the_inner_norm(x, bn, sc, batch_shared)
    check_eps(bn.eps)  # type: ignore[arg-type]
    w, b, mean, var = norm_parts = _parts_of_norm(bn)
    sc_parts = _parts_of_sc(sc)
    plain = _check_parts(x, sc, norm_parts, sc_parts, fast=not seen and x.is_cpu)
    running = None if bn.training or mean is None else (mean, var)
    call = _Call(bn, running, process_group(bn), sc, sc_parts, batch_shared)
    _check_count(x, call)
    kernels = plain and seen and _kernels_of_operator(call, x, w, b, backend)
    ops = _backend_for(x, backend) if plain and not seen else None
    if ops is None and not kernels:
        return _reference(call, x, w, b, step=True)
    planes = x if x.dim() > 2 else x.unsqueeze(2)
    if kernels:
        y = _by_operator(kernels, call, planes, w, b)
    elif torch.is_grad_enabled():
        names, parameters = (
            (SC_PARAMETERS, sc_parts) if sc_parts else zip(*sc.named_parameters(), strict=True)
        )
        y = _FusedNorm.apply(call, ops, names, planes.resolve_neg(), w, b, *parameters)
    else:
        y = _without_gradients(call, ops, planes.resolve_neg(), w, b)
    return y if x.dim() > 2 else y.squeeze(2)


def check_backend(backend: str) -> None:
    """Raises ValueError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise ValueError(f'backend: expected one of {BACKENDS}, got {backend!r}')


def check_eps(eps: float) -> None:
    """Raises ValueError where torch's BatchNorm would not run."""
    try:
        positive = eps > 0
    except TypeError:  # no number
        positive = False
    if not positive:
        raise ValueError(f'eps must be positive, but got {eps!r}')


def is_torch_batch_norm(bn: nn.Module) -> bool:
    """Whether bn computes what torch's (Sync)BatchNorm does, so that (1) to (3) hold.

    Conversions replace the inner norm: mmengine's `revert_sync_batchnorm` by a
    subclass without a forward of its own, mmdet's and torchvision's freezing by
    another class.
    """
    cls = type(bn)
    return (
        cls.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        and cls.__call__ is nn.Module.__call__
    )


def has_registered(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward.

    Hooks of every kind (which pruning, weight norm and FSDP2 are made of), parametrizations
    (a child module), a forward of the instance's own, and hooks on all modules.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._modules
        or 'forward' in module.__dict__
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


class _Call(NamedTuple):
    """What a call read from the layer's modules, for a backward that comes later."""

    bn: Any  # a BatchNorm, or what a conversion put in its place
    running: tuple[Tensor, Tensor] | None  # running mean and variance, where bn uses them
    group: Any  # of processes over which to reduce batch statistics, or None
    sc: nn.Module
    sc_parts: tuple[Tensor, ...] | None  # of an SC as it is, None of one that is to be called
    batch_shared: bool


class _FusedNorm(torch.autograd.Function):
    """Equations (7) and (8), which keep x and what is (N, C) small.

    A backward that is itself to be differentiated, or transformed (batched gradients), goes
    through the reference.
    """

    @staticmethod
    def forward(ctx, call, ops, names, x, w, b, *sc_parameters):
        if call.running is not None:  # they may have moved when backward comes
            call = call._replace(running=tuple(t.clone() for t in call.running))
        m, v = _moments(call, ops, x)
        if _small_part_is_fused(call, w, b):
            small = _coefficients_by_kernels(call, ops, m, v, x, (w, b, *sc_parameters), keep=True)
        else:
            small = _CoefficientsByAutograd(
                call, names, m, v, x, ctx.needs_input_grad[3:], (w, b, *sc_parameters)
            )
        ctx.save_for_backward(x, w, b, *sc_parameters)
        ctx.call, ctx.ops, ctx.names, ctx.small = call, ops, names, small
        return ops.affine(x, m, small.a, small.c)

    @staticmethod
    def backward(ctx, dy):
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or _autograd_must_see(dy):
            return (
                None,
                None,
                None,
                *_backward_by_the_reference(ctx.call, ctx.names, needed, dy, x, *parameters),
            )
        small, dy = ctx.small, dy.resolve_neg()
        p, q, *rest = small.backward(*ctx.ops.reduce(dy, x, small.m))
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
            None,
            dx,
            *(d if needs else None for d, needs in zip(rest, needed[1:], strict=True)),
        )


class _CoefficientsByAutograd:
    """a, c of equation (7), the small graph behind them, and a step of the averages.

    Args:
        names: of SC's parameters.
        needed: whether x, w, b and each of SC's parameters needs a gradient.
        parameters: w, b and SC's.
    """

    def __init__(self, call, names, m, v, x, needed, parameters):
        # Aliases, so that gradient hooks on the parameters run once, in the outer graph.
        self.leaves = [
            None if t is None else t.detach().requires_grad_(needs)
            for t, needs in zip((m, v, *parameters), (needed[0], *needed), strict=True)
        ]
        # This graph keeps its tensors: under gradient checkpointing they would be computed
        # again, with all of the layer, once for this graph and once for the outer one.
        with torch.enable_grad(), saved_tensors_hooks(_detached, _as_it_is):
            a, c, *observed = coefficients(
                call,
                *self.leaves[:2],
                x,
                *self.leaves[2:4],
                dict(zip(names, self.leaves[4:], strict=True)),
            )
        update_running_averages(call.bn, *observed)
        self.outputs = a, c
        self.m, self.a, self.c = m, a.detach(), c.detach()
        self.size = x.numel() // m.numel()

    def backward(self, da: Tensor, dc: Tensor) -> tuple[Tensor | None, ...]:
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


def _detached(tensor):
    return tensor.detach()  # an operator that keeps its own output would keep itself alive


def _as_it_is(tensor):
    return tensor


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
    return (
        call.group is None
        and not (call.bn.training and call.bn.momentum is None)
        and (w is None) == (b is None)
        and call.sc_parts is not None
        and len(call.sc_parts[1]) > 0
    )


def _coefficients_by_kernels(call, ops, m, v, x, parameters, keep):
    w, b, *sc_parameters = parameters
    bn = call.bn
    averages = None
    if bn.training and bn.track_running_stats:
        momentum = _count_batch(bn)
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


def _backward_by_the_reference(call, names, needed, dy, x, w, b, *sc_parameters):
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [
            t.view_as(t) if needs else t
            for t, needs in zip((x, w, b, *sc_parameters), needed, strict=True)
        ]
        y = _reference(call, *aliases[:3], dict(zip(names, aliases[3:], strict=True)))
        wanted = [t if needs else None for t, needs in zip(aliases, needed, strict=True)]
        return _gradients((y,), (dy,), wanted, create_graph=create_graph)


class _StatelessSC(SC):
    """An SC whose parameters come with each call. To draw some would be refused by vmap."""

    def reset_parameters(self):
        pass


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
    """A differentiable backward pass for the compiled GPU host, which keeps no modules.

    Args:
        mu, sigma: (C,), what the forward pass normalised by, unless batch.
        parameters: w, b (None where missing) and SC's four.
        needed: whether x and each parameter needs a gradient.
        group: the name of the processes that reduce statistics, or empty.

    Returns:
        A tuple: the gradient, or None, of x and of each parameter.
    """
    w_in, b_in = parameters[2:4]
    assert w_in is not None and b_in is not None
    channels = x.shape[1]
    sc = _StatelessSC(
        channels,
        channels,
        len(b_in),
        'standardized' if standardized else 'raw',
        bound,
        device='meta',
        dtype=w_in.dtype,
    )
    names = [name for name, _ in sc.named_parameters()]
    resolve = dist.distributed_c10d._resolve_process_group
    processes = resolve(group) if group else None  # type: ignore[arg-type]
    call = _Call(
        SimpleNamespace(eps=eps),
        None if batch else (mu, sigma.square() - eps),
        processes,
        sc,
        None,
        batch_shared,
    )
    return tuple(_backward_by_the_reference(call, names, needed, dy, x, *parameters))


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


def _backend_for(x: Tensor, backend: str) -> Backend | None:
    """What runs on x under this name, or None for the reference."""
    if backend == 'reference' or x.numel() == 0:
        return None
    fits = x.dtype in FUSED_DTYPES and x.device.type in ('cpu', 'cuda')
    if backend == 'auto':
        if x.is_cpu:
            return compiled_kernels() or torch_ops if fits else None
        return _on_gpu(x.device.index) or torch_ops if fits else None
    if not fits:
        raise ValueError(
            f'backend={backend!r}: expected a CPU or CUDA tensor of one of '
            f'{FUSED_DTYPES}, got {x.dtype} on {x.device}; use '
            f"backend='reference' or 'auto'"
        )
    if backend == 'torch':
        return torch_ops
    if backend == 'cpp' and x.is_cuda:
        _gpu_host()  # says so where it cannot be imported
        return _triton_ops()
    ops = _triton_ops() if backend == 'triton' else _cpp_ops()
    ops.check_runs_on(x)
    return ops


def _triton_ops():
    """The module of Triton kernels, imported where they are asked for: it takes a second."""
    try:
        from .kernels import triton_ops
    except ImportError as error:
        raise ImportError(
            f"backend='triton': Triton cannot be imported ({error}). It comes with "
            f"torch on Linux (pip install triton); or use backend='auto'"
        ) from error
    return triton_ops


def _cpp_ops():
    try:
        from .kernels import cpp_ops
    except ImportError as error:
        raise ImportError(
            f"backend='cpp': the compiled kernels cannot be imported ({error}). "
            f'With GCC on Linux, install this package against the torch in use: '
            f"pip install --no-build-isolation; or use backend='auto'"
        ) from error
    return cpp_ops


@functools.cache
def compiled_kernels():
    """The module of CPU kernels, or None where they were never built or fit another torch."""
    try:
        return _cpp_ops()
    except ImportError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            warnings.warn(f'{error}. Until then, DN layers on CPUs are slower', stacklevel=2)
        return None


def _gpu_host():
    try:
        from .kernels import host
    except ImportError as error:
        raise ImportError(
            f"backend='cpp': the compiled host of the GPU kernels cannot be "
            f'imported ({error}). With Triton and GCC on Linux, install this '
            f'package against the torch in use: pip install '
            f"--no-build-isolation; or use backend='auto'"
        ) from error
    return host


@functools.cache
def gpu_host():
    """The module that launches the GPU kernels from C++, or None where it was not built."""
    try:
        return _gpu_host()
    except ImportError as error:
        print_log(
            f'dn_mmdet: on GPUs DN layers are launched from Python, which is slower: {error}',
            logger='current',
            level=logging.WARNING,
        )
        return None


def _on_gpu(index):
    """The Triton kernels launched from Python, or None where they do not run on this GPU."""
    host = gpu_host()
    if host is not None and not host.kernels_run_on(index):  # which may turn out at any call
        return None
    return _triton_on_gpu(index)


@functools.cache
def _triton_on_gpu(index):
    if torch.cuda.get_device_capability(index) < (8, 0):
        print_log(
            f"dn_mmdet: on GPU {index} DN layers run on torch's own operators: Triton "
            f'needs compute capability 8.0',
            logger='current',
            level=logging.WARNING,
        )
        return None
    try:
        return _triton_ops()
    except ImportError as error:
        print_log(
            f"dn_mmdet: on GPUs DN layers run on torch's own operators: {error}",
            logger='current',
            level=logging.WARNING,
        )
        return None


def fused_backends(device: str) -> tuple[str, ...]:
    """Those that run on 'cpu' or 'cuda' here: what to hold against the reference, and to time."""
    if device == 'cuda':
        return ('torch', 'triton', 'cpp') if gpu_host() else ('torch', 'triton')
    return ('torch', 'cpp') if compiled_kernels() else ('torch',)


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
    return (torch.jit.is_tracing() or get_proxy_mode() is not None) and not _is_synchronised(bn)


def _reference(call, x, w, b, sc_parameters=None, step=False):
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
        sc_parameters=sc_parameters,
    )


def coefficients(
    call: _Call,
    m: Tensor,
    v: Tensor,
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    sc_parameters: dict[str, Tensor] | None = None,
) -> tuple:
    """a, c (N, C) of equation (7); mu, var, count.

    Of x only the shape is used.
    """
    mu, var, count = statistics(call, m, v, x)
    sigma = torch.sqrt(var + call.bn.eps)
    w, b = reference.affine_parameters(w, b, like=mu)
    g, h = reference.call_sc(
        call.sc, m, v, mu, sigma, call.bn.eps, call.batch_shared, sc_parameters
    )
    scale = 1 + g
    a = scale * (w / sigma)
    c = torch.addcmul(h, scale, b) + a * (m - mu)
    return a.expand_as(m), c, mu, var, count


def statistics(call: _Call, m: Tensor, v: Tensor, x: Tensor) -> tuple:
    """mu, var (C,) that the inner BatchNorm uses, and the number of values behind them.

    The count is None where the statistics are the running ones, and a tensor
    where they were reduced over processes.
    """
    if call.running is not None:
        return *(t.to(m.dtype) for t in call.running), None
    count = _values_per_channel(x)
    if call.group is not None:
        return synchronized_statistics(m, v, count, call.group)
    return *reference.batch_statistics(m, v), count


def synchronized_statistics(
    m: Tensor, v: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (1) and (2) over all processes of a group, weighted by their counts.

    Every process writes (count, mean, variance) into its own row of a table of
    zeros; one differentiable all-reduce of the table then tells all of them.
    Combining variances about the common mean keeps channels with |mean| >> std
    accurate, which a sum of squares would not. A process with an empty batch takes
    part with weight 0.

    Returns:
        mu (C,), var (C,), count (0-d tensor).
    """
    row = torch.cat((m.new_full((1,), count), *reference.batch_statistics(m, v)))
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    table = torch.zeros(world_size, len(row), dtype=row.dtype, device=row.device)
    table = torch.cat((table[:rank], row[None], table[rank + 1 :]))
    counts, means, variances = all_reduce(table, group=group).split(
        (1, m.shape[1], m.shape[1]), dim=1
    )
    total = counts.sum().detach()
    share = counts.detach() / total.clamp(min=1)
    mu = (share * means).sum(0)
    return mu, (share * (variances + (means - mu).square())).sum(0), total


def update_running_averages(bn: Any, mu: Tensor, var: Tensor, count: Any) -> None:
    """One step of bn's running averages, by torch's rule: the unbiased variance."""
    if not _steps(bn):
        return  # before no_grad, which in eval mode would be a region of its own to torch.export
    with torch.no_grad():
        momentum = _count_batch(bn)
        if bn.running_mean is None:
            return
        if isinstance(count, Tensor):  # no process had a value: leave the averages
            momentum = momentum * (count > 0).to(count.dtype)  # a bool tensor would round it
            unbiased = var * count / (count - 1).clamp(min=1)
        elif count == 0:
            return
        else:
            unbiased = var * (count / (count - 1))
        for running, value in ((bn.running_mean, mu), (bn.running_var, unbiased)):
            running.copy_(running + momentum * (value - running))


def _steps(bn):
    return bn.training and bn.track_running_stats


def _count_batch(bn):
    """Counts a batch, if bn has a counter, and gives the step of the running averages."""
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    if bn.momentum is not None:
        return bn.momentum
    if bn.num_batches_tracked is None:
        return 0.0  # torch's rule
    return 1 / bn.num_batches_tracked.item()  # cumulative average


def _check_map(x, num_features, ndims):
    if x.dim() < 2 or (ndims and x.dim() not in ndims):
        expected = ' or '.join(f'{n}D' for n in ndims) or 'at least 2D'
        raise ValueError(
            f'expected {expected} input (got {x.dim()}D input of size {tuple(x.shape)})'
        )
    if x.shape[1] != num_features:
        raise ValueError(
            f'expected {num_features} channels in dimension 1 (got {x.shape[1]} '
            f'channels, input size {tuple(x.shape)}); num_features is set '
            f'where the layer is built'
        )
    if not x.is_floating_point():
        raise TypeError(
            f'expected a floating-point map, got one of {x.dtype}; convert it, as by x.float()'
        )


def _parts_of_norm(bn):
    """What of a torch BatchNorm kernels read; see `PER_CHANNEL`."""
    parameters, buffers = bn._parameters, bn._buffers
    try:  # the attributes cost eight times as much
        return (
            parameters['weight'],
            parameters['bias'],
            buffers['running_mean'],
            buffers['running_var'],
        )
    except KeyError:  # replaced by plain attributes, as in nn.DataParallel's replicas
        return tuple(getattr(bn, name) for name in PER_CHANNEL)


def _parts_of_sc(sc):
    """SC's four parameters, or None where sc is more than an SC, or another module."""
    if (
        type(sc).forward is SC.forward
        and not has_registered(sc)
        and tuple(sc._parameters) == SC_PARAMETERS
    ):
        return (*sc._parameters.values(),)
    return None


def _check_parts(x, sc, norm_parts, sc_parts, fast=False):
    """Raises, in torch's words, where something that will be read does not fit x.

    In every backend, so that nothing is broadcast and no kernel reads past the end. With
    ``fast``, by the compiled kernels' own check, if they are there.

    Returns:
        whether kernels can read all of them. A tensor of a subclass has memory of its own, or
        none; attributes instead of parameters, in nn.DataParallel's replicas and inside FSDP,
        need autograd's graph as it is.
    """
    mean, var = norm_parts[2:]
    if (mean is None) != (var is None):
        raise ValueError('running_mean, running_var: expected both or neither, got only one')
    channels, kernels = sc.num_features, compiled_kernels() if fast else None
    if kernels and sc_parts and kernels.fits(x, channels, norm_parts, sc_parts):
        return True
    names, shapes = PER_CHANNEL, ((channels,),) * 4
    if sc_parts:
        hidden = tuple(sc_parts[0].shape[:1])
        names += SC_PARAMETERS
        shapes += (*hidden, 2 * channels), hidden, (2 * channels, *hidden), (2 * channels,)
    for name, t, shape in zip(names, (*norm_parts, *(sc_parts or ())), shapes, strict=True):
        if t is not None and (
            t.shape != shape or t.device != x.device or not t.dtype.is_floating_point
        ):
            raise RuntimeError(_misfit(name, t, shape, x))
    parameters = sc_parts or tuple(sc.parameters())
    return len(parameters) > 0 and PLAIN.issuperset(map(type, (*norm_parts, *parameters)))


def _misfit(name, tensor, shape, x):
    """What of a parameter or buffer does not fit the map x."""
    if tensor.device != x.device:
        return (
            f'Expected all tensors to be on the same device, but {name} is on '
            f'{tensor.device} and the input on {x.device}; move one of them with .to()'
        )
    if tensor.shape == shape:
        return f'{name}: expected a floating-point dtype, got {tensor.dtype}'
    if len(shape) == 1 and tensor.numel() != shape[0]:
        return f'{name} should contain {shape[0]} elements not {tensor.numel()}'
    return f'{name} should have the shape {shape} not {tuple(tensor.shape)}'


def _check_count(x, call):
    if call.running is None and call.group is None and _values_per_channel(x) == 1:
        raise ValueError(
            f'Expected more than 1 value per channel when training, got input '
            f'size {tuple(x.shape)}; use larger batches or inputs, or eval()'
        )


def _values_per_channel(x):
    return x.numel() // x.shape[1]


def _running_statistics(bn):
    """The running mean and variance where bn normalises by them, or None."""
    never_updates = not hasattr(bn, 'momentum')  # mmdet's and torchvision's FrozenBatchNorm2d
    if getattr(bn, 'running_mean', None) is None or (bn.training and not never_updates):
        return None
    return bn.running_mean, bn.running_var


def _is_synchronised(bn):
    return (
        isinstance(bn, nn.SyncBatchNorm)
        and bn.training
        and dist.is_available()
        and dist.is_initialized()
    )


def process_group(bn: Any) -> dist.ProcessGroup | None:
    """The group over which bn's batch statistics are to be reduced, or None."""
    if not _is_synchronised(bn):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


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
        or call.group is not None
        or call.sc_parts is None
        or len(call.sc_parts[1]) == 0
        or (w is None) != (b is None)
        or (_steps(call.bn) and call.bn.running_mean is None)
        or not all(t.is_contiguous() and t.device == x.device for t in state)
        or x.numel() == 0
        or x.shape[0] * x.shape[1] >= LARGEST
        or x.numel() >= x.shape[0] * x.shape[1] * LARGEST
    ):
        return ''
    return _kept_by_compile(backend, x.device.type, x.device.index)


@torch.compiler.assume_constant_result  # nothing in it is for Dynamo to trace
def _kept_by_compile(backend, device, index):
    """'triton' or 'cpp', the kernels of an operator; '' for the reference.

    That goes into what torch.export makes, which is to run where this package is not installed.
    """
    if (
        torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or backend in ('reference', 'torch')
    ):
        return ''
    if device == 'cpu' and backend == 'triton':
        return 'triton' if os.environ.get('TRITON_INTERPRET') == '1' else ''
    if device == 'cpu':
        return 'cpp' if compiled_kernels() else ''
    return 'triton' if device == 'cuda' and _on_gpu(index) else ''


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
    if not _steps(bn):
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
    z, x, running = _call(norm, x)
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
    call = _Call(norm, running, process_group(norm), sc, None, batch_shared)
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
    _check_parts(x, sc, (*affine, *parts), _parts_of_sc(sc))


def _call(norm, x):
    """norm(x), the input after the pre-hooks, and the running statistics by which it went."""
    seen = []

    def look(norm, args, keywords):
        running = _running_statistics(norm)
        given = [*args, *keywords.values()][0]  # a hook may give it by name
        seen[:] = given, running and tuple(t.clone() for t in running)

    if not (norm._forward_pre_hooks or torch_module._global_forward_pre_hooks):
        look(norm, (x,), {})
        return norm(x), *seen
    with norm.register_forward_pre_hook(look, with_kwargs=True):  # the last one
        return norm(x), *seen
