"""What tools/fold.py does: which layers of a trained model to fold, and what that costs.

Folds copies of the model, evaluates them, and writes a BatchNorm checkpoint with its config.
"""

import contextlib
import copy
import io
import logging
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..checkpoint import meta_of
from ..checks import preflight
from ..config_tree import add_imports, innermost, remove_imports
from ..convert import misfolded
from ..experiments.controls import PartlyConverted
from ..experiments.cost import first_image, mult_adds
from ..experiments.report import markdown_table
from ..experiments.results import main_metric
from ..files import replacing, write_text
from ..fold import (
    LayerReport,
    PartlyFolded,
    RewrittenBN,
    calibrate,
    foldable,
    measure,
    most_varying,
    named,
    recalibrate,
    replace_layers,
)
from ..layers import _DynamicNorm
from ..messages import ConfigError, some, wants_larger_batch
from ..registered import is_of, resolve

SUFFIXES = ('.pth', '.py', '.md', '.png')  # of what `write` writes
BATCH_NORMS = {
    nn.BatchNorm1d: 'BN1d',
    nn.BatchNorm2d: 'BN',
    nn.BatchNorm3d: 'BN3d',
    nn.SyncBatchNorm: 'SyncBN',
}
TIMED = 15  # forward passes of each model
TRIED = 8  # of the layers that a search kept, how many it then tries to fold after all


class Row(NamedTuple):
    """A model with some layers folded: a line of the table."""

    kept: tuple[str, ...]  # layers that are dynamic
    value: float  # of the metric
    recalibrated: bool  # whether its running statistics were estimated again
    parameters: int
    mult_adds: int
    milliseconds: float
    changed: float | None = None  # the metric on changed images


# Configs.


def with_batch_norm(node):
    """A model's config with BatchNorm wherever it has Dynamic Normalization."""
    if isinstance(node, (list, tuple)):
        return type(node)(with_batch_norm(child) for child in node)
    if not isinstance(node, dict):
        return node
    if resolve(MODELS, node.get('type')) in (PartlyConverted, PartlyFolded):
        return with_batch_norm(node['part'])
    if is_of(MODELS, node, (_DynamicNorm, RewrittenBN)):
        cls = resolve(MODELS, node['type'])
        kept = {
            key: node[key] for key in ('eps', 'momentum', 'track_running_stats') if key in node
        }
        if not (node.get('requires_grad', True) and node.get('bn_requires_grad', True)):
            kept['requires_grad'] = False
        return type(node)(kept, type=BATCH_NORMS[getattr(cls, 'bn_type', nn.BatchNorm2d)])
    return type(node)({key: with_batch_norm(child) for key, child in node.items()})


def folded_config(cfg: Config, names, dynamic) -> Config:
    """The config of the model in which only the layers ``dynamic`` of ``names`` are dynamic.

    Where there is none it needs nothing of this package but what else the config names.
    """
    cfg = copy.deepcopy(cfg)
    if dynamic:
        for key, node in list(cfg.model.items()):
            if isinstance(node, (list, tuple)):
                cfg.model[key] = [
                    _folded_part(child, f'{key}.{i}.', names, dynamic)
                    for i, child in enumerate(node)
                ]
            else:
                cfg.model[key] = _folded_part(node, f'{key}.', names, dynamic)
    else:
        cfg.model = with_batch_norm(cfg.model)
        if isinstance(cfg.get('norm_cfg'), dict):
            cfg.norm_cfg = with_batch_norm(cfg.norm_cfg)
    if cfg.get('custom_hooks'):
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.get('type') != 'RecordRun']
    remove_imports(
        cfg,
        'dn_mmdet',
        'dn_mmdet.experiments.controls',
        'dn_mmdet.experiments.recording',
        'dn_mmdet.fold',
    )
    if dynamic:
        add_imports(cfg, 'dn_mmdet.fold')
    return cfg


def _folded_part(node, prefix, names, dynamic):
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    kept = [name for name in inside if f'{prefix}{name}' in dynamic]
    if not isinstance(node, dict) or len(kept) == len(inside):
        return node
    if not kept:
        return with_batch_norm(node)
    return dict(type='PartlyFolded', part=node, dynamic=kept)


def built(cfg: Config) -> nn.Module:
    """The model of a config as mmengine's runner builds it, on the CPU.

    Raises:
        ConfigError: see `check_model`.
    """
    cfg = copy.deepcopy(cfg)
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return preflight.check_model(cfg)


def check_twin(cfg: Config, model: nn.Module) -> None:
    """Raises ConfigError where the config with BatchNorm builds more than another norm."""
    wanted = {}
    inside = {f'{name}.' for names in foldable(model).values() for name in names}
    for key, value in model.state_dict().items():
        layer = next((name for name in inside if key.startswith(name)), '')
        leaf = key.removeprefix(layer)
        if not layer or leaf.startswith('bn.'):
            wanted[layer + leaf.removeprefix('bn.')] = value.shape
    twin = built(folded_config(cfg, (), ())).state_dict()
    affine = {f'{name}{leaf}' for name in inside for leaf in ('weight', 'bias')}
    differing = sorted(
        key
        for key in {*wanted, *twin} - affine
        if key not in wanted or key not in twin or wanted[key] != twin[key].shape
    )
    if differing:
        raise ConfigError(
            f'{cfg.filename}: with BatchNorm in the place of Dynamic Normalization '
            f'it builds a model that differs in more than the norm, in '
            f'{len(differing)} weights ({some(differing)}): fold the model in '
            f'Python, by dn_mmdet.fold.fold_norm'
        )


# Data.


def calibration_dataset(cfg: Config) -> dict:
    """The config's training data, each image once and as evaluation reads it."""
    _, evaluated = next(innermost(cfg.val_dataloader.dataset, 'val_dataloader.dataset'))
    pipeline = evaluated.get('pipeline')

    def plain(dataset):
        if isinstance(dataset.get('dataset'), dict):  # repeated, mixed, balanced
            return plain(dataset['dataset'])
        if dataset.get('datasets'):
            return dict(dataset, datasets=[plain(child) for child in dataset['datasets']])
        return dict(dataset, pipeline=pipeline, test_mode=True)

    return plain(copy.deepcopy(cfg.train_dataloader.dataset))


class Calibration:
    """Some training images, drawn at random, and batches of them."""

    def __init__(self, cfg, images, collate):
        self.dataset = DATASETS.build(calibration_dataset(cfg))
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(0))
        self.chosen = order[:images].tolist()
        if len(self.chosen) < 2:
            raise ConfigError(
                f'--images: expected at least 2 training images, there are {len(self.chosen)}'
            )
        self.collate = collate
        # SC sees an image in the padding of its batch; statistics of batches want more of them.
        self.evaluated = cfg.val_dataloader.batch_size
        self.trained = cfg.train_dataloader.batch_size

    def halves(self):
        middle = len(self.chosen) // 2
        return self.chosen[:middle], self.chosen[middle:]

    def batches(self, chosen, batch_size):
        return DataLoader(Subset(self.dataset, chosen), batch_size, collate_fn=self.collate)


class Evaluation:
    """The config's own evaluation; calling it gives the metric of a model.

    Args:
        metric (str | None): by default `main_metric`.
        prepare (bool): prepare images as the config's ``data_preprocessor`` does, and not
            as that of the model.
    """

    def __init__(self, cfg, metric=None, prepare=False):
        self.preprocessor = built(cfg).data_preprocessor.to(get_device()) if prepare else None
        self.loader = Runner.build_dataloader(copy.deepcopy(cfg.val_dataloader))
        self.evaluator = Evaluator(copy.deepcopy(cfg.val_evaluator))
        self.evaluator.dataset_meta = getattr(self.loader.dataset, 'metainfo', None)
        self.metric = metric

    @torch.no_grad()
    def metrics(self, model) -> dict:
        """All that the evaluator gives."""
        model.eval()
        if self.preprocessor is not None:
            model = copy.deepcopy(model)
            model.data_preprocessor = self.preprocessor
        with quiet():
            for batch in self.loader:
                self.evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
            return self.evaluator.evaluate(len(self.loader.dataset))

    def __call__(self, model) -> float:
        found = self.metrics(model)
        if self.metric is None:
            self.metric = main_metric(found)
        if self.metric not in found:
            raise ConfigError(
                f'--metric: the evaluator gives no {self.metric!r}, but {", ".join(found)}'
            )
        return float(found[self.metric])

    def one_image(self, model):
        """Arguments of a model's forward, of the first image."""
        return first_image(model, self.loader)


@contextlib.contextmanager
def quiet():
    """Neither pycocotools nor the metrics print their tables."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


# Folding.


class Folding:
    """A trained model, what its layers make of calibration images, and folded copies of it.

    Args:
        model: with its weights, on the device to evaluate on.
        calibration (Calibration): the images.
        evaluation (Evaluation): gives a model's metric.
        changed (Evaluation | None): on changed images, which calibration does not see.
        log: called with a line of text about what goes on.
    """

    def __init__(self, model, calibration, evaluation, log=print, changed=None):
        self.model, self.calibration = model.eval(), calibration
        self.evaluation, self.changed, self.log = evaluation, changed, log
        self.values = {}
        nothing = measure(model, {})
        self.halves = None
        if all(row.share == 0 for row in nothing):  # constants
            self.outputs, self.report = {}, nothing
            return
        self.halves = [
            calibrate(model, calibration.batches(half, calibration.evaluated))
            for half in calibration.halves()
        ]
        self.outputs, second = dict(self.halves[0]), self.halves[1]
        for name, made in second.items():
            self.outputs[name] = self.outputs[name] + made if name in self.outputs else made
        self.report = measure(model, self.outputs)

    def names(self):
        return [row.name for row in self.report]

    def unreached(self):
        return [row.name for row in self.report if math.isnan(row.share)]

    def folded(self, kept, outputs=None) -> nn.Module:
        model = copy.deepcopy(self.model)
        replace_layers(model, outputs or self.outputs, self.report, kept)
        return model

    def best(self, kept, enough=None) -> tuple[float, bool]:
        """The metric with only these layers dynamic, and whether of new running statistics.

        New ones are tried unless the old ones give ``enough``.
        """
        kept = frozenset(kept)
        key = kept, False
        if key not in self.values:
            self.values[key] = self.evaluation(self.folded(kept))
            self.log(f'{len(kept)} layers dynamic: {self.values[key]:.4g}')
        value = self.values[key]
        exact = self.halves is None or len(kept) == len(self.report)
        if exact or enough is not None and value >= enough:
            return value, False
        if (kept, True) not in self.values:
            self.values[kept, True] = self._recalibrated(kept)
        return max((value, False), (self.values[kept, True], True), key=lambda pair: pair[0])

    def _recalibrated(self, kept):
        model = self.folded(kept)
        if not self.recalibrate(model, self.calibration.chosen):
            return float('-inf')
        return self.evaluation(model)

    def recalibrate(self, model, chosen) -> bool:
        """New running statistics; False where the batches are too small for them."""
        try:
            recalibrate(model, self.calibration.batches(chosen, self.calibration.trained))
        except ValueError as error:
            if not wants_larger_batch(error):
                raise
            return False
        return True

    def search(self, max_drop: float) -> list[str]:
        """The fewest layers to keep for a metric at most this far below the dynamic one.

        By bisection of the layers in the order in which they vary; then the costliest of
        those kept are tried one by one.
        """
        enough = self.best(self.names())[0] - max_drop
        order = most_varying(self.report, len(self.report))

        def good(kept):
            return self.best(kept, enough)[0] >= enough

        low, high = 0, len(order)  # high is good
        if good([]):
            return []
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if good(order[:middle]) else (middle, high)
        kept = order[:high]
        for name in sorted(kept, key=self.values_per_image().__getitem__, reverse=True)[:TRIED]:
            fewer = [other for other in kept if other != name]
            if good(fewer):
                kept = fewer
        return kept

    @torch.no_grad()
    def values_per_image(self) -> dict[str, int]:
        """How many values the maps of each layer have: what keeping it costs."""
        found = dict.fromkeys(self.names(), 0)
        handles = [
            layer.register_forward_pre_hook(
                lambda _, given, name=name: found.update({name: found[name] + given[0].numel()})
            )
            for layer, (name, *_) in foldable(self.model).items()
        ]
        try:
            self.model(*self.evaluation.one_image(self.model), mode='tensor')
        finally:
            for handle in handles:
                handle.remove()
        return found

    def of_halves(self, kept, recalibrated) -> list[float]:
        """The metric with what each half of the images alone gives."""
        values = []
        for outputs, half in zip(self.halves, self.calibration.halves(), strict=True):
            model = self.folded(kept, outputs)
            if recalibrated:
                self.recalibrate(model, half)
            values.append(self.evaluation(model))
        return values

    def final(self, kept, recalibrated) -> nn.Module:
        model = self.folded(kept)
        if recalibrated:
            self.recalibrate(model, self.calibration.chosen)
        return model

    def rows(self, sets) -> list[Row]:
        """The table's lines for some sets of dynamic layers; times taken in turns."""
        sets = sorted({frozenset(kept) for kept in sets}, key=len, reverse=True)
        found = [(kept, *self.best(kept)) for kept in sets]
        models = [fused(self.folded(kept)) for kept in sets]
        data = self.evaluation.one_image(self.model)
        times = milliseconds(models, data)
        rows = []
        for (kept, value, recalibrated), model, took in zip(found, models, times, strict=True):
            changed = self.changed and self.changed(self.final(kept, recalibrated))
            counted = mult_adds(model, lambda model=model: model(*data, mode='tensor'))
            rows.append(
                Row(
                    tuple(name for name in self.names() if name in kept),
                    value,
                    recalibrated,
                    sum(p.numel() for p in model.parameters()),
                    sum(counted.values()),
                    took,
                    changed,
                )
            )
        return rows


def fused(model: nn.Module) -> nn.Module:
    """A model with its BatchNorms folded into the convolutions, where that is right."""
    return model if list(misfolded(model)) else fuse_conv_bn(model.eval())


@torch.no_grad()
def milliseconds(models, data, timed=TIMED) -> list[float]:
    """The median time of a forward pass of each model, one of each in turn."""
    times = [[] for _ in models]
    for _ in range(timed + 2):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(*data, mode='tensor')
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[2:]) for taken in times]


class Result(NamedTuple):
    rows: list[Row]
    chosen: Row
    model: nn.Module  # folded as chosen
    report: list[LayerReport]
    metric: str
    images: int  # for calibration; 0 where none were needed
    halves: list[float]  # the metric with each half of them; empty where none were needed


def fold(
    cfg: Config,
    model: nn.Module,
    images=512,
    keep=None,
    max_drop=None,
    metric=None,
    curve=True,
    log=print,
    changed=None,
) -> Result:
    """Folds a trained model of a config as tools/fold.py is asked to; nothing is written.

    Args:
        keep: see `fold_norm`; by default nothing.
        max_drop (float | None): search the fewest layers instead, for this loss of the metric.
        curve (bool): evaluate with a half, a quarter and an eighth of the layers dynamic too.
        changed (Config | None): evaluate each model also as this config says, with its images
            and ``data_preprocessor``; calibration and the choice of layers do not see it.

    Raises:
        ConfigError: see `Calibration` and `Evaluation`.
        ValueError: see `fold_norm`.
    """
    by_name = named(foldable(model), keep)
    model = model.to(get_device())
    with quiet():
        evaluation = Evaluation(cfg, metric)
        calibration = Calibration(cfg, images, evaluation.loader.collate_fn)
        on_changed = changed and Evaluation(changed, metric, prepare=True)
    folding = Folding(model, calibration, evaluation, log, on_changed)
    names = folding.names()
    if max_drop is not None:
        kept = folding.search(max_drop)
    elif isinstance(keep, int):
        kept = most_varying(folding.report, keep)
    else:
        kept = by_name
    kept = sorted({*kept, *folding.unreached()}, key=names.index)
    sets = [names, kept, folding.unreached()]
    if folding.halves and curve:
        sets += [most_varying(folding.report, len(names) // part) for part in (2, 4, 8)]
    rows = folding.rows(sets)
    chosen = next(row for row in rows if set(row.kept) == set(kept))
    final = folding.final(kept, chosen.recalibrated).cpu()
    report = [row._replace(folded=row.name not in kept) for row in folding.report]
    halves = folding.of_halves(kept, chosen.recalibrated) if folding.halves else []
    return Result(
        rows,
        chosen,
        final,
        report,
        evaluation.metric,
        len(calibration.chosen) if halves else 0,
        halves,
    )


# What is written.


def check_out(out: Path) -> None:
    """Raises ConfigError where a result would replace a file or cannot be written."""
    if out.suffix != '.pth':
        raise ConfigError(f'--out: expected a file name in .pth, got {out}')
    there = [path for path in map(out.with_suffix, SUFFIXES) if path.exists()]
    if there:
        raise ConfigError(f'{some(there)}: exists already; name another file with --out')
    preflight.make_folder(out.parent, '--out')


def write(result: Result, cfg: Config, checkpoint: dict, out: Path) -> str:
    """The checkpoint, its config, the tables and the figure; returns what the tables say.

    Raises:
        ConfigError: the checkpoint would not load into the config. Nothing was written then.
    """
    dynamic = result.chosen.kept
    cfg = folded_config(cfg, [row.name for row in result.report], dynamic)
    cfg = Config(cfg.to_dict())  # names in place of classes
    state = result.model.state_dict()
    try:
        built(Config.fromstring(cfg.pretty_text, '.py')).load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f'{out}: not written, the folded weights do not fit the config that '
            f'belongs to them: {error}'
        ) from error
    meta = dict(
        meta_of(checkpoint),
        cfg=cfg.pretty_text,
        folded=dict(
            layers=[row.name for row in result.report if row.folded], dynamic=list(dynamic)
        ),
    )
    text = in_words(result)
    figure = io.BytesIO()  # drawn before anything is written
    draw(result, figure)
    with replacing(out) as part:
        torch.save(dict(meta=meta, state_dict=state), part)
    write_text(out.with_suffix('.py'), cfg.pretty_text)
    write_text(out.with_suffix('.md'), text)
    with replacing(out.with_suffix('.png')) as part:
        part.write_bytes(figure.getvalue())
    return text


def in_words(result: Result) -> str:
    """The table of the models, a sentence about the images, and the table of the layers."""
    return (
        f'{_models_table(result)}\n'
        f'Chosen: {row_name(result.chosen, result)}. Times are of the network alone, one '
        f'image, BatchNorms folded into convolutions, {timed_on()}.\n'
        f'{_about_images(result)}\n{_layers_table(result)}'
    )


def _models_table(result):
    first = result.rows[0]
    header = [
        'layers',
        result.metric,
        'to dynamic',
        'new statistics',
        'parameters',
        'Mult-Adds',
        'ms per image',
    ]
    lines = [
        [
            row_name(row, result),
            f'{row.value:.4g}',
            f'{row.value - first.value:+.4g}',
            'yes' if row.recalibrated else 'no',
            f'{row.parameters / 1e6:.3f} M',
            f'{row.mult_adds / 1e6:.2f} M',
            f'{row.milliseconds:.2f}',
        ]
        for row in result.rows
    ]
    if first.changed is not None:
        header.append('on changed images')
        for row, line in zip(result.rows, lines, strict=True):
            line.append(f'{row.changed:.4g}')
    return markdown_table(header, lines)


def _about_images(result):
    if not result.halves:
        return 'All layers have constant scale and shift: folding is exact.\n'
    first, second = result.halves
    return (
        f'Calibrated with {result.images} training images; with the first and the second '
        f'half of them alone {result.metric} is {first:.4g} and {second:.4g}, '
        f'{abs(first - second):.4g} apart. They have to be like the images that the model '
        f'will see: for others, fold again.\n'
    )


def _layers_table(result):
    header = ['layer', 'was', 'std of g', 'std of h', 'share of variance', 'now']
    lines = [
        [
            row.name,
            row.kind,
            f'{row.g_std:.4f}',
            f'{row.h_std:.4f}',
            f'{row.share:.2e}',
            _became(row),
        ]
        for row in result.report
    ]
    return markdown_table(header, lines)


def _became(row):
    if row.folded:
        return 'BatchNorm'
    return 'dynamic, reached by no image' if math.isnan(row.share) else 'dynamic'


def row_name(row: Row, result: Result) -> str:
    """'12 of 66 dynamic'"""
    count, all_layers = len(row.kept), len(result.report)
    if count == all_layers:
        return 'all dynamic'
    return f'{count} of {all_layers} dynamic' if count else f'all {all_layers} folded'


def timed_on() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f'CPU, {threads} thread{"s" if threads > 1 else ""}'


def draw(result: Result, out) -> None:
    """The metric over the time for an image, as PNG."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
    rows = result.rows
    axes.plot([row.milliseconds for row in rows], [row.value for row in rows], 'o-')
    for row in rows:
        axes.annotate(
            row_name(row, result),
            (row.milliseconds, row.value),
            fontsize=8,
            textcoords='offset points',
            xytext=(4, 6),
        )
    axes.plot(result.chosen.milliseconds, result.chosen.value, 'o', ms=12, mfc='none')
    axes.set(xlabel=f'ms per image, network alone, {timed_on()}', ylabel=result.metric)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110, format='png')
    plt.close(figure)
