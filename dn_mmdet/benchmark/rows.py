"""A figure is a row: its quantiles, what was measured, and where. Rows are kept as CSV."""

import math

import torch

from ..tables import append_rows, read_table

FIELDS = (
    'date',
    'commit',
    'device',
    'threads',
    'torch',
    'triton',
    'mmengine',
    'mmdet',
    'part',
    'task',
    'batch',
    'dtype',
    'memory_format',
    'channels',
    'map',
    'layers',
    'norm',
    'backend',
    'measure',
    'unit',
    'median',
    'q10',
    'q25',
    'q75',
    'q90',
    'pairs',
)
NUMBERS = dict(
    **dict.fromkeys(('threads', 'batch', 'channels', 'map', 'layers', 'pairs'), int),
    **dict.fromkeys(('median', 'q10', 'q25', 'q75', 'q90'), float),
)


def make_row(at: dict, measure: str, unit: str, values) -> dict:
    """A row of the median and the quantiles of values.

    Args:
        at: what was measured, `variant` (a `Variant`) among it.
    """
    at = dict(at)
    variant = at.pop('variant')
    quantiles = (
        torch.tensor(values, dtype=torch.float64)
        .quantile(torch.tensor([0.5, 0.1, 0.25, 0.75, 0.9], dtype=torch.float64))
        .tolist()
    )
    return dict(
        at,
        norm=variant.norm,
        backend=variant.backend,
        measure=measure,
        unit=unit,
        pairs=len(values),
        **dict(zip(('median', 'q10', 'q25', 'q75', 'q90'), quantiles, strict=True)),
    )


def beside_bn(at: dict, measure: str, unit: str, values, of_bn) -> list[dict]:
    """A row of values, and one of their ratios to BatchNorm's of the same rounds."""
    return [
        make_row(at, measure, unit, values),
        make_row(at, measure, 'of BN', divide(values, of_bn)),
    ]


def divide(values, others) -> list[float]:
    """The ratio of each round."""
    return [a / b for a, b in zip(values, others, strict=True)]


def geometric_means(by_shape: dict, shapes) -> list[float]:
    """The mean ratio of each round: a shape counts as often as there are layers with it."""
    weights = [shapes[shape] for shape in by_shape]
    return [
        math.exp(sum(w * math.log(v) for w, v in zip(weights, values, strict=True)) / sum(weights))
        for values in zip(*by_shape.values(), strict=True)
    ]


def sums(by_shape: dict, shapes) -> list[float]:
    """The sum of each round: a shape counts as often as there are layers with it."""
    weights = [shapes[shape] for shape in by_shape]
    return [
        sum(w * v for w, v in zip(weights, values, strict=True))
        for values in zip(*by_shape.values(), strict=True)
    ]


def matching(rows, **wanted) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def write_rows(path, rows) -> None:
    """Writes rows to a CSV file, or appends them to one of the same columns.

    Raises:
        ConfigError: the file has other columns.
    """
    short = (
        {k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows
    )
    append_rows(path, short, FIELDS)


def read_rows(path) -> list[dict]:
    """The rows of a CSV file, numbers as numbers.

    Raises:
        ConfigError: the file has other columns than a benchmark's.
        FileNotFoundError: there is no such file.
    """
    return read_table(path, [FIELDS], NUMBERS, empty='')
