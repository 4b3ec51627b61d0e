_base_ = './ssdlite_mbv2_bn_voc07.py'

# For a CPU: half the width at 128 px. The maps are 8, 4, 2 and 1 cells wide, and anchors
# span them as mmdet's do at 320 px.
model = dict(
    backbone=dict(widen_factor=0.5),
    neck=dict(
        in_channels=(48, 1280),
        out_channels=(48, 1280, 256, 128),
        level_strides=(2, 2),
        level_paddings=(1, 1),
    ),
    bbox_head=dict(
        in_channels=(48, 1280, 256, 128),
        anchor_generator=dict(
            strides=[16, 32, 64, 128],
            ratios=[[2, 3]] * 4,
            min_sizes=[20, 42, 68, 98],
            max_sizes=[42, 68, 98, 126],
        ),
    ),
)

resize = dict(type='Resize', scale=(128, 128), keep_ratio=False)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomCrop', crop_type='relative_range', crop_size=(0.5, 0.5)),
    resize,
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=16, num_workers=1, dataset=dict(times=1, dataset=dict(pipeline=train_pipeline))
)
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 15
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
param_scheduler = dict(
    _delete_=True,
    type='OneCycleLR',
    eta_max=2e-3,
    by_epoch=True,
    total_steps=max_epochs,
    convert_to_iter_based=True,
)
auto_scale_lr = dict(enable=False)
env_cfg = dict(cudnn_benchmark=False)
