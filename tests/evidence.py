"""The tables of evidence in README and docs, made of docs/results/runs.csv.

    python tests/evidence.py    # writes them again, and docs/results/causes.png

A page says where: ``<!-- runs of QUESTION -->`` to ``<!-- end -->``, or ``<!-- runs of
QUESTION: CONFIG, CONFIG -->`` for some of the configs. ``<!-- folded runs of QUESTION -->`` takes
the column ``folded`` instead of ``value``. The baseline is the config with BN, or CONFIG in
``<!-- runs of QUESTION against CONFIG -->``.

``<!-- summary of QUESTION: LABEL = CONFIG, LABEL = CONFIG -->`` is a short table of runs of
one setting. The first config is the baseline; intervals are those of the unpaired test.

``<!-- folding of CONFIG -->`` is the curve of a config in docs/results/folding.csv, and
``<!-- trade-off in QUESTION: CONFIG against CONFIG -->`` what the runs of a config are folded,
beside those of its twin with BN.

``<!-- adaptation in QUESTION -->`` is what the models lose by folding. ``<!-- fit in
QUESTION -->`` is how well they fit the training images, and what averaged weights do.
``<!-- settings of QUESTION: LABEL = CONFIG, LABEL = CONFIG -->`` has a column for each rate
and batch. ``<!-- seeds needed at SPREAD -->`` is a power calculation.
"""

import re
import statistics
from pathlib import Path

from dn_mmdet.deploy import trade_off
from dn_mmdet.experiments import figures, report, results
from dn_mmdet.tables import markdown_table

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md')))
MARKS = re.compile(
    r'(?s)<!-- (?:(\w+) )?runs of ([^:]+?)(?: against (\S+?))?(?:: ([^>]+?))? -->\n'
    r'.*?<!-- end -->'
)
SUMMARY = re.compile(r'(?s)<!-- summary of ([^:]+?): ([^>]+?) -->\n.*?<!-- end -->')
SHOWN = {'accuracy/top1': ('top-1', 1), 'coco/bbox_mAP': ('AP', 100)}  # metric: name, factor
ADAPTATION = re.compile(r'(?s)<!-- adaptation in ([^>]+?) -->\n.*?<!-- end -->')
FOLDING = re.compile(r'(?s)<!-- folding of (\S+?) -->\n.*?<!-- end -->')
TRADE_OFF = re.compile(
    r'(?s)<!-- trade-off in ([^:]+?): (\S+?) against (\S+?) -->\n'
    r'.*?<!-- end -->'
)
COLUMNS_IN_WORDS = dict(
    value='all dynamic',
    folded_most='the quarter that varies most dynamic',
    folded_recalibrated='all folded, new statistics',
    folded='all folded',
)
FOLDED = ('folded', 'folded_recalibrated', 'folded_most')
FIT = re.compile(r'(?s)<!-- fit in ([^>]+?) -->\n.*?<!-- end -->')
SETTINGS = re.compile(r'(?s)<!-- settings of ([^:]+?): ([^>]+?) -->\n.*?<!-- end -->')
POWER = re.compile(r'(?s)<!-- seeds needed at ([\d.]+) -->\n.*?<!-- end -->')
DIFFERENCES = (0.5, 0.75, 1.0, 1.5, 2.0)
PLANNED = ('Stability, on a GPU',)  # and not run yet
BASELINE = re.compile(r'(mobilenetv2|ssdlite_mbv2)_bn_')


def _runs(question):
    return [
        run
        for run in results.read([ROOT / 'docs' / 'results' / 'runs.csv'])
        if run.row['question'] == question
    ]


def _labelled(labels):
    """{config: label} of ``LABEL = CONFIG, LABEL = CONFIG``."""
    return {config: label for label, config in (pair.split(' = ') for pair in labels.split(', '))}


def tables(
    question: str,
    configs: str | None = None,
    column: str | None = None,
    baseline: str | None = None,
) -> str:
    """A table for each setting: the metric over seeds, against BatchNorm's or another's."""
    runs = _runs(question)
    if column:
        runs = [
            results.Recorded(
                dict(
                    run.row,
                    value=run.row[column],
                    folded=None,
                    metric=f'{run.row["metric"]}, {column}',
                )
            )
            for run in runs
        ]
    if not runs and question in PLANNED:
        return 'Not run yet.\n'
    if not runs:
        raise ValueError(f'docs/results/runs.csv has no run of {question!r}')
    baseline = baseline or next(
        run.row['config'] for run in runs if BASELINE.match(run.row['config'])
    )
    wanted = configs and configs.split(', ')
    text = []
    for setting, rows in results.grouped(
        results.summarise(runs, baseline),
        lambda row: (row['data'], row['epochs'], row['lr'], row['batch']),
    ).items():
        rows = [row for row in rows if not wanted or row['config'] in wanted]
        header, lines = report.metric_table(rows, baseline)
        parameters = [f'{row["parameters"] / 1e6:.2f} M' for row in rows]
        data, epochs, lr, batch = setting
        text.append(
            f'{data}, {epochs} epochs, lr {lr:g}, batch {batch}:\n\n'
            + markdown_table(
                [header[0], 'parameters', *header[1:]],
                [
                    [line[0], count, *line[1:]]
                    for line, count in zip(lines, parameters, strict=True)
                ],
            )
        )
    return '\n'.join(text)


def summary(question: str, labels: str) -> str:
    """One row for each config under the label that a page gives it, in two digits."""
    configs = _labelled(labels)
    baseline = next(iter(configs))
    runs = [run for run in _runs(question) if run.row['config'] in configs]
    rows = {row['config']: row for row in results.summarise(runs, baseline)}
    if len(rows) < len(configs) or len({run.row['lr'] for run in runs}) > 1:
        raise ValueError(
            f'{question!r}: expected runs of one setting for {sorted(configs)}, got {sorted(rows)}'
        )
    name, factor = SHOWN[rows[baseline]['metric']]
    lines = []
    for config, label in configs.items():
        row = rows[config]
        difference = (
            ''
            if config == baseline
            else (
                f'{factor * row["unpaired"]:+.2f} ({factor * row["unpaired_low"]:+.2f} to '
                f'{factor * row["unpaired_high"]:+.2f})'
            )
        )
        lines.append(
            [
                label,
                f'{row["parameters"] / 1e6:.2f} M',
                row['seeds'],
                f'{factor * row["mean"]:.2f}',
                difference,
            ]
        )
    return markdown_table(
        ['', 'parameters', 'seeds', name, f'difference to {configs[baseline]} (95 % interval)'],
        lines,
    )


def differences(question: str, baseline: str | None = None) -> dict:
    """{(config, column): difference to BatchNorm's or another's, and its Welch interval}."""
    runs = [run for run in _runs(question) if run.row['value'] is not None]
    baseline = baseline or next(
        run.row['config'] for run in runs if BASELINE.match(run.row['config'])
    )
    found = {}
    for column in ('value', 'folded', 'folded_recalibrated', 'train_loss'):
        measured = [results.Recorded(dict(run.row, value=run.row.get(column))) for run in runs]
        for row in results.summarise(measured, baseline):
            if row['config'] != baseline and row['unpaired'] is not None:
                found[row['config'], column] = (
                    row['unpaired'],
                    row['unpaired_low'],
                    row['unpaired_high'],
                )
    return found


def adaptation(question: str) -> str:
    """What each model with DN layers loses when they are folded: dynamic - folded, over seeds."""
    runs = [run for run in _runs(question) if run.row['value'] is not None]
    if not runs and question in PLANNED:
        return 'Not run yet.\n'
    text = []
    for (epochs, lr, batch), group in results.grouped(
        runs, lambda run: (run.row['epochs'], run.row['lr'], run.row['batch'])
    ).items():
        lines = []
        for config, found in results.grouped(group, lambda run: run.row['config']).items():
            if 'DN' not in found[0].row['norm'] or found[0].row['norm'] == 'StaticDN':
                continue
            lines.append([config, len(found)])
            for column in FOLDED:
                lost, _ = results.paired(
                    *(
                        {run.row['seed']: run.row[name] for run in found}
                        for name in ('value', column)
                    )
                )
                lines[-1].append(
                    f'{lost.mean:+.2f}'
                    + ('' if lost.low is None else f' ({lost.low:+.2f} to {lost.high:+.2f})')
                )
        if lines:
            text.append(
                f'{epochs} epochs, lr {lr:g}, batch {batch}:\n\n'
                + markdown_table(
                    ['config', 'seeds', *(f'dynamic - {column}' for column in FOLDED)], lines
                )
            )
    return '\n'.join(text)


def folding(config: str) -> str:
    """A table for each kind of images: the metric over the number of layers left dynamic."""
    text = []
    found = trade_off.curves(ROOT / 'docs' / 'results' / 'folding.csv')
    for (data, name, metric, changed), points in found.items():
        if name != config:
            continue
        header = ['layers', metric, 'to dynamic', 'parameters', 'Mult-Adds', 'time']
        lines = [
            [
                _layers(point),
                f'{point["value"]:.4g}',
                f'{point["to_dynamic"]:+.4g}',
                f'{point["parameters"] / 1e6:.3f} M',
                f'{point["mult_adds"] / 1e6:.2f} M',
                f'{point["time"]:.2f}',
            ]
            for point in points
        ]
        if changed:
            header.insert(3, 'on changed images')
            for point, line in zip(points, lines, strict=True):
                line.insert(3, f'{point["value_changed"]:.4g}')
        seeds = points[0]['seeds']
        also = f'; changed images: `{changed}`' if changed else ''
        text.append(
            f'{data}, {seeds} seed{"s" if seeds > 1 else ""}, the time of all folded '
            f'is 1{also}:\n\n{markdown_table(header, lines)}'
        )
    if not text:
        raise ValueError(f'docs/results/folding.csv has no rows of {config!r}')
    return '\n'.join(text)


def _layers(point):
    if point['dynamic'] in (0, point['layers']):
        words = f'all {point["layers"]} {"dynamic" if point["dynamic"] else "folded"}'
    else:
        words = f'{point["dynamic"]} of {point["layers"]} dynamic'
    return words + (', new statistics' if point['recalibrated'] == 'yes' else '')


def trade_off_of_runs(question: str, config: str, twin: str) -> str:
    """The metric of the runs of a config as they are folded, and of its twin; over seeds."""
    rows = [
        row
        for row in results.read_rows(ROOT / 'docs' / 'results' / 'runs.csv')
        if row['question'] == question
    ]
    found = {
        name: [row for row in rows if row['config'] == name and row['value'] is not None]
        for name in (config, twin)
    }
    if not all(found.values()):
        raise ValueError(
            f'docs/results/runs.csv: {question!r} has no runs of '
            f'{" and ".join(name for name in found if not found[name])}'
        )
    metric = rows[0]['metric']
    name, factor = SHOWN.get(metric, (metric, 1))
    value = {row['seed']: factor * row['value'] for row in found[config]}
    lines = []
    for column, words in COLUMNS_IN_WORDS.items():
        folded = {
            row['seed']: factor * row[column] for row in found[config] if row[column] is not None
        }
        lost, _ = results.paired(folded, value)
        lines.append(
            [
                words,
                *_mean(folded.values()),
                '' if column == 'value' else _with_interval(lost, '+'),
            ]
        )
    lines.append(['BatchNorm twin', *_mean([factor * row['value'] for row in found[twin]]), ''])
    return markdown_table(['layers', 'seeds', name, 'to dynamic, within a run'], lines)


def _mean(values):
    found = results.interval(list(values))
    return found.n, _with_interval(found)


def _with_interval(found, sign=''):
    if found.mean is None:
        return 'not measured'
    return f'{found.mean:{sign}.2f}' + (
        '' if found.low is None else f' ({found.low:{sign}.2f} to {found.high:{sign}.2f})'
    )


def fit(question: str) -> str:
    """The last epoch's training loss and top-1, and top-1 of averaged weights, over seeds."""
    runs = [run for run in _runs(question) if run.row['value'] is not None]
    if not runs and question in PLANNED:
        return 'Not run yet.\n'
    lines = []
    for config, found in results.grouped(runs, lambda run: run.row['config']).items():
        both = [run.row for run in found if run.row['averaged'] is not None]
        lines.append(
            [
                config,
                len(found),
                f'{statistics.mean(run.row["train_loss"] for run in found):.3f}',
                _mean_and_spread([run.row['value'] for run in found]),
                len(both),
                _mean_and_spread([row['value'] for row in both]),
                _mean_and_spread([row['averaged'] for row in both]),
            ]
        )
    return markdown_table(
        [
            'config',
            'seeds',
            'training loss',
            'top-1',
            'seeds with averaged weights',
            'top-1 of these',
            'their top-1 with averaged weights',
        ],
        lines,
    )


def _mean_and_spread(values):
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return f'{values[0]:.2f}' if values else '-'
    return f'{statistics.mean(values):.2f} ({statistics.stdev(values):.2f})'


def settings(question: str, labels: str) -> str:
    """A row for each config under its label, a column for each learning rate and batch."""
    configs, runs = _labelled(labels), _runs(question)
    if not runs and question in PLANNED:
        return 'Not run yet.\n'
    found = results.grouped(runs, lambda run: (run.row['batch'], run.row['lr']))
    columns = sorted(found, key=lambda column: (-column[0], column[1]))
    lines = []
    for config, label in configs.items():
        lines.append([label])
        for column in columns:
            rows = [run.row for run in found[column] if run.row['config'] == config]
            values = [row['value'] for row in rows if row['value'] is not None]
            cell = [f'{statistics.mean(values):.2f}'] if values else []
            cell += [row['status'] for row in rows if row['value'] is None]
            lines[-1].append(', '.join(cell) or 'not run')
    return markdown_table(['', *(f'lr {lr:g}, batch {batch}' for batch, lr in columns)], lines)


def seeds_needed(spread: float) -> str:
    return markdown_table(
        ['true difference', *(f'{difference:g}' for difference in DIFFERENCES)],
        [
            ['seeds of each', *(results.seeds_needed(d, spread) for d in DIFFERENCES)],
            ['found with 5 of each', *(f'{results.power(5, d, spread):.0%}' for d in DIFFERENCES)],
        ],
    )


def with_tables(page: str) -> str:
    def written_by(made):
        def write(found):
            return f'{found.group().splitlines()[0]}\n{made(*found.groups())}<!-- end -->'

        return write

    page = SUMMARY.sub(written_by(summary), page)
    page = MARKS.sub(
        written_by(
            lambda column, question, baseline, configs: tables(question, configs, column, baseline)
        ),
        page,
    )
    page = FOLDING.sub(written_by(folding), page)
    page = TRADE_OFF.sub(written_by(trade_off_of_runs), page)
    page = SETTINGS.sub(written_by(settings), page)
    page = FIT.sub(written_by(fit), page)
    page = ADAPTATION.sub(written_by(adaptation), page)
    return POWER.sub(written_by(lambda spread: seeds_needed(float(spread))), page)


def figure(question: str) -> tuple[str, list[figures.Panel]]:
    """What each config's top-1 and training loss are, less BatchNorm's."""
    panels, found = [], differences(question)
    for column, title in (('value', 'top-1'), ('train_loss', 'training loss, last epoch')):
        configs = [config for config, of in found if of == column]
        names = [
            config.removeprefix('mobilenetv2_').removesuffix('_tinyin100') for config in configs
        ]
        sides = zip(*(found[config, column] for config in configs), strict=True)
        line = figures.Line(
            "over seeds, with Welch's 95 % interval",
            names,
            *(list(side) for side in sides),
            bars=True,
        )
        panels.append(figures.Panel(title, '', 'difference to BN', [line]))
    return question, panels


if __name__ == '__main__':
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
    figures.draw(dict(causes=figure('Causes, on a GPU')), ROOT / 'docs' / 'results')
