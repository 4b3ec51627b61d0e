"""The tables of speed on a GPU in docs/speed.md and docs/gpu.md, made of files in docs/results.

    python tests/speed.py    # writes them again

A page says where: ``<!-- speed on a GPU, written by tests/speed.py -->`` to ``<!-- end -->``, and
in docs/gpu.md ``<!-- tile sizes, train, channels_last -->``, ``<!-- torch.compile -->``.
Without the file a table says that nothing was measured.
"""

import re
from pathlib import Path
from typing import NamedTuple

from dn_mmdet import benchmark
from dn_mmdet.benchmark import bars

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'speed.md'
ROWS = ROOT / 'docs' / 'results' / 'benchmark_gpu.csv'
TUNING_PAGE = ROOT / 'docs' / 'gpu.md'
TUNING_ROWS = ROOT / 'docs' / 'results' / 'tuning_gpu.csv'
TUNING = re.compile(r'(?s)(<!-- tile sizes, (\w+), (\w+) -->\n).*?(?=<!-- end -->)')
COMPILED = re.compile(r'(?s)(<!-- torch.compile -->\n).*?(?=<!-- end -->)')
BEGIN, END = '<!-- speed on a GPU, written by tests/speed.py -->', '<!-- end -->'


class Line(NamedTuple):
    """What a line of the table shows: a measure of the benchmark, eager or on the GPU alone."""

    label: str
    part: str
    task: str
    eager: str
    alone: str | None = None
    batch: int = bars.GPU_BATCH
    dtype: str = bars.GPU_DTYPE
    unit: str = 'of BN'


LINES = (
    Line(
        'the 76 layers together, forward + backward',
        'layers',
        'train',
        'sum of times',
        'sum of GPU times',
    ),
    Line('the same, batch 192', 'layers', 'train', 'sum of times', 'sum of GPU times', batch=192),
    Line(
        'the same, batch 24, float32',
        'layers',
        'train',
        'sum of times',
        'sum of GPU times',
        dtype='float32',
    ),
    Line(
        'a layer, forward + backward (geometric mean of the 76)',
        'layers',
        'train',
        'time',
        'GPU time',
    ),
    Line(
        'the 76 layers together, inference',
        'layers',
        'inference',
        'sum of times',
        'sum of GPU times',
    ),
    Line(
        'a layer, inference (geometric mean of the 76)', 'layers', 'inference', 'time', 'GPU time'
    ),
    Line('SSDLite, training step', 'detector', 'train', 'time'),
    Line('SSDLite, inference', 'detector', 'inference', 'time', 'GPU time'),
    Line(
        'SSDLite, inference, against BN folded into the convolutions',
        'detector',
        'inference',
        'time',
        unit='of BN folded',
    ),
    Line('SSDLite, peak memory of a training step', 'detector', 'train', 'peak memory'),
    Line('host time of a forward', 'host', 'train', 'forward', batch=2),
    Line('host time of `backward()`', 'host', 'train', 'backward', batch=2),
)
MISSING = 'not measured'


def table(rows) -> str:
    """DN-B over BatchNorm: eager and on the GPU alone, for each memory format."""
    lines = ['| | contiguous | GPU alone | channels_last | GPU alone |', '|---|--:|--:|--:|--:|']
    for line in LINES:
        cells = []
        for layout in bars.LAYOUTS:
            for measure in (line.eager, line.alone):
                cells.append('' if measure is None else _cell(rows, line, layout, measure))
        lines.append(f'| {line.label} | {" | ".join(cells)} |')
    return f'{_source(rows)}\n\n' + '\n'.join(lines)


def _cell(rows, line, layout, measure):
    wanted = dict(
        part=line.part,
        task=line.task,
        measure=measure,
        batch=line.batch,
        dtype=line.dtype,
        memory_format=layout,
        unit=line.unit,
        norm=bars.MEASURED.norm,
        backend=bars.MEASURED.backend,
    )
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return f'{found[-1]["median"]:.2f}' if found else MISSING


def _source(rows):
    if not rows:
        return 'On a GPU: not measured. `tools/gpu_check.sh` does it in one call.'
    sources = {tuple(row[key] for key in ('device', 'commit', 'torch', 'triton')) for row in rows}
    if len(sources) > 1:
        raise ValueError(
            f'{ROWS.name}: expected rows of one device, commit, torch and triton, '
            f'got {sorted(sources)}; keep one run'
        )
    device, commit, torch, triton = sources.pop()
    date = min(row['date'] for row in rows)[:10]
    return (
        f'On a GPU: {device}, commit `{commit}`, torch {torch}, triton {triton}, {date}. Time '
        f'of DN-B as a\nratio to `nn.BatchNorm2d` in the same run, batch {bars.GPU_BATCH}, '
        f'{bars.GPU_DTYPE} unless a row says otherwise; "GPU\nalone" is the replay of a '
        f'CUDA graph, which leaves the host out. `tools/gpu_check.sh` measures it.'
    )


def read(path=ROWS) -> list[dict]:
    return benchmark.read_rows(path) if path.exists() else []


def with_table(page: str, rows) -> str:
    """A page with the table written again between its two marks."""
    before, after = re.split(f'(?s){re.escape(BEGIN)}.*?{END}', page)
    return f'{before}{BEGIN}\n{table(rows)}\n{END}{after}'


def with_tuning_tables(page: str, rows) -> str:
    """A page with each table of tile sizes written again, in the row before it its source."""

    def written(match):
        begin, task, layout = match.groups()
        chosen = [row for row in rows if row['memory_format'] == layout]
        text = MISSING
        if chosen:
            first = chosen[0]
            text = (
                f'{first["device"]}, commit `{first["commit"]}`, {layout}, {first["dtype"]}, '
                f'batch {first["batch"]}:\n\n{benchmark.tuning_table(chosen, task)}'
            )
        return f'{begin}{text}\n'

    return TUNING.sub(written, page)


def with_compiled_table(page: str, rows) -> str:
    """A page with the table of compiled models written again."""
    chosen = [row for row in rows if row['part'] == 'compiled']
    text = MISSING
    if chosen:
        text = (
            f'{chosen[0]["device"]}, commit `{chosen[0]["commit"]}`:\n\n'
            f'{benchmark.compiled_table(chosen)}'
        )
    return COMPILED.sub(lambda match: f'{match[1]}{text}\n', page)


if __name__ == '__main__':
    TUNING_PAGE.write_text(
        with_compiled_table(with_tuning_tables(TUNING_PAGE.read_text(), read(TUNING_ROWS)), read())
    )
    PAGE.write_text(with_table(PAGE.read_text(), read()))
