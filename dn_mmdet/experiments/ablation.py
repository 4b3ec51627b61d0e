"""SC with one design choice changed: what an ablation compares the default with.

A config chooses it by its path, for which nothing has to be imported before:
``norm_cfg=dict(type='DNB', sc=dict(type='dn_mmdet.experiments.ablation.VariantSC',
outputs='scale'))``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sc import SC, check_choices, in_dtype_of, no_autocast

CHOICES = dict(
    statistics=('both', 'mean', 'std'),
    outputs=('both', 'scale', 'shift'),
    squash=('tanh', 'sigmoid'),
    hidden=('plain', 'normalized', 'channelwise'),
    init=('zero', 'default'),
    gradient=('full', 'stopped'),
    sample=('own', 'other'),
)


class VariantSC(SC):
    r"""SC (see there for the equation and the other arguments), with other choices.

    Args:
        statistics (str): ``'both'``, or ``'mean'`` or ``'std'`` alone as the input.
        outputs (str): ``'both'``, or ``'scale'`` (h = 0) or ``'shift'`` (g = 0) alone.
        squash (str): ``'tanh'``, or ``'sigmoid'``: bound times (2 sigmoid - 1), which has
            half the slope at zero.
        hidden (str): ``'plain'``; ``'normalized'``, each sample's hidden units divided
            by their root mean square; or ``'channelwise'``, no hidden units: the outputs
            of a channel are linear, without bias, in its own statistics.
        init (str): ``'zero'``, or ``'default'``: the last linear starts as torch's
            ``nn.Linear`` does, and a fresh layer is not BatchNorm.
        gradient (str): ``'full'``, or ``'stopped'``: none flows from scale and shift back
            into the statistics that they were made from.
        sample (str): ``'own'``, or ``'other'``: DN-B's scale and shift of sample n of N are
            made from the statistics of sample ``(n + N // 2) mod N``, in training and in
            eval mode. They follow an image, but not the one that they are applied to. A
            shift by half a batch and not by one, because evaluation reads images in the
            order of their classes. A batch of one sample has no other: it gets its own. In
            DN-C, which has one pair for the batch, it changes nothing.

    Raises:
        ValueError: an argument is out of range.
    """

    EPS = 1e-5  # under the root of the hidden units' mean square

    def __init__(
        self,
        num_features,
        reduction=32,
        min_channels=8,
        inputs='raw',
        bound=0.25,
        device=None,
        dtype=None,
        statistics='both',
        outputs='both',
        squash='tanh',
        hidden='plain',
        init='zero',
        gradient='full',
        sample='own',
    ):
        choices = dict(
            statistics=statistics,
            outputs=outputs,
            squash=squash,
            hidden=hidden,
            init=init,
            gradient=gradient,
            sample=sample,
        )
        check_choices(choices, CHOICES)
        self.choices = choices
        if hidden == 'channelwise':
            self.OUTPUT_PARAMETERS = ('w_out',)
        super().__init__(num_features, reduction, min_channels, inputs, bound, device, dtype)

    def _make_parameters(self, hidden, factory):
        given = 2 if self.choices['statistics'] == 'both' else 1
        made = 2 if self.choices['outputs'] == 'both' else 1
        if self.choices['hidden'] == 'channelwise':
            self.w_out = nn.Parameter(torch.empty(made, given, self.num_features, **factory))
        else:
            super()._make_parameters(hidden, factory, given, made)

    def reset_parameters(self):
        if self.choices['hidden'] != 'channelwise':
            super().reset_parameters()
        else:
            nn.init.zeros_(self.w_out)
        if self.choices['init'] == 'default':
            limit = self.w_out.shape[1] ** -0.5
            for name in self.OUTPUT_PARAMETERS:
                nn.init.uniform_(getattr(self, name), -limit, limit)

    def forward(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        given = {'both': (mean, std), 'mean': (mean,), 'std': (std,)}[self.choices['statistics']]
        if self.choices['gradient'] == 'stopped':
            given = tuple(statistic.detach() for statistic in given)
        if self.choices['sample'] == 'other':
            given = tuple(statistic.roll(-(len(statistic) // 2), 0) for statistic in given)
        with no_autocast(mean.device.type):
            if self.choices['hidden'] == 'channelwise':
                (w_out,) = in_dtype_of(mean, (self.w_out,))
                out = torch.einsum('ngc,mgc->nmc', torch.stack(given, 1), w_out).flatten(1)
            else:
                out = self._through_hidden(torch.cat(given, 1))
        if self.choices['squash'] == 'sigmoid':
            out = out / 2  # 2 sigmoid(t) - 1 = tanh(t / 2)
        if self.bound is not None:
            out = self.bound * torch.tanh(out)
        if self.choices['outputs'] == 'both':
            g, h = out.chunk(2, dim=1)
            return g, h
        zero = torch.zeros_like(out)
        return (out, zero) if self.choices['outputs'] == 'scale' else (zero, out)

    def _through_hidden(self, statistics):
        w_in, b_in, w_out, b_out = in_dtype_of(
            statistics, (self.w_in, self.b_in, self.w_out, self.b_out)
        )
        hidden = F.relu(F.linear(statistics, w_in, b_in))
        if self.choices['hidden'] == 'normalized':
            hidden = hidden * (hidden.square().mean(1, keepdim=True) + self.EPS).rsqrt()
        return F.linear(hidden, w_out, b_out)

    def extra_repr(self):
        changed = ''.join(
            f', {name}={value!r}'
            for name, value in self.choices.items()
            if value != CHOICES[name][0]
        )
        return (
            f'{self.num_features}, inputs={self.inputs!r}, bound={self.bound}, '
            f'parameters={sum(p.numel() for p in self.parameters())}{changed}'
        )
