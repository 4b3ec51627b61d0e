"""The SSD head predicts, and is mmdet's in everything else."""

import pytest
import torch
from mmdet.models.dense_heads import SSDHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope

from dn_mmdet.models.ssdlite_head import SSDLiteHead

HEAD = dict(
    num_classes=3,
    in_channels=(8, 8),
    use_depthwise=True,
    anchor_generator=dict(
        type='SSDAnchorGenerator',
        scale_major=False,
        strides=[16, 32],
        ratios=[[2], [2]],
        min_sizes=[16, 32],
        max_sizes=[32, 48],
    ),
    bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
    test_cfg=Config(
        dict(
            nms_pre=100,
            nms=dict(type='nms', iou_threshold=0.45),
            min_bbox_size=0,
            score_thr=0.02,
            max_per_img=20,
        )
    ),
)
FEATURES = (8, 4, 4), (8, 2, 2)


@pytest.fixture(autouse=True)
def mmdets_scope():
    init_default_scope('mmdet')


def predict(head):
    sample = DetDataSample(
        metainfo=dict(img_shape=(64, 64), scale_factor=(1, 1), ori_shape=(64, 64))
    )
    features = tuple(torch.randn(1, *shape) for shape in FEATURES)
    return head.eval().predict(features, [sample])[0]


def test_predicts_boxes_with_softmax_scores():
    found = predict(SSDLiteHead(**HEAD))
    assert len(found) > 0
    assert found.bboxes.shape == (len(found), 4)
    assert set(found.labels.tolist()) <= {0, 1, 2}
    assert found.scores.max() < 0.5  # four near-equal shares, as softmax gives at the start


def test_mmdets_own_head_cannot_which_is_why_ours_exists():
    with pytest.raises(AttributeError, match='loss_cls'):
        predict(SSDHead(**HEAD))


def test_checkpoints_of_mmdets_head_load():
    own = SSDLiteHead(**HEAD)
    own.load_state_dict(SSDHead(**HEAD).state_dict(), strict=True)


def test_is_found_by_name():
    assert MODELS.get('SSDLiteHead') is SSDLiteHead
