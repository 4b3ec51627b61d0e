"""Rows as a table and as pictures."""

from .bars import CPU_BARS, LAYOUTS
from .rows import matching
from .variants import Variant


def table(rows, device: str = 'cpu') -> str:
    """The rows over all layers and of the detector, as text; a CPU's beside what is asked for.

    `bars_table` holds a GPU's against what is asked for there.
    """
    shown = [row for row in rows if row['part'] != 'layer' and row['unit'] not in ('s', 'bytes')]
    first = rows[0]
    bars = CPU_BARS if device == 'cpu' else {}
    lines = [
        f'{first["device"]}, {first["threads"]} threads; torch {first["torch"]}, triton '
        f'{first["triton"]}; commit {first["commit"]}; {first["dtype"]}, '
        f'{first["memory_format"]}',
        f'{"":63} median   10 % - 90 %    must   aim',
    ]
    for row in shown:
        name = ' '.join(filter(None, (row['norm'], row['backend'])))
        label = f'{row["part"]}, {_task(row)}, batch {row["batch"]}, {row["measure"]}'
        if row['unit'] not in ('of BN', 'share', 'times'):
            label += f', {row["unit"]}'
        must, aim = _cpu_bar(row, bars)
        lines.append(
            f'{label:48} {name:14} {row["median"]:6.3f}  {row["q10"]:6.3f} - '
            f'{row["q90"]:6.3f}  {must:>5}  {aim:>4}'
        )
    return '\n'.join(lines)


def _task(row):
    if row['task'] != 'train':
        return row['task']
    return 'forward + backward' if row['part'] == 'layers' else 'train step'


def _cpu_bar(row, bars):
    """What DN-B's fused backends have to reach, and should."""
    key = row['part'], row['task'], row['measure']
    if (
        row['norm'] != 'DNB'
        or not Variant(row['norm'], row['backend']).fused
        or row['unit'] == 'of BN folded'
    ):
        return '', ''
    return bars.get(key, ('', ''))


def plot(rows, path) -> None:
    """Draws each layer's ratio over the size of its map, in training and inference."""
    first = rows[0]
    panels = [
        (
            'forward + backward' if task == 'train' else 'inference',
            matching(rows, task=task, measure='time'),
        )
        for task in ('train', 'inference')
    ]
    _draw(panels, path, f'{first["device"]}, {first["dtype"]}, {first["memory_format"]}')


def plot_gpu(rows, path, batch: int, dtype: str) -> None:
    """Draws each layer's training ratio: each memory format, eager and on the GPU alone."""
    panels = []
    for layout in LAYOUTS:
        for measure, name in (('time', 'eager'), ('GPU time', 'GPU time alone')):
            shown = matching(
                rows,
                task='train',
                measure=measure,
                memory_format=layout,
                batch=batch,
                dtype=dtype,
            )
            panels.append((f'{layout}, {name}', shown))
    device = rows[0]['device'] if rows else 'no rows'
    _draw(panels, path, f'forward + backward on {device}, batch {batch}, {dtype}')


def _draw(panels, path, title):
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1 + 4.5 * len(panels), 4.5), sharey=True, layout='constrained'
    )
    for axis, (name, rows) in zip(axes, panels, strict=True):
        found = {}
        for row in matching(rows, part='layer', unit='of BN'):
            label = Variant(row['norm'], row['backend']).label
            size = row['batch'] * row['channels'] * row['map'] ** 2
            found.setdefault(label, []).append((size, row['median']))
        for label, points in found.items():
            axis.plot(*zip(*sorted(points), strict=True), '.-', label=label, linewidth=0.8)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set(xscale='log', yscale='log', xlabel='values in the feature map', title=name)
    axes[0].set_ylabel('time relative to BatchNorm')
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc='outside right upper', fontsize='small')
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
