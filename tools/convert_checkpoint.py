#!/usr/bin/env python
"""Turns a BatchNorm checkpoint into one with Dynamic Normalization that computes the same."""

import argparse
import os
import sys
from pathlib import Path

import torch

from dn_mmdet.checkpoint import check_fits, open_checkpoint
from dn_mmdet.checks import preflight
from dn_mmdet.cli import command_line
from dn_mmdet.convert import convert_checkpoint, dn_layers
from dn_mmdet.files import replacing
from dn_mmdet.layers import dn_layers_in
from dn_mmdet.messages import ConfigError


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'checkpoint',
        help='checkpoint file of a detector, or of a backbone from torchvision or mmpretrain',
    )
    parser.add_argument('out', help='file to write; it must not exist')
    parser.add_argument(
        '--config',
        help='a config with DN layers. Only the layers of its model are converted, the result '
        'is checked against that model, and the config is stored beside the weights',
    )
    parser.add_argument(
        '--reduction',
        type=int,
        default=32,
        help='reduction of SC, if there is no --config (default: %(default)s)',
    )
    parser.add_argument(
        '--min-channels',
        type=int,
        default=8,
        help='min_channels of SC, if there is no --config (default: %(default)s)',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='open a checkpoint that holds more than weights and logs. Such a '
        'file can run any program with your rights',
    )
    return parser, parser.parse_args(argv)


def convert(args):
    out = Path(args.out)
    if os.path.lexists(out):
        raise ConfigError(f'{out}: exists already; choose another file name')
    checkpoint = open_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
    if args.config is None:
        converted = convert_checkpoint(checkpoint, None, args.reduction, args.min_channels)
    else:
        cfg = command_line.load_config(args.config)
        model = preflight.check_model(cfg)
        if not dn_layers(model):
            raise ConfigError(
                f"{args.config}: builds no DN layers; set norm_cfg to dict(type='DNB')"
            )
        converted = convert_checkpoint(checkpoint, model)
        check_fits(model, converted, args.checkpoint)
        if 'meta' in converted:
            converted['meta'] = dict(converted['meta'], cfg=cfg.pretty_text)
    preflight.make_folder(out.parent, 'out')
    with replacing(out) as part:
        torch.save(converted, part)
    keys = list(converted.get('state_dict', converted))
    layers = len(dn_layers_in(keys))
    left = sum(key.endswith('running_mean') for key in keys) - layers
    print(f'{out}: {layers} BatchNorms converted, {left} left')


def main(argv=None):
    parser, args = parse(argv)
    with command_line.one_message(parser):
        convert(args)


if __name__ == '__main__':
    sys.exit(main())
