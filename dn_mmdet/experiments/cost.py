"""What a model costs: Mult-Adds by operator, and memory.

Element-wise work is counted apart from convolutions and linears: it is bound by
memory, not by arithmetic, and a Mult-Add of it takes longer.
"""

import resource
import sys
from collections import Counter

import torch
from mmengine.model import BaseModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..convert import dn_layers

ELEMENT_WISE = ('norms (element-wise)', 'other element-wise', 'pooling (element-wise)')
# Mult-Adds per value of a norm at inference: its affine, and with statistics of the
# input the sums of the values and of their squares.
_PER_VALUE = {
    'native_batch_norm': 1,
    'cudnn_batch_norm': 1,
    'miopen_batch_norm': 1,
    '_native_batch_norm_legit_no_training': 1,
    '_batch_norm_no_update': 1,
    'native_group_norm': 3,
    'native_layer_norm': 3,
}
_POOLING = ('mean', 'sum', '_adaptive_avg_pool2d', 'avg_pool2d', 'max_pool2d_with_indices')


class _Counting(TorchDispatchMode):
    """Adds up the work of each operator that runs; `pause` leaves a stretch out."""

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.pause = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.pause:
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func, args, kwargs, out):
        packet = func._overloadpacket
        name = packet.__name__
        if packet in flop_registry:  # counts a Mult-Add as two
            kind = 'convolutions' if 'conv' in name else 'linears'
            self.found[kind] += flop_registry[packet](*args, **kwargs, out_val=out) // 2
        elif name in _PER_VALUE:
            self.found['norms (element-wise)'] += _PER_VALUE[name] * args[0].numel()
        elif name in _POOLING:
            self.found['pooling (element-wise)'] += args[0].numel()
        elif torch.Tag.pointwise in func.tags and isinstance(out, torch.Tensor):
            self.found['other element-wise'] += out.numel()


@torch.no_grad()
def mult_adds(model: nn.Module, forward) -> dict[str, int]:
    """Mult-Adds of ``forward()``, which runs ``model``, at inference, by kind of operator.

    A DN layer is counted as its fused form computes it: SC's two linears, and per
    value the moments (2, DN-B) and the affine (1). BatchNorm is counted unfolded.

    Returns:
        counts by ``'convolutions', 'linears', 'SC'`` and the kinds in `ELEMENT_WISE`.
    """
    counting = _Counting()

    def enter(layer, inputs):
        counting.pause = True

    def leave(layer, inputs, output):
        x = inputs[0]
        rows = 1 if layer.batch_shared else len(x)
        counting.found['SC'] += rows * sum(
            weight.numel() for name, weight in layer.sc.named_parameters() if name[0] == 'w'
        )
        counting.found['norms (element-wise)'] += (1 if layer.batch_shared else 3) * x.numel()
        counting.pause = False

    layers = set(dn_layers(model).values())
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    training = model.training
    model.eval()
    try:
        with counting:
            forward()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return dict(counting.found)


def first_image(model: BaseModel, loader) -> tuple:
    """Arguments of a model's forward, of the first image that a data loader has."""
    data = model.data_preprocessor(loader.collate_fn([loader.dataset[0]]), False)
    inputs = data['inputs']
    inputs = torch.stack(list(inputs)) if isinstance(inputs, (list, tuple)) else inputs
    return inputs, data['data_samples']


def peak_memory() -> dict:
    """Peak memory so far in MB: of torch on a GPU, otherwise of this process."""
    if torch.cuda.is_available():
        return dict(kind='GPU', megabytes=torch.cuda.max_memory_allocated() / 2**20)
    unit = 1 if sys.platform == 'darwin' else 1024  # ru_maxrss in bytes, or in KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return dict(kind='process', megabytes=peak / 2**20)
