"""The four primitives as Triton kernels, and the (N, C) small part as a few more.

See the package's docstring for the primitives. A contiguous x is taken as N C rows of S
columns, a channels_last one as N times C rows of S columns whose elements are C apart;
everything else is the same for both. Sums are made in float32 (float64 for float64), and
each is split into parts only by shape, so that a result does not depend on the device.

:class:`Coefficients` takes three launches forward and four backward.
"""
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_ops import as_dense, in_layout_of

# Values in a tile of a big pass, and channels in one of a channels_last map.
TILE, CHANNELS = 2048, 64
# A reduction over few rows is split until this many programs share it, as long as each
# is left with this many tiles.
PROGRAMS, TILES = 1024, 4
# Tiles of the small part: samples, channels where their products are summed over hidden
# units or samples, channels in a matrix-vector product, and at most so many hidden units.
SAMPLES, BLOCK, LONG_BLOCK, HIDDEN = 32, 32, 128, 64


def check_runs_on(x: Tensor) -> None:
    """Raises ValueError where Triton has nothing to run kernels on x with."""
    if not (x.is_cuda or os.environ.get('TRITON_INTERPRET') == '1'):
        raise ValueError(f"backend='triton': expected a tensor on a GPU, got one on "
                         f"{x.device}; use backend='auto'")


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = as_dense(x)
    tiles = _tiles(x)
    splits, split_size = tiles.splits()
    m, v = (_small(x, (splits, *x.shape[:2])) for _ in range(2))
    _launch(_moments_kernel, tiles.programs * splits, x, m, v, *tiles.extents, splits,
            split_size, **tiles.meta(x))
    if splits == 1:
        return m[0], v[0]
    mean, var = (_small(x, x.shape[:2]) for _ in range(2))
    _launch(_merge_kernel, triton.cdiv(mean.numel(), LONG_BLOCK), m, v, mean, var,
            mean.numel(), tiles.columns, splits, split_size, ACC=_accumulator(x),
            BLOCK=LONG_BLOCK)
    return mean, var


def affine(x: Tensor, m: Tensor, a: Tensor, c: Tensor) -> Tensor:
    x = as_dense(x)
    tiles = _tiles(x)
    y = torch.empty_like(x)
    _launch(_affine_kernel, tiles.programs * tiles.column_blocks, x, y, m.contiguous(),
            a.contiguous(), c.contiguous(), *tiles.extents, tiles.column_blocks,
            **tiles.meta(x))
    return y


def reduce(dy: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    x = as_dense(x)
    dy = in_layout_of(x, dy)
    tiles = _tiles(x)
    splits, split_size = tiles.splits()
    sums = _small(x, (2, splits, *m.shape))
    _launch(_reduce_kernel, tiles.programs * splits, dy, x, m.contiguous(), sums[0], sums[1],
            *tiles.extents, splits, split_size, **tiles.meta(x))
    da, dc = sums.sum(1) if splits > 1 else sums[:, 0]
    return da, dc


def input_gradient(dy: Tensor, x: Tensor, m: Tensor, a: Tensor, p: Tensor,
                   q: Tensor) -> Tensor:
    x = as_dense(x)
    dy = in_layout_of(x, dy)
    tiles = _tiles(x)
    dx = torch.empty_like(x)
    _launch(_input_gradient_kernel, tiles.programs * tiles.column_blocks, dy, x, dx,
            *(t.contiguous() for t in (m, a, p, q)), *tiles.extents, tiles.column_blocks,
            **tiles.meta(x))
    return dx


class Coefficients:
    """a, c of equation (7) and their gradients; see `torch_ops.Coefficients`."""

    def __init__(self, m, v, size, running, averages, w, b, sc_parameters, *, eps, bound,
                 standardized, batch_shared, keep):
        n, channels = m.shape
        self.m, self.v, self.size = m, v, size
        self.training = running is None
        self.w, self.b = (None, None) if w is None else (w.contiguous(), b.contiguous())
        self.sc_parameters = [p.contiguous() for p in sc_parameters]
        self.meta = dict(ACC=_accumulator(m))
        self.sc_meta = dict(EPS=eps, SHARED=batch_shared, STANDARDIZED=standardized)
        self.bound = bound
        self.rows = 1 if batch_shared else n
        if self.training:
            self.mu, self.var = m.new_empty(2, channels)
            mean, var, momentum = averages or (self.mu, self.var, 0.)
            _launch(_statistics_kernel, triton.cdiv(channels, BLOCK), m, v, self.mu, self.var,
                    mean, var, n, channels, n * size, MOMENTUM=momentum,
                    UPDATE=averages is not None, N=SAMPLES, C=BLOCK, **self.meta)
            if averages is not None:  # autograd is to notice, as it does an operator's write
                torch.autograd.graph.increment_version((mean, var))
        else:  # copies: the averages may have moved when backward comes
            self.mu, self.var = (t.to(m.dtype, copy=keep).contiguous() for t in running)
        w_in, b_in, w_out, b_out = self.sc_parameters
        self.hidden = m.new_empty(self.rows, len(b_in))
        self.tile = min(HIDDEN, max(16, triton.next_power_of_2(len(b_in))))
        _launch(_hidden_kernel, (self.rows, triton.cdiv(len(b_in), self.tile)), m, v, self.mu,
                self.var, w_in, b_in, self.hidden, channels, len(b_in), H=self.tile,
                C=LONG_BLOCK, **self.sc_meta, **self.meta)
        self.a, self.c = m.new_empty(2, n, channels)
        self.g, self.h = m.new_empty(2, self.rows, channels) if keep else (None, None)
        _launch(_coefficients_kernel, (n, triton.cdiv(channels, BLOCK)), m, self.mu, self.var,
                self.hidden, w_out, b_out, self.w, self.b, self.a, self.c, self.g, self.h,
                channels, len(b_in), EPS=eps, BOUND=bound, SHARED=batch_shared, H=self.tile,
                C=BLOCK, **self.meta)

    def backward(self, da: Tensor, dc: Tensor):
        """p, q of equation (8), and the gradients of w, b and SC's four parameters."""
        n, channels = self.m.shape
        w_in, b_in, w_out, b_out = self.sc_parameters
        hidden = len(b_in)
        blocks = triton.cdiv(channels, BLOCK)
        dw, db = (None, None) if self.w is None else (torch.empty_like(self.w),
                                                      torch.empty_like(self.b))
        dw_in, db_in, dw_out, db_out = map(torch.empty_like, self.sc_parameters)
        dmu, dsigma = self.m.new_empty(2, channels)
        do = self.m.new_empty(self.rows, 2 * channels)
        _launch(_modulation_gradient_kernel, blocks, da, dc, self.m, self.mu, self.var, self.g,
                self.h, self.w, self.b, do, dw, db, db_out, dmu, dsigma, n, channels,
                BOUND=self.bound, EPS=self.sc_meta['EPS'], SHARED=self.sc_meta['SHARED'],
                N=SAMPLES, C=BLOCK, **self.meta)
        du = torch.empty_like(self.hidden)
        _launch(_hidden_gradient_kernel, (self.rows, triton.cdiv(hidden, self.tile)), do,
                self.hidden, w_out, du, channels, hidden, H=self.tile, C=LONG_BLOCK,
                **self.meta)
        _launch(_weight_gradient_kernel, (blocks, triton.cdiv(hidden, self.tile)), do, du,
                self.m, self.v, self.mu, self.var, self.hidden, dw_in, db_in, dw_out, self.rows,
                channels, hidden, N=SAMPLES, C=BLOCK, H=self.tile, num_stages=2,
                **self.sc_meta, **self.meta)
        p, q = self.m.new_empty(2, n, channels)
        _launch(_moments_gradient_kernel, blocks, du, self.m, self.v, self.mu, self.var, w_in,
                dmu, dsigma, p, q, n, channels, hidden, self.size, TRAINING=self.training,
                N=SAMPLES, C=BLOCK, H=self.tile, num_stages=2, **self.sc_meta, **self.meta)
        return p, q, dw, db, dw_in, db_in, dw_out, db_out


class _Tiles(NamedTuple):
    """How x is cut: `outer` times `rows` of `columns`, in tiles of the last two."""
    outer: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int
    tile_rows: int
    tile_columns: int

    @property
    def extents(self):
        return (self.rows, self.columns, self.row_stride, self.column_stride,
                triton.cdiv(self.rows, self.tile_rows))

    @property
    def programs(self):
        return self.outer * triton.cdiv(self.rows, self.tile_rows)

    @property
    def column_blocks(self):
        return triton.cdiv(self.columns, self.tile_columns)

    def splits(self):
        """Into how many parts a sum over the columns is split, and the columns of each."""
        splits = min(triton.cdiv(PROGRAMS, self.programs),
                     triton.cdiv(self.column_blocks, TILES))
        size = triton.cdiv(self.column_blocks, splits) * self.tile_columns
        return triton.cdiv(self.columns, size), size

    def meta(self, x):
        return dict(ACC=_accumulator(x), ROWS=self.tile_rows, COLUMNS=self.tile_columns)


def _tiles(x):
    n, c = x.shape[:2]
    size = x.numel() // (n * c)
    if x.is_contiguous():
        columns = min(triton.next_power_of_2(size), TILE)
        rows = min(triton.next_power_of_2(n * c), TILE // columns)
        return _Tiles(1, n * c, size, size, 1, rows, columns)
    rows = min(triton.next_power_of_2(c), CHANNELS)
    return _Tiles(n, c, size, 1, c, rows, min(triton.next_power_of_2(size), TILE // rows))


def _launch(kernel, grid, first, *args, **meta):
    with torch.cuda.device_of(first):  # Triton launches on the current device
        kernel[grid if isinstance(grid, tuple) else (grid, )](first, *args, **meta)


def _accumulator(x):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _small(x, shape):
    return torch.empty(shape, dtype=torch.promote_types(x.dtype, torch.float32),
                       device=x.device)


# Names in kernels: i_ a position in the grid, o_ offsets in a tile, b_ values of a tile.
# Products of whole extents are made in 64 bits; within a tile, 32 are enough.


@triton.jit
def _position(parts, rows, columns, row_stride, row_blocks, ROWS: tl.constexpr):
    """Which part of the columns, which rows, and where these rows start in x and in m."""
    i_part = tl.program_id(0) % parts
    i_block = tl.program_id(0) // parts % row_blocks
    i_outer = (tl.program_id(0) // parts // row_blocks).to(tl.int64)
    first = i_block.to(tl.int64) * ROWS
    start = i_outer * rows * columns + first * row_stride
    o_row = tl.arange(0, ROWS)
    return i_part.to(tl.int64), start, i_outer * rows + first + o_row, first + o_row < rows


@triton.jit
def _moments_kernel(x_ptr, m_ptr, v_ptr, rows, columns, row_stride, column_stride, row_blocks,
                    splits, split_size, ACC: tl.constexpr, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):
    """Welford's algorithm in each lane, so that |mean| >> std costs no digits."""
    i_split, start, o_out, m_row = _position(splits, rows, columns, row_stride, row_blocks, ROWS)
    o_column = tl.arange(0, COLUMNS)
    left = columns - i_split * split_size
    width = tl.minimum(left, split_size)
    x_ptr += start + i_split * split_size * column_stride
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + o_column[None, :] * column_stride
    b_mean = tl.zeros([ROWS, COLUMNS], ACC)
    b_square = tl.zeros([ROWS, COLUMNS], ACC)
    for first in range(0, split_size, COLUMNS):
        mask = m_row[:, None] & (first + o_column < width)[None, :]
        b_x = tl.load(x_ptr + offsets, mask, 0.).to(ACC)
        b_delta = tl.where(mask, b_x - b_mean, 0.)
        b_mean += b_delta / (first // COLUMNS + 1)
        b_square += tl.where(mask, b_delta * (b_x - b_mean), 0.)
        x_ptr += COLUMNS * column_stride
    b_count = tl.maximum((width - o_column + COLUMNS - 1) // COLUMNS, 0).to(ACC)[None, :]
    b_width = width.to(ACC)
    b_m = tl.sum(b_mean * b_count, 1) / b_width
    b_delta = b_mean - b_m[:, None]
    b_v = tl.sum(b_square + tl.where(b_count > 0, b_delta * b_delta * b_count, 0.), 1) / b_width
    total = (tl.num_programs(0) // splits // row_blocks).to(tl.int64) * rows
    o_out += i_split * total
    tl.store(m_ptr + o_out, b_m, m_row)
    tl.store(v_ptr + o_out, b_v, m_row)


@triton.jit
def _merge_kernel(m_ptr, v_ptr, mean_ptr, var_ptr, total, columns, splits, split_size,
                  ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and variance of whole rows from those of their parts (Chan's formula)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < total
    b_mean = tl.zeros([BLOCK], ACC)
    b_square = tl.zeros([BLOCK], ACC)
    for i in range(0, splits):
        b_before = tl.zeros([BLOCK], ACC) + i * split_size
        b_width = tl.zeros([BLOCK], ACC) + tl.minimum(split_size, columns - i * split_size)
        b_share = b_width / (b_before + b_width)
        b_delta = tl.load(m_ptr + i * total + offsets, mask, 0.) - b_mean
        b_mean += b_delta * b_share
        b_square += (tl.load(v_ptr + i * total + offsets, mask, 0.) * b_width
                     + b_delta * b_delta * b_before * b_share)
    tl.store(mean_ptr + offsets, b_mean, mask)
    tl.store(var_ptr + offsets, b_square / columns, mask)


@triton.jit
def _affine_kernel(x_ptr, y_ptr, m_ptr, a_ptr, c_ptr, rows, columns, row_stride, column_stride,
                   row_blocks, column_blocks, ACC: tl.constexpr, ROWS: tl.constexpr,
                   COLUMNS: tl.constexpr):
    i_column, start, o_small, m_row = _position(column_blocks, rows, columns, row_stride,
                                                row_blocks, ROWS)
    b_m = tl.load(m_ptr + o_small, m_row, 0.)[:, None]
    b_a = tl.load(a_ptr + o_small, m_row, 0.)[:, None]
    b_c = tl.load(c_ptr + o_small, m_row, 0.)[:, None]
    o_column = tl.arange(0, COLUMNS)
    mask = m_row[:, None] & (i_column * COLUMNS + o_column < columns)[None, :]
    start += i_column * COLUMNS * column_stride
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + o_column[None, :] * column_stride
    b_x = tl.load(x_ptr + start + offsets, mask, 0.).to(ACC)
    tl.store(y_ptr + start + offsets, b_a * (b_x - b_m) + b_c, mask)


@triton.jit
def _reduce_kernel(dy_ptr, x_ptr, m_ptr, da_ptr, dc_ptr, rows, columns, row_stride,
                   column_stride, row_blocks, splits, split_size, ACC: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i_split, start, o_small, m_row = _position(splits, rows, columns, row_stride, row_blocks,
                                               ROWS)
    b_m = tl.load(m_ptr + o_small, m_row, 0.)[:, None]
    o_column = tl.arange(0, COLUMNS)
    left = columns - i_split * split_size
    start += i_split * split_size * column_stride
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + o_column[None, :] * column_stride
    b_da = tl.zeros([ROWS, COLUMNS], ACC)
    b_dc = tl.zeros([ROWS, COLUMNS], ACC)
    for first in range(0, split_size, COLUMNS):
        mask = m_row[:, None] & (first + o_column < left)[None, :]
        b_x = tl.load(x_ptr + start + offsets, mask, 0.).to(ACC)
        b_dy = tl.load(dy_ptr + start + offsets, mask, 0.).to(ACC)
        b_da += tl.where(mask, b_dy * (b_x - b_m), 0.)
        b_dc += b_dy
        start += COLUMNS * column_stride
    total = (tl.num_programs(0) // splits // row_blocks).to(tl.int64) * rows
    o_small += i_split * total
    tl.store(da_ptr + o_small, tl.sum(b_da, 1), m_row)
    tl.store(dc_ptr + o_small, tl.sum(b_dc, 1), m_row)


@triton.jit
def _input_gradient_kernel(dy_ptr, x_ptr, dx_ptr, m_ptr, a_ptr, p_ptr, q_ptr, rows, columns,
                           row_stride, column_stride, row_blocks, column_blocks,
                           ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i_column, start, o_small, m_row = _position(column_blocks, rows, columns, row_stride,
                                                row_blocks, ROWS)
    b_m = tl.load(m_ptr + o_small, m_row, 0.)[:, None]
    b_a = tl.load(a_ptr + o_small, m_row, 0.)[:, None]
    b_p = tl.load(p_ptr + o_small, m_row, 0.)[:, None]
    b_q = tl.load(q_ptr + o_small, m_row, 0.)[:, None]
    o_column = tl.arange(0, COLUMNS)
    mask = m_row[:, None] & (i_column * COLUMNS + o_column < columns)[None, :]
    start += i_column * COLUMNS * column_stride
    offsets = tl.arange(0, ROWS)[:, None] * row_stride + o_column[None, :] * column_stride
    b_x = tl.load(x_ptr + start + offsets, mask, 0.).to(ACC)
    b_dy = tl.load(dy_ptr + start + offsets, mask, 0.).to(ACC)
    tl.store(dx_ptr + start + offsets, b_a * b_dy + (b_p * (b_x - b_m) + b_q), mask)


@triton.jit(do_not_specialize=['n', 'count'])
def _statistics_kernel(m_ptr, v_ptr, mu_ptr, var_ptr, running_mean_ptr, running_var_ptr, n,
                       channels, count, MOMENTUM: tl.constexpr, UPDATE: tl.constexpr,
                       ACC: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """Equations (1) and (2), and a step of the running averages."""
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    m_c = o_c < channels
    b_sum = tl.zeros([N, C], ACC)
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        mask = (o_n < n)[:, None] & m_c[None, :]
        b_sum += tl.load(m_ptr + o_n[:, None] * channels + o_c[None, :], mask, 0.)
    b_mu = tl.sum(b_sum, 0) / n
    b_sum = tl.zeros([N, C], ACC)
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        mask = (o_n < n)[:, None] & m_c[None, :]
        offsets = o_n[:, None] * channels + o_c[None, :]
        b_delta = tl.load(m_ptr + offsets, mask, 0.) - b_mu[None, :]
        b_v = tl.load(v_ptr + offsets, mask, 0.)
        b_sum += tl.where(mask, b_v + b_delta * b_delta, 0.)
    b_var = tl.sum(b_sum, 0) / n
    tl.store(mu_ptr + o_c, b_mu, m_c)
    tl.store(var_ptr + o_c, b_var, m_c)
    if UPDATE:
        b_count = tl.zeros([C], ACC) + count
        b_unbiased = b_var * (b_count / (b_count - 1))
        b_running = tl.load(running_mean_ptr + o_c, m_c, 0.).to(ACC)
        b_running += MOMENTUM * (b_mu - b_running)
        tl.store(running_mean_ptr + o_c, b_running, m_c)
        b_running = tl.load(running_var_ptr + o_c, m_c, 0.).to(ACC)
        b_running += MOMENTUM * (b_unbiased - b_running)
        tl.store(running_var_ptr + o_c, b_running, m_c)


@triton.jit
def _sc_inputs(m_ptr, v_ptr, offsets, mask, b_mu, b_sigma, EPS: tl.constexpr,
               SHARED: tl.constexpr, STANDARDIZED: tl.constexpr):
    """m', s' of equation (4), or mu and sigma of (5), over a tile of samples and channels."""
    if SHARED:
        b_mean = b_mu
        b_std = b_sigma
    else:
        b_mean = tl.load(m_ptr + offsets, mask, 0.)
        b_std = tl.sqrt(tl.load(v_ptr + offsets, mask, 0.) + EPS)
        if STANDARDIZED:
            b_mean = (b_mean - b_mu) / b_sigma
            b_std = b_std / b_sigma - 1
    return tl.where(mask, b_mean, 0.), tl.where(mask, b_std, 0.)


@triton.jit
def _statistics_of(mu_ptr, var_ptr, o_c, m_c, EPS: tl.constexpr):
    """mu and sigma of a block of channels."""
    b_mu = tl.load(mu_ptr + o_c, m_c, 0.)
    return b_mu, tl.sqrt(tl.load(var_ptr + o_c, m_c, 1.) + EPS)


@triton.jit
def _hidden_kernel(m_ptr, v_ptr, mu_ptr, var_ptr, w_ptr, b_ptr, hidden_ptr, channels, hidden,
                   H: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, SHARED: tl.constexpr,
                   STANDARDIZED: tl.constexpr, ACC: tl.constexpr):
    """r = relu(W_in [m', s'] + b_in), one sample and a block of hidden units each."""
    i_n = tl.program_id(0)
    o_h = tl.program_id(1) * H + tl.arange(0, H)
    m_h = o_h < hidden
    b_sum = tl.zeros([H, C], ACC)
    for first in range(0, channels, C):
        o_c = first + tl.arange(0, C)
        m_c = o_c < channels
        b_mu, b_sigma = _statistics_of(mu_ptr, var_ptr, o_c, m_c, EPS)
        b_mean, b_std = _sc_inputs(m_ptr, v_ptr, i_n * channels + o_c, m_c, b_mu, b_sigma, EPS,
                                   SHARED, STANDARDIZED)
        mask = m_h[:, None] & m_c[None, :]
        w = w_ptr + o_h[:, None] * (2 * channels) + o_c[None, :]
        b_sum += tl.load(w, mask, 0.).to(ACC) * b_mean[None, :]
        b_sum += tl.load(w + channels, mask, 0.).to(ACC) * b_std[None, :]
    b_u = tl.sum(b_sum, 1) + tl.load(b_ptr + o_h, m_h, 0.).to(ACC)
    tl.store(hidden_ptr + i_n * hidden + o_h, tl.where(b_u <= 0, 0., b_u), m_h)  # keeps NaN


@triton.jit
def _bounded(b_o, BOUND: tl.constexpr):
    """SC's bound * tanh, or nothing."""
    if BOUND is not None:
        b_e = tl.exp(-2 * tl.abs(b_o))
        b_t = (1 - b_e) / (1 + b_e)
        b_o = BOUND * tl.where(b_o < 0, -b_t, b_t)
    return b_o


@triton.jit
def _coefficients_kernel(m_ptr, mu_ptr, var_ptr, hidden_ptr, w_out_ptr, b_out_ptr, w_ptr, b_ptr,
                         a_ptr, c_ptr, g_ptr, h_ptr, channels, hidden, EPS: tl.constexpr,
                         BOUND: tl.constexpr, SHARED: tl.constexpr, H: tl.constexpr,
                         C: tl.constexpr, ACC: tl.constexpr):
    """g, h and from them a, c (7), one sample and a block of channels each."""
    i_n = tl.program_id(0)
    i_row = 0 if SHARED else i_n
    o_c = tl.program_id(1) * C + tl.arange(0, C)
    m_c = o_c < channels
    b_g = tl.zeros([C, H], ACC)
    b_h = tl.zeros([C, H], ACC)
    for first in range(0, hidden, H):
        o_h = first + tl.arange(0, H)
        m_h = o_h < hidden
        b_r = tl.load(hidden_ptr + i_row * hidden + o_h, m_h, 0.)[None, :]
        mask = m_c[:, None] & m_h[None, :]
        w = w_out_ptr + o_c[:, None] * hidden + o_h[None, :]
        b_g += tl.load(w, mask, 0.).to(ACC) * b_r
        b_h += tl.load(w + channels * hidden, mask, 0.).to(ACC) * b_r
    b_g1 = _bounded(tl.sum(b_g, 1) + tl.load(b_out_ptr + o_c, m_c, 0.).to(ACC), BOUND)
    b_h1 = _bounded(tl.sum(b_h, 1) + tl.load(b_out_ptr + channels + o_c, m_c, 0.).to(ACC), BOUND)
    b_mu, b_sigma = _statistics_of(mu_ptr, var_ptr, o_c, m_c, EPS)
    b_scale = 1 + b_g1
    b_a = b_scale / b_sigma
    b_c = b_h1
    if w_ptr is not None:
        b_a = b_scale * (tl.load(w_ptr + o_c, m_c, 0.).to(ACC) / b_sigma)
        b_c += b_scale * tl.load(b_ptr + o_c, m_c, 0.).to(ACC)
    offsets = i_n * channels + o_c
    b_c += b_a * (tl.load(m_ptr + offsets, m_c, 0.) - b_mu)
    tl.store(a_ptr + offsets, b_a, m_c)
    tl.store(c_ptr + offsets, b_c, m_c)
    if g_ptr is not None:  # where the row is shared, all programs store the same
        tl.store(g_ptr + i_row * channels + o_c, b_g1, m_c)
        tl.store(h_ptr + i_row * channels + o_c, b_h1, m_c)


@triton.jit
def _before_bound(b_dt, b_t, BOUND: tl.constexpr):
    """The gradient of the input of `_bounded`, from that of its output t."""
    if BOUND is not None:
        b_dt *= BOUND - b_t * b_t / BOUND
    return b_dt


@triton.jit(do_not_specialize=['n'])
def _modulation_gradient_kernel(da_ptr, dc_ptr, m_ptr, mu_ptr, var_ptr, g_ptr, h_ptr, w_ptr,
                                b_ptr, do_ptr, dw_ptr, db_ptr, db_out_ptr, dmu_ptr, dsigma_ptr,
                                n, channels, BOUND: tl.constexpr, EPS: tl.constexpr,
                                SHARED: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
                                ACC: tl.constexpr):
    """From da, dc to do (as rows of 2C) and all sums over samples, a block of channels each."""
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    m_c = o_c < channels
    b_mu, b_sigma = _statistics_of(mu_ptr, var_ptr, o_c, m_c, EPS)
    b_w = tl.zeros([C], ACC) + 1
    b_b = tl.zeros([C], ACC)
    if w_ptr is not None:
        b_w = tl.load(w_ptr + o_c, m_c, 0.).to(ACC)
        b_b = tl.load(b_ptr + o_c, m_c, 0.).to(ACC)
    b_dw = tl.zeros([N, C], ACC)  # of w / sigma: dw and dsigma follow from it
    b_db = tl.zeros([N, C], ACC)
    b_dmu = tl.zeros([N, C], ACC)
    b_dg = tl.zeros([N, C], ACC)
    b_dh = tl.zeros([N, C], ACC)
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        mask = (o_n < n)[:, None] & m_c[None, :]
        offsets = o_n[:, None] * channels + o_c[None, :]
        b_dc = tl.load(dc_ptr + offsets, mask, 0.)
        b_centred = tl.load(m_ptr + offsets, mask, 0.) - b_mu[None, :]
        b_da = tl.load(da_ptr + offsets, mask, 0.) + tl.where(mask, b_dc * b_centred, 0.)
        o_row = o_n[:, None] * (0 if SHARED else channels) + o_c[None, :]
        b_g = tl.load(g_ptr + o_row, mask, 0.)
        b_scale = 1 + b_g
        b_dw += b_da * b_scale
        b_db += b_dc * b_scale
        b_dmu -= b_scale * (b_w / b_sigma)[None, :] * b_dc
        b_to_g = b_da * (b_w / b_sigma)[None, :] + b_dc * b_b[None, :]
        b_to_h = b_dc
        if not SHARED:
            b_to_g = _before_bound(b_to_g, b_g, BOUND)
            b_to_h = _before_bound(b_to_h, tl.load(h_ptr + o_row, mask, 0.), BOUND)
            o_do = o_n[:, None] * (2 * channels) + o_c[None, :]
            tl.store(do_ptr + o_do, b_to_g, mask)
            tl.store(do_ptr + o_do + channels, b_to_h, mask)
        b_dg += b_to_g
        b_dh += b_to_h
    b_dg1 = tl.sum(b_dg, 0)
    b_dh1 = tl.sum(b_dh, 0)
    if SHARED:
        b_dg1 = _before_bound(b_dg1, tl.load(g_ptr + o_c, m_c, 0.), BOUND)
        b_dh1 = _before_bound(b_dh1, tl.load(h_ptr + o_c, m_c, 0.), BOUND)
        tl.store(do_ptr + o_c, b_dg1, m_c)
        tl.store(do_ptr + channels + o_c, b_dh1, m_c)
    tl.store(db_out_ptr + o_c, b_dg1, m_c)
    tl.store(db_out_ptr + channels + o_c, b_dh1, m_c)
    b_dw1 = tl.sum(b_dw, 0) / b_sigma
    if w_ptr is not None:
        tl.store(dw_ptr + o_c, b_dw1, m_c)
        tl.store(db_ptr + o_c, tl.sum(b_db, 0), m_c)
    tl.store(dmu_ptr + o_c, tl.sum(b_dmu, 0), m_c)
    tl.store(dsigma_ptr + o_c, -b_dw1 * b_w / b_sigma, m_c)


@triton.jit
def _hidden_gradient_kernel(do_ptr, hidden_ptr, w_out_ptr, du_ptr, channels, hidden,
                            H: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """du = (W_out^T do) [r > 0], one sample and a block of hidden units each."""
    i_n = tl.program_id(0)
    o_h = tl.program_id(1) * H + tl.arange(0, H)
    m_h = o_h < hidden
    b_sum = tl.zeros([C, H], ACC)
    for first in range(0, 2 * channels, C):
        o_k = first + tl.arange(0, C)
        m_k = o_k < 2 * channels
        b_do = tl.load(do_ptr + i_n * (2 * channels) + o_k, m_k, 0.)
        mask = m_k[:, None] & m_h[None, :]
        w = w_out_ptr + o_k[:, None] * hidden + o_h[None, :]
        b_sum += tl.load(w, mask, 0.).to(ACC) * b_do[:, None]
    b_r = tl.load(hidden_ptr + i_n * hidden + o_h, m_h, 0.)
    b_du = tl.where(b_r <= 0, 0., tl.sum(b_sum, 0))
    tl.store(du_ptr + i_n * hidden + o_h, b_du, m_h)


@triton.jit(do_not_specialize=['n'])
def _weight_gradient_kernel(do_ptr, du_ptr, m_ptr, v_ptr, mu_ptr, var_ptr, hidden_ptr, dw_in_ptr,
                            db_in_ptr, dw_out_ptr, n, channels, hidden, N: tl.constexpr,
                            C: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr,
                            SHARED: tl.constexpr, STANDARDIZED: tl.constexpr,
                            ACC: tl.constexpr):
    """dW_in, dW_out (and db_in): a block of channels and one of hidden units each."""
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    m_c = o_c < channels
    o_h = tl.program_id(1) * H + tl.arange(0, H)
    m_h = o_h < hidden
    b_mu, b_sigma = _statistics_of(mu_ptr, var_ptr, o_c, m_c, EPS)
    b_mean_in = tl.zeros([H, C], ACC)
    b_std_in = tl.zeros([H, C], ACC)
    b_g_out = tl.zeros([C, H], ACC)
    b_h_out = tl.zeros([C, H], ACC)
    b_db = tl.zeros([N, H], ACC)
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        m_nh = (o_n < n)[:, None] & m_h[None, :]
        m_nc = (o_n < n)[:, None] & m_c[None, :]
        b_r = tl.load(hidden_ptr + o_n[:, None] * hidden + o_h[None, :], m_nh, 0.)
        b_du = tl.load(du_ptr + o_n[:, None] * hidden + o_h[None, :], m_nh, 0.)
        o_do = o_n[:, None] * (2 * channels) + o_c[None, :]
        b_do_g = tl.load(do_ptr + o_do, m_nc, 0.)
        b_do_h = tl.load(do_ptr + o_do + channels, m_nc, 0.)
        b_mean, b_std = _sc_inputs(m_ptr, v_ptr, o_n[:, None] * channels + o_c[None, :], m_nc,
                                   b_mu[None, :], b_sigma[None, :], EPS, SHARED, STANDARDIZED)
        b_mean_in += tl.dot(tl.trans(b_du), b_mean, input_precision='ieee', out_dtype=ACC)
        b_std_in += tl.dot(tl.trans(b_du), b_std, input_precision='ieee', out_dtype=ACC)
        b_g_out += tl.dot(tl.trans(b_do_g), b_r, input_precision='ieee', out_dtype=ACC)
        b_h_out += tl.dot(tl.trans(b_do_h), b_r, input_precision='ieee', out_dtype=ACC)
        b_db += b_du
    m_hc = m_h[:, None] & m_c[None, :]
    dw_in = dw_in_ptr + o_h[:, None] * (2 * channels) + o_c[None, :]
    tl.store(dw_in, b_mean_in, m_hc)
    tl.store(dw_in + channels, b_std_in, m_hc)
    m_ch = m_c[:, None] & m_h[None, :]
    dw_out = dw_out_ptr + o_c[:, None] * hidden + o_h[None, :]
    tl.store(dw_out, b_g_out, m_ch)
    tl.store(dw_out + channels * hidden, b_h_out, m_ch)
    if tl.program_id(0) == 0:
        tl.store(db_in_ptr + o_h, tl.sum(b_db, 0), m_h)


@triton.jit
def _sc_input_gradients(du_ptr, w_in_ptr, o_n, m_n, o_c, m_c, channels, hidden,
                        N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr):
    """dm', ds' = W_in^T du, a tile of samples and channels."""
    b_dmean = tl.zeros([N, C], ACC)
    b_dstd = tl.zeros([N, C], ACC)
    for first in range(0, hidden, H):
        o_h = first + tl.arange(0, H)
        m_h = o_h < hidden
        b_du = tl.load(du_ptr + o_n[:, None] * hidden + o_h[None, :],
                       m_n[:, None] & m_h[None, :], 0.)
        mask = m_h[:, None] & m_c[None, :]
        w = w_in_ptr + o_h[:, None] * (2 * channels) + o_c[None, :]
        b_dmean += tl.dot(b_du, tl.load(w, mask, 0.).to(ACC), input_precision='ieee',
                          out_dtype=ACC)
        b_dstd += tl.dot(b_du, tl.load(w + channels, mask, 0.).to(ACC), input_precision='ieee',
                         out_dtype=ACC)
    return b_dmean, b_dstd


@triton.jit(do_not_specialize=['n'])
def _moments_gradient_kernel(du_ptr, m_ptr, v_ptr, mu_ptr, var_ptr, w_in_ptr, dmu_ptr,
                             dsigma_ptr, p_ptr, q_ptr, n, channels, hidden, size,
                             TRAINING: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
                             H: tl.constexpr, EPS: tl.constexpr, SHARED: tl.constexpr,
                             STANDARDIZED: tl.constexpr, ACC: tl.constexpr):
    """p, q (8), a block of channels each."""
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    m_c = o_c < channels
    b_mu, b_sigma = _statistics_of(mu_ptr, var_ptr, o_c, m_c, EPS)
    b_dmu = tl.load(dmu_ptr + o_c, m_c, 0.)
    b_dsigma = tl.load(dsigma_ptr + o_c, m_c, 0.)
    if TRAINING:  # what reaches mu and sigma through the inputs of SC
        if SHARED:
            o_n = tl.arange(0, N)
            b_dmean, b_dstd = _sc_input_gradients(du_ptr, w_in_ptr, o_n, o_n < 1, o_c, m_c,
                                                  channels, hidden, N, C, H, ACC)
            b_dmu += tl.sum(b_dmean, 0)
            b_dsigma += tl.sum(b_dstd, 0)
        elif STANDARDIZED:
            for first in range(0, n, N):
                o_n = first + tl.arange(0, N)
                m_n = o_n < n
                mask = m_n[:, None] & m_c[None, :]
                b_dmean, b_dstd = _sc_input_gradients(du_ptr, w_in_ptr, o_n, m_n, o_c, m_c,
                                                      channels, hidden, N, C, H, ACC)
                b_mean, b_std = _sc_inputs(m_ptr, v_ptr, o_n[:, None] * channels + o_c[None, :],
                                           mask, b_mu[None, :], b_sigma[None, :], EPS, False,
                                           True)
                b_dmu -= tl.sum(b_dmean, 0) / b_sigma
                b_dsigma -= tl.sum(b_dmean * b_mean + b_dstd * (b_std + 1), 0) / b_sigma
    b_dvar = b_dsigma / (2 * b_sigma)
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        m_n = o_n < n
        mask = m_n[:, None] & m_c[None, :]
        offsets = o_n[:, None] * channels + o_c[None, :]
        b_dm = tl.zeros([N, C], ACC)
        b_dv = tl.zeros([N, C], ACC)
        if not SHARED:
            b_dm, b_ds = _sc_input_gradients(du_ptr, w_in_ptr, o_n, m_n, o_c, m_c, channels,
                                             hidden, N, C, H, ACC)
            if STANDARDIZED:
                b_dm /= b_sigma[None, :]
                b_ds /= b_sigma[None, :]
            b_dv = b_ds / (2 * tl.sqrt(tl.load(v_ptr + offsets, mask, 1.) + EPS))
        if TRAINING:
            b_centred = tl.load(m_ptr + offsets, mask, 0.) - b_mu[None, :]
            b_dv += b_dvar[None, :] / n
            b_dm += (b_dmu[None, :] + 2 * b_dvar[None, :] * b_centred) / n
        tl.store(p_ptr + offsets, 2 * b_dv / size, mask)
        tl.store(q_ptr + offsets, b_dm / size, mask)
