"""Evaluators: what would end a training at its first evaluation, after an epoch or more.

mmengine builds metrics before a training, and looks at what they are given afterwards.
Only mmdet's `CocoMetric` is known here; others have to say for themselves what is wrong.
"""

import inspect
from collections.abc import Iterator

from mmdet.evaluation import CocoMetric, MultiDatasetsEvaluator
from mmdet.models.dense_heads import DETRHead, GFLHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.registry import EVALUATOR, HOOKS, METRICS
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from torch import nn

from ..messages import ConfigError, did_you_mean, reason
from ..registered import is_of, resolve

# The names that `CocoMetric` gives its results, by what it evaluates.
AP = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
AR = ('AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000')
# Heads that need to know by which factor an image was resized.
RESCALING = (BaseDenseHead, GFLHead, DETRHead, BBoxHead)


def metrics_of(evaluator, option: str) -> Iterator[tuple[str, dict]]:
    """Option and config of each metric of an evaluator, in all forms that mmengine takes."""
    if isinstance(evaluator, dict) and 'metrics' in evaluator:
        yield from metrics_of(evaluator['metrics'], f'{option}.metrics')
    elif isinstance(evaluator, dict):
        yield option, evaluator
    elif isinstance(evaluator, (list, tuple)):
        for index, metric in enumerate(evaluator):
            yield from metrics_of(metric, f'{option}.{index}')


def check_metrics(cfg: Config, split: str, model: nn.Module, samples: dict) -> None:
    """Raises ConfigError where the first evaluation would certainly fail.

    Args:
        split: 'val' or 'test'.
        samples: by the option of a data set, what its pipeline makes of its first image.
    """
    evaluator = cfg.get(f'{split}_evaluator')
    metrics = list(metrics_of(evaluator, f'{split}_evaluator'))
    for option, metric in metrics:
        if _is_coco(metric, '__init__'):
            _check_arguments(option, metric)
        if _is_coco(metric, 'compute_metrics'):
            _check_items(option, metric)
            _check_thresholds(option, metric)
            _check_masks_are_found(option, metric, model)
    if not metrics:
        return
    for option, sample in samples.items():
        _check_rescaling(option, sample, model)
        for other, metric in metrics:
            if _is_coco(metric, 'process'):
                _check_meta(option, sample, other, metric)
    if not is_of(EVALUATOR, evaluator, MultiDatasetsEvaluator):
        _check_names(metrics)
        if split == 'val' and all(_is_coco(metric, 'compute_metrics') for _, metric in metrics):
            _check_save_best(cfg, [name for _, metric in metrics for name in _names(metric)])


def _is_coco(metric, method):
    """Whether a metric does something as `CocoMetric` does it."""
    cls = resolve(METRICS, metric.get('type'))
    return inspect.isclass(cls) and getattr(cls, method, None) is getattr(CocoMetric, method)


def _kinds(metric):
    """What is evaluated: 'bbox', 'segm', ..."""
    kinds = metric.get('metric', 'bbox')
    return list(kinds) if isinstance(kinds, (list, tuple)) else [kinds]


def _check_arguments(option, metric):
    known = list(inspect.signature(CocoMetric).parameters)
    for argument in metric.keys() - {'type', '_scope_', *known}:
        raise ConfigError(
            f'{option}.{argument}: {resolve(METRICS, metric["type"]).__name__} has no such '
            f'argument{did_you_mean(argument, known)}'
        )
    try:  # without the file, which is checked elsewhere
        METRICS.build({**metric, 'ann_file': None})
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f'{option}: {reason(error)}') from error


def _check_items(option, metric):
    if metric.get('format_only') or not {'bbox', 'segm', 'proposal'} & {*_kinds(metric)}:
        return
    for item in metric.get('metric_items') or []:
        if item not in AP + AR:
            raise ConfigError(
                f'{option}.metric_items: there is no item {item!r}'
                f'{did_you_mean(item, list(AP + AR))}'
            )


def _check_thresholds(option, metric):
    """pycocotools makes its summary at thresholds of its own."""
    if (
        metric.get('format_only')
        or metric.get('use_mp_eval')
        or not {'bbox', 'segm', 'proposal'} & {*_kinds(metric)}
    ):
        return
    thresholds, numbers = metric.get('iou_thrs'), metric.get('proposal_nums')
    if isinstance(thresholds, (int, float, list, tuple)):
        raise ConfigError(
            f'{option}.iou_thrs: expected none, which means 0.5, 0.55, ..., 0.95, got '
            f'{thresholds!r}, with which the evaluation fails. Leave it out; mAP_50 and mAP_75 '
            f'are among the results'
        )
    if numbers is not None and (len(numbers) < 3 or 100 not in numbers):
        raise ConfigError(
            f'{option}.proposal_nums: expected at least three numbers, 100 among them, for '
            f'which pycocotools gives AP, got {numbers!r}: the evaluation would fail or AP be '
            f'-1. Leave it out, or write (100, 300, 1000)'
        )


def _check_masks_are_found(option, metric, model):
    """A detector whose modules none is named after masks gives boxes alone."""
    names = (f'{name} {type(module).__name__}' for name, module in model.named_modules())
    if (
        'segm' in _kinds(metric)
        and _is_mmdets(type(model))
        and not metric.get('format_only')
        and not any('mask' in name.lower() or 'solo' in name.lower() for name in names)
    ):
        raise ConfigError(
            f"{option}.metric: expected 'bbox' for {type(model).__name__}, which finds no masks "
            f"here, got {metric['metric']!r}. Leave 'segm' out, or add a mask head to the model"
        )


def _is_mmdets(cls):
    return cls.__module__.startswith('mmdet.')


def _check_rescaling(option, sample, model):
    head = getattr(model, 'bbox_head', None) or getattr(
        getattr(model, 'roi_head', None), 'bbox_head', None
    )
    head = head[0] if isinstance(head, nn.ModuleList) else head
    single = getattr(type(head), '_predict_by_feat_single', None)
    if (
        'scale_factor' not in sample.metainfo
        and _is_mmdets(type(model))
        and any(single is cls._predict_by_feat_single for cls in RESCALING)
    ):
        raise ConfigError(
            f'{option}.pipeline: expected scale_factor, by which {type(head).__name__} gives '
            f'boxes in pixels of the original image, and it gives only '
            f'{", ".join(sample.metainfo)}. Add a Resize, and scale_factor to meta_keys of '
            f'PackDetInputs'
        )


def _check_meta(option, sample, other, metric):
    missing = [key for key in ('img_id', 'ori_shape') if key not in sample.metainfo]
    if missing:
        raise ConfigError(
            f'{option}.pipeline: expected {", ".join(missing)}, which {other} asks for, and it '
            f'gives only {", ".join(sample.metainfo)}. Add them to meta_keys of PackDetInputs'
        )
    if metric.get('ann_file') is None and 'instances' not in sample.metainfo:
        raise ConfigError(
            f'{other}.ann_file: expected the annotation file of {option}, got None, and the '
            f'images come without their boxes. Set it, or add instances to meta_keys of '
            f'PackDetInputs'
        )


def _names(metric):
    """The names of the results, as far as they do not hold those of classes."""
    if metric.get('format_only'):
        return
    prefix = metric.get('prefix') or resolve(METRICS, metric['type']).default_prefix
    for kind in _kinds(metric):
        if kind == 'proposal_fast':
            items = [f'AR@{number}' for number in metric.get('proposal_nums') or (100, 300, 1000)]
        else:
            items = metric.get('metric_items') or (AR if kind == 'proposal' else AP)
        for item in items:
            yield f'{prefix}/{item if "proposal" in kind else f"{kind}_{item}"}'


def _check_names(metrics):
    seen = {}
    for option, metric in metrics:
        if not _is_coco(metric, 'compute_metrics'):
            continue
        for name in dict.fromkeys(_names(metric)):
            if name in seen:
                raise ConfigError(
                    f'{option}: gives {name}, which {seen[name]} gives, too, and the evaluation '
                    f"fails. Set {option}.prefix, as in prefix='second', or leave one out"
                )
            seen[name] = option


def _check_save_best(cfg, names):
    option = 'default_hooks.checkpoint'
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if not isinstance(hook, dict) or not is_of(
        HOOKS, {'type': 'CheckpointHook', **hook}, CheckpointHook
    ):
        return
    best = hook.get('save_best')
    for name in best if isinstance(best, (list, tuple)) else [best]:
        if isinstance(name, str) and name not in ('auto', *names) and 'precision' not in name:
            raise ConfigError(
                f'{option}.save_best: the evaluator gives no {name!r}{did_you_mean(name, names)}'
            )
