"""The figures of a comparison: what they show, as PNG and as interactive HTML."""

import itertools
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from .results import SETTING, grouped, interval, key_of

TRAINING_ACCURACY = 'accuracy_top-1'  # of mmpretrain's heads with cal_acc=True
POINTS = 60  # of a curve: a batch's loss is mostly noise
CLASS_AP = '_precision'  # how mmdet's CocoMetric ends the name of a class's AP
COLOURS = (
    '#1f77b4',
    '#ff7f0e',
    '#2ca02c',
    '#d62728',
    '#9467bd',
    '#8c564b',
    '#e377c2',
    '#7f7f7f',
    '#bcbd22',
    '#17becf',
)


class Line(NamedTuple):
    """A series of a figure; low and high are a band around y, or None."""

    name: str
    x: list
    y: list
    low: list
    high: list
    bars: bool = False


class Panel(NamedTuple):
    title: str
    x: str
    y: str
    lines: list
    log_x: bool = False
    log_y: bool = False


def figures(runs, baseline) -> dict[str, tuple[str, list[Panel]]]:
    """{file stem: (title, panels)} of the figures that these runs have the data for."""
    runs = sorted(runs, key=lambda run: run.row['config'] != baseline)  # it comes first
    found = dict(
        learning_curves=('Learning curves, mean over seeds and its 95 % interval', _curves(runs)),
        metric_vs_lr=(
            'Metric against learning rate; diverged runs are left out',
            _against(runs, 'lr', lambda row: (row['data'], row['epochs'], row['batch'])),
        ),
        metric_vs_batch=(
            'Metric against batch size, learning rate in proportion; diverged runs are left out',
            _against(
                runs,
                'batch',
                lambda row: (row['data'], row['epochs'], float(f'{row["lr"] / row["batch"]:.4g}')),
            ),
        ),
        per_class=(
            f'AP of each class minus that of {baseline}, mean over paired seeds',
            _per_class(runs, baseline),
        ),
        scale_shift=(
            'Scale gamma and shift beta by layer: median, quartiles and 5 to 95 %',
            _scale_shift(runs),
        ),
    )
    return {name: (title, panels) for name, (title, panels) in found.items() if panels}


def _curves(runs):
    panels = []
    for setting, group in grouped(runs, lambda run: key_of(run.row, SETTING)).items():
        named = dict(zip(SETTING, setting, strict=True))
        title = f'{named["data"]}, lr {named["lr"]:g}, batch {named["batch"]}'
        metric = next((run.row['metric'] for run in group if run.row['metric']), None)
        for label, pick in (
            ('training loss', lambda line: line.get('loss')),
            ('training top-1', lambda line: line.get(TRAINING_ACCURACY)),
            (metric, lambda line, m=metric: line.get('metrics', {}).get(m)),
        ):
            lines = [
                _band(name, [_curve(run, pick) for run in members])
                for name, members in grouped(group, lambda run: run.row['config']).items()
            ]
            lines = [line for line in lines if line.x]
            if lines:
                log_y = label == 'training loss'
                panels.append(Panel(title, 'epoch', label, lines, log_y=log_y))
    return panels


def _curve(run, pick):
    """(epoch, value) of the lines of a run's log that have what ``pick`` takes of them."""
    values = [(line['epoch'], pick(line)) for line in run.lines]
    return _thinned([(epoch, value) for epoch, value in values if value is not None])


def _thinned(points):
    """At most `POINTS`, each the mean of as many that follow each other, at the last one's x."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _band(name, curves):
    """Mean and interval where several curves have the same x."""
    at = defaultdict(list)
    for x, y in itertools.chain(*curves):
        at[round(x, 6)].append(y)
    xs = sorted(at)
    return _line(name, xs, [interval(at[x]) for x in xs])


def _line(name, xs, intervals, bars=False):
    return Line(
        name,
        xs,
        [each.mean for each in intervals],
        [each.low for each in intervals],
        [each.high for each in intervals],
        bars,
    )


def _against(runs, axis, group_by):
    panels = []
    finished = [run for run in runs if run.row['value'] is not None]
    for group, members in grouped(finished, lambda run: group_by(run.row)).items():
        if len({run.row[axis] for run in members}) < 2:
            continue
        what = f'batch {group[2]}' if axis == 'lr' else f'lr {group[2]:g} per image'
        lines = [
            _band(name, [[(run.row[axis], run.row['value'])] for run in own])
            for name, own in grouped(members, lambda run: run.row['config']).items()
        ]
        panels.append(
            Panel(
                f'{group[0]}, {group[1]} epochs, {what}',
                axis,
                members[0].row['metric'],
                [line._replace(bars=True) for line in lines],
                log_x=True,
            )
        )
    return panels


def _per_class(runs, baseline):
    """AP by class, in the first setting in which the baseline and another config have it."""
    for group in grouped(runs, lambda run: key_of(run.row, SETTING)).values():
        by_config = {
            name: {run.row['seed']: _class_ap(run) for run in members if _class_ap(run)}
            for name, members in grouped(group, lambda r: r.row['config']).items()
        }
        reference = by_config.get(baseline, {})
        lines = []
        for name, by_seed in by_config.items():
            seeds = sorted(by_seed.keys() & reference.keys())
            if name == baseline or not seeds:
                continue
            classes = sorted(by_seed[seeds[0]])
            differences = [
                interval([by_seed[seed][c] - reference[seed][c] for seed in seeds])
                for c in classes
            ]
            lines.append(_line(name, classes, differences, bars=True))
        if lines:
            return [Panel(group[0].row['data'], 'class', 'difference in AP', lines)]
    return []


def _class_ap(run):
    found = {
        key.split('/')[-1].removesuffix(CLASS_AP): value
        for key, value in run.result.get('metrics', {}).items()
        if key.endswith(CLASS_AP)
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _scale_shift(runs):
    """Of the first finished run of each config."""
    panels = []
    for name, members in grouped(runs, lambda run: run.row['config']).items():
        of_runs = [run.result.get('scale_and_shift') for run in members]
        layers = next(filter(None, of_runs), None)
        for key in ('gamma', 'beta') if layers else ():
            q05, q25, q50, q75, q95 = zip(*(layer[key] for layer in layers), strict=True)
            x = list(range(len(layers)))
            panels.append(
                Panel(
                    name,
                    'norm layer',
                    key,
                    [
                        Line('5 to 95 %', x, list(q50), list(q05), list(q95)),
                        Line('quartiles', x, list(q50), list(q25), list(q75)),
                    ],
                )
            )
    return panels


def _layout(panels):
    """Rows and columns: two panels in a row."""
    return math.ceil(len(panels) / 2), min(2, len(panels))


def _colour_of(line, colours):
    """A line has the same colour in all panels of a figure; ``colours`` remembers it."""
    return colours.setdefault(line.name, COLOURS[len(colours) % len(COLOURS)])


def draw(drawn, out):
    """The figures as PNG files, two panels in a row."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    for name, (title, panels) in drawn.items():
        rows, columns = _layout(panels)
        width = 6.0
        if name == 'per_class':
            classes = max(len(line.x) for panel in panels for line in panel.lines)
            width = max(width, classes / 5)
        figure, axes = plt.subplots(
            rows,
            columns,
            squeeze=False,
            figsize=(width * columns, 4 * rows),
            layout='constrained',
        )
        for cell in axes.flat[len(panels) :]:
            cell.set_visible(False)
        colours = {}
        for cell, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(cell, panel, colours)
        figure.suptitle(title)
        figure.savefig(out / f'{name}.png', dpi=110)
        plt.close(figure)


def _draw_panel(axes, panel, colours):
    for line in panel.lines:
        colour = _colour_of(line, colours)
        banded = [i for i, low in enumerate(line.low) if low is not None]
        low, high, middle = ([side[i] for i in banded] for side in (line.low, line.high, line.y))
        if line.bars:
            axes.plot(line.x, line.y, 'o-' if panel.log_x else 'o', label=line.name, color=colour)
            axes.errorbar(
                [line.x[i] for i in banded],
                middle,
                fmt='none',
                capsize=3,
                yerr=[np.subtract(middle, low), np.subtract(high, middle)],
                color=colour,
            )
        else:
            axes.plot(
                line.x, line.y, 'o' if len(line.x) == 1 else '-', label=line.name, color=colour
            )
            axes.fill_between([line.x[i] for i in banded], low, high, alpha=0.2, color=colour)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if panel.log_x:  # setting a linear scale would put numbers in the place of names
        axes.set_xscale('log')
        _label(axes.xaxis, FixedLocator(sorted({x for line in panel.lines for x in line.x})))
    if panel.log_y:
        axes.set_yscale('log')
        _label(axes.yaxis, LogLocator(subs=(1, 2, 3, 5)))
    if isinstance(panel.lines[0].x[0], str):
        axes.tick_params(axis='x', rotation=90)
        axes.axhline(0, color='grey', lw=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _label(axis, locator):
    """Ticks of a logarithmic axis, as 0.2 and not as 2 x 10^-1."""
    axis.set_major_locator(locator)
    axis.set_major_formatter('{x:g}')
    axis.set_minor_locator(NullLocator())


def interactive(drawn) -> list[str] | None:
    """The figures as pieces of HTML, the first with plotly itself; None without plotly."""
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError:
        return None
    pieces = []
    for title, panels in drawn.values():
        rows, columns = _layout(panels)
        figure = make_subplots(rows, columns, subplot_titles=[panel.title for panel in panels])
        colours = {}
        for index, panel in enumerate(panels):
            place = dict(row=index // columns + 1, col=index % columns + 1)
            for trace in _traces_of(go, panel, colours):
                figure.add_trace(trace, **place)
            figure.update_xaxes(title_text=panel.x, type='log' if panel.log_x else None, **place)
            figure.update_yaxes(title_text=panel.y, type='log' if panel.log_y else None, **place)
        figure.update_layout(title_text=title, template='plotly_white', height=120 + 380 * rows)
        pieces.append(
            figure.to_html(full_html=False, include_plotlyjs=False if pieces else 'inline')
        )
    return pieces


def _traces_of(go, panel, colours):
    """Of each line; the legend has its name once, in the first panel that it is in."""
    for line in panel.lines:
        shown = line.name not in colours
        yield from _traces(go, line, panel, _colour_of(line, colours), shown)


def _traces(go, line, panel, colour, shown):
    """A band and a line, or points with error bars."""
    group = dict(legendgroup=line.name, line_color=colour)
    if line.bars:
        half = [
            None if low is None else high - y
            for y, low, high in zip(line.y, line.low, line.high, strict=True)
        ]
        yield go.Scatter(
            x=line.x,
            y=line.y,
            name=line.name,
            showlegend=shown,
            mode='lines+markers' if panel.log_x else 'markers',
            error_y=dict(type='data', array=half),
            **group,
        )
        return
    banded = [i for i, low in enumerate(line.low) if low is not None]
    x = [line.x[i] for i in banded]
    if x:
        yield go.Scatter(
            x=x + x[::-1],
            y=[line.high[i] for i in banded] + [line.low[i] for i in banded][::-1],
            fill='toself',
            opacity=0.2,
            fillcolor=colour,
            mode='none',
            hoverinfo='skip',
            showlegend=False,
            legendgroup=line.name,
        )
    yield go.Scatter(
        x=line.x,
        y=line.y,
        name=line.name,
        showlegend=shown,
        mode='markers' if len(line.x) == 1 else 'lines',
        **group,
    )
