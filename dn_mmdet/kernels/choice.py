"""Which kernels run: by the backend's name, by the device, and by what is installed."""

import functools
import logging
import os
import warnings

import torch
import torch.autograd.forward_ad as forward_ad
from mmengine.logging import print_log
from torch import Tensor

from . import Backend, torch_ops

BACKENDS = ('auto', 'reference', 'torch', 'cpp', 'triton')
LEAST_CAPABILITY = (8, 0)  # of a GPU, for the Triton kernels
FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_backend(backend: str) -> None:
    """Raises ValueError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise ValueError(f'backend: expected one of {BACKENDS}, got {backend!r}')


def backend_for(x: Tensor, backend: str) -> Backend | None:
    """What runs on x under this name, or None for the reference."""
    if backend == 'reference' or x.numel() == 0:
        return None
    fits = x.dtype in FUSED_DTYPES and x.device.type in ('cpu', 'cuda')
    if backend == 'auto':
        if x.is_cpu:
            return compiled_kernels() or torch_ops if fits else None
        return on_gpu(x.device.index) or torch_ops if fits else None
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
    ops = {'cpp': _cpp_ops, 'triton': _triton_ops}[backend]()
    ops.check_runs_on(x)
    return ops


def _triton_ops():
    """The module of Triton kernels, imported where they are asked for: it takes a second."""
    try:
        from . import triton_ops
    except ImportError as error:
        raise ImportError(
            f"backend='triton': Triton cannot be imported ({error}). It comes with "
            f"torch on Linux (pip install triton); or use backend='auto'"
        ) from error
    return triton_ops


def _cpp_ops():
    try:
        from . import cpp_ops
    except ImportError as error:
        raise ImportError(
            f"backend='cpp': the compiled kernels cannot be imported ({error}). "
            f'On Linux with GCC, install this package again for the installed torch, with '
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
            warnings.warn(f'{error}. Until then, DN layers are slower on a CPU', stacklevel=2)
        return None


def _gpu_host():
    try:
        from . import host
    except ImportError as error:
        raise ImportError(
            f"backend='cpp': the compiled host of the GPU kernels cannot be "
            f'imported ({error}). On Linux with Triton and GCC, install this '
            f'package again for the installed torch, with pip install '
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
            f'dn_mmdet: on a GPU, Python launches the DN layers, which is slower: {error}',
            logger='current',
            level=logging.WARNING,
        )
        return None


def as_version(capability: tuple[int, int]) -> str:
    return '.'.join(map(str, capability))


def on_gpu(index):
    """The Triton kernels launched from Python, or None where they do not run on this GPU."""
    host = gpu_host()
    if host is not None and not host.kernels_run_on(index):  # which may turn out at any call
        return None
    return _triton_on_gpu(index)


@functools.cache
def _triton_on_gpu(index):
    if torch.cuda.get_device_capability(index) < LEAST_CAPABILITY:
        print_log(
            f"dn_mmdet: on GPU {index}, DN layers run on torch's own operators, which is slower: "
            f'the Triton kernels need compute capability {as_version(LEAST_CAPABILITY)}',
            logger='current',
            level=logging.WARNING,
        )
        return None
    try:
        return _triton_ops()
    except ImportError as error:
        print_log(
            f"dn_mmdet: on a GPU, DN layers run on torch's own operators, which is slower: "
            f'{error}',
            logger='current',
            level=logging.WARNING,
        )
        return None


def fused_backends(device: str) -> tuple[str, ...]:
    """Those that run on 'cpu' or 'cuda' here: what to hold against the reference, and to time."""
    if device == 'cuda':
        return ('torch', 'triton', 'cpp') if gpu_host() else ('torch', 'triton')
    return ('torch', 'cpp') if compiled_kernels() else ('torch',)


@torch.compiler.assume_constant_result  # nothing in it is for Dynamo to trace
def kept_by_compile(backend, device, index):
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
    return 'triton' if device == 'cuda' and on_gpu(index) else ''
