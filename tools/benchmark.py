#!/usr/bin/env python
"""Times DN-B and DN-C against BatchNorm and GroupNorm, once parity with the reference is shown.

    tools/benchmark.py --device cpu --csv benchmark.csv --plot benchmark.png

The layer part needs torch and mmengine alone; the detector part MMDetection as well.
"""
import argparse
import sys
from pathlib import Path

import torch

from dn_mmdet import benchmark
from dn_mmdet.benchmark import BN, COMPILED, FOLDED, GN, Setting, Variant


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--parts', nargs='+', choices=['layers', 'detector'],
                        default=['layers', 'detector'])
    parser.add_argument('--batch', type=int, default=8, help='of layers and training')
    parser.add_argument('--inference-batch', type=int, nargs='+', default=None,
                        help='of the detector at inference (default: --batch and 1)')
    parser.add_argument('--amp', nargs='?', const='float16', choices=['float16', 'bfloat16'],
                        help='feature maps in this dtype, under autocast')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--pairs', type=int, default=15, help='rounds, each a pair with BatchNorm')
    parser.add_argument('--size', type=int, default=320, help='of the images')
    parser.add_argument('--compiled', type=int, default=3, metavar='N',
                        help='time the torch.compiled reference on the N largest shapes; each '
                        'compiles for some seconds (0: leave it out)')
    parser.add_argument('--csv', metavar='FILE', help='append all rows to this file')
    parser.add_argument('--plot', metavar='FILE', help='draw the layers into this image')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no CUDA device here')
    for name, value, least in (('--batch', args.batch, 1), ('--pairs', args.pairs, 1),
                               ('--compiled', args.compiled, 0), ('--size', args.size, 32)):
        if value < least:
            parser.error(f'{name}: expected at least {least}, got {value}')
    if args.plot and 'layers' not in args.parts:
        parser.error("--plot draws the layers: add 'layers' to --parts")
    for option, path in (('--csv', args.csv), ('--plot', args.plot)):
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f'{option} {path}: there is no such folder')
    return args


def main(argv=None):
    args = parse(argv)
    setting = Setting(args.device, getattr(torch, args.amp or 'float32'), args.channels_last,
                      args.pairs)
    dn = [Variant(norm, backend) for norm in ('DNB', 'DNC')
          for backend in (*setting.fused, 'reference')]
    layers = [BN, GN, *dn, *([COMPILED] if args.compiled else [])]
    shapes = benchmark.ssdlite_shapes(args.size)
    provenance = benchmark.provenance(setting)  # of the code that is loaded now
    try:
        if 'layers' in args.parts:
            largest = sorted(shapes, key=lambda shape: shape[0] * shape[1]**2)[-args.compiled:]
            benchmark.check_layers(setting, args.batch, shapes, dn)
            if args.compiled:
                benchmark.check_layers(setting, args.batch, largest, [COMPILED])
        if 'detector' in args.parts:
            detectors = benchmark.Detectors(
                setting, [BN, FOLDED, GN, *(v for v in dn if v.norm == 'DNB'
                                            or v.backend != 'reference')], size=args.size)
            detectors.check(min(args.batch, 8))
    except benchmark.ParityError as error:
        print(f'benchmark: {error}', file=sys.stderr)
        return 1
    rows = []
    if 'layers' in args.parts:
        rows += benchmark.measure_layers(setting, args.batch, shapes, layers, args.compiled)
    if 'detector' in args.parts:
        rows += detectors.measure('train', args.batch)
        for batch in args.inference_batch or sorted({args.batch, 1}, reverse=True):
            rows += detectors.measure('inference', batch)
    rows = [{**provenance, **row} for row in rows]
    print(benchmark.table(rows))
    if args.csv:
        benchmark.write_rows(args.csv, rows)
    if args.plot:
        benchmark.plot(rows, args.plot)
    return 0


if __name__ == '__main__':
    sys.exit(main())
