#!/usr/bin/env python
"""Times DN-B and DN-C against BatchNorm and GroupNorm, after checking them against the reference.

    tools/benchmark.py --device cpu --csv benchmark.csv --plot benchmark.png
    tools/benchmark.py --device cuda --amp --csv gpu.csv --norms BN DNB:auto
    tools/benchmark.py --bars gpu.csv --plot gpu.png

The part 'detector' needs MMDetection. All other parts need only torch and mmengine.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import torch

from dn_mmdet import benchmark
from dn_mmdet.benchmark import BN, COMPILED, FOLDED, GN, Setting, Variant, bars
from dn_mmdet.benchmark.variants import DN
from dn_mmdet.tables import check_columns

PARTS = 'layers', 'step', 'host', 'detector', 'compiled', 'tuning'


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        '--device',
        choices=['cpu', 'cuda'],
        default='cpu',
        help='device to measure on (default: %(default)s)',
    )
    parser.add_argument(
        '--parts',
        nargs='+',
        choices=PARTS,
        help='what to measure. layers: the layers one by one; step: all layers in one training '
        'step; host: the host time of one call; detector: SSDLite; compiled: nine layers '
        'under torch.compile; tuning: tile sizes of the GPU kernels (default: layers detector; '
        'on a GPU all except the last two)',
    )
    parser.add_argument(
        '--norms',
        nargs='+',
        type=variant,
        metavar='NORM',
        help="norms to measure: BN, GN, and DN layers with their backends, such as 'DNB:auto' "
        '(default: BN, GN, and both DN layers with every backend)',
    )
    parser.add_argument(
        '--batch',
        type=int,
        default=8,
        help='batch size of the layers and of training (default: %(default)s)',
    )
    parser.add_argument(
        '--inference-batch',
        type=int,
        nargs='+',
        default=None,
        help='batch sizes of the detector at inference (default: --batch and 1)',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='float16',
        choices=['float16', 'bfloat16'],
        help='run under autocast, with feature maps of this dtype (default: float32; --amp '
        'alone: float16)',
    )
    parser.add_argument(
        '--channels-last', action='store_true', help='use the memory format channels_last'
    )
    parser.add_argument(
        '--pairs',
        type=int,
        default=15,
        help='number of measurements, each next to one of BatchNorm (default: %(default)s)',
    )
    parser.add_argument(
        '--size',
        type=int,
        default=320,
        help='height and width of the images in pixels (default: %(default)s)',
    )
    parser.add_argument(
        '--compiled',
        type=int,
        metavar='N',
        help='also time the reference under torch.compile, on the N largest shapes. Each '
        'takes some seconds to compile (default: 3, or 0 with --norms)',
    )
    parser.add_argument(
        '--seconds',
        type=float,
        metavar='S',
        help='start no measurement after S seconds, and list what is left out (default: no limit)',
    )
    parser.add_argument(
        '--compile-only',
        metavar='I/N',
        help='measure nothing, only compile and cache the kernels: run each layer once in '
        'float16 and float32, contiguous and channels_last. With --parts compiled: run the '
        'layers as they will be measured. The shapes are split into N shares, and this run '
        'takes share I, counted from 1',
    )
    parser.add_argument('--commit', help='commit of this code, if this is not a git checkout')
    parser.add_argument('--csv', metavar='FILE', help='append all rows to this file')
    parser.add_argument(
        '--plot',
        metavar='FILE',
        help='draw the times of the layers into this image. It may already exist if the table '
        'named by --csv or --bars exists',
    )
    parser.add_argument(
        '--bars',
        metavar='FILE',
        help='measure nothing, only compare the rows of this CSV file with the targets for a GPU',
    )
    return checked(parser.parse_args(argv), parser)


def checked(args, parser):
    """The options with their defaults, or an error that says which is wrong."""
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no CUDA device here')
    if args.parts is None:
        args.parts = ['layers', 'detector'] if args.device == 'cpu' else list(PARTS[:4])
    if args.compiled is None:
        args.compiled = 0 if args.norms else 3
    if args.norms and BN not in args.norms:
        parser.error('--norms: the others are compared with BN; add BN')
    for name, value, least in (
        ('--batch', args.batch, 1),
        ('--pairs', args.pairs, 1),
        ('--compiled', args.compiled, 0),
        ('--size', args.size, 32),
    ):
        if value < least:
            parser.error(f'{name}: expected at least {least}, got {value}')
    if args.plot and not args.bars and 'layers' not in args.parts:
        parser.error("--plot draws the layers: add 'layers' to --parts")
    for option, path in (('--csv', args.csv), ('--plot', args.plot)):
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f'{option} {path}: there is no such folder')
    table = args.csv or args.bars
    known = table and Path(table).exists() and str(args.plot).endswith('.png')
    if args.plot and Path(args.plot).exists() and not known:
        parser.error(f'{args.plot}: exists already; name another file with --plot')
    if args.csv:
        try:
            check_columns(args.csv, benchmark.FIELDS)
        except (OSError, ValueError) as error:
            parser.error(f'--csv {error}')
    if args.compile_only:
        args.compile_only = share(args.compile_only, parser)
    return args


def variant(text):
    try:
        return benchmark.parse_variant(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text, parser):
    """(i, n) of 'I/N', counted from 0."""
    i, _, n = text.partition('/')
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        parser.error(f'--compile-only: expected I/N such as 1/4, got {text!r}')
    return int(i) - 1, int(n)


def show_bars(path, plot):
    try:
        rows = benchmark.read_rows(path)
    except (OSError, ValueError) as error:
        print(f'benchmark: {error}', file=sys.stderr)
        return 1
    print(benchmark.bars_table(rows))
    if plot:
        benchmark.plot_gpu(rows, plot, bars.GPU_BATCH, bars.GPU_DTYPE)
    return 0


def all_norms(setting):
    backends = (*setting.fused, 'reference')
    return [BN, GN, *(Variant(norm, backend) for norm in DN for backend in backends)]


def dn_layers(norms):
    return [variant for variant in norms if variant.norm in DN]


def compile_share(args, setting, norms):
    """Runs what --compile-only asks for: its kernels are in the cache afterwards."""
    i, n = args.compile_only
    if args.parts == ['compiled']:
        benchmark.run_blocks(setting, args.batch, benchmark.sizes(args.size)[i::n], norms)
        return
    shapes = benchmark.by_size(benchmark.ssdlite_shapes(args.size))[i::n]
    for dtype, channels_last in product((torch.float16, torch.float32), (False, True)):
        setting = Setting(args.device, dtype, channels_last)
        benchmark.run_layers(setting, args.batch, shapes, norms)


def tunings(setting, batch):
    if setting.device == 'cuda':
        major, minor = torch.cuda.get_device_capability()
        benchmark.compile_tunings(setting, batch, 10 * major + minor)
    return benchmark.measure_tunings(setting, batch)


class Run:
    """The rows of a run, written as soon as a part has them, and what was not measured."""

    def __init__(self, args, setting, norms, deadline):
        self.args, self.setting, self.norms, self.deadline = args, setting, norms, deadline
        self.shapes = benchmark.ssdlite_shapes(args.size)
        self.provenance = benchmark.provenance(setting, args.commit)  # of the code loaded now
        self.detectors = None
        self.rows, self.failures = [], []

    def leave_out_what_does_not_run(self):
        """Of the norms that were asked for: each that this machine cannot run is a failure."""
        smallest = benchmark.by_size(self.shapes)[-1:]
        for variant in dn_layers(self.norms):
            try:
                benchmark.run_layers(self.setting, self.args.batch, smallest, [variant])
            except (ImportError, ValueError, RuntimeError) as error:
                self.failures.append(f'{variant.label}: {error}')
                self.norms = [other for other in self.norms if other != variant]

    def check(self):
        """Raises ParityError where what is to be timed does not compute what it should."""
        args, dn = self.args, dn_layers(self.norms)
        has_layers = bool(set(args.parts) - {'detector', 'tuning', 'compiled'})
        if has_layers or (args.amp and 'detector' in args.parts):  # see Detectors.check
            benchmark.check_layers(self.setting, args.batch, self.shapes, dn)
            if args.compiled:
                largest = benchmark.by_size(self.shapes)[: args.compiled]
                benchmark.check_layers(self.setting, args.batch, largest, [COMPILED])
        if 'detector' in args.parts:
            plain = [v for v in dn if v == benchmark.REFERENCE or v.backend != 'reference']
            variants = [BN, FOLDED, *([GN] if GN in self.norms else []), *plain]
            self.detectors = benchmark.Detectors(self.setting, variants, size=args.size)
            self.detectors.check(min(args.batch, 8))

    def measure(self):
        args, setting, batch = self.args, self.setting, self.args.batch
        compiled = [COMPILED] if args.compiled else []
        parts = {
            'host': lambda: benchmark.measure_host(setting, self.norms),
            'step': lambda: benchmark.measure_step(setting, batch, self.shapes, self.norms),
            'layers': lambda: benchmark.measure_layers(
                setting,
                batch,
                self.shapes,
                [*self.norms, *compiled],
                args.compiled,
                self.deadline,
                self.failures,
            ),
            'compiled': lambda: benchmark.measure_compiled(
                setting, batch, self.norms, args.size, self.deadline, self.failures
            ),
            'tuning': lambda: tunings(setting, batch),
            'detector': lambda: self.detectors.measure('train', batch, self.failures),
        }
        for part, measure in parts.items():
            if part in args.parts:
                self._measure(f'{part}, batch {batch}, {setting}', measure)
        if self.detectors:
            for size in args.inference_batch or sorted({batch, 1}, reverse=True):
                self._measure(
                    f'detector, inference, batch {size}, {setting}',
                    lambda size=size: self.detectors.measure('inference', size, self.failures),
                )

    def _measure(self, what, measure):
        if self.deadline.passed():
            self.failures.append(f'{what}: no time left')
            return
        try:
            rows = [{**self.provenance, **row} for row in measure()]
        except (RuntimeError, benchmark.ParityError) as error:  # the other parts may do
            self.failures.append(f'{what}: {error}')
            return
        if self.args.csv and rows:
            benchmark.write_rows(self.args.csv, rows)
        self.rows += rows

    def finish(self):
        if self.rows:
            print(benchmark.table(self.rows, self.args.device))
            compiled = [row for row in self.rows if row['part'] == 'compiled']
            if compiled:
                print(benchmark.compiled_table(compiled))
            if 'tuning' in self.args.parts:
                for task in ('train', 'inference'):
                    print(f'\n{task}, us of the GPU\n{benchmark.tuning_table(self.rows, task)}')
            if self.args.plot:
                benchmark.plot(self.rows, self.args.plot)
        for failure in self.failures:
            print(f'benchmark: not measured: {failure}', file=sys.stderr)
        return 1 if self.failures else 0


def main(argv=None):
    args = parse(argv)
    if args.bars:
        return show_bars(args.bars, args.plot)
    deadline = benchmark.Deadline(args.seconds)
    dtype = getattr(torch, args.amp or 'float32')
    setting = Setting(args.device, dtype, args.channels_last, args.pairs)
    norms = args.norms or all_norms(setting)
    if args.compile_only:
        compile_share(args, setting, dn_layers(norms))
        return 0
    run = Run(args, setting, norms, deadline)
    if args.norms:  # the default ones are those that can run
        run.leave_out_what_does_not_run()
    try:
        run.check()
    except benchmark.ParityError as error:
        print(f'benchmark: {error}', file=sys.stderr)
        return 1
    run.measure()
    return run.finish()


if __name__ == '__main__':
    sys.exit(main())
