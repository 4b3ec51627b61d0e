"""Configs beyond SSDLite: short diffs over mmdet's own, in nothing but the norm, that train."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from dn_mmdet.convert import batch_norms, dn_layers, swap_norm

CONFIGS = Path(__file__).parents[1] / 'configs'
# the parent, and how many norms the detector has
PARENTS = {
    'retinanet_r50_dnb_coco': ('retinanet/retinanet_r50_fpn_1x_coco', 53),
    'faster_rcnn_r50_dnb_coco': ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco', 53),
    'mask_rcnn_r50_dnb_coco': ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco', 53),
    'fcos_r50_dnb_coco': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', 53),
    'yolox_tiny_dnb_coco': ('yolox/yolox_tiny_8xb8-300e_coco', 74),
    'rtmdet_tiny_dnb_coco': ('rtmdet/rtmdet_tiny_8xb32-300e_coco', 76),
    'detr_r50_dnb_coco': ('detr/detr_r50_8xb2-150e_coco', 53),
}


def read(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def build(model_cfg):
    """The detector with random weights: a pretrained backbone would be a download."""
    init_default_scope('mmdet')
    if 'init_cfg' in model_cfg.backbone:
        model_cfg.backbone.init_cfg = None
    model = MODELS.build(model_cfg)
    model.init_weights()
    return model


def bare(node):
    """A config without what mmengine adds on inheriting, and without mmcv's default."""
    if isinstance(node, dict):
        return {
            key: bare(value)
            for key, value in node.items()
            if key != '_scope_' and (key, value) != ('requires_grad', True)
        }
    return [bare(child) for child in node] if isinstance(node, (list, tuple)) else node


@pytest.mark.parametrize('name', PARENTS)
def test_a_config_differs_from_its_parent_in_nothing_but_the_norm(name):
    parent, cfg = get_config(f'mmdet::{PARENTS[name][0]}.py'), read(name)
    assert cfg.pop('custom_imports').imports == ['dn_mmdet']
    cfg.pop('norm_cfg', None)
    assert bare(cfg.pop('model')) == bare(swap_norm(parent, 'DNB').model)
    parent.pop('model')
    assert bare(cfg.to_dict()) == bare(parent.to_dict())


@pytest.mark.shows('training by config and by `--norm`')
@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.startswith('mask') else [])
        for name in PARENTS
    ],
)
def test_a_config_builds_trains_and_predicts(name):
    cfg = read(name)
    cfg.model.data_preprocessor.pop('batch_augments', None)  # resizes to 320 and more
    model = build(cfg.model)
    layers = dn_layers(model)
    assert len(layers) == PARENTS[name][1] and not batch_norms(model)
    cfg.optim_wrapper.optimizer.lr = 1e-3
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)

    def data():
        return demo_mm_inputs(
            2,
            image_shapes=(3, 96, 96),
            num_items=[8, 8],
            num_classes=80,
            with_mask=name.startswith('mask'),
            use_box_type=True,
        )

    for _ in range(2):  # what ResNet's zero-initialised bn3 holds back moves in the second
        losses = model.train_step(data(), optimizer)
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values())
    trainable = [layer for layer in layers.values() if layer.sc.w_out.requires_grad]
    frozen = 11 if 'r50' in name else 0  # stem and first stage: frozen_stages=1
    assert len(trainable) == len(layers) - frozen
    # without an object of that size, no gradient reaches the boxes of RTMDet's last level
    still = {
        name
        for name, layer in layers.items()
        if layer.sc.w_out.requires_grad and not layer.sc.w_out.any()
    }
    assert still <= {'bbox_head.reg_convs.2.0.bn', 'bbox_head.reg_convs.2.1.bn'}
    with torch.no_grad():
        results = model.eval().test_step(data())
    assert len(results) == 2 and all(hasattr(r, 'pred_instances') for r in results)


def test_the_fine_tuning_starts_from_a_bn_checkpoint(close, tmp_path):
    cfg = read('ssdlite_mbv2_dnb_finetune_coco')
    assert cfg.load_from.endswith('.pth') and cfg.train_cfg.max_epochs == 6
    source = build(read('ssdlite_mbv2_bn_coco').model).eval()
    model = build(cfg.model).eval()
    model.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for got, expected in zip(model(x, mode='tensor'), source(x, mode='tensor'), strict=True):
            close(
                torch.cat([level.flatten() for level in got]),
                torch.cat([level.flatten() for level in expected]),
            )
