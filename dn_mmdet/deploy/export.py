"""A detector as one ONNX graph: image in; boxes, scores and labels out.

For single-stage detectors whose head gives class scores and box deltas for anchors
(SSD, SSDLite, RetinaNet).
"""
import copy
import importlib.util
import os
import platform
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import mmcv
import mmcv.ops
import numpy as np
import torch
import torchvision
from mmcv.cnn import fuse_conv_bn
from mmdet.models.dense_heads import AnchorHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import Tensor, nn

from ..checks.preflight import ConfigError
from ..convert import dn_layers
from .folding import with_batch_norm

OUTPUTS = ('boxes', 'scores', 'labels')
RAW_OUTPUTS = ('class_scores', 'box_deltas')
PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
OPSET = 18
# Of the head's outputs in onnxruntime, which are computed in float32 from the same weights.
TOLERANCE = 1e-4


def check_installed() -> None:
    """Raises ConfigError where a package that exporting needs is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'ONNX export needs {", ".join(missing)}, not installed here: in a '
                          f"clone of dn_mmdet run `pip install -e '.[export]'`")


class Detector(nn.Module):
    """What a detector computes from pixels to boxes, without data structures.

    Args:
        model: an mmdet detector.
        size: (height, width) of the images.

    Shape:
        - images: (N, 3, H, W), float, pixels from 0 to 255 in the channel order in
          which mmdet reads files (BGR)
        - boxes: (N, K, 4) as (x1, y1, x2, y2) in pixels of the image; scores (N, K);
          labels (N, K). By descending score; K is ``test_cfg.max_per_img``, and what
          is left over has score 0, label -1 and a box of zeros
        - class_scores, box_deltas: (N, anchors, classes), (N, anchors, 4): the head's
          own outputs

    Raises:
        ConfigError: a detector of another kind, or images that the detector would pad.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int]):
        super().__init__()
        _check_kind(model)
        self.model = model
        self.eval()
        self.size = tuple(size)
        preprocessor = model.data_preprocessor
        divisor = preprocessor.pad_size_divisor
        if any(side % divisor for side in size):
            raise ConfigError(f'--size: expected multiples of {divisor}, to which this detector '
                              f'pads its images, got {tuple(size)}')
        self.swap_channels = preprocessor._channel_conversion
        self.normalize = preprocessor._enable_normalize
        with torch.no_grad():
            levels = model(torch.zeros(1, 3, *size), mode='tensor')[0]
        priors = model.bbox_head.prior_generator.grid_priors(
            [level.shape[-2:] for level in levels], device='cpu')
        self.num_priors = [len(level) for level in priors]
        self.register_buffer('priors', torch.cat(priors))

    def forward(self, images: Tensor):
        class_scores, box_deltas = self.raw(images)
        return *self.detect(class_scores, box_deltas), class_scores, box_deltas

    def raw(self, images):
        preprocessor = self.model.data_preprocessor
        if self.swap_channels:
            images = images[:, [2, 1, 0]]
        if self.normalize:
            images = (images - preprocessor.mean) / preprocessor.std
        head = self.model.bbox_head
        scores, deltas = self.model(images, mode='tensor')
        return (_flatten(scores, head.cls_out_channels), _flatten(deltas, 4))

    def detect(self, class_scores, box_deltas):
        head, cfg = self.model.bbox_head, self.model.bbox_head.test_cfg
        if head.use_sigmoid_cls:
            scores = class_scores.sigmoid()
        else:
            scores = class_scores.softmax(-1)[..., :-1]
        scores = torch.cat([_keep_largest(level, cfg.get('nms_pre', -1))
                            for level in scores.split(self.num_priors, dim=1)], dim=1)
        boxes = self._decode(box_deltas)
        valid = scores > cfg.score_thr
        if cfg.get('min_bbox_size', -1) >= 0:
            sides = boxes[..., 2:] - boxes[..., :2]
            valid = valid & (sides > cfg.min_bbox_size).all(-1, keepdim=True)
        scores = (scores * valid).transpose(1, 2)  # (N, classes, anchors)
        limit = min(cfg.max_per_img, scores.shape[1] * scores.shape[2])
        kept = non_max_suppression(boxes, scores, cfg.nms.iou_threshold, limit)
        best, index = (scores * kept).flatten(1).topk(limit)
        found = best > 0
        anchor = (index % boxes.shape[1])[..., None].expand(-1, -1, 4)
        labels = torch.where(found, index // boxes.shape[1], -1)
        return boxes.gather(1, anchor) * found[..., None], best, labels

    def _decode(self, deltas):
        """Boxes (N, anchors, 4); the coder takes all anchors of all images as one list."""
        priors = self.priors.expand(len(deltas), -1, -1).reshape(-1, 4)
        boxes = self.model.bbox_head.bbox_coder.decode(
            priors, deltas.reshape(-1, 4), max_shape=self.size)
        return boxes.reshape(deltas.shape)


def _check_kind(model):
    head = getattr(model, 'bbox_head', None)
    if not (isinstance(model, SingleStageDetector) and isinstance(head, AnchorHead)
            and type(head).predict_by_feat is BaseDenseHead.predict_by_feat
            and type(head)._predict_by_feat_single is BaseDenseHead._predict_by_feat_single
            and type(head.bbox_coder) is DeltaXYWHBBoxCoder):
        raise ConfigError(f'expected a single-stage detector with an anchor head (SSD, SSDLite, '
                          f'RetinaNet), got {type(model).__name__} with '
                          f'{type(head).__name__}: its decoding is not written for ONNX')
    nms = head.test_cfg.nms
    if nms.type not in ('nms', mmcv.ops.nms) or nms.get('class_agnostic'):
        raise ConfigError(f"model.test_cfg.nms: expected type='nms', by class, got {dict(nms)}")


def _flatten(levels, channels):
    """(N, anchors * channels, H, W) of each level -> (N, all anchors, channels)."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in levels],
                     dim=1).unflatten(1, (-1, channels))


def _keep_largest(scores, number):
    """(N, anchors, classes) with zeros in place of all but the ``number`` largest of an image."""
    flat = scores.flatten(1)
    if not 0 < number < flat.shape[1]:
        return scores
    smallest = flat.topk(number).values[:, -1:]
    return torch.where(flat >= smallest, flat, 0).unflatten(1, scores.shape[1:])


@torch.library.custom_op('dn_mmdet::non_max_suppression', mutates_args=())
def non_max_suppression(boxes: Tensor, scores: Tensor, iou_threshold: float,
                        limit: int) -> Tensor:
    """1 for what ONNX's operator of this name selects in each image and class, else 0.

    Shape: boxes (N, anchors, 4), scores (N, classes, anchors), output as scores. Scores
    of 0 are never selected, and ``limit`` at most in a class.
    """
    selected = torch.zeros_like(scores)
    for image, of_image in enumerate(scores):
        label, anchor = of_image.nonzero(as_tuple=True)
        kept = torchvision.ops.batched_nms(boxes[image, anchor], of_image[label, anchor], label,
                                           iou_threshold)
        for of_label in label.unique():
            mine = kept[label[kept] == of_label][:limit]
            selected[image, of_label, anchor[mine]] = 1
    return selected


@non_max_suppression.register_fake
def _(boxes, scores, iou_threshold, limit):
    return torch.empty_like(scores)


def _onnx_non_max_suppression(boxes, scores, iou_threshold, limit):
    from onnxscript import opset18 as op  # with the extra alone
    selected = op.NonMaxSuppression(
        boxes, scores, op.Constant(value_ints=[limit]),
        op.Constant(value_floats=[iou_threshold]), op.Constant(value_floats=[0.0]))
    nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    number = op.Slice(op.Shape(selected), op.Constant(value_ints=[0]),
                      op.Constant(value_ints=[1]))
    return op.ScatterND(nothing, selected, op.Expand(op.Constant(value_float=1.0), number))


def export(detector: Detector, path) -> None:
    """Writes the ONNX file, of a dynamic number of images, with all outputs of the module."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch's, about torch's own classes
        program = torch.onnx.export(
            detector, (torch.zeros(2, 3, *detector.size), ), dynamo=True, opset_version=OPSET,
            input_names=['images'], output_names=[*OUTPUTS, *RAW_OUTPUTS],
            dynamic_shapes=dict(images={0: torch.export.Dim('batch')}), verbose=False,
            custom_translation_table={
                torch.ops.dn_mmdet.non_max_suppression.default: _onnx_non_max_suppression})
    program.save(path)


def keep_outputs(path, out, names=OUTPUTS) -> None:
    """Writes the graph at ``path`` with some of its outputs to ``out``, whole or not at all."""
    import onnx
    model = onnx.load(path)
    for output in [output for output in model.graph.output if output.name not in names]:
        model.graph.output.remove(output)
    onnx.checker.check_model(model)
    part = Path(f'{out}.part')
    onnx.save(model, part)
    os.replace(part, out)


def open_session(path, threads=1):
    """onnxruntime on the CPU."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def read_images(paths, size) -> np.ndarray:
    """Image files as the graph takes them: (N, 3, H, W) float32, BGR, resized."""
    height, width = size
    images = [mmcv.imresize(mmcv.imread(str(path)), (width, height)) for path in paths]
    return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32)


class Agreement(NamedTuple):
    raw: float  # largest difference of class scores and box deltas, over the largest above 1
    matched: int  # detections that both give
    detections: int  # of mmdet


@torch.no_grad()
def compare(session, detector: Detector, images: np.ndarray) -> Agreement:
    """onnxruntime against mmdet itself, on images.

    A detection is matched by one of the same class whose score differs by less than
    1e-3 and whose corners by less than half a pixel.
    """
    found = dict(zip([output.name for output in session.get_outputs()],
                     session.run(None, dict(images=images)), strict=True))
    x = torch.from_numpy(images)
    raw = max(float((torch.from_numpy(found[name]) - expected).abs().max()
                    / expected.abs().max().clamp(min=1))
              for name, expected in zip(RAW_OUTPUTS, detector.raw(x), strict=True))
    matched = total = 0
    for index, sample in enumerate(_mmdet_predictions(detector, x)):
        expected = sample.pred_instances.numpy()
        total += len(expected.scores)
        same = (
            (found['labels'][index][:, None] == expected.labels)
            & (np.abs(found['scores'][index][:, None] - expected.scores) < 1e-3)
            & (np.abs(found['boxes'][index][:, None] - expected.bboxes).max(-1) < 0.5))
        matched += int(same.any(0).sum())
    return Agreement(raw, matched, total)


def _mmdet_predictions(detector, images):
    meta = dict(img_shape=detector.size, ori_shape=detector.size, scale_factor=(1.0, 1.0))
    data = dict(inputs=list(images), data_samples=[DetDataSample(metainfo=dict(meta, img_id=i))
                                                   for i in range(len(images))])
    return detector.model.test_step(data)


def latency(session, image: np.ndarray, runs: int = 50, warm_up: int = 5) -> list[float]:
    """Milliseconds of each run, of one image."""
    feed = {session.get_inputs()[0].name: image[:1]}
    times = []
    for _ in range(warm_up + runs):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(1e3 * (time.perf_counter() - start))
    return times[warm_up:]


def folded_twin(cfg: Config, model: nn.Module) -> nn.Module:
    """The same detector with BatchNorm, SC left out, folded into its convolutions.

    What MMDetection would run for a BatchNorm detector; for comparing latencies.
    """
    twin = MODELS.build(with_batch_norm(copy.deepcopy(cfg.model)))
    state = model.state_dict()
    for name in dn_layers(model):
        for key in [key for key in state if key.startswith(f'{name}.')]:
            value, leaf = state.pop(key), key.removeprefix(f'{name}.')
            if leaf.startswith('bn.'):
                state[f'{name}.{leaf.removeprefix("bn.")}'] = value
    twin.load_state_dict(state)
    return fuse_conv_bn(twin.eval())


def versions() -> str:
    import onnxruntime
    return (f'onnxruntime {onnxruntime.__version__} on the CPU, one thread, torch '
            f'{torch.__version__}, {platform.machine()}, {_processor()}')


def _processor():
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or 'unknown processor'
