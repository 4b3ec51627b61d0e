"""Modules under the names that configs of the past have for them.

A finished training keeps its config, and that names modules in ``custom_imports``.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

RENAMED = {
    'dn_mmdet.ablation': 'dn_mmdet.experiments.ablation',
    'dn_mmdet.classification': 'dn_mmdet.models.classification',
    'dn_mmdet.controls': 'dn_mmdet.experiments.controls',
    'dn_mmdet.cost': 'dn_mmdet.experiments.cost',
    'dn_mmdet.digits': 'dn_mmdet.datasets.digits',
    'dn_mmdet.recording': 'dn_mmdet.experiments.recording',
    'dn_mmdet.ssdlite_head': 'dn_mmdet.models.ssdlite_head',
}


class _OldNames(MetaPathFinder, Loader):
    """Imports the module of today, so that nothing is defined or registered twice."""

    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self) if fullname in RENAMED else None

    def create_module(self, spec):
        return None  # Python's own, an empty one, which is replaced below

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(RENAMED[module.__name__])


def accept_old_names() -> None:
    """Lets old names be imported, from now on, in this process."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldNames())
