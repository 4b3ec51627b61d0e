"""Trains many small classifiers on one GPU, several at once: which norm is better, with seeds.

A small model does not fill a GPU, and its step takes the host longer than the GPU. So the
images lie in GPU memory, a step of a model (crop, forward, backward, update) is one CUDA
graph, and the graphs of several models run side by side, each in its own stream.

What is trained comes from a plan (see `gpu_plan`). This file needs torch and mmengine, of
OpenCV only what decodes images, and neither MMDetection nor MMPretrain.
"""

import contextlib
import copy
import csv
import json
import math
import os
import tarfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS
from torch import nn

from ..convert import convert_norm, dn_layers
from ..fold import MOST, Outputs, batch_norm_of, calibrate, put, recalibrate
from ..provenance import hardware
from ..reference import widen
from ..sc import no_autocast
from . import controls  # noqa: F401  registers the controls' norms
from .recording import norm_counts

PLAN, ARCHIVE = 'plan.json', 'images.tar.xz'  # in the folder that is carried to the GPU
BACKENDS = ('auto', 'triton', 'torch')  # of DN layers, in the order in which to try them
WARM_UP = 3  # steps before a capture: libraries and kernels settle
ROUNDS = 16  # steps of each model between two looks at the clock
EVALUATED = 1000  # images at once
CALIBRATION, CALIBRATION_BATCH = 512, 128  # training images that tell the mean g and h
AVERAGED_EPOCHS = 2  # time constant of the average of weights
MEASURED = ('value', 'averaged', 'folded', 'folded_most', 'folded_recalibrated', 'train_loss')
# What a fused layer may be off from the float64 reference, of the norm of each result; a
# wrong kernel is off by a tenth and more. Or 4 times what plain PyTorch is off.
ALLOWED = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
GRAPH_ALLOWED = 0.2  # what two replays may differ from two steps: sums in another order
# expansion, channels, blocks of MobileNetV2's groups; strides are the config's
GROUPS = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))


class Refused(RuntimeError):
    """A variant that cannot be trained here: its layers are wrong, or it was not captured."""


# The recipe: what a config says, and nothing that this file would pass over in silence.


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


# The model: mmdet's MobileNetV2 and MMPretrain's classifier, parameter by parameter.


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


# The images.


def load_images(archive, to_rgb: bool, device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{'train': (uint8 images (N, 3, H, W), labels (N,)), 'val': ...} on the device.

    Labels count the classes in the order of their names. Images are decoded as mmcv does.

    Raises:
        ValueError: the archive lacks a split, or the two have not the same classes.
    """
    import cv2  # here: the plan is made without it

    coded, names = defaultdict(list), defaultdict(list)
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) >= 3 and parts[-3] in ('train', 'val'):
                coded[parts[-3]].append(tar.extractfile(member).read())  # type: ignore[union-attr]
                names[parts[-3]].append(parts[-2:])
    classes = {split: sorted({name for name, _ in found}) for split, found in names.items()}
    if set(classes) != {'train', 'val'} or classes['train'] != classes['val']:
        raise ValueError(
            f'{archive}: expected train/<class>/ and val/<class>/ with the same '
            f'classes, found {dict((k, len(v)) for k, v in classes.items())}'
        )
    number = {name: i for i, name in enumerate(classes['train'])}

    def decode(data):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        return (image[..., ::-1] if to_rgb else image).transpose(2, 0, 1)

    found = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split in ('train', 'val'):
            order = sorted(range(len(names[split])), key=names[split].__getitem__)
            images = np.stack(list(pool.map(decode, (coded[split][i] for i in order))))
            labels = torch.tensor([number[names[split][i][0]] for i in order])
            found[split] = (torch.from_numpy(images).to(device), labels.to(device))
    return found


# A training.


class Training:
    """A model in training, step by step; started again with another seed it keeps its graph.

    What changes from step to step (order of the images, crops, flips, learning rate) lies in
    tables on the device, which the step reads at a counter, also there: a step needs
    nothing from the host.
    """

    def __init__(self, recipe, batch, epochs, images, backend='auto'):
        check_recipe(recipe)
        self.recipe, self.batch, self.epochs, self.backend = recipe, batch, epochs, backend
        self.images = images
        x, _ = images['train']
        self.device = x.device
        self.steps_per_epoch = len(x) // batch
        self.steps = self.steps_per_epoch * epochs
        if not self.steps:
            raise ValueError(f'batch: expected at most the {len(x)} images, got {batch}')
        self.stream = torch.cuda.Stream() if x.is_cuda else None
        self.graph = None
        self.model = build(recipe, 0).to(self.device, memory_format=torch.channels_last)
        for layer in dn_layers(self.model).values():
            layer.backend = backend
        self.groups = parameter_groups(self.model, recipe)
        self.parameters = [p for group in self.groups for p in group['params']]
        for group in self.groups:
            group['velocity'] = [torch.zeros_like(p) for p in group['params']]
        self.averaging = [
            t for t in self.model.state_dict(keep_vars=True).values() if t.is_floating_point()
        ]
        self.average = [t.detach().clone() for t in self.averaging]
        preprocessor = recipe['data_preprocessor']
        self.mean, self.std = (
            torch.tensor(preprocessor[key], device=self.device).view(1, -1, 1, 1)
            for key in ('mean', 'std')
        )
        self._make_places()
        self._make_tables()
        if self.stream:  # what was made in the current one must be there first
            self.stream.wait_stream(torch.cuda.current_stream())

    def _make_places(self):
        """Where in an image a crop reads: positions behind the border are reflected at it."""
        crop, self.flip = self.recipe['train_pipeline'][1:3]
        size, self.padding = crop['crop_size'], crop['padding']
        height, width = self.images['train'][0].shape[-2:]
        if not size == height == width:
            raise ValueError(
                f'crop_size: expected that of the images, {(height, width)}, got {size}'
            )
        positions = torch.arange(-self.padding, size + self.padding).abs()
        last = size - 1
        self.reflected = (last - (last - positions).abs()).to(self.device)
        self.within = torch.arange(size, device=self.device)
        self.channels = torch.arange(3, device=self.device).view(1, -1, 1, 1)

    def _make_tables(self):
        """What a step reads, and its loss that it writes, at the counter."""
        rates = learning_rates(self.recipe, self.steps_per_epoch, self.steps)
        whole = dict(dtype=torch.long, device=self.device)
        self.counter = torch.zeros(1, **whole)
        self.rates = torch.tensor(rates, device=self.device)
        self.order = torch.zeros(self.steps, self.batch, **whole)
        self.crops = torch.zeros(self.steps, self.batch, 3, **whole)
        self.losses = torch.zeros(self.steps, device=self.device)

    def start(self, seed: int) -> None:
        """Puts everything to where the training of a seed begins, in place."""
        fresh = build(self.recipe, seed).state_dict()
        generator = torch.Generator().manual_seed(1000 + seed)
        n, kept = len(self.images['train'][0]), self.steps_per_epoch * self.batch
        order = [
            torch.randperm(n, generator=generator)[:kept].view(-1, self.batch)
            for _ in range(self.epochs)
        ]
        shape = (self.steps, self.batch)
        crops = [torch.randint(2 * self.padding + 1, shape, generator=generator) for _ in range(2)]
        flips = torch.rand(shape, generator=generator) < self.flip['prob']
        with self.in_stream(), torch.no_grad():
            for name, tensor in self.model.state_dict(keep_vars=True).items():
                tensor.copy_(fresh[name])
            for group in self.groups:
                torch._foreach_zero_(group['velocity'])
            for average, tensor in zip(self.average, self.averaging, strict=True):
                average.copy_(tensor)
            self.order.copy_(torch.cat(order))
            self.crops.copy_(torch.stack((*crops, flips.long()), -1))
            self.counter.zero_()
            self.losses.zero_()
            self.model.train()
        self.seed, self.done = seed, 0
        self.synchronize()

    def in_stream(self):
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def synchronize(self):
        if self.stream:
            self.stream.synchronize()

    def autocast(self):
        # No cache: a cast that an earlier step has made would be missing from the graph.
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            cache_enabled=False,
            enabled=self.device.type == 'cuda',
        )

    def step(self) -> None:
        """One step, in the current stream."""
        x, y = self._next_batch()
        with self.autocast():
            out = self.model(x)
        loss = F.cross_entropy(out, y)
        found = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            gradients = {
                id(p): _laid_out_as(p, gradient)
                for p, gradient in zip(self.parameters, found, strict=True)
            }
            rate = self.rates.index_select(0, self.counter).squeeze(0)
            for group in self.groups:
                params, velocity = group['params'], group['velocity']
                changes: Any = [gradients[id(p)] for p in params]
                if group['decay']:
                    changes = torch._foreach_add(changes, params, alpha=group['decay'])
                torch._foreach_mul_(velocity, group['momentum'])
                torch._foreach_add_(velocity, changes)
                torch._foreach_sub_(params, torch._foreach_mul(velocity, rate))
            torch._foreach_lerp_(
                self.average, self.averaging, 1 / (AVERAGED_EPOCHS * self.steps_per_epoch)
            )
            self.losses.index_copy_(0, self.counter, loss.detach().view(1))
            self.counter.add_(1)

    def _next_batch(self):
        images, labels = self.images['train']
        index = self.order.index_select(0, self.counter).squeeze(0)
        top, left, flip = self.crops.index_select(0, self.counter).squeeze(0).unbind(1)
        within = self.within.expand(self.batch, -1)
        columns = torch.where(flip[:, None] == 1, within.flip(1), within) + left[:, None]
        rows = within + top[:, None]
        x = images[
            index.view(-1, 1, 1, 1),
            self.channels,
            self.reflected[rows][:, None, :, None],
            self.reflected[columns][:, None, None, :],
        ]
        return self.prepared(x), labels.index_select(0, index)

    def prepared(self, x):
        return ((x.to(self.mean.dtype) - self.mean) / self.std).contiguous(
            memory_format=torch.channels_last
        )

    def capture(self) -> None:
        """Makes a CUDA graph of a step; on CPUs there is none, and steps stay as they are.

        Raises:
            Refused: the step cannot be captured.
        """
        if self.stream is None:
            return
        self.start(0)
        try:
            self.stream.wait_stream(torch.cuda.current_stream())
            with self.in_stream():
                for _ in range(WARM_UP):
                    self.step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.step()
            torch.cuda.synchronize()
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize()
            raise Refused(f'a step could not be captured: {error}') from error
        self.graph = graph

    def advance(self, steps: int) -> None:
        """That many steps, or what is left of them, without waiting for them."""
        steps = min(steps, self.steps - self.done)
        with self.in_stream():
            for _ in range(steps):
                if self.graph is None:
                    self.step()
                else:
                    self.graph.replay()
        self.done += steps

    def check_graph(self) -> None:
        """Two replays move the parameters as two steps do.

        Raises:
            Refused: they do not.
        """
        if self.graph is None:
            return
        with self.in_stream():
            self._check_graph()

    def _check_graph(self):
        replayed, stepped = self._moved_by(self.graph.replay), self._moved_by(self.step)
        inside = [layer.bn for layer in self.model.modules() if hasattr(layer, 'bn')]
        layers = (*inside, *dn_layers(self.model).values())
        norms = {id(p) for layer in layers for p in layer.parameters()}
        for part, wanted in (('norms', True), ('convolutions', False)):
            chosen = [i for i, p in enumerate(self.parameters) if (id(p) in norms) == wanted]
            ours = torch.cat([replayed[i].flatten() for i in chosen])
            theirs = torch.cat([stepped[i].flatten() for i in chosen])
            error = ((ours - theirs).norm() / theirs.norm()).item()
            if not error <= GRAPH_ALLOWED:
                raise Refused(
                    f'two replays move the parameters of {part} otherwise than two '
                    f'steps do, by {error:.3g} of the change'
                )

    def _moved_by(self, step):
        """How far the first two steps of a training move each parameter."""
        self.start(0)
        before = [p.detach().clone() for p in self.parameters]
        for _ in range(2):
            step()
        return [p.detach() - was for p, was in zip(self.parameters, before, strict=True)]

    def diverged(self) -> bool:
        return not bool(self.losses[: self.done].isfinite().all())

    # At the end of a run.

    @torch.no_grad()
    def top1(self) -> float:
        """In percent, on the validation images, of the model in eval mode."""
        images, labels = self.images['val']
        self.model.eval()
        with self.in_stream():
            right = torch.zeros((), device=self.device)
            for x, y in zip(images.split(EVALUATED), labels.split(EVALUATED), strict=True):
                right += (self._infer(x).argmax(1) == y).sum()
            share = round(100 * right.item() / len(images), 4)
        self.model.train()
        return share

    def _infer(self, x):
        with self.autocast():
            return self.model(self.prepared(x))

    def results(self) -> dict:
        """Top-1 dynamic, folded and of averaged weights. Leaves the averaged weights behind."""
        with self.in_stream():
            return self._results()

    def _results(self):
        value = self.top1()
        found = dict(value=value, folded=value, folded_most=value, folded_recalibrated=value)
        if dn_layers(self.model):
            outputs = self.generated()
            varying = sorted(outputs, key=lambda name: sum(outputs[name].std()))
            most = varying[: round(MOST * len(varying))]
            with folded(self.model, {name: outputs[name] for name in most}):
                found['folded_most'] = self.top1()
            with folded(self.model, outputs):
                found['folded'] = self.top1()
                self.recalibrate()
                found['folded_recalibrated'] = self.top1()
        with torch.no_grad():
            for tensor, average in zip(self.averaging, self.average, strict=True):
                tensor.copy_(average)
        self.recalibrate()  # averaged statistics are not those of averaged weights
        found['averaged'] = self.top1()
        found['train_loss'] = round(self.losses[-self.steps_per_epoch :].mean().item(), 4)
        return found

    def calibration_images(self):
        images, _ = self.images['train']
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images[chosen[:CALIBRATION].to(self.device)].split(CALIBRATION_BATCH)

    def generated(self) -> dict[str, Outputs]:
        """What the DN layers make of the calibration images."""
        self.model.eval()
        with self.in_stream():
            found = calibrate(self.model, self.calibration_images(), self._infer)
        self.model.train()
        return found

    def recalibrate(self) -> None:
        """Makes running statistics the mean over the calibration images; they stay so."""
        with self.in_stream():
            recalibrate(self.model, self.calibration_images(), self._infer)


def _laid_out_as(parameter, gradient):
    """The gradient in the strides of the parameter; others make foreach take tensors singly."""
    if gradient.stride() == parameter.stride():
        return gradient
    for layout in (torch.contiguous_format, torch.channels_last):
        if all(
            t.dim() == 4 and t.is_contiguous(memory_format=layout) for t in (gradient, parameter)
        ):  # strides differ where a size is 1
            return gradient.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(gradient)


@contextlib.contextmanager
def folded(model: nn.Module, outputs: dict[str, Outputs]):
    """The model with BatchNorms in the place of some layers, afterwards as it was."""
    layers = {name: model.get_submodule(name) for name in outputs}
    for name, layer in layers.items():
        put(model, name, batch_norm_of(layer, *outputs[name].mean))
    try:
        yield
    finally:
        for name, layer in layers.items():
            put(model, name, layer)


# Parity.


def check_layers(recipe: dict, backend: str, device, size: int, batch: int) -> float:
    """DN layers of a recipe's model against the reference in float64, training and eval.

    The largest and the smallest map, the fewest and the most channels of the model; bfloat16
    maps, channels last.

    Returns:
        the largest error that was found, of what is allowed.

    Raises:
        Refused: one is more than allowed.
    """
    fresh, worst = Classifier(recipe), 0.0
    for fresh_layer in dn_layers(fresh).values():  # a fresh SC gives g = h = 0
        for parameter in fresh_layer.sc.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for name, (channels, height) in _shapes(recipe, size).items():
        x, dy = (
            0.5
            + torch.randn(batch, channels, height, height, device=device).to(
                torch.bfloat16, memory_format=torch.channels_last
            )
            for _ in range(2)
        )
        for training in (True, False):
            where = f'{name}, {tuple(x.shape)}, {"training" if training else "eval"}'
            steps = _in_three_ways(fresh.get_submodule(name), backend, training, x, dy)
            worst = max(worst, _largest_error(steps, where))
    return worst


def _in_three_ways(fresh, backend, training, x, dy):
    """A layer's step by the backend, by plain PyTorch as precise, and exactly."""
    steps = {}
    for kind in ('fused', 'plain', 'exact'):
        layer = copy.deepcopy(fresh)
        layer.backend = backend if kind == 'fused' else 'reference'
        layer.to(x.device, torch.float64 if kind == 'exact' else torch.float32).train(training)
        dtype = torch.float64 if kind == 'exact' else torch.bfloat16
        steps[kind] = _step(layer, x.to(dtype), dy.to(dtype))
    return steps


def _largest_error(steps, where):
    worst = 0.0
    for what, wanted in steps['exact'].items():
        error, plain = (_error(steps[kind][what], wanted) for kind in ('fused', 'plain'))
        allowed = max(ALLOWED[steps['fused'][what].dtype], 4 * plain)
        worst = max(worst, error / allowed)
        if not error <= allowed:
            raise Refused(
                f'{where}: {what} is off by {error:.3g} of its norm, allowed {allowed:.3g}, '
                f'plain PyTorch {plain:.3g}'
            )
    return worst


def _shapes(recipe, size):
    """Channels and height of the maps at the DN layers to check, by the layers' names."""
    model, found = Classifier(recipe).eval(), {}
    for name, layer in dn_layers(model).items():
        layer.register_forward_hook(
            lambda _, given, made, name=name: found.update({name: tuple(made.shape[1:3])})
        )
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    by_map = sorted(found, key=lambda name: found[name][0] * found[name][1] ** 2)
    by_channels = sorted(found, key=lambda name: found[name][0])
    chosen = {by_map[0], by_map[-1], by_channels[0], by_channels[-1]} if found else ()
    return {name: found[name] for name in found if name in chosen}


def _step(layer, x, dy):
    x = x.detach().requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, *parameters), dy)
    statistics = {name: t for name, t in layer.named_buffers() if t.is_floating_point()}
    return dict(zip(('y', 'dx', *names), (y.detach(), *gradients), strict=True), **statistics)


def _error(actual, wanted):
    actual, wanted = actual.double(), wanted.double()
    size = wanted.norm().clamp(min=1e-12)
    return ((actual - wanted).norm() / size).item()


# The grid.


class Grid:
    """Trains the runs of a plan, several at once, and writes a row for each that ended.

    Runs whose row is in the file already are left out. Runs start in the order of the plan;
    one that cannot end before the limit, by the pace so far, is not started, and a shorter
    one behind it may be.

    Args:
        plan (dict): of `gpu_plan`.
        images: of `load_images`.
        path: CSV file of the rows.
        parallel (int): trainings at once.
        seconds (float): limit, from now on.
        backends: see `BACKENDS`.
        log: called with a line of text about what goes on.
    """

    def __init__(
        self, plan, images, path, parallel=8, seconds=math.inf, backends=BACKENDS, log=print
    ):
        self.columns, self.runs = plan['columns'], plan['runs']
        self.images, self.path, self.parallel = images, Path(path), parallel
        self.log, self.backends = log, backends
        self.begin = time.perf_counter()
        self.seconds = seconds
        self.slots = []  # trainings with their graphs, at work or idle
        self.running = {}  # training: its run and when it began
        self.pace = None  # seconds for a step of the usual batch, other trainings beside it
        self.usual_batch = max((run['row']['batch'] for run in self.runs), default=1)
        self.refused, self.late, self.good_backend = {}, [], {}

    def elapsed(self):
        return time.perf_counter() - self.begin

    def train(self) -> bool:
        """Returns whether every run of the plan has a row now."""
        ended = [_key(row) for row in read_rows(self.path)]
        todo = [run for run in self.runs if _key(run['row']) not in ended]
        self.log(f'{len(self.runs)} runs, {len(self.runs) - len(todo)} of them ended before')
        while todo or self.running:
            while todo and len(self.running) < self.parallel:
                self._begin(todo.pop(0))
            self._advance()
            for training in list(self.running):
                if training.done >= training.steps or training.diverged():
                    self._end(training)
            if self.elapsed() >= self.seconds:
                break
        left = [_title(run) for run, _ in self.running.values()] + [
            _title(run) for run in self.late + todo
        ]
        if left:
            more = f' and {len(left) - 8} more' if len(left) > 8 else ''
            self.log(
                f'{self.elapsed():.0f} s: the time is over, left: {", ".join(left[:8])}{more}'
            )
        for name, why in self.refused.items():
            self.log(f'{name} was refused: {why}')
        return not left and not self.refused

    def _begin(self, run):
        if run['name'] in self.refused:
            return
        if self._too_late(run):
            self.late.append(run)
            return
        try:
            training = self._slot(run)
        except Refused as error:
            self.refused[run['name']] = str(error)
            self.log(f'{run["name"]} is not trained: {error}')
            return
        training.start(run['row']['seed'])
        self.running[training] = run, time.perf_counter()

    def _too_late(self, run):
        """Whether all that is at work and this run would not end before the limit."""
        if self.pace is None:
            return False
        row = run['row']
        steps = len(self.images['train'][0]) // row['batch'] * row['epochs']
        work = steps * self._share(row['batch']) + sum(
            (training.steps - training.done) * self._share(training.batch)
            for training in self.running
        )
        return self.elapsed() + work * self.pace > self.seconds

    def _share(self, batch):
        """What a step costs, of one of the usual batch: small ones leave the GPU half idle."""
        return max(batch / self.usual_batch, 0.25)

    def _slot(self, run):
        """An idle training of the same recipe, or a new one, with its graph."""
        row = run['row']
        same = (run['recipe'], row['batch'], row['epochs'])
        idle = [slot for slot in self.slots if slot not in self.running]
        for slot in idle:
            if (slot.recipe, slot.batch, slot.epochs) == same:
                return slot
        for slot in idle[: max(0, len(self.slots) - self.parallel + 1)]:
            self.slots.remove(slot)
        begin = time.perf_counter()
        slot = self._captured(run, *same)
        self.slots.append(slot)
        self.log(
            f'{self.elapsed():.0f} s: {_title(run)}: ready in '
            f'{time.perf_counter() - begin:.1f} s, backend {slot.backend}'
        )
        return slot

    def _captured(self, run, recipe, batch, epochs):
        """With the first backend that computes what the reference does and can be captured."""
        known = self.good_backend.get(run['name'])
        device, size = self.images['train'][0].device, self.images['train'][0].shape[-1]
        has_dn = bool(dn_layers(Classifier(recipe)))
        reasons = []
        for backend in [known] if known else self.backends if has_dn else ['-']:
            try:
                if not known and has_dn:
                    worst = check_layers(recipe, backend, device, size, min(batch, 128))
                    self.log(
                        f'{run["name"]}, backend {backend}: errors at most {worst:.2f} of '
                        f'what is allowed'
                    )
                training = Training(recipe, batch, epochs, self.images, backend)
                training.capture()
                if not known:
                    training.check_graph()
            except (Refused, ImportError, RuntimeError, ValueError) as error:
                reasons.append(f'{backend}: {error}')
                self.log(f'{run["name"]}, backend {backend}: {error}')
                continue
            self.good_backend[run['name']] = backend
            return training
        raise Refused('; '.join(reasons))

    def _advance(self):
        begin = time.perf_counter()
        for _ in range(ROUNDS // 4):
            for training in self.running:
                training.advance(4 * max(1, self.usual_batch // training.batch))
            if self.elapsed() >= self.seconds:
                return
        for training in self.running:
            training.synchronize()
        if all(training.batch == self.usual_batch for training in self.running):
            self.pace = (time.perf_counter() - begin) / ROUNDS / max(len(self.running), 1)

    def _end(self, training):
        run, begin = self.running.pop(training)
        seconds = round(time.perf_counter() - begin, 1)
        row = dict(
            run['row'],
            norm='+'.join(norm_counts(training.model)),
            params=sum(p.numel() for p in training.parameters),
            seconds=seconds,
            hardware=hardware(),
            backend=training.backend,
        )
        if training.diverged():
            row.update(status='diverged')
        else:
            row.update(training.results(), status='finished')
        append_row(self.path, row, self.columns)
        measured = ', '.join(f'{key} {row[key]:.4g}' for key in MEASURED if key in row)
        self.log(f'{self.elapsed():.0f} s: {_title(run)}: {row["status"]}: {measured}')


def _title(run):
    row = run['row']
    return (
        f'{run["name"]}:{row["seed"]} (lr {row["lr"]:g}, batch {row["batch"]}, '
        f'{row["epochs"]} epochs)'
    )


def _key(row):
    """What tells a run from the others, as it is read from a file."""
    return tuple(
        str(row[name]) for name in ('question', 'data', 'config', 'seed', 'epochs', 'lr', 'batch')
    )


def read_rows(path) -> list[dict]:
    path = Path(path)
    if not path.is_file():
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def append_row(path, row: dict, columns) -> None:
    """A row at the end of a CSV file, with a header where it is new.

    Raises:
        ValueError: the file has other columns.
    """
    path = Path(path)
    new = not path.is_file()
    if not new:
        with open(path, newline='') as file:
            found = next(csv.reader(file), [])
        if found != list(columns):
            raise ValueError(
                f'{path}: expected the columns {", ".join(columns)}, found '
                f'{", ".join(found)}; name another file'
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        if new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()


def train(folder, path, seconds=math.inf, parallel=8, backends=BACKENDS, device=None) -> bool:
    """Trains what `gpu_plan.prepare` wrote into a folder; see `Grid`."""
    folder, begin = Path(folder), time.perf_counter()
    for name in (PLAN, ARCHIVE):
        if not (folder / name).is_file():
            raise ValueError(f'{folder / name}: no such file; make it with --prepare')
    plan = json.loads((folder / PLAN).read_text())
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    to_rgb = {run['recipe']['data_preprocessor']['to_rgb'] for run in plan['runs']}
    if len(to_rgb) != 1:
        raise ValueError(f'{folder / PLAN}: expected runs with the same to_rgb')
    images = load_images(folder / ARCHIVE, to_rgb.pop(), device)

    def log(text):
        print(text, flush=True)

    log(
        f'{hardware()}, torch {torch.__version__}; images decoded in '
        f'{time.perf_counter() - begin:.1f} s'
    )
    grid = Grid(
        plan, images, path, parallel, seconds - (time.perf_counter() - begin), backends, log
    )
    return grid.train()
