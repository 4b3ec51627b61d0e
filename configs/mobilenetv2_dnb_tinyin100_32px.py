_base_ = ['./mobilenetv2_bn_tinyin100_32px.py', './_base_/norms/dnb.py']

model = dict(backbone=dict(norm_cfg=_base_.norm_cfg))
