"""Whether the detectors that MMDetection ships work with DN-B: one check each, and their table.

The bar: whatever is built, trained and asked for a prediction with BatchNorm can be with DN-B.
"""

import copy
import enum
import hashlib
import json
import math
import re
import traceback
from pathlib import Path

import mmdet
import numpy as np
import torch
from mmdet.models.dense_heads import SSDHead
from mmdet.models.detectors import SemiBaseDetector
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from ..config_tree import dicts
from ..convert import (
    NoBatchNormInConfig,
    batch_norms,
    convert_norm,
    dn_layers,
    norms_in_words,
    swap_norm,
)
from ..models.ssdlite_head import SSDLiteHead
from ..registered import resolve

SHIPPED = Path(mmdet.__file__).parent / '.mim' / 'configs'
PASS, FAIL, NOT_APPLICABLE = 'pass', 'fail', 'not applicable'
# Pixels. Most detectors take the smallest; SSD's and CornerNet's maps are made for the others.
# The smallest leaves PAA and LAD too few anchors to fit mixtures to, and SOLO, which keeps
# local maxima, levels that are interpolated from one cell, all neighbours equal.
IMAGE_SIZES = (64, 320, 512)
NOT_THE_SMALLEST = re.compile(r"'type': '(PAA|LAD|SOLO|Decoupled\w*SOLO\w*)Head'")
# Of the largest output. float32 through up to 150 layers, each of which rounds in another
# order than BatchNorm does.
TOLERANCE = 1e-3


class Stage(enum.Enum):
    """What a check is doing, and the status of a detector whose check has to be ended there."""

    STARTING = 'starting', NOT_APPLICABLE
    BUILDING_WITH_BN = 'building with BatchNorm', NOT_APPLICABLE
    BUILDING_WITH_DN = 'building with DN-B', FAIL
    COMPARING = 'comparing the outputs of DN-B and BatchNorm', FAIL
    TRAINING_WITH_DN = 'training with DN-B', FAIL
    PREDICTING_WITH_DN = 'predicting with DN-B', FAIL
    RUNNING_WITH_BN = 'training and predicting with BatchNorm', NOT_APPLICABLE

    def __init__(self, words, status):
        self.words = words
        self.status = status


def shipped_configs(root=SHIPPED) -> dict[str, Path]:
    """Configs of whole models by name, as in ``yolox/yolox_s_8xb8-300e_coco.py``."""
    return {
        str(path.relative_to(root)): path
        for path in sorted(root.rglob('*.py'))
        if '_base_' not in path.parts
    }


def distinct(configs: dict[str, Path], leave_out=lambda reason: None):
    """One config of each model, with the names of all that build it.

    Models are the same when their configs differ in nothing but weights to load,
    image statistics, schedules and data.

    Returns:
        {name: (config, [names])}
    """
    models = {}
    for name, path in configs.items():
        try:
            cfg = Config.fromfile(path)
        except Exception as error:  # a config is a program and can raise anything
            leave_out(f'{name}: left out, it cannot be read ({type(error).__name__})')
            continue
        if not isinstance(cfg.get('model'), dict):
            continue  # a part of others
        models.setdefault(_fingerprint(cfg), (name, cfg, []))[2].append(name)
    return {name: (cfg, names) for name, cfg, names in models.values()}


def _fingerprint(cfg):
    model = copy.deepcopy(cfg.model).to_dict()
    _forget_weights(model)
    preprocessor = model.get('data_preprocessor') or {}
    for key in ('mean', 'std', 'bgr_to_rgb'):
        preprocessor.pop(key, None)
    return hashlib.sha256(json.dumps(model, sort_keys=True, default=str).encode()).hexdigest()


def _forget_weights(model):
    """Removes what would be loaded or downloaded: the model starts from random weights."""
    for _, node in dicts(model, 'model'):
        if isinstance(node.get('init_cfg'), dict) and 'checkpoint' in node['init_cfg']:
            node['init_cfg'] = None
        for key in ('pretrained', 'teacher_ckpt'):
            if node.get(key):
                node[key] = False if node[key] is True else None


def _lighten(model):
    """Fewer proposals and detections, and images of the size that they come in."""
    for _, node in dicts(model, 'model'):
        if node.get('batch_augments'):
            node['batch_augments'] = None
        if isinstance(node.get('sampler'), dict) and 'num' in node['sampler']:
            node['sampler']['num'] = min(node['sampler']['num'], 16)
        for key, most in (('nms_pre', 100), ('max_per_img', 10)):
            # without NMS the second is the number of queries, which heads count on
            if isinstance(node.get(key), int) and (key == 'nms_pre' or 'nms' in node):
                node[key] = min(node[key], most)


def _repair(model):
    """What no detector of mmdet can do by its config alone, whatever the norm."""
    for _, node in dicts(model, 'model'):
        if resolve(MODELS, node.get('type')) is SSDHead:  # it cannot predict
            node['type'] = SSDLiteHead.__name__
        if isinstance(node.get('teacher_config'), str):  # relative to mmdet's sources
            node['teacher_config'] = str(SHIPPED.parent / node['teacher_config'])


def _detector_of(model):
    """The detector of a tracker, which trains alone."""
    if 'tracker' not in model or 'detector' not in model:
        return model
    detector = model['detector']
    detector.setdefault('data_preprocessor', dict(type='DetDataPreprocessor', pad_size_divisor=32))
    return detector


def check(cfg: Config, enter=lambda stage: None) -> dict:
    """Whether a config's model does with DN-B what it does with BatchNorm.

    The DN-B model takes the BatchNorm model's state, has to give its output, train
    one step on two small random images, and predict. Where it cannot, the BatchNorm
    model tells whether it could.

    Args:
        cfg: a whole config; left as it is.
        enter: called with each `Stage` that begins.

    Returns:
        the fields of a row of the table that this settles.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model = _detector_of(cfg.model)
    for change in (_forget_weights, _lighten, _repair):
        change(cfg.model)
    init_default_scope('mmdet')
    enter(Stage.BUILDING_WITH_BN)
    try:
        with_bn = _build(cfg.model)
        with_bn.init_weights()
    except Exception as error:
        return _cannot_with_bn(error)
    if not batch_norms(with_bn):
        return _row(NOT_APPLICABLE, f'no BatchNorm in it{norms_in_words(with_bn)}')
    _wear_in(with_bn)
    enter(Stage.BUILDING_WITH_DN)
    try:
        model = _with_dn(cfg)
        row = _row(PASS, '', replaced=len(dn_layers(model)), left=len(batch_norms(model)))
    except Exception as error:
        traceback.print_exc()
        return _row(FAIL, in_words(error))
    for size in IMAGE_SIZES[bool(NOT_THE_SMALLEST.search(str(cfg.model))) :]:
        model.load_state_dict(with_bn.state_dict())
        row['image_size'] = size
        try:
            return dict(row, **_exercise(model, with_bn, cfg, size, enter))
        except Exception as error:
            traceback.print_exc()
            with_dn = error
        enter(Stage.RUNNING_WITH_BN)
        try:
            train_step(model := copy.deepcopy(with_bn), example(model, cfg, size))
            predict(model, example(model, cfg, size))
        except Exception as error:
            if size == IMAGE_SIZES[-1] or isinstance(error, (ImportError, NotImplementedError)):
                return _cannot_with_bn(error)
            model = _with_dn(cfg)
        else:
            return dict(row, status=FAIL, reason=in_words(with_dn))
    raise AssertionError('the largest size settles it either way')


def _cannot_with_bn(error):
    traceback.print_exc()
    return _row(NOT_APPLICABLE, f'with BatchNorm it fails as well: {in_words(error)}')


def _row(status, reason, **known):
    return dict(status=status, reason=reason, **known)


def _build(model_cfg):
    torch.manual_seed(0)
    return MODELS.build(copy.deepcopy(model_cfg))


def _with_dn(cfg):
    """By its config, or where that names no BatchNorm, by converting the model."""
    try:
        return _build(swap_norm(cfg, 'DNB').model)
    except NoBatchNormInConfig:
        return convert_norm(_build(cfg.model), 'DNB')


@torch.no_grad()
def _wear_in(model):
    """Moves what BatchNorms hold from its start, as training does.

    Deformable convolutions start without an offset, as in training: by random ones a hundred
    layers amplify the last digit of the input to a wholly different output.
    """
    for module in model.modules():
        if hasattr(module, 'init_offset'):
            module.init_offset()
    for bn in batch_norms(model).values():
        for name, tensor in (*bn.named_parameters(), *bn.named_buffers()):
            if name in ('weight', 'running_var'):
                tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.2))
            elif name in ('bias', 'running_mean'):
                tensor.add_(torch.empty_like(tensor).normal_(std=0.1))


def _exercise(model, with_bn, cfg, size, enter):
    enter(Stage.COMPARING)
    data = example(model, cfg, size)
    found = dict(difference=difference(outputs(model, data), outputs(with_bn, data)))
    if not found['difference'] <= TOLERANCE:
        # A rounding can tip a comparison: SOLO keeps local maxima. Not so in float64.
        found = dict(
            difference=difference(
                *(outputs(copy.deepcopy(each).double(), data) for each in (model, with_bn))
            )
        )
    if not found['difference'] <= TOLERANCE:
        return dict(found, status=FAIL, reason='the output is not that of BatchNorm')
    enter(Stage.TRAINING_WITH_DN)
    losses = train_step(model, example(model, cfg, size))
    infinite = [name for name, value in losses.items() if not math.isfinite(value)]
    if infinite:
        raise ValueError(f'not finite: {", ".join(infinite)}')
    if not any(layer.sc.w_out.any() for layer in dn_layers(model).values()):
        return dict(found, status=FAIL, reason='no SC has moved in the training step')
    found['train_step'] = 'yes'
    enter(Stage.PREDICTING_WITH_DN)
    predict(model, example(model, cfg, size))
    return dict(found, prediction='yes')


def example(model, cfg, size) -> dict:
    """Two random images with boxes, masks, and what else a model asks for in training."""
    things = _numbers(model, 'num_things_classes')
    classes = [number for number in _numbers(model, 'num_classes') if number > 1]
    num_classes = min(things or classes or [1])
    pipelines = str(cfg)
    panoptic = 'LoadPanopticAnnotations' in pipelines
    segments = "'with_seg': True" in pipelines or panoptic
    data = demo_mm_inputs(
        2,
        image_shapes=(3, size, size),
        num_items=[3, 2],
        num_classes=max(num_classes, 2),
        with_mask="'with_mask': True" in pipelines or panoptic,
        with_semantic=segments,
        sem_seg_output_strides=8 if 'SegRescale' in pipelines else 1,
        use_box_type=True,
    )
    boxes = torch.tensor([[0, 0, size / 2, size / 2], [size / 4, size / 4, size, size]])
    for sample in data['data_samples']:
        sample.gt_instances.labels %= num_classes
        if not getattr(model, 'with_rpn', True):  # Fast R-CNN
            sample.proposals = InstanceData(bboxes=boxes, scores=torch.ones(2))
        sample.set_metainfo(dict(homography_matrix=np.eye(3, dtype=np.float32)))
    return data


def _numbers(model, name):
    """What the modules of a model have under a name, where that is a whole number."""
    found = [getattr(module, name, None) for module in model.modules()]
    return [number for number in found if isinstance(number, int)]


def _branches(data):
    """The same images as a semi-supervised detector takes them: labelled, unlabelled twice."""
    return {
        key: {branch: copy.deepcopy(value) for branch in ('sup', 'unsup_teacher', 'unsup_student')}
        for key, value in data.items()
    }


def train_step(model, data) -> dict:
    """One step of SGD, which fails where gradients are not finite; the losses as numbers."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    wrapper = OptimWrapper(optimizer, clip_grad=dict(max_norm=1, error_if_nonfinite=True))
    if isinstance(model, SemiBaseDetector):
        data = _branches(data)
    for counter in ('epoch', 'iter'):  # a runner tells; TOOD and BoxInst ask
        MessageHub.get_current_instance().update_info(counter, 0)
    model.train()  # some return nothing
    losses = model.train_step(data, wrapper)
    return {name: float(value.detach()) for name, value in losses.items()}


def predict(model, data):
    """Predictions for the first image: not every detector takes more at once."""
    torch.manual_seed(1)
    model.eval()
    with torch.no_grad():
        results = model.test_step(_first(data))
    if len(results) != 1:
        raise ValueError(f'expected the prediction for one image, got {len(results)}')


def _first(data):
    return {key: value[:1] for key, value in data.items()}


def outputs(model, data) -> list[torch.Tensor]:
    """What the network computes of the first image in eval mode, not empty: a list of tensors.

    Of detectors whose heads have no such mode, or find nothing to compute on, the
    features before them.
    """
    torch.manual_seed(1)
    model.eval()
    with torch.no_grad():
        data = model.data_preprocessor(_first(copy.deepcopy(data)), False)
        data['inputs'] = data['inputs'].to(next(model.parameters()).dtype)
        try:
            found = [t for t in _tensors(model(**data, mode='tensor')) if t.numel()]
        except (NotImplementedError, TypeError, AttributeError, KeyError, ValueError):
            found = []
        return found or list(_tensors(model.extract_feat(data['inputs'])))


def _tensors(node):
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict):
        yield from _tensors(list(node.values()))
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _tensors(child)


def difference(got, expected) -> float:
    """The largest difference of two lists of tensors, over the largest value of its tensor.

    Infinite where shapes differ or a value is no number.
    """
    if [t.shape for t in got] != [t.shape for t in expected]:
        return float('inf')
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True)]
    found = [(a - b).abs().max() / b.abs().max().clamp(min=1e-6) for a, b in pairs]
    return float(torch.stack(found).nan_to_num(nan=float('inf')).max())


def in_words(error) -> str:
    """An error as a reason that fits a cell of a table."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f'the package {error.name} is not installed'
    text = str(error).strip() or type(error).__name__
    absent = re.search(r'(\S+) is not in the \S+ registry', text)
    if absent:
        return f'{absent[1].strip(chr(39))} is not in mmdet but in another package'
    first = next(line for line in text.splitlines() if line.strip())
    return f'{type(error).__name__}: {" ".join(first.split())[:160]}'
