_base_ = 'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'

custom_imports = dict(
    imports=['dn_mmdet', 'dn_mmdet.models.ssdlite_head'], allow_failed_imports=False
)

model = dict(bbox_head=dict(type='SSDLiteHead'))

# mmdet's learning rate is for 8 x 24 images a step: scaled to the batch in use.
auto_scale_lr = dict(enable=True, base_batch_size=192)
