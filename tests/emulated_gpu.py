"""The compiled GPU host without a GPU, in a process that starts with TRITON_INTERPRET=1.

The real host.cpp runs against a driver of the test's own. A launch's arguments are decoded
from the memory that a GPU would read them from, and Triton's interpreter runs the kernel on
those very pointers, each load and store of which is checked against what the plan says lies
behind it.
"""

import contextlib
import ctypes
import subprocess
import tempfile
import threading
import traceback
from pathlib import Path

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from dn_mmdet import functional, layers
from dn_mmdet.kernels import _host, host, plans, triton_kernels

SHARED = 4096  # bytes that every kernel is said to use
functions = {}  # handle -> (plan, launch)
intervals = []  # what the running launch may touch: (name, first address, the one after)
errors = []
launched = []  # names of kernels, in order
one_at_a_time = threading.RLock()  # the interpreter's state is global
load_by_driver = host._load


@ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)
def on_launch(function, grid, threads, shared, params):
    with one_at_a_time:
        return run(function, grid, threads, shared, params)


def run(function, grid, threads, shared, params):
    """0, or what CUDA says of an illegal address; the error itself is kept."""
    try:
        plan, launch = functions[function]
        assert (grid, threads, shared) == (launch.grid, 32 * launch.warps, SHARED)
        launched.append(launch.kernel)
        arguments = dict(launch.constants, ACC=host.ACCUMULATORS[launch.constants['ACC']])
        intervals.clear()
        names = plans.argument_names(launch)
        for i, name in enumerate(names):
            arguments[name] = decode(plan, launch, name, params[i])
        for extra in range(2):  # Triton's scratch memory
            assert ctypes.c_uint64.from_address(params[len(names) + extra]).value == 0
        with torch.no_grad():
            getattr(triton_kernels, launch.kernel)[(grid,)](**arguments)
        return 0
    except BaseException:
        errors.append(traceback.format_exc())
        return 700
    finally:
        intervals.clear()


def decode(plan, launch, name, at):
    kind = plans.type_of(plan, name)
    if not plans.is_pointer(name):
        if name in plans.SCALARS:
            value = ctypes.c_double.from_address(at).value
            return tl.tensor(TensorHandle(np.array([value]), tl.float64), tl.float64)
        value = ctypes.c_int32.from_address(at).value
        assert value == launch.numbers[name], name
        return value
    address = ctypes.c_uint64.from_address(at).value
    assert address, f'{launch.kernel}: {name} is null'
    symbol = name.removesuffix('_ptr')
    if symbol not in (*plans.PARAMETERS, *plans.STATE):
        assert address % plans.Plan.ALIGNMENT == 0, name
    intervals.append((name, address, address + values(plan, symbol) * kind.itemsize))
    return torch.frombuffer((ctypes.c_char * 16).from_address(address), dtype=kind)


def values(plan, symbol):
    """How many values lie behind a pointer."""
    shape = plan.shape
    if symbol in plans.MAPS:
        return shape.samples * shape.channels * shape.size
    if symbol in plans.PARAMETERS:
        return plan.sizes[f'd{symbol}']
    if symbol in plans.STATE:
        return 1 if symbol == 'tracked' else shape.channels
    return plan.sizes[symbol]


def guard(name, mask_at):
    """Makes the interpreter look at every address before it reads or writes there."""
    real = getattr(interpreter_builder, name)

    def guarded(pointers, *args):
        addresses = pointers.data.ravel()
        mask = args[mask_at].data
        addresses = addresses[np.broadcast_to(mask, pointers.data.shape).ravel().astype(bool)]
        for _, first, last in intervals:
            addresses = addresses[(addresses < first) | (addresses >= last)]
        if intervals and len(addresses):
            near = min(intervals, key=lambda i: abs(int(addresses[0]) - i[2]))
            raise IndexError(
                f'{name}: {len(addresses)} addresses outside, the first '
                f'{int(addresses[0]) - near[1]} of {near[2] - near[1]} in {near[0]}'
            )
        return real(pointers, *args)

    setattr(interpreter_builder, name, guarded)


def load(plan, launch, device):
    handle = 0x1000 + len(functions)
    functions[handle] = plan, launch
    return handle, SHARED


def dynamic_norm(x, bn, sc, *, batch_shared, ndims=(), backend='auto'):
    """As `functional.dynamic_norm` does it on a GPU, with maps on the CPU."""
    if backend == 'cpp' and not torch.compiler.is_compiling():
        y = told(host.call, x, bn, sc, batch_shared, ndims)
        if y is not None:
            return y
    if backend == 'cpp':
        backend = 'triton'
    return functional.dynamic_norm(
        x, bn, sc, batch_shared=batch_shared, ndims=ndims, backend=backend
    )


def told(function, *args):
    """The result of a call, or the first error of a kernel in it."""
    try:
        return function(*args)
    except RuntimeError as error:
        if errors:
            raise AssertionError(errors.pop(0)) from error
        raise


def install():
    """Puts the fake driver in the real one's place, for good."""
    folder = Path(tempfile.mkdtemp())
    library = folder / 'libfake.so'
    subprocess.run(
        ['gcc', '-shared', '-fPIC', '-o', library, Path(__file__).with_name('fake_cuda.c')],
        check=True,
    )
    _host.use_driver(str(library))
    fake = ctypes.CDLL(str(library))
    fake.fake_set_callback(on_launch)
    host._load = load
    layers.dynamic_norm = dynamic_norm
    guard('create_masked_load', 0)
    guard('create_masked_store', 1)
    return fake


@contextlib.contextmanager
def launches():
    """Collects the names of the kernels that are launched."""
    del launched[:]
    yield launched
