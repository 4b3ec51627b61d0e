"""The big passes of Dynamic Normalization, in three backends with the same signatures.

`torch_ops` is made of stock operators, `cpp_ops` compiled for CPUs, `triton_ops` for GPUs: each
module is a `Backend`. `operators` has a whole layer as an operator of torch.library, for
`torch.compile`.
"""

from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """What a module with kernels holds. None of it is differentiable.

    x (N, C, ...) has at least three dimensions and is not empty, with S values in each of a
    sample's channels; ``m, v`` (N, C) are the mean and population variance of those. All that
    is (N, C) is in float32 at least.

    Outputs as big as x have its dtype and, where that is contiguous or channels_last, its
    memory format; any other x is copied first. ``dy`` may have any strides. Centring on m
    keeps channels with ``|mean| >> std`` accurate.

    A backend may also have ``infer``, all of a layer at one call where no gradient is needed. One
    that does not run on all devices has ``check_runs_on(x)``, which raises ValueError there.
    """

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """m, v. Reads x."""

    def affine(self, x: Tensor, m: Tensor, a: Tensor, c: Tensor) -> Tensor:
        """``y = a (x - m) + c``. Reads x, writes y."""

    def reduce(self, dy: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """``da = sum dy (x - m)`` and ``dc = sum dy``. Reads dy and x."""

    def input_gradient(
        self, dy: Tensor, x: Tensor, m: Tensor, a: Tensor, p: Tensor, q: Tensor
    ) -> Tensor:
        """``dx = a dy + p (x - m) + q``. Reads dy and x, writes dx."""

    @property
    def Coefficients(self) -> type:
        """The small part between the passes: a and c, and back. See `torch_ops.Coefficients`."""
