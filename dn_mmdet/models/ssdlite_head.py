"""mmdet's SSD head, repaired so that it can be evaluated."""

from ..environment import check_mmdet

check_mmdet()

from mmdet.models.dense_heads import SSDHead  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402


@MODELS.register_module()
class SSDLiteHead(SSDHead):
    """mmdet's `SSDHead`, able to predict.

    `BaseDenseHead._predict_by_feat_single` asks every head's ``loss_cls`` whether
    it has an activation of its own. `SSDHead` computes its losses in place and has
    no such attribute, so that evaluating it raises an AttributeError in
    MMDetection 3.3.0 and in onedl-mmdetection 3.5.1. None gives the softmax that
    the head is trained with. Parameters and checkpoints are SSDHead's.
    """

    loss_cls = None
