#!/usr/bin/env python
"""Times DN-B and DN-C against BatchNorm and GroupNorm, after it checked them with the reference.

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
        '--plot', metavar='FILE', help='draw the times of the layers into this image'
    )
    parser.add_argument(
        '--bars',
        metavar='FILE',
        help='measure nothing, only compare the rows of this CSV file with the targets for a GPU',
    )
    args = parser.parse_args(argv)
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


def main(argv=None):
    args = parse(argv)
    if args.bars:
        return show_bars(args.bars, args.plot)
    deadline = benchmark.Deadline(args.seconds)
    setting = Setting(
        args.device, getattr(torch, args.amp or 'float32'), args.channels_last, args.pairs
    )
    norms = args.norms or [
        BN,
        GN,
        *(
            Variant(norm, backend)
            for norm in ('DNB', 'DNC')
            for backend in (*setting.fused, 'reference')
        ),
    ]
    dn = [v for v in norms if v.norm in ('DNB', 'DNC')]
    shapes = benchmark.ssdlite_shapes(args.size)
    if args.compile_only:
        i, n = args.compile_only
        if args.parts == ['compiled']:
            benchmark.run_blocks(setting, args.batch, benchmark.sizes(args.size)[i::n], dn)
            return 0
        for dtype, channels_last in product((torch.float16, torch.float32), (False, True)):
            setting = Setting(args.device, dtype, channels_last)
            benchmark.run_layers(setting, args.batch, benchmark.by_size(shapes)[i::n], dn)
        return 0
    run = Run(args, benchmark.provenance(setting, args.commit))  # of the code that is loaded now
    detectors = None
    norms, dn = run.without_those_that_do_not_run(setting, args.batch, shapes, norms, dn)
    try:
        if set(args.parts) - {'detector', 'tuning', 'compiled'} or (
            args.amp and 'detector' in args.parts
        ):  # see Detectors.check
            benchmark.check_layers(setting, args.batch, shapes, dn)
            if args.compiled:
                benchmark.check_layers(
                    setting, args.batch, benchmark.by_size(shapes)[: args.compiled], [COMPILED]
                )
        if 'detector' in args.parts:
            plain = [v for v in dn if v == benchmark.REFERENCE or v.backend != 'reference']
            detectors = benchmark.Detectors(
                setting, [BN, FOLDED, *([GN] if GN in norms else []), *plain], size=args.size
            )
            detectors.check(min(args.batch, 8))
    except benchmark.ParityError as error:
        print(f'benchmark: {error}', file=sys.stderr)
        return 1
    single = [COMPILED] if args.compiled else []
    parts = {
        'host': lambda: benchmark.measure_host(setting, norms),
        'step': lambda: benchmark.measure_step(setting, args.batch, shapes, norms),
        'layers': lambda: benchmark.measure_layers(
            setting, args.batch, shapes, [*norms, *single], args.compiled, deadline, run.failures
        ),
        'compiled': lambda: benchmark.measure_compiled(
            setting, args.batch, norms, args.size, deadline, run.failures
        ),
        'tuning': lambda: tunings(setting, args.batch),
        'detector': lambda: detectors.measure('train', args.batch, run.failures),
    }
    for part, measure in parts.items():
        if part in args.parts:
            run.measure(f'{part}, batch {args.batch}, {setting}', measure, deadline)
    if detectors:
        for batch in args.inference_batch or sorted({args.batch, 1}, reverse=True):
            run.measure(
                f'detector, inference, batch {batch}, {setting}',
                lambda batch=batch: detectors.measure('inference', batch, run.failures),
                deadline,
            )
    return run.finish()


def tunings(setting, batch):
    if setting.device == 'cuda':
        major, minor = torch.cuda.get_device_capability()
        benchmark.compile_tunings(setting, batch, 10 * major + minor)
    return benchmark.measure_tunings(setting, batch)


class Run:
    """The rows of a run, written as soon as a part has them, and what was not measured."""

    def __init__(self, args, provenance):
        self.args, self.provenance = args, provenance
        self.rows, self.failures = [], []

    def without_those_that_do_not_run(self, setting, batch, shapes, norms, dn):
        """The variants that this machine can run; the others are not measured, and said to be."""
        dropped = set()
        for v in dn if self.args.norms else ():  # the default ones are those that can run
            try:
                benchmark.run_layers(setting, batch, benchmark.by_size(shapes)[-1:], [v])
            except (ImportError, ValueError, RuntimeError) as error:
                self.failures.append(f'{v.label}: {error}')
                dropped.add(v)
        return ([v for v in norms if v not in dropped], [v for v in dn if v not in dropped])

    def measure(self, what, measure, deadline):
        if deadline.passed():
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


if __name__ == '__main__':
    sys.exit(main())
