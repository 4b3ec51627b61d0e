_base_ = ['./ssdlite_mbv2_bn_digits.py', './_base_/norms/dnb.py']

model = dict(
    backbone=dict(norm_cfg=_base_.norm_cfg),
    neck=dict(norm_cfg=_base_.norm_cfg),
    bbox_head=dict(norm_cfg=_base_.norm_cfg),
)
