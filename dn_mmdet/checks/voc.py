"""Annotations as PASCAL VOC writes them: a list of ids, and an XML file for each."""

import math
import os
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import cv2
from mmdet.datasets import XMLDataset
from mmdet.datasets.transforms import FilterAnnotations
from mmdet.registry import TRANSFORMS
from mmengine.fileio import list_from_file

from ..messages import ConfigError, some, tell
from ..registered import is_of
from .images import check_images, not_listed
from .paths import check_exists


def reads_voc(dataset) -> bool:
    """Whether a data set reads VOC's XML files by mmdet's own code."""
    return (
        isinstance(dataset, XMLDataset)
        and type(dataset).load_data_list is XMLDataset.load_data_list
        and type(dataset).parse_data_info is XMLDataset.parse_data_info
        and type(dataset)._parse_instance_info is XMLDataset._parse_instance_info
    )


def check_voc(
    option: str, dataset: XMLDataset, training: bool, thin_are_dropped: bool = False
) -> list[str]:
    """Checks the files that a list of ids names, and their boxes.

    What only loses some boxes is told in the log.

    Args:
        option: sets the data set.
        thin_are_dropped: whether a wrapper around it drops boxes without a width or a height.

    Returns:
        the ids of the images that are left after ``filter_cfg`` and ``indices``.

    Raises:
        ConfigError: a file is missing or cannot be read, no box is of a class of the config,
            or, in training, one has no width or height.
    """
    annotations = os.path.join(dataset.sub_data_root, dataset.ann_subdir)
    if 'sub_data_root' not in dataset.data_prefix and not os.path.isdir(annotations):
        raise ConfigError(
            f'{option}.data_prefix: expected sub_data_root, the folder that holds '
            f'{dataset.ann_subdir} and {dataset.img_subdir}, got {dict(dataset.data_prefix)}. Set '
            f'{option}.data_prefix.sub_data_root'
        )
    ids = list_from_file(dataset.ann_file)
    if not ids:
        raise ConfigError(f'{dataset.ann_file}: expected ids of images, one a line, got none')
    paths = [os.path.join(annotations, f'{number}.xml') for number in ids]
    for path in not_listed(paths):
        check_exists(
            f'{option}.data_prefix.sub_data_root',
            path,
            Path.is_file,
            f'file, which a line of {dataset.ann_file} names (a line is an id, without .jpg)',
        )
    classes = dataset.metainfo['classes']
    images = [_read(number, path, classes) for number, path in zip(ids, paths, strict=True)]
    folder = os.path.join(dataset.sub_data_root, dataset.img_subdir)
    for image in images:
        image['file'] = os.path.join(folder, f'{image["id"]}.jpg')
    _check_classes(option, dataset.ann_file, classes, images, training)
    left = _left(dataset, images, training)
    if training:
        _check_boxes(dataset, left, thin_are_dropped or _drops_thin_boxes(dataset))
    if left:
        files = [image['file'] for image in left]
        check_images(f'{option}.data_prefix.sub_data_root', dataset, left, files)
    return [image['id'] for image in left]


def _read(number, path, classes):
    """What mmdet reads of an XML file: size, and of each box the class and, if known, more."""
    try:
        root = ET.parse(path).getroot()
        size = root.find('size')
        image = dict(id=number, path=path, boxes=[], others=[])
        if size is not None:
            image.update({key: int(size.find(key).text) for key in ('width', 'height')})
        for found in root.findall('object'):
            name = found.find('name').text
            if name not in classes:
                image['others'].append(name)
                continue
            corners = found.find('bndbox')
            difficult = found.find('difficult')
            image['boxes'].append(
                dict(
                    name=name,
                    difficult=difficult is not None and bool(int(difficult.text)),
                    corners=[
                        int(float(corners.find(key).text))
                        for key in ('xmin', 'ymin', 'xmax', 'ymax')
                    ],
                )
            )
    except (OSError, ValueError, OverflowError, AttributeError, TypeError, ET.ParseError) as error:
        raise ConfigError(
            f'{path}: expected an XML file as VOC has it (size with width and height; objects '
            f'with name and bndbox): {type(error).__name__}: {error}. Copy or make it again'
        ) from error
    return image


def _check_classes(option, ann_file, classes, images, training):
    counts = Counter(box['name'] for image in images for box in image['boxes'])
    others = Counter(name for image in images for name in image['others'])
    plain = {name.strip().lower(): name for name in classes}
    for name in others:
        meant = plain.get(str(name).strip().lower())
        if meant is not None and not counts[meant]:
            raise ConfigError(
                f'{ann_file}: {others[name]} boxes are of the class {name!r}, and '
                f'{option}.metainfo.classes has {meant!r}: mmdet would leave them out. Write both '
                f'in the same way'
            )
    if others and not counts:
        raise ConfigError(
            f'{ann_file}: has {others.total()} boxes of {some(others)}, none of a class '
            f'of the config ({some(classes)}). Set {option}.metainfo.classes to the names in the '
            f'files, and num_classes of the heads to their number'
        )
    if others:
        listed = some(f'{number} of {name}' for name, number in others.items())
        tell(f'{ann_file}: boxes of other classes are left out: {listed}')
    if training and not counts:
        tell(f'{ann_file}: has no box to train on')


def _check_boxes(dataset, images, thin_are_dropped):
    boxes = [
        (image, box['corners'])
        for image in images
        for box in image['boxes']
        if not box['difficult']
    ]
    thin = [(image, at) for image, at in boxes if at[2] <= at[0] or at[3] <= at[1]]
    if thin and not thin_are_dropped:
        image, corners = thin[0]
        raise ConfigError(
            f'{image["path"]}: expected boxes (xmin, ymin, xmax, ymax) with a width and a height '
            f'above 0, got {tuple(corners)}, and {len(thin) - 1} more in {dataset.ann_file}: '
            f'their loss is no number. Mend or remove them, or put '
            f"dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)) into the pipeline"
        )
    out = [
        image
        for image, at in boxes
        if 'width' in image
        and (min(at[:2]) < 0 or at[2] > image['width'] or at[3] > image['height'])
    ]
    if out:
        tell(
            f'{dataset.ann_file}: {len(out)} boxes reach out of their image (the first in '
            f'{out[0]["path"]})'
        )


def drops_thin_boxes(step) -> bool:
    """Whether a step of a pipeline, as a config has it, drops boxes without width or height."""
    return is_of(TRANSFORMS, step, FilterAnnotations) and step.get('by_box', True)


def _drops_thin_boxes(dataset):
    """By its filter, which marks them as ignored, or by its pipeline."""
    return dataset.bbox_min_size or any(
        isinstance(transform, FilterAnnotations) and transform.by_box
        for transform in dataset.pipeline.transforms
    )


def _left(dataset, images, training):
    """The images that ``filter_cfg``, in training, and ``indices`` leave."""
    chosen = (training and dataset.filter_cfg) or {}
    smallest = chosen.get('min_size', 0)
    left = [
        image
        for image in images
        if (image['boxes'] or not chosen.get('filter_empty_gt', False))
        and (smallest <= 0 or min(_size(image)) >= smallest)
    ]
    indices = dataset._indices
    if indices is None:
        return left
    if isinstance(indices, int):
        return left[:indices] if indices >= 0 else left[indices:]
    return [left[index] for index in indices]


def _size(image):
    """Width and height; of the picture, as mmdet takes them, where the XML file has none."""
    if 'width' in image:
        return image['width'], image['height']
    picture = cv2.imread(image['file'])
    return (math.inf,) if picture is None else picture.shape[:2]
