"""The Triton kernels launched from C++: plans, compiled kernels, and the compiled host.

`call` hands a layer to `csrc/host.cpp`, which reads what it needs from the layer's modules,
finds the plan for the map's shape and the layer's mode, and makes one launch after the other.
A plan that is missing is made here, from `plans` and from kernels that Triton compiles (and
keeps in its own cache). Nothing of it is kept in a layer, so that layers are copied, pickled
and moved as ever.

Triton passes a kernel's arguments in order, without constants, then two pointers to scratch
memory; `compile_kernel` checks that in the compiled code, and another version of Triton is
refused.
"""

import contextlib
import logging
import re
import struct
from typing import NamedTuple

import torch
import torch.nn.modules.module as torch_modules
import triton.language as tl
from mmengine.logging import print_log
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from dn_mmdet.sc import SC
from dn_mmdet.statistics import process_group

from . import _host, plans, triton_kernels
from .choice import LEAST_CAPABILITY, as_version

INTERFACE = 1  # host.cpp's
if getattr(_host, 'INTERFACE', None) != INTERFACE:
    raise ImportError(f'{_host.__file__} was built from other sources of this package')
# Where an argument comes from, in the order of host.cpp's Source.
SOURCES = (
    'x',
    'y',
    'dy',
    'dx',
    'w',
    'b',
    'w_in',
    'b_in',
    'w_out',
    'b_out',
    'running_mean',
    'running_var',
    'tracked',
    'kept',
    'scratch',
    'backward_scratch',
    'dw',
    'db',
    'dw_in',
    'db_in',
    'dw_out',
    'db_out',
    'table',
    'dtable',
    'eps',
    'momentum',
    'bound',
    'number',
)
# host.cpp's Mode; BACKWARD: an operator's gradient, which has a plan of its own.
BATCH, UPDATE, CUMULATIVE, SHARED, STANDARDIZED, BOUNDED, CHANNELS_LAST, INFERENCE, BACKWARD = (
    1 << i for i in range(9)
)
MODES = 9  # bits; the dtype of the map stands above them
# c10::ScalarType
DTYPES = {4: torch.int64, 5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
TRITON_TYPES = {
    torch.float16: 'fp16',
    torch.bfloat16: 'bf16',
    torch.float32: 'fp32',
    torch.float64: 'fp64',
    torch.int64: 'i64',
    'i32': 'i32',
}
ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}
OWN = (*plans.PARAMETERS, *plans.STATE)  # the layer's tensors
# host.cpp's Kind.
OTHER, NORM, SYNC_NORM, PLAIN_SC = range(4)


class UnknownTriton(RuntimeError):
    """A version of Triton whose kernels take their arguments in another way."""


_unusable = {}  # device index -> why its kernels cannot be compiled or loaded


def call(x, bn, sc, batch_shared: bool, ndims: tuple[int, ...]):
    """y of a layer, or None where the layer, the map or the moment is not the plain case.

    That is: a dense map on a GPU; a (Sync)BatchNorm and an SC as they come, with nothing
    registered on them; no transform, trace or dispatch mode. All sizes, dtypes and devices
    fit: whatever does not is left to the caller, who says so.
    """
    y = _host.call(x, bn, sc, batch_shared, ndims)
    if y.__class__ is not tuple:
        return y
    return _host.call(x, bn, sc, batch_shared, ndims) if _add_plan(y) else None


def forward(x, parameters, state, mode: int, eps: float, momentum: float, bound: float):
    """y and what is kept for `backward`, for an operator: of tensors, below autograd.

    Args:
        x: a map on a GPU; y has its strides where it is contiguous or channels_last.
        parameters: w, b and SC's four; w and b can be None.
        state: the running averages and the counter, None where missing.
        mode: BATCH | ..., with INFERENCE where nothing is to be kept.
        momentum, bound: any number where the mode says that they do not count.

    Returns:
        None where the kernels cannot be compiled or loaded on this GPU. What is kept is flat, of
        `plans.Plan.kept_size` values.
    """
    return _by_plan(_host.forward, x, parameters, state, mode, eps, momentum, bound)


def backward(dy, x, kept, parameters, mode: int, eps: float, bound: float, x_needs_gradient: bool):
    """The gradients of x and of the six parameters, None where there is none.

    All of them None, as in `forward`, is None alone. Of the mode the same can be given.
    """
    return _by_plan(_host.backward, dy, x, kept, parameters, mode, eps, bound, x_needs_gradient)


def _by_plan(function, *args):
    found = function(*args)
    if found.__class__ is not tuple:
        return found
    return function(*args) if _add_plan(found) else None


def _add_plan(key) -> bool:
    device = max(key[0], 0)  # a test's maps are on the CPU
    if device in _unusable:
        return False
    try:
        plan = plan_of(key)
        blob = encode(plan, lambda launch: _load(plan, launch, device))
    except (torch.OutOfMemoryError, MemoryError):  # of this moment, not of this GPU
        raise
    except Exception as error:  # of Triton's compiler or of the driver, any
        _unusable[device] = error
        print_log(
            f'dn_mmdet: on GPU {device} DN layers run on slower operators: the kernels '
            f'cannot be compiled or loaded ({type(error).__name__}: {error})',
            logger='current',
            level=logging.WARNING,
        )
        return False
    _host.add_plan(key, blob)
    return True


def kernels_run_on(device: int) -> bool:
    """Whether nothing is known against Triton's kernels on this GPU."""
    return isinstance(_unusable.get(device, UnknownTriton()), UnknownTriton)


def plan_of(key) -> plans.Plan:
    """The plan that host.cpp's key stands for."""
    _, n, c, s, hidden, mode, dtypes, world, rank = key
    shape = plans.Shape(n, c, s, bool(mode & CHANNELS_LAST), DTYPES[mode >> MODES])
    options = plans.Options(
        hidden=hidden,
        batch=bool(mode & BATCH),
        update=bool(mode & UPDATE),
        cumulative=bool(mode & CUMULATIVE),
        shared=bool(mode & SHARED),
        standardized=bool(mode & STANDARDIZED),
        bounded=bool(mode & BOUNDED),
        world=world,
        rank=rank,
        inference=bool(mode & INFERENCE),
    )
    given = {}
    for i, name in enumerate(OWN):
        number = dtypes >> 6 * (len(OWN) - 1 - i) & 63
        if number:
            given[name] = DTYPES[number - 1]
    if not mode & BACKWARD:
        return plans.Plan(shape, options, given, _tuning)
    if not options.batch:  # a plan's; no kernel of a backward pass reads them
        given.update(running_mean=shape.accumulator, running_var=shape.accumulator)
    plan = plans.Plan(shape, options, given, _tuning)
    plan.forward.clear()
    return plan


_tuning = plans.TUNING


@contextlib.contextmanager
def tuned(tuning: plans.Tuning):
    """Within, layers of this process run by other tile sizes: to compare them."""
    global _tuning
    before, _tuning = _tuning, tuning
    _host.forget_plans()
    try:
        yield
    finally:
        _tuning = before
        _host.forget_plans()


def encode(plan: plans.Plan, handle_of) -> bytes:
    """What host.cpp's add_plan takes. handle_of(launch) -> (function, shared memory)."""
    itemsize = plan.shape.accumulator.itemsize
    places = {name: (name, 0) for name in (*plans.MAPS, *OWN, 'table', 'dtable')}
    for source in ('kept', 'scratch', 'backward_scratch'):
        for name, at in getattr(plan, source).items():
            places[name] = source, at * itemsize
    for name in plan.gradients:
        places[f'd{name}'] = f'd{name}', 0
    numbers = [
        itemsize * plan.kept_size,
        itemsize * plan.kept.get('mu', 0),
        itemsize * plan.kept.get('sigma', 0),
        itemsize * plan.scratch_size,
        itemsize * plan.backward_scratch_size,
        plan.gradient_bytes,
        *(plan.gradients.get(name, 0) for name in plans.PARAMETERS),
        plan.table_size,
        NUMBERS[plan.shape.accumulator],
    ]
    for launches in (plan.forward, plan.backward):
        numbers.append(len(launches))
        for launch in launches:
            if not isinstance(launch, plans.Launch):
                numbers.append(0)  # an all-reduce
                continue
            handle, shared = handle_of(launch)
            arguments = plans.argument_names(launch)
            numbers += [handle, launch.grid, 32 * launch.warps, shared, len(arguments)]
            for name in arguments:
                if plans.is_pointer(name):
                    source, value = places[name.removesuffix('_ptr')]
                elif name in plans.SCALARS:
                    source, value = name, 0
                else:
                    source, value = 'number', launch.numbers[name]
                numbers += [SOURCES.index(source), value]
    return struct.pack(f'<{len(numbers)}q', *numbers)


class Signature(NamedTuple):
    """All that decides a kernel's machine code, of one GPU; a key of what is compiled."""

    kernel: str
    types: tuple[str, ...]  # of each parameter, in Triton's words
    constants: tuple  # (name, value)
    divisibility: tuple[tuple[int, int], ...]  # (index of the parameter, divisor)
    warps: int
    registers: int

    @classmethod
    def of(cls, plan: plans.Plan, launch: plans.Launch):
        types, divisibility = [], []
        for i, name in enumerate(getattr(triton_kernels, launch.kernel).arg_names):
            if name in launch.constants:
                types.append('constexpr')
                continue
            pointer = plans.is_pointer(name)
            types.append('*' * pointer + TRITON_TYPES[plans.type_of(plan, name)])
            if pointer and name.removesuffix('_ptr') not in OWN:  # those may start anywhere
                divisibility.append((i, plans.Plan.ALIGNMENT))
            elif name in plans.HINTED and plans.divisor(launch.numbers[name]) > 1:
                divisibility.append((i, plans.divisor(launch.numbers[name])))
        return cls(
            launch.kernel,
            tuple(types),
            tuple(launch.constants.items()),
            tuple(divisibility),
            launch.warps,
            launch.registers,
        )


def compile_kernel(signature: Signature, capability: int):
    """A kernel, compiled for a GPU that need not be here (90: sm_90).

    Raises:
        UnknownTriton: this version of Triton passes arguments in another way.
    """
    kernel = getattr(triton_kernels, signature.kernel)
    constants = {
        name: ACCUMULATORS[value] if name == 'ACC' else value
        for name, value in signature.constants
    }
    attributes = {(i,): [['tt.divisibility', divisor]] for i, divisor in signature.divisibility}
    options = dict(num_warps=signature.warps, num_stages=2)
    if signature.registers:
        options['maxnreg'] = signature.registers
    types = dict(zip(kernel.arg_names, signature.types, strict=True))
    binary = triton_compile(
        ASTSource(kernel, types, constants, attributes),
        target=GPUTarget('cuda', capability, 32),
        options=options,
    )
    _check_arguments(binary, [t for t in signature.types if t != 'constexpr'])
    return binary


# Of a kernel that is launched as host.cpp does it. A name that is missing may be new elsewhere.
METADATA = dict(
    num_ctas=1,
    launch_cooperative_grid=False,
    launch_pdl=False,
    global_scratch_size=0,
    profile_scratch_size=0,
)


def _check_arguments(binary, types):
    meta = binary.metadata
    entry = re.search(r'\.entry\s+\w+\((.*?)\)', binary.asm['ptx'], re.S).group(1)
    sizes = [int(bits) // 8 for bits in re.findall(r'\.param \.[a-z](\d+)', entry)]
    wanted = [4 if t == 'i32' else 8 for t in types] + [8, 8]  # two scratch pointers
    if sizes != wanted or any(
        getattr(meta, name, None) != value for name, value in METADATA.items()
    ):
        raise UnknownTriton(
            f"expected Triton's kernels to take {wanted} bytes of arguments, got "
            f'{sizes}: this version of Triton is not known; install triton 3.6'
        )


_loaded = {}  # (signature, device) -> (function, bytes of shared memory)


def _load(plan, launch, device):
    key = Signature.of(plan, launch), device
    if key not in _loaded:
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            raise RuntimeError(
                'expected compute capability '
                f'{as_version(LEAST_CAPABILITY)} or later, got {as_version(capability)}'
            )
        binary = compile_kernel(key[0], 10 * capability[0] + capability[1])
        function, *_ = _host.load(
            binary.asm['cubin'], binary.metadata.name, binary.metadata.shared, device
        )
        _loaded[key] = function, binary.metadata.shared
    return _loaded[key]


def _kind_of_type(cls: type) -> int:
    """What host.cpp takes a module of this class for."""
    if getattr(cls, 'forward', None) is _BatchNorm.forward:
        return NORM
    if getattr(cls, 'forward', None) is nn.SyncBatchNorm.forward:
        return SYNC_NORM
    return PLAIN_SC if getattr(cls, 'forward', None) is SC.forward else OTHER


def _group_of(bn):
    """(name, world size, rank) of the processes that reduce bn's statistics, or None."""
    group = process_group(bn)
    if group is None:
        return None
    return (
        group.group_name,
        torch.distributed.get_world_size(group),
        torch.distributed.get_rank(group),
    )


def _double_backward(dy, x, mu, sigma, parameters, needed, mode, eps, bound, group):
    """The gradients of x, w, b and SC's parameters, each operation seen by autograd."""
    from dn_mmdet import functional

    return functional.replayed_backward(
        dy,
        x,
        mu,
        sigma,
        parameters,
        needed,
        batch=bool(mode & BATCH),
        batch_shared=bool(mode & SHARED),
        standardized=bool(mode & STANDARDIZED),
        eps=eps,
        bound=bound if mode & BOUNDED else None,
        group=group,
    )


_host.configure(  # what it needs of Python
    _kind_of_type,
    _group_of,
    _double_backward,
    (
        torch_modules._global_forward_hooks,
        torch_modules._global_forward_pre_hooks,
        torch_modules._global_backward_hooks,
        torch_modules._global_backward_pre_hooks,
    ),
)
