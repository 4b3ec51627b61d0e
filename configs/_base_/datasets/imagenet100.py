# 100 classes of ImageNet, one sub-folder each: data/imagenet100/{train,val}/<wnid>/*.JPEG.
# Of the whole ImageNet: data_root='data/imagenet/' and class_list=<file with 100 wnids>.
imagenet100 = dict(type='ListedImageFolder', data_root='data/imagenet100/', class_list=None)
