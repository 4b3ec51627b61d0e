#!/usr/bin/env python
"""Writes a detector as one ONNX file: images in; boxes, scores and labels out."""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from dn_mmdet.checkpoint import check_fits, open_checkpoint
from dn_mmdet.checks import preflight
from dn_mmdet.cli import command_line
from dn_mmdet.cli.predict import find_images
from dn_mmdet.deploy import export
from dn_mmdet.deploy.folded_config import built
from dn_mmdet.deploy.simplify import TARGETS
from dn_mmdet.messages import ConfigError, some
from dn_mmdet.registered import is_of

# After dn_mmdet, which says what to install where mmdet is missing.
# isort: split
from mmcv.transforms import Resize
from mmdet.registry import TRANSFORMS


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='file to write; it must not exist (default: name of the checkpoint, with .onnx)',
    )
    parser.add_argument(
        '--size',
        type=command_line.positive,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='height and width of the images (default: the scale of Resize in test_dataloader)',
    )
    parser.add_argument(
        '--target',
        choices=TARGETS,
        default=TARGETS[0],
        help='portable (the default): for any runtime and any number of images; '
        'onnxruntime: faster in onnxruntime, for one image at a time',
    )
    parser.add_argument(
        '--raw',
        action='store_true',
        help='write the outputs of the head, for runtimes that cannot suppress overlapping boxes',
    )
    parser.add_argument(
        '--images',
        default=None,
        help='an image or a folder of images. Before the file is written, onnxruntime is '
        'compared with mmdet on the first 8 of them (default: on random pixels)',
    )
    parser.add_argument(
        '--latency',
        action='store_true',
        help='measure the time per image in onnxruntime on one thread, also for the same '
        'detector with folded BatchNorm',
    )
    command_line.add_common_arguments(parser)
    return parser, parser.parse_args(argv)


def image_size(cfg, option):
    if option is not None:
        return tuple(option)
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:  # inside a wrapper
        dataset = dataset['dataset']
    for transform in dataset.get('pipeline', ()):
        if is_of(TRANSFORMS, transform, Resize) and 'scale' in transform:
            scale = transform['scale']
            width, height = (scale, scale) if isinstance(scale, int) else scale
            return height, width
    raise ConfigError(
        '--size: give the size, because the config has no Resize with a scale in '
        'test_dataloader.dataset.pipeline'
    )


def run(args):
    export.check_installed()
    out = Path(args.out or Path(args.checkpoint).with_suffix('.onnx'))
    if out.suffix != '.onnx':
        raise ConfigError(f'--out: expected a file name in .onnx, got {out}')
    preflight.check_new([out], '--out')
    cfg = command_line.load_config(args.config, args.cfg_options)
    model = built(cfg)
    preflight.check_evaluation(model)
    checkpoint = open_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
    check_fits(model, checkpoint, args.checkpoint)
    size = image_size(cfg, args.size)
    detector = export.Detector(model, size, raw=args.raw)
    preflight.make_folder(out.parent, '--out')
    if args.images:
        images = export.read_images(find_images(args.images)[:8], size)
    else:
        images = torch.randint(256, (2, 3, *size)).float().numpy()
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        whole = Path(folder, 'whole.onnx')
        simple = export.export(detector, whole, args.target)
        agreement = export.compare(export.open_session(whole), detector, images)
        print(
            f'onnxruntime against mmdet on {len(images)} images: outputs of the head differ '
            f'by {agreement.raw:.1e} of their range at most'
            + (
                f', {agreement.matched} of {agreement.detections} detections match, and '
                f'onnxruntime gives {agreement.more} others'
                if detector.outputs
                else ''
            )
        )
        if not agreement.raw <= export.TOLERANCE:
            raise ConfigError(
                f'{out}: not written, the outputs of the head differ by '
                f'more than {export.TOLERANCE} of their range'
            )
        if agreement.is_bad():
            raise ConfigError(
                f'{out}: not written, more detections differ from those of mmdet than agree. '
                f'Compare on real images with --images, or export with --raw'
            )
        names = detector.outputs or detector.raw_names
        export.keep_outputs(whole, out, names)
        print(in_words(simple))
        number = 'N' if args.target == 'portable' else 1
        print(f'{out}: images ({number}, 3, {size[0]}, {size[1]}) -> {", ".join(names)}')
        if args.latency:
            twin = export.Detector(export.folded_twin(model), size, raw=args.raw)
            export.export(twin, Path(folder, 'bn.onnx'), args.target)
            print_latency({'BN, folded': Path(folder, 'bn.onnx'), 'this detector': whole}, images)


def in_words(simple):
    text = (
        f'{len(simple.folded)} norms folded into convolutions, {len(simple.dynamic)} '
        f'dynamic layers'
    )
    if simple.left:
        text += (
            f', {len(simple.left)} norms as they were, which other runtimes may not take '
            f'({some(simple.left)})'
        )
    return text


def print_latency(paths, images):
    print(f'milliseconds an image, median (5 %, 95 %); {export.versions()}')
    for name, path in paths.items():
        times = export.latency(export.open_session(path), images)
        cuts = statistics.quantiles(times, n=20)
        print(f'{name}: {statistics.median(times):.2f} ({cuts[0]:.2f}, {cuts[-1]:.2f})')


def main(argv=None):
    parser, args = parse(argv)
    with command_line.one_message(parser):
        run(args)


if __name__ == '__main__':
    sys.exit(main())
