"""BatchNorms whose scale and shift are written in another way than as weight and bias."""

import math
from numbers import Real
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.func import functional_call

from .inner_norm import check_eps, check_momentum
from .layers import BATCH_NORM_KEYS


class RewrittenBN(nn.Module):
    """A BatchNorm with a scale and a shift that come from other parameters, not from the input.

    ``y = scale * (x - mu) / sigma + shift``; statistics, their running averages and modes
    are those of ``bn``. It costs what BatchNorm does, and `dn_mmdet.fold.fold_norm` makes it
    one, exactly.
    """

    _abbr_ = 'bn'
    bn: Any

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift()
        return functional_call(self.bn, dict(weight=scale, bias=shift), (x,))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Both (C,)."""
        raise NotImplementedError


@MODELS.register_module()
class ScaledBN(RewrittenBN):
    r"""BatchNorm whose weight and bias learn at ``rate`` times the rate of all others.

    .. math::
        y = k u \, \frac{x - \mu}{\sigma} + k v, \qquad k = \sqrt{\text{rate}}

    u starts at 1 / k and v at 0, so that a fresh layer is BatchNorm. A BatchNorm checkpoint
    loads by name and gives the same output.

    The gradient of u is k times the weight's, and the weight moves k times as far as u: a step
    of SGD, with momentum too, is that of ``rate`` times the learning rate. Adam and AdamW
    divide by the gradient's size, so with them it is k times: ``rate=30`` is 5.5 times. Weight
    decay acts on weight and bias as often as on the other parameters: ``lr * decay * weight``,
    not ``rate`` times that. (MMEngine's ``norm_decay_mult`` does not reach them; use
    ``custom_keys``.)

    Written into the layer because `lr_mult` does not do it: mmengine's OneCycleLR sets one
    learning rate for all parameters.

    Args:
        num_features (int): channels C of the input.
        eps, momentum, track_running_stats: of the BatchNorm.
        rate (float): above 0.

    Shape: (N, C, H, W) -> the same.

    Raises:
        ValueError: rate or eps is not above 0, or momentum is no number.

    Example:
        >>> ScaledBN(16, rate=30)(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    k: float
    u: nn.Parameter
    v: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        *,
        rate: float,
    ):
        super().__init__()
        check_eps(eps)
        check_momentum(momentum)
        if not isinstance(rate, Real) or not 0 < rate < math.inf:
            raise ValueError(f'rate: expected a number above 0, got {rate!r}')
        self.k = math.sqrt(rate)
        self.bn = nn.BatchNorm2d(num_features, eps, momentum, False, track_running_stats)
        # Not called weight and bias: initialisers would set them to 1 and 0.
        self.u = nn.Parameter(torch.full((num_features,), 1 / self.k))
        self.v = nn.Parameter(torch.zeros(num_features))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        return self.k * self.u, self.k * self.v

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Lets the keys of a BatchNorm of this layer's name stand for its own."""
        for key in BATCH_NORM_KEYS:
            value = state_dict.pop(prefix + key, None)
            if value is None:
                continue
            if key in ('weight', 'bias'):
                state_dict[prefix + ('u' if key == 'weight' else 'v')] = value / self.k
            else:
                state_dict[f'{prefix}bn.{key}'] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f'rate={self.k**2:g}'
