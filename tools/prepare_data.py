#!/usr/bin/env python
"""Puts PASCAL VOC 2007, Tiny-ImageNet or a part of COCO where the configs look for it.

voc07: the source is the folder VOC2007 of VOCdevkit, with Annotations, ImageSets and
JPEGImages of trainval and test unpacked into it, from
http://host.robots.ox.ac.uk/pascal/VOC/voc2007/. VOC's rule for objects marked
"difficult" is applied: they are dropped in training and ignored (iscrowd) in evaluation.

tinyin100: the source is the folder tiny-imagenet-200, from
http://cs231n.stanford.edu/tiny-imagenet-200.zip. Every second one of its 200 classes is
taken, in the order of their names.

coco_mini: the source is a folder of tar files that hold images/, instances_train.json
and instances_val.json (in COCO's format). The tool also writes instances_train32.json, with
the first 32 training images that have a box, for
configs/ssdlite_mbv2_dnb_coco_overfit32.py. voc07 also accepts such a folder, if every
annotation has a field "difficult".
"""

import argparse
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from xml.etree import ElementTree

SPLITS = ('train', 'val')
NUM_OVERFIT = 32
VOC_SETS = dict(train='trainval', val='test')
VOC_CLASSES = (
    'aeroplane',
    'bicycle',
    'bird',
    'boat',
    'bottle',
    'bus',
    'car',
    'cat',
    'chair',
    'cow',
    'diningtable',
    'dog',
    'horse',
    'motorbike',
    'person',
    'pottedplant',
    'sheep',
    'sofa',
    'train',
    'tvmonitor',
)


class DataError(Exception):
    """The source is not what was expected, or the place to write to is taken."""


def prepare(name, source, out):
    """Writes the images and, for detection, the annotation files into ``out``.

    All of it is written beside ``out`` and then renamed: a killed run leaves no
    half-made ``out``.

    Args:
        name (str): one of `LAYOUTS`.
        source (str | Path): a folder, see the head of this file.
        out (str | Path): a folder that does not exist, or is empty.

    Raises:
        DataError: see the class.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f'{out}: exists already; remove it to prepare it again, or choose '
            f'another folder with --out'
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    try:
        LAYOUTS[name](source, temporary)
        temporary.chmod(0o755)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lay_out_voc(source, folder):
    if (source / 'Annotations').is_dir():
        content = {split: _read_voc(source, part, folder) for split, part in VOC_SETS.items()}
    else:
        content = _unpack_all('voc07', source, folder)
    _write(apply_difficult_rule(content, source), folder)


def lay_out_coco_mini(source, folder):
    _write(add_overfit_subset(_unpack_all('coco_mini', source, folder), source), folder)


def lay_out_tinyin100(source, folder):
    """Folders train/<class>/ and val/<class>/ of half of Tiny-ImageNet's classes."""
    listed = source / 'wnids.txt'
    if not listed.is_file():
        raise DataError(
            f'{source}: expected the folder tiny-imagenet-200 with a file wnids.txt, '
            f'found none; name it with --source'
        )
    classes = sorted(listed.read_text().split())[::2]
    lines = (source / 'val' / 'val_annotations.txt').read_text().splitlines()
    wanted = [line.split('\t')[:2] for line in lines]
    for wnid in classes:
        shutil.copytree(source / 'train' / wnid / 'images', folder / 'train' / wnid)
        (folder / 'val' / wnid).mkdir(parents=True)
    for name, wnid in wanted:
        if (folder / 'val' / wnid).is_dir():
            shutil.copy(source / 'val' / 'images' / name, folder / 'val' / wnid)
    for split in SPLITS:
        print(
            f'{split}: {len(list((folder / split).glob("*/*")))} images of {len(classes)} classes'
        )


def _read_voc(source, part, folder):
    """COCO json of one of VOC's lists of images, which are copied into ``folder/images``."""
    listed = source / 'ImageSets' / 'Main' / f'{part}.txt'
    if not listed.is_file():
        raise DataError(
            f'{source}: expected the list {listed.relative_to(source)}, found none; '
            f'unpack both trainval and test of VOC 2007 into it'
        )
    (folder / 'images').mkdir(exist_ok=True)
    images, annotations = [], []
    for name in listed.read_text().split():
        root = ElementTree.parse(source / 'Annotations' / f'{name}.xml').getroot()
        shutil.copy(source / 'JPEGImages' / f'{name}.jpg', folder / 'images')
        images.append(
            dict(
                id=int(name),
                file_name=f'{name}.jpg',
                width=int(root.findtext('size/width')),
                height=int(root.findtext('size/height')),
            )
        )
        for thing in root.iter('object'):
            if thing.findtext('name') not in VOC_CLASSES:
                raise DataError(
                    f"{source}: {name}.xml: expected one of VOC's 20 classes, got "
                    f'{thing.findtext("name")!r}; is this VOC 2007?'
                )
            number = len(annotations) + 1
            annotations.append(dict(id=number, image_id=int(name), **_annotation(thing)))
    categories = [dict(id=number, name=name) for number, name in enumerate(VOC_CLASSES, 1)]
    return dict(images=images, annotations=annotations, categories=categories)


def _annotation(thing):
    """COCO's fields of an object in one of VOC's files."""
    left, top, right, bottom = (
        float(thing.findtext(f'bndbox/{side}')) for side in ('xmin', 'ymin', 'xmax', 'ymax')
    )
    width, height = right - left + 1, bottom - top + 1  # VOC counts pixels from 1
    return dict(
        iscrowd=0,
        category_id=VOC_CLASSES.index(thing.findtext('name')) + 1,
        bbox=[left - 1, top - 1, width, height],
        area=width * height,
        difficult=int(thing.findtext('difficult', '0')),
    )


def _unpack_all(name, source, folder):
    """{split: COCO json} of a folder of tar files, their images unpacked into ``folder``."""
    tars = sorted(source.glob('*.tar'))
    if not tars:
        raise DataError(
            f'{source}: expected a folder with the tar files of {name}, found none; '
            f'name it with --source'
        )
    for tar in tars:
        print(f'unpacking {tar}', flush=True)
        _unpack(tar, folder)
    return {split: _read(folder, split, source) for split in SPLITS}


def _write(content, folder):
    for split, coco in content.items():
        print(
            f'{split}: {len(coco["images"])} images, {len(coco["annotations"])} boxes, '
            f'{sum(a["iscrowd"] for a in coco["annotations"])} of them ignored'
        )
        (folder / f'instances_{split}.json').write_text(json.dumps(coco))


def _unpack(tar, folder):
    try:
        with tarfile.open(tar) as archive:
            archive.extractall(folder, filter='data')
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f'{tar}: cannot be unpacked ({error}); copy it again') from error


def _read(folder, split, source):
    path = folder / f'instances_{split}.json'
    if not path.is_file():
        raise DataError(f'{source}: expected {path.name} in one of its tar files, found none')
    try:
        coco = json.loads(path.read_text())
        names = [image['file_name'] for image in coco['images']]
        [(a['image_id'], a['iscrowd']) for a in coco['annotations']]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{source}: {path.name} is damaged or not COCO json '
            f'({type(error).__name__}: {error}); copy it again'
        ) from error
    absent = [name for name in names if not (folder / 'images' / name).is_file()]
    if absent:
        raise DataError(
            f'{source}: {len(absent)} of the {len(names)} images in {path.name} '
            f'are not in the tar files, such as {absent[0]}. Is a tar file missing?'
        )
    return coco


def apply_difficult_rule(content, source):
    """{split: COCO json} with difficult objects dropped in train and ignored in val."""
    for split, coco in content.items():
        unmarked = sum('difficult' not in a for a in coco['annotations'])
        if unmarked:
            raise DataError(
                f'{source}: instances_{split}.json: expected a field "difficult" in '
                f'every annotation, {unmarked} have none'
            )
    train, val = (content[split]['annotations'] for split in SPLITS)
    return dict(
        train={**content['train'], 'annotations': [a for a in train if not a['difficult']]},
        val={
            **content['val'],
            'annotations': [
                # COCO's evaluation ignores what is marked as a crowd
                {**a, 'iscrowd': int(bool(a['difficult']))}
                for a in val
            ],
        },
    )


def add_overfit_subset(content, source):
    """{split: COCO json} and, under 'train32', the first training images that have a box."""
    train = content['train']
    with_box = {a['image_id'] for a in train['annotations'] if not a['iscrowd']}
    images = [
        image
        for image in sorted(train['images'], key=lambda image: image['id'])
        if image['id'] in with_box
    ][:NUM_OVERFIT]
    if len(images) < NUM_OVERFIT:
        raise DataError(
            f'{source}: instances_train.json: expected at least {NUM_OVERFIT} images '
            f'with a box, found {len(images)}'
        )
    chosen = {image['id'] for image in images}
    subset = {
        **train,
        'images': images,
        'annotations': [a for a in train['annotations'] if a['image_id'] in chosen],
    }
    return {**content, f'train{NUM_OVERFIT}': subset}


LAYOUTS = dict(voc07=lay_out_voc, tinyin100=lay_out_tinyin100, coco_mini=lay_out_coco_mini)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('name', choices=LAYOUTS, help='data set to prepare')
    parser.add_argument('--source', required=True, help='folder with the data, see above')
    parser.add_argument('--out', help='folder to write (default: data/NAME)')
    args = parser.parse_args(argv)
    out = args.out or f'data/{args.name}'
    try:
        prepare(args.name, args.source, out)
    except (DataError, OSError, ElementTree.ParseError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(f'ready: {out}')


if __name__ == '__main__':
    sys.exit(main())
