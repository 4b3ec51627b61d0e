#!/usr/bin/env python
"""Compares configs over seeds, learning rates and batch sizes, and reports with uncertainty.

Trains every combination once, each in its own folder under --out. Evaluates each a second
time with its DN layers folded into BatchNorms. Writes tables and figures to --out/report.
If the tool is interrupted, the same command continues. It repeats no run that has ended.
"""

import argparse
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from dn_mmdet.checks import preflight
from dn_mmdet.cli import command_line
from dn_mmdet.experiments import compare, presets, report, results
from dn_mmdet.messages import ConfigError
from dn_mmdet.provenance import commit_of


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'configs',
        nargs='*',
        metavar='CONFIG',
        help='config files; the first is the baseline for the others',
    )
    parser.add_argument(
        '--preset',
        choices=sorted(presets.PRESETS),
        help='train a prepared set of variants, made from one config with BatchNorm',
    )
    parser.add_argument(
        '--variants',
        nargs='+',
        metavar='NAME',
        help='run only these variants of the preset, and the config itself',
    )
    parser.add_argument(
        '--seeds',
        nargs='+',
        type=int,
        default=[0],
        metavar='SEED',
        help='random seeds (default: 0)',
    )
    parser.add_argument(
        '--lr',
        nargs='+',
        type=_factor,
        metavar='xFACTOR',
        help="multiply the config's learning rate by these factors, for example x1 x4",
    )
    parser.add_argument(
        '--batch',
        nargs='+',
        type=command_line.positive,
        metavar='SIZE',
        help='training batch sizes; the learning rate changes in proportion',
    )
    parser.add_argument(
        '--epochs',
        type=command_line.positive,
        help='passes over the training data (default: as in the configs)',
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/compare'),
        help='folder for the runs and the report (default: %(default)s)',
    )
    parser.add_argument(
        '--jobs',
        type=command_line.positive,
        help='how many runs train at once (default: one per CPU core or GPU)',
    )
    parser.add_argument(
        '--no-folded',
        dest='folded',
        action='store_false',
        help='do not evaluate the runs a second time with their DN layers folded',
    )
    parser.add_argument(
        '--question', default='', help='name of the question that these runs answer, for the table'
    )
    parser.add_argument(
        '--metric',
        help=f'metric to report, as the log names it (default: {" or ".join(results.METRICS)})',
    )
    parser.add_argument(
        '--csv',
        type=Path,
        help='also write the rows into this file; the rows of other runs stay in it',
    )
    parser.add_argument(
        '--commit', help='commit of the code to name in the table, if this is not a git checkout'
    )
    parser.add_argument(
        '--allow-different',
        action='store_true',
        help='go on even if the configs differ in more than the norm',
    )
    parser.add_argument(
        '--report-only',
        nargs='+',
        type=Path,
        metavar='FOLDER',
        help='train nothing; write the report from the runs in these folders, or from '
        'CSV files that --csv wrote. They may come from other machines',
    )
    parser.add_argument(
        '--baseline', help='name of the config to compare with (default: the first)'
    )
    command_line.add_common_arguments(parser)
    args = parser.parse_args(argv)
    if bool(args.configs) == bool(args.report_only):
        parser.error('expected config files, or --report-only FOLDER')
    if args.preset and len(args.configs) != 1:
        parser.error(f'--preset {args.preset}: expected one config, with BatchNorm')
    if args.variants and not args.preset:
        parser.error('--variants: chooses from the variants of a --preset, but none is given')
    return parser, args


def _factor(text):
    try:
        value = float(text.removeprefix('x'))
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f'expected a factor above 0 such as x4, got {text}')
    return value


def grid(args):
    """The points that the options mean, checked before anything is written."""
    variants = [
        compare.NamedConfig(
            Path(path).stem, path, command_line.load_config(path, args.cfg_options)
        )
        for path in args.configs
    ]
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise ConfigError(f'expected configs with different file names, got {", ".join(names)}')
    if args.preset:
        points = presets.points_of(
            args.preset, variants[0], args.seeds, args.lr, args.batch, args.epochs
        )
        if args.variants:
            points = compare.choose(points, args.variants)
    else:
        points = compare.product(
            variants, args.seeds, args.lr or [1.0], args.batch or [None], args.epochs
        )
    return compare.check(points, args.allow_different)


def main(argv=None):
    parser, args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the children as Ctrl-C does
    console = Console(highlight=False)
    failures = {}
    with command_line.one_message(parser):
        report.check_out(args.out / 'report')
        if args.csv and args.csv.exists():
            results.read_rows(args.csv)  # before hours of training
        folders = args.report_only
        if not folders:
            runs = compare.plan(grid(args), args.out, args.question, args.commit or commit_of())
            preflight.make_folder(args.out, '--out')
            jobs = args.jobs or torch.cuda.device_count() or compare.cores()
            failures = compare.run_grid(runs, jobs, console, args.folded, args.trust_checkpoint)
            folders = [run.folder for run in runs]
        written = report.write(folders, args.out / 'report', args.metric, args.baseline)
        if args.csv:
            results.merge_rows(args.csv, written.rows)
    for name, text in failures.items():
        console.print(f'\n{name} failed: {text}', markup=False, soft_wrap=True)
    console.print(written.text, markup=False, soft_wrap=True)
    console.print(f'Report: {args.out / "report"}', soft_wrap=True)
    if failures:
        parser.exit(
            1,
            f'{parser.prog}: error: {len(failures)} runs failed (see above); the '
            f'same command starts only these again\n',
        )


if __name__ == '__main__':
    sys.exit(main())
