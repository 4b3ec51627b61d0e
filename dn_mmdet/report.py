"""Tables and figures from the folders that tools/compare.py trains in.

Folders and files are read as they are, so they may come from another machine.
"""
import csv
import html
import io
import itertools
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from .compare import read_result
from .cost import ELEMENT_WISE
from .preflight import ConfigError
from .recording import read_log

COLUMNS = ('question', 'data', 'config', 'norm', 'seed', 'metric', 'value', 'epochs', 'lr',
           'batch', 'params', 'seconds', 'hardware', 'commit', 'status')
SETTING = ('question', 'data', 'epochs', 'lr', 'batch')  # what runs that are compared share
KEY = (*SETTING, 'config', 'seed')
METRICS = ('coco/bbox_mAP', 'accuracy/top1')
CLASS_AP = '_precision'  # how mmdet's CocoMetric ends the name of a class's AP
NUMBERS = dict(seed=int, value=float, epochs=int, lr=float, batch=int, params=int, seconds=float)
LEVEL = 0.95


class Recorded(NamedTuple):
    """A run as it was found; one from a CSV file has a row alone."""
    row: dict
    folder: Path | None = None
    result: dict = {}
    lines: list = []


class Interval(NamedTuple):
    """Mean of n values and its 95 % confidence interval (Student's t), None for n = 1."""
    n: int
    mean: float | None
    low: float | None
    high: float | None


class Written(NamedTuple):
    rows: list
    text: str


def interval(values) -> Interval:
    """Of independent values, one per seed.

    Example:
        >>> interval([1., 2., 3.])  # doctest: +ELLIPSIS
        Interval(n=3, mean=2.0, low=-0.484..., high=4.484...)
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(len(values), float(values[0]) if len(values) else None, None, None)
    mean, error = values.mean(), stats.sem(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error)
    return Interval(len(values), float(mean), float(mean - half), float(mean + half))


def paired(values: dict, baseline: dict) -> tuple[Interval, float | None]:
    """The difference to the baseline per seed, and the p-value of a paired t-test.

    Args:
        values, baseline: {seed: value}; seeds that only one of them has are left out.

    Returns:
        p is None for fewer than two pairs and where all differences are the same.
    """
    seeds = sorted(values.keys() & baseline.keys())
    found = interval([values[seed] - baseline[seed] for seed in seeds])
    if len(seeds) < 2 or np.ptp([values[seed] - baseline[seed] for seed in seeds]) == 0:
        return found, None
    test = stats.ttest_rel([values[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    return found, float(test.pvalue)


def read(sources, metric=None) -> list[Recorded]:
    """The runs in folders, at any depth, and in CSV files of rows.

    Raises:
        ConfigError: a source is missing or holds no runs.
    """
    runs = []
    for source in map(Path, sources):
        if source.suffix == '.csv' and source.is_file():
            found = [Recorded(row) for row in read_rows(source)]
        elif source.is_dir():
            found = [_recorded(path.parent, metric) for path in sorted(source.rglob('run.json'))]
        else:
            raise ConfigError(f'{source}: expected a folder of runs or a CSV file of rows')
        if not found:
            raise ConfigError(f'{source}: holds no runs, which have a file run.json')
        runs += found
    return runs


def _recorded(folder, metric):
    spec = json.loads((folder / 'run.json').read_text())
    result = read_result(folder) or {}
    status = result.get('status') or (
        'failed' if (folder / 'failure.json').is_file() else 'unfinished')
    metrics = result.get('metrics', {})
    metric = metric or next((name for name in METRICS if name in metrics),
                            next(iter(metrics), None))
    row = dict(
        question=spec['question'], data=spec['data'], config=spec['config'],
        norm='+'.join(result.get('norms', {})), seed=spec['seed'], metric=metric,
        value=metrics.get(metric), epochs=spec['epochs'], lr=float(f'{spec["lr"]:.6g}'),
        batch=spec['batch'], params=result.get('parameters'),
        seconds=round(result['seconds'], 1) if result else None,
        hardware=result.get('environment', {}).get('hardware'), commit=spec['commit'],
        status=status)
    return Recorded(row, folder, result, read_log(folder))


def read_rows(path) -> list[dict]:
    """Rows of a CSV file with `COLUMNS`.

    Raises:
        ConfigError: it has other columns.
    """
    with open(path, newline='') as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ConfigError(f'{path}: expected the columns {", ".join(COLUMNS)}, found '
                              f'{", ".join(reader.fieldnames or ()) or "none"}')
        return [{key: None if value == '' and key != 'question' else
                 NUMBERS.get(key, str)(value) for key, value in row.items()} for row in reader]


def merge_rows(path, rows) -> None:
    """Puts rows into a CSV file: new ones at its end, known ones in place of what was there."""
    path = Path(path)
    known = {_key(row): row for row in (read_rows(path) if path.is_file() else [])}
    known.update((_key(row), row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    part.write_text(_csv(known.values(), COLUMNS), newline='')
    os.replace(part, path)


def _key(row, names=KEY):
    return tuple(row[name] for name in names)


def _csv(rows, columns):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(sources, out, metric=None, baseline=None) -> Written:
    """Reads runs and writes the report: report.md, runs.csv, table.csv, *.png, report.html.

    Args:
        sources: folders and CSV files.
        out (str | Path): folder to write to.
        metric (str): as the log names it; by default the first of `METRICS` there is.
        baseline (str): name of the config that the others are compared with; by
            default that of the first run.

    Returns:
        the rows of ended and failed runs, and the tables as text.

    Raises:
        ConfigError: see `read`; or no run is of the baseline.
    """
    out = Path(out)
    found = read(sources, metric)
    runs = list({_key(run.row): run for run in found}.values())
    names = list(dict.fromkeys(run.row['config'] for run in runs))
    baseline = baseline or _first_config(runs)
    if baseline not in names:
        raise ConfigError(f'--baseline {baseline}: expected one of {", ".join(names)}')
    table = summarise(runs, baseline)
    rows = [run.row for run in runs if run.row['status'] != 'unfinished']
    out.mkdir(parents=True, exist_ok=True)
    (out / 'runs.csv').write_text(_csv(rows, COLUMNS))
    (out / 'table.csv').write_text(_csv(table, list(table[0])))
    head, text = notes(runs), markdown(table, baseline)
    if len(found) > len(runs):
        head.append(f'{len(found) - len(runs)} runs were found twice, of which the last counts')
    drawn = figures(runs, baseline)
    _draw(drawn, out)
    images = ''.join(f'\n![{title}]({name}.png)\n' for name, (title, _) in drawn.items())
    (out / 'report.md').write_text(f'# Comparison\n\n{_list(head)}{text}{images}')
    page = _page(drawn, head, table, baseline)
    if page is None:
        text += '\nreport.html was not written: it needs plotly (pip install plotly)\n'
    else:
        (out / 'report.html').write_text(page)
    return Written(rows, _list(head) + text)


def _first_config(runs):
    """Of the run that was planned first: folders are read in the order of their names."""
    return min(runs, key=lambda run: _spec(run).get('order', 0)).row['config']


def _spec(run):
    return run.result.get('run', {}) or (
        json.loads((run.folder / 'run.json').read_text()) if run.folder else {})


def _list(head):
    return ''.join(f'- {line}\n' for line in head) + ('\n' if head else '')


def notes(runs) -> list[str]:
    """What a reader has to know before the figures: whatever differs, lacks or failed."""
    found = []
    for status in ('unfinished', 'failed', 'diverged'):
        names = [_name(run) for run in runs if run.row['status'] == status]
        if names:
            found.append(f'{len(names)} of {len(runs)} runs {status}: {_some(names)}')
    lacking = [_name(run) for run in runs
               if run.row['status'] == 'finished' and run.row['value'] is None]
    if lacking:
        found.append(f'the metric is missing from {len(lacking)} finished runs: '
                     f'{_some(lacking)}')
    metrics = {run.row['metric'] for run in runs if run.row['value'] is not None}
    if len(metrics) > 1:
        found.append(f'different metrics: {", ".join(sorted(metrics))}')
    if any(run.folder is None for run in runs):
        found.append('some rows come from a CSV file: they have no curves, no cost but the '
                     'parameters, and were not checked for data and versions')
    environments = [(run, run.result.get('environment', {})) for run in runs if run.result]
    for split in ('train', 'val'):
        for name, group in _grouped(environments, lambda pair: pair[0].row['data']).items():
            prints = {env['data'][split]['fingerprint'] for _, env in group
                      if split in env.get('data', {})}
            if len(prints) > 1:
                found.append(f'**different data** under the name {name}, {split}: '
                             f'{len(prints)} fingerprints')
    packages = sorted({name for _, env in environments for name in env.get('versions', {})})
    for name in packages:
        versions = {env['versions'].get(name, 'none') for _, env in environments
                    if 'versions' in env}
        if len(versions) > 1:
            found.append(f'**different versions** of {name}: {", ".join(sorted(versions))}')
    for name in ('hardware', 'commit'):
        values = {str(run.row[name]) for run in runs if run.row[name] is not None}
        if len(values) > 1:
            found.append(f'different {name}: {", ".join(sorted(values))}')
    for name, group in _grouped(runs, lambda run: run.row['config']).items():
        different = _spec(group[0]).get('different', [])
        if different:
            found.append(f'{name} differs in more than the norm: {"; ".join(different[:5])}'
                         + (f' and {len(different) - 5} more' if len(different) > 5 else ''))
    for name, group in _grouped(runs, lambda run: run.row['config']).items():
        reasons = {run.result.get('mult_adds_not_measured') for run in group} - {None}
        if reasons:
            found.append(f'Mult-Adds of {name} could not be counted: {min(reasons)}')
    resumed = [_name(run) for run in runs if run.result.get('starts', 1) > 1]
    if resumed:
        found.append(f'{len(resumed)} runs were interrupted and went on from a checkpoint, with '
                     f'other random augmentations than in one piece: {_some(resumed)}')
    return found


def _name(run):
    row = run.row
    return f'{row["config"]} (lr {row["lr"]:g}, batch {row["batch"]}, seed {row["seed"]})'


def _some(names):
    return '; '.join(names[:6]) + (f'; and {len(names) - 6} more' if len(names) > 6 else '')


def _grouped(items, key):
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def summarise(runs, baseline) -> list[dict]:
    """One row per setting and config: the metric over seeds, paired with the baseline, cost."""
    table = []
    for setting, group in _grouped(runs, lambda run: _key(run.row, SETTING)).items():
        configs = _grouped(group, lambda run: run.row['config'])
        reference = _values(configs.get(baseline, []))
        for name, members in sorted(configs.items(), key=lambda item: item[0] != baseline):
            values = _values(members)
            found = interval(list(values.values()))
            difference, p = (paired(values, reference) if name != baseline
                             else (Interval(0, None, None, None), None))
            table.append(dict(
                zip(SETTING, setting, strict=True), config=name,
                norm=next((run.row['norm'] for run in members if run.row['norm']), ''),
                metric=next((run.row['metric'] for run in members if run.row['metric']), ''),
                seeds=found.n, diverged=sum(run.row['status'] == 'diverged' for run in members),
                mean=found.mean, low=found.low, high=found.high, pairs=difference.n,
                difference=difference.mean, difference_low=difference.low,
                difference_high=difference.high, p=p, **_cost(members)))
    return table


def _values(runs):
    """{seed: value} of the runs that finished with one."""
    return {run.row['seed']: run.row['value'] for run in runs if run.row['value'] is not None}


def _cost(runs):
    measured = [run.result for run in runs if run.result.get('status') == 'finished']
    counts = next((result['mult_adds'] for result in measured if result['mult_adds']), None)
    parameters = [run.row['params'] for run in runs if run.row['params'] is not None]
    times = [result['iteration_seconds'] for result in measured if result['iteration_seconds']]
    memory = [result['peak_memory']['megabytes'] for result in measured]
    return dict(
        parameters=parameters[0] if parameters else None,
        mult_adds=counts and sum(n for kind, n in counts.items() if kind not in ELEMENT_WISE),
        sc_mult_adds=counts and counts.get('SC', 0),
        element_wise=counts and sum(n for kind, n in counts.items() if kind in ELEMENT_WISE),
        iteration_seconds=sum(times) / len(times) if times else None,
        peak_megabytes=max(memory) if memory else None)


def markdown(table, baseline) -> str:
    """The table of the metric and the table of cost, each setting under its own line."""
    text = ''
    for setting, rows in _grouped(table, lambda row: _key(row, SETTING)).items():
        named = dict(zip(SETTING, setting, strict=True))
        title = f'{named["question"]}: ' if named['question'] else ''
        text += (f'## {title}{named["data"]}, {named["epochs"]} epochs, lr {named["lr"]:g}, '
                 f'batch {named["batch"]}\n\n')
        text += _markdown_table(*_metric_table(rows, baseline)) + '\n'
        text += _markdown_table(*_cost_table(rows)) + '\n'
    return text


def _markdown_table(header, rows):
    lines = [header, ['---', *['--:'] * (len(header) - 1)], *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines)


def _metric_table(rows, baseline):
    metrics = ', '.join(sorted({row['metric'] for row in rows if row['metric']}))
    header = ['config', 'norm', 'seeds', 'diverged', metrics or 'metric', '95 % interval',
              f'paired difference to {baseline}', '95 % interval', 'p']
    return header, [[
        row['config'], row['norm'] or '-', row['seeds'], row['diverged'], _number(row['mean']),
        _range(row['low'], row['high']), _number(row['difference'], '+'),
        _range(row['difference_low'], row['difference_high'], '+'),
        '-' if row['p'] is None else f'{row["p"]:.3g}'] for row in rows]


def _cost_table(rows):
    header = ['config', 'parameters', 'Mult-Adds', 'of them SC', 'element-wise',
              'ms per iteration', 'peak memory MB']
    return header, [[
        row['config'], _millions(row['parameters']), _millions(row['mult_adds']),
        _millions(row['sc_mult_adds']), _millions(row['element_wise']),
        _measured(row['iteration_seconds'] and row['iteration_seconds'] * 1e3),
        _measured(row['peak_megabytes'])] for row in rows]


def _number(value, sign=''):
    return '-' if value is None else f'{value:{sign}.4g}'


def _range(low, high, sign=''):
    return '-' if low is None else f'{low:{sign}.4g} to {high:{sign}.4g}'


def _millions(value):
    return 'not measured' if value is None else f'{value / 1e6:.3f} M'


def _measured(value):
    return 'not measured' if value is None else f'{value:.1f}'


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
    found = dict(
        learning_curves=('Learning curves, mean over seeds and its 95 % interval',
                         _curves(runs)),
        metric_vs_lr=('Metric against learning rate; diverged runs are left out',
                      _against(runs, 'lr', lambda row: (row['data'], row['epochs'],
                                                        row['batch']))),
        metric_vs_batch=('Metric against batch size, learning rate in proportion; diverged '
                         'runs are left out',
                         _against(runs, 'batch', lambda row: (
                             row['data'], row['epochs'],
                             float(f'{row["lr"] / row["batch"]:.4g}')))),
        per_class=(f'AP of each class minus that of {baseline}, mean over paired seeds',
                   _per_class(runs, baseline)),
        scale_shift=('Scale gamma and shift beta by layer: median, quartiles and 5 to 95 %',
                     _scale_shift(runs)))
    return {name: (title, panels) for name, (title, panels) in found.items() if panels}


def _curves(runs):
    panels = []
    for setting, group in _grouped(runs, lambda run: _key(run.row, SETTING)).items():
        named = dict(zip(SETTING, setting, strict=True))
        title = f'{named["data"]}, lr {named["lr"]:g}, batch {named["batch"]}'
        metric = next((run.row['metric'] for run in group if run.row['metric']), None)
        configs = _grouped(group, lambda run: run.row['config'])
        for label, pick in (('training loss', lambda line: line.get('loss')),
                            (metric, lambda line, m=metric: line.get('metrics', {}).get(m))):
            lines = [_band(name, [[(line['epoch'], pick(line)) for line in run.lines
                                   if pick(line) is not None] for run in members])
                     for name, members in configs.items()]
            lines = [line for line in lines if line.x]
            if lines:
                panels.append(Panel(title, 'epoch', label, lines, False, label != metric))
    return panels


def _band(name, curves):
    """Mean and interval where several curves have the same x."""
    at = defaultdict(list)
    for x, y in itertools.chain(*curves):
        at[round(x, 6)].append(y)
    points = [(x, interval(at[x])) for x in sorted(at)]
    return Line(name, [x for x, _ in points], [i.mean for _, i in points],
                [i.low for _, i in points], [i.high for _, i in points])


def _against(runs, axis, group_by):
    panels = []
    finished = [run for run in runs if run.row['value'] is not None]
    for group, members in _grouped(finished, lambda run: group_by(run.row)).items():
        if len({run.row[axis] for run in members}) < 2:
            continue
        what = f'batch {group[2]}' if axis == 'lr' else f'lr {group[2]:g} per image'
        lines = [_band(name, [[(run.row[axis], run.row['value'])] for run in own])
                 for name, own in _grouped(members, lambda run: run.row['config']).items()]
        panels.append(Panel(f'{group[0]}, {group[1]} epochs, {what}', axis,
                            members[0].row['metric'], [line._replace(bars=True)
                                                       for line in lines], True))
    return panels


def _per_class(runs, baseline):
    """Of the first setting in which the baseline and another config have classes."""
    for group in _grouped(runs, lambda run: _key(run.row, SETTING)).values():
        by_config = {name: {run.row['seed']: _class_ap(run) for run in members if _class_ap(run)}
                     for name, members in _grouped(group, lambda r: r.row['config']).items()}
        reference = by_config.get(baseline, {})
        lines = []
        for name, by_seed in by_config.items():
            seeds = sorted(by_seed.keys() & reference.keys())
            if name == baseline or not seeds:
                continue
            classes = sorted(by_seed[seeds[0]])
            found = [interval([by_seed[seed][c] - reference[seed][c] for seed in seeds])
                     for c in classes]
            lines.append(Line(name, classes, [i.mean for i in found], [i.low for i in found],
                              [i.high for i in found], bars=True))
        if lines:
            return [Panel(group[0].row['data'], 'class', 'difference in AP', lines)]
    return []


def _class_ap(run):
    found = {key.split('/')[-1].removesuffix(CLASS_AP): value
             for key, value in run.result.get('metrics', {}).items() if key.endswith(CLASS_AP)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _scale_shift(runs):
    """Of the first finished run of each config."""
    panels = []
    for name, members in _grouped(runs, lambda run: run.row['config']).items():
        layers = next((run.result['scale_and_shift'] for run in members
                       if run.result.get('scale_and_shift')), None)
        for key in ('gamma', 'beta') if layers else ():
            q05, q25, q50, q75, q95 = zip(*(layer[key] for layer in layers), strict=True)
            x = list(range(len(layers)))
            panels.append(Panel(name, 'norm layer', key, [
                Line('5 to 95 %', x, list(q50), list(q05), list(q95)),
                Line('quartiles', x, list(q50), list(q25), list(q75))]))
    return panels


def _draw(drawn, out):
    """The figures as PNG files, two panels in a row."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    for name, (title, panels) in drawn.items():
        rows = -(-len(panels) // 2)
        width = max(6, max(len(line.x) for panel in panels for line in panel.lines) / 5
                    if name == 'per_class' else 6)
        figure, axes = plt.subplots(rows, min(2, len(panels)), squeeze=False,
                                    figsize=(width * min(2, len(panels)), 4 * rows),
                                    layout='constrained')
        for cell in axes.flat[len(panels):]:
            cell.set_visible(False)
        for cell, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(cell, panel)
        figure.suptitle(title)
        figure.savefig(out / f'{name}.png', dpi=110)
        plt.close(figure)


def _draw_panel(axes, panel):
    for line in panel.lines:
        banded = [i for i, low in enumerate(line.low) if low is not None]
        low, high, middle = ([side[i] for i in banded] for side in (line.low, line.high, line.y))
        if line.bars:
            drawn = axes.plot(line.x, line.y, 'o-' if panel.log_x else 'o', label=line.name)
            axes.errorbar([line.x[i] for i in banded], middle, fmt='none', capsize=3,
                          yerr=[np.subtract(middle, low), np.subtract(high, middle)],
                          color=drawn[0].get_color())
        else:
            drawn = axes.plot(line.x, line.y, label=line.name)
            axes.fill_between([line.x[i] for i in banded], low, high, alpha=0.2,
                              color=drawn[0].get_color())
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y,
             xscale='log' if panel.log_x else axes.get_xscale(),
             yscale='log' if panel.log_y else axes.get_yscale())
    if isinstance(panel.lines[0].x[0], str):
        axes.tick_params(axis='x', rotation=90)
        axes.axhline(0, color='grey', lw=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _page(drawn, head, table, baseline):
    """One HTML file that needs nothing from elsewhere, or None without plotly."""
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError:
        return None
    parts = [f'<ul>{"".join(f"<li>{html.escape(line)}</li>" for line in head)}</ul>']
    for setting, rows in _grouped(table, lambda row: _key(row, SETTING)).items():
        parts.append(f'<h2>{html.escape(", ".join(map(str, filter(None, setting[:3]))))} epochs, '
                     f'lr {setting[3]:g}, batch {setting[4]}</h2>')
        parts += [_html_table(*_metric_table(rows, baseline)), _html_table(*_cost_table(rows))]
    first = True
    for title, panels in drawn.values():
        figure = make_subplots(-(-len(panels) // 2), min(2, len(panels)),
                               subplot_titles=[panel.title for panel in panels])
        colours = {}
        for index, panel in enumerate(panels):
            place = dict(row=index // 2 + 1, col=index % 2 + 1)
            for line in panel.lines:
                shown = line.name not in colours
                colour = colours.setdefault(line.name, _COLOURS[len(colours) % len(_COLOURS)])
                for trace in _traces(go, line, panel, colour, shown):
                    figure.add_trace(trace, **place)
            figure.update_xaxes(title_text=panel.x, type='log' if panel.log_x else None, **place)
            figure.update_yaxes(title_text=panel.y, type='log' if panel.log_y else None, **place)
        figure.update_layout(title_text=title, template='plotly_white',
                             height=120 + 380 * -(-len(panels) // 2))
        parts.append(figure.to_html(full_html=False, include_plotlyjs='inline' if first else
                                    False))
        first = False
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison'
            '</title><style>body{font-family:sans-serif;margin:2em}td,th{padding:2px 10px;'
            'text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child'
            '{text-align:left}</style></head><body><h1>Comparison</h1>\n'
            + '\n'.join(parts) + '\n</body></html>\n')


_COLOURS = ('#1f77b4', '#ff7f0e', '#2ca02c', '#d62728', '#9467bd', '#8c564b', '#e377c2',
            '#7f7f7f', '#bcbd22', '#17becf')


def _traces(go, line, panel, colour, shown):
    """A band and a line, or points with error bars."""
    group = dict(legendgroup=line.name, line_color=colour)
    if line.bars:
        half = [None if low is None else high - y
                for y, low, high in zip(line.y, line.low, line.high, strict=True)]
        yield go.Scatter(x=line.x, y=line.y, name=line.name, showlegend=shown,
                         mode='lines+markers' if panel.log_x else 'markers',
                         error_y=dict(type='data', array=half), **group)
        return
    banded = [i for i, low in enumerate(line.low) if low is not None]
    x = [line.x[i] for i in banded]
    if x:
        yield go.Scatter(x=x + x[::-1], y=[line.high[i] for i in banded]
                         + [line.low[i] for i in banded][::-1], fill='toself', opacity=0.2,
                         fillcolor=colour, mode='none', hoverinfo='skip', showlegend=False,
                         legendgroup=line.name)
    yield go.Scatter(x=line.x, y=line.y, name=line.name, mode='lines', showlegend=shown, **group)


def _html_table(header, rows):
    def cells(values, tag):
        return ''.join(f'<{tag}>{html.escape(str(value))}</{tag}>' for value in values)
    body = ''.join(f'<tr>{cells(row, "td")}</tr>' for row in rows)
    return f'<table><tr>{cells(header, "th")}</tr>{body}</table>'
