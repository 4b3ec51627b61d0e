_base_ = './ssdlite_mbv2_dnb_coco.py'

# Can the detector learn at all? 32 real COCO images, no augmentation, evaluated on the
# same images. `tools/prepare_data.py coco_mini` makes the folder.
data_root = 'data/coco_mini/'
overfit = dict(
    data_root=data_root, ann_file='instances_train32.json', data_prefix=dict(img='images/')
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(320, 320), keep_ratio=False),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(times=20, dataset=dict(pipeline=train_pipeline, **overfit)),
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=overfit)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + overfit['ann_file'])
test_evaluator = val_evaluator

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-3, weight_decay=0.01),
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
default_hooks = dict(logger=dict(interval=10))
