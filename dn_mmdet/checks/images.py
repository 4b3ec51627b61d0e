"""The image files of a data set."""

import os
from pathlib import Path

import cv2
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import BaseDetDataset

from ..checkpoint import is_remote
from ..messages import ConfigError, reason, tell
from .paths import check_exists

SIZES = 1000  # about as many image files are asked for their size, of all of a data set


def check_images(
    option: str, dataset: BaseDetDataset, images: list[dict], names: list[str]
) -> None:
    """Checks that images exist, and that the sizes in the annotations are those of the pictures.

    Args:
        option: sets their folder.
        images: what the annotations say of them: id and, where they say it, height and width.
        names: the paths of their files.

    Raises:
        ConfigError: an image is missing, cannot be read or has another size.
    """
    path = dataset.ann_file
    if is_remote(names[0]):
        return
    for name in not_listed(names):
        check_exists(option, name, Path.is_file, f'image, which {path} names')
    for name in names[:: max(1, len(names) // SIZES)]:
        if not os.path.getsize(name):
            raise ConfigError(
                f'{name}: expected an image, got a file of 0 bytes. Copy it again; {path} names it'
            )
    for index in sorted({0, len(images) // 2, len(images) - 1}):
        _check_size(dataset, images[index], names[index])


def not_listed(names):
    """What their folders do not list as files: faster than asking for each file."""
    folders = {}
    for name in names:
        folder, _, file = name.rpartition('/')
        if folder not in folders:
            folders[folder] = _files_in(folder or '.')
        if file not in folders[folder]:
            yield name


def _files_in(folder):
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def _check_size(dataset, image, name):
    load = next(iter(dataset.pipeline.transforms), None)
    if not isinstance(load, LoadImageFromFile):
        return
    try:
        loaded = load(dict(img_path=name))
    except (AssertionError, OSError, ValueError, cv2.error) as error:
        raise ConfigError(
            f'{name}: cannot be read as an image: {reason(error)}. Copy it again; '
            f'{dataset.ann_file} names it'
        ) from error
    if loaded is None:  # with ignore_empty=True
        return
    if 'height' not in image:
        return
    size, written = loaded['ori_shape'], (image['height'], image['width'])
    source = image.get('path') or f'{dataset.ann_file}: images'
    text = (
        f'{source}: id {image["id"]!r} has the width {written[1]} and '
        f'the height {written[0]}, {name} has {size[1]} and {size[0]}'
    )
    if tuple(size) == written:
        return
    if tuple(size) == written[::-1]:
        tell(f'{text}: perhaps turned by its EXIF data. Boxes outside are left out')
    else:
        raise ConfigError(
            f'{text}: its boxes are those of another picture, or of another size. '
            f'Write width, height and boxes of these pictures'
        )
