_base_ = ['./ssdlite_mbv2_bn_coco.py', './_base_/datasets/digits.py']

custom_imports = dict(
    imports=['dn_mmdet', 'dn_mmdet.models.ssdlite_head', 'dn_mmdet.datasets.digits'],
    allow_failed_imports=False,
)

# SSDLite at half width and for 160 px: the maps are 10, 5, 3 and 2 cells wide, and
# anchors are as large as the digits (30 to 90 px), upright like them or square.
model = dict(
    backbone=dict(widen_factor=0.5),
    neck=dict(
        in_channels=(48, 1280),
        out_channels=(48, 1280, 256, 128),
        level_strides=(2, 2),
        level_paddings=(1, 1),
    ),
    bbox_head=dict(
        num_classes=10,
        in_channels=(48, 1280, 256, 128),
        anchor_generator=dict(
            strides=[16, 32, 53, 80],
            ratios=[[1.5]] * 4,
            min_sizes=[34, 50, 66, 82],
            max_sizes=[50, 66, 82, 98],
        ),
    ),
)

# A mirrored digit is no digit: no flip.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(160, 160), keep_ratio=False),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True, ann_file='instances_train.json', pipeline=train_pipeline, **_base_.digits
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(ann_file='instances_val.json', pipeline=test_pipeline, **_base_.digits),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.digits.data_root + 'instances_val.json')
test_evaluator = val_evaluator

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=3e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
param_scheduler = dict(
    _delete_=True,
    type='OneCycleLR',
    eta_max=3e-3,
    by_epoch=True,
    total_steps=max_epochs,
    convert_to_iter_based=True,
)
auto_scale_lr = dict(enable=False)
env_cfg = dict(cudnn_benchmark=False)
