"""Checks of the data that a config names, before a tool writes anything."""

import contextlib
import copy
import inspect
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mmdet.datasets import BaseDetDataset, CocoDataset, MultiImageMixDataset
from mmdet.evaluation import CocoMetric, LVISMetric, MultiDatasetsEvaluator, OVCocoMetric
from mmdet.registry import DATASETS, EVALUATOR, METRICS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset
from torch import nn

from ..checkpoint import is_remote, meta_of
from ..messages import ConfigError, did_you_mean, reason, some, tell
from ..registered import is_of, name_of, resolve
from . import coco
from .evaluators import check_metrics, metrics_of
from .images import check_images
from .loaders import check_loader
from .paths import JsonFiles, check_exists
from .pipelines import (
    check_boxes_are_loaded,
    check_nothing_moves,
    check_runs_are_used,
    loads_masks,
    sample_of,
)
from .voc import check_voc, drops_thin_boxes, reads_voc


def check_data(cfg: Config, split: str, model: nn.Module) -> None:
    """Checks a data set: its files, its classes against the model's, its metrics, its loader.

    What makes results wrong or ends a run later is an error; what only loses some boxes
    is told in the log.

    Args:
        split: 'train', 'val' or 'test'; a split that the config has not is no error.

    Raises:
        ConfigError: a folder or file is missing, an annotation json is damaged, mmdet or
            pycocotools would misread it, the classes do not match, or the loader gives
            no batch, or not each image to be evaluated once.
    """
    files = JsonFiles()
    checked = [
        _check_dataset(option, dataset, split, model, files, cfg)
        for option, dataset in _datasets(cfg, split)
    ]
    if split == 'train':
        _check_boxes([data for data in checked if data.content is not None])
    samples = {data.option: data.sample for data in checked if data.sample is not None}
    if split == 'train':
        for option, sample in samples.items():
            check_boxes_are_loaded(option, sample, model)
    else:
        _check_evaluators(cfg, split, checked, files)
        check_metrics(cfg, split, model, samples)
    loader = cfg.get(f'{split}_dataloader')
    if loader is not None:
        known = {data.option: len(data.image_ids) for data in checked if data.image_ids}
        length = _length(loader['dataset'], f'{split}_dataloader.dataset', known)
        check_loader(cfg, split, length)


def check_same_classes(cfg: Config, splits) -> None:
    """Raises ConfigError where data sets of a config number the same labels differently."""
    first = None
    for split in splits:
        for option, dataset in _datasets(cfg, split):
            classes = _labelled_classes(dataset)
            if not classes:
                continue
            if first is None:
                first = option, classes
            check_label_order(
                f'{option}.metainfo.classes', classes, f'{first[0]}.metainfo.classes', first[1]
            )


def check_trained_classes(cfg: Config, split: str, checkpoint: dict, path) -> None:
    """Raises ConfigError where a checkpoint's labels stand for other classes than the data's."""
    meta = meta_of(checkpoint).get('dataset_meta')
    trained = meta.get('classes') if isinstance(meta, dict) else None
    for option, dataset in _datasets(cfg, split):
        classes = _labelled_classes(dataset)
        if trained and classes:
            check_label_order(f'{option}.metainfo.classes', classes, str(path), trained)


def check_label_order(option, classes, other, expected) -> None:
    """Raises ConfigError where one label means two classes; other names alone are told."""
    classes, expected = list(classes), list(expected)
    if classes == expected:
        return
    if (
        len(classes) != len(expected)
        or set(classes) & set(expected)
        and any(
            name in expected and expected.index(name) != label
            for label, name in enumerate(classes)
        )
    ):
        raise ConfigError(
            f'{option}: {some(classes)} ({len(classes)} classes) where {other} has '
            f'{some(expected)} ({len(expected)}): the same label would mean two '
            f'classes. Set both to the same, in the same order'
        )
    tell(
        f'{option}: {some(classes)} where {other} has {some(expected)}: taken as other '
        f'names of the same classes'
    )


@dataclass
class _Data:
    """A data set and, where its annotations are COCO json, what was found in it."""

    option: str
    dataset: BaseDataset
    content: dict | None = None
    image_ids: list | None = None  # that are left after filter_cfg and indices
    sample: DetDataSample | None = None  # what the pipeline makes of the first of them


def _datasets(cfg, split):
    """Option and data set of each that a split has; none has read its annotations yet."""
    loader = cfg.get(f'{split}_dataloader')
    if loader is None:
        return
    option = f'{split}_dataloader.dataset'
    node = loader.get('dataset')
    if node is None:
        raise ConfigError(
            f"{option}: expected a data set, such as dict(type='CocoDataset', ...), got none"
        )
    if split != 'train':
        _check_each_image_once(node, option)
    yield from _build(node, option)


def _check_each_image_once(node, option):
    """Metrics take what is found in an image for the second time as wrong."""
    if not isinstance(node, dict):
        return
    repeats = (
        is_of(DATASETS, node, RepeatDataset)
        and node.get('times', 1) != 1
        or is_of(DATASETS, node, ClassBalancedDataset)
    )
    if repeats:
        raise ConfigError(
            f'{option}: {name_of(node["type"])} gives images several times, and '
            f'each has to be evaluated once. Set {option} to the data set inside'
        )
    _check_each_image_once(node.get('dataset'), f'{option}.dataset')
    for index, inner in enumerate(node.get('datasets') or []):
        _check_each_image_once(inner, f'{option}.datasets.{index}')


def _build(node, option):
    """Looks into wrappers (RepeatDataset, ConcatDataset, ...)."""
    if not isinstance(node, dict):
        return  # built by the config's own code
    if 'dataset' in node:
        _class_of(DATASETS, node, option, 'data set')
        yield from _build(node['dataset'], f'{option}.dataset')
    elif 'datasets' in node:
        _class_of(DATASETS, node, option, 'data set')
        if not node['datasets']:
            raise ConfigError(f'{option}.datasets: expected at least one data set, got none')
        members = [
            list(_build(inner, f'{option}.datasets.{index}'))
            for index, inner in enumerate(node['datasets'])
        ]
        _check_concatenation(node, option, [member[0][1] for member in members if member])
        for member in members:
            yield from member
    else:
        cls = _class_of(DATASETS, node, option, 'data set')
        if inspect.isclass(cls) and issubclass(cls, BaseDataset):
            yield option, _build_lazily(node, option)
        # else its own code has to say what is wrong


def _class_of(registry, node, option, what):
    """The class that a dict of the config builds, or ConfigError with the nearest name."""
    kind = node.get('type')
    cls = resolve(registry, kind)
    if cls is None:
        with registry.switch_scope_and_registry(None) as scoped:
            names = list(scoped.module_dict)
        raise ConfigError(
            f'{option}.type: there is no {what} {name_of(kind)!r}{did_you_mean(kind, names)}'
        )
    return cls


def _build_lazily(node, option, **arguments):
    prefix = node.get('data_prefix')
    # mmpretrain's take a folder as text
    if is_of(DATASETS, node, BaseDetDataset) and not (prefix is None or isinstance(prefix, dict)):
        raise ConfigError(
            f'{option}.data_prefix: expected a dict of folders, as '
            f'dict(img={prefix!r}), got {prefix!r}'
        )
    try:
        return DATASETS.build({**copy.deepcopy(node), **arguments, 'lazy_init': True})
    except (KeyError, TypeError, ValueError, AssertionError, OSError, RuntimeError) as error:
        raise ConfigError(f'{option}: {reason(error)}') from error


def _check_concatenation(node, option, members):
    """mmengine wants the same metainfo in all members; mmdet's own class takes any."""
    if members and is_of(DATASETS, node, ConcatDataset):
        _build_lazily(
            {key: value for key, value in node.items() if key != 'datasets'},
            option,
            datasets=members,
        )


def _length(node, option, known):
    """The images of a data set, or None; ``known`` has those of the innermost, by option."""
    if option in known or not isinstance(node, dict):
        return known.get(option)
    if is_of(DATASETS, node, ConcatDataset):
        lengths = [
            _length(inner, f'{option}.datasets.{index}', known)
            for index, inner in enumerate(node['datasets'])
        ]
        return None if None in lengths else sum(lengths)
    if is_of(DATASETS, node, (RepeatDataset, MultiImageMixDataset)):
        length = _length(node.get('dataset'), f'{option}.dataset', known)
        return length and length * node.get('times', 1)
    return None


def _check_dataset(option, dataset, split, model, files, cfg):
    data = _Data(option, dataset)
    _check_classes(option, dataset)
    _check_num_classes(option, dataset, model)
    if split != 'train' and isinstance(dataset, BaseDetDataset):
        check_nothing_moves(option, dataset)
    if _is_made(dataset) or getattr(dataset, 'backend_args', None):
        return data
    _check_paths(option, dataset)
    if not dataset.ann_file and hasattr(dataset, 'img_prefix'):
        _check_class_folders(option, dataset, model)
    if _reads_coco(dataset) and not dataset.ann_file:
        raise ConfigError(
            f'{option}.ann_file: expected the annotation file of '
            f'{type(dataset).__name__}, got {dataset.ann_file!r}. Set it'
        )
    if not dataset.ann_file or is_remote(dataset.ann_file):
        return data
    if _reads_coco(dataset):
        _check_coco(data, split, files)
    elif reads_voc(dataset):
        _check_voc(data, split, cfg)
    elif dataset.ann_file.endswith('.json'):
        files.read(f'{option}.ann_file', dataset.ann_file)
    return data


def _is_made(dataset):
    return getattr(dataset, 'MAKES_ITS_DATA', False)


def _reads_coco(dataset):
    """Not LVIS, panoptic and others, which inherit from `CocoDataset` and read another format."""
    return (
        isinstance(dataset, CocoDataset)
        and dataset.COCOAPI is CocoDataset.COCOAPI
        and type(dataset).load_data_list is CocoDataset.load_data_list
    )


def _labelled_classes(dataset):
    """The classes in whose order labels are numbered, or None where there is no such order.

    Detectors by text have as many classes as the text of an image names.
    """
    if getattr(dataset, 'return_classes', False):
        return None
    return dataset.metainfo.get('classes')


def _check_classes(option, dataset):
    for key in dataset.metainfo:
        if key != 'classes' and str(key).lower() == 'classes':
            raise ConfigError(
                f'{option}.metainfo.{key}: mmdet reads classes, in small letters, '
                f'and would go on with {some(dataset.metainfo.get("classes") or ["none"])}. '
                f'Write metainfo=dict(classes=...)'
            )
    classes = _labelled_classes(dataset)
    if classes is None:
        return
    if isinstance(classes, str):
        raise ConfigError(
            f'{option}.metainfo.classes: expected a tuple of names, got the text '
            f'{classes!r}; a single class needs a comma: ({classes!r},)'
        )
    if not isinstance(classes, (tuple, list)) or not all(
        isinstance(name, str) for name in classes
    ):
        raise ConfigError(
            f'{option}.metainfo.classes: expected a tuple of names, whose order '
            f'gives their labels, got {classes!r}'
        )
    for name in classes:
        if classes.count(name) > 1:
            raise ConfigError(
                f'{option}.metainfo.classes: {name!r} is there '
                f'{classes.count(name)} times. Name each class once'
            )


def _check_num_classes(option, dataset, model):
    classes = _labelled_classes(dataset)
    if classes is None:
        return
    for name, module in model.named_modules():
        num_classes = getattr(module, 'num_classes', None)
        if (
            re.search(r'(^|\.)((bbox|mask)_)?head(\.\d+)?$', name)
            and num_classes is not None
            and num_classes != len(classes)
        ):
            raise ConfigError(
                f'model.{name}.num_classes is {num_classes}, but the data set has '
                f'{len(classes)} classes ({option}.metainfo.classes, by default those of '
                f'{type(dataset).__name__}: {some(classes)}). Set both to the same'
            )


def _check_paths(option, dataset):
    if dataset.data_root:
        check_exists(f'{option}.data_root', dataset.data_root, Path.is_dir, 'data folder')
    if dataset.ann_file:
        check_exists(f'{option}.ann_file', dataset.ann_file, Path.is_file, 'annotation file')
    for key, prefix in dataset.data_prefix.items():
        if prefix:
            check_exists(f'{option}.data_prefix.{key}', prefix, Path.is_dir, 'data folder')


def _check_class_folders(option, dataset, model):
    """mmpretrain's data sets with a sub-folder per class, which name the classes."""
    try:
        dataset.full_init()
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise ConfigError(f'{option}: {reason(error)}') from error
    _check_num_classes(option, dataset, model)


def _check_coco(data, split, files):
    option, dataset = f'{data.option}.ann_file', data.dataset
    if 'img' not in dataset.data_prefix:
        raise ConfigError(
            f'{data.option}.data_prefix: expected img, the folder of the images, '
            f'got {dataset.data_prefix}. Set {data.option}.data_prefix.img'
        )
    content = files.read(option, dataset.ann_file)
    classes = dataset.metainfo['classes']
    with _about(dataset.ann_file, option):
        coco.check_format(content, annotations=split == 'train')
        coco.check_labels(content, classes, f'{data.option}.metainfo.classes')
    data.content, data.image_ids = content, _images_left(data.option, dataset, content)
    if not data.image_ids:
        raise ConfigError(
            f'{dataset.ann_file}: {data.option}.filter_cfg or indices leave out all '
            f'{len(content["images"])} images (filter_cfg={dataset.filter_cfg}). '
            f'Lower its min_size, or set its filter_empty_gt=False where images '
            f'without boxes are meant'
        )
    if loads_masks(dataset.pipeline):
        boxes = coco.sort_boxes(content, classes, data.image_ids)
        with _about(dataset.ann_file, option):
            lost = coco.check_masks(
                boxes.get(coco.TRAINED, []) + boxes.get(coco.CROWDS, []), coco.sizes_of(content)
            )
        if split == 'train':  # of others, where they are evaluated
            _tell_lost_masks(dataset.ann_file, lost)
            check_runs_are_used(data.option, dataset, boxes.get(coco.TRAINED, []))
    left = set(data.image_ids)
    images = [image for image in content['images'] if image['id'] in left]
    names = [os.path.join(dataset.data_prefix['img'], image['file_name']) for image in images]
    check_images(f'{data.option}.data_prefix.img', dataset, images, names)
    data.sample = sample_of(dataset, content, data.image_ids[0])


def _check_voc(data, split, cfg):
    if is_remote(data.dataset.sub_data_root):
        return
    dropped = any(drops_thin_boxes(step) for step in _steps_around(cfg, data.option))
    data.image_ids = check_voc(data.option, data.dataset, split == 'train', dropped)
    if not data.image_ids:
        raise ConfigError(
            f'{data.dataset.ann_file}: {data.option}.filter_cfg leaves out all images '
            f'(filter_cfg={data.dataset.filter_cfg})'
        )


def _steps_around(cfg, option):
    """The steps of the pipelines of the wrappers around the data set that an option sets."""
    node = cfg
    for name in option.split('.'):
        node = node[int(name)] if isinstance(node, (list, tuple)) else node[name]
        if isinstance(node, dict) and ('dataset' in node or 'datasets' in node):
            yield from node.get('pipeline') or []


@contextlib.contextmanager
def _about(path, option):
    """Names the file and the option that sets it in what is wrong with its content."""
    try:
        yield
    except coco.CocoError as error:
        raise ConfigError(f'{path}: {error}. The file is set by {option}') from error


def _images_left(option, dataset, content):
    """Ids of the images that the data set keeps, by its own rules."""
    ids = coco.category_ids(content, dataset.metainfo['classes'])
    dataset.cat_ids = ids
    dataset.cat_img_map = {number: set() for number in ids}
    for annotation in content.get('annotations') or []:
        if annotation['category_id'] in dataset.cat_img_map:
            dataset.cat_img_map[annotation['category_id']].add(annotation['image_id'])
    dataset.data_list = [
        dict(img_id=image['id'], width=image['width'], height=image['height'])
        for image in content['images']
    ]
    if type(dataset).filter_data is CocoDataset.filter_data:
        dataset.data_list = dataset.filter_data()
    if dataset._indices is not None:
        try:
            dataset.data_list = dataset._get_unserialized_subset(dataset._indices)
        except (IndexError, TypeError) as error:
            raise ConfigError(
                f'{option}.indices: expected a number of images or their positions '
                f'among the {len(dataset.data_list)} that are left after '
                f'filter_cfg, got {dataset._indices!r} ({error})'
            ) from error
    return [image['img_id'] for image in dataset.data_list]


def _check_boxes(checked):
    """Checks that there is something to train on, over all data sets of a split."""
    uses = [
        (data, coco.sort_boxes(data.content, data.dataset.metainfo['classes'], data.image_ids))
        for data in checked
    ]
    counts = Counter()
    for data, boxes in uses:
        counts.update({use: len(found) for use, found in boxes.items()})
        _tell_what_is_left_out(data, boxes)
    if checked and not counts[coco.TRAINED]:
        files = ', '.join(dict.fromkeys(data.dataset.ann_file for data in checked))
        listed = ', '.join(f'{number} {use}' for use, number in counts.items())
        raise ConfigError(
            f'{files}: {"holds" if len(checked) == 1 else "hold"} no box to train '
            f'on: of {counts.total()}, {listed or "none"}. Add boxes, or set '
            f'{checked[0].option}.ann_file to another file'
        )


def _tell_what_is_left_out(data, boxes):
    path, classes = data.dataset.ann_file, data.dataset.metainfo['classes']
    for use, found in boxes.items():
        if use in coco.MISTAKES:
            tell(
                f'{path}: {len(found)} boxes are not trained on, {use} (the first has the id '
                f'{found[0]["id"]!r})'
            )
    trained = boxes.get(coco.TRAINED, [])
    out = coco.boxes_reaching_out(data.content)
    if out:
        tell(
            f'{path}: {len(out)} boxes reach out of their image (the first has the id '
            f'{out[0]["id"]!r})'
        )
    ids = {annotation['category_id'] for annotation in trained}
    empty = [
        name
        for name, number in zip(classes, coco.category_ids(data.content, classes), strict=True)
        if number not in ids
    ]
    if empty and trained:
        tell(f'{path}: no box of {len(empty)} of the {len(classes)} classes ({some(empty)})')


def _tell_lost_masks(path, lost):
    for what, found in lost.items():
        tell(
            f'{path}: {len(found)} segmentations have {what} (the first has the id '
            f'{found[0]["id"]!r})'
        )


def _tell_what_counts_against_a_detector(path, content, classes):
    for what, found in (
        (
            'have no size or lie outside of their image, and no detection can match them',
            coco.never_found(content, classes),
        ),
        (
            'are marked ignore: mmdet does not train on them, and pycocotools counts them as '
            'not found',
            coco.marked_ignore(content, classes),
        ),
        (
            'have an area larger than their image: AP of small, medium and large objects goes '
            'by it',
            coco.areas_larger_than_images(content, classes),
        ),
    ):
        if found:
            tell(f'{path}: {len(found)} boxes {what} (the first has the id {found[0]["id"]!r})')


def _check_evaluators(cfg, split, checked, files):
    evaluator = cfg.get(f'{split}_evaluator')
    apart = is_of(EVALUATOR, evaluator, MultiDatasetsEvaluator)
    if evaluator is not None and not apart:
        _check_same_metainfo(cfg[f'{split}_dataloader'].dataset, checked)
    for index, (option, metric) in enumerate(metrics_of(evaluator, f'{split}_evaluator')):
        _class_of(METRICS, metric, option, 'metric')
        path = metric.get('ann_file')
        if (
            not path
            or is_remote(path)
            or metric.get('backend_args')
            or any(_is_made(data.dataset) for data in checked)
        ):
            continue
        option = f'{option}.ann_file'
        check_exists(option, path, Path.is_file, 'annotation file')
        if is_of(METRICS, metric, CocoMetric) and not is_of(
            METRICS, metric, (LVISMetric, OVCocoMetric)
        ):
            _check_truth(
                option,
                metric,
                checked[index : index + 1] if apart else checked,
                files.read(option, path),
            )
        elif path.endswith('.json'):
            files.read(option, path)


def _check_same_metainfo(node, checked):
    """mmdet's ConcatDataset makes a list of what differs, in which no metric finds classes."""
    for data in checked[1:]:
        first = checked[0]
        if not node.get('ignore_keys') and data.dataset.metainfo != first.dataset.metainfo:
            raise ConfigError(
                f'{data.option}.metainfo: differs from that of {first.option}, and '
                f'the evaluator would find no classes. Set both to the same '
                f'(classes as a tuple in both), or use MultiDatasetsEvaluator'
            )


def _check_truth(option, metric, checked, content):
    """The ground truth of mmdet's COCO metrics."""
    path = metric['ann_file']
    evaluated = not metric.get('format_only')
    masks = 'segm' in (metric.get('metric') or [])
    with _about(path, option):
        coco.check_format(content, annotations=evaluated)
        for data in checked:
            classes = _labelled_classes(data.dataset)
            if not classes:
                continue
            coco.check_labels(
                content,
                classes,
                f'{data.option}.metainfo.classes',
                metric.get('sort_categories', False),
            )
            if evaluated:
                lost = coco.check_evaluation(content, classes, masks)
                _tell_lost_masks(path, lost)
                _tell_what_counts_against_a_detector(path, content, classes)
    if not evaluated or not checked or any(data.content is None for data in checked):
        return
    found = coco.difference(
        [data.content for data in checked],
        content,
        [number for data in checked for number in data.image_ids],
    )
    if found:
        others = ', '.join(
            dict.fromkeys(f'{data.option}.ann_file ({data.dataset.ann_file})' for data in checked)
        )
        raise ConfigError(
            f'{path}: the evaluator reads this file, and the data differ from it: '
            f'{found}; AP would be wrong. Set {option} and {others} to the same '
            f'file, and evaluate all of its images'
        )
