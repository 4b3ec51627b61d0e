_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'

custom_imports = dict(imports=['dn_mmdet'], allow_failed_imports=False)

# The parent's requires_grad=False would freeze SC as well, at identity for ever.
model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type='DNB', bn_requires_grad=False)))
