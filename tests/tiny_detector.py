"""A detector and a COCO data set small enough to be trained within a test."""

import json

import mmcv
import numpy as np

CLASSES = ('cat', 'dog')

CONFIG = """
_base_ = 'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'
custom_imports = dict(imports=['dn_mmdet', 'dn_mmdet.models.ssdlite_head'])
norm_cfg = dict(type='BN', eps=0.001, momentum=0.03)
model = dict(
    backbone=dict(widen_factor=0.1, norm_cfg=norm_cfg),
    neck=dict(in_channels=(16, 1280), out_channels=(16, 1280, 16, 16),
              level_strides=(2, 2), level_paddings=(1, 1), norm_cfg=norm_cfg),
    bbox_head=dict(
        type='SSDLiteHead', num_classes=2, in_channels=(16, 1280, 16, 16), norm_cfg=norm_cfg,
        anchor_generator=dict(strides=[16, 32, 48, 64], ratios=[[2]] * 4,
                              min_sizes=[16, 24, 36, 48], max_sizes=[24, 36, 48, 64])))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(64, 64), keep_ratio=False),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                          'scale_factor')),
]
data = dict(type='CocoDataset', data_root='{root}/', ann_file='instances.json',
            data_prefix=dict(img='images/'), metainfo=dict(classes=('cat', 'dog')),
            pipeline=pipeline)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                        dataset=dict(_delete_=True, **data))
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                      dataset=dict(_delete_=True, test_mode=True, **data))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='{root}/instances.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = [dict(type='ConstantLR', factor=1.0, by_epoch=True)]
env_cfg = dict(cudnn_benchmark=False)
auto_scale_lr = dict(enable=False, base_batch_size=4)
"""


def make_coco(root, num_images=4):
    """COCO images and ``instances.json`` of `CLASSES`: bright squares on noise."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(num_images):
        pixels = rng.integers(0, 99, (64, 64, 3), np.uint8)
        x, y = (int(place) for place in rng.integers(0, 31, 2))
        pixels[y : y + 32, x : x + 32] += np.uint8(120)
        mmcv.imwrite(pixels, f'{root}/images/{i}.png')
        images.append(dict(id=i, file_name=f'{i}.png', width=64, height=64))
        annotations.append(
            dict(
                id=i + 1,
                image_id=i,
                category_id=1 + i % 2,
                iscrowd=0,
                bbox=[x, y, 32, 32],
                area=32 * 32,
            )
        )
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    (root / 'instances.json').write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )


def write_config(root, norm='BN', name=None, extra=''):
    """A config of this detector with norm layers of a type, on `make_coco`'s data."""
    path = root / (name or f'tiny_{norm.lower()}.py')
    path.write_text(
        CONFIG.replace('{root}', str(root)).replace("type='BN'", f"type='{norm}'") + extra
    )
    return path
