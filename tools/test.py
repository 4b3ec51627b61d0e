#!/usr/bin/env python
"""Evaluates a checkpoint, as mmdet's tools/test.py does. First, it checks config and data."""

import argparse
import sys
from pathlib import Path

from dn_mmdet.checkpoint import check_fits, is_remote, open_checkpoint, safe_loading
from dn_mmdet.checks import preflight
from dn_mmdet.cli import command_line
from dn_mmdet.cli.tta import augmented
from dn_mmdet.messages import ConfigError
from dn_mmdet.registered import is_of

# After dn_mmdet, which says what to install where mmdet is missing.
# isort: split
from mmdet.engine.hooks import DetVisualizationHook, TrackVisualizationHook
from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmdet.registry import HOOKS
from mmengine.evaluator import DumpResults


def parse(argv):
    parser = argparse.ArgumentParser(description='Evaluate a checkpoint.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--work-dir',
        help='folder for the log with the metrics (default: <work folder of the training>/test)',
    )
    parser.add_argument(
        '--out',
        metavar='FILE.pkl',
        help='write the detections to a pickle file; it must not exist',
    )
    parser.add_argument(
        '--show-dir',
        help='draw the detections; the pictures are saved in <work folder>/<time>/SHOW_DIR',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='use test-time augmentation: tta_model and tta_pipeline of the config '
        '(default: each image and its mirror image)',
    )
    command_line.add_common_arguments(parser)
    command_line.add_launcher_arguments(parser)
    parser.set_defaults(show=False)  # mmdet's trigger_visualization_hook asks for it
    args = parser.parse_args(argv)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out: expected a file name that ends in .pkl or .pickle, got {args.out}')
    return parser, args


def configure(args):
    cfg = command_line.load_config(args.config, args.cfg_options)
    preflight.check_parts(cfg, 'test_dataloader', 'test_evaluator', 'test_cfg')
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    else:  # not the training's own, whose config file it would replace
        training = cfg.get('work_dir') or Path('work_dirs', Path(args.config).stem)
        cfg.work_dir = str(Path(training, 'test'))
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.show_dir:
        hook = cfg.get('default_hooks', {}).get('visualization')
        if not is_of(HOOKS, hook, (DetVisualizationHook, TrackVisualizationHook)):
            raise ConfigError(
                '--show-dir: the config needs default_hooks.'
                "visualization=dict(type='DetVisualizationHook')"
            )
        cfg = trigger_visualization_hook(cfg, args)
    return cfg


def check(cfg, tested, args):
    """``tested`` is ``cfg`` itself, or what ``--tta`` makes of it."""
    command_line.check_launcher(args.launcher)
    model = preflight.check_model(cfg)
    preflight.check_evaluation(model)
    if args.tta:
        preflight.check_model(tested)
    preflight.check_data(tested, 'test', model)
    if not is_remote(args.checkpoint):
        checkpoint = open_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
        check_fits(model, checkpoint, args.checkpoint)
        preflight.check_trained_classes(cfg, 'test', checkpoint, args.checkpoint)
    preflight.check_config_copy(tested, test=True)
    if args.out:
        preflight.check_new([args.out], '--out')
    preflight.make_folder(cfg.work_dir, '--work-dir')
    if args.out:
        preflight.make_folder(Path(args.out).parent, '--out')


def test(cfg, out):
    runner = command_line.build_runner(cfg)
    if out:
        dump = DumpDetResults if cfg.default_scope == 'mmdet' else DumpResults
        runner.test_evaluator.metrics.append(dump(out_file_path=out))
    runner.test()


def main(argv=None):
    parser, args = parse(argv)
    command_line.set_local_rank(args.local_rank)
    with command_line.one_message(parser), safe_loading(args.trust_checkpoint):
        cfg = configure(args)
        tested = augmented(cfg) if args.tta else cfg
        if command_line.is_first_process(args.launcher):
            check(cfg, tested, args)
        test(tested, args.out)
        command_line.leave_processes(tested)


if __name__ == '__main__':
    sys.exit(main())
