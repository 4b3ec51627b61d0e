"""The four primitives from stock PyTorch operators; see the package's docstring.

BatchNorm's own kernels, in eval mode on a view with one channel per sample's channel,
are the fastest stock operators for these passes: each is one pass over all cores. A map
that is allocated again costs more than a pass over it, so that each primitive makes one at most.

On a GPU, where those kernels round sums to the map's dtype, plain operators run: a slow path
for where the Triton kernels cannot.
"""

import torch
from torch import Tensor

from dn_mmdet.reference import widen
from dn_mmdet.sc import in_dtype_of, no_autocast

# Sums that an operator makes one value after the other are made in blocks of this many, so
# that their rounding does not grow with the size of the map.
BLOCK = 1024
# Where m^2 exceeds this many times v, mean(x^2) - m^2 has cancelled too many digits.
CANCELLATION = 4


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    n, c = x.shape[:2]
    x = as_dense(x)
    if not x.is_cpu:
        spatial = tuple(range(2, x.dim()))
        m = widen(x).mean(spatial)
        centred = widen(x) - _over(x, m)
        rest = centred.mean(spatial)
        return m + rest, centred.square_().mean(spatial).addcmul_(rest, rest, value=-1)
    if not x.is_contiguous():
        means, variances = zip(*map(_strided_moments, x.split(1)), strict=True)
        return torch.stack(means), torch.stack(variances)
    m, v = _row_moments(x.view(n * c, -1))
    return m.view(n, c), v.view(n, c)


def affine(x: Tensor, m: Tensor, a: Tensor, c: Tensor) -> Tensor:
    x = as_dense(x)
    if not x.is_cpu:
        m, a, c = (_over(x, t) for t in (m, a, c))
        return (a * (widen(x) - m) + c).to(x.dtype)
    y = torch.empty_like(x)
    # Two tensors, for these are memory: other devices resize them and read them again.
    mean, invstd = m.new_empty(0), m.new_empty(0)
    if x.is_contiguous():  # small maps feel each operator that `_parts` would add
        rows = m.numel()
        torch.native_batch_norm(
            x.view(1, rows, -1),
            a.reshape(rows),
            c.reshape(rows),
            m.reshape(rows),
            m.new_ones(rows),
            False,
            0.0,
            0.0,
            out=(y.view(1, rows, -1), mean, invstd),
        )
        return y
    for x_part, y_part, m_part, a_part, c_part in _parts(x, y, m, a, c):
        torch.ops.aten.native_batch_norm.out(
            x_part,
            a_part,
            c_part,
            m_part,
            torch.ones_like(m_part),
            False,
            0.0,
            0.0,
            out=y_part,
            save_mean=mean,
            save_invstd=invstd,
        )
    return y


def reduce(dy: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    x = as_dense(x)
    dy = in_layout_of(x, dy)
    if not x.is_cpu:
        spatial = tuple(range(2, x.dim()))
        dy = widen(dy)
        return (dy * (widen(x) - _over(x, m))).sum(spatial), dy.sum(spatial)
    da, dc = [], []
    for x_part, dy_part, m_part in _parts(x, dy, m):
        sums = [
            _reduce(*blocks, m_part)
            for blocks in zip(_blocks(dy_part), _blocks(x_part), strict=True)
        ]
        da_part, dc_part = sums[0] if len(sums) == 1 else map(sum, zip(*sums, strict=True))
        da.append(da_part)
        dc.append(dc_part)
    return torch.cat(da).view_as(m), torch.cat(dc).view_as(m)


def input_gradient(dy: Tensor, x: Tensor, m: Tensor, a: Tensor, p: Tensor, q: Tensor) -> Tensor:
    x = as_dense(x)
    dy = in_layout_of(x, dy)
    m, a, p, q = (_over(x, t) for t in (m, a, p, q))
    dx = widen(x) - m  # exact, where `affine` would lose a large p's digits
    return dx.mul_(p).add_(q).addcmul_(widen(dy), a).to(x.dtype)


class Coefficients:
    """a, c of equation (7) and their gradients, differentiated by hand.

    `functional.coefficients` under autograd gives the same from three times as many
    operators, which on small maps cost more than the passes over them. With
    ``d_a = da + dc (m - mu)`` what a receives in all, and t' the slope of SC's bound::

        dg = d_a w / sigma + dc b,    dh = dc,    do = (dg, dh) t'
        dr = W_out^T do,    du = dr [r > 0],    dm', ds' = W_in^T du
        dsigma = -sum_n d_a a / sigma,    dmu = -sum_n a dc

    and the chain rule through (1), (2) and the inputs of SC from there. In dm, the term
    ``a dc`` is left out: q of equation (8) subtracts it again.

    Args:
        m, v: (N, C), float32 or float64.
        size (int): S, the values behind each of them.
        running: mu and var (C,) that stand for the batch's, or None.
        averages: running mean, running variance and momentum to be updated, or None.
        w, b: (C,) of the inner norm, or None.
        sc_parameters: SC's w_in, b_in, w_out, b_out.
        eps (float), bound (float | None), standardized (bool), batch_shared (bool): as in
            the layer.
        keep (bool): whether `backward` will follow.
    """

    def __init__(
        self,
        m,
        v,
        size,
        running,
        averages,
        w,
        b,
        sc_parameters,
        *,
        eps,
        bound,
        standardized,
        batch_shared,
        keep,
    ):
        n, channels = m.shape
        self.training = running is None
        if self.training:
            mu = m.mean(0)
            centred = m - mu
            var = torch.addcmul(v, centred, centred).mean(0)
            if averages is not None:
                _update_averages(*averages, mu, var, n * size)
        else:
            mu, var = in_dtype_of(m, running)
            centred = m - mu
        sigma = (var + eps).sqrt_()
        if batch_shared:
            inputs = torch.cat((mu, sigma))[None]
        else:
            s = (v + eps).sqrt_()
            inputs = torch.cat(
                (centred / sigma, (s / sigma).sub_(1)) if standardized else (m, s), 1
            )
        w_in, b_in, w_out, b_out = in_dtype_of(m, sc_parameters)
        w, b = (t if t is None else t.to(m.dtype) for t in (w, b))
        with no_autocast(m.device.type):
            hidden = torch.addmm(b_in, inputs, w_in.t()).relu_()
            out = torch.addmm(b_out, hidden, w_out.t())
        if bound is not None:
            out.tanh_().mul_(bound)
        scale, h = out[:, :channels] + 1, out[:, channels:]
        per_sigma = 1 / sigma if w is None else w / sigma
        self.a = (scale * per_sigma).expand_as(m)
        if b is not None:
            h = torch.addcmul(h, scale, b)
        self.c = torch.addcmul(h, self.a, centred)
        self.m = m
        if keep:
            self.size, self.bound = size, bound
            self.batch_shared, self.standardized = batch_shared, standardized
            self.kept = mu, sigma, inputs, hidden, out

    def backward(self, da: Tensor, dc: Tensor, *parameters: Tensor | None):
        """p, q of equation (8), and the gradients of w, b and SC's four parameters.

        parameters: these, as hooks on saved tensors gave them back.
        """
        m, a = self.m, self.a
        mu, sigma, inputs, hidden, out = self.kept
        n, channels = m.shape
        w, b, w_in, _, w_out, _ = (t if t is None else t.to(m.dtype) for t in parameters)
        centred = m - mu
        per_sigma = 1 / sigma if w is None else w / sigma
        scale = out[:, :channels] + 1
        dmu = torch.mul(a, dc).sum(0).neg_() if self.training else None
        da = torch.addcmul(da, dc, centred)
        if self.batch_shared:
            da, dc = da.sum(0, keepdim=True), dc.sum(0, keepdim=True)
        dscale = da * per_sigma
        if b is not None:
            dscale.addcmul_(dc, b)
        do = torch.cat((dscale, dc), 1)
        if self.bound is not None:
            do.mul_(out.square().mul_(-1 / self.bound).add_(self.bound))
        with no_autocast(m.device.type):
            dw_out, db_out = do.t().mm(hidden), do.sum(0)
            du = torch.ops.aten.threshold_backward.default(do.mm(w_out), hidden, 0)
            dw_in, db_in = du.t().mm(inputs), du.sum(0)
            dm, ds = du.mm(w_in).split(channels, 1)
        dper_sigma = torch.mul(da, scale).sum(0)
        dw, db = (None, None) if w is None else (dper_sigma / sigma, torch.mul(dc, scale).sum(0))
        gradients = [
            t if t is None else t.to(like.dtype)
            for t, like in zip((dw, db, dw_in, db_in, dw_out, db_out), parameters, strict=True)
        ]
        dsigma = (dper_sigma * per_sigma).div_(sigma).neg_() if self.training else None
        if self.batch_shared:
            if not self.training:
                return torch.zeros_like(m), torch.zeros_like(m), *gradients
            dmu, dsigma = dmu + dm[0], dsigma + ds[0]
            p, q = torch.zeros_like(m), torch.zeros_like(m)
        elif self.standardized:
            dm, ds = dm / sigma, ds / sigma
            mean, std = inputs.split(channels, 1)
            std = std + 1  # s / sigma
            if self.training:
                dmu -= dm.sum(0)
                dsigma -= torch.mul(dm, mean).addcmul_(ds, std).sum(0)
            p, q = ds.div_(std.mul_(sigma)), dm
        else:
            p, q = ds / inputs[:, channels:], dm
        if self.training:  # through var and mu
            through_var = dsigma.div_(sigma).div_(n)
            p = p + through_var
            q = torch.addcmul(q, centred, through_var).add_(dmu.div_(n))
        return p.div_(self.size), q / self.size, *gradients


@torch.no_grad()
def _update_averages(running_mean, running_var, momentum, mu, var, count):
    for running, value in ((running_mean, mu), (running_var, var * (count / (count - 1)))):
        if running.dtype == value.dtype:
            running.lerp_(value, momentum)
        else:
            running.copy_(running + momentum * (value - running))


def _reduce(dy, x, m):
    one, to_be_computed = torch.ones_like(m), m.new_empty(0)  # from m and one, in eval mode
    _, da, dc = torch.ops.aten.native_batch_norm_backward(
        dy, x, one, m, one, to_be_computed, to_be_computed, False, 0.0, (False, True, True)
    )
    return da, dc


def _strided_moments(sample):
    """Mean and population variance (C,) of a channels_last sample (1, C, ...), on the CPU.

    Centred, unlike BatchNorm's own kernel, which adds up one value after the other.
    """
    dims = (0, *range(2, sample.dim()))
    m = widen(sample).mean(dims, keepdim=True)
    centred = widen(sample) - m
    rest = centred.mean(dims)
    v = centred.square_().mean(dims).addcmul_(rest, rest, value=-1)
    return m.flatten() + rest, v


def _blocks(part):
    """Parts of `_parts` that BatchNorm's kernels would sum up value by value, in blocks.

    They do so where channels are the innermost dimension.
    """
    if part.is_contiguous():
        return (part,)
    return part.split(max(1, BLOCK // part[0, 0, 0].numel()), dim=2)


def _row_moments(x):
    """Mean and population variance (R,) of the rows of x (R, S), on the CPU.

    `torch.var_mean` is accurate and 50 times slower here than `mean` and
    `vector_norm`, which cancel where |mean| >> std. Such rows are done again, centred.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    size = x.shape[1]
    m = x.mean(1, dtype=wide)
    if size == 1:
        return m, torch.zeros_like(m)
    v = (_square_sum(x, wide) / size).addcmul_(m, m, value=-1)
    accurate = m.square() <= v * CANCELLATION  # NaN is not
    if not accurate.all():
        rows = accurate.logical_not_().nonzero().squeeze(1)
        centred = x[rows].to(wide).sub_(m[rows, None])
        rest = centred.mean(1)
        v[rows] = (_square_sum(centred, wide) / size).addcmul_(rest, rest, value=-1)
        m[rows] += rest
    return m, v


def _square_sum(x, wide):
    if x.shape[1] < BLOCK:
        return torch.linalg.vector_norm(x, dim=1, dtype=wide).square_()
    whole = x.shape[1] // BLOCK * BLOCK
    blocks = x[:, :whole].unflatten(1, (-1, BLOCK))
    total = torch.linalg.vector_norm(blocks, dim=2, dtype=wide).square_().sum(1)
    if whole < x.shape[1]:
        total += torch.linalg.vector_norm(x[:, whole:], dim=1, dtype=wide).square_()
    return total


def as_dense(x):
    """x, or a contiguous copy where it is neither contiguous nor channels_last."""
    return (
        x
        if x.is_contiguous() or x.is_contiguous(memory_format=_memory_format(x))
        else x.contiguous()
    )


def in_layout_of(x, dy):
    return dy.contiguous(memory_format=_memory_format(x))


def _memory_format(x):
    if not x.is_contiguous():
        for memory_format, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
            if x.dim() == ndim and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def _parts(x, *others):
    """Views in which BatchNorm's kernels find one channel per sample's channel.

    All of it (1, N C, S) where x is contiguous, each sample (1, C, ...) where it is
    channels_last. Coefficients (N, C) become (N C,) or (C,).
    """
    if x.is_contiguous():
        planes = (1, x.shape[0] * x.shape[1], -1)
        yield (
            x.view(planes),
            *(t.reshape(-1) if t.dim() == 2 else t.view(planes) for t in others),
        )
    else:
        for i in range(len(x)):
            yield (x[i : i + 1], *(t[i] if t.dim() == 2 else t[i : i + 1] for t in others))


def _over(x, t):
    return t.view(*t.shape, *(1,) * (x.dim() - 2))
