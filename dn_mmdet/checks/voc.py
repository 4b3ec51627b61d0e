"""Annotations as PASCAL VOC writes them: a list of ids, and an XML file for each."""

import os
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from mmdet.datasets import XMLDataset
from mmdet.datasets.transforms import FilterAnnotations

from ..checkpoint import is_remote
from ..messages import ConfigError, some, tell
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


def check_voc(option: str, dataset: XMLDataset, training: bool) -> list[str]:
    """Checks the files that a list of ids names, and their boxes.

    What only loses some boxes is told in the log.

    Args:
        option: sets the data set.

    Returns:
        the ids of the images that are left after ``filter_cfg``.

    Raises:
        ConfigError: a file is missing or cannot be read, no box is of a class of the config,
            or, in training, one has no width or height.
    """
    if 'sub_data_root' not in dataset.data_prefix:
        raise ConfigError(
            f'{option}.data_prefix: expected sub_data_root, the folder that holds '
            f'{dataset.ann_subdir} and {dataset.img_subdir}, got {dict(dataset.data_prefix)}. Set '
            f'{option}.data_prefix.sub_data_root'
        )
    ids = Path(dataset.ann_file).read_text().splitlines()
    if not ids:
        raise ConfigError(f'{dataset.ann_file}: expected ids of images, one a line, got none')
    root = dataset.sub_data_root
    if is_remote(root):
        return []
    paths = [os.path.join(root, dataset.ann_subdir, f'{number}.xml') for number in ids]
    for path in not_listed(paths):
        check_exists(
            f'{option}.data_prefix.sub_data_root',
            path,
            Path.is_file,
            f'file, which a line of {dataset.ann_file} names (a line is an id, without .jpg)',
        )
    images = [_read(number, path) for number, path in zip(ids, paths, strict=True)]
    _check_classes(option, dataset, images, training)
    if training:
        _check_boxes(dataset, images)
    names = [os.path.join(root, dataset.img_subdir, f'{number}.jpg') for number in ids]
    check_images(f'{option}.data_prefix.sub_data_root', dataset, images, names)
    return [image['id'] for image in images if not training or _is_left(dataset, image)]


def _read(number, path):
    """What mmdet reads of an XML file: size, and class and corners of each box."""
    try:
        root = ET.parse(path).getroot()
        size = root.find('size')
        image = dict(id=number, path=path, boxes=[])
        if size is not None:
            image.update({key: int(size.find(key).text) for key in ('width', 'height')})
        for found in root.findall('object'):
            corners = found.find('bndbox')
            difficult = found.find('difficult')
            image['boxes'].append(
                dict(
                    name=found.find('name').text,
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


def _check_classes(option, dataset, images, training):
    classes = dataset.metainfo['classes']
    counts = Counter(box['name'] for image in images for box in image['boxes'])
    others = {name: number for name, number in counts.items() if name not in classes}
    plain = {name.strip().lower(): name for name in classes}
    for name in others:
        meant = plain.get(str(name).strip().lower())
        if meant is not None and not counts[meant]:
            raise ConfigError(
                f'{dataset.ann_file}: {others[name]} boxes are of the class {name!r}, and '
                f'{option}.metainfo.classes has {meant!r}: mmdet would leave them out. Write both '
                f'in the same way'
            )
    if others and len(others) == len(counts):
        raise ConfigError(
            f'{dataset.ann_file}: has {counts.total()} boxes of {some(counts)}, none of a class '
            f'of the config ({some(classes)}). Set {option}.metainfo.classes to the names in the '
            f'files, and num_classes of the heads to their number'
        )
    if others:
        listed = some(f'{number} of {name}' for name, number in others.items())
        tell(f'{dataset.ann_file}: boxes of other classes are left out: {listed}')
    if training and not counts:
        tell(f'{dataset.ann_file}: has no box to train on')


def _check_boxes(dataset, images):
    classes = dataset.metainfo['classes']
    boxes = [
        (image, box['corners'])
        for image in images
        for box in image['boxes']
        if box['name'] in classes and not box['difficult']
    ]
    thin = [(image, at) for image, at in boxes if at[2] <= at[0] or at[3] <= at[1]]
    if thin and not _drops_small_boxes(dataset):
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


def _drops_small_boxes(dataset):
    """By its filter, which marks them as ignored, or by its pipeline."""
    return dataset.bbox_min_size or any(
        isinstance(transform, FilterAnnotations) and transform.min_gt_bbox_wh
        for transform in dataset.pipeline.transforms
    )


def _is_left(dataset, image):
    """Whether ``filter_cfg`` leaves an image to train on."""
    chosen = dataset.filter_cfg or {}
    labelled = any(box['name'] in dataset.metainfo['classes'] for box in image['boxes'])
    small = min(image.get('width', 1), image.get('height', 1)) < chosen.get('min_size', 0)
    return (labelled or not chosen.get('filter_empty_gt', False)) and not (
        'width' in image and small
    )
