"""The SC module: scale and shift made from the features' own mean and std."""

import contextlib
import copy
import math
import operator
from collections.abc import Iterable
from fractions import Fraction
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUTS = ('raw', 'standardized')


def no_autocast(device_type):
    """float16 linears would overflow on raw statistics and lose what float32 kept.

    Only where autocast is on: torch.export takes every such region out of the graph and
    puts it back, for minutes in a detector with many layers.
    """
    if device_type == 'meta' or not torch.is_autocast_enabled(device_type):  # meta has none
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def in_dtype_of(like: Tensor, tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t if t.dtype == like.dtype else t.to(like.dtype) for t in tensors]


def check_choices(given: dict[str, str], known: dict[str, tuple[str, ...]]) -> None:
    for name, value in given.items():
        if value not in known[name]:
            raise ValueError(f'{name}: expected one of {known[name]}, got {value!r}')


def _positive_integer(name, value):
    """The int that value is, as numpy's are too."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f'{name}: expected an integer of at least 1, got {value!r}')
    return number


def _checked_bound(bound):
    if bound is None or isinstance(bound, Real) and 0 < bound < math.inf:
        return float(bound) if isinstance(bound, Fraction) else bound
    raise ValueError(f'bound: expected a number above 0, or None for no bound, got {bound!r}')


def g_and_h(
    mean: Tensor,
    std: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    bound: float | None,
) -> tuple[Tensor, Tensor]:
    """What `SC` computes."""
    w_in, b_in, w_out, b_out = in_dtype_of(mean, (w_in, b_in, w_out, b_out))
    with no_autocast(mean.device.type):
        hidden = F.relu(F.linear(torch.cat((mean, std), dim=1), w_in, b_in))
        out = F.linear(hidden, w_out, b_out)
    if bound is not None:
        out = bound * torch.tanh(out)
    g, h = out.chunk(2, dim=1)
    return g, h


class SC(nn.Module):
    """Makes the relative scale ``g`` and the shift ``h`` of Dynamic Normalization.

        (g, h) = bound tanh(W_out relu(W_in [m', s'] + b_in) + b_out)

    ``m', s'`` are the mean and std of the features, as they are or standardized
    (see ``inputs``). The paper (Liu, Gao, Lv, arXiv 2101.06073) names this module
    and its two inputs. Its layers and its initialisation are this project's own
    design. ``W_out`` and ``b_out`` start at zero, so a new module gives
    ``g = h = 0``, and the layer around it is plain BatchNorm.

    The parameters are plain ``nn.Parameter`` and none has the name ``weight`` or
    ``bias``. The initialisers of mmengine and mmdet change ``Linear`` and ``Conv2d``
    modules and parameters named ``weight`` and ``bias``, and would overwrite the
    zeros.

    Args:
        num_features (int): channels C of the normalised feature map.
        reduction (int): the hidden layer has ``C // reduction`` units, but
        min_channels (int): never fewer than this.
        inputs (str): ``'raw'``, the mean and std as they are (as in the paper's
            abstract), or ``'standardized'``, relative to the batch statistics.
            This module only stores it. The caller prepares the inputs.
        bound (float | None): outputs lie in (-bound, bound); ``None`` leaves
            them unbounded, with which DN-B hardly trained.

    Shape:
        - mean, std: (N, C), floating point of one dtype (float32 or wider)
        - output: two tensors (N, C) of that dtype

    A layer can use another module in place of SC (its argument ``sc``). Such a module gets
    the same arguments. It needs the attributes ``num_features`` and ``inputs``, and the
    methods `reset_parameters`, `is_identity` and `identity_state_dict`. A subclass of SC has
    them. If it has a ``forward`` of its own, every backend calls that, and where gradients
    are needed the layer runs on plain autograd.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> g, h = SC(16)(torch.randn(4, 16), torch.rand(4, 16))
        >>> g.shape, int(g.count_nonzero()), int(h.count_nonzero())
        (torch.Size([4, 16]), 0, 0)
    """

    OUTPUT_PARAMETERS = ('w_out', 'b_out')  # g = h = 0 where these are zero

    def __init__(
        self,
        num_features: int,
        reduction: int = 32,
        min_channels: int = 8,
        inputs: str = 'raw',
        bound: float | None = 0.25,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_features = _positive_integer('num_features', num_features)
        reduction = _positive_integer('reduction', reduction)
        min_channels = _positive_integer('min_channels', min_channels)
        self.num_features = num_features
        self.inputs = inputs
        self.bound = bound
        self._make_parameters(
            max(num_features // reduction, min_channels), dict(device=device, dtype=dtype)
        )
        self.reset_parameters()

    def __setattr__(self, name, value):
        if name == 'inputs':
            check_choices(dict(inputs=value), dict(inputs=INPUTS))
        elif name == 'bound':
            value = _checked_bound(value)
        super().__setattr__(name, value)

    def _make_parameters(self, hidden, factory, given=2, made=2):
        self.w_in = nn.Parameter(torch.empty(hidden, given * self.num_features, **factory))
        self.b_in = nn.Parameter(torch.empty(hidden, **factory))
        self.w_out = nn.Parameter(torch.empty(made * self.num_features, hidden, **factory))
        self.b_out = nn.Parameter(torch.empty(made * self.num_features, **factory))

    def reset_parameters(self):
        """He initialisation for the first linear layer, zeros for the last."""
        nn.init.kaiming_normal_(self.w_in, nonlinearity='relu')
        for zero in (self.b_in, self.w_out, self.b_out):
            nn.init.zeros_(zero)

    def forward(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        return g_and_h(mean, std, self.w_in, self.b_in, self.w_out, self.b_out, self.bound)

    def is_identity(self) -> bool:
        """Whether g = h = 0 for every input: the module is not trained yet, or was reset."""
        if any(getattr(self, name).any() for name in self.OUTPUT_PARAMETERS):
            return False
        mean, std = self.w_out.new_tensor([[-1.7, 0.3], [2.1, 0.9]])[..., None].expand(
            -1, -1, self.num_features
        )
        with torch.no_grad():  # a forward of a subclass's own, or a hook, may add something
            return not any(outputs.any() for outputs in self(mean, std))

    def identity_state_dict(
        self, prefix: str = '', device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The state of this module with ``W_out`` and ``b_out`` set to zero, so g = h = 0.

        A module on the meta device has no values. If ``device`` is given, the state is then
        that of a new module on ``device``.

        Raises:
            ValueError: a parametrization computes ``W_out`` or ``b_out``.
        """
        sc = self
        if device is not None and any(p.is_meta for p in self.parameters()):
            sc = copy.deepcopy(self).to_empty(device=device)
            sc.reset_parameters()
        state = {prefix + name: tensor.clone() for name, tensor in sc.state_dict().items()}
        for name in self.OUTPUT_PARAMETERS:
            weights = f'{prefix}{name}_orig' if f'{prefix}{name}_mask' in state else prefix + name
            if weights not in state:
                raise ValueError(
                    f'{prefix}{name} is computed from other parameters, so it cannot be '
                    f'set to zero for g = h = 0: remove its parametrization first, with '
                    f'torch.nn.utils.parametrize.remove_parametrizations, '
                    f'remove_spectral_norm or remove_weight_norm'
                )
            state[weights].zero_()
        return state

    def extra_repr(self):
        return (
            f'{self.num_features}, hidden={len(self.b_in)}, inputs={self.inputs!r}, '
            f'bound={self.bound}'
        )
