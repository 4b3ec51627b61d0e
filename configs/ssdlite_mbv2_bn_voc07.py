_base_ = ['./ssdlite_mbv2_bn_coco.py', './_base_/datasets/voc07.py']

model = dict(bbox_head=dict(num_classes=20))

train_dataloader = dict(
    dataset=dict(times=10, dataset=dict(ann_file='instances_train.json', **_base_.voc07))
)
val_dataloader = dict(dataset=dict(ann_file='instances_val.json', **_base_.voc07))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.voc07.data_root + 'instances_val.json')
test_evaluator = val_evaluator
