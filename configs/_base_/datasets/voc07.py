# PASCAL VOC 2007 as COCO json, as `tools/prepare_data.py voc07` lays it out.
voc07 = dict(
    type='CocoDataset',
    data_root='data/voc07/',
    data_prefix=dict(img='images/'),
    metainfo=dict(classes=('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car',
                           'cat', 'chair', 'cow', 'diningtable', 'dog', 'horse', 'motorbike',
                           'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')))
