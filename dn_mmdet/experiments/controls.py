"""Norm layers that Dynamic Normalization is compared with, each without one part of it."""

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..convert import convert_norm
from ..scaled_bn import RewrittenBN
from ..scaled_bn import ScaledBN as ScaledBN  # configs may name it here


@MODELS.register_module()
class StaticDN(RewrittenBN):
    r"""Dynamic Normalization without inputs: g and h are learned constants.

    .. math::
        y = (1 + g) \, z + h, \qquad z = \text{BN}(x)

        g, h = \text{bound} \cdot \tanh(u, v)                    \quad \text{rank='full'}

        g, h = \text{bound} \cdot \tanh(W_{out}\, r + b_{out})   \quad \text{rank='low'}

    With ``'full'``, u and v (C,) start at zero: it asks whether SC is needed at all. With
    ``'low'``, W_out (2C, hidden) and b_out start at zero as in SC, and a learned constant r
    (hidden,) stands for its hidden units. It starts as ``relu(N(0, 1))``, as He
    initialisation leaves them, so that ``|r|^2``, which multiplies the rate at which g and
    h move, is about that of SC.

    A fresh layer is BatchNorm. Training and eval differ as in BatchNorm.

    Args:
        num_features (int): channels C of the input.
        eps, momentum, affine, track_running_stats: of the BatchNorm.
        bound (float | None): g and h lie in (-bound, bound).
        rank (str): ``'full'`` or ``'low'``.
        reduction (int), min_channels (int): hidden is ``max(C // reduction, min_channels)``.

    Shape: (N, C, H, W) -> the same.

    Raises:
        ValueError: rank is neither of the two.
    """

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        bound=0.25,
        rank='full',
        reduction=32,
        min_channels=8,
    ):
        super().__init__()
        if rank not in ('full', 'low'):
            raise ValueError(f"rank: expected 'full' or 'low', got {rank!r}")
        self.bound = bound
        self.bn = nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats)
        self.b_out = nn.Parameter(torch.zeros(2 * num_features))  # u and v, one after the other
        if rank == 'low':
            hidden = max(num_features // reduction, min_channels)
            self.w_out = nn.Parameter(torch.zeros(2 * num_features, hidden))
            self.r = nn.Parameter(torch.randn(hidden).relu())
        self.rank = rank

    def scale_and_shift(self):
        out = self.b_out
        if self.rank == 'low':
            out = self.b_out + (self.w_out * self.r).sum(1)  # not a matmul: autocast leaves it
        if self.bound is not None:
            out = self.bound * torch.tanh(out)
        g, h = out.chunk(2)
        if not self.bn.affine:
            return 1 + g, h
        return self.bn.weight * (1 + g), self.bn.bias * (1 + g) + h

    def extra_repr(self):
        return f'rank={self.rank!r}, bound={self.bound}'


@MODELS.register_module()
class BNSE(nn.Module):
    r"""BatchNorm followed by squeeze-and-excitation, of the size of DN-B's SC.

    Source: Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507, with two
    changes that make it the control: it follows every norm, as SC does, and it
    starts as identity, as a fresh DN layer does.

    .. math::
        y = 2 \sigma(W_{out}\, \text{relu}(W_{in}\, \text{mean}(z) + b_{in})
            + b_{out}) \, z, \qquad z = \text{BN}(x)

    The hidden layer is twice as wide as SC's, whose linears have twice the inputs
    and outputs: parameters and Mult-Adds are about the same.

    Args:
        num_features (int): channels C of the input.
        eps, momentum, affine, track_running_stats: of the BatchNorm.
        reduction (int), min_channels (int): the hidden layer has
            ``max(C // reduction, min_channels)`` units.

    Shape: (N, C, H, W) -> the same.
    """

    _abbr_ = 'bn'

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        reduction=16,
        min_channels=16,
    ):
        super().__init__()
        hidden = max(num_features // reduction, min_channels)
        self.bn = nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats)
        # Not Linear, and not called weight or bias: see `SC`.
        self.w_in = nn.Parameter(torch.empty(hidden, num_features))
        self.b_in = nn.Parameter(torch.zeros(hidden))
        self.w_out = nn.Parameter(torch.zeros(num_features, hidden))
        self.b_out = nn.Parameter(torch.zeros(num_features))
        nn.init.kaiming_normal_(self.w_in, nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn(x)
        hidden = F.relu(F.linear(z.mean((2, 3)), self.w_in, self.b_in))
        gate = 2 * torch.sigmoid(F.linear(hidden, self.w_out, self.b_out))
        return z * gate[:, :, None, None]


@MODELS.register_module()
def PartlyConverted(part, norm, only, norm_args=None, **more):
    """A part of a model (backbone, neck, head) with Dynamic Normalization in some layers.

    Args:
        part (dict): the config of that part, with BatchNorm.
        norm (str): ``'DNB'`` or ``'DNC'``.
        only (str | list[str]): patterns of the norms to convert; see `convert_norm`.
        norm_args (dict): further arguments of the layers.
        **more: options that the model around it hands to the part.

    Returns:
        nn.Module: the part itself, so that its parameters keep their names.

    Raises:
        ValueError: a pattern matches no norm of this part.
    """
    return convert_norm(MODELS.build(dict(part, **more)), norm, only=only, **(norm_args or {}))
