"""The grid of tools/compare.py: configs x seeds x learning rates x batches x epochs.

A run is a folder and a training process in it, and then one that evaluates it with its DN
layers folded. Everything that is known about a run stands in its folder, so that a killed
grid goes on with what is there.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS, PARAM_SCHEDULERS
from mmengine.config import Config
from mmengine.dataset import RepeatDataset
from mmengine.optim.scheduler import ExponentialParamScheduler
from rich.progress import (
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..checkpoint import CheckpointError, check_resumable, open_checkpoint
from ..checks import preflight
from ..checks.evaluators import metrics_of
from ..config_tree import add_imports
from ..files import read_json, write_json
from ..messages import ConfigError
from ..provenance import ROOT
from ..registered import is_of, name_of
from .recording import PARENT, nothing_to_fold, read_log

TRAIN = ROOT / 'tools' / 'train.py'
# glibc returns large blocks to the system at every free and asks for them again at the
# next step: a fifth of the time on a CPU.
ALLOCATOR = dict(MALLOC_TRIM_THRESHOLD_='4294967296', MALLOC_MMAP_MAX_='0')
# How frameworks say that values are no numbers any more before the loss shows it.
DIVERGED = re.compile(
    r'^(.*(become infinite or NaN|contains invalid numeric entries).*)$', re.MULTILINE
)
# Of a param_scheduler: what counts epochs or iterations, and what is a learning rate.
DURATIONS = ('begin', 'end', 'T_max', 'total_steps', 'step_size', 'total_iters')
DURATION_LISTS = ('milestones', 'restarts')  # increasing
# Of hooks that change something on the way: before the last epoch at the latest.
HOOK_EPOCHS = ('switch_epoch', 'begin_epoch', 'num_last_epochs')
RATES = ('eta_max', 'eta_min')
FOLD = 'dn_mmdet.deploy.fold_run'  # the module that evaluates a finished run folded
# The metric with all or most DN layers folded, and with all folded and new running statistics.
FOLDED = ('folded', 'folded_most', 'folded_recalibrated')
EPOCH = re.compile(r'epoch_(\d+)\.pth')
LOGS = dict(training='output.log', folding='folding.log')
TAIL = 15  # lines of a failed run's output that are shown


@dataclass(frozen=True)
class NamedConfig:
    """A config of the comparison, under the name that tables call it by."""

    name: str
    file: str
    cfg: Config = field(compare=False, repr=False)
    different: tuple = field(default=(), compare=False)  # from the first, in more than the norm


@dataclass(frozen=True)
class Point:
    """Where in the grid a run is; None leaves the config's own value."""

    variant: NamedConfig
    seed: int
    lr_factor: float = 1.0
    batch: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Run:
    """A training in a folder; ``spec`` is what run.json holds."""

    folder: Path
    spec: dict = field(compare=False)
    cfg: Config = field(compare=False, repr=False)

    @property
    def name(self):
        return f'{self.folder.parent.name}/{self.folder.name}'


def product(variants, seeds, lr_factors=(1.0,), batches=(None,), epochs=None) -> list[Point]:
    """Every combination, seeds outermost: a grid that is cut short has whole comparisons."""
    return [
        Point(variant, seed, factor, batch, epochs)
        for seed in seeds
        for factor in lr_factors
        for batch in batches
        for variant in variants
    ]


def choose(points: list[Point], names) -> list[Point]:
    """The points of the first variant and of those named.

    Raises:
        ConfigError: there is no variant of such a name.
    """
    first, *others = dict.fromkeys(point.variant.name for point in points)
    unknown = set(names) - {first, *others}
    if unknown:
        raise ConfigError(
            f'{", ".join(sorted(unknown))}: no such variant; expected some of {", ".join(others)}'
        )
    return [point for point in points if point.variant.name in {first, *names}]


def check(points, allow_different=False) -> list[Point]:
    """Builds each model once and looks for the data, before anything is written.

    Returns:
        the points, each variant with what it differs in from the first.

    Raises:
        ConfigError: a variant differs in more than the norm and that is not allowed,
            or see `preflight`.
    """
    first = points[0].variant
    checked = {}
    for variant in dict.fromkeys(point.variant for point in points):
        found = differences(first.cfg, variant.cfg)
        if found and not allow_different:
            lines = '\n  '.join(found[:20])
            raise ConfigError(
                f'{variant.name} differs from {first.name} in more than the '
                f'norm:\n  {lines}\nGo on with --allow-different if that is meant'
            )
        model = preflight.check_model(variant.cfg)
        if variant == first:
            for split in ('train', 'val'):
                preflight.check_data(variant.cfg, split, model)
            preflight.check_same_classes(variant.cfg, ('train', 'val'))
        checked[variant] = replace(variant, different=tuple(found))
    return [replace(point, variant=checked[point.variant]) for point in points]


def differences(first: Config, other: Config) -> list[str]:
    """Options, apart from those of norms, in which two configs differ, with both values."""
    ours, theirs = _flat(first.to_dict()), _flat(other.to_dict())
    ignored = re.compile(r'(^|\.)norm_cfg(\.|$)|^(custom_imports|work_dir)(\.|$)')
    return [
        f'{key}: {ours.get(key, "not set")} and {theirs.get(key, "not set")}'
        for key in sorted(ours.keys() | theirs.keys())
        if not ignored.search(key) and ours.get(key) != theirs.get(key)
    ]


def _flat(node, name=''):
    """{'model.neck.in_channels.0': 96, ...}"""
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, (list, tuple)):
        children = enumerate(node)
    else:
        return {name[1:]: node}
    flat = {}
    for child, content in children:
        flat.update(_flat(content, f'{name}.{child}'))
    return flat


def configured(point: Point) -> tuple[Config, dict]:
    """The whole config of a run, and its numbers for the table.

    The learning rate is the config's for its own batch size, times ``lr_factor``,
    times the ratio of the batch sizes (the linear rule). Schedules keep their shape
    when epochs or batch change: what they count in epochs or iterations is scaled.

    Args:
        point: ``epochs`` are passes over the training data, of which a config's
            epoch has several with `RepeatDataset`.

    Raises:
        ConfigError: the config is not of a kind that this can be done with.
    """
    name, cfg = point.variant.name, copy.deepcopy(point.variant.cfg)
    optimizer = cfg.get('optim_wrapper', {}).get('optimizer', {})
    if 'lr' not in optimizer or 'max_epochs' not in (cfg.get('train_cfg') or {}):
        raise ConfigError(
            f'{name}: expected a config with optim_wrapper.optimizer.lr and '
            f'train_cfg.max_epochs; one optimizer, training by epochs'
        )
    loader, usual_epochs = cfg.train_dataloader, cfg.train_cfg.max_epochs
    usual_batch, times = loader.batch_size, _repeats(loader.dataset)
    batch, epochs = point.batch or usual_batch, _epochs(point, usual_epochs, times)
    rate = point.lr_factor * batch / usual_batch
    optimizer.lr *= _usual_rate(cfg, usual_batch)
    optimizer.lr *= rate
    _scale_schedules(cfg, rate, epochs / usual_epochs, usual_batch / batch)
    loader.batch_size = batch
    cfg.train_cfg.max_epochs = epochs
    _scale_switches(cfg, epochs / usual_epochs)
    if 'val_interval' in cfg.train_cfg:
        cfg.train_cfg.val_interval = min(cfg.train_cfg.val_interval, epochs)
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': point.seed}
    _have_it_recorded(cfg)
    return cfg, dict(
        seed=point.seed,
        lr_factor=point.lr_factor,
        lr=optimizer.lr,
        batch=batch,
        epochs=epochs * times,
    )


def _epochs(point, usual, times):
    """The config's epochs, each of which is ``times`` passes over the data."""
    if point.epochs is None:
        return usual
    if point.epochs % times:
        raise ConfigError(
            f'{point.variant.name}: --epochs {point.epochs} are passes over the '
            f'data, and an epoch of this config is {times} of them: choose a '
            f'multiple, or set --cfg-options train_dataloader.dataset.times=1'
        )
    return point.epochs // times


def _usual_rate(cfg, batch):
    """What auto_scale_lr multiplies the rate by; done here, so that the table has the result."""
    scaling = cfg.get('auto_scale_lr') or {}
    if not scaling.get('enable'):
        return 1
    cfg.auto_scale_lr.enable = False
    return batch / scaling['base_batch_size']


def _have_it_recorded(cfg):
    """Adds the checkpoints and the records that a run of the grid leaves."""
    for split in ('val', 'test'):
        _ask_for_classes(cfg.get(f'{split}_evaluator'))
    # Two, because mmengine removes the older one before it writes the new one.
    checkpoints = dict(type='CheckpointHook', interval=1, max_keep_ckpts=2)
    cfg.default_hooks = {**(cfg.get('default_hooks') or {}), 'checkpoint': checkpoints}
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='RecordRun')]
    add_imports(cfg, 'dn_mmdet.experiments.recording')


def _repeats(dataset):
    """How often wrappers repeat the training data in an epoch."""
    own = dataset.get('times', 1) if is_of(DATASETS, dataset, RepeatDataset) else 1
    return own * (_repeats(dataset['dataset']) if isinstance(dataset.get('dataset'), dict) else 1)


def _scale_schedules(cfg, rate, epochs, iterations):
    """Has schedules keep their shape.

    Args:
        rate: of the learning rate to the usual one.
        epochs, iterations: the same of the epochs, and of the iterations in an epoch.
    """
    schedulers = cfg.get('param_scheduler') or []
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        by_epoch = scheduler.get('by_epoch', True)
        _scale_schedule(scheduler, rate, epochs if by_epoch else epochs * iterations)
        if is_of(PARAM_SCHEDULERS, scheduler, ExponentialParamScheduler):
            stepped_by_epoch = by_epoch and not scheduler.get('convert_to_iter_based')
            scheduler['gamma'] **= 1 / (epochs if stepped_by_epoch else epochs * iterations)


def _scale_schedule(scheduler, rate, ratio):
    for key in RATES:
        if scheduler.get(key) is not None:
            scheduler[key] *= rate
    if ratio == 1:
        return
    for key in DURATIONS:
        if scheduler.get(key) not in (None, 0, -1):
            scheduler[key] = max(1, round(scheduler[key] * ratio))
    for key in DURATION_LISTS:
        if scheduler.get(key) is not None:
            scheduler[key] = sorted({max(1, round(value * ratio)) for value in scheduler[key]})
    if scheduler.get('periods'):  # each has a weight of its own
        scheduler['periods'] = [max(1, round(value * ratio)) for value in scheduler['periods']]
    if (scheduler.get('end') or float('inf')) <= (scheduler.get('begin') or 0):
        scheduler['end'] = scheduler['begin'] + 1


def _scale_switches(cfg, ratio):
    """Has hooks and evaluations that begin at an epoch do so at the same share of the training."""
    if ratio == 1:
        return
    last = max(1, cfg.train_cfg.max_epochs - 1)
    for hook in cfg.get('custom_hooks') or []:
        for key in HOOK_EPOCHS:
            if hook.get(key):
                hook[key] = min(last, max(1, round(hook[key] * ratio)))
    if cfg.train_cfg.get('dynamic_intervals'):
        cfg.train_cfg.dynamic_intervals = [
            (min(last, max(1, round(begin * ratio))), interval)
            for begin, interval in cfg.train_cfg.dynamic_intervals
        ]


def _ask_for_classes(evaluator):
    """Has mmdet's COCO metric report every class as well."""
    for _, metric in metrics_of(evaluator, 'val_evaluator'):
        if is_of(METRICS, metric, CocoMetric):
            metric['classwise'] = True


def plan(points, out, question, commit) -> list[Run]:
    """The runs of a grid, in folders under ``out``. Nothing is written.

    Raises:
        ConfigError: a folder holds a run of another config, or see `configured`.
    """
    runs = []
    for order, point in enumerate(points):
        cfg, numbers = configured(point)
        content = cfg.to_dict()
        folder = Path(
            out,
            point.variant.name,
            f'lr{numbers["lr_factor"]:g}-batch'
            f'{numbers["batch"]}-epochs{numbers["epochs"]}-seed{numbers["seed"]}',
        )
        spec = dict(
            question=question,
            data=data_name(cfg),
            config=point.variant.name,
            config_file=point.variant.file,
            **numbers,
            commit=commit,
            order=order,
            different=point.variant.different,
            config_hash=_digest(content),
            options_hash=_digest({**content, 'randomness': None}),  # that of all seeds
        )
        run = Run(folder, spec, cfg)
        _check_same(run)
        runs.append(run)
    return list(dict.fromkeys(runs))


def _digest(content):
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_same(run):
    there = read_json(run.folder / 'run.json')
    if there is not None and there['config_hash'] != run.spec['config_hash']:
        raise ConfigError(
            f'{run.folder}: holds a run of another config ({there["data"]}, '
            f'{there["config_file"]}, or options or the file changed since). '
            f'Choose another --out, or remove the folder'
        )


def data_name(cfg: Config) -> str:
    """What tables call the training data: the folder that it lies in."""
    dataset = cfg.train_dataloader.dataset
    while isinstance(dataset.get('dataset'), dict):
        dataset = dataset['dataset']
    root = str(dataset.get('data_root') or '').rstrip('/')
    return Path(root).name or name_of(dataset.get('type'))


def harvest(folder) -> dict | None:
    """`read_result`, which is then kept in result.json; of the checkpoints the last stays."""
    result = read_result(folder)
    if result is not None and not Path(folder, 'result.json').is_file():
        _keep_last_checkpoint(Path(folder))
        write_json(Path(folder, 'result.json'), result)
    return result


def read_result(folder) -> dict | None:
    """A run's result from what its process left behind; None where it has not ended."""
    folder = Path(folder)
    kept = read_json(folder / 'result.json')
    if kept is not None:
        return kept
    lines = read_log(folder)
    told, measured = _told_divergence(folder), read_json(folder / 'measured.json')
    if lines and 'diverged' in lines[-1] or told:
        result = dict(status='diverged', reason=told or lines[-1]['diverged'], metrics={})
    elif measured is not None:
        metrics = [line['metrics'] for line in lines if 'metrics' in line]
        result = dict(status='finished', metrics=metrics[-1] if metrics else {}, **measured)
    else:
        return None
    times = sorted(line['time'] for line in lines if 'time' in line)
    result.update(
        seconds=sum(line['seconds'] for line in lines),
        steps=lines[-1]['step'] if lines else 0,
        iteration_seconds=times[len(times) // 2] if times else None,
        starts=read_json(folder / 'starts.json', 0),
        run=read_json(folder / 'run.json', {}),
        environment=read_json(folder / 'environment.json', {}),
    )
    return result


def read_folded(folder) -> dict | None:
    """What `fold_run` wrote: metrics by column, or why there are none; None where it did not."""
    return read_json(Path(folder, 'folded.json'))


def awaits_folding(folder) -> bool:
    """Whether a finished run is still to be evaluated with its DN layers folded, and can be.

    Its checkpoint may be gone.
    """
    folder = Path(folder)
    result = read_result(folder)
    if result is None or result['status'] != 'finished' or read_folded(folder) is not None:
        return False
    return not nothing_to_fold(result['norms']) and last_checkpoint(folder) is not None


def keep_as_folded(folder, result) -> None:
    """A run without DN layers: folded it is what it is."""
    if result['status'] == 'finished' and read_folded(folder) is None:
        write_json(Path(folder, 'folded.json'), dict.fromkeys(FOLDED, result['metrics']))


def epoch_checkpoints(folder) -> list[Path]:
    """What the training wrote, first to last; not what was made of it, as epoch_8_folded.pth."""
    found = ((EPOCH.fullmatch(path.name), path) for path in Path(folder).glob('epoch_*.pth'))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def last_checkpoint(folder) -> Path | None:
    found = epoch_checkpoints(folder)
    return found[-1] if found else None


def _told_divergence(folder):
    log = folder / LOGS['training']
    found = DIVERGED.search(log.read_text(errors='replace')) if log.is_file() else None
    return found and found[1]


def run_grid(runs, jobs, console, folded=False, trust=False) -> dict[str, str]:
    """Trains what has not ended, ``jobs`` runs at once, and shows how far it is.

    A run that another process trains at the moment is waited for. However this is
    left, no training stays behind.

    Args:
        folded (bool): evaluate runs that have finished, now or before, with their DN
            layers folded too.
        trust (bool): hand ``--trust-checkpoint`` to the trainings.

    Returns:
        the ends of the output of runs that failed, by name.
    """
    waiting = [run for run in runs if not is_done(run.folder, folded)]
    done = len(runs) - len(waiting)
    console.print(f'{len(runs)} runs, {done} of them ended before; {jobs} at once')
    columns = (
        *Progress.get_default_columns()[:-1],
        TimeElapsedColumn(),
        TextColumn('left:'),
        TimeRemainingColumn(),
        TextColumn('{task.fields[note]}'),
    )
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        grid = _Grid(waiting, jobs, progress, folded, trust)
        try:
            while grid.waiting or grid.running:
                grid.start()
                time.sleep(0.2)
                grid.update()
        finally:
            _end([child.process for child in grid.running.values()])
    return grid.failures


def is_done(folder, folded) -> bool:
    """Whether a run has ended and, where that is asked for, has been evaluated folded."""
    result = harvest(folder)
    if folded and result is not None and nothing_to_fold(result.get('norms', ())):
        keep_as_folded(folder, result)
    return result is not None and not (folded and awaits_folding(folder))


class _Child(NamedTuple):
    process: subprocess.Popen
    task: str  # of `LOGS`
    slot: int  # of the ``jobs``
    bar: TaskID


class _Grid:
    """Runs that wait, that are trained or folded, each in a process of its own, or have ended."""

    def __init__(
        self, waiting: list[Run], jobs: int, progress: Progress, folded: bool, trust: bool
    ):
        self.waiting, self.jobs, self.progress = waiting, jobs, progress
        self.folded, self.trust = folded, trust
        self.running: dict[Run, _Child] = {}
        self.failures: dict[str, str] = {}
        self.ended = 0
        self.all_runs = progress.add_task('all runs', total=max(len(waiting), 1e-9), note='')

    def start(self):
        """Fills the free slots."""
        for slot in sorted(set(range(self.jobs)) - {each.slot for each in self.running.values()}):
            run = next(
                (run for run in self.waiting if not preflight.is_reserved(run.folder)), None
            )
            if run is None:
                return
            self.waiting.remove(run)
            if is_done(run.folder, self.folded):  # by the process that held it
                self.ended += 1
                continue
            bar = self.progress.add_task(run.name, total=1, note='')
            task = 'training' if harvest(run.folder) is None else 'folding'
            process = _start(run, task, _environment(slot, self.jobs), self.trust)
            self.running[run] = _Child(process, task, slot, bar)

    def update(self):
        """Shows how far each run is, and takes in those that have ended."""
        shares = 0.0
        for run, child in list(self.running.items()):
            share, note = (1, 'folding') if child.task == 'folding' else _share_done(run.folder)
            self.progress.update(child.bar, completed=share, note=note)
            if child.process.poll() is None:
                shares += share
            else:
                self._take_in(run)
        self.progress.update(self.all_runs, completed=self.ended + shares)

    def _take_in(self, run):
        process, task, _, bar = self.running.pop(run)
        self.progress.remove_task(bar)
        result = harvest(run.folder)
        is_trained = task == 'training' and result is not None
        if is_trained:
            self.progress.console.print(f'{run.name}: {result["status"]}')
        if is_done(run.folder, self.folded):
            self.ended += 1
        elif is_trained:
            self.waiting.insert(0, run)  # to be folded
        elif process.returncode == preflight.FolderInUse.exit_code:
            self.waiting.append(run)  # another process had begun to work in it meanwhile
        else:
            self.ended += 1
            self.failures[run.name] = _failure(run.folder, task, process.returncode)
            self.progress.console.print(f'{run.name}: {task} failed')


def _start(run, task, environment, trust):
    """The process that trains a run, or that folds one that has finished."""
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'failure.json').unlink(missing_ok=True)
    command = _training(run, trust) if task == 'training' else ['-m', FOLD, folder]
    # A new file: the process of a killed grid may still hold the old one.
    (folder / LOGS[task]).unlink(missing_ok=True)
    with open(folder / LOGS[task], 'w') as log:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )


def _training(run, trust):
    """The command of a training, from the last whole checkpoint where there is one."""
    folder = run.folder
    write_json(folder / 'run.json', run.spec)
    write_json(folder / 'starts.json', read_json(folder / 'starts.json', 0) + 1)
    cfg = copy.deepcopy(run.cfg)
    cfg.work_dir, cfg.launcher = str(folder), 'none'  # so that the training may replace the file
    cfg.dump(folder / 'config.py')
    trusted = ['--trust-checkpoint'] if trust else []
    return [TRAIN, folder / 'config.py', '--work-dir', folder, *_resume(folder), *trusted]


def _resume(folder):
    """Options that continue a run: from the last checkpoint that can be opened.

    mmengine's own file last_checkpoint holds a path of the machine that wrote it,
    and a kill can cut a checkpoint off.
    """
    for path in reversed(epoch_checkpoints(folder)):
        try:
            check_resumable(open_checkpoint(path), path)
        except CheckpointError:
            continue
        return ['--resume', path]
    preflight.remove_checkpoints(folder)
    return []


def _environment(slot, jobs):
    environment = {**ALLOCATOR, **os.environ, PARENT: str(os.getpid())}
    environment.setdefault('OMP_NUM_THREADS', str(max(1, cores() // jobs)))
    if torch.cuda.device_count() > 1:
        listed = os.environ.get('CUDA_VISIBLE_DEVICES')
        devices = listed.split(',') if listed else range(torch.cuda.device_count())
        environment['CUDA_VISIBLE_DEVICES'] = str(devices[slot % len(devices)])
    return environment


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _share_done(folder):
    """The share of its steps that a run has made, and its last loss in words."""
    lines = read_log(folder)
    if not lines:
        return 0, 'starting'
    losses = [line['loss'] for line in lines if 'loss' in line]
    return lines[-1]['step'] / lines[-1]['steps'], f'loss {losses[-1]:.3g}' if losses else ''


def _keep_last_checkpoint(folder):
    """The weights of a run that has ended; the one before was for the case of a kill."""
    for path in epoch_checkpoints(folder)[:-1]:
        path.unlink()


def _tail(log):
    return '\n'.join(log.read_text(errors='replace').splitlines()[-TAIL:])


def _failure(folder, task, code):
    log = folder / LOGS[task]
    tail = _tail(log)
    if task == 'training':
        write_json(folder / 'failure.json', dict(exit_code=code, output=tail))
    return f'exit code {code}; the end of {log}:\n{tail}'


def _end(processes):
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
