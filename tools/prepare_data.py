#!/usr/bin/env python
"""Unpacks PASCAL VOC 2007 or a part of COCO into the folder that the configs name.

The source is a folder of tar files that hold images/, instances_train.json and
instances_val.json (COCO json).

voc07: VOC's rule for objects marked "difficult" is applied: dropped in training,
ignored (iscrowd) in evaluation.

coco_mini: instances_train32.json is written too, with the first 32 training images
that have a box, for configs/ssdlite_mbv2_dnb_coco_overfit32.py.
"""
import argparse
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

SPLITS = ('train', 'val')
NUM_OVERFIT = 32


class DataError(Exception):
    """The source is not what was expected, or the place to write to is taken."""


def prepare(name, source, out):
    """Writes ``out/images`` and the annotation files into ``out``.

    All of it is written beside ``out`` and then renamed: a killed run leaves no
    half-made ``out``.

    Args:
        name (str): one of `DATA_SETS`.
        source (str | Path): a folder of tar files.
        out (str | Path): a folder that does not exist, or is empty.

    Raises:
        DataError: see the class.
    """
    source, out = Path(source), Path(out)
    tars = sorted(source.glob('*.tar'))
    if not tars:
        raise DataError(f'{source}: expected a folder with the tar files of {name}, found none; '
                        f'name it with --source')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f'{out}: exists already; remove it to prepare it again, or choose '
                        f'another folder with --out')
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    try:
        for tar in tars:
            print(f'unpacking {tar}', flush=True)
            _unpack(tar, temporary)
        content = {split: _read(temporary, split, source) for split in SPLITS}
        for split, coco in DATA_SETS[name](content, source).items():
            print(f'{split}: {len(coco["images"])} images, {len(coco["annotations"])} boxes, '
                  f'{sum(a["iscrowd"] for a in coco["annotations"])} of them ignored')
            (temporary / f'instances_{split}.json').write_text(json.dumps(coco))
        temporary.chmod(0o755)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        raise DataError(f'{source}: {path.name} is damaged or not COCO json '
                        f'({type(error).__name__}: {error}); copy it again') from error
    absent = [name for name in names if not (folder / 'images' / name).is_file()]
    if absent:
        raise DataError(f'{source}: {len(absent)} of the {len(names)} images in {path.name} '
                        f'are not in the tar files, such as {absent[0]}. Is a tar file missing?')
    return coco


def apply_difficult_rule(content, source):
    """{split: COCO json} with difficult objects dropped in train and ignored in val."""
    for split, coco in content.items():
        unmarked = sum('difficult' not in a for a in coco['annotations'])
        if unmarked:
            raise DataError(f'{source}: instances_{split}.json: expected a field "difficult" in '
                            f'every annotation, {unmarked} have none')
    train, val = (content[split]['annotations'] for split in SPLITS)
    return dict(
        train={**content['train'], 'annotations': [a for a in train if not a['difficult']]},
        val={**content['val'], 'annotations': [
            # COCO's evaluation ignores what is marked as a crowd
            {**a, 'iscrowd': int(bool(a['difficult']))} for a in val]})


def add_overfit_subset(content, source):
    """{split: COCO json} and, under 'train32', the first training images that have a box."""
    train = content['train']
    with_box = {a['image_id'] for a in train['annotations'] if not a['iscrowd']}
    images = [image for image in sorted(train['images'], key=lambda image: image['id'])
              if image['id'] in with_box][:NUM_OVERFIT]
    if len(images) < NUM_OVERFIT:
        raise DataError(f'{source}: instances_train.json: expected at least {NUM_OVERFIT} images '
                        f'with a box, found {len(images)}')
    chosen = {image['id'] for image in images}
    subset = {**train, 'images': images, 'annotations': [
        a for a in train['annotations'] if a['image_id'] in chosen]}
    return {**content, f'train{NUM_OVERFIT}': subset}


DATA_SETS = dict(voc07=apply_difficult_rule, coco_mini=add_overfit_subset)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=DATA_SETS)
    parser.add_argument('--source', required=True, help='folder with the tar files')
    parser.add_argument('--out', help='folder to make (default: data/NAME)')
    args = parser.parse_args(argv)
    out = args.out or f'data/{args.name}'
    try:
        prepare(args.name, args.source, out)
    except (DataError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(f'ready: {out}')


if __name__ == '__main__':
    sys.exit(main())
