#!/usr/bin/env python
"""Times a detector in inference runtimes, and compares it with its twin with BatchNorm.

It times the outputs of the head. Each installed runtime runs on one thread. The tool writes a
line for each runtime and model. If a runtime fails, it says why, goes on with the others, and
ends with exit code 1.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from dn_mmdet.benchmark.variants import wake
from dn_mmdet.checkpoint import check_fits, open_checkpoint
from dn_mmdet.checks import preflight
from dn_mmdet.cli import command_line
from dn_mmdet.convert import dn_layers
from dn_mmdet.deploy import export, runtimes
from dn_mmdet.deploy.folded_config import built
from dn_mmdet.files import write_text
from dn_mmdet.fold import recalibrate
from dn_mmdet.messages import ConfigError
from dn_mmdet.tables import csv_text, read_table


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of a detector with DN-B')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file. Without one, the weights are random, and the tool takes the '
        'statistics of the norms from its own images',
    )
    parser.add_argument(
        '--size',
        type=command_line.positive,
        nargs=2,
        required=True,
        metavar=('HEIGHT', 'WIDTH'),
        help='height and width of the image',
    )
    parser.add_argument(
        '--runtimes',
        nargs='+',
        default=list(runtimes.RUNTIMES),
        choices=list(runtimes.RUNTIMES),
        help='runtimes to measure (default: all)',
    )
    parser.add_argument(
        '--rounds',
        type=command_line.positive,
        default=40,
        help='how often each model runs (default: %(default)s)',
    )
    parser.add_argument(
        '--out',
        default='runtimes.csv',
        help='file to write; lines of other runtimes and configs in it are kept (default: '
        '%(default)s)',
    )
    command_line.add_common_arguments(parser)
    return parser, parser.parse_args(argv)


def run(args):
    export.check_installed()
    torch.set_num_threads(1)
    cfg = command_line.load_config(args.config, args.cfg_options)
    torch.manual_seed(0)
    model = built(cfg)
    if not dn_layers(model):
        raise ConfigError(f"{args.config}: builds no DN layers; set norm_cfg to dict(type='DNB')")
    detector = export.Detector(model, args.size)
    coarse = torch.rand(8, 3, *(-(-side // 8) for side in args.size))
    images = 255 * torch.nn.functional.interpolate(coarse, detector.size, mode='bilinear')
    if args.checkpoint:
        checkpoint = open_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
        check_fits(model, checkpoint, args.checkpoint)
    else:
        recalibrate(wake(model), [export.batch_of(images)])
    out = Path(args.out)
    preflight.make_folder(out.parent, '--out')
    columns, config = (*runtimes.FIELDS, 'config'), Path(args.config).stem
    rows = read_table(out, [columns, runtimes.FIELDS], {}) if out.exists() else []
    models = runtimes.models_of(detector, images.numpy())
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.runtimes:
            missing = runtimes.RUNTIMES[name].missing()
            if missing:
                print(f'{name}: left out, not installed: {", ".join(missing)}')
                continue
            try:
                found = runtimes.measured(
                    name, models, images[:1].numpy(), Path(folder), args.rounds
                )
            except Exception as error:  # of any kind: each runtime has its own
                failed.append(name)
                print(f'{name}: failed: {type(error).__name__}: {error}', flush=True)
                continue
            rows = [  # rows of an earlier file do not say which config they are of
                row
                for row in rows
                if row['runtime'] != name or row.get('config') not in (None, config)
            ]
            for row in found:
                print(
                    f'{name} {row.version}, {row.model}: {row.ms:.2f} ms, {row.ratio:.2f} of '
                    f'BN, error {row.error:.1e}',
                    flush=True,
                )
                rows.append(
                    dict(
                        row._asdict(),
                        ms=f'{row.ms:.2f}',
                        ratio=f'{row.ratio:.3f}',
                        error=f'{row.error:.1e}',
                        config=config,
                    )
                )
            write_text(out, csv_text(rows, columns))
    return 1 if failed else 0


def main(argv=None):
    parser, args = parse(argv)
    with command_line.one_message(parser):
        return run(args)


if __name__ == '__main__':
    sys.exit(main())
