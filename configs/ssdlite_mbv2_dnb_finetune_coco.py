_base_ = './ssdlite_mbv2_dnb_coco.py'

# From mmdet's SSDLite checkpoint, trained with BatchNorm for 600 epochs. It loads as it is:
# every DN layer starts as the BatchNorm of its name.
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/ssd/ssdlite_mobilenetv2_scratch_600e_coco/ssdlite_mobilenetv2_scratch_600e_coco_20210629_110627-974d9307.pth'  # noqa: E501

# 30 epochs of COCO (the data set repeats itself 5 times in each) at a tenth of the rate.
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=0.0015))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(
        type='CosineAnnealingLR',
        begin=0,
        T_max=max_epochs,
        end=max_epochs,
        by_epoch=True,
        eta_min=0,
    ),
]
