_base_ = ['./mobilenetv2_bn_imagenet100.py', './_base_/datasets/tinyin100.py']

# 64 px: the first group that halves the 224 px image again keeps its size, so that the
# last map has 4 x 4 cells instead of 2 x 2. The weights are MobileNetV2's own.
model = dict(backbone=dict(type='StridedMobileNetV2', strides=(2, 1, 1, 2, 2, 1, 2, 1)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=64, padding=8, padding_mode='reflect'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=128,
    num_workers=2,
    drop_last=True,
    dataset=dict(_delete_=True, data_prefix='train', pipeline=train_pipeline, **_base_.tinyin100),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=2,
    dataset=dict(_delete_=True, data_prefix='val', pipeline=test_pipeline, **_base_.tinyin100),
)
test_dataloader = val_dataloader

max_epochs = 30
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=0.1, weight_decay=1e-4))
param_scheduler = dict(
    _delete_=True,
    type='OneCycleLR',
    eta_max=0.1,
    by_epoch=True,
    total_steps=max_epochs,
    convert_to_iter_based=True,
)
auto_scale_lr = dict(enable=False)
