"""Detectors of mmdet's zoo do with DN-B what they do with BatchNorm."""

import copy
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny_detector import write_config
from torch import nn

from dn_mmdet.cli import command_line
from dn_mmdet.zoo import check as zoo
from dn_mmdet.zoo.check import FAIL, NOT_APPLICABLE, PASS, SHIPPED, Stage, check, distinct

# A fixed sample: other backbones, necks, heads and tasks in each.
SAMPLE = {
    'centernet/centernet-update_r18_fpn_8xb8-amp-lsj-200e_coco.py': 20,
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py': 53,
    'efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py': 122,
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': 53,
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': 53,
    'gfl/gfl_r50_fpn_1x_coco.py': 53,
    'mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco.py': 53,
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py': 53,
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py': 86,
    'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py': 76,
    'yolo/yolov3_mobilenetv2_8xb24-ms-416-300e_coco.py': 72,
    'yolof/yolof_r50-c5_8xb8-1x_coco.py': 59,
}


@pytest.mark.shows('conversion of mmdet, torchvision and timm models: the output stays')
@pytest.mark.slow
@pytest.mark.parametrize('name', SAMPLE)
def test_a_sample_of_the_zoo(name):
    row = check(Config.fromfile(SHIPPED / name))
    assert (row['status'], row['reason']) == (PASS, '')
    assert row['replaced'] == SAMPLE[name] and row['left'] == (14 if 'yolof' in name else 0)
    assert row['difference'] < 1e-4
    assert row['train_step'] == row['prediction'] == 'yes'


@pytest.fixture
def tiny(tmp_path):
    return command_line.load_config(write_config(tmp_path, 'BN'))


def test_a_detector_passes_with_all_that_is_counted(tiny):
    before, stages = tiny.pretty_text, []
    row = check(tiny, stages.append)
    assert (row.pop('status'), row.pop('reason')) == (PASS, '')
    assert row.pop('difference') < 1e-4
    assert row == dict(replaced=66, left=0, image_size=64, train_step='yes', prediction='yes')
    assert stages == [
        Stage.BUILDING_WITH_BN,
        Stage.BUILDING_WITH_DN,
        Stage.COMPARING,
        Stage.TRAINING_WITH_DN,
        Stage.PREDICTING_WITH_DN,
    ]
    assert tiny.pretty_text == before


def test_another_output_fails(tiny, monkeypatch):
    real = zoo.outputs

    def outputs(model, data):
        return [
            level + bool(zoo.dn_layers(model)) * level.max() / 100 for level in real(model, data)
        ]

    monkeypatch.setattr(zoo, 'outputs', outputs)
    row = check(tiny)
    assert (row['status'], row['reason']) == (FAIL, 'the output is not that of BatchNorm')
    assert row['difference'] > 0.005 and 'train_step' not in row


def test_an_output_that_is_no_number_fails_whichever_it_is():
    right, wrong = torch.ones(2), torch.tensor([1.0, float('nan')])
    for got in ([wrong, right], [right, wrong]):
        assert zoo.difference(got, [right, right]) == float('inf')
    assert zoo.difference([right, right], [right, 2 * right]) == 0.5


def test_where_a_rounding_tips_the_output_float64_decides(tiny, monkeypatch):
    real = zoo.outputs

    def outputs(model, data):
        found = real(model, data)
        tipped = found[0].dtype == torch.float32 and bool(zoo.dn_layers(model))
        return [level + tipped * level.max() for level in found]

    monkeypatch.setattr(zoo, 'outputs', outputs)
    row = check(tiny)
    assert row['status'] == PASS and row['difference'] < 1e-12
    assert row['train_step'] == 'yes'


class Picky(ResNet):
    """A backbone that only works with some norms."""

    def __init__(self, *args, takes, **kwargs):
        super().__init__(*args, **kwargs)
        self.takes = takes

    def forward(self, x):
        norm = type(self.norm1).__name__
        if norm not in self.takes:
            raise ValueError(f'no {norm} here')
        return super().forward(x)


def picky(*takes):
    if 'Picky' not in MODELS.module_dict:
        MODELS.register_module(module=Picky)
    return Config(
        dict(
            model=dict(
                type='RetinaNet',
                data_preprocessor=dict(type='DetDataPreprocessor'),
                backbone=dict(type='Picky', depth=18, base_channels=8, takes=list(takes)),
                neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
                bbox_head=dict(
                    type='RetinaHead',
                    num_classes=3,
                    in_channels=8,
                    feat_channels=8,
                    stacked_convs=1,
                ),
                train_cfg=dict(
                    assigner=dict(
                        type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0
                    ),
                    allowed_border=-1,
                    pos_weight=-1,
                ),
                test_cfg=dict(
                    nms_pre=10,
                    score_thr=0.05,
                    nms=dict(type='nms', iou_threshold=0.5),
                    max_per_img=5,
                ),
            )
        )
    )


def test_deformable_convolutions_are_compared_without_random_offsets(monkeypatch):
    built, build = [], zoo._build
    monkeypatch.setattr(zoo, '_build', lambda cfg: built.append(build(cfg)) or built[-1])
    cfg = picky('BatchNorm2d', 'DNB')
    cfg.model.backbone.update(
        depth=50,
        dcn=dict(type='DCNv2', deform_groups=1),
        stage_with_dcn=(False, True, True, True),
        base_channels=8,
    )
    cfg.model.neck.in_channels = [32, 64, 128, 256]
    row = check(cfg)
    assert row['status'] == PASS and row['difference'] < 1e-5
    offsets = [
        module.conv_offset for module in built[0].modules() if hasattr(module, 'conv_offset')
    ]
    assert offsets and not any(offset.weight.any() for offset in offsets)


def test_what_works_with_batch_norm_alone_fails():
    row = check(picky('BatchNorm2d'))
    assert (row['status'], row['reason']) == (FAIL, 'ValueError: no DNB here')


def test_what_does_not_work_with_batch_norm_is_not_applicable(monkeypatch):
    row = check(picky())
    assert row['status'] == NOT_APPLICABLE
    assert row['reason'] == 'with BatchNorm it fails as well: ValueError: no BatchNorm2d here'
    cfg = picky()
    cfg.model.neck.type = 'NoSuchNeck'
    row = check(cfg)
    assert row['status'] == NOT_APPLICABLE and row['reason'] == (
        'with BatchNorm it fails as well: NoSuchNeck is not in mmdet but in another package'
    )


def test_a_detector_without_batch_norm_is_not_applicable():
    cfg = picky('GroupNorm')
    cfg.model.backbone.norm_cfg = dict(type='GN', num_groups=2)
    row = check(cfg)
    assert row['status'] == NOT_APPLICABLE
    assert row['reason'] == 'no BatchNorm in it, which holds 20 GroupNorm'


def test_norms_that_no_config_reaches_are_converted():
    cfg = picky('GroupNorm')
    cfg.model.backbone.update(
        norm_cfg=dict(type='GN', num_groups=2),
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(1,),
    )
    cfg.model.neck = dict(
        type='DilatedEncoder',
        in_channels=16,
        out_channels=8,
        block_mid_channels=8,
        num_residual_blocks=1,
        block_dilations=[2],
    )
    cfg.model.bbox_head.anchor_generator = dict(
        type='AnchorGenerator', ratios=[1.0], scales=[4], strides=[8]
    )
    row = check(cfg)
    assert (row['status'], row['reason']) == (PASS, '')
    assert (row['replaced'], row['left']) == (5, 0)


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def test_models_are_told_apart_by_what_they_compute(tmp_path, capsys):
    weights = dict(type='Pretrained', checkpoint='1')
    base = dict(
        type='A',
        backbone=dict(type='B', init_cfg=weights),
        data_preprocessor=dict(mean=[1, 2, 3], pad_size_divisor=1),
    )
    configs = {}
    for name, change in (
        ('a', {}),
        ('b', dict(data_preprocessor=dict(mean=[0, 0, 0], pad_size_divisor=1))),
        ('c', dict(backbone=dict(type='B', init_cfg=None))),
        ('d', dict(type='D')),
        ('e', dict(test_cfg=dict(nms_pre=1000))),
    ):
        configs[name] = write(tmp_path, f'{name}.py', f'model = {dict(base, **change)}')
    configs['f'] = write(tmp_path, 'f.py', 'schedule = 1')
    configs['g'] = write(tmp_path, 'g.py', '_base_ = "nowhere.py"')
    models = distinct(configs, print)
    assert {name: names for name, (_, names) in models.items()} == {
        'a': ['a', 'b', 'c'],
        'd': ['d'],
        'e': ['e'],
    }
    assert 'g: left out, it cannot be read (FileNotFoundError)' in capsys.readouterr().out


def test_nothing_is_downloaded():
    cfg = Config(
        dict(
            model=dict(
                backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='https://a'), depth=50),
                teacher_ckpt='https://b',
                pretrained=True,
                head=[dict(init_cfg=dict(type='Normal'))],
            )
        )
    )
    zoo._forget_weights(cfg.model)
    assert 'https' not in str(cfg) and cfg.model.pretrained is False
    assert cfg.model.head[0].init_cfg == dict(type='Normal')


def test_used_statistics_are_not_those_of_a_fresh_model():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    fresh = copy.deepcopy(model.state_dict())
    zoo._wear_in(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh[name]) == name.endswith('num_batches_tracked')


def test_every_shipped_config_is_found():
    names = zoo.shipped_configs()
    assert set(SAMPLE) <= set(names) and len(names) > 700
    assert not any('_base_' in name for name in names)
    assert all(isinstance(path, Path) and path.is_file() for path in names.values())
