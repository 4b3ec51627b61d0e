"""What MMDetection's detectors compute from pixels to boxes, written for ONNX.

One class for each kind of head: its own outputs ("raw"), and the boxes made of them.
"""

from typing import Any

import mmcv.ops
import torch
import torchvision
from mmdet.models.dense_heads import RPNHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..messages import ConfigError

UNLIMITED = 1000  # detections of an image where the config sets no limit


def kind_of(model: nn.Module) -> type[nn.Module]:
    """The class below that computes what a detector does.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(model, SingleStageDetector):
        head = model.bbox_head
        if (
            _own(head, 'predict_by_feat', BaseDenseHead)
            and _own(head, '_predict_by_feat_single', BaseDenseHead)
            and type(head.bbox_coder) in (DeltaXYWHBBoxCoder, DistancePointBBoxCoder)
        ):
            return DenseHead
        if _own(head, 'predict_by_feat', YOLOXHead):
            return YOLOX
        return RawOutputs
    if isinstance(model, TwoStageDetector):
        rpn, roi = model.rpn_head, model.roi_head
        if (
            _own(rpn, 'predict_by_feat', BaseDenseHead)
            and _own(rpn, '_predict_by_feat_single', RPNHead)
            and type(roi) is StandardRoIHead
            and not roi.with_mask
            and type(roi.bbox_roi_extractor) is SingleRoIExtractor
            and all(layer.pool_mode == 'avg' for layer in roi.bbox_roi_extractor.roi_layers)
            and _own(roi.bbox_head, '_predict_by_feat_single', BBoxHead)
            and not roi.bbox_head.custom_cls_channels
            and type(rpn.bbox_coder) is type(roi.bbox_head.bbox_coder) is DeltaXYWHBBoxCoder
        ):
            return TwoStage
        raise ConfigError(
            f'expected a two-stage detector as Faster R-CNN is, without masks, got '
            f'{type(model).__name__} with {type(roi).__name__}: its decoding is '
            f'not written for ONNX'
        )
    raise ConfigError(
        f'expected a single-stage detector (SSD, RetinaNet, FCOS, YOLOX, RTMDet) '
        f'or Faster R-CNN, got {type(model).__name__}: its decoding is not written '
        f'for ONNX'
    )


def _own(head, method, cls):
    return getattr(type(head), method) is getattr(cls, method)


# Options of mmcv's `batched_nms` by which it does no more than what is written here.
NMS = dict(class_agnostic=False, offset=0, score_threshold=0, max_num=-1)


def _check_nms(option, cfg):
    """Raises ConfigError where mmdet would suppress in another way than the graph."""
    nms = cfg.get('nms') or {}
    known = {'type', 'iou_threshold', 'split_thr', *NMS}
    if (
        nms.get('type') not in ('nms', mmcv.ops.nms)
        or not {'iou_threshold'} <= nms.keys() <= known
        or any(nms.get(name, value) != value for name, value in NMS.items())
    ):
        raise ConfigError(
            f"{option}.nms: expected type='nms' by class, with iou_threshold and no other option "
            f'that changes what is found, got {dict(nms)}. Change it, or export with --raw'
        )
    limit = cfg.get('max_per_img')
    if limit is not None and limit < 1:
        raise ConfigError(
            f'{option}.max_per_img: expected at least 1, got {limit}: the graph needs a number '
            f'of detections for each image. Change it, or export with --raw'
        )


class DenseHead(nn.Module):
    """A head that predicts as mmdet's BaseDenseHead does: SSD, RetinaNet, FCOS, ATSS, RTMDet.

    Its outputs are class scores, box deltas (or distances) and, in some, a factor of the
    score (centerness).

    Args:
        model: the detector.
        size: (height, width) of the images.
    """

    FIRST = ('class_scores', 'box_deltas')  # outputs that come of no choice among boxes
    PRIORS = {}  # arguments of the head's prior generator

    def __init__(self, model: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.model = model
        self.size = size
        head: Any = model.bbox_head
        self.cfg = head.test_cfg
        with torch.no_grad():
            levels = model(torch.zeros(1, 3, *size), mode='tensor')
        self._make_priors(head, levels[0])
        self.raw_names = self.FIRST = self._names(len(levels))

    def check(self, raw: bool) -> None:
        """Raises ConfigError where mmdet would choose other detections, unless only raw ones."""
        if not raw:
            _check_nms('model.test_cfg', self.cfg)

    def _names(self, number):
        return (*self.FIRST, 'score_factors')[:number]

    def _make_priors(self, head, levels):
        priors = head.prior_generator.grid_priors(
            [level.shape[-2:] for level in levels], device='cpu', **self.PRIORS
        )
        self.num_priors = [len(level) for level in priors]
        self.register_buffer('priors', torch.cat(priors))

    def raw(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, priors, classes), (N, priors, 4) and so on, of normalised images."""
        levels = self.model(images, mode='tensor')
        head: Any = self.model.bbox_head
        channels = (head.cls_out_channels, 4, 1)
        return tuple(
            flatten(output, number) for output, number in zip(levels, channels, strict=False)
        )

    def detect(self, class_scores, box_deltas, score_factors=None):
        """Boxes (N, K, 4), scores (N, K), labels (N, K), by descending score."""
        scores = torch.cat(
            [
                keep_largest(level, self.cfg.get('nms_pre', -1))
                for level in self._probabilities(class_scores).split(self.num_priors, 1)
            ],
            1,
        )
        boxes = self._decode(self.model.bbox_head.bbox_coder, self.priors, box_deltas)
        valid = scores > self.cfg.get('score_thr', 0)
        if score_factors is not None:
            scores = scores * score_factors.sigmoid()
        valid = valid & large(boxes, self.cfg)[..., None]
        return suppress(boxes, (scores * valid).transpose(1, 2), self.cfg)

    def _probabilities(self, class_scores):
        if self.model.bbox_head.use_sigmoid_cls:
            return class_scores.sigmoid()
        return class_scores.softmax(-1)[..., :-1]

    def _decode(self, coder, priors, deltas):
        """Boxes (N, M, 4) of deltas of that shape; the coder takes one list for all images."""
        priors = priors.expand(deltas.shape[0], -1, -1).flatten(0, 1)
        return coder.decode(priors, deltas.flatten(0, 1), max_shape=self.size).reshape(
            deltas.shape
        )


class YOLOX(DenseHead):
    """YOLOX: a box counts for its best class alone, and scores are multiplied by objectness."""

    PRIORS = dict(with_stride=True)

    def _names(self, number):
        return (*self.FIRST, 'objectness')

    def detect(self, class_scores, box_deltas, objectness):
        scores = class_scores.sigmoid()
        best = scores.max(-1, keepdim=True).values
        scores = torch.where(scores >= best, scores * objectness.sigmoid(), 0)
        valid = scores >= self.cfg.score_thr
        boxes = self.model.bbox_head._bbox_decode(self.priors, box_deltas)
        return suppress(boxes, (scores * valid).transpose(1, 2), self.cfg)


class TwoStage(DenseHead):
    """Faster R-CNN: proposals of the RPN, always the same number of them, and boxes of these.

    Where there are fewer proposals, the rest is zeros. Features of all proposals are taken
    from all levels and then chosen, as ONNX has no other way without dynamic shapes.
    """

    FIRST = ('rpn_scores', 'rpn_deltas')

    def __init__(self, model, size):
        nn.Module.__init__(self)
        self.model = model
        self.size = size
        self.cfg = model.roi_head.test_cfg
        self.of_rpn = model.rpn_head.test_cfg
        with torch.no_grad():
            features = model.extract_feat(torch.zeros(1, 3, *size))
            self._make_priors(model.rpn_head, model.rpn_head(features)[0])
        self.raw_names = (*self.FIRST, 'proposals', 'class_scores', 'box_deltas')

    def check(self, raw):
        _check_nms('model.test_cfg.rpn', self.of_rpn)  # which the head's own outputs need too
        if not raw:
            _check_nms('model.test_cfg.rcnn', self.cfg)

    def raw(self, images):
        rpn, roi = self.model.rpn_head, self.model.roi_head
        features = self.model.extract_feat(images)
        scores, deltas = rpn(features)
        scores, deltas = flatten(scores, rpn.cls_out_channels), flatten(deltas, 4)
        proposals = self.propose(scores, deltas)
        number, kept = proposals.shape[:2]
        image = torch.arange(number, dtype=proposals.dtype)[:, None, None].expand(-1, kept, 1)
        rois = torch.cat((image, proposals), dim=2).flatten(0, 1)
        found = self._features(features, rois)
        if roi.with_shared_head:
            found = roi.shared_head(found)
        outputs = [output.unflatten(0, (-1, kept)) for output in roi.bbox_head(found)]
        return scores, deltas, proposals, *outputs

    def propose(self, scores, deltas):
        """The RPN's boxes (N, K, 4) after suppression level by level, by descending score."""
        rpn, limit = self.model.rpn_head, self.of_rpn.get('nms_pre', -1)
        scores = (scores.sigmoid() if rpn.use_sigmoid_cls else scores.softmax(-1))[..., 0]
        best, chosen, start = [], [], 0
        for level in scores.split(self.num_priors, 1):
            number = level.shape[1]
            values, index = level.topk(min(limit, number) if limit > 0 else number)
            best.append(values)
            chosen.append(index + start)
            start += number
        levels = torch.cat([torch.full((values.shape[1],), i) for i, values in enumerate(best)])
        of_level = levels == torch.arange(len(best))[:, None]  # (levels, boxes)
        best, chosen = torch.cat(best, 1), torch.cat(chosen, 1)
        boxes = self._decode(rpn.bbox_coder, self.priors, deltas)
        boxes = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
        best = (best * large(boxes, self.of_rpn))[:, None] * of_level
        boxes, *_ = suppress(boxes, best, self.of_rpn)
        return boxes

    def _features(self, features, rois):
        extractor = self.model.roi_head.bbox_roi_extractor
        features = features[: extractor.num_inputs]
        levels = extractor.map_roi_levels(rois, len(features))[:, None, None, None]
        found = None
        for i, (level, layer) in enumerate(zip(features, extractor.roi_layers, strict=True)):
            of_level = torchvision.ops.roi_align(
                level,
                rois,
                layer.output_size,
                layer.spatial_scale,
                layer.sampling_ratio,
                layer.aligned,
            )
            found = of_level if found is None else torch.where(levels == i, of_level, found)
        return found

    def detect(self, rpn_scores, rpn_deltas, proposals, class_scores, box_deltas):
        head = self.model.roi_head.bbox_head
        scores = class_scores.softmax(-1)[..., :-1]  # (N, K, classes)
        classes = scores.shape[2]
        sides = proposals[..., 2:] - proposals[..., :2]
        scores = scores * (scores > self.cfg.score_thr) * (sides > 0).all(-1, keepdim=True)
        deltas = box_deltas.unflatten(2, (-1, 4)).expand(-1, -1, classes, 4).flatten(1, 2)
        priors = proposals[:, :, None].expand(-1, -1, classes, 4).flatten(1, 2)
        boxes = self._decode(head.bbox_coder, priors, deltas)
        # Classes are moved apart, so that none suppresses another: each has its own boxes.
        labels = torch.arange(classes).repeat(proposals.shape[1])
        apart = boxes + (labels * (max(self.size) + 1.0))[:, None]
        _, best, index = _select(apart, scores.flatten(1)[:, None], self.cfg)
        found = best > 0
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return boxes * found[..., None], best, torch.where(found, index % classes, -1)


class RawOutputs(nn.Module):
    """Any other head: what it gives, level by level, and no boxes."""

    detect = None

    def __init__(self, model, size):
        super().__init__()
        self.model = model
        with torch.no_grad():
            outputs = tree_leaves(model(torch.zeros(1, 3, *size), mode='tensor'))
        if not all(isinstance(output, Tensor) for output in outputs):
            raise ConfigError(
                f'expected a head whose outputs are tensors, got '
                f'{type(model.bbox_head).__name__}, which gives others: it cannot '
                f'be written as ONNX'
            )
        self.raw_names = self.FIRST = tuple(f'raw_{i}' for i in range(len(outputs)))

    def check(self, raw):
        pass

    def raw(self, images):
        return tuple(tree_leaves(self.model(images, mode='tensor')))


def flatten(levels, channels):
    """(N, priors * channels, H, W) of each level -> (N, all priors, channels)."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in levels], dim=1).unflatten(
        1, (-1, channels)
    )


def keep_largest(scores: Tensor, number: int) -> Tensor:
    """(N, priors, classes) with zeros in place of all but the ``number`` largest of an image."""
    flat = scores.flatten(1)
    if not 0 < number < flat.shape[1]:
        return scores
    smallest = flat.topk(number).values[:, -1:]
    return torch.where(flat >= smallest, flat, 0).unflatten(1, scores.shape[1:])


def large(boxes, cfg):
    """Whether boxes (N, M, 4) are larger than a config's ``min_bbox_size``, if it has one."""
    smallest = cfg.get('min_bbox_size', -1)
    if smallest < 0:
        return torch.ones_like(boxes[..., 0], dtype=torch.bool)
    return (boxes[..., 2:] - boxes[..., :2] > smallest).all(-1)


def suppress(boxes, scores, cfg):
    """The best boxes (N, K, 4) that no better one of their class covers, scores, labels.

    Shape: boxes (N, M, 4), scores (N, classes, M), zeros where a box does not count.
    """
    labels, best, index = _select(boxes, scores, cfg)
    found = best > 0
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return boxes * found[..., None], best, torch.where(found, labels, -1)


def _select(boxes, scores, cfg):
    """Labels, scores and places among the boxes of the best, each (N, K)."""
    number = boxes.shape[1]
    limit = min(cfg.get('max_per_img') or UNLIMITED, scores.shape[1] * number)
    kept = non_max_suppression(boxes, scores, cfg.nms.iou_threshold, limit)
    best, index = (scores * kept).flatten(1).topk(limit)
    return index // number, best, index % number


@torch.library.custom_op('dn_mmdet::non_max_suppression', mutates_args=())
def non_max_suppression(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    """1 for what ONNX's operator of this name selects in each image and class, else 0.

    Shape: boxes (N, anchors, 4), scores (N, classes, anchors), output as scores. Scores
    of 0 are never selected, and ``limit`` at most in a class.
    """
    selected = torch.zeros_like(scores)
    for image, of_image in enumerate(scores):
        label, anchor = of_image.nonzero(as_tuple=True)
        kept = torchvision.ops.batched_nms(
            boxes[image, anchor], of_image[label, anchor], label, iou_threshold
        )
        for of_label in label.unique():
            mine = kept[label[kept] == of_label][:limit]
            selected[image, of_label, anchor[mine]] = 1
    return selected


@non_max_suppression.register_fake
def _(boxes, scores, iou_threshold, limit):
    return torch.empty_like(scores)


def onnx_non_max_suppression(boxes, scores, iou_threshold, limit):
    from onnxscript import opset18 as op  # with the extra alone

    selected = op.NonMaxSuppression(
        boxes,
        scores,
        op.Constant(value_ints=[limit]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[0.0]),
    )
    nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    number = op.Slice(op.Shape(selected), op.Constant(value_ints=[0]), op.Constant(value_ints=[1]))
    return op.ScatterND(nothing, selected, op.Expand(op.Constant(value_float=1.0), number))
