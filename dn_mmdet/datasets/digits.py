"""Handwritten digits on photographs: a small COCO data set that needs no download.

The digits (1797 of 8 x 8 pixels, from the UCI repository) and the two photographs
ship inside scikit-learn.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import mmcv
import numpy as np
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from ..environment import check_extra

# Written into every set. Raise it whenever other images come out of the same seed.
VERSION = 1
CLASSES = tuple('0123456789')
IMAGE_SIZE = 160  # pixels, height and width
DIGIT_SIZES = (40, 96)  # pixels, the longer side of a digit's box
DIGITS_PER_IMAGE = (2, 4)
# Levels of ink, in [0, 1], between which the outline and the stroke fade in. A box ends
# where the outline is half there.
OUTLINE = (0.05, 0.15)
STROKE = (0.4, 0.6)
VAL_SHARE = 0.2  # of the 1797 digits; no digit is in both sets


@DATASETS.register_module()
class DigitsDataset(CocoDataset):
    """`CocoDataset` of handwritten digits, made in ``data_root`` on first use.

    First use is when annotations are loaded: reading a config or predicting with
    a trained model makes nothing.

    Raises:
        ValueError: ``data_root`` holds something else.
    """

    MAKES_ITS_DATA = True  # tools do not ask for its files beforehand
    METAINFO = dict(
        classes=CLASSES,
        palette=[
            (220, 20, 60),
            (0, 130, 200),
            (60, 180, 75),
            (245, 130, 48),
            (145, 30, 180),
            (0, 128, 128),
            (240, 50, 230),
            (128, 128, 0),
            (170, 110, 40),
            (0, 0, 128),
        ],
    )

    def load_data_list(self):
        make_digits(self.data_root)
        return super().load_data_list()


def make_digits(root, seed=0, num_train=1600, num_val=300):
    """Writes the data set into ``root``, unless it is there already.

    The same seed gives the same bytes. The folder is written beside its place and
    then renamed, so that it is whole or absent whenever a process is killed; of
    several processes that make it at once, the first to finish wins and the others
    use its (identical) files.

    Layout: ``images/train_0000.png``, ``instances_train.json``,
    ``instances_val.json``, ``version.txt``.

    Args:
        root (str | Path): a folder of its own.
        seed (int): of all random choices.
        num_train (int), num_val (int): images.

    Raises:
        ValueError: ``root`` exists and holds something else.
        ImportError: scikit-learn is missing.
    """
    root = Path(root)
    if not _is_made(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
        try:
            _write(temporary, seed, num_train, num_val)
            temporary.chmod(0o755)
            os.rename(temporary, root)
        except OSError:
            if not _is_made(root):  # it was not another process that finished first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _is_made(root):
    if not root.is_dir() or not any(root.iterdir()):
        return False
    try:
        version = (root / 'version.txt').read_text().strip()
    except OSError:
        version = 'nothing of this kind'
    if version != str(VERSION):
        raise ValueError(
            f'{root}: expected digits of version {VERSION}, found {version}; '
            f'remove the folder, and they are made again, or set another data_root'
        )
    return True


def _write(root, seed, num_train, num_val):
    digits, photographs = _sources()
    rng = np.random.default_rng(seed)
    train, val = _split(digits, rng)
    (root / 'images').mkdir()
    for split, chosen, count in (('train', train, num_train), ('val', val, num_val)):
        images, annotations = [], []
        for image_id in range(count):
            pixels, boxes = draw(chosen, photographs, rng)
            name = f'{split}_{image_id:04d}.png'
            mmcv.imwrite(pixels, str(root / 'images' / name))
            images.append(dict(id=image_id, file_name=name, height=IMAGE_SIZE, width=IMAGE_SIZE))
            for label, (x, y, w, h) in boxes:
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=image_id,
                        category_id=label,
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                    )
                )
        categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES)]
        (root / f'instances_{split}.json').write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )
    (root / 'version.txt').write_text(f'{VERSION}\n')


def _sources():
    """(ink, label) of every digit, ink (h, w) in [0, 1]; the photographs, BGR uint8."""
    check_extra('demo', 'sklearn', 'PIL')
    from sklearn.datasets import load_digits, load_sample_images  # they ship inside it

    data = load_digits()
    digits = [
        (_trim(np.float32(image) / 16, 0.2), int(label))
        for image, label in zip(data.images, data.target, strict=True)
    ]
    return digits, [np.ascontiguousarray(rgb[..., ::-1]) for rgb in load_sample_images().images]


def _split(digits, rng):
    """The digits for training and, others, for validation."""
    order = rng.permutation(len(digits))
    cut = int(VAL_SHARE * len(digits))
    return [digits[i] for i in order[cut:]], [digits[i] for i in order[:cut]]


def _trim(ink, least):
    """The part of ``ink`` that holds all values above ``least``."""
    rows, columns = np.where((ink > least).any(1))[0], np.where((ink > least).any(0))[0]
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def draw(digits, photographs, rng):
    """One image of random digits on a random crop of a photograph.

    Args:
        digits: list of (ink, label) to choose from.
        photographs: list of (H, W, 3) uint8.
        rng (np.random.Generator): of all random choices.

    Returns:
        pixels (IMAGE_SIZE, IMAGE_SIZE, 3) uint8, and a list of (label, (x, y, w, h))
        in pixels; no two boxes overlap.
    """
    pixels = _background(photographs, rng)
    taken = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    boxes = []
    for _ in range(rng.integers(DIGITS_PER_IMAGE[0], DIGITS_PER_IMAGE[1] + 1)):
        ink, label = digits[rng.integers(len(digits))]
        ink = _resize(ink, rng.uniform(*DIGIT_SIZES), rng.uniform(0.85, 1.15))
        h, w = ink.shape
        for _ in range(20):
            y, x = rng.integers(IMAGE_SIZE - h + 1), rng.integers(IMAGE_SIZE - w + 1)
            place = slice(y, y + h), slice(x, x + w)
            if not taken[place].any():
                break
        else:
            continue  # no room left for a digit of this size
        taken[place] = True
        pixels[place] = _inked(pixels[place], ink, rng)
        boxes.append((label, (int(x), int(y), w, h)))
    return pixels.astype(np.uint8), boxes


def _background(photographs, rng):
    photograph = photographs[rng.integers(len(photographs))]
    height, width = photograph.shape[:2]
    side = rng.integers(IMAGE_SIZE, height + 1)
    y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
    return mmcv.imresize(
        photograph[y : y + side, x : x + side], (IMAGE_SIZE, IMAGE_SIZE), interpolation='area'
    ).astype(np.float32)


def _resize(ink, longer_side, stretch):
    """Ink scaled so that its box's longer side has about that many pixels."""
    ink = np.pad(ink, 1)
    h, w = ink.shape[0], ink.shape[1] * stretch
    scale = longer_side / max(h, w)
    ink = mmcv.imresize(ink, (round(w * scale), round(h * scale)), interpolation='bicubic')
    return _trim(ink, sum(OUTLINE) / 2)


def _inked(pixels, ink, rng):
    """A light digit with a dark outline, or the other way round: it shows on any ground."""
    light, dark = rng.uniform(180, 255, 3), rng.uniform(0, 75, 3)
    stroke, outline = (light, dark) if rng.random() < 0.5 else (dark, light)
    for colour, (start, full) in ((outline, OUTLINE), (stroke, STROKE)):
        share = ((ink - start) / (full - start)).clip(0, 1)[..., None]
        pixels = pixels + share * (colour - pixels)
    return pixels
