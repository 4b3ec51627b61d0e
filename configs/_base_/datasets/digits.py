# Handwritten digits on photographs, made in data_root on first use (dn_mmdet/datasets/digits.py).
digits = dict(type='DigitsDataset', data_root='data/digits/', data_prefix=dict(img='images/'))
