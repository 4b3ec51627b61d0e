"""A model's norm layers as few plain operators, for inference runtimes.

BatchNorm's statistics, weight and bias go into the convolution before a layer and into SC's
first linear, so that ``y = (1 + g) u + h`` remains, u being what that convolution then gives.
BatchNorms and layers whose g and h are constants go into it altogether.
"""

import copy
from typing import Any, NamedTuple

import mmcv.cnn
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..convert import DNBAct, DNCAct, batch_norms, dn_layers, is_frozen_batch_norm
from ..fold import affine_of, batch_norm_of, constant, foldable, put
from ..inner_norm import has_registered, is_torch_batch_norm
from ..layers import DynamicNorm
from ..sc import SC
from ..scaled_bn import RewrittenBN

TARGETS = ('portable', 'onnxruntime')
# Channels with |b| above this times |w| are normalised without w and b. Else the variance of
# u would be a small difference of large numbers, and SC's first weights would be huge.
GUARD = 8
SMALLEST = 1e-12  # also channels with |w| / sigma below this: the squares of u would be zero
# The moments come from the covariance of a convolution's input where that has at least so many
# times fewer channels than the output, and so many times more places than channels.
WIDENING = 3
ROOM = 8


class Simplified(NamedTuple):
    model: nn.Module
    folded: list[str]  # norms that have become part of a convolution
    dynamic: list[str]  # DN layers in plain operators
    left: list[str]  # norms that are as they were


@torch.no_grad()
def simplified(model: nn.Module, example: Tensor, target: str = 'portable') -> Simplified:
    """A copy of a model, in eval mode, that computes the same in fewer operators.

    A norm goes into the convolution whose output it alone reads; where there is none, it
    stays behind it. DN layers stay as they are with an SC of another kind (`VariantSC`),
    hooks on SC, no running statistics, or maps that are not (N, C, H, W).

    Args:
        model: any torch model.
        example: an input of its forward, of one image, by which it is found what follows what.
        target: ``'portable'``, operators that every runtime has, for any batch; or
            ``'onnxruntime'``, those that are fast there, for one image at a time.

    Raises:
        ValueError: an unknown target, several images for ``'onnxruntime'``, a model that is
            not of float32, or a DN layer that is more than one.
    """
    if target not in TARGETS:
        raise ValueError(f'target: expected one of {TARGETS}, got {target!r}')
    if target == 'onnxruntime' and len(example) != 1:
        raise ValueError(
            f"example: expected one image for target='onnxruntime', got "
            f"{len(example)}: use target='portable' for batches"
        )
    others = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if others:
        raise ValueError(f'model: expected one of float32, got {others}: use model.float()')
    model = copy.deepcopy(model).eval()
    _fold_constants(model)
    trace = _Trace(model, example)
    found = Simplified(model, [], [], [])
    known = {*trace.norms, *(norm.bn for norm in trace.norms if isinstance(norm, DynamicNorm))}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module not in known:
            found.left.append(name)
    for norm, name in trace.norms.items():
        conv, place = trace.convolution_of(norm)
        if isinstance(norm, DynamicNorm):
            simple = _is_simplifiable(norm, trace.shapes[norm])
            new = _dynamic(norm, conv, trace.shapes[norm], target) if simple else None
        else:
            new = _constant(norm, conv) if conv is not None else None
        if new is None:
            found.left.append(name)
            continue
        before, after = new
        _replace(model, norm, after)
        if conv is not None:
            _replace(place, conv, before)
        getattr(found, 'dynamic' if isinstance(norm, DynamicNorm) else 'folded').append(name)
    return found


def _fold_constants(model):
    """Makes BatchNorms of the layers whose g and h are the same for every input."""
    if not any(isinstance(module, (DynamicNorm, RewrittenBN)) for module in model.modules()):
        return
    for layer, names in foldable(model).items():
        outputs = constant(layer)
        if outputs is not None:
            bn = batch_norm_of(layer, *outputs.mean)
            for name in names:
                put(model, name, bn)


def _replace(model, old, new):
    """Wherever a module stands in a model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


class _Trace(TorchDispatchMode):
    """One run of a model: which norms and other operators read what convolutions give.

    Args:
        model: in eval mode.
        example: its input.
    """

    def __init__(self, model, example):
        super().__init__()
        self.model = model
        layers = dn_layers(model)
        norms = {
            name: norm
            for name, norm in (*batch_norms(model).items(), *layers.items())
            if norm in layers.values() or _is_constant_norm(norm)
        }
        self.norms = {}  # in the model's order, each with its first name
        for name, module in model.named_modules():
            if module in norms.values():
                self.norms[module] = name
        self.sources = {norm: set() for norm in self.norms}
        self.shapes = {norm: set() for norm in self.norms}
        self.readers = {}  # of a convolution: norms, and None for all else
        self.made = WeakIdKeyDictionary()  # output -> convolution
        self.inside = []
        handles = []
        for module in model.modules():
            if module in self.norms:
                handles += [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True),
                    module.register_forward_hook(self._leave),
                ]
            elif _is_plain_convolution(module):
                self.readers[module] = set()
                handles.append(module.register_forward_hook(self._make))
        try:
            with self:
                output = model(example)
        finally:
            for handle in handles:
                handle.remove()
        for value in tree_leaves(output):  # who gets it reads it
            if isinstance(value, Tensor) and value in self.made:
                self.readers[self.made[value]].add(None)

    def _make(self, conv, inputs, output):
        self.made[output] = conv

    def _enter(self, norm, inputs, keywords):
        x = [*inputs, *keywords.values()][0]
        self.sources[norm].add(self.made.get(x))
        self.shapes[norm].add(x.shape)
        self.inside.append(norm)

    def _leave(self, norm, inputs, output):
        self.inside.pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value in self.made:
                reader = self.inside[-1] if self.inside else None
                self.readers[self.made[value]].add(reader)
        return function(*args, **(kwargs or {}))

    def convolution_of(self, norm):
        """The convolution that a norm can go into, and the module in which to change it.

        A convolution that several norms share (RTMDet's heads) gets a copy for each, where
        they stand beside it in modules of their own.
        """
        if len(self.sources[norm]) != 1 or None in self.sources[norm]:
            return None, None
        (conv,) = self.sources[norm]
        readers = self.readers[conv]
        if None in readers or any(self.sources[other] != {conv} for other in readers):
            return None, None
        if len(readers) == 1:
            return conv, self.model
        beside = {}
        for parent in self.model.modules():
            children = list(parent._modules.values())
            if conv in children:
                beside[parent] = [child for child in children if child in readers]
        if any(len(norms) != 1 for norms in beside.values()):
            return None, None
        places = [parent for parent, norms in beside.items() if norms == [norm]]
        return (conv, places[0]) if len(places) == 1 else (None, None)


def _is_plain_convolution(module):
    return type(module).forward in (
        nn.Conv2d.forward,
        mmcv.cnn.bricks.wrappers.Conv2d.forward,
    ) and not has_registered(module)


def _is_constant_norm(norm):
    return (
        (is_torch_batch_norm(norm) or is_frozen_batch_norm(norm))
        and norm.running_mean is not None
        and not has_registered(norm)
    )


def _is_simplifiable(layer, shapes):
    return (
        not layer.batch_shared
        and _is_constant_norm(layer.bn)
        and type(layer.sc).forward is SC.forward
        and not has_registered(layer.sc)
        and bool(shapes)
        and all(len(shape) == 4 for shape in shapes)
    )


def _constant(norm, conv):
    mu, sigma, w, b = _parts(norm)
    return _scaled(conv, w / sigma, b - mu * w / sigma), nn.Identity()


def _dynamic(layer, conv, shapes, target):
    mu, sigma, w, b = _parts(layer.bn)
    if conv is None:
        k, t = torch.ones_like(mu), torch.zeros_like(mu)
    else:
        guarded = (b.abs() >= GUARD * w.abs()) | ((w / sigma).abs() < SMALLEST)
        k = torch.where(guarded, 1, w) / sigma
        t = torch.where(guarded, 0, b) - mu * k
        conv = _scaled(conv, k, t)
    single = target == 'onnxruntime' and all(shape[0] == 1 for shape in shapes)
    if single and conv is not None and _widens(conv, shapes):
        conv, norm = nn.Identity(), WideningDN(layer, k, t, conv)
    else:  # in a head of regions these are a batch, of one image too
        norm = (OnnxruntimeDN if single else PortableDN)(layer, k, t)
    if isinstance(layer, (DNBAct, DNCAct)):
        norm = nn.Sequential(norm, layer.act)
    return conv, norm


def _parts(bn):
    """mu, sigma, w, b (C,) in float64."""
    mu, var = bn.running_mean.double(), bn.running_var.double()
    return mu, (var + getattr(bn, 'eps', 1e-5)).sqrt(), *affine_of(bn, mu)


def _scaled(conv, k, t):
    """A convolution that gives ``k y + t`` where this one gives y; k, t (C,)."""
    new = copy.deepcopy(conv)
    bias = t if conv.bias is None else t + k * conv.bias
    weight = conv.weight * k[:, None, None, None]
    new.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    new.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    return new


def _widens(conv, shapes):
    room = min(shape[2:].numel() for shape in shapes) >= ROOM * conv.in_channels
    return (
        room
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding in (0, (0, 0))
        and conv.out_channels >= WIDENING * conv.in_channels
    )


class PortableDN(nn.Module):
    """DN-B in eval mode of ``u = k x + t``, x being the layer's own input.

        (g, h) = bound tanh(W_out relu(W [m, s] + b) + b_out),   y = p (1 + g) u + q (1 + g) + h

    m and s are the mean and ``sqrt(var + eps k^2)`` of u in each image and channel. W and b
    are SC's first linear, of what u makes of its own inputs. p and q are 1 and 0, and left
    out, where k and t contain all of the inner norm.

    With ``is_one_operator`` torch's ONNX exporter sees a layer as one operator, which it then
    writes as `to_onnx` says: it takes minutes over thousands, and writes a pooling as a mean.

    Args:
        layer: a DNB.
        k, t: (C,), float64; k is not zero.

    Shape: (N, C, H, W) -> the same.
    """

    is_one_operator = False

    def __init__(self, layer: Any, k: Tensor, t: Tensor):
        super().__init__()
        sc, (mu, sigma, w, b) = layer.sc, _parts(layer.bn)
        self.bound = sc.bound
        self.channels = len(k)
        of_mean, of_std = sc.w_in.double().chunk(2, dim=1)
        b_in = sc.b_in.double()
        if sc.inputs == 'standardized':  # m' = (m_x - mu) / sigma, s' = s_x / sigma - 1
            b_in = b_in - of_mean @ (mu / sigma) - of_std.sum(1)
            of_mean, of_std = of_mean / sigma, of_std / sigma
        # m_x = (m - t) / k, s_x = s / |k|
        self._keep(
            w_in=torch.cat((of_mean / k, of_std / k.abs()), dim=1),
            b_in=b_in - of_mean @ (t / k),
            w_out=sc.w_out,
            b_out=sc.b_out,
            eps=getattr(layer.bn, 'eps', 1e-5) * k.square(),
        )
        p = w / sigma / k
        q = b - mu * w / sigma - p * t
        self.is_whole = bool(((p - 1).abs() < 1e-9).all() and (q.abs() < 1e-9).all())
        if not self.is_whole:
            self._keep(p=p, q=q)
        self._shape_coefficients()

    def _keep(self, **tensors):
        for name, value in tensors.items():
            value = value.detach().to(torch.float32).contiguous()
            self.register_buffer(name, value, persistent=False)

    def _shape_coefficients(self):
        """Channels as (1, C, 1, 1), and SC's linears as 1 x 1 convolutions."""
        for name, value in list(self.named_buffers()):
            if name in ('w_in', 'w_out'):
                setattr(self, name, value[:, :, None, None])
            elif name in ('eps', 'p', 'q'):
                setattr(self, name, value[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.is_one_operator:
            names, tensors = zip(*self.named_buffers(), strict=True)
            return _simple_norm(
                x,
                list(tensors),
                ','.join(names),
                type(self).__name__,
                self.bound or 0.0,
                self.channels,
                list(x.shape[2:]),
            )
        return self.compute(x)

    def compute(self, u):
        mean = F.adaptive_avg_pool2d(u, 1)
        var = F.relu(F.adaptive_avg_pool2d(u * u, 1) - mean * mean)
        std = torch.sqrt(var + self.eps)
        hidden = F.relu(F.conv2d(torch.cat((mean, std), 1), self.w_in, self.b_in))
        out = F.conv2d(hidden, self.w_out, self.b_out)
        if self.bound is not None:
            out = torch.tanh(out) * self.bound
        g, h = out[:, : self.channels], out[:, self.channels :]  # few runtimes split
        a = g + 1
        if self.is_whole:
            return u * a + h
        return u * (a * self.p) + (a * self.q + h)

    @staticmethod
    def to_onnx(op, u, parts, bound, channels, sides):
        mean = op.GlobalAveragePool(u)
        var = op.Relu(op.Sub(op.GlobalAveragePool(op.Mul(u, u)), op.Mul(mean, mean)))
        std = op.Sqrt(op.Add(var, parts['eps']))
        hidden = op.Relu(op.Conv(op.Concat(mean, std, axis=1), parts['w_in'], parts['b_in']))
        out = op.Conv(hidden, parts['w_out'], parts['b_out'])
        if bound:
            out = op.Mul(op.Tanh(out), op.Constant(value_float=bound))
        g, h = op.Split(out, axis=1, num_outputs=2)
        a = op.Add(g, op.Constant(value_float=1.0))
        if 'p' in parts:
            h = op.Add(op.Mul(a, parts['q']), h)
            a = op.Mul(a, parts['p'])
        return op.Add(op.Mul(u, a), h)

    def extra_repr(self):
        return f'{self.channels}, hidden={len(self.b_in)}, bound={self.bound}'


class OnnxruntimeDN(PortableDN):
    """The same for one image, in what onnxruntime's CPU kernels do in few passes.

    The sum of squares is a convolution of u with itself, each channel its own kernel. The
    affine is a depthwise convolution, into which a clip that follows is fused.

    Shape: (1, C, H, W) -> the same.
    """

    def _shape_coefficients(self):
        one, zero = torch.ones(self.channels), torch.zeros(self.channels)
        self._keep(
            size=(self.bound or 1.0) * torch.cat((one, one)),
            first=torch.cat((one, zero)),
            zero=torch.cat((zero, zero)),
            one=torch.cat((one, one)),
        )
        for name, value in list(self.named_buffers()):
            if name in ('p', 'q'):
                setattr(self, name, value[:, None, None, None])

    def compute(self, u):
        _check_single(u)
        mean = u.mean((2, 3), keepdim=True)
        size = u.shape[2:].numel()
        squares = F.conv2d(u, u.transpose(0, 1), self.eps * size, groups=self.channels)
        std = torch.sqrt(torch.abs(squares / size - mean * mean))
        a, h = self._coefficients(torch.cat((mean, std), 1).flatten(1))
        return F.conv2d(u, a, h.flatten(), groups=self.channels)

    def _coefficients(self, statistics):
        """(1, 2C) -> a, h (C, 1, 1, 1): y = a u + h."""
        hidden = F.relu(F.linear(statistics, self.w_in, self.b_in))
        out = F.linear(hidden, self.w_out, self.b_out)
        if self.bound is not None:
            out = torch.tanh(out)
        a, h = (out * self.size + self.first).reshape(-1, 1, 1, 1).chunk(2, dim=0)
        return (a, h) if self.is_whole else (a * self.p, a * self.q + h)

    @classmethod
    def to_onnx(cls, op, u, parts, bound, channels, sides):
        size = sides[0] * sides[1]
        mean = op.ReduceMean(u, op.Constant(value_ints=[2, 3]), keepdims=1)
        kernels = op.Reshape(u, op.Constant(value_ints=[channels, 1, *sides]))
        squares = op.Conv(
            u,
            kernels,
            op.Mul(parts['eps'], op.Constant(value_float=float(size))),
            group=channels,
            kernel_shape=sides,
        )
        mean_square = op.Mul(squares, op.Constant(value_float=1 / size))
        std = op.Sqrt(op.Abs(op.Sub(mean_square, op.Mul(mean, mean))))
        statistics = op.Reshape(
            op.Concat(mean, std, axis=1), op.Constant(value_ints=[1, 2 * channels])
        )
        a, h = cls._coefficients_to_onnx(op, statistics, parts, bound, channels)
        return op.Conv(
            u, a, op.Reshape(h, op.Constant(value_ints=[-1])), group=channels, kernel_shape=[1, 1]
        )

    @staticmethod
    def _coefficients_to_onnx(op, statistics, parts, bound, channels):
        hidden = op.Relu(op.Gemm(statistics, parts['w_in'], parts['b_in'], transB=1))
        out = op.Gemm(hidden, parts['w_out'], parts['b_out'], transB=1)
        if bound:
            out = op.Tanh(out)
        # out * size + first, as one node
        out = op.BatchNormalization(
            out, parts['size'], parts['first'], parts['zero'], parts['one'], epsilon=0.0
        )
        out = op.Reshape(out, op.Constant(value_ints=[2 * channels, 1, 1, 1]))
        a, h = op.Split(out, axis=0, num_outputs=2)
        if 'p' in parts:
            h = op.Add(op.Mul(a, parts['q']), h)
            a = op.Mul(a, parts['p'])
        return a, h


class WideningDN(OnnxruntimeDN):
    """A 1 x 1 convolution ``u = W v + b`` with many more outputs than inputs, and DN-B of u.

    The moments of u come from those of v, ``mean u = W mean v + b`` and
    ``var u = diag(W cov(v) W^T)``, and a and h go into W and b: no pass over u remains.

    Args:
        conv: the convolution; it gives u.

    Shape: (1, C_in, H, W) -> (1, C, H, W).
    """

    def __init__(self, layer, k, t, conv):
        super().__init__(layer, k, t)
        of_mean, of_std = self.w_in.double().chunk(2, dim=1)
        weight = conv.weight[:, :, 0, 0].double()
        bias = conv.bias.double()
        self._keep(
            weight=conv.weight,
            bias=bias[:, None, None, None],
            matrix=weight,
            w_in=torch.cat((of_mean @ weight, of_std), dim=1),
            b_in=self.b_in + of_mean @ bias,
        )

    def compute(self, v):
        _check_single(v)
        mean = v.mean((2, 3), keepdim=True)
        centred = (v - mean)[0].flatten(1)
        covariance = centred @ centred.t()
        matrix = self.matrix / centred.shape[1]
        var = ((self.matrix @ covariance) * matrix).sum(1)
        std = torch.sqrt(var + self.eps)
        a, h = self._coefficients(torch.cat((mean.flatten(), std))[None])
        return F.conv2d(v, self.weight * a, (a * self.bias + h).flatten())

    @classmethod
    def to_onnx(cls, op, v, parts, bound, channels, sides):
        size = sides[0] * sides[1]
        mean = op.ReduceMean(v, op.Constant(value_ints=[2, 3]), keepdims=1)
        centred = op.Reshape(op.Sub(v, mean), op.Constant(value_ints=[-1, size]))
        covariance = op.MatMul(centred, op.Transpose(centred, perm=[1, 0]))
        matrix = op.Mul(parts['matrix'], op.Constant(value_float=1 / size))
        products = op.Mul(op.MatMul(parts['matrix'], covariance), matrix)
        var = op.ReduceSum(products, op.Constant(value_ints=[1]), keepdims=0)
        std = op.Sqrt(op.Add(var, parts['eps']))
        row = op.Constant(value_ints=[1, -1])
        statistics = op.Concat(op.Reshape(mean, row), op.Reshape(std, row), axis=1)
        a, h = cls._coefficients_to_onnx(op, statistics, parts, bound, channels)
        bias = op.Reshape(op.Add(op.Mul(a, parts['bias']), h), op.Constant(value_ints=[-1]))
        return op.Conv(v, op.Mul(parts['weight'], a), bias, kernel_shape=[1, 1])


def _check_single(x):
    if len(x) != 1:
        raise ValueError(
            f"expected one image, got {len(x)}: simplify the model for target='portable'"
        )


KINDS = {kind.__name__: kind for kind in (PortableDN, OnnxruntimeDN, WideningDN)}


@torch.library.custom_op('dn_mmdet::simple_norm', mutates_args=())
def _simple_norm(
    x: Tensor,
    tensors: list[Tensor],
    names: str,
    kind: str,
    bound: float,
    channels: int,
    sides: list[int],
) -> Tensor:
    raise RuntimeError(
        'dn_mmdet::simple_norm stands for a layer while torch.onnx.export runs, '
        'and computes nothing: call the layer itself'
    )


@_simple_norm.register_fake
def _(x, tensors, names, kind, bound, channels, sides):
    return x.new_empty(x.shape[0], channels, *x.shape[2:])


def onnx_simple_norm(x, tensors, names, kind, bound, channels, sides):
    """What torch's ONNX exporter writes for a layer."""
    from onnxscript import opset18 as op  # with the extra alone

    parts = dict(zip(names.split(','), tensors, strict=True))
    return KINDS[kind].to_onnx(op, x, parts, bound, channels, list(sides))
