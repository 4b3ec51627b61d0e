"""Dynamic Normalization (Liu, Gao, Lv, arXiv 2101.06073) for MMDetection.

Importing this package registers the layers, so that a config can say
``norm_cfg=dict(type='DNB')`` after
``custom_imports = dict(imports=['dn_mmdet'])``.
"""
from .functional import dynamic_norm
from .layers import DNB, DNC, DNB1d, DNB3d, DNC1d, DNC3d, SyncDNB, SyncDNC
from .sc import SC

__all__ = ['DNB', 'DNB1d', 'DNB3d', 'DNC', 'DNC1d', 'DNC3d', 'SC', 'SyncDNB', 'SyncDNC',
           'dynamic_norm']
__version__ = '0.1.0'
