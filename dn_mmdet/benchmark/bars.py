"""What DN-B has to reach, and should: ratios to BatchNorm, and how a run stands to them."""

from typing import NamedTuple

from .rows import matching
from .variants import Variant

# On a CPU. (part, task, measure): must and aim, as ratios to BatchNorm, except copy bandwidth.
CPU_BARS = {
    ('layers', 'train', 'time'): (1.15, 0.95),
    ('layers', 'train', 'bytes saved'): (1.03, 1.0),
    ('layers', 'train', 'peak memory'): (1.03, 1.0),
    ('layers', 'train', 'copy bandwidth'): (0.75, 0.9),
    ('layers', 'train', 'reference / fused'): (2.0, 3.0),
    ('detector', 'train', 'time'): (1.10, 1.03),
    ('detector', 'train', 'peak memory'): (1.03, 1.0),
    ('detector', 'inference', 'time'): (1.18, 1.05),
}

MEASURED = Variant('DNB', 'auto')
LAYOUTS = 'contiguous', 'channels_last'


class Bar(NamedTuple):
    """A ratio to BatchNorm on a GPU, for each memory format: what must be, what should be."""

    what: str
    part: str
    task: str
    measure: str
    must: tuple[float, float]
    aim: tuple[float, float]


# On a GPU: 76 layers of SSDLite at batch 24, float16 under autocast.
GPU_BATCH, GPU_DTYPE = 24, 'float16'
GPU_BARS = (
    Bar('training, eager', 'layers', 'train', 'sum of times', (0.85, 1.05), (0.65, 0.90)),
    Bar(
        'training, eager, all layers in one step',
        'step',
        'train',
        'time',
        (0.85, 1.05),
        (0.65, 0.90),
    ),
    Bar(
        'training, GPU time alone',
        'layers',
        'train',
        'sum of GPU times',
        (0.50, 1.20),
        (0.40, 1.00),
    ),
    Bar(
        'inference without gradient, eager',
        'layers',
        'inference',
        'sum of times',
        (0.8, 0.8),
        (0.6, 0.6),
    ),
    Bar(
        'training step of SSDLite, eager', 'detector', 'train', 'time', (1.03, 1.03), (1.00, 1.00)
    ),
    Bar(
        'peak memory, all layers in one step',
        'step',
        'train',
        'peak memory',
        (1.03, 1.03),
        (1.00, 1.00),
    ),
    Bar(
        'peak memory, training step of SSDLite',
        'detector',
        'train',
        'peak memory',
        (1.03, 1.03),
        (1.00, 1.00),
    ),
    Bar('host time of a forward', 'host', 'train', 'forward', (0.7, 0.7), (0.5, 0.5)),
    Bar('host time of a backward()', 'host', 'train', 'backward', (1.2, 1.2), (1.0, 1.0)),
)


def measured_at(rows, bar: Bar, layout: str) -> dict | None:
    """The row that a bar is held against, or None where it was not measured."""
    wanted: dict[str, str | int] = dict(
        part=bar.part,
        task=bar.task,
        measure=bar.measure,
        unit='of BN',
        memory_format=layout,
        dtype=GPU_DTYPE,
        norm=MEASURED.norm,
        backend=MEASURED.backend,
    )
    if bar.part != 'host':  # whose map is small whatever the batch
        wanted['batch'] = GPU_BATCH
    found = matching(rows, **wanted)
    return found[-1] if found else None


def verdict(ratio: float, must: float, aim: float) -> str:
    return 'aim' if ratio <= aim else 'must' if ratio <= must else 'MISSED'


def bars_table(rows, layers: int = 76) -> str:
    """A GPU's rows against the bars, as text.

    Args:
        layers: of the detector; a sum over fewer is marked.
    """
    first = rows[0] if rows else {}
    lines = [
        f'{first.get("device", "no rows")}; torch {first.get("torch")}, triton '
        f'{first.get("triton")}; commit {first.get("commit")}',
        f'{MEASURED.label} over BatchNorm, batch {GPU_BATCH}, {GPU_DTYPE}',
        f'{"":41}{"layout":15}{"median":>6}  {"10 % - 90 %":15}{"must":>5}{"aim":>6}',
    ]
    for bar in GPU_BARS:
        for layout, must, aim in zip(LAYOUTS, bar.must, bar.aim, strict=True):
            row = measured_at(rows, bar, layout)
            line = f'{bar.what:41}{layout:15}'
            if row is None:
                lines.append(f'{line}{"-":>6}  {"":15}{must:5.2f}{aim:6.2f}  not measured')
                continue
            cut = bar.part == 'layers' and row['layers'] != layers
            lines.append(
                f'{line}{row["median"]:6.3f}  {row["q10"]:6.3f} - {row["q90"]:6.3f}'
                f'{must:5.2f}{aim:6.2f}  {verdict(row["median"], must, aim)}'
                + (f' ({row["layers"]} of {layers} layers)' if cut else '')
            )
    return '\n'.join(lines)
