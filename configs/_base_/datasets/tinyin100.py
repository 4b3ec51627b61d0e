# 100 classes of Tiny-ImageNet at 64 px, one sub-folder each:
# data/tinyin100/{train,val}/<wnid>/*.JPEG, made by tools/prepare_data.py tinyin100
tinyin100 = dict(type='ListedImageFolder', data_root='data/tinyin100/', class_list=None)
