#!/usr/bin/env python
"""Detects objects in an image or in all images of a folder."""

import argparse
import sys
from pathlib import Path

from dn_mmdet.checkpoint import check_fits, is_remote, open_checkpoint, safe_loading
from dn_mmdet.checks import preflight
from dn_mmdet.cli import command_line
from dn_mmdet.cli.predict import PICTURES, PREDICTIONS, find_images, holds_predictions, predict
from dn_mmdet.messages import ConfigError


def parse(argv):
    parser = argparse.ArgumentParser(
        description='Detect objects in an image or in all images of a folder. Writes the '
        'pictures to OUT_DIR/vis and all detections to OUT_DIR/predictions.json, in COCO format.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        'images', metavar='image_or_folder', help='an image, or a folder of images'
    )
    parser.add_argument(
        '--out-dir',
        default='predictions',
        help='folder to write to. Only the results of an earlier prediction are replaced in it '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        metavar='SCORE',
        help='leave out detections with a score below this (default: %(default)s)',
    )
    command_line.add_common_arguments(parser)
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse(argv)
    with command_line.one_message(parser), safe_loading(args.trust_checkpoint):
        images = find_images(args.images)
        cfg = command_line.load_config(args.config, args.cfg_options)
        preflight.check_parts(cfg, 'test_dataloader')
        model = preflight.check_model(cfg)
        preflight.check_evaluation(model)
        if not is_remote(args.checkpoint):
            checkpoint = open_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
            check_fits(model, checkpoint, args.checkpoint)
        if not holds_predictions(args.out_dir):
            pictures = [Path(args.out_dir, PICTURES, image.name) for image in images]
            preflight.check_new(
                [Path(args.out_dir, PREDICTIONS), *pictures], '--out-dir', kind='folder'
            )
        preflight.make_folder(args.out_dir, '--out-dir')
        unreadable = predict(cfg, args.checkpoint, images, args.out_dir, args.score_thr)
        if unreadable:
            raise ConfigError(
                f'{len(unreadable)} of {len(images)} files cannot be '
                f'read as images and were left out: '
                f'{", ".join(map(str, unreadable))}'
            )


if __name__ == '__main__':
    sys.exit(main())
