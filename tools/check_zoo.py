#!/usr/bin/env python
"""Checks every detector that comes with the installed mmdet, with DN-B in place of BatchNorm.

Each config runs in its own process. Each row is written when its check ends, and the next run
continues after the last row. The order is random, but the same each time, so that the rows of
an unfinished sweep are a fair sample.
"""

import argparse
import fnmatch
import random
import resource
import sys
from pathlib import Path

import torch

from dn_mmdet.checks import preflight
from dn_mmdet.cli import command_line
from dn_mmdet.zoo.check import check, distinct, shipped_configs
from dn_mmdet.zoo.sweep import (
    append_row,
    bounded,
    by_architecture,
    read_rows,
    report,
    row_of,
    with_table,
    write_rows,
)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--out-dir',
        default='work_dirs/zoo',
        help='folder for zoo.csv and the output of each check (default: %(default)s)',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        default=['*'],
        metavar='PATTERN',
        help='configs to check, for example "yolox/*" (default: all)',
    )
    parser.add_argument(
        '--again', action='store_true', help='also check configs that already have a row'
    )
    parser.add_argument(
        '--time-limit',
        type=int,
        default=180,
        metavar='SECONDS',
        help='limit of processor time for each config (default: %(default)s)',
    )
    parser.add_argument(
        '--memory',
        type=float,
        default=16,
        metavar='GIB',
        help='limit of memory for each config (default: %(default)s)',
    )
    parser.add_argument(
        '--docs',
        metavar='FOLDER',
        help='write zoo.md, results/zoo.csv and the table in models.md into this folder',
    )
    parser.add_argument(
        '--no-checks',
        action='store_true',
        help='check nothing, only write --docs from the rows that exist',
    )
    return parser, parser.parse_args(argv)


def sweep(args):
    csv, logs = Path(args.out_dir, 'zoo.csv'), Path(args.out_dir, 'logs')
    preflight.make_folder(logs, '--out-dir')
    rows = read_rows(csv)
    write_rows(csv, rows)  # without the half row that a killed run can leave
    left_out = []
    models = distinct(shipped_configs(), left_out.append)
    chosen = [
        name
        for name in models
        if (args.again or name not in rows)
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in args.only)
        and not args.no_checks
    ]
    random.Random(0).shuffle(chosen)
    print(f'{len(models)} distinct detectors, {len(chosen)} to check')
    torch.set_num_threads(1)  # a forked process must not wait for its parent's threads
    for number, name in enumerate(chosen, 1):
        cfg, names = models[name]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = bounded(
            lambda enter, cfg=cfg: check(cfg, enter),
            args.time_limit,
            args.memory,
            logs / f'{name.replace("/", "_")}.txt',
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        row = row_of(name, result, seconds, names)
        append_row(csv, row)
        print(
            f'{number}/{len(chosen)} {name}: {row["status"]} {row["reason"]} ({row["seconds"]} s)',
            flush=True,
        )
    rows = read_rows(csv)
    write_rows(csv, rows)
    if args.docs:
        write_docs(Path(args.docs), rows, len(models), left_out)


def write_docs(folder, rows, total, left_out):
    models = folder / 'models.md'
    page = with_table(models.read_text(), by_architecture(rows))
    preflight.make_folder(folder / 'results', '--docs')
    read_rows(folder / 'results' / 'zoo.csv')  # which refuses another file
    write_rows(folder / 'results' / 'zoo.csv', rows)
    command = f'python tools/check_zoo.py --docs {folder.name}'
    (folder / 'zoo.md').write_text(report(rows, command, total, left_out))
    models.write_text(page)


def main(argv=None):
    parser, args = parse(argv)
    with command_line.one_message(parser):
        sweep(args)


if __name__ == '__main__':
    sys.exit(main())
