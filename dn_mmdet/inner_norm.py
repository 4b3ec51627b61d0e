"""What a layer's modules are and hold: the inner norm, SC, and whether they fit a map."""

import numbers

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from .kernels.choice import compiled_kernels
from .sc import SC

# What of a norm has one value per channel.
PER_CHANNEL = ('weight', 'bias', 'running_mean', 'running_var')
SC_PARAMETERS = ('w_in', 'b_in', 'w_out', 'b_out')
PLAIN = {Tensor, nn.Parameter, type(None)}


def check_eps(eps: float) -> None:
    """Raises ValueError where torch's BatchNorm would not run."""
    try:
        positive = eps > 0
    except TypeError:  # no number
        positive = False
    if not positive:
        raise ValueError(f'eps must be positive, but got {eps!r}')


def check_momentum(momentum: float | None) -> None:
    """Raises ValueError for what is no number and not None, as a text out of a YAML file."""
    if momentum is not None and not isinstance(momentum, numbers.Real):
        raise ValueError(f'momentum: expected a number or None, got {momentum!r}')


def is_torch_batch_norm(bn: nn.Module) -> bool:
    """Whether bn computes what torch's (Sync)BatchNorm does, so that (1) to (3) hold.

    Conversions replace the inner norm: mmengine's `revert_sync_batchnorm` by a
    subclass without a forward of its own, mmdet's and torchvision's freezing by
    another class.
    """
    cls = type(bn)
    return (
        getattr(cls, 'forward', None) in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
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


def parts_of_norm(bn):
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


def parts_of_sc(sc):
    """SC's four parameters, or None where sc is more than an SC, or another module."""
    if (
        getattr(type(sc), 'forward', None) is SC.forward
        and not has_registered(sc)
        and tuple(sc._parameters) == SC_PARAMETERS
    ):
        return (*sc._parameters.values(),)
    return None


def check_map(x, num_features, ndims):
    if x.dim() < 2 or (ndims and x.dim() not in ndims):
        expected = ' or '.join(f'{n}D' for n in ndims) or 'at least 2D'
        raise ValueError(
            f'expected {expected} input (got {x.dim()}D input of size {tuple(x.shape)})'
        )
    if x.shape[1] != num_features:
        raise ValueError(
            f'expected {num_features} channels in dimension 1 (got {x.shape[1]} '
            f'channels, input size {tuple(x.shape)}); to change that, build the layer with '
            f'another num_features'
        )
    if not x.is_floating_point():
        remedy = ': convert it with x.float()'
        if x.is_quantized:
            remedy = ': convert it with x.dequantize()'
        elif x.is_complex():
            remedy = ', which has no order: pass its real and imaginary parts as channels'
        raise TypeError(f'expected a floating-point map, got one of {x.dtype}{remedy}')


def check_parts(x, sc, norm_parts, sc_parts, read):
    """Raises, in torch's words, where something that will be read does not fit x.

    In every backend, so that nothing is broadcast and no kernel reads past the end. With
    ``read``, memory that was freed is told as well; on a CPU the compiled kernels' own check
    is the fast one, if they are there.

    Returns:
        whether kernels can read all of them. A tensor of a subclass has memory of its own, or
        none, as a zero tensor has. Attributes instead of parameters, in nn.DataParallel's
        replicas and inside FSDP, need autograd's graph as it is.
    """
    mean, var = norm_parts[2:]
    if (mean is None) != (var is None):
        raise ValueError('running_mean, running_var: expected both or neither, got only one')
    channels, kernels = sc.num_features, compiled_kernels() if read and x.is_cpu else None
    if kernels and sc_parts and kernels.fits(x, channels, norm_parts, sc_parts):
        return True
    names, shapes = PER_CHANNEL, ((channels,),) * 4
    if sc_parts:
        for name, t in zip(SC_PARAMETERS, sc_parts, strict=True):
            if t is None:
                raise RuntimeError(f'sc.{name}: expected a parameter, got None')
        hidden = tuple(sc_parts[0].shape[:1])
        names += SC_PARAMETERS
        shapes += (*hidden, 2 * channels), hidden, (2 * channels, *hidden), (2 * channels,)
    for name, t, shape in zip(names, (*norm_parts, *(sc_parts or ())), shapes, strict=True):
        if t is not None and (
            t.shape != shape or t.device != x.device or not t.dtype.is_floating_point
        ):
            raise RuntimeError(_misfit(name, t, shape, x))
    if read:
        for name, t in zip(('input', *names), (x, *norm_parts, *(sc_parts or ())), strict=True):
            if t is not None and _is_freed(t):
                raise RuntimeError(
                    f'{name}: expected values in memory, but its storage was freed '
                    f'(untyped_storage().resize_(0))'
                )
    parameters = sc_parts or tuple(sc.parameters())
    tensors = (x, *norm_parts, *parameters)
    return (
        len(parameters) > 0
        and PLAIN.issuperset(map(type, tensors))
        and not (read and any(t is not None and t._is_zerotensor() for t in tensors))
    )


def _is_freed(t):
    """Whether the memory of a tensor on a CPU or a GPU was freed; the rarest is asked first."""
    return (
        torch._C._has_storage(t)
        and not t.untyped_storage().nbytes()
        and t.numel() > 0
        and not t._is_zerotensor()
        and t.device.type in ('cpu', 'cuda')
    )


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
