"""Dynamic Normalization (Liu, Gao, Lv, arXiv 2101.06073) for MMDetection.

Importing this package registers the layers, so that a config can say
``norm_cfg=dict(type='DNB')`` after
``custom_imports = dict(imports=['dn_mmdet'])``.
"""

from .environment import check_mmengine
from .renamed import accept_old_names

check_mmengine()
accept_old_names()

from .functional import dynamic_norm  # noqa: E402
from .layers import DNB, DNC, DNB1d, DNB3d, DNC1d, DNC3d, SyncDNB, SyncDNC  # noqa: E402
from .sc import SC  # noqa: E402
from .scaled_bn import ScaledBN  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    'DNB',
    'DNB1d',
    'DNB3d',
    'DNC',
    'DNC1d',
    'DNC3d',
    'SC',
    'ScaledBN',
    'SyncDNB',
    'SyncDNC',
    '__version__',
    'dynamic_norm',
]
