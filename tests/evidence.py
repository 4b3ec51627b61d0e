"""The tables of evidence in README and docs, made of docs/results/runs.csv.

    python tests/evidence.py    # writes them again

A page says where: ``<!-- runs of QUESTION -->`` to ``<!-- end -->``, or ``<!-- runs of
QUESTION: CONFIG, CONFIG -->`` for some of the configs. ``<!-- folded runs of QUESTION -->`` takes
the column ``folded`` instead of ``value``. The baseline is the config with BN, or CONFIG in
``<!-- runs of QUESTION against CONFIG -->``.

``<!-- summary of QUESTION: LABEL = CONFIG, LABEL = CONFIG -->`` is a short table of runs of
one setting. The first config is the baseline; intervals are those of the unpaired test.

``<!-- folding of CONFIG -->`` is the curve of a config in docs/results/folding.csv, and
``<!-- trade-off in QUESTION: CONFIG against CONFIG -->`` what the runs of a config are folded,
beside those of its twin with BN.

``<!-- adaptation in QUESTION -->`` is what the models lose by folding. ``<!-- seeds needed at
SPREAD -->`` is a power calculation.
"""
import re
from pathlib import Path

from dn_mmdet import report, results, trade_off

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md')))
MARKS = re.compile(r'(?s)<!-- (?:(\w+) )?runs of ([^:]+?)(?: against (\S+?))?(?:: ([^>]+?))? -->\n'
                   r'.*?<!-- end -->')
SUMMARY = re.compile(r'(?s)<!-- summary of ([^:]+?): ([^>]+?) -->\n.*?<!-- end -->')
SHOWN = {'accuracy/top1': ('top-1', 1), 'coco/bbox_mAP': ('AP', 100)}  # metric: name, factor
ADAPTATION = re.compile(r'(?s)<!-- adaptation in ([^>]+?) -->\n.*?<!-- end -->')
FOLDING = re.compile(r'(?s)<!-- folding of (\S+?) -->\n.*?<!-- end -->')
TRADE_OFF = re.compile(r'(?s)<!-- trade-off in ([^:]+?): (\S+?) against (\S+?) -->\n'
                       r'.*?<!-- end -->')
COLUMNS_IN_WORDS = dict(
    value='all dynamic', folded_most='the quarter that varies most dynamic',
    folded_recalibrated='all folded, statistics anew', folded='all folded')
FOLDED = ('folded', 'folded_recalibrated', 'folded_most')
POWER = re.compile(r'(?s)<!-- seeds needed at ([\d.]+) -->\n.*?<!-- end -->')
DIFFERENCES = (0.5, 0.75, 1., 1.5, 2.)
PLANNED = ('Stability, on a GPU', )  # and not run yet
BASELINE = re.compile(r'(mobilenetv2|ssdlite_mbv2)_bn_')


def tables(question: str, configs: str | None = None, column: str | None = None,
           baseline: str | None = None) -> str:
    """A table for each setting: the metric over seeds, against BatchNorm's or another's."""
    runs = [run for run in results.read([ROOT / 'docs' / 'results' / 'runs.csv'])
            if run.row['question'] == question]
    if column:
        runs = [results.Recorded(dict(run.row, value=run.row[column], folded=None,
                                      metric=f'{run.row["metric"]}, {column}')) for run in runs]
    if not runs and question in PLANNED:
        return 'Not run yet.\n'
    if not runs:
        raise ValueError(f'docs/results/runs.csv has no run of {question!r}')
    baseline = baseline or next(run.row['config'] for run in runs
                                if BASELINE.match(run.row['config']))
    wanted = configs and configs.split(', ')
    text = []
    for setting, rows in results.grouped(results.summarise(runs, baseline), lambda row: (
            row['data'], row['epochs'], row['lr'], row['batch'])).items():
        rows = [row for row in rows if not wanted or row['config'] in wanted]
        header, lines = report.metric_table(rows, baseline)
        parameters = [f'{row["parameters"] / 1e6:.2f} M' for row in rows]
        data, epochs, lr, batch = setting
        text.append(f'{data}, {epochs} epochs, lr {lr:g}, batch {batch}:\n\n'
                    + report.markdown_table(
                        [header[0], 'parameters', *header[1:]],
                        [[line[0], count, *line[1:]]
                         for line, count in zip(lines, parameters, strict=True)]))
    return '\n'.join(text)


def summary(question: str, labels: str) -> str:
    """One row for each config under the label that a page gives it, in two digits."""
    configs = {config: label for label, config in (
        pair.split(' = ') for pair in labels.split(', '))}
    baseline = next(iter(configs))
    runs = [run for run in results.read([ROOT / 'docs' / 'results' / 'runs.csv'])
            if run.row['question'] == question and run.row['config'] in configs]
    rows = {row['config']: row for row in results.summarise(runs, baseline)}
    if len(rows) < len(configs) or len({run.row['lr'] for run in runs}) > 1:
        raise ValueError(f'{question!r}: expected runs of one setting for {sorted(configs)}, '
                         f'got {sorted(rows)}')
    name, factor = SHOWN[rows[baseline]['metric']]
    lines = []
    for config, label in configs.items():
        row = rows[config]
        difference = '' if config == baseline else (
            f'{factor * row["unpaired"]:+.2f} ({factor * row["unpaired_low"]:+.2f} to '
            f'{factor * row["unpaired_high"]:+.2f})')
        lines.append([label, f'{row["parameters"] / 1e6:.2f} M', row['seeds'],
                      f'{factor * row["mean"]:.2f}', difference])
    return report.markdown_table(['', 'parameters', 'seeds', name,
                                  f'difference to {configs[baseline]} (95 % interval)'], lines)


def adaptation(question: str) -> str:
    """What each model with DN layers loses when they are folded: dynamic - folded, over seeds."""
    runs = [run for run in results.read([ROOT / 'docs' / 'results' / 'runs.csv'])
            if run.row['question'] == question and run.row['value'] is not None]
    if not runs and question in PLANNED:
        return 'Not run yet.\n'
    text = []
    for (epochs, lr, batch), group in results.grouped(runs, lambda run: (
            run.row['epochs'], run.row['lr'], run.row['batch'])).items():
        lines = []
        for config, found in results.grouped(group, lambda run: run.row['config']).items():
            if 'DN' not in found[0].row['norm'] or found[0].row['norm'] == 'StaticDN':
                continue
            lines.append([config, len(found)])
            for column in FOLDED:
                lost, _ = results.paired(*({run.row['seed']: run.row[name] for run in found}
                                           for name in ('value', column)))
                lines[-1].append(f'{lost.mean:+.2f}' + (
                    '' if lost.low is None else f' ({lost.low:+.2f} to {lost.high:+.2f})'))
        if lines:
            text.append(f'{epochs} epochs, lr {lr:g}, batch {batch}:\n\n' + report.markdown_table(
                ['config', 'seeds', *(f'dynamic - {column}' for column in FOLDED)], lines))
    return '\n'.join(text)


def folding(config: str) -> str:
    """A table for each kind of images: the metric over the number of layers left dynamic."""
    text = []
    found = trade_off.curves(ROOT / 'docs' / 'results' / 'folding.csv')
    for (data, name, metric, changed), points in found.items():
        if name != config:
            continue
        header = ['layers', metric, 'to dynamic', 'parameters', 'Mult-Adds', 'time']
        lines = [[_layers(point), f'{point["value"]:.4g}', f'{point["to_dynamic"]:+.4g}',
                  f'{point["parameters"] / 1e6:.3f} M', f'{point["mult_adds"] / 1e6:.2f} M',
                  f'{point["time"]:.2f}'] for point in points]
        if changed:
            header.insert(3, 'on changed images')
            for point, line in zip(points, lines, strict=True):
                line.insert(3, f'{point["value_changed"]:.4g}')
        seeds = points[0]['seeds']
        also = f'; changed images: `{changed}`' if changed else ''
        text.append(f'{data}, {seeds} seed{"s" if seeds > 1 else ""}, the time of all folded '
                    f'is 1{also}:\n\n{report.markdown_table(header, lines)}')
    if not text:
        raise ValueError(f'docs/results/folding.csv has no rows of {config!r}')
    return '\n'.join(text)


def _layers(point):
    if point['dynamic'] in (0, point['layers']):
        return f'all {point["layers"]} {"dynamic" if point["dynamic"] else "folded"}'
    return f'{point["dynamic"]} of {point["layers"]} dynamic'


def trade_off_of_runs(question: str, config: str, twin: str) -> str:
    """The metric of the runs of a config as they are folded, and of its twin; over seeds."""
    rows = [row for row in results.read_rows(ROOT / 'docs' / 'results' / 'runs.csv')
            if row['question'] == question]
    found = {name: [row for row in rows if row['config'] == name and row['value'] is not None]
             for name in (config, twin)}
    if not all(found.values()):
        raise ValueError(f'docs/results/runs.csv: {question!r} has no runs of '
                         f'{" and ".join(name for name in found if not found[name])}')
    value = {row['seed']: row['value'] for row in found[config]}
    lines = []
    for column, words in COLUMNS_IN_WORDS.items():
        folded = {row['seed']: row[column] for row in found[config] if row[column] is not None}
        lost, _ = results.paired(folded, value)
        lines.append([words, *_mean(folded.values()), '' if column == 'value' else
                      _with_interval(lost, '+')])
    lines.append(['BatchNorm twin', *_mean([row['value'] for row in found[twin]]), ''])
    return report.markdown_table(
        ['layers', 'seeds', rows[0]['metric'], 'to dynamic, within a run'], lines)


def _mean(values):
    found = results.interval(list(values))
    return found.n, _with_interval(found)


def _with_interval(found, sign=''):
    if found.mean is None:
        return 'not measured'
    return f'{found.mean:{sign}.2f}' + (
        '' if found.low is None else f' ({found.low:{sign}.2f} to {found.high:{sign}.2f})')


def seeds_needed(spread: float) -> str:
    return report.markdown_table(
        ['true difference', *(f'{difference:g}' for difference in DIFFERENCES)],
        [['seeds of each', *(results.seeds_needed(d, spread) for d in DIFFERENCES)],
         ['found with 5 of each', *(f'{results.power(5, d, spread):.0%}' for d in DIFFERENCES)]])


def with_tables(page: str) -> str:
    def written_by(made):
        def write(found):
            return f'{found.group().splitlines()[0]}\n{made(*found.groups())}<!-- end -->'
        return write
    page = SUMMARY.sub(written_by(summary), page)
    page = MARKS.sub(written_by(lambda column, question, baseline, configs: tables(
        question, configs, column, baseline)), page)
    page = FOLDING.sub(written_by(folding), page)
    page = TRADE_OFF.sub(written_by(trade_off_of_runs), page)
    page = ADAPTATION.sub(written_by(adaptation), page)
    return POWER.sub(written_by(lambda spread: seeds_needed(float(spread))), page)


if __name__ == '__main__':
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
