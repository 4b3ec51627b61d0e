"""What is compared: norms in their implementations, and the setting that they share."""

import contextlib
from typing import NamedTuple

import torch
from torch import nn

from ..kernels.choice import fused_backends
from ..layers import DNB, DNC
from ..sc import SC


class Variant(NamedTuple):
    """A norm in one implementation."""

    norm: str
    backend: str = ''

    @property
    def label(self):
        return f'{self.norm} {self.backend}'.strip()

    @property
    def fused(self):
        """Whether the bars hold for it: DN by any way but plain autograd."""
        return self.norm in ('DNB', 'DNC') and self.backend in FUSED


FUSED = 'auto', 'torch', 'cpp', 'triton'
BN, GN, FOLDED = Variant('BN'), Variant('GN'), Variant('BN', 'folded')
REFERENCE, COMPILED = Variant('DNB', 'reference'), Variant('DNB', 'compiled')
DN = 'DNB', 'DNC'


def parse_variant(text: str) -> Variant:
    """``'BN'``, ``'GN'``, or a DN layer with its backend: ``'DNB:auto'``.

    Raises:
        ValueError: there is no such norm, or a DN layer without a backend.
    """
    variant = Variant(*text.split(':', 1))
    if variant not in (BN, GN) and not (variant.norm in DN and variant.backend):
        raise ValueError(
            f"expected 'BN', 'GN', 'DNB:BACKEND' or 'DNC:BACKEND' (as in 'DNB:auto'), got {text!r}"
        )
    return variant


class Setting(NamedTuple):
    """What all timings of one run have in common."""

    device: str
    dtype: torch.dtype = torch.float32  # of feature maps; another than float32 under autocast
    channels_last: bool = False
    pairs: int = 15

    @property
    def fused(self):
        return fused_backends(self.device)

    @property
    def format(self):
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix('torch.')

    @property
    def layout(self):
        return 'channels_last' if self.channels_last else 'contiguous'

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)

    def __str__(self):
        return f'{self.dtype_name}, {self.layout}'


def make_layer(variant: Variant, channels: int) -> nn.Module:
    """One norm layer; SC as after training, the same in every backend."""
    if variant == BN:
        return nn.BatchNorm2d(channels)
    if variant == GN:
        return nn.GroupNorm(8, channels)
    backend = 'reference' if variant == COMPILED else variant.backend
    layer: nn.Module = (DNB if variant.norm == 'DNB' else DNC)(channels, backend=backend)
    wake(layer)
    if variant == COMPILED:
        torch.compiler.reset()  # else the eighth layer counts as a recompilation too many
        return torch.compile(layer, fullgraph=True, dynamic=False)  # type: ignore[return-value]
    return layer


def wake(model: nn.Module) -> nn.Module:
    """Draws every SC in a model again, always the same: a fresh one computes BatchNorm."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for parameter in module.parameters() if isinstance(module, SC) else ():
            with torch.no_grad():
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values / parameter.shape[-1] ** 0.5)
    return model
