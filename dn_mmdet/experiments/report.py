"""The report of a comparison: its tables, its figures and what a reader has to know first."""

import html
import os
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from ..messages import ConfigError
from ..tables import csv_text, markdown_table
from .compare import read_folded
from .figures import draw, figures, interactive
from .results import (
    SETTING,
    columns_of,
    grouped,
    key_of,
    read,
    read_rows,
    spec_of,
    summarise,
)

RUNS = 'runs.csv'  # what every report has


class Written(NamedTuple):
    rows: list
    text: str


def check_out(out: Path) -> None:
    """Raises ConfigError where a folder has files, but no table of runs, as a report has."""
    if (out / RUNS).is_file():
        read_rows(out / RUNS)
    elif os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f'{out}: expected a new folder or one with a report, which has a file {RUNS}; '
            f'choose another --out'
        )


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
    runs = list({key_of(run.row): run for run in found}.values())
    names = list(dict.fromkeys(run.row['config'] for run in runs))
    baseline = baseline or _first_config(runs)
    if baseline not in names:
        raise ConfigError(f'--baseline {baseline}: expected one of {", ".join(names)}')
    table = summarise(runs, baseline)
    rows = [run.row for run in runs if run.row['status'] != 'unfinished']
    out.mkdir(parents=True, exist_ok=True)
    (out / RUNS).write_text(csv_text(rows, columns_of(rows)))
    (out / 'table.csv').write_text(csv_text(table, list(table[0])))
    head, text = notes(runs), markdown(table, baseline)
    if len(found) > len(runs):
        head.append(f'{len(found) - len(runs)} runs were found twice; the last one counts')
    drawn = figures(runs, baseline)
    draw(drawn, out)
    images = ''.join(f'\n![{title}]({name}.png)\n' for name, (title, _) in drawn.items())
    (out / 'report.md').write_text(f'# Comparison\n\n{_list(head)}{text}{images}')
    page = _page(drawn, head, table, baseline)
    if page is None:
        text += (
            '\nreport.html was not written: plotly is not installed here. In a clone of '
            "dn_mmdet run `pip install --no-build-isolation -e '.[experiments]'`\n"
        )
    else:
        (out / 'report.html').write_text(page)
    return Written(rows, _list(head) + text)


def _first_config(runs):
    """Of the run that was planned first: folders are read in the order of their names."""
    return min(runs, key=lambda run: spec_of(run).get('order', 0)).row['config']


def _list(head):
    return ''.join(f'- {line}\n' for line in head) + ('\n' if head else '')


def notes(runs) -> list[str]:
    """What a reader has to know before the figures: whatever differs, lacks or failed."""
    parts = (
        _ends,
        _missing_metrics,
        _rows_of_files,
        _different_data,
        _different_versions,
        _different_machines,
        _different_options,
        _different_configs,
        _several_comparisons,
        _uncounted,
        _not_folded,
        _resumed,
    )
    return list(dict.fromkeys(note for part in parts for note in part(runs)))


def _ends(runs):
    for status in ('unfinished', 'failed', 'diverged'):
        names = [_name(run) for run in runs if run.row['status'] == status]
        if names:
            left_out = '; means and p are of the others' if status == 'diverged' else ''
            yield f'{len(names)} of {len(runs)} runs {status}: {_some(names)}{left_out}'


def _missing_metrics(runs):
    lacking = [
        _name(run) for run in runs if run.row['status'] == 'finished' and run.row['value'] is None
    ]
    if lacking:
        yield f'the metric is missing from {len(lacking)} finished runs: {_some(lacking)}'
    metrics = {run.row['metric'] for run in runs if run.row['value'] is not None}
    if len(metrics) > 1:
        yield f'different metrics: {", ".join(sorted(metrics))}'


def _rows_of_files(runs):
    if any(run.folder is None for run in runs):
        yield (
            'some rows come from a CSV file: they have no curves, no cost but the '
            'parameters, and were not checked for data and versions'
        )


def _environments(runs):
    return [(run, run.result.get('environment', {})) for run in runs if run.result]


def _different_data(runs):
    for split in ('train', 'val'):
        by_name = grouped(_environments(runs), lambda pair: pair[0].row['data'])
        for name, group in by_name.items():
            prints = {
                env['data'][split]['fingerprint']
                for _, env in group
                if split in env.get('data', {})
            }
            if len(prints) > 1:
                yield (
                    f'**different data** under the name {name}, {split}: {len(prints)} '
                    f'fingerprints'
                )


def _different_versions(runs):
    installed = [env['versions'] for _, env in _environments(runs) if 'versions' in env]
    for name in sorted(set().union(*installed)):
        versions = {each.get(name, 'none') for each in installed}
        if len(versions) > 1:
            yield f'**different versions** of {name}: {", ".join(sorted(versions))}'


def _different_machines(runs):
    for name in ('hardware', 'commit'):
        known = [run for run in runs if run.row[name] is not None]
        values = {str(run.row[name]) for run in known}
        if len(values) > 1:
            yield f'different {name}: {", ".join(sorted(values))}'
        for group in grouped(known, lambda run: key_of(run.row, SETTING)).values():
            by_config = {
                config: {str(run.row[name]) for run in members}
                for config, members in grouped(group, lambda run: run.row['config']).items()
            }
            for first, second in combinations(by_config, 2):
                if by_config[first].isdisjoint(by_config[second]):
                    yield (
                        f'**no {name} in common**: {first} ({", ".join(by_config[first])}) and '
                        f'{second} ({", ".join(by_config[second])}): their difference may come '
                        f'from that'
                    )


def _different_options(runs):
    for row, group in grouped(runs, lambda run: key_of(run.row, (*SETTING, 'config'))).items():
        digests = {spec_of(run).get('options_hash') for run in group} - {None}
        if len(digests) > 1:
            yield (
                f'**different options** in one row of the tables, {row[-1]}: {len(digests)} '
                f'configs of that name: {_some([_name(run) for run in group])}'
            )


def _several_comparisons(runs):
    ended = [run for run in runs if run.row['value'] is not None]
    groups = grouped(ended, lambda run: key_of(run.row, SETTING)).values()
    most = max((len({run.row['config'] for run in group}) for group in groups), default=0)
    if most > 2:
        yield f'intervals and p are not corrected for {most - 1} comparisons'


def _different_configs(runs):
    for name, group in grouped(runs, lambda run: run.row['config']).items():
        different = spec_of(group[0]).get('different', [])
        if different:
            more = f' and {len(different) - 5} more' if len(different) > 5 else ''
            yield f'{name} differs in more than the norm: {"; ".join(different[:5])}{more}'


def _uncounted(runs):
    for name, group in grouped(runs, lambda run: run.row['config']).items():
        reasons = {run.result.get('mult_adds_not_measured') for run in group} - {None}
        if reasons:
            yield f'Mult-Adds of {name} could not be counted: {min(reasons)}'


def _not_folded(runs):
    found = [
        (_name(run), read_folded(run.folder))
        for run in runs
        if run.row['status'] == 'finished' and run.folder is not None
    ]
    refused = [
        (name, folded['not_folded']) for name, folded in found if folded and 'not_folded' in folded
    ]
    for reason, group in grouped(refused, lambda pair: pair[1]).items():
        yield (
            f'{len(group)} runs could not be folded: {_some([name for name, _ in group])}: '
            f'{reason}'
        )
    unknown = [name for name, folded in found if folded is None]
    if unknown and len(unknown) < len(found):
        yield (
            f'{len(unknown)} finished runs were not evaluated with folded layers, or their '
            f'checkpoint is gone: {_some(unknown)}'
        )


def _resumed(runs):
    resumed = [_name(run) for run in runs if run.result.get('starts', 1) > 1]
    if resumed:
        yield (
            f'{len(resumed)} runs were interrupted and went on from a checkpoint, with '
            f'other random augmentations than in one piece: {_some(resumed)}'
        )


def _name(run):
    row = run.row
    return f'{row["config"]} (lr {row["lr"]:g}, batch {row["batch"]}, seed {row["seed"]})'


def _some(names):
    return '; '.join(names[:6]) + (f'; and {len(names) - 6} more' if len(names) > 6 else '')


def markdown(table, baseline) -> str:
    """The table of the metric and the table of cost, each setting under its own line."""
    text = ''
    for setting, rows in grouped(table, lambda row: key_of(row, SETTING)).items():
        named = dict(zip(SETTING, setting, strict=True))
        title = f'{named["question"]}: ' if named['question'] else ''
        text += (
            f'## {title}{named["data"]}, {named["epochs"]} epochs, lr {named["lr"]:g}, '
            f'batch {named["batch"]}\n\n'
        )
        text += markdown_table(*metric_table(rows, baseline)) + '\n'
        text += markdown_table(*_cost_table(rows)) + '\n'
    return text


def metric_table(rows, baseline) -> tuple[list, list[list]]:
    """Header and lines of the rows of `summarise`: what came out, without what it cost."""
    metrics = ', '.join(sorted({row['metric'] for row in rows if row['metric']}))
    header = [
        'config',
        'norm',
        'seeds',
        'diverged',
        metrics or 'metric',
        '95 % interval',
        f'paired difference to {baseline}',
        '95 % interval',
        'p',
        'unpaired difference',
        '95 % interval',
        'p',
    ]
    lines = [
        [
            row['config'],
            row['norm'] or '-',
            row['seeds'],
            row['diverged'],
            _number(row['mean']),
            _range(row['low'], row['high']),
            _number(row['difference'], '+') + _of_seeds(row['pairs'], row['seeds']),
            _range(row['difference_low'], row['difference_high'], '+'),
            _probability(row['p']),
            _number(row['unpaired'], '+'),
            _range(row['unpaired_low'], row['unpaired_high'], '+'),
            _probability(row['unpaired_p']),
        ]
        for row in rows
    ]
    if any(row['folded_seeds'] for row in rows):
        at = header.index('95 % interval') + 1
        header.insert(at, 'folded')
        for row, line in zip(rows, lines, strict=True):
            line.insert(at, _folded(row))
    return header, lines


def _cost_table(rows):
    header = [
        'config',
        'parameters',
        'Mult-Adds',
        'of them SC',
        'element-wise',
        'ms per iteration',
        'peak memory MB',
    ]
    return header, [
        [
            row['config'],
            _millions(row['parameters']),
            _millions(row['mult_adds']),
            _millions(row['sc_mult_adds']),
            _millions(row['element_wise']),
            _measured(row['iteration_seconds'] and row['iteration_seconds'] * 1e3),
            _measured(row['peak_megabytes']),
        ]
        for row in rows
    ]


def _number(value, sign=''):
    return '-' if value is None else f'{value:{sign}.4g}'


def _folded(row):
    return _number(row['folded']) + _of_seeds(row['folded_seeds'], row['seeds'])


def _of_seeds(number, seeds):
    """Of how many seeds a mean is, where it is not of all."""
    return f' ({number} of {seeds} seeds)' if number not in (0, seeds) else ''


def _probability(p):
    return '-' if p is None else f'{p:.3g}'


def _range(low, high, sign=''):
    return '-' if low is None else f'{low:{sign}.4g} to {high:{sign}.4g}'


def _millions(value):
    return 'not measured' if value is None else f'{value / 1e6:.3f} M'


def _measured(value):
    return 'not measured' if value is None else f'{value:.1f}'


def _page(drawn, head, table, baseline):
    """One HTML file that needs nothing from elsewhere, or None without plotly."""
    figures_html = interactive(drawn)
    if figures_html is None:
        return None
    parts = [f'<ul>{"".join(f"<li>{html.escape(line)}</li>" for line in head)}</ul>']
    for setting, rows in grouped(table, lambda row: key_of(row, SETTING)).items():
        parts.append(
            f'<h2>{html.escape(", ".join(map(str, filter(None, setting[:3]))))} epochs, '
            f'lr {setting[3]:g}, batch {setting[4]}</h2>'
        )
        parts += [_html_table(*metric_table(rows, baseline)), _html_table(*_cost_table(rows))]
    parts += figures_html
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison'
        '</title><style>body{font-family:sans-serif;margin:2em}td,th{padding:2px 10px;'
        'text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child'
        '{text-align:left}</style></head><body><h1>Comparison</h1>\n'
        + '\n'.join(parts)
        + '\n</body></html>\n'
    )


def _html_table(header, rows):
    def cells(values, tag):
        return ''.join(f'<{tag}>{html.escape(str(value))}</{tag}>' for value in values)

    body = ''.join(f'<tr>{cells(row, "td")}</tr>' for row in rows)
    return f'<table><tr>{cells(header, "th")}</tr>{body}</table>'
