"""Dynamic Normalization as Triton kernels: four forward, four backward, two for inference.

For x (N, C, ...) with S values in each of a sample's channels, in the names of
`dn_mmdet.functional`; sums over channels leave a kernel as one partial for each block of
channels, and the next kernel adds them up, so that each weight is read once::

    moments              x                     -> partials of m, v over parts of S
    statistics           m, v, mu, sigma, running averages; partials of W_in [m', s']
    coefficients         hidden units r, then g, h and a, c (7)
    affine               y = a (x - m) + c

    reduce               dy, x                 -> partials of da, dc over parts of S
    output_gradient      dw, db, dW_out, db_out; dmu, dsigma; partials of W_out^T do
    moments_gradient     dW_in, db_in; p, q (8)
    input_gradient       dx = a dy + p (x - m) + q

Synchronised statistics add a kernel before each of the two all-reduces.

A small map's channel is read by one program, which goes on to W_in [m', s'] where these need
no statistics of the batch. Then `coefficients` makes the statistics too, and forward takes three
kernels. Inference by running statistics needs nothing of other samples, keeps nothing, and
takes two::

    sample_moments       x                     -> m, v; partials of W_in [m', s']
    sample_affine        r, g, h and a, c (7) of a block of channels; y = a (x - m) + c

x is seen as `outer` times (rows x columns). channels_last (CL): outer = N, rows = C (stride
1), columns = S (stride C). Contiguous: outer = 1, rows = N C (stride S), columns = S (stride
1). A tile of a map is 3-d, [U, K, R] (CL) or [U, R, K], contiguous in its last dimension:
Triton spreads threads over the last two and leaves U in registers, so that a thread has U
independent 16-byte loads in flight, and sums over U cost no communication.

Everything small is in ACC, float32 or float64; numbers of the layer (eps, momentum, bound)
come in float64. Names: i_ a position in the grid, o_ offsets,
m_ masks, b_ values of a tile. Products of whole extents are made in 64 bits.
"""
import triton
import triton.language as tl


@triton.jit
def _position(row_blocks, parts, CL: tl.constexpr):
    """Block of rows, part of the columns, outer. Neighbouring programs read neighbouring bytes."""
    pid = tl.program_id(0)
    if CL:
        i_row = pid % row_blocks
        i_part = (pid // row_blocks) % parts
        i_outer = pid // row_blocks // parts
    else:
        i_part = pid % parts
        i_row = pid // parts
        i_outer = 0
    return i_row, i_part, i_outer


@triton.jit
def _start(i_row, i_outer, first, rows, columns, CL: tl.constexpr, R: tl.constexpr):
    """Where a program's values start in x."""
    if CL:
        start = (tl.cast(i_outer, tl.int64) * columns + first) * rows + i_row * R
    else:
        start = tl.cast(i_row, tl.int64) * R * columns + first
    return start


@triton.jit
def _offsets(rows, columns, CL: tl.constexpr, U: tl.constexpr, R: tl.constexpr,
             K: tl.constexpr):
    """Offsets of a 3-d tile in x, and its columns (broadcastable)."""
    o_column = tl.arange(0, U)[:, None] * K + tl.arange(0, K)[None, :]
    o_row = tl.arange(0, R)
    if CL:
        b_column = o_column[:, :, None]
        offsets = b_column * rows + o_row[None, None, :]
    else:
        b_column = o_column[:, None, :]
        offsets = b_column + o_row[None, :, None].to(tl.int64) * columns
    return offsets, b_column


@triton.jit
def _over(b, CL: tl.constexpr):
    """(R,) over a 3-d tile."""
    if CL:
        t = b[None, None, :]
    else:
        t = b[None, :, None]
    return t


@triton.jit
def _plane(rows, columns, CL: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """Offsets of a 2-d tile in x, its columns (broadcastable), the step to the next tile."""
    o_row = tl.arange(0, R)
    o_column = tl.arange(0, K)
    if CL:
        b_column = o_column[:, None]
        offsets = b_column * rows + o_row[None, :]
        step = K * rows
    else:
        b_column = o_column[None, :]
        offsets = b_column + o_row[:, None].to(tl.int64) * columns
        step = K
    return offsets, b_column, step


@triton.jit
def _flat(b, CL: tl.constexpr):
    """(R,) over a 2-d tile."""
    if CL:
        t = b[None, :]
    else:
        t = b[:, None]
    return t


@triton.jit
def _sum_lanes(b, CL: tl.constexpr):
    """The sum over the columns of a 2-d tile, [K, R] or [R, K]: (R,)."""
    if CL:
        t = tl.sum(b, 0)
    else:
        t = tl.sum(b, 1)
    return t


@triton.jit
def _zeros(CL: tl.constexpr, R: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    if CL:
        b = tl.zeros([K, R], ACC)
    else:
        b = tl.zeros([R, K], ACC)
    return b


@triton.jit
def _read(x_ptr, offsets, b_column, m_row, left, step, K: tl.constexpr, u: tl.constexpr):
    mask = m_row & (b_column + u * K < left)
    return tl.load(x_ptr + u * step + offsets, mask, 0.), mask


@triton.jit
def _add_moments(b_x, mask, b_shift, b_s1, b_s2, ACC: tl.constexpr):
    b_d = tl.where(mask, b_x.to(ACC) - b_shift, 0.)
    return b_s1 + b_d, b_s2 + b_d * b_d


@triton.jit
def _moments_of(x_ptr, offsets, b_column, m_row, left, step, b_count, b_shift, b_s1, b_s2,
                FIRST: tl.constexpr, U: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """U tiles: all loads first, kept as they are, then one tile's sums after the other's."""
    x0, m0 = _read(x_ptr, offsets, b_column, m_row, left, step, K, 0)
    if U > 1:
        x1, m1 = _read(x_ptr, offsets, b_column, m_row, left, step, K, 1)
    if U > 2:
        x2, m2 = _read(x_ptr, offsets, b_column, m_row, left, step, K, 2)
        x3, m3 = _read(x_ptr, offsets, b_column, m_row, left, step, K, 3)
    if FIRST:
        b_shift += x0.to(ACC)
        if U > 1:
            b_shift += x1.to(ACC)
        if U > 2:
            b_shift += x2.to(ACC)
            b_shift += x3.to(ACC)
        b_shift = b_shift / tl.maximum(tl.minimum(b_count, U), 1.)
    b_s1, b_s2 = _add_moments(x0, m0, b_shift, b_s1, b_s2, ACC)
    if U > 1:
        b_s1, b_s2 = _add_moments(x1, m1, b_shift, b_s1, b_s2, ACC)
    if U > 2:
        b_s1, b_s2 = _add_moments(x2, m2, b_shift, b_s1, b_s2, ACC)
        b_s1, b_s2 = _add_moments(x3, m3, b_shift, b_s1, b_s2, ACC)
    return b_shift, b_s1, b_s2


@triton.jit
def _moments_of_rows(x_ptr, m_row, rows, columns, width, CL: tl.constexpr, U: tl.constexpr,
                     R: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """Mean and population variance (R,) of `width` columns from x_ptr on.

    Each lane (a row and a column of the tile) sums about the mean of its own first U values,
    so that |mean| >> std costs no digits; lanes are merged about the row's first value.
    """
    offsets, b_column, step = _plane(rows, columns, CL, R, K)
    b_count = tl.maximum((width - b_column + K - 1) // K, 0).to(ACC)
    m_tile = _flat(m_row, CL)
    o_first = tl.arange(0, R) if CL else tl.arange(0, R).to(tl.int64) * columns
    b_first = tl.load(x_ptr + o_first, m_row, 0.).to(ACC)
    b_zero = _zeros(CL, R, K, ACC)
    b_shift, b_s1, b_s2 = _moments_of(x_ptr, offsets, b_column, m_tile, width, step, b_count,
                                      b_zero, b_zero, b_zero, True, U, K, ACC)
    for i in range(U * K, width, U * K):
        x_ptr += U * step
        b_shift, b_s1, b_s2 = _moments_of(x_ptr, offsets, b_column, m_tile, width - i, step,
                                          b_count, b_shift, b_s1, b_s2, False, U, K, ACC)
    b_rest = b_s1 / tl.maximum(b_count, 1.)
    b_delta = tl.where(b_count > 0, b_shift - _flat(b_first, CL) + b_rest, 0.)
    b_width = width.to(ACC)
    b_m = _sum_lanes(b_delta * b_count, CL) / b_width
    b_delta -= _flat(b_m, CL)
    b_square = b_s2 - b_s1 * b_rest
    b_square = tl.where(b_square < 0, 0., b_square) + b_delta * b_delta * b_count  # keeps NaN
    return b_first + b_m, _sum_lanes(b_square, CL) / b_width


@triton.jit
def moments_kernel(x_ptr, m_part_ptr, v_part_ptr, rows, columns, total, row_blocks, splits,
                   split_size, CL: tl.constexpr, U: tl.constexpr, R: tl.constexpr,
                   K: tl.constexpr, ACC: tl.constexpr):
    """Mean and population variance of each row's part of the columns: (splits, N, C) each."""
    i_row, i_split, i_outer = _position(row_blocks, splits, CL)
    first = i_split * split_size
    o_row = i_row * R + tl.arange(0, R)
    m_row = o_row < rows
    x_ptr += _start(i_row, i_outer, first, rows, columns, CL, R)
    width = tl.minimum(columns - first, split_size)
    b_m, b_v = _moments_of_rows(x_ptr, m_row, rows, columns, width, CL, U, R, K, ACC)
    o_out = i_split * total + i_outer * rows + o_row
    tl.store(m_part_ptr + o_out, b_m, m_row)
    tl.store(v_part_ptr + o_out, b_v, m_row)


@triton.jit
def _add_gradient(b_dy, b_x, b_m, b_da, b_dc, mask, ACC: tl.constexpr):
    b_dy = b_dy.to(ACC)
    return b_da + tl.where(mask, b_dy * (b_x.to(ACC) - b_m), 0.), b_dc + b_dy


@triton.jit
def reduce_kernel(dy_ptr, x_ptr, m_ptr, da_part_ptr, dc_part_ptr, rows, columns, total,
                  row_blocks, splits, split_size, CL: tl.constexpr, U: tl.constexpr,
                  R: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """da = sum dy (x - m), dc = sum dy over each row's part of the columns: (splits, N, C)."""
    i_row, i_split, i_outer = _position(row_blocks, splits, CL)
    first = i_split * split_size
    o_row = i_row * R + tl.arange(0, R)
    m_row = o_row < rows
    offsets, b_column, step = _plane(rows, columns, CL, R, K)
    start = _start(i_row, i_outer, first, rows, columns, CL, R)
    x_ptr += start
    dy_ptr += start
    o_small = i_outer * rows + o_row
    b_m = _flat(tl.load(m_ptr + o_small, m_row, 0.), CL)
    width = tl.minimum(columns - first, split_size)
    m_tile = _flat(m_row, CL)
    b_da = _zeros(CL, R, K, ACC)
    b_dc = _zeros(CL, R, K, ACC)
    for i in range(0, width, U * K):  # all loads first, as in _moments_of
        left = width - i
        x0, m0 = _read(x_ptr, offsets, b_column, m_tile, left, step, K, 0)
        y0, m0 = _read(dy_ptr, offsets, b_column, m_tile, left, step, K, 0)
        if U > 1:
            x1, m1 = _read(x_ptr, offsets, b_column, m_tile, left, step, K, 1)
            y1, m1 = _read(dy_ptr, offsets, b_column, m_tile, left, step, K, 1)
        if U > 2:
            x2, m2 = _read(x_ptr, offsets, b_column, m_tile, left, step, K, 2)
            y2, m2 = _read(dy_ptr, offsets, b_column, m_tile, left, step, K, 2)
            x3, m3 = _read(x_ptr, offsets, b_column, m_tile, left, step, K, 3)
            y3, m3 = _read(dy_ptr, offsets, b_column, m_tile, left, step, K, 3)
        b_da, b_dc = _add_gradient(y0, x0, b_m, b_da, b_dc, m0, ACC)
        if U > 1:
            b_da, b_dc = _add_gradient(y1, x1, b_m, b_da, b_dc, m1, ACC)
        if U > 2:
            b_da, b_dc = _add_gradient(y2, x2, b_m, b_da, b_dc, m2, ACC)
            b_da, b_dc = _add_gradient(y3, x3, b_m, b_da, b_dc, m3, ACC)
        x_ptr += U * step
        dy_ptr += U * step
    o_out = i_split * total + o_small
    tl.store(da_part_ptr + o_out, _sum_lanes(b_da, CL), m_row)
    tl.store(dc_part_ptr + o_out, _sum_lanes(b_dc, CL), m_row)


@triton.jit
def affine_kernel(x_ptr, y_ptr, m_ptr, a_ptr, c_ptr, rows, columns, row_blocks, parts,
                  CL: tl.constexpr, U: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
                  ACC: tl.constexpr):
    i_row, i_part, i_outer = _position(row_blocks, parts, CL)
    first = i_part * (U * K)
    o_row = i_row * R + tl.arange(0, R)
    m_row = o_row < rows
    offsets, b_column = _offsets(rows, columns, CL, U, R, K)
    start = _start(i_row, i_outer, first, rows, columns, CL, R)
    mask = _over(m_row, CL) & (b_column < columns - first)
    b_x = tl.load(x_ptr + start + offsets, mask, 0.).to(ACC)
    o_small = i_outer * rows + o_row
    b_m = _over(tl.load(m_ptr + o_small, m_row, 0.), CL)
    b_a = _over(tl.load(a_ptr + o_small, m_row, 0.), CL)
    b_c = _over(tl.load(c_ptr + o_small, m_row, 0.), CL)
    tl.store(y_ptr + start + offsets, b_a * (b_x - b_m) + b_c, mask)


@triton.jit
def input_gradient_kernel(dy_ptr, x_ptr, dx_ptr, m_ptr, a_ptr, p_ptr, q_ptr, rows, columns,
                          row_blocks, parts, CL: tl.constexpr, U: tl.constexpr,
                          R: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    i_row, i_part, i_outer = _position(row_blocks, parts, CL)
    first = i_part * (U * K)
    o_row = i_row * R + tl.arange(0, R)
    m_row = o_row < rows
    offsets, b_column = _offsets(rows, columns, CL, U, R, K)
    start = _start(i_row, i_outer, first, rows, columns, CL, R)
    mask = _over(m_row, CL) & (b_column < columns - first)
    b_x = tl.load(x_ptr + start + offsets, mask, 0.).to(ACC)
    b_dy = tl.load(dy_ptr + start + offsets, mask, 0.).to(ACC)
    o_small = i_outer * rows + o_row
    b_m = _over(tl.load(m_ptr + o_small, m_row, 0.), CL)
    b_a = _over(tl.load(a_ptr + o_small, m_row, 0.), CL)
    b_p = _over(tl.load(p_ptr + o_small, m_row, 0.), CL)
    b_q = _over(tl.load(q_ptr + o_small, m_row, 0.), CL)
    tl.store(dx_ptr + start + offsets, b_a * b_dy + (b_p * (b_x - b_m) + b_q), mask)


# The small part. A program has a block of channels (C) and, in most kernels, one of hidden
# units (H), and goes through the samples in blocks (N). Where a layer has more hidden units
# than H, the programs of the first block alone store what does not depend on them.


@triton.jit
def _merged(m_part_ptr, v_part_ptr, o_nc, mask, total, splits, split_size, columns,
            SINGLE: tl.constexpr, N: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """m, v of a tile of samples and channels from those of their parts."""
    b_m = tl.load(m_part_ptr + o_nc, mask, 0.)
    if SINGLE:
        b_v = tl.load(v_part_ptr + o_nc, mask, 0.)
    else:
        b_first = b_m
        b_sum = tl.zeros([N, C], ACC)
        b_square = tl.zeros([N, C], ACC)
        for i_first in range(0, splits, 4):
            for i_next in tl.static_range(4):
                i = i_first + i_next
                m_i = mask & (i < splits)
                width = tl.maximum(tl.minimum(split_size, columns - i * split_size), 0).to(ACC)
                b_d = tl.load(m_part_ptr + i * total + o_nc, m_i, 0.) - b_first
                b_v_part = tl.load(v_part_ptr + i * total + o_nc, m_i, 0.)
                b_sum += b_d * width
                b_square += (b_d * b_d + b_v_part) * width
        size = tl.cast(columns, ACC)
        b_rest = b_sum / size
        b_m = b_first + b_rest
        b_v = b_square / size - b_rest * b_rest
        b_v = tl.where(b_v < 0, 0., b_v)
    return b_m, b_v


@triton.jit
def _add_batch(b_m, b_v, mask, b_shift, b_s1, b_s2):
    """One more block of samples into the sums behind mu and var, about b_shift."""
    b_d = tl.where(mask, b_m - b_shift[None, :], 0.)
    return b_s1 + tl.sum(b_d, 0), b_s2 + tl.sum(tl.where(mask, b_d * b_d + b_v, 0.), 0)


@triton.jit(do_not_specialize=['n'])
def local_statistics_kernel(m_part_ptr, v_part_ptr, table_ptr, n, channels, splits, split_size,
                            columns, rank, world, SINGLE: tl.constexpr, N: tl.constexpr,
                            C: tl.constexpr, ACC: tl.constexpr):
    """This process's row (count, mean, variance) of a table of zeros."""
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    m_c = o_c < channels
    b_shift = tl.zeros([C], ACC)
    b_s1 = tl.zeros([C], ACC)
    b_s2 = tl.zeros([C], ACC)
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        mask = (o_n < n)[:, None] & m_c[None, :]
        o_nc = o_n[:, None] * channels + o_c[None, :]
        b_m, b_v = _merged(m_part_ptr, v_part_ptr, o_nc, mask, n * channels, splits, split_size,
                           columns, SINGLE, N, C, ACC)
        if first == 0:
            b_shift = tl.sum(b_m, 0) / tl.minimum(n, N)
        b_s1, b_s2 = _add_batch(b_m, b_v, mask, b_shift, b_s1, b_s2)
    b_rest = b_s1 / n
    b_var = b_s2 / n - b_rest * b_rest
    b_var = tl.where(b_var < 0, 0., b_var)
    for i in range(0, world):
        row = table_ptr + i * (2 * channels + 1)
        mine = i == rank
        tl.store(row + 1 + o_c, tl.where(mine, b_shift + b_rest, 0.), m_c)
        tl.store(row + 1 + channels + o_c, tl.where(mine, b_var, 0.), m_c)
        if tl.program_id(0) == 0:
            count = tl.cast(n, ACC) * tl.cast(columns, ACC)
            tl.store(row, tl.where(mine, count, 0.))


@triton.jit
def _of_all_processes(table_ptr, o_c, m_c, channels, world, C: tl.constexpr, ACC: tl.constexpr):
    """mu, var (C,) and the number of values behind them, from every process's own."""
    count = tl.load(table_ptr)
    for i in range(1, world):
        count += tl.load(table_ptr + i * (2 * channels + 1))
    b_mu = tl.zeros([C], ACC)
    for i in range(0, world):
        row = table_ptr + i * (2 * channels + 1)
        b_mu += tl.load(row) / count * tl.load(row + 1 + o_c, m_c, 0.)
    b_var = tl.zeros([C], ACC)
    for i in range(0, world):
        row = table_ptr + i * (2 * channels + 1)
        b_d = tl.load(row + 1 + o_c, m_c, 0.) - b_mu
        b_v = tl.load(row + 1 + channels + o_c, m_c, 0.)
        b_var += tl.load(row) / count * (b_v + b_d * b_d)
    return b_mu, b_var, count


@triton.jit
def _step_averages(running_mean_ptr, running_var_ptr, o_c, m_c, b_mu, b_var, count, step,
                   ACC: tl.constexpr):
    b_running = tl.load(running_mean_ptr + o_c, m_c, 0.).to(ACC)
    tl.store(running_mean_ptr + o_c, b_running + step * (b_mu - b_running), m_c)
    b_running = tl.load(running_var_ptr + o_c, m_c, 0.).to(ACC)
    b_unbiased = b_var * (count / tl.maximum(count - 1, 1.))
    tl.store(running_var_ptr + o_c, b_running + step * (b_unbiased - b_running), m_c)


@triton.jit
def _of_batch(m_ptr, v_ptr, o_c, m_c, n, channels, N: tl.constexpr, C: tl.constexpr,
              ACC: tl.constexpr):
    """mu, var (C,) of the batch."""
    b_shift = tl.zeros([C], ACC)
    b_s1 = tl.zeros([C], ACC)
    b_s2 = tl.zeros([C], ACC)
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        mask = (o_n < n)[:, None] & m_c[None, :]
        o_nc = o_n[:, None] * channels + o_c[None, :]
        b_m = tl.load(m_ptr + o_nc, mask, 0.)
        b_v = tl.load(v_ptr + o_nc, mask, 0.)
        if first == 0:
            b_shift = tl.sum(b_m, 0) / tl.minimum(n, N)
        b_s1, b_s2 = _add_batch(b_m, b_v, mask, b_shift, b_s1, b_s2)
    b_rest = b_s1 / n
    b_var = b_s2 / n - b_rest * b_rest
    return b_shift + b_rest, tl.where(b_var < 0, 0., b_var)


@triton.jit(do_not_specialize=['n'])
def statistics_kernel(m_part_ptr, v_part_ptr, m_ptr, v_ptr, mu_ptr, sigma_ptr, w_in_ptr,
                      up_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, table_ptr, n,
                      channels, hidden, padded, blocks, splits, split_size, columns, world,
                      eps: tl.float64, momentum: tl.float64, BATCH: tl.constexpr,
                      UPDATE: tl.constexpr, CUMULATIVE: tl.constexpr, SHARED: tl.constexpr,
                      STANDARDIZED: tl.constexpr, SINGLE: tl.constexpr, N: tl.constexpr,
                      C: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
                      ACC: tl.constexpr):
    """m, v; mu, sigma by (1), (2) and the running averages; partials of W_in [m', s'].

    BATCH: mu and sigma of the batch, from the table of all processes where there is one; else
    the running ones.
    """
    eps = tl.cast(eps, ACC)
    momentum = tl.cast(momentum, ACC)
    i_c = tl.program_id(0) % blocks
    i_h = tl.program_id(0) // blocks
    o_c = i_c * C + tl.arange(0, C)
    m_c = o_c < channels
    o_h = i_h * H + tl.arange(0, H)
    m_h = o_h < hidden
    o_w = o_h[:, None] * (2 * channels) + o_c[None, :]
    m_w = m_h[:, None] & m_c[None, :]
    b_wm = tl.trans(tl.load(w_in_ptr + o_w, m_w, 0.).to(ACC))
    b_ws = tl.trans(tl.load(w_in_ptr + channels + o_w, m_w, 0.).to(ACC))
    b_shift = tl.zeros([C], ACC)
    b_s1 = tl.zeros([C], ACC)
    b_s2 = tl.zeros([C], ACC)
    total = n * channels
    m_pad = o_h < padded
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        m_n = o_n < n
        mask = m_n[:, None] & m_c[None, :]
        o_nc = o_n[:, None] * channels + o_c[None, :]
        if SHARED and not BATCH:  # where nothing depends on m, it is mu: NaN stays where it is
            b_m = tl.load(running_mean_ptr + o_c, m_c, 0.).to(ACC)[None, :]
            b_m += tl.zeros([N, C], ACC)
            b_v = tl.zeros([N, C], ACC)
        else:
            b_m, b_v = _merged(m_part_ptr, v_part_ptr, o_nc, mask, total, splits, split_size,
                               columns, SINGLE, N, C, ACC)
        if i_h == 0:
            tl.store(m_ptr + o_nc, b_m, mask)
            tl.store(v_ptr + o_nc, b_v, mask)
        if not SHARED and not STANDARDIZED:
            b_s = tl.where(mask, tl.sqrt(b_v + eps), 0.)
            b_u = tl.dot(b_m, b_wm, input_precision=PRECISION, out_dtype=ACC)
            b_u += tl.dot(b_s, b_ws, input_precision=PRECISION, out_dtype=ACC)
            o_up = o_n[:, None] * padded + o_h[None, :]
            tl.store(_part(up_ptr, i_c, n * padded) + o_up, b_u, m_n[:, None] & m_pad[None, :])
        if BATCH and table_ptr is None:
            if first == 0:
                b_shift = tl.sum(b_m, 0) / tl.minimum(n, N)
            b_s1, b_s2 = _add_batch(b_m, b_v, mask, b_shift, b_s1, b_s2)
    if BATCH:
        if table_ptr is None:
            b_rest = b_s1 / n
            b_mu = b_shift + b_rest
            b_var = b_s2 / n - b_rest * b_rest
            b_var = tl.where(b_var < 0, 0., b_var)
            count = tl.cast(columns, ACC) * n
        else:
            b_mu, b_var, count = _of_all_processes(table_ptr, o_c, m_c, channels, world, C, ACC)
    else:
        b_mu = tl.load(running_mean_ptr + o_c, m_c, 0.).to(ACC)
        b_var = tl.load(running_var_ptr + o_c, m_c, 1.).to(ACC)
    b_sigma = tl.sqrt(b_var + eps)
    if i_h == 0:
        if UPDATE:
            step = momentum
            if CUMULATIVE:  # coefficients_kernel counts, when all programs here have read
                step = 1 / (tl.load(tracked_ptr) + 1).to(ACC)
            _step_averages(running_mean_ptr, running_var_ptr, o_c, m_c, b_mu, b_var, count, step,
                           ACC)
        tl.store(mu_ptr + o_c, b_mu, m_c)
        tl.store(sigma_ptr + o_c, b_sigma, m_c)
    if SHARED:
        b_mu = tl.where(m_c, b_mu, 0.)
        b_s = tl.where(m_c, b_sigma, 0.)
        b_u1 = tl.sum(b_wm * b_mu[:, None] + b_ws * b_s[:, None], 0)
        tl.store(up_ptr + i_c * padded + o_h, b_u1, m_pad)
    if STANDARDIZED:
        for first in range(0, n, N):
            o_n = first + tl.arange(0, N)
            m_n = o_n < n
            mask = m_n[:, None] & m_c[None, :]
            o_nc = o_n[:, None] * channels + o_c[None, :]
            b_m, b_v = _merged(m_part_ptr, v_part_ptr, o_nc, mask, total, splits, split_size,
                               columns, SINGLE, N, C, ACC)
            b_m = tl.where(mask, (b_m - b_mu[None, :]) / b_sigma[None, :], 0.)
            b_s = tl.where(mask, (tl.sqrt(b_v + eps) - b_sigma[None, :]) / b_sigma[None, :], 0.)
            b_u = tl.dot(b_m, b_wm, input_precision=PRECISION, out_dtype=ACC)
            b_u += tl.dot(b_s, b_ws, input_precision=PRECISION, out_dtype=ACC)
            o_up = o_n[:, None] * padded + o_h[None, :]
            tl.store(_part(up_ptr, i_c, n * padded) + o_up, b_u, m_n[:, None] & m_pad[None, :])


@triton.jit
def _part(part_ptr, i, size):
    """Where part i of some that are `size` values apart begins: they can hold more than 2^31."""
    return part_ptr + tl.cast(i, tl.int64) * size


@triton.jit
def _sum_parts(part_ptr, parts, size, offsets, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               ACC: tl.constexpr):
    """The sum of `parts` tiles that are `size` values apart."""
    b_sum = tl.zeros([ROWS, COLUMNS], ACC)
    for i_first in range(0, parts, 8):
        for i_next in tl.static_range(8):
            i = i_first + i_next
            b_sum += tl.load(_part(part_ptr, i, size) + offsets, mask & (i < parts), 0.)
    return b_sum


@triton.jit
def _bounded(b_o, bound, BOUNDED: tl.constexpr):
    """SC's bound * tanh, or nothing."""
    if BOUNDED:
        b_e = tl.exp(-2 * tl.abs(b_o))
        b_t = (1 - b_e) / (1 + b_e)
        b_o = bound * tl.where(b_o < 0, -b_t, b_t)
    return b_o


@triton.jit
def _before_bound(b_dt, b_t, bound, BOUNDED: tl.constexpr):
    """The gradient of the input of `_bounded`, from that of its output t."""
    if BOUNDED:
        b_dt *= bound - b_t * b_t / bound
    return b_dt


@triton.jit
def _affine_parameters(w_ptr, b_ptr, o_c, m_c, C: tl.constexpr, ACC: tl.constexpr):
    """w and b of the inner norm; ones and zeros where it has none."""
    if w_ptr is not None:
        b_w = tl.load(w_ptr + o_c, m_c, 0.).to(ACC)
    else:
        b_w = tl.zeros([C], ACC) + 1
    if b_ptr is not None:
        b_b = tl.load(b_ptr + o_c, m_c, 0.).to(ACC)
    else:
        b_b = tl.zeros([C], ACC)
    return b_w, b_b


@triton.jit(do_not_specialize=['n'])
def coefficients_kernel(m_ptr, v_ptr, mu_ptr, sigma_ptr, up_ptr, b_in_ptr, w_out_ptr, b_out_ptr,
                        w_ptr, b_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, r_ptr,
                        a_ptr, c_ptr, g_ptr, h_ptr, n, channels, hidden, padded, blocks, parts,
                        columns, eps: tl.float64, momentum: tl.float64, bound: tl.float64,
                        STATISTICS: tl.constexpr, BATCH: tl.constexpr, UPDATE: tl.constexpr,
                        SHARED: tl.constexpr, BOUNDED: tl.constexpr, N: tl.constexpr,
                        C: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
                        ACC: tl.constexpr):
    """r, then g, h and from them a, c: a block of channels and one of samples each.

    STATISTICS: mu, sigma and the running averages too, from m and v; every block of samples
    makes them for itself, and the first one stores them.
    """
    eps = tl.cast(eps, ACC)
    momentum = tl.cast(momentum, ACC)
    bound = tl.cast(bound, ACC)
    i_c = tl.program_id(0) % blocks
    i_n = tl.program_id(0) // blocks
    o_c = i_c * C + tl.arange(0, C)
    m_c = o_c < channels
    o_n = i_n * N + tl.arange(0, N)
    m_n = o_n < n
    o_row = o_n * (0 if SHARED else 1)
    rows = 1 if SHARED else n
    b_g = tl.zeros([N, C], ACC)
    b_h = tl.zeros([N, C], ACC)
    for first in range(0, hidden, H):
        o_h = first + tl.arange(0, H)
        m_h = o_h < hidden
        o_w = o_c[:, None] * hidden + o_h[None, :]
        m_w = m_c[:, None] & m_h[None, :]
        b_wg = tl.load(w_out_ptr + o_w, m_w, 0.).to(ACC)
        b_wh = tl.load(w_out_ptr + channels * hidden + o_w, m_w, 0.).to(ACC)
        m_np = m_n[:, None] & (o_h < padded)[None, :]
        o_np = o_row[:, None] * padded + o_h[None, :]
        b_u = _sum_parts(up_ptr, parts, rows * padded, o_np, m_np, N, H, ACC)
        b_u += tl.load(b_in_ptr + o_h, m_h, 0.).to(ACC)[None, :]
        b_r = tl.where(m_n[:, None], tl.where(b_u <= 0, 0., b_u), 0.)  # keeps NaN
        if i_c == 0:
            tl.store(r_ptr + o_np, b_r, m_np)
        b_g += tl.dot(b_r, tl.trans(b_wg), input_precision=PRECISION, out_dtype=ACC)
        b_h += tl.dot(b_r, tl.trans(b_wh), input_precision=PRECISION, out_dtype=ACC)
    b_g += tl.load(b_out_ptr + o_c, m_c, 0.).to(ACC)[None, :]
    b_h += tl.load(b_out_ptr + channels + o_c, m_c, 0.).to(ACC)[None, :]
    b_g = _bounded(b_g, bound, BOUNDED)
    b_h = _bounded(b_h, bound, BOUNDED)
    mask = m_n[:, None] & m_c[None, :]
    o_nc = o_n[:, None] * channels + o_c[None, :]
    if STATISTICS:
        if BATCH:
            b_mu, b_var = _of_batch(m_ptr, v_ptr, o_c, m_c, n, channels, N, C, ACC)
        else:
            b_mu = tl.load(running_mean_ptr + o_c, m_c, 0.).to(ACC)
            b_var = tl.load(running_var_ptr + o_c, m_c, 1.).to(ACC)
        b_sigma = tl.sqrt(b_var + eps)
        if tl.program_id(0) < blocks:
            if UPDATE:
                _step_averages(running_mean_ptr, running_var_ptr, o_c, m_c, b_mu, b_var,
                               tl.cast(columns, ACC) * n, momentum, ACC)
            tl.store(mu_ptr + o_c, b_mu, m_c)
            tl.store(sigma_ptr + o_c, b_sigma, m_c)
    else:
        b_mu = tl.load(mu_ptr + o_c, m_c, 0.)
        b_sigma = tl.load(sigma_ptr + o_c, m_c, 1.)
    b_w, b_b = _affine_parameters(w_ptr, b_ptr, o_c, m_c, C, ACC)
    b_a = (1 + b_g) * (b_w / b_sigma)[None, :]
    b_centred = tl.load(m_ptr + o_nc, mask, 0.) - b_mu[None, :]
    b_c = b_h + (1 + b_g) * b_b[None, :] + b_a * b_centred
    tl.store(a_ptr + o_nc, b_a, mask)
    tl.store(c_ptr + o_nc, b_c, mask)
    tl.store(g_ptr + o_nc, b_g, mask)
    tl.store(h_ptr + o_nc, b_h, mask)
    if UPDATE:
        if tracked_ptr is not None:
            if tl.program_id(0) == 0:
                tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


@triton.jit(do_not_specialize=['n'])
def output_gradient_kernel(da_part_ptr, dc_part_ptr, m_ptr, mu_ptr, sigma_ptr, g_ptr, h_ptr,
                           r_ptr, w_ptr, b_ptr, w_out_ptr, dw_ptr, db_ptr, dw_out_ptr,
                           db_out_ptr, dmu_ptr, dsigma_ptr, dr_ptr, n, channels, hidden, padded,
                           blocks, splits, bound: tl.float64, SHARED: tl.constexpr,
                           BOUNDED: tl.constexpr, SINGLE: tl.constexpr, N: tl.constexpr,
                           C: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
                           ACC: tl.constexpr):
    """Adds up da, dc; dw, db, dW_out, db_out, dmu, dsigma; partials of dr = W_out^T do."""
    bound = tl.cast(bound, ACC)
    i_c = tl.program_id(0) % blocks
    i_h = tl.program_id(0) // blocks
    o_c = i_c * C + tl.arange(0, C)
    m_c = o_c < channels
    o_h = i_h * H + tl.arange(0, H)
    m_h = o_h < hidden
    m_pad = o_h < padded
    b_mu = tl.load(mu_ptr + o_c, m_c, 0.)
    b_sigma = tl.load(sigma_ptr + o_c, m_c, 1.)
    b_w, b_b = _affine_parameters(w_ptr, b_ptr, o_c, m_c, C, ACC)
    b_per_sigma = b_w / b_sigma
    o_w = o_c[:, None] * hidden + o_h[None, :]
    m_w = m_c[:, None] & m_h[None, :]
    b_wg = tl.load(w_out_ptr + o_w, m_w, 0.).to(ACC)
    b_wh = tl.load(w_out_ptr + channels * hidden + o_w, m_w, 0.).to(ACC)
    b_dw = tl.zeros([C], ACC)
    b_db = tl.zeros([C], ACC)
    b_dmu = tl.zeros([C], ACC)
    b_dbg = tl.zeros([C], ACC)
    b_dbh = tl.zeros([C], ACC)
    b_dwg = tl.zeros([C, H], ACC)
    b_dwh = tl.zeros([C, H], ACC)
    total = n * channels
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        m_n = o_n < n
        mask = m_n[:, None] & m_c[None, :]
        o_nc = o_n[:, None] * channels + o_c[None, :]
        if SINGLE:
            b_da = tl.load(da_part_ptr + o_nc, mask, 0.)
            b_dc = tl.load(dc_part_ptr + o_nc, mask, 0.)
        else:
            b_da = _sum_parts(da_part_ptr, splits, total, o_nc, mask, N, C, ACC)
            b_dc = _sum_parts(dc_part_ptr, splits, total, o_nc, mask, N, C, ACC)
        b_centred = tl.load(m_ptr + o_nc, mask, 0.) - b_mu[None, :]
        b_g = tl.load(g_ptr + o_nc, mask, 0.)
        b_h = tl.load(h_ptr + o_nc, mask, 0.)
        b_da += tl.where(mask, b_dc * b_centred, 0.)
        b_scale = 1 + b_g
        b_dw += tl.sum(b_da * b_scale, 0)
        b_db += tl.sum(b_dc * b_scale, 0)
        b_dmu -= tl.sum(b_scale * b_per_sigma[None, :] * b_dc, 0)
        b_dg = b_da * b_per_sigma[None, :] + b_dc * b_b[None, :]
        b_dh = b_dc
        if not SHARED:
            b_dg = _before_bound(b_dg, b_g, bound, BOUNDED)
            b_dh = _before_bound(b_dh, b_h, bound, BOUNDED)
            m_np = m_n[:, None] & m_pad[None, :]
            b_dr = tl.dot(b_dg, b_wg, input_precision=PRECISION, out_dtype=ACC)
            b_dr += tl.dot(b_dh, b_wh, input_precision=PRECISION, out_dtype=ACC)
            o_np = o_n[:, None] * padded + o_h[None, :]
            tl.store(_part(dr_ptr, i_c, n * padded) + o_np, b_dr, m_np)
            b_r = tl.load(r_ptr + o_np, m_np, 0.)
            b_dwg += tl.dot(tl.trans(b_dg), b_r, input_precision=PRECISION, out_dtype=ACC)
            b_dwh += tl.dot(tl.trans(b_dh), b_r, input_precision=PRECISION, out_dtype=ACC)
        b_dbg += tl.sum(b_dg, 0)
        b_dbh += tl.sum(b_dh, 0)
    if SHARED:
        b_dbg = _before_bound(b_dbg, tl.load(g_ptr + o_c, m_c, 0.), bound, BOUNDED)
        b_dbh = _before_bound(b_dbh, tl.load(h_ptr + o_c, m_c, 0.), bound, BOUNDED)
        b_dr1 = tl.sum(b_dbg[:, None] * b_wg + b_dbh[:, None] * b_wh, 0)
        tl.store(dr_ptr + i_c * padded + o_h, b_dr1, m_pad)
        b_r1 = tl.load(r_ptr + o_h, m_pad, 0.)
        b_dwg = b_dbg[:, None] * b_r1[None, :]
        b_dwh = b_dbh[:, None] * b_r1[None, :]
    tl.store(dw_out_ptr + o_w, b_dwg, m_w)
    tl.store(dw_out_ptr + channels * hidden + o_w, b_dwh, m_w)
    if i_h == 0:
        tl.store(db_out_ptr + o_c, b_dbg, m_c)
        tl.store(db_out_ptr + channels + o_c, b_dbh, m_c)
        b_dw /= b_sigma
        if w_ptr is not None:
            tl.store(dw_ptr + o_c, b_dw, m_c)
        if b_ptr is not None:
            tl.store(db_ptr + o_c, b_db, m_c)
        tl.store(dmu_ptr + o_c, b_dmu, m_c)
        tl.store(dsigma_ptr + o_c, -b_dw * b_per_sigma, m_c)


@triton.jit
def _hidden_gradient(dr_ptr, r_ptr, parts, rows, padded, o_row, m_row, o_h, N: tl.constexpr,
                     H: tl.constexpr, ACC: tl.constexpr):
    """du = dr [r > 0], a tile of samples and hidden units."""
    m_np = m_row[:, None] & (o_h < padded)[None, :]
    o_np = o_row[:, None] * padded + o_h[None, :]
    b_r = tl.load(r_ptr + o_np, m_np, 0.)
    b_du = _sum_parts(dr_ptr, parts, rows * padded, o_np, m_np, N, H, ACC)
    return tl.where(b_r <= 0, 0., b_du)


@triton.jit
def _through_w_in(dr_ptr, r_ptr, w_in_ptr, parts, rows, padded, o_row, m_row, o_c, m_c, channels,
                  hidden, N: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
                  PRECISION: tl.constexpr, ACC: tl.constexpr):
    """dm', ds' = W_in^T du, a tile of samples and channels, over all hidden units."""
    b_dm = tl.zeros([N, C], ACC)
    b_ds = tl.zeros([N, C], ACC)
    for first in range(0, hidden, H):
        o_h = first + tl.arange(0, H)
        m_w = (o_h < hidden)[:, None] & m_c[None, :]
        o_w = o_h[:, None] * (2 * channels) + o_c[None, :]
        b_du = _hidden_gradient(dr_ptr, r_ptr, parts, rows, padded, o_row, m_row, o_h, N, H, ACC)
        b_dm += tl.dot(b_du, tl.load(w_in_ptr + o_w, m_w, 0.).to(ACC),
                       input_precision=PRECISION, out_dtype=ACC)
        b_ds += tl.dot(b_du, tl.load(w_in_ptr + channels + o_w, m_w, 0.).to(ACC),
                       input_precision=PRECISION, out_dtype=ACC)
    return b_dm, b_ds


@triton.jit(do_not_specialize=['n'])
def moments_gradient_kernel(dr_ptr, r_ptr, m_ptr, v_ptr, mu_ptr, sigma_ptr, w_in_ptr, dmu_ptr,
                            dsigma_ptr, dw_in_ptr, db_in_ptr, p_ptr, q_ptr, table_ptr,
                            dtable_ptr, n, channels, hidden, padded, blocks, parts, columns,
                            world, eps: tl.float64,
                            BATCH: tl.constexpr, SHARED: tl.constexpr,
                            STANDARDIZED: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr,
                            C: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
                            ACC: tl.constexpr):
    """dW_in, db_in; p, q (8).

    WHOLE: a single block of hidden units. Where statistics are synchronised, dtable becomes
    the gradient of this process's loss by each process's (count, mean, variance) in table,
    and `synchronized_gradient_kernel` finishes p and q.
    """
    eps = tl.cast(eps, ACC)
    i_c = tl.program_id(0) % blocks
    i_h = tl.program_id(0) // blocks
    o_c = i_c * C + tl.arange(0, C)
    m_c = o_c < channels
    o_h = i_h * H + tl.arange(0, H)
    m_h = o_h < hidden
    o_w = o_h[:, None] * (2 * channels) + o_c[None, :]
    m_w = m_h[:, None] & m_c[None, :]
    b_mu = tl.load(mu_ptr + o_c, m_c, 0.)
    b_sigma = tl.load(sigma_ptr + o_c, m_c, 1.)
    b_dmu = tl.load(dmu_ptr + o_c, m_c, 0.)
    b_dsigma = tl.load(dsigma_ptr + o_c, m_c, 0.)
    b_dwm = tl.zeros([H, C], ACC)
    b_dws = tl.zeros([H, C], ACC)
    b_db = tl.zeros([H], ACC)
    size = tl.cast(columns, ACC)
    rows = 1 if SHARED else n
    o_one = tl.arange(0, N)
    m_one = o_one < 1
    if SHARED:
        b_du = _hidden_gradient(dr_ptr, r_ptr, parts, rows, padded, o_one, m_one, o_h, N, H, ACC)
        b_db = tl.sum(b_du, 0)
        b_dwm = b_db[:, None] * b_mu[None, :]
        b_dws = b_db[:, None] * b_sigma[None, :]
        if BATCH:
            b_dm, b_ds = _through_w_in(dr_ptr, r_ptr, w_in_ptr, parts, rows, padded, o_one,
                                       m_one, o_c, m_c, channels, hidden, N, C, H, PRECISION,
                                       ACC)
            b_dmu += tl.sum(b_dm, 0)
            b_dsigma += tl.sum(b_ds, 0)
    if STANDARDIZED and BATCH:  # what reaches mu and sigma through the inputs of SC
        for first in range(0, n, N):
            o_n = first + tl.arange(0, N)
            m_n = o_n < n
            mask = m_n[:, None] & m_c[None, :]
            o_nc = o_n[:, None] * channels + o_c[None, :]
            b_dm, b_ds = _through_w_in(dr_ptr, r_ptr, w_in_ptr, parts, rows, padded, o_n, m_n,
                                       o_c, m_c, channels, hidden, N, C, H, PRECISION, ACC)
            b_m = tl.load(m_ptr + o_nc, mask, 0.)
            b_s = tl.sqrt(tl.load(v_ptr + o_nc, mask, 1.) + eps)
            b_mean = (b_m - b_mu[None, :]) / b_sigma[None, :]
            b_dmu -= tl.sum(tl.where(mask, b_dm, 0.), 0) / b_sigma
            b_dsigma -= tl.sum(tl.where(mask, b_dm * b_mean + b_ds * (b_s / b_sigma[None, :]),
                                        0.), 0) / b_sigma
    b_dvar = b_dsigma / (2 * b_sigma)
    if table_ptr is not None and i_h == 0:
        count = tl.load(table_ptr)
        for i in range(1, world):
            count += tl.load(table_ptr + i * (2 * channels + 1))
        for i in range(0, world):
            row = table_ptr + i * (2 * channels + 1)
            share = tl.load(row) / count
            b_mean1 = tl.load(row + 1 + o_c, m_c, 0.)
            drow = dtable_ptr + i * (2 * channels + 1)
            tl.store(drow + 1 + o_c, share * (b_dmu + 2 * b_dvar * (b_mean1 - b_mu)), m_c)
            tl.store(drow + 1 + channels + o_c, share * b_dvar, m_c)
            if i_c == 0:
                tl.store(drow, share * 0)  # counts have none
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        m_n = o_n < n
        mask = m_n[:, None] & m_c[None, :]
        o_nc = o_n[:, None] * channels + o_c[None, :]
        b_m = tl.load(m_ptr + o_nc, mask, 0.)
        b_s = tl.where(mask, tl.sqrt(tl.load(v_ptr + o_nc, mask, 0.) + eps), 0.)
        b_dm = tl.zeros([N, C], ACC)
        b_dv = tl.zeros([N, C], ACC)
        if not SHARED:
            b_du = _hidden_gradient(dr_ptr, r_ptr, parts, rows, padded, o_n, m_n, o_h, N, H, ACC)
            b_db += tl.sum(b_du, 0)
            b_mean = b_m
            b_std = b_s
            if STANDARDIZED:
                b_mean = tl.where(mask, (b_m - b_mu[None, :]) / b_sigma[None, :], 0.)
                b_std = tl.where(mask, (b_s - b_sigma[None, :]) / b_sigma[None, :], 0.)
            b_dwm += tl.dot(tl.trans(b_du), b_mean, input_precision=PRECISION, out_dtype=ACC)
            b_dws += tl.dot(tl.trans(b_du), b_std, input_precision=PRECISION, out_dtype=ACC)
            if WHOLE:
                b_wm = tl.load(w_in_ptr + o_w, m_w, 0.).to(ACC)
                b_ws = tl.load(w_in_ptr + channels + o_w, m_w, 0.).to(ACC)
                b_dm = tl.dot(b_du, b_wm, input_precision=PRECISION, out_dtype=ACC)
                b_ds = tl.dot(b_du, b_ws, input_precision=PRECISION, out_dtype=ACC)
            else:
                b_dm, b_ds = _through_w_in(dr_ptr, r_ptr, w_in_ptr, parts, rows, padded, o_n,
                                           m_n, o_c, m_c, channels, hidden, N, C, H, PRECISION,
                                           ACC)
            if STANDARDIZED:
                b_dm /= b_sigma[None, :]
                b_ds /= b_sigma[None, :]
            b_dv = b_ds / (2 * tl.where(mask, b_s, 1.))
        if BATCH and table_ptr is None:
            b_dv += b_dvar[None, :] / n
            b_dm += (b_dmu[None, :] + 2 * b_dvar[None, :] * (b_m - b_mu[None, :])) / n
        if i_h == 0:
            tl.store(p_ptr + o_nc, 2 * b_dv / size, mask)
            tl.store(q_ptr + o_nc, b_dm / size, mask)
    tl.store(dw_in_ptr + o_w, b_dwm, m_w)
    tl.store(dw_in_ptr + channels + o_w, b_dws, m_w)
    if i_c == 0:
        tl.store(db_in_ptr + o_h, b_db, m_h)


@triton.jit(do_not_specialize=['n'])
def synchronized_gradient_kernel(p_ptr, q_ptr, m_ptr, table_ptr, dtable_ptr, n, channels,
                                 columns, rank, N: tl.constexpr, C: tl.constexpr,
                                 ACC: tl.constexpr):
    """Adds to p and q what comes through this process's own mean and variance, its row of
    table; the same row of the reduced dtable is the gradient of all losses by them."""
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    m_c = o_c < channels
    row = rank * (2 * channels + 1) + 1 + o_c
    b_mean = tl.load(table_ptr + row, m_c, 0.)
    b_dmean = tl.load(dtable_ptr + row, m_c, 0.)
    b_dvar = tl.load(dtable_ptr + row + channels, m_c, 0.)
    size = tl.cast(columns, ACC) * n
    for first in range(0, n, N):
        o_n = first + tl.arange(0, N)
        mask = (o_n < n)[:, None] & m_c[None, :]
        o_nc = o_n[:, None] * channels + o_c[None, :]
        b_p = tl.load(p_ptr + o_nc, mask, 0.) + 2 * b_dvar[None, :] / size
        b_d = tl.load(m_ptr + o_nc, mask, 0.) - b_mean[None, :]
        b_q = tl.load(q_ptr + o_nc, mask, 0.)
        b_q += (b_dmean[None, :] + 2 * b_dvar[None, :] * b_d) / size
        tl.store(p_ptr + o_nc, b_p, mask)
        tl.store(q_ptr + o_nc, b_q, mask)


# By the sample: a program has a block of channels (R) of one sample.


@triton.jit
def _sample_start(i_row, i_outer, rows, columns, CL: tl.constexpr, R: tl.constexpr):
    """Where the block of channels of this sample starts in x."""
    start = tl.cast(i_outer, tl.int64) * rows * columns
    if CL:
        start += i_row * R
    else:
        start += tl.cast(i_row, tl.int64) * R * columns
    return start


@triton.jit(do_not_specialize=['n'])
def sample_moments_kernel(x_ptr, m_ptr, v_ptr, up_ptr, w_in_ptr, running_mean_ptr,
                          running_var_ptr, n, rows, columns, row_blocks, hidden, padded,
                          eps: tl.float64, STANDARDIZED: tl.constexpr, CL: tl.constexpr,
                          U: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
                          ACC: tl.constexpr):
    """m, v (N, C); W_in [m', s'], a partial (N, padded) for each block of channels.

    STANDARDIZED by the running statistics.
    """
    eps = tl.cast(eps, ACC)
    i_row = tl.program_id(0) % row_blocks
    i_outer = tl.program_id(0) // row_blocks
    o_row = i_row * R + tl.arange(0, R)
    m_row = o_row < rows
    x_ptr += _sample_start(i_row, i_outer, rows, columns, CL, R)
    b_m, b_v = _moments_of_rows(x_ptr, m_row, rows, columns, columns, CL, U, R, K, ACC)
    tl.store(m_ptr + i_outer * rows + o_row, b_m, m_row)
    if v_ptr is not None:
        tl.store(v_ptr + i_outer * rows + o_row, b_v, m_row)
    b_s = tl.sqrt(b_v + eps)
    if STANDARDIZED:
        b_mu = tl.load(running_mean_ptr + o_row, m_row, 0.).to(ACC)
        b_sigma = tl.sqrt(tl.load(running_var_ptr + o_row, m_row, 1.).to(ACC) + eps)
        b_m = (b_m - b_mu) / b_sigma
        b_s = (b_s - b_sigma) / b_sigma
    b_m = tl.where(m_row, b_m, 0.)[None, :]
    b_s = tl.where(m_row, b_s, 0.)[None, :]
    up_ptr = _part(up_ptr, i_row, n * padded) + i_outer * padded
    for first in range(0, hidden, H):
        o_h = first + tl.arange(0, H)
        m_w = (o_h < hidden)[:, None] & m_row[None, :]
        o_w = o_h[:, None] * (2 * rows) + o_row[None, :]
        b_wm = tl.load(w_in_ptr + o_w, m_w, 0.).to(ACC)
        b_ws = tl.load(w_in_ptr + rows + o_w, m_w, 0.).to(ACC)
        tl.store(up_ptr + o_h, tl.sum(b_wm * b_m + b_ws * b_s, 1), o_h < padded)


@triton.jit(do_not_specialize=['n'])
def sample_affine_kernel(x_ptr, y_ptr, m_ptr, up_ptr, b_in_ptr, w_out_ptr, b_out_ptr, w_ptr,
                         b_ptr, running_mean_ptr, running_var_ptr, n, rows, columns, row_blocks,
                         parts, split_size, hidden, padded, blocks, eps: tl.float64,
                         bound: tl.float64, BOUNDED: tl.constexpr, CL: tl.constexpr,
                         U: tl.constexpr, R: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
                         ACC: tl.constexpr):
    """y of a part of the columns; a and c (7) are made by every program that needs them."""
    eps = tl.cast(eps, ACC)
    bound = tl.cast(bound, ACC)
    i_row = tl.program_id(0) % row_blocks
    i_part = tl.program_id(0) // row_blocks % parts
    i_outer = tl.program_id(0) // row_blocks // parts
    o_row = i_row * R + tl.arange(0, R)
    m_row = o_row < rows
    first = i_part * split_size
    width = tl.minimum(columns - first, split_size)
    offsets, b_column = _offsets(rows, columns, CL, U, R, K)
    step = U * K * (rows if CL else 1)
    start = _sample_start(i_row, i_outer, rows, columns, CL, R) + first * (rows if CL else 1)
    x_ptr += start
    y_ptr += start
    m_tile = _over(m_row, CL)
    mask = m_tile & (b_column < width)
    b_x = tl.load(x_ptr + offsets, mask, 0.)  # on its way while a and c are made
    b_g = tl.load(b_out_ptr + o_row, m_row, 0.).to(ACC)
    b_h = tl.load(b_out_ptr + rows + o_row, m_row, 0.).to(ACC)
    m_one = tl.arange(0, 1)[:, None] < 1
    for i_hidden in range(0, hidden, H):
        o_h = i_hidden + tl.arange(0, H)
        m_h = o_h < hidden
        b_u = _sum_parts(up_ptr + i_outer * padded, blocks, n * padded, o_h[None, :],
                         m_one & m_h[None, :], 1, H, ACC)
        b_u += tl.load(b_in_ptr + o_h, m_h, 0.).to(ACC)[None, :]
        b_r = tl.where(b_u <= 0, 0., b_u)  # keeps NaN
        o_w = o_row[:, None] * hidden + o_h[None, :]
        m_w = m_row[:, None] & m_h[None, :]
        b_wg = tl.load(w_out_ptr + o_w, m_w, 0.).to(ACC)
        b_wh = tl.load(w_out_ptr + rows * hidden + o_w, m_w, 0.).to(ACC)
        b_g += tl.sum(b_wg * b_r, 1)
        b_h += tl.sum(b_wh * b_r, 1)
    b_g = _bounded(b_g, bound, BOUNDED)
    b_h = _bounded(b_h, bound, BOUNDED)
    b_mu = tl.load(running_mean_ptr + o_row, m_row, 0.).to(ACC)
    b_sigma = tl.sqrt(tl.load(running_var_ptr + o_row, m_row, 1.).to(ACC) + eps)
    b_m = tl.load(m_ptr + i_outer * rows + o_row, m_row, 0.)
    b_w, b_b = _affine_parameters(w_ptr, b_ptr, o_row, m_row, R, ACC)
    b_a = (1 + b_g) * (b_w / b_sigma)
    b_c = _over(b_h + (1 + b_g) * b_b + b_a * (b_m - b_mu), CL)
    b_a = _over(b_a, CL)
    b_m = _over(b_m, CL)
    tl.store(y_ptr + offsets, b_a * (b_x.to(ACC) - b_m) + b_c, mask)
    for i in range(U * K, width, U * K):
        x_ptr += step
        y_ptr += step
        mask = m_tile & (b_column < width - i)
        b_next = tl.load(x_ptr + offsets, mask, 0.).to(ACC)
        tl.store(y_ptr + offsets, b_a * (b_next - b_m) + b_c, mask)
