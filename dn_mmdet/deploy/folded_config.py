"""The config of a folded model: BatchNorm in the place of all DN layers, or of some."""

import copy

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from ..checks import preflight
from ..config_tree import add_imports, remove_imports
from ..experiments.controls import PartlyConverted
from ..fold import PartlyFolded, foldable
from ..layers import DynamicNorm
from ..messages import ConfigError, some
from ..registered import is_of, resolve
from ..scaled_bn import RewrittenBN

BATCH_NORMS = {
    nn.BatchNorm1d: 'BN1d',
    nn.BatchNorm2d: 'BN',
    nn.BatchNorm3d: 'BN3d',
    nn.SyncBatchNorm: 'SyncBN',
}


def with_batch_norm(node):
    """A model's config with BatchNorm wherever it has Dynamic Normalization."""
    if isinstance(node, (list, tuple)):
        return type(node)(with_batch_norm(child) for child in node)
    if not isinstance(node, dict):
        return node
    if resolve(MODELS, node.get('type')) in (PartlyConverted, PartlyFolded):
        return with_batch_norm(node['part'])
    if is_of(MODELS, node, (DynamicNorm, RewrittenBN)):
        cls = resolve(MODELS, node['type'])
        kept = {
            key: node[key] for key in ('eps', 'momentum', 'track_running_stats') if key in node
        }
        if not (node.get('requires_grad', True) and node.get('bn_requires_grad', True)):
            kept['requires_grad'] = False
        return type(node)(kept, type=BATCH_NORMS[getattr(cls, 'bn_type', nn.BatchNorm2d)])
    return type(node)({key: with_batch_norm(child) for key, child in node.items()})


def folded_config(cfg: Config, names, dynamic) -> Config:
    """The config of the model in which only the layers ``dynamic`` of ``names`` are dynamic.

    Where there is none it needs nothing of this package but what else the config names.
    """
    cfg = Config(cfg.to_dict())  # a copy, with names in place of a python-style config's classes
    if dynamic:
        for key, node in list(cfg.model.items()):
            if isinstance(node, (list, tuple)):
                cfg.model[key] = [
                    _folded_part(child, f'{key}.{i}.', names, dynamic)
                    for i, child in enumerate(node)
                ]
            else:
                cfg.model[key] = _folded_part(node, f'{key}.', names, dynamic)
    else:
        cfg.model = with_batch_norm(cfg.model)
        if isinstance(cfg.get('norm_cfg'), dict):
            cfg.norm_cfg = with_batch_norm(cfg.norm_cfg)
    if cfg.get('custom_hooks'):
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.get('type') != 'RecordRun']
    remove_imports(
        cfg,
        'dn_mmdet',
        'dn_mmdet.experiments.controls',
        'dn_mmdet.experiments.recording',
        'dn_mmdet.fold',
    )
    if dynamic:
        add_imports(cfg, 'dn_mmdet.fold')
    return cfg


def _folded_part(node, prefix, names, dynamic):
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    kept = [name for name in inside if f'{prefix}{name}' in dynamic]
    if not isinstance(node, dict) or len(kept) == len(inside):
        return node
    if not kept:
        return with_batch_norm(node)
    return dict(type='PartlyFolded', part=node, dynamic=kept)


def built(cfg: Config) -> nn.Module:
    """The model of a config as mmengine's runner builds it, on the CPU.

    Raises:
        ConfigError: see `check_model`.
    """
    cfg = copy.deepcopy(cfg)
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return preflight.check_model(cfg)


def from_text(cfg: Config) -> Config:
    """A config as it is read from the file that its text becomes."""
    return Config.fromstring(cfg.pretty_text, '.py')


def check_twin(cfg: Config, model: nn.Module) -> None:
    """Raises ConfigError where the config with BatchNorm builds more than another norm."""
    wanted = {}
    inside = {f'{name}.' for names in foldable(model).values() for name in names}
    for key, value in model.state_dict().items():
        layer = next((name for name in inside if key.startswith(name)), '')
        leaf = key.removeprefix(layer)
        if not layer or leaf.startswith('bn.'):
            wanted[layer + leaf.removeprefix('bn.')] = value.shape
    twin = built(from_text(folded_config(cfg, (), ()))).state_dict()
    affine = {f'{name}{leaf}' for name in inside for leaf in ('weight', 'bias')}
    differing = sorted(
        key
        for key in {*wanted, *twin} - affine
        if key not in wanted or key not in twin or wanted[key] != twin[key].shape
    )
    if differing:
        raise ConfigError(
            f'{cfg.filename}: with BatchNorm in the place of Dynamic Normalization '
            f'it builds a model that differs in more than the norm, in '
            f'{len(differing)} weights ({some(differing)}): fold the model in '
            f'Python, by dn_mmdet.fold.fold_norm'
        )
