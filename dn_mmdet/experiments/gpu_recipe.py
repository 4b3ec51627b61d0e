"""What the recipe of a plan means: its learning rates, its groups of parameters and its model.

A recipe is what a config says, and nothing that a training on the GPU would pass over in
silence. The model is mmdet's MobileNetV2 with MMPretrain's classifier, parameter by parameter,
and needs neither of the two.
"""

import json
from collections import defaultdict

import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS
from torch import nn

from ..convert import convert_norm
from ..reference import widen
from ..sc import no_autocast
from . import controls  # noqa: F401  registers the controls' norms

# expansion, channels, blocks of MobileNetV2's groups; strides are the config's
GROUPS = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
KEYS = dict(  # of each part of a recipe
    model={'type', 'backbone', 'neck', 'head'},
    head={'type', 'num_classes', 'in_channels', 'loss', 'topk'},
    loss={'type', 'loss_weight'},
    backbone={'type', 'widen_factor', 'out_indices', 'norm_cfg', 'strides'},
    data_preprocessor={'num_classes', 'mean', 'std', 'to_rgb'},
    optim_wrapper={'optimizer', 'paramwise_cfg'},
    optimizer={'type', 'lr', 'momentum', 'weight_decay'},
)
TYPES = (
    'ImageClassifier',
    'GlobalAveragePooling',
    'LinearClsHead',
    'CrossEntropyLoss',
    'StridedMobileNetV2',
    'SGD',
    'LoadImageFromFile',
    'RandomCrop',
    'RandomFlip',
    'PackInputs',
)


def check_recipe(recipe: dict) -> None:
    """Raises ValueError for what a config asks for and this training does not do."""
    model, optim_wrapper = recipe['model'], recipe['optim_wrapper']
    parts = dict(
        model=model,
        head=model['head'],
        loss=model['head']['loss'],
        backbone=_plain_backbone(recipe)[0],
        data_preprocessor=recipe['data_preprocessor'],
        optim_wrapper=optim_wrapper,
        optimizer=optim_wrapper['optimizer'],
    )
    for name, part in parts.items():
        unknown = set(part) - KEYS[name]
        if unknown:
            raise ValueError(f'{name}: this training does not know {", ".join(sorted(unknown))}')
    typed = (
        model,
        model['neck'],
        model['head'],
        model['head']['loss'],
        parts['backbone'],
        parts['optimizer'],
        *recipe['train_pipeline'],
    )
    types = tuple(part['type'] for part in typed)
    if types != TYPES:
        raise ValueError(f'expected a recipe of {", ".join(TYPES)}, got {", ".join(types)}')
    crop, flip = recipe['train_pipeline'][1:3]
    if (
        not recipe['drop_last']
        or crop.get('padding_mode') != 'reflect'
        or flip.get('direction') != 'horizontal'
        or model['head']['loss']['loss_weight'] != 1
    ):
        raise ValueError(
            'expected drop_last, a crop with reflected borders, a horizontal flip '
            'and a loss of weight 1'
        )


def _plain_backbone(recipe):
    """The backbone's config with BatchNorm or another norm everywhere, and what is converted."""
    node = recipe['model']['backbone']
    if node['type'] == 'PartlyConverted':
        return node['part'], node
    return node, None


def learning_rates(recipe: dict, steps_per_epoch: int, steps: int) -> list[float]:
    """The rate of each step, from mmengine's own scheduler."""
    scheduled = recipe['param_scheduler']
    if isinstance(scheduled, list) or not (
        scheduled.get('convert_to_iter_based') or scheduled.get('by_epoch') is False
    ):
        raise ValueError(
            'param_scheduler: expected one that counts in steps, or with '
            'convert_to_iter_based=True'
        )
    lr = recipe['optim_wrapper']['optimizer']['lr']
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    scheduler = PARAM_SCHEDULERS.build(
        dict(scheduled), default_args=dict(optimizer=optimizer, epoch_length=steps_per_epoch)
    )
    optimizer.step()  # else the scheduler warns
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step()
    return rates


def parameter_groups(model: nn.Module, recipe: dict) -> list[dict]:
    """Parameters by weight decay, as mmengine's constructor reads ``paramwise_cfg``."""
    optimizer = build_optim_wrapper(
        model, json.loads(json.dumps(recipe['optim_wrapper']))
    ).optimizer
    base = recipe['optim_wrapper']['optimizer']['lr']
    found = defaultdict(list)
    for group in optimizer.param_groups:
        if group['lr'] != base and recipe['param_scheduler']['type'] != 'OneCycleLR':
            raise ValueError('paramwise_cfg: expected one learning rate for all parameters')
        found[group['weight_decay'], group['momentum']] += group['params']
    return [
        dict(params=params, decay=decay, momentum=momentum)
        for (decay, momentum), params in found.items()
    ]


class _ConvNorm(nn.Module):
    """Convolution, norm and perhaps ReLU6, named as in mmcv's ConvModule."""

    def __init__(self, given, made, size, stride, groups, norm, activation=True):
        super().__init__()
        self.conv = nn.Conv2d(given, made, size, stride, size // 2, groups=groups, bias=False)
        self.bn = norm(made)
        self.activation = activation

    def forward(self, x):
        x = self.bn(self.conv(x))
        return F.relu6(x, inplace=True) if self.activation else x


class _Block(nn.Module):
    def __init__(self, given, made, stride, expansion, norm):
        super().__init__()
        middle = given * expansion
        self.expand_conv = _ConvNorm(given, middle, 1, 1, 1, norm) if expansion != 1 else None
        self.depthwise_conv = _ConvNorm(middle, middle, 3, stride, middle, norm)
        self.linear_conv = _ConvNorm(middle, made, 1, 1, 1, norm, activation=False)
        self.adds = stride == 1 and given == made

    def forward(self, x):
        y = x if self.expand_conv is None else self.expand_conv(x)
        y = self.linear_conv(self.depthwise_conv(y))
        return x + y if self.adds else y


class _MobileNetV2(nn.Sequential):
    def __init__(self, widen_factor, strides, norm):
        super().__init__()
        channels = _divisible_by_8(32 * widen_factor)
        self.conv1 = _ConvNorm(3, channels, 3, strides[0], 1, norm)
        for i, ((expansion, made, blocks), stride) in enumerate(
            zip(GROUPS, strides[1:], strict=True)
        ):
            made = _divisible_by_8(made * widen_factor)
            group = []
            for j in range(blocks):
                group.append(_Block(channels, made, stride if j == 0 else 1, expansion, norm))
                channels = made
            self.add_module(f'layer{i + 1}', nn.Sequential(*group))
        self.out_channels = int(1280 * max(widen_factor, 1))
        self.conv2 = _ConvNorm(channels, self.out_channels, 1, 1, 1, norm)


def _divisible_by_8(channels):
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class Classifier(nn.Module):
    """The model of a recipe, with the names of its parameters in MMPretrain."""

    def __init__(self, recipe):
        super().__init__()
        plain, converted = _plain_backbone(recipe)
        self.backbone = _MobileNetV2(
            plain['widen_factor'],
            plain['strides'],
            lambda channels: make_norm(plain['norm_cfg'], channels),
        )
        if converted:
            convert_norm(
                self.backbone,
                converted['norm'],
                only=converted['only'],
                **(converted.get('norm_args') or {}),
            )
        self.head = nn.Module()
        self.head.fc = nn.Linear(
            self.backbone.out_channels, recipe['model']['head']['num_classes']
        )

    def forward(self, x):
        features = widen(self.backbone(x)).mean((2, 3))
        with no_autocast(x.device.type):  # rounded to bfloat16, many classes would be equal
            return self.head.fc(features)


def make_norm(norm_cfg: dict, channels: int) -> nn.Module:
    """What mmcv's `build_norm_layer` makes; its BN is torch's."""
    args = dict(norm_cfg)
    kind = args.pop('type')
    cls = nn.BatchNorm2d if kind == 'BN' else MODELS.get(kind)
    if cls is None:
        raise ValueError(f'norm_cfg: {kind} is not registered')
    return cls(channels, **args)


def build(recipe: dict, seed: int) -> Classifier:
    """A model with initial weights. Models of one seed share their convolutions' and the head's.

    Drawn after the norms are made, so that what these draw makes no difference.
    """
    torch.manual_seed(seed)
    model = Classifier(recipe)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
    nn.init.normal_(model.head.fc.weight, std=0.01)
    nn.init.zeros_(model.head.fc.bias)
    return model
