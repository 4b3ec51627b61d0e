"""From the shape of a map to the launches of `triton_kernels`: tiles, grids, memory.

A `Plan` holds no tensor. It says for each launch which kernel runs on which grid and
where each of its arguments comes from: a named tensor, a named number of the layer (eps,
momentum, bound) or an integer that the shape decides. `triton_ops` launches plans from
Python, `host` hands them to the compiled host.
"""

import math
from typing import Any, NamedTuple

import torch

from . import triton_kernels

SCALARS = ('eps', 'momentum', 'bound')
# Tensors as big as x, the state of the layer, and the gradients of its parameters: what a
# plan finds. All else it allots itself.
MAPS = ('x', 'y', 'dy', 'dx')
PARAMETERS = ('w', 'b', 'w_in', 'b_in', 'w_out', 'b_out')
STATE = ('running_mean', 'running_var', 'tracked')


class Shape(NamedTuple):
    """A map as the kernels see it: N, C, S, and whether channels are innermost."""

    samples: int
    channels: int
    size: int
    channels_last: bool
    dtype: torch.dtype
    by_sample: bool = False  # no block of rows is of two samples, contiguous or not

    @property
    def rows(self):
        separate = self.channels_last or self.by_sample
        return self.channels if separate else self.samples * self.channels

    @property
    def outer(self):
        return self.samples if self.channels_last or self.by_sample else 1

    @property
    def accumulator(self):
        """The dtype of sums and of all that is small."""
        return torch.promote_types(self.dtype, torch.float32)


class Options(NamedTuple):
    """What of a layer and its mode is compiled into the kernels."""

    hidden: int
    batch: bool  # statistics of the batch, else the running ones
    update: bool  # of the running averages
    cumulative: bool  # momentum=None
    shared: bool  # DN-C
    standardized: bool
    bounded: bool
    world: int = 1  # processes whose statistics are reduced
    rank: int = 0
    inference: bool = False  # no backward pass will come

    @property
    def by_sample(self):
        """Whether SC's inputs depend on a sample and the layer's state alone.

        Not where the counter decides the step of the averages, which all of a launch have to
        read before it is counted on.
        """
        return not (
            self.shared or self.world > 1 or self.cumulative or self.standardized and self.batch
        )


class Launch(NamedTuple):
    """One kernel on a 1-d grid."""

    kernel: str
    grid: int
    warps: int
    constants: dict[str, Any]
    numbers: dict[str, int]
    registers: int = 0  # at most, by thread; 0 for no limit


class Tuning(NamedTuple):
    """Sizes that decide speed alone; the defaults were measured, see docs/gpu.md.

    Waves: 16-byte loads of a thread in flight, by map.
    """

    sum_warps: int = 4
    sum_rows: int = 64  # of a channels_last tile in sums: lanes are merged in shared memory
    moments_waves: int = 4
    reduce_waves: int = 4
    map_warps: int = 4
    affine_waves: int = 4
    gradient_waves: int = 2
    programs: int = 528  # among which a sum over columns is split
    least_steps: int = 3  # of a program of such a sum, before it is split further
    registers: int = 64  # of a thread in sums
    # of inference by the sample: the largest map, what the affine map's columns are split
    # among, channels and hidden units of a program (0: by the number of channels), and warps
    sample_size: int = 1600
    sample_programs: int = 264
    sample_rows: int = 0
    sample_hidden: int = 0
    sample_warps: int = 4
    # channels of a program in the small part's kernels; 0: by the number of channels
    statistics_block: int = 0
    coefficients_block: int = 0
    output_block: int = 0
    moments_block: int = 0
    # of products of float32 forward (by tensor cores) and backward
    forward_precision: str = 'tf32x3'
    backward_precision: str = 'ieee'


TUNING = Tuning()
# Hidden units that a program of the small part takes at once, at most.
HIDDEN = 64


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Tile(NamedTuple):
    """U deep, R rows, K columns; see `triton_kernels`. R K is one 16-byte load a thread."""

    deep: int
    rows: int
    columns: int

    @property
    def width(self):
        return self.deep * self.columns

    @property
    def constants(self):
        return dict(U=self.deep, R=self.rows, K=self.columns)


def tile(shape: Shape, warps: int, waves: int, most_rows: int = 256) -> Tile:
    vector = 16 // shape.dtype.itemsize
    wave = warps * 32 * vector
    whole = next_power_of_2(shape.size)
    if shape.channels_last:
        # whole lines of 128 bytes if possible, few idle lanes
        penalty = {256: 1.0, 128: 1.0, 64: 0.97, 32: 0.8, 16: 0.5}
        most = min(next_power_of_2(shape.rows), most_rows)
        rows = max(
            (r for r in penalty if r <= max(most, 16)),
            key=lambda r: shape.rows / (-(-shape.rows // r) * r) * penalty[r],
        )
        rows = min(rows, most)
        columns = min(max(wave // rows, 1), whole)
        return Tile(max(1, min(waves, whole // columns)), rows, columns)
    rows = min(max(1, waves * wave // whole), next_power_of_2(shape.rows), waves * wave)
    while rows > 1 and shape.outer * -(-shape.rows // rows) < 264 and rows * whole > wave // 4:
        rows //= 2
    columns = min(whole, max(wave // rows, min(vector, whole)))
    return Tile(max(1, min(waves, whole // columns)), rows, columns)


def splits(shape: Shape, tile: Tile, tuning: Tuning) -> tuple[int, int]:
    """Into how many parts a sum over the columns is split, and the columns of each."""
    programs = shape.outer * -(-shape.rows // tile.rows)
    steps = -(-shape.size // tile.width)
    most = tuning.programs // programs
    # a program pays for its start: few of many steps beat many of one, once the GPU is full
    if programs * steps > 132 * tuning.least_steps:
        most = min(most, max(steps // tuning.least_steps, -(-132 // programs)))
    parts = max(1, min(most, steps))
    size = -(-steps // parts) * tile.width
    return -(-shape.size // size), size


def _big(kernel, shape, tile, grid, warps, registers=0, **numbers):
    return Launch(
        kernel,
        grid,
        warps,
        dict(CL=shape.channels_last, ACC=shape.accumulator, **tile.constants),
        dict(
            rows=shape.rows, columns=shape.size, row_blocks=-(-shape.rows // tile.rows), **numbers
        ),
        registers,
    )


def _sum(kernel, shape, waves, tuning):
    """A launch of moments or reduce, and into how many parts of which size it splits."""
    t = tile(shape, tuning.sum_warps, waves, tuning.sum_rows)
    parts, size = splits(shape, t, tuning)
    grid = shape.outer * -(-shape.rows // t.rows) * parts
    registers = tuning.registers if shape.accumulator == torch.float32 else 0
    return (
        _big(
            kernel,
            shape,
            t,
            grid,
            tuning.sum_warps,
            registers,
            total=shape.samples * shape.channels,
            splits=parts,
            split_size=size,
        ),
        parts,
        size,
    )


def _map(kernel, shape, waves, tuning):
    t = tile(shape, tuning.map_warps, waves)
    parts = -(-shape.size // t.width)
    grid = shape.outer * -(-shape.rows // t.rows) * parts
    return _big(kernel, shape, t, grid, tuning.map_warps, parts=parts)


def moments(shape: Shape, tuning: Tuning = TUNING) -> tuple[Launch, int, int]:
    return _sum('moments_kernel', shape, tuning.moments_waves, tuning)


def reduce(shape: Shape, tuning: Tuning = TUNING) -> tuple[Launch, int, int]:
    return _sum('reduce_kernel', shape, tuning.reduce_waves, tuning)


def affine(shape: Shape, tuning: Tuning = TUNING) -> Launch:
    return _map('affine_kernel', shape, tuning.affine_waves, tuning)


def input_gradient(shape: Shape, tuning: Tuning = TUNING) -> Launch:
    return _map('input_gradient_kernel', shape, tuning.gradient_waves, tuning)


class SmallPart:
    """The launches between the big passes, and the sizes of what they keep."""

    def __init__(
        self, shape: Shape, options: Options, missing: frozenset[str], tuning: Tuning = TUNING
    ):
        """missing: which of w, b and tracked the layer does not have."""
        n, c = shape.samples, shape.channels
        self.shape, self.options, self.tuning = shape, options, tuning
        self.missing = missing
        usual = 16 if c <= 512 else 32
        self.statistics_block = tuning.statistics_block or usual
        self.output_block = tuning.output_block or usual
        self.moments_block = tuning.moments_block or usual
        # each program adds up all partials of its samples' hidden units: fewer, larger ones
        self.coefficients_block = tuning.coefficients_block or (
            16 if c <= 128 else 32 if c <= 512 else 64
        )
        self.statistics_blocks = -(-c // self.statistics_block)
        self.output_blocks = -(-c // self.output_block)
        self.tile_hidden = min(HIDDEN, max(16, next_power_of_2(options.hidden)))
        self.hidden_blocks = -(-options.hidden // self.tile_hidden)
        self.tile_samples = 16 if n <= 16 else 32
        self.padded = -(-options.hidden // 4) * 4
        self.rows = 1 if options.shared else n

    def _absent(self, names, none):
        """The arguments that a kernel is compiled without, of what the layer lacks and none."""
        absent = {*self.missing, *none}
        absent |= {f'd{name}' for name in absent & {'w', 'b'}}  # nor is there a gradient
        return {name: None for name in names if name.removesuffix('_ptr') in absent}

    def _launch(self, kernel, block, programs=1, flags=(), none=(), **numbers):
        """programs: for each block of channels."""
        o, s = self.options, self.shape
        blocks = -(-s.channels // block)
        warps = 8 if block * self.tile_hidden >= 2048 else 4
        constants = dict(N=self.tile_samples, C=block, ACC=s.accumulator)
        precision = (
            self.tuning.backward_precision
            if 'gradient' in kernel
            else self.tuning.forward_precision
        )
        if s.accumulator == torch.float64:
            precision = 'ieee'
        names = getattr(triton_kernels, kernel).arg_names
        known = dict(
            BATCH=o.batch,
            UPDATE=o.update,
            CUMULATIVE=o.cumulative,
            SHARED=o.shared,
            STANDARDIZED=o.standardized,
            BOUNDED=o.bounded,
            H=self.tile_hidden,
            PRECISION=precision,
            WHOLE=self.hidden_blocks == 1,
            **dict(flags),
        )
        constants.update((name, value) for name, value in known.items() if name in names)
        constants.update(self._absent(names, none))
        numbers = dict(
            numbers,
            n=s.samples,
            channels=s.channels,
            hidden=o.hidden,
            padded=self.padded,
            columns=s.size,
            world=o.world,
            rank=o.rank,
            blocks=blocks,
        )
        numbers = {name: numbers[name] for name in names if name in numbers}
        return Launch(kernel, blocks * programs, warps, constants, numbers)

    @property
    def synchronized(self):
        return self.options.world > 1

    def local_statistics(self, splits: int, split_size: int) -> Launch:
        return self._launch(
            'local_statistics_kernel',
            self.statistics_block,
            flags=dict(SINGLE=splits == 1),
            splits=splits,
            split_size=split_size,
        )

    def statistics(self, splits: int, split_size: int) -> Launch:
        none = () if self.synchronized else ('table',)
        return self._launch(
            'statistics_kernel',
            self.statistics_block,
            self.hidden_blocks,
            dict(SINGLE=splits == 1),
            none,
            splits=splits,
            split_size=split_size,
        )

    def coefficients(self, parts: int = 0) -> Launch:
        """parts: of the hidden units' sums, where no launch of `statistics` comes before."""
        none = () if parts else ('v', 'running_mean', 'running_var')
        return self._launch(
            'coefficients_kernel',
            self.coefficients_block,
            -(-self.shape.samples // self.tile_samples),
            dict(STATISTICS=parts > 0),
            none,
            parts=parts or self.statistics_blocks,
        )

    def output_gradient(self, splits: int) -> Launch:
        return self._launch(
            'output_gradient_kernel',
            self.output_block,
            self.hidden_blocks,
            dict(SINGLE=splits == 1),
            splits=splits,
        )

    def moments_gradient(self) -> Launch:
        none = () if self.synchronized else ('table', 'dtable')
        return self._launch(
            'moments_gradient_kernel',
            self.moments_block,
            self.hidden_blocks,
            none=none,
            parts=self.output_blocks,
        )

    def synchronized_gradient(self) -> Launch:
        return self._launch('synchronized_gradient_kernel', self.moments_block)

    def _sample_launch(self, kernel, tile, warps, programs=1, flags=(), none=(), **numbers):
        """programs: for each sample and block of channels."""
        s, o = self.shape, self.options
        blocks = -(-s.channels // tile.rows)
        wide = s.channels > 512 and s.channels_last
        most_hidden = self.tuning.sample_hidden or (16 if wide else 32)
        constants = dict(
            CL=s.channels_last,
            H=min(self.tile_hidden, most_hidden),
            ACC=s.accumulator,
            **tile.constants,
            **dict(flags),
        )
        names = getattr(triton_kernels, kernel).arg_names
        constants.update(self._absent(names, none))
        return Launch(
            kernel,
            blocks * programs * s.samples,
            warps,
            constants,
            dict(
                numbers,
                n=s.samples,
                rows=s.channels,
                columns=s.size,
                hidden=o.hidden,
                padded=self.padded,
                row_blocks=blocks,
            ),
        )

    def _sample_tile(self, warps, waves):
        most = self.tuning.sample_rows or (64 if self.shape.channels > 512 else 32)
        return tile(self.shape._replace(by_sample=True), warps, waves, most)

    def sample_moments(self) -> Launch:
        """row_blocks among its numbers is how many partials it leaves."""
        o, t = self.options, self.tuning
        warps = 2 * t.sum_warps if self.shape.size > 128 else t.sum_warps
        none = ['v'] if o.inference and not o.batch else []
        if not o.standardized:
            none += ['running_mean', 'running_var']
        return self._sample_launch(
            'sample_moments_kernel',
            self._sample_tile(warps, t.moments_waves),
            warps,
            flags=dict(STANDARDIZED=o.standardized),
            none=none,
        )

    def sample_affine(self, blocks: int) -> Launch:
        """blocks: the partials of `sample_moments`."""
        s, t = self.shape, self.tuning
        whole = self._sample_tile(t.sample_warps, t.affine_waves)
        steps = -(-s.size // whole.width)
        programs = -(-s.channels // whole.rows) * s.samples
        size = -(-steps // max(1, min(steps, t.sample_programs // programs))) * whole.width
        parts = -(-s.size // size)
        return self._sample_launch(
            'sample_affine_kernel',
            whole,
            t.sample_warps,
            parts,
            dict(BOUNDED=self.options.bounded),
            parts=parts,
            split_size=size,
            blocks=blocks,
        )

    def sizes(self) -> dict[str, int]:
        """The number of values of each tensor of the small part."""
        nc, c = self.shape.samples * self.shape.channels, self.shape.channels
        hidden = self.options.hidden
        table = self.options.world * (2 * c + 1)
        return dict(
            m=nc,
            v=nc,
            a=nc,
            c=nc,
            g=nc,
            h=nc,
            p=nc,
            q=nc,
            mu=c,
            sigma=c,
            dmu=c,
            dsigma=c,
            r=self.rows * self.padded,
            up=self.statistics_blocks * self.rows * self.padded,
            dr=self.output_blocks * self.rows * self.padded,
            table=table,
            dtable=table,
            dw=c,
            db=c,
            dw_in=2 * c * hidden,
            db_in=hidden,
            dw_out=2 * c * hidden,
            db_out=2 * c,
        )


def argument_names(launch: Launch) -> list[str]:
    """The kernel's parameters that are no constants, in order."""
    names = getattr(triton_kernels, launch.kernel).arg_names
    return [name for name in names if name not in launch.constants]


def is_pointer(name: str) -> bool:
    return name.endswith('_ptr')


class Plan:
    """All launches of a layer on one shape, with a place in memory for what they keep.

    Attributes:
        forward, backward: lists of launches; `REDUCE_TABLE` and `REDUCE_GRADIENT` among
            them stand for an all-reduce of table or dtable.
        kept, scratch, backward_scratch: name -> offset in values of the accumulator, in
            memory that lives until the backward pass, for the forward and the backward pass.
            For inference, all is scratch.
        gradients: name -> offset in bytes.
    """

    REDUCE_TABLE, REDUCE_GRADIENT = 'all-reduce of table', 'all-reduce of dtable'
    ALIGNMENT = 16  # bytes, of each tensor's place
    KEPT = ('m', 'v', 'a', 'g', 'h', 'mu', 'sigma', 'r')
    SCRATCH = ('m_part', 'v_part', 'c', 'up')
    UNUSED_BY_SAMPLE = ('v', 'a', 'g', 'h', 'mu', 'sigma', 'r', 'c')
    BACKWARD_SCRATCH = ('da_part', 'dc_part', 'p', 'q', 'dmu', 'dsigma', 'dr')

    def __init__(
        self,
        shape: Shape,
        options: Options,
        dtypes: dict[str, torch.dtype],
        tuning: Tuning = TUNING,
    ):
        """dtypes: of those of w, b, running_mean, ... that the layer has."""
        self.shape, self.options, self.dtypes = shape, options, dtypes
        missing = frozenset(('w', 'b', *STATE)) - set(dtypes)
        if options.update or not options.batch:
            assert not missing & {'running_mean', 'running_var'}
        small = SmallPart(shape, options, missing, tuning)
        self.sizes, self.forward, self.backward = small.sizes(), [], []
        if options.by_sample and shape.size <= tuning.sample_size:
            self._add_forward_by_sample(small, tuning)
        else:
            self._add_forward(small, tuning)
        if not options.inference:
            self._add_backward(small, tuning)
        kept = () if options.inference else self.KEPT
        scratch = (*self.KEPT, *self.SCRATCH) if options.inference else self.SCRATCH
        backward = () if options.inference else self.BACKWARD_SCRATCH
        self.kept, self.kept_size = self._places(kept)
        self.scratch, self.scratch_size = self._places(scratch)
        self.backward_scratch, self.backward_scratch_size = self._places(backward)
        # what is reduced is a tensor of its own
        self.table_size = self.sizes['table'] if small.synchronized else 0
        self.gradients, self.gradient_bytes = {}, 0
        if options.inference:
            return
        for name in PARAMETERS:
            if name in dtypes:
                self.gradients[name] = self.gradient_bytes
                size = self.sizes[f'd{name}'] * dtypes[name].itemsize
                self.gradient_bytes += -(-size // self.ALIGNMENT) * self.ALIGNMENT

    def _add_forward_by_sample(self, small, tuning):
        first = small.sample_moments()
        blocks = first.numbers['row_blocks']
        self.sizes.update(up=blocks * self.shape.samples * small.padded, m_part=0, v_part=0)
        if self.options.inference and not self.options.batch:
            self.forward += [first, small.sample_affine(blocks)]
            self.sizes.update(dict.fromkeys(self.UNUSED_BY_SAMPLE, 0))
        else:
            self.forward += [first, small.coefficients(blocks), affine(self.shape, tuning)]

    def _add_forward(self, small, tuning):
        first, parts, size = moments(self.shape, tuning)
        nc = self.shape.samples * self.shape.channels
        self.sizes.update(m_part=parts * nc, v_part=parts * nc)
        # by running statistics, nothing of DN-C depends on the moments
        if self.options.batch or not self.options.shared:
            self.forward.append(first)
        if small.synchronized:
            self.forward += [small.local_statistics(parts, size), self.REDUCE_TABLE]
        self.forward += [
            small.statistics(parts, size),
            small.coefficients(),
            affine(self.shape, tuning),
        ]

    def _add_backward(self, small, tuning):
        first, parts, _ = reduce(self.shape, tuning)
        nc = self.shape.samples * self.shape.channels
        self.sizes.update(da_part=parts * nc, dc_part=parts * nc)
        self.backward += [first, small.output_gradient(parts), small.moments_gradient()]
        if small.synchronized:
            self.backward += [self.REDUCE_GRADIENT, small.synchronized_gradient()]
        self.backward.append(input_gradient(self.shape, tuning))

    def _places(self, names):
        step = self.ALIGNMENT // 4
        places, at = {}, 0
        for name in names:
            places[name] = at
            at += -(-self.sizes[name] // step) * step
        return places, at

    def launches(self):
        return [launch for launch in (*self.forward, *self.backward) if isinstance(launch, Launch)]


def type_of(plan: Plan, name: str) -> torch.dtype | str:
    """The dtype behind a pointer, of a number of the layer, or 'i32'."""
    accumulator = plan.shape.accumulator
    if not is_pointer(name):
        return torch.float64 if name in SCALARS else 'i32'
    name = name.removesuffix('_ptr')
    if name in MAPS:
        return plan.shape.dtype
    if name in plan.dtypes:
        return plan.dtypes[name]
    if name.startswith('d') and name[1:] in plan.gradients:
        return plan.dtypes[name[1:]]
    return accumulator


def divisor(n: int) -> int:
    return math.gcd(n, 16)


# Integers whose divisibility decides how wide loads can be.
HINTED = ('rows', 'columns', 'split_size', 'channels', 'padded')
