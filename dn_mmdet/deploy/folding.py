"""Which layers of a trained model to fold, and what that costs.

Folds copies of the model and evaluates them; tools/fold.py writes what comes of it.
"""

import contextlib
import copy
import io
import logging
import math
import statistics
import time
from numbers import Integral
from typing import NamedTuple

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..config_tree import innermost
from ..convert import misfolded
from ..experiments.cost import first_image, mult_adds
from ..experiments.results import main_metric
from ..fold import (
    LayerReport,
    calibrate,
    foldable,
    measure,
    most_varying,
    named,
    recalibrate,
    replace_layers,
    values_of_maps,
)
from ..messages import ConfigError, wants_larger_batch
from .folded_config import built

TIMED = 15  # forward passes of each model
TRIED = 8  # of the layers that a search kept, how many it then tries to fold after all


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
        self.evaluated = cfg.val_dataloader.get('batch_size', 1)
        self.trained = cfg.train_dataloader.get('batch_size', 1)

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


class Row(NamedTuple):
    """A model with some layers folded: a line of the table."""

    kept: tuple[str, ...]  # layers that are dynamic
    value: float  # of the metric
    recalibrated: bool  # whether its running statistics were estimated again
    parameters: int
    mult_adds: int
    milliseconds: float
    changed: float | None = None  # the metric on changed images


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

    def values_per_image(self) -> dict[str, int]:
        """How many values the maps of each layer have: what keeping it costs."""
        data = self.evaluation.one_image(self.model)
        return values_of_maps(self.model, lambda: self.model(*data, mode='tensor'))

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
    keep = int(keep) if isinstance(keep, Integral) else keep  # numpy's
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
        sets += [
            [*most_varying(folding.report, len(names) // part), *folding.unreached()]
            for part in (2, 4, 8)
        ]
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
