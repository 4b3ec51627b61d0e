"""The runs that tools/compare.py left, as rows, and their statistics over seeds.

Folders and files are read as they are, so they may come from another machine.
"""

import warnings
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from ..files import read_json, write_text
from ..messages import ConfigError
from ..tables import csv_text, read_table
from .compare import FOLDED, read_folded, read_result
from .cost import ELEMENT_WISE
from .recording import read_log

COLUMNS = (
    'question',
    'data',
    'config',
    'norm',
    'seed',
    'metric',
    'value',
    'epochs',
    'lr',
    'batch',
    'params',
    'seconds',
    'hardware',
    'commit',
    'status',
)
# Of trainings that measure them: also the metric of averaged weights; the mean loss of the last
# epoch; the backend of the DN layers.
EXTRA = ('averaged', *FOLDED, 'train_loss', 'backend')
SETTING = ('question', 'data', 'epochs', 'lr', 'batch')  # what runs that are compared share
KEY = (*SETTING, 'config', 'seed')
METRICS = ('coco/bbox_mAP', 'accuracy/top1')
NUMBERS = dict(
    seed=int,
    value=float,
    epochs=int,
    lr=float,
    batch=int,
    params=int,
    seconds=float,
    **dict.fromkeys(EXTRA[:-1], float),
)
LEVEL = 0.95
DIGITS = 12  # behind the point, to which values are told apart


class Recorded(NamedTuple):
    """A run as it was found; one from a CSV file has a row alone."""

    row: dict
    folder: Path | None = None
    result: dict = {}
    lines: list = []


class Interval(NamedTuple):
    """Mean of n values and its 95 % confidence interval (Student's t).

    None where the values tell no spread: there is one, or all are the same.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None


def interval(values) -> Interval:
    """The interval of independent values, one per seed.

    Example:
        >>> interval([1., 2., 3.])  # doctest: +ELLIPSIS
        Interval(n=3, mean=2.0, low=-0.484..., high=4.484...)
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(len(values), float(values[0]) if len(values) else None, None, None)
    mean = float(values.mean())
    if not _spread(values):
        return Interval(len(values), mean, None, None)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    return Interval(len(values), mean, float(low), float(high))


def _spread(values):
    """The range of values. What differs by a rounding does not differ: 0.54 - 0.53 is not 0.01."""
    return round(float(np.ptp(values)), DIGITS)


def paired(values: dict, baseline: dict) -> tuple[Interval, float | None]:
    """The difference to the baseline per seed, and the p-value of a paired t-test.

    Args:
        values, baseline: {seed: value}; seeds that only one of them has are left out.

    Returns:
        p is None for fewer than two pairs and where all differences are the same.
    """
    seeds = sorted(values.keys() & baseline.keys())
    found = interval([values[seed] - baseline[seed] for seed in seeds])
    if found.low is None:
        return found, None
    test = stats.ttest_rel([values[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    return found, float(test.pvalue)


def unpaired(values: dict, baseline: dict) -> tuple[Interval, float | None]:
    """The difference of the means, and the p-value of Welch's t-test.

    The right one where the same seed makes two runs no more alike than two seeds do: then
    pairing gives up half of the degrees of freedom for nothing. Where it does make them
    alike, this interval is too wide and that of `paired` is right.

    Args:
        values, baseline: {seed: value}, of all seeds.

    Returns:
        p is None, and the interval empty, for fewer than two values on either side or where
        neither spreads.
    """
    ours, theirs = list(values.values()), list(baseline.values())
    n = min(len(ours), len(theirs))
    if n == 0:
        return Interval(0, None, None, None), None
    difference = round(float(np.mean(ours) - np.mean(theirs)), DIGITS)  # equal means give 1e-16
    if n < 2 or not (_spread(ours) or _spread(theirs)):
        return Interval(n, difference, None, None), None
    with np.errstate(all='ignore'), warnings.catch_warnings():  # where one side does not spread
        warnings.simplefilter('ignore', RuntimeWarning)
        test = stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = test.confidence_interval(LEVEL)
    return Interval(n, difference, float(low), float(high)), float(test.pvalue)


def power(seeds: int, difference: float, spread: float) -> float:
    """How often two configs of that many seeds each are told apart, unpaired, at 5 %.

    Args:
        difference: of their true means.
        spread: standard deviation over seeds, of both.

    Example:
        >>> round(power(17, 1., 1.), 2)
        0.81
    """
    freedom = 2 * seeds - 2
    shift = difference / spread * (seeds / 2) ** 0.5
    limit = stats.t.ppf((1 + LEVEL) / 2, freedom)
    return float(stats.nct.sf(limit, freedom, shift) + stats.nct.cdf(-limit, freedom, shift))


def seeds_needed(difference: float, spread: float, wanted=0.8) -> int:
    """The fewest seeds of each config for a `power` of ``wanted``.

    Example:
        >>> seeds_needed(1., 1.)
        17
    """
    if not difference > 0 or not spread > 0 or not 0 < wanted < 1:
        raise ValueError(
            f'expected a difference and a spread above 0 and a power between 0 and '
            f'1, got {difference}, {spread}, {wanted}'
        )
    seeds = 2
    while power(seeds, difference, spread) < wanted:
        seeds += 1
    return seeds


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
    spec = read_json(folder / 'run.json')
    result = read_result(folder) or {}
    status = result.get('status') or (
        'failed' if (folder / 'failure.json').is_file() else 'unfinished'
    )
    metrics = result.get('metrics', {})
    metric = metric or main_metric(metrics)
    row = dict(
        question=spec['question'],
        data=spec['data'],
        config=spec['config'],
        norm='+'.join(result.get('norms', {})),
        seed=spec['seed'],
        metric=metric,
        value=metrics.get(metric),
        epochs=spec['epochs'],
        lr=float(f'{spec["lr"]:.6g}'),
        batch=spec['batch'],
        params=result.get('parameters'),
        seconds=round(result['seconds'], 1) if result else None,
        hardware=result.get('environment', {}).get('hardware'),
        commit=spec['commit'],
        status=status,
    )
    folded = read_folded(folder)
    if folded and result:
        row.update((name, (folded.get(name) or {}).get(metric)) for name in FOLDED)
    return Recorded(row, folder, result, read_log(folder))


def main_metric(metrics) -> str | None:
    """The metric by which to judge where nobody chose: the first of `METRICS` there is."""
    return next((name for name in METRICS if name in metrics), next(iter(metrics), None))


def read_rows(path) -> list[dict]:
    """Rows of a CSV file with `COLUMNS` and perhaps `EXTRA` behind them.

    Raises:
        ConfigError: it has other columns.
    """
    rows = read_table(path, [COLUMNS, COLUMNS + EXTRA], NUMBERS)
    return [dict(row, question=row['question'] or '') for row in rows]


def merge_rows(path, rows) -> None:
    """Puts rows into a CSV file: new ones at its end, known ones in place of what was there."""
    path = Path(path)
    known = {key_of(row): row for row in (read_rows(path) if path.is_file() else [])}
    known.update((key_of(row), row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, csv_text(known.values(), columns_of(known.values())))


def columns_of(rows) -> tuple[str, ...]:
    """`COLUMNS`, and `EXTRA` where a row has some of them."""
    return COLUMNS + (EXTRA if any(set(EXTRA) & set(row) for row in rows) else ())


def key_of(row, names=KEY):
    return tuple(row[name] for name in names)


def spec_of(run):
    """What run.json says of a run; nothing of one from a CSV file."""
    if run.result.get('run') or run.folder is None:
        return run.result.get('run', {})
    return read_json(run.folder / 'run.json')


def grouped(items, key):
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def summarise(runs, baseline) -> list[dict]:
    """One row per setting and config: the metric over seeds, against the baseline, cost."""
    table = []
    for setting, group in grouped(runs, lambda run: key_of(run.row, SETTING)).items():
        configs = grouped(group, lambda run: run.row['config'])
        reference = _values(configs.get(baseline, []))
        for name, members in sorted(configs.items(), key=lambda item: item[0] != baseline):
            table.append(
                dict(
                    zip(SETTING, setting, strict=True),
                    config=name,
                    norm=next((run.row['norm'] for run in members if run.row['norm']), ''),
                    metric=next((run.row['metric'] for run in members if run.row['metric']), ''),
                    **_over_seeds(members),
                    **_differences(_values(members), reference if name != baseline else {}),
                    **_cost(members),
                )
            )
    return table


def _over_seeds(runs):
    """What came out over the seeds, also with all DN layers folded."""
    found = interval(list(_values(runs).values()))
    folded = interval([run.row['folded'] for run in runs if run.row.get('folded') is not None])
    return dict(
        seeds=found.n,
        diverged=sum(run.row['status'] == 'diverged' for run in runs),
        mean=found.mean,
        low=found.low,
        high=found.high,
        folded_seeds=folded.n,
        folded=folded.mean,
    )


def _differences(values, reference):
    """The differences to the baseline, {seed: value} each; none where that is empty."""
    difference, p = paired(values, reference)
    apart, apart_p = unpaired(values, reference)
    return dict(
        pairs=difference.n,
        difference=difference.mean,
        difference_low=difference.low,
        difference_high=difference.high,
        p=p,
        unpaired=apart.mean,
        unpaired_low=apart.low,
        unpaired_high=apart.high,
        unpaired_p=apart_p,
    )


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
        peak_megabytes=max(memory) if memory else None,
    )
