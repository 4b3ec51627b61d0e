"""Tile sizes of the GPU kernels against each other: GPU time of one layer, all else the same.

What docs/gpu.md says of the defaults in `kernels.plans.Tuning` comes from here.
"""

import concurrent.futures
import copy
import multiprocessing
import os
from typing import Any

import torch

from . import parity
from .layers import layer_call, layer_data
from .rows import make_row
from .timing import gpu_alone
from .variants import Setting, Variant, make_layer

LAYER = Variant('DNB', 'auto')
# Names are those of the table; each is a change of the defaults.
TRAINING: dict[str, dict] = {
    'default': {},
    'tiles of 256 channels and 8 warps in sums, float32 products': dict(
        sum_rows=256, sum_warps=8, forward_precision='ieee'
    ),
    'tiles of 32 channels in sums': dict(sum_rows=32),
    'tiles of 128 channels in sums': dict(sum_rows=128),
    '8 warps in sums': dict(sum_warps=8),
    '2 warps in sums': dict(sum_warps=2),
    'products forward in float32': dict(forward_precision='ieee'),
    'products backward by tensor cores too': dict(backward_precision='tf32x3'),
}
EVERY_SIZE = 1 << 30
INFERENCE: dict[str, dict] = {
    'default': {},
    'four launches': dict(sample_size=0),
    **{
        f'{rows} channels, {hidden} hidden units, {warps} warps': dict(
            sample_size=EVERY_SIZE, sample_rows=rows, sample_hidden=hidden, sample_warps=warps
        )
        for rows, hidden, warps in (
            (64, 32, 4),
            (32, 32, 4),
            (64, 16, 4),
            (32, 16, 4),
            (64, 32, 8),
            (32, 32, 8),
            (16, 32, 4),
        )
    },
}
TUNINGS: dict[str, dict[str, dict]] = dict(train=TRAINING, inference=INFERENCE)
SHAPES = dict(
    train=((256, 3), (384, 20), (1280, 10), (96, 160)),
    inference=(
        (256, 3),
        (512, 5),
        (160, 10),
        (1280, 10),
        (96, 20),
        (384, 20),
        (576, 20),
        (32, 40),
        (192, 40),
    ),
)


def measure_tunings(setting: Setting, batch: int, shapes=None) -> list[dict]:
    """Rows of the GPU time of a training step and of inference, for each choice.

    Args:
        shapes: {task: (channels, height) of square maps}; default: those of docs/gpu.md.

    Raises:
        RuntimeError: the kernels are not launched by the compiled host here.
        ParityError: a layer's output is not the reference's.
    """
    from ..kernels.choice import gpu_host

    host = gpu_host()
    if setting.device != 'cuda' or host is None:
        raise RuntimeError(
            'tile sizes are compared on a GPU, with the compiled host: install '
            'this package where g++ and Triton are'
        )
    from ..kernels.plans import Tuning

    rows = []
    for task, tunings in TUNINGS.items():
        choices = {name: Tuning(**changes) for name, changes in tunings.items()}
        for channels, height in (shapes or SHAPES)[task]:
            x, dy = layer_data(setting, batch, channels, height)
            layer = make_layer(LAYER, channels).to(setting.device).train(task == 'train')
            wanted = _exactly(layer, x)
            for name, choice in choices.items():
                with host.tuned(choice):
                    _check(name, copy.deepcopy(layer), setting, x, wanted)
                    rows.append(_row(name, setting, layer, x, dy, task, batch))
    return rows


@torch.no_grad()
def _exactly(layer, x):
    exact = copy.deepcopy(layer).double()
    exact.backend = 'reference'
    return exact(x.double())


def _check(name, layer, setting, x, wanted):
    with torch.no_grad(), setting.autocast():
        parity.check(
            'output',
            layer(x),
            wanted,
            parity.LAYER_TOLERANCE[setting.dtype],
            f'{name} on {tuple(x.shape)}, {setting}',
        )


def _row(name, setting, layer, x, dy, task, batch):
    call = layer_call(setting, layer, x, dy, task)
    with torch.set_grad_enabled(task == 'train'), setting.autocast():
        found = gpu_alone({LAYER: call}, setting)[LAYER]
    at = dict(
        part='tuning',
        task=task,
        batch=batch,
        channels=x.shape[1],
        map=x.shape[2],
        layers=1,
        variant=LAYER,
    )
    return make_row(at, f'GPU time, {name}', 's', found)


def compile_tunings(
    setting: Setting, batch: int, capability: int, shapes=None, processes: int | None = None
) -> int:
    """Compiles the kernels of all choices in parallel, into Triton's cache; says how many.

    Args:
        capability: of the GPU, which need not be here (90: sm_90).
    """
    wanted = sorted(signatures(setting, batch, shapes), key=str)
    workers = concurrent.futures.ProcessPoolExecutor(
        processes or os.cpu_count(), multiprocessing.get_context('spawn')
    )
    with workers:
        for _ in workers.map(_compile, wanted, [capability] * len(wanted), chunksize=2):
            pass
    return len(wanted)


def _compile(signature, capability):
    from ..kernels import host

    host.compile_kernel(signature, capability)


def signatures(setting: Setting, batch: int, shapes=None) -> set:
    """Of all kernels that `measure_tunings` runs."""
    from ..kernels import host, plans

    layer_dtypes = dict.fromkeys((*plans.PARAMETERS, 'running_mean', 'running_var'), torch.float32)
    found = set()
    for task, tunings in TUNINGS.items():
        for channels, height in (shapes or SHAPES)[task]:
            shape = plans.Shape(batch, channels, height**2, setting.channels_last, setting.dtype)
            training = task == 'train'
            for changes in tunings.values():
                layer: Any = make_layer(LAYER, channels)
                hidden = layer.sc.b_in.numel()
                options = plans.Options(
                    hidden=hidden,
                    batch=training,
                    update=training,
                    cumulative=False,
                    shared=False,
                    standardized=False,
                    bounded=True,
                    inference=not training,
                )
                plan = plans.Plan(
                    shape,
                    options,
                    dict(layer_dtypes, tracked=torch.int64),
                    plans.Tuning(**changes),
                )
                found |= {host.Signature.of(plan, launch) for launch in plan.launches()}
    return found


def tuning_table(rows, task: str) -> str:
    """Microseconds of the GPU, as Markdown: a line for each choice, a column for each map."""
    found = {}
    for row in rows:
        if row['part'] == 'tuning' and row['task'] == task:
            line = found.setdefault(row['measure'].removeprefix('GPU time, '), {})
            line[f'{row["channels"]} @ {row["map"]} x {row["map"]}'] = row['median']
    columns = list(dict.fromkeys(name for line in found.values() for name in line))
    lines = [f'| | {" | ".join(columns)} |', f'|---|{"--:|" * len(columns)}']
    for name, line in found.items():
        cells = (f'{1e6 * line[column]:.1f}' if column in line else '' for column in columns)
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(lines)
