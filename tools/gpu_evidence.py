#!/usr/bin/env python
"""Trains many small classifiers on one GPU, eight at once, and writes a row for each.

First, on a machine with MMDetection and MMPretrain:

    tools/gpu_evidence.py --prepare CONFIG --runs bn,dnb:0-4 static:0-4 --images IMAGES.tar.xz

This writes a plan of the runs, with their commit, and the images into --folder. Then, on the
GPU machine, which needs neither MMDetection nor MMPretrain:

    tools/gpu_evidence.py --csv ROWS.csv --seconds 300

Before a variant is trained, its layers are compared with the float64 reference on that device,
and a step that is replayed from a CUDA graph with a step that is not. If one of them differs
too much, the variant is refused. If the row of a run is in the file, the run is not trained
again. A run that was killed starts again.
"""

import argparse
import logging
import math
import sys
from pathlib import Path

from mmengine.logging import MMLogger

from dn_mmdet.experiments import gpu_grid


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--folder',
        type=Path,
        default=Path('work_dirs/gpu'),
        help='folder of the plan and the images (default: %(default)s)',
    )
    parser.add_argument(
        '--prepare',
        metavar='CONFIG',
        help='write the plan, made from this classification config with BatchNorm',
    )
    parser.add_argument(
        '--runs',
        nargs='+',
        metavar='NAMES:SEEDS',
        help='what to train, in this order: bn and variants of the preset "causes", with their '
        'seeds, for example bn,dnb:0-4 or dnb:0@lr8@batch32@epochs3',
    )
    parser.add_argument(
        '--append',
        action='store_true',
        help='with --prepare: add the runs to the end of the plan that exists',
    )
    parser.add_argument(
        '--images',
        type=Path,
        metavar='TAR',
        help='archive of the images, with train/<class>/* and val/<class>/*',
    )
    parser.add_argument(
        '--epochs', type=int, help='passes over the training images (default: as in the config)'
    )
    parser.add_argument(
        '--question',
        default='GPU',
        help='name of the question that these runs answer, for the table',
    )
    parser.add_argument(
        '--commit', help='commit of the code to name in the table, if this is not a git checkout'
    )
    parser.add_argument('--csv', type=Path, help='train the plan, and write the rows to this file')
    parser.add_argument(
        '--seconds',
        type=float,
        default=math.inf,
        help='stop all trainings after this time (default: no limit)',
    )
    parser.add_argument(
        '--parallel',
        type=int,
        default=8,
        metavar='N',
        help='number of trainings at once (default: %(default)s)',
    )
    parser.add_argument(
        '--backends',
        nargs='+',
        default=gpu_grid.BACKENDS,
        help='backends of the DN layers to try; the first that computes correct results on '
        f'this device is used (default: {" ".join(gpu_grid.BACKENDS)})',
    )
    args = parser.parse_args(argv)
    if bool(args.prepare) == bool(args.csv):
        parser.error('expected --prepare CONFIG or --csv FILE')
    if args.prepare and not (args.runs and args.images):
        parser.error('--prepare: expected --runs and --images as well')
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    if args.prepare:
        # Here: they need MMDetection.
        from dn_mmdet.cli import command_line
        from dn_mmdet.experiments import gpu_plan

        with command_line.one_message(parser):
            runs = gpu_plan.prepare(
                args.prepare,
                args.runs,
                args.folder,
                args.images,
                args.epochs,
                args.question,
                args.commit,
                args.append,
            )
        print(f'{len(runs)} runs of commit {runs[0]["row"]["commit"]}: {args.folder}')
        return 0
    MMLogger.get_instance('gpu_evidence', log_level=logging.WARNING)
    try:
        whole = gpu_grid.train(args.folder, args.csv, args.seconds, args.parallel, args.backends)
    except ValueError as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    return 0 if whole else 1


if __name__ == '__main__':
    sys.exit(main())
