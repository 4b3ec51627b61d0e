_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['dn_mmdet'], allow_failed_imports=False)

model = dict(backbone=dict(norm_cfg=dict(type='DNB')))
