"""What folding costs, over several trained models: the rows that tools/fold.py --csv writes.

A row is a model with some of its layers dynamic; models of one config are its seeds.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import meta_of, weights
from ..experiments import results
from ..experiments.compare import data_name
from ..files import write_text
from ..provenance import hardware
from ..tables import csv_text, read_table

COLUMNS = (
    'data',
    'config',
    'seed',
    'changed',
    'layers',
    'dynamic',
    'metric',
    'value',
    'recalibrated',
    'value_changed',
    'parameters',
    'mult_adds',
    'milliseconds',
    'images',
    'hardware',
    'commit',
)
NUMBERS = dict(
    seed=int,
    layers=int,
    dynamic=int,
    value=float,
    value_changed=float,
    parameters=int,
    mult_adds=int,
    milliseconds=float,
    images=int,
)
EXTRA = ('weights',)  # a digest of the checkpoint's, which earlier files do not have
MODEL = ('data', 'config', 'seed', 'changed')  # a table of tools/fold.py, with EXTRA
CURVE = ('data', 'config', 'metric', 'changed')


def rows_of(result, cfg, config, checkpoint, commit, changed=None) -> list[dict]:
    """The table of a `deploy.Result`.

    Args:
        config (str): name of the config.
        checkpoint (dict): tells the seed, and is what its weights are.
        commit (str): of the code.
        changed (dict | None): options of the images that ``value_changed`` is of.
    """
    seed = meta_of(checkpoint).get('seed')
    digest = digest_of(checkpoint)
    options = ' '.join(f'{key}={value}' for key, value in (changed or {}).items())
    return [
        dict(
            data=data_name(cfg),
            config=config,
            seed=seed,
            changed=options or None,
            layers=len(result.report),
            dynamic=len(row.kept),
            metric=result.metric,
            value=row.value,
            recalibrated='yes' if row.recalibrated else 'no',
            value_changed=row.changed,
            parameters=row.parameters,
            mult_adds=row.mult_adds,
            milliseconds=round(row.milliseconds, 3),
            images=result.images,
            hardware=hardware(),
            commit=commit,
            weights=digest,
        )
        for row in result.rows
    ]


def read(path) -> list[dict]:
    """Rows of a CSV file, none where there is no such file.

    Raises:
        ConfigError: it has other columns.
    """
    allowed = [COLUMNS, COLUMNS + EXTRA]
    return read_table(path, allowed, NUMBERS) if Path(path).exists() else []


def merge(path, rows) -> None:
    """Puts the tables of models into a CSV file, in place of what it holds of the same ones.

    Rows of an earlier file, without a digest of the weights, are of any with the same `MODEL`.
    """
    path = Path(path)
    new = {(results.key_of(row, MODEL), row.get('weights')) for row in rows}
    models = {model for model, _ in new}
    kept = []
    for row in read(path):
        model, digest = results.key_of(row, MODEL), row.get('weights')
        if (model, digest) not in new and (digest or model not in models):
            kept.append(row)
    write_text(path, csv_text([*kept, *rows], COLUMNS + EXTRA))


def digest_of(checkpoint: dict) -> str:
    """What tells the weights of a checkpoint from others: eight hexadecimal digits."""
    found = hashlib.sha256()
    for name, value in sorted(weights(checkpoint, '').items(), key=lambda pair: str(pair[0])):
        found.update(str(name).encode())
        if isinstance(value, torch.Tensor):
            dense = value.detach().cpu().to_dense() if value.is_sparse else value.detach().cpu()
            found.update(dense.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:8]


def curve(rows) -> list[dict]:
    """The rows of several seeds of one config as means, most dynamic layers first.

    Differences and ratios are taken within a seed, to its model with all layers dynamic
    and to that with all folded. Numbers of dynamic layers that only some seeds have are
    left out, and of several checkpoints of a seed all but the last.
    """

    last = {row['seed']: row.get('weights') for row in rows}  # rows are in order of time
    rows = [row for row in rows if row.get('weights') == last[row['seed']]]
    seeds = results.grouped(rows, lambda row: row['seed'])
    points = []
    for group in results.grouped(
        sorted(rows, key=lambda row: -row['dynamic']), lambda row: row['dynamic']
    ).values():
        if len(group) < len(seeds):
            continue
        whole, folded = (
            {seed: pick(found, key=lambda row: row['dynamic']) for seed, found in seeds.items()}
            for pick in (max, min)
        )
        points.append(
            dict(
                group[0],
                seeds=len(group),
                value=_mean(row['value'] for row in group),
                to_dynamic=_mean(row['value'] - whole[row['seed']]['value'] for row in group),
                value_changed=_mean(row['value_changed'] for row in group),
                time=_mean(
                    row['milliseconds'] / folded[row['seed']]['milliseconds'] for row in group
                ),
            )
        )
    return points


def _mean(values):
    values = list(values)
    return None if None in values else float(np.mean(values))


def curves(path) -> dict[tuple, list[dict]]:
    """`curve` of each config in a CSV file, by `CURVE`."""
    return {
        key: curve(rows)
        for key, rows in results.grouped(
            read(path), lambda row: results.key_of(row, CURVE)
        ).items()
    }


def draw(path, out) -> None:
    """What each config in a CSV file loses over the share of its layers that is folded, PNG."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    drawn = curves(path)
    figure, axes = plt.subplots(
        1, len(drawn), squeeze=False, layout='constrained', figsize=(max(6, 4 * len(drawn)), 3.5)
    )
    for cell, ((data, config, metric, changed), points) in zip(
        axes[0], drawn.items(), strict=True
    ):
        share = [1 - point['dynamic'] / point['layers'] for point in points]
        cell.plot(share, [point['value'] for point in points], 'o-', label='images as trained')
        if points[0]['value_changed'] is not None:
            cell.plot(share, [point['value_changed'] for point in points], 's--', label=changed)
            cell.legend(fontsize=6)
        seeds = points[0]['seeds']
        cell.set(
            title=f'{data}, {seeds} seed{"s" if seeds > 1 else ""}\n{config}',
            ylabel=metric,
            xlabel='share of the layers that is folded',
        )
        cell.title.set_fontsize(9)
        cell.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
    plt.close(figure)
