_base_ = [
    'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
    './_base_/datasets/imagenet100.py',
]

custom_imports = dict(
    imports=['dn_mmdet', 'dn_mmdet.models.classification'], allow_failed_imports=False
)

# mmdet's MobileNetV2, not mmpretrain's, which names its weights otherwise: detectors start
# from a checkpoint of this with --cfg-options load_from=CHECKPOINT.
model = dict(
    backbone=dict(type='mmdet.MobileNetV2', out_indices=(7,), norm_cfg=dict(type='BN')),
    head=dict(num_classes=100),
)
data_preprocessor = dict(num_classes=100)

train_dataloader = dict(
    dataset=dict(
        _delete_=True, data_prefix='train', pipeline=_base_.train_pipeline, **_base_.imagenet100
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True, data_prefix='val', pipeline=_base_.test_pipeline, **_base_.imagenet100
    )
)
test_dataloader = val_dataloader

# mmpretrain's learning rate is for 8 x 32 images a step: scaled to the batch in use.
auto_scale_lr = dict(enable=True)
