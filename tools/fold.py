#!/usr/bin/env python
"""Turns a trained model with DN layers into one with BatchNorm, and shows what that costs.

The scale and shift of each layer are frozen at their mean over training images. This makes
it a BatchNorm. Writes the checkpoint, its config, tables, and a figure of accuracy over time.
"""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from dn_mmdet.checkpoint import check_fits, open_checkpoint
from dn_mmdet.checks import preflight
from dn_mmdet.cli import command_line
from dn_mmdet.deploy import folded_files, folding, trade_off
from dn_mmdet.deploy.folded_config import built, check_twin
from dn_mmdet.fold import foldable
from dn_mmdet.messages import ConfigError
from dn_mmdet.provenance import commit_of


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file that the model was trained with')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--images',
        type=int,
        default=512,
        help='how many training images to take the mean over; they have to be like the '
        'images that the model will see (default: %(default)s)',
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        '--keep',
        nargs='+',
        metavar='K',
        help='layers that stay dynamic: a number, for the layers that vary most, or '
        'patterns of names (default: none)',
    )
    chosen.add_argument(
        '--max-drop',
        type=float,
        metavar='DROP',
        help='keep as few layers dynamic as possible, while the metric falls by at most DROP, '
        'for example 0.002',
    )
    parser.add_argument(
        '--metric',
        help='metric to judge by, as the log names it; larger has to be better '
        '(default: coco/bbox_mAP or accuracy/top1)',
    )
    parser.add_argument(
        '--changed',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='evaluate each model also with these options of the config, for example with '
        'another contrast. Only val_dataloader, val_evaluator and model.data_preprocessor '
        'have an effect. The mean over training images does not use them',
    )
    parser.add_argument(
        '--csv',
        type=Path,
        help='also write the table into this file. The rows of other models stay in it, and '
        'a figure with the same name (.png) shows all of them',
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE.pth',
        help='checkpoint to write; config, tables and figure are written beside it '
        '(default: <checkpoint>_folded.pth)',
    )
    command_line.add_common_arguments(parser)
    args = parser.parse_args(argv)
    if args.images < 2:
        parser.error(f'--images: expected at least 2, got {args.images}')
    if args.max_drop is not None and not args.max_drop >= 0:
        parser.error(f'--max-drop: expected a number of at least 0, got {args.max_drop}')
    if args.keep and len(args.keep) == 1 and args.keep[0].isdigit():
        args.keep = int(args.keep[0])
    return parser, args


def check_csv(csv, out):
    """Raises ConfigError where the table or its figure would replace another file."""
    figure = csv.with_suffix('.png')
    if csv.suffix != '.csv' or figure.resolve() == out.with_suffix('.png').resolve():
        raise ConfigError(
            f'--csv: expected a file name in .csv that differs from that of {out}, got {csv}'
        )
    if csv.exists():
        trade_off.read(csv)
    else:
        preflight.check_new([figure], '--csv')


def run(args):
    cfg = command_line.load_config(args.config, args.cfg_options)
    changed = args.changed and command_line.load_config(
        args.config, {**(args.cfg_options or {}), **args.changed}
    )
    preflight.check_parts(cfg, 'train_dataloader', 'val_dataloader', 'val_evaluator')
    out = args.out or Path(args.checkpoint).with_name(f'{Path(args.checkpoint).stem}_folded.pth')
    model = built(cfg)
    foldable(model)
    preflight.check_evaluation(model)
    for split in ('train', 'val'):
        preflight.check_data(cfg, split, model)
    checkpoint = open_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
    check_fits(model, checkpoint, args.checkpoint)
    if changed:
        preflight.check_data(changed, 'val', model)
    check_twin(cfg, model)
    folded_files.check_out(out)
    if args.csv:
        preflight.make_folder(args.csv.parent, '--csv')
        check_csv(args.csv, out)
    commit = commit_of()
    result = folding.fold(
        cfg, model, args.images, args.keep, args.max_drop, args.metric, changed=changed
    )
    print(folded_files.write(result, cfg, checkpoint, out))
    if args.csv:
        rows = trade_off.rows_of(
            result, cfg, Path(args.config).stem, checkpoint, commit, args.changed
        )
        trade_off.merge(args.csv, rows)
        trade_off.draw(args.csv, args.csv.with_suffix('.png'))
    print(f'{out}, and its config {out.with_suffix(".py")}')


def main(argv=None):
    parser, args = parse(argv)
    with command_line.one_message(parser):
        run(args)


if __name__ == '__main__':
    sys.exit(main())
