#!/usr/bin/env python
"""Trains a detector, as mmdet's tools/train.py does. First, it checks config, data and folders."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from dn_mmdet.checkpoint import (
    check_fits,
    check_resumable,
    is_remote,
    open_checkpoint,
    safe_loading,
)
from dn_mmdet.checks import preflight
from dn_mmdet.cli import command_line
from dn_mmdet.convert import FAMILIES, swap_norm
from dn_mmdet.messages import ConfigError


def parse(argv):
    parser = argparse.ArgumentParser(
        description='Train a detector. Config, data, checkpoint and work folder are checked '
        'before anything is written.'
    )
    parser.add_argument(
        'config',
        help='config file, or one that comes with mmdet, such as '
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    )
    parser.add_argument(
        '--norm',
        choices=list(FAMILIES),
        help='replace BatchNorm with Dynamic Normalization, wherever the config can change it',
    )
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints (default: that of '
        'the config, or work_dirs/<name of the config>[_<norm>])',
    )
    parser.add_argument(
        '--amp', action='store_true', help='use automatic mixed precision (on a GPU)'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate with the batch size. The config's learning rate is for "
        'auto_scale_lr.base_batch_size',
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue a training from the last checkpoint in the work folder, or from '
        'CHECKPOINT. If the folder is empty, the training starts from the beginning',
    )
    again.add_argument(
        '--overwrite',
        action='store_true',
        help='train from the start in a folder that already holds checkpoints. They are '
        'removed after the first step. Other files stay',
    )
    parser.add_argument(
        '--seed',
        type=int,
        help='random seed (default: that of the config, or a random one; the log shows it)',
    )
    parser.add_argument(
        '--deterministic',
        action='store_true',
        help='make trainings with the same seed give the same result, as far as torch can',
    )
    command_line.add_common_arguments(parser)
    command_line.add_launcher_arguments(parser)
    return parser, parser.parse_args(argv)


def configure(args):
    cfg = command_line.load_config(args.config, args.cfg_options)
    preflight.check_parts(cfg, 'train_dataloader', 'train_cfg', 'optim_wrapper')
    name = Path(args.config).stem
    if args.norm is not None:
        preflight.check_model(cfg)  # what is wrong with it has nothing to do with the swap
        cfg = swap_norm(cfg, args.norm)
        name = f'{name}_{args.norm.lower()}'
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', name))
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ConfigError(
                f'--auto-scale-lr: {args.config} does not say which batch size its '
                f'learning rate is for. Set auto_scale_lr.base_batch_size'
            )
        cfg.auto_scale_lr.enable = True
    randomness = dict(cfg.get('randomness', {}))
    if args.seed is not None:
        randomness['seed'] = args.seed
    if args.deterministic:
        randomness['deterministic'] = True
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS refuses without
    if randomness:
        cfg.randomness = randomness
    if args.resume == 'auto' and preflight.is_fresh(cfg.work_dir):
        cfg.resume = False  # but load_from stays
    elif args.resume is not None:
        cfg.resume = True
        auto = args.resume == 'auto'
        cfg.load_from = preflight.moved_checkpoint(cfg.work_dir) if auto else args.resume
    if args.overwrite:
        cfg.resume = False
    return cfg


def check(cfg, args):
    command_line.check_launcher(args.launcher)
    preflight.check_amp(cfg)
    model = preflight.check_model(cfg)
    model.train()  # as a runner does: some backbones freeze stages then
    preflight.tell_frozen(model)
    if cfg.get('val_dataloader'):
        preflight.check_evaluation(model)
    for split in ('train', 'val'):
        preflight.check_data(cfg, split, model)
    preflight.check_same_classes(cfg, ('train', 'val'))
    resume = preflight.resumes(cfg)
    path = preflight.checkpoint_to_resume(cfg.work_dir, resume) if resume else cfg.get('load_from')
    if path and not is_remote(path):
        checkpoint = open_checkpoint(path, trust=args.trust_checkpoint)
        if resume:
            check_resumable(checkpoint, path)
            preflight.check_trained_classes(cfg, 'train', checkpoint, path)
        check_fits(model, checkpoint, path, whole=bool(resume))
        if resume:
            preflight.check_same_optimizer(cfg, model, checkpoint, path)
    if args.overwrite:
        preflight.check_overwrite(cfg)
    preflight.check_config_copy(cfg)
    return resume


def train(cfg, overwrite):
    runner = command_line.build_runner(cfg)
    if overwrite:
        runner.register_hook(command_line.RemoveOldCheckpoints())
    runner.train()


def main(argv=None):
    parser, args = parse(argv)
    command_line.set_local_rank(args.local_rank)
    with contextlib.ExitStack() as stack:
        stack.enter_context(command_line.one_message(parser))
        stack.enter_context(safe_loading(args.trust_checkpoint))
        cfg = configure(args)
        if command_line.is_first_process(args.launcher):
            resume = check(cfg, args)
            stack.enter_context(preflight.reserved(cfg.work_dir, resume, args.overwrite))
        train(cfg, args.overwrite)
        command_line.leave_processes(cfg)


if __name__ == '__main__':
    sys.exit(main())
