"""A norm layer that Dynamic Normalization is compared with, for fairness."""
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn


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

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True,
                 track_running_stats=True, reduction=16, min_channels=16):
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
