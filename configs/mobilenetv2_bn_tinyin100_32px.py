_base_ = './mobilenetv2_bn_tinyin100.py'

# For a CPU: half the width at 32 px, about 95 s an epoch on one core. The first two groups
# keep the size of the image, so that the last map has 2 x 2 cells.
model = dict(backbone=dict(widen_factor=0.5, strides=(1, 1, 2, 2, 2, 1, 2, 1)))

resize = dict(type='Resize', scale=32, interpolation='area')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='RandomCrop', crop_size=32, padding=4, padding_mode='reflect'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), resize, dict(type='PackInputs')]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
