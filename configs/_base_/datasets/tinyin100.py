# 100 classes of Tiny-ImageNet at 64 px, data/tinyin100/{train,val}/<wnid>/*.JPEG:
#   mkdir -p data/tinyin100 && tar xJf ../shared/data/tinyin100/tinyin100.tar.xz -C data/tinyin100
tinyin100 = dict(type='ListedImageFolder', data_root='data/tinyin100/', class_list=None)
