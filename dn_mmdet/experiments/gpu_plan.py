"""What tools/gpu_evidence.py is to train: made where MMPretrain is, carried to the GPU.

The recipe stands in the config and in the preset `causes`; nothing of it is repeated here.
"""

import json
import re
import shutil
from pathlib import Path

from ..checks.preflight import check_new, make_folder
from ..cli.command_line import load_config
from ..files import read_json, write_json
from ..messages import ConfigError
from ..provenance import commit_of
from . import compare, presets
from .gpu_grid import ARCHIVE, PLAN
from .gpu_recipe import check_recipe
from .results import COLUMNS, EXTRA, METRICS

# dnb:0-4, or several variants with seeds outermost, bn,dnb:0,2,5-7@lr8@batch32@epochs3
RUNS = re.compile(r'(?P<names>[^:@\s]+):(?P<seeds>[\d,-]+)(?P<options>(?:@[a-z]+[\d.]+)*)')
OPTION = re.compile(r'@(lr|batch|epochs)([\d.]+)')
RECIPE = ('model', 'data_preprocessor', 'optim_wrapper', 'param_scheduler', 'train_pipeline')


def prepare(
    config, runs, folder, archive, epochs=None, question='GPU', commit=None, append=False
) -> list:
    """Writes the plan and the images into a folder to carry to the GPU machine.

    Args:
        config: path of the classification config with BatchNorm; the tables' baseline.
        runs (list[str]): as in `parse_runs`, in the order in which to train them.
        folder: to write to.
        archive: tar file with ``train/<class>/*`` and ``val/<class>/*``.
        epochs (int): of runs that do not say how many; by default the config's.
        question (str): for the tables.
        commit (str): of the code, where git cannot tell.
        append (bool): behind the runs of the plan that is there.

    Returns:
        the runs of the plan, one dict each.

    Raises:
        ConfigError: an unknown variant, a run listed twice, a recipe that the training does
            not know, or a file in the folder that is not of such a plan.
    """
    folder = Path(folder)
    if not Path(archive).is_file():
        raise ConfigError(f'{archive}: expected the archive of the images, found no such file')
    earlier = _earlier_runs(folder, archive)
    found = plan(config, runs, epochs, question, commit or commit_of())
    if append:
        found = earlier + found
    _check_once(found)
    make_folder(folder, '--folder')
    write_json(folder / PLAN, dict(columns=[*COLUMNS, *EXTRA], runs=found))
    if not (folder / ARCHIVE).is_file() or not (folder / ARCHIVE).samefile(archive):
        shutil.copyfile(archive, folder / ARCHIVE)
    return found


def _earlier_runs(folder, archive):
    """The runs of the plan that is there, none where there is no plan.

    Raises:
        ConfigError: a file that would be replaced is not of such a plan.
    """
    path, images = folder / PLAN, folder / ARCHIVE
    if path.exists():
        try:
            return read_json(path)['runs']
        except (ValueError, KeyError, TypeError):  # somebody else's file
            check_new([path], '--folder', kind='folder')
    if not (images.exists() and images.samefile(archive)):
        check_new([images], '--folder', kind='folder')
    return []


def plan(config, runs, epochs, question, commit) -> list[dict]:
    """A dict per run: its row as far as it is known, and its recipe."""
    cfg = load_config(config)
    name = Path(config).stem
    bn = compare.NamedConfig(name, str(config), cfg)
    variants = {
        point.variant.name: point.variant for point in presets.causes(bn, [0], None, None, None)
    }
    variants['bn'] = bn
    found = []
    for text in runs:
        for short, seed, options in parse_runs(text):
            if short not in variants:
                raise ConfigError(
                    f'{short}: no such variant; expected some of '
                    f'{", ".join(sorted(set(variants) - {name}))}'
                )
            point = compare.Point(
                variants[short],
                seed,
                options.get('lr', 1.0),
                options.get('batch'),
                options.get('epochs', epochs),
            )
            found.append(_run(point, short, question, commit))
    return found


def _check_once(runs):
    keys = [json.dumps(run['row'], sort_keys=True) for run in runs]
    twice = {run['name'] for run, key in zip(runs, keys, strict=True) if keys.count(key) > 1}
    if twice:
        raise ConfigError(
            f'{", ".join(sorted(twice))}: listed twice with the same seed and setting'
        )


def parse_runs(text: str) -> list[tuple[str, int, dict]]:
    """(variant, seed, options) of ``bn,dnb:0-4@lr8@batch32@epochs3``, seeds outermost.

    Example:
        >>> parse_runs('bn,dnb:0-1@lr8')[:3]
        [('bn', 0, {'lr': 8.0}), ('dnb', 0, {'lr': 8.0}), ('bn', 1, {'lr': 8.0})]
    """
    match = RUNS.fullmatch(text)
    if not match or len(OPTION.findall(text)) != text.count('@'):
        raise ConfigError(
            f'--runs: expected VARIANTS:SEEDS with @lr, @batch or @epochs, as in '
            f'bn,dnb:0-4@lr8@batch32@epochs3, got {text}'
        )
    options = {
        key: float(value) if key == 'lr' else int(value)
        for key, value in OPTION.findall(match['options'])
    }
    seeds = []
    for part in match['seeds'].split(','):
        first, dash, last = part.partition('-')
        if not first.isdigit() or dash and not last.isdigit():
            raise ConfigError(f'--runs: expected seeds such as 0-4 or 0,2,5, got {text}')
        seeds += range(int(first), int(last or first) + 1)
    return [(name, seed, options) for seed in seeds for name in match['names'].split(',')]


def _without_scope(node):
    """Without mmengine's notes from which package a part of a config came."""
    if isinstance(node, dict):
        return {key: _without_scope(value) for key, value in node.items() if key != '_scope_'}
    if isinstance(node, (list, tuple)):
        return [_without_scope(value) for value in node]
    return node


def _run(point, short, question, commit):
    cfg, numbers = compare.configured(point)
    recipe = {key: _without_scope(cfg.get(key)) for key in RECIPE}
    recipe['drop_last'] = cfg.train_dataloader.get('drop_last', False)
    recipe = json.loads(json.dumps(recipe))  # plain dicts and lists, as they will be read
    try:
        check_recipe(recipe)
    except ValueError as error:
        raise ConfigError(f'{point.variant.file}, {short}: {error}') from error
    config = {
        'dnb': point.variant.file.replace('_bn_', '_dnb_'),
        'dnc': point.variant.file.replace('_bn_', '_dnc_'),
    }.get(short)
    row = dict(
        question=question,
        data=compare.data_name(cfg),
        config=Path(config).stem if config else point.variant.name,
        seed=numbers['seed'],
        metric=METRICS[1],
        epochs=numbers['epochs'],
        lr=float(f'{numbers["lr"]:.6g}'),
        batch=numbers['batch'],
        commit=commit,
    )
    return dict(name=short, row=row, recipe=recipe)
