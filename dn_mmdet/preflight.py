"""Checks of a config and of a work folder, before a tool writes anything."""
import contextlib
import copy
import difflib
import errno
import inspect
import json
import os
import re
import socket
import tempfile
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.models.dense_heads import SSDHead
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import find_latest_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .checkpoint import is_remote
from .layers import _DynamicNorm

try:
    import fcntl
except ImportError:  # Windows has no such locks: two runs in a folder go unnoticed there
    fcntl = None

LOCK = '.train.lock'
NORMS = (_DynamicNorm, _BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
# The names that mmengine's CheckpointHook gives.
CHECKPOINTS = re.compile(r'((best_.+_)?(epoch|iter)_\d+\.pth|last_checkpoint)')

# What mmdet and pycocotools read from each entry.
COCO_KEYS = dict(images={'id', 'file_name', 'height', 'width'}, categories={'id', 'name'},
                 annotations={'id', 'image_id', 'category_id', 'bbox', 'area'})


class ConfigError(ValueError):
    """A config, an option or a folder that a tool cannot go on with."""


def check_parts(cfg: Config, *names: str) -> None:
    """Raises ConfigError where a config lacks a part that a tool needs."""
    missing = [name for name in names if cfg.get(name) is None]
    if missing:
        raise ConfigError(f'{cfg.filename}: expected {", ".join(names)}; it lacks '
                          f'{", ".join(missing)}')


def check_model(cfg: Config) -> nn.Module:
    """The model of a config, built on the CPU.

    Raises:
        ConfigError: it cannot be built; misspelt norms are told apart, with the
            right name.
    """
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    for option, norm_cfg in _norm_cfgs(cfg.model, 'model'):
        check_norm(option, norm_cfg)
    try:
        return MODELS.build(copy.deepcopy(cfg.model))
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ConfigError(f'model: cannot be built from the config: '
                          f'{_message(error)}') from error


def _norm_cfgs(node, option):
    """Every dict under a key that ends in ``norm_cfg``, with the option that sets it."""
    if isinstance(node, dict):
        for key, value in node.items():
            if str(key).endswith('norm_cfg') and isinstance(value, dict):
                yield f'{option}.{key}', value
            else:
                yield from _norm_cfgs(value, f'{option}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _norm_cfgs(value, f'{option}.{index}')


def check_norm(option: str, norm_cfg: dict) -> None:
    """Raises ConfigError where a norm's type or an argument does not exist or is out of range."""
    arguments = dict(norm_cfg)
    name = arguments.pop('type', None)
    if name is None:
        raise ConfigError(f"{option}: expected a type, as in dict(type='DNB'), got "
                          f'{dict(norm_cfg)}')
    cls = name
    if not inspect.isclass(cls):
        if not isinstance(name, str):
            raise ConfigError(f"{option}.type: expected a name, as 'DNB', got {name!r}")
        with MODELS.switch_scope_and_registry(None) as registry:
            cls = registry.get(name)
            if cls is None:
                raise ConfigError(f'{option}.type: there is no norm layer {name!r}'
                                  f'{_did_you_mean(name, _norm_names(registry))}')
    arguments.pop('requires_grad', None)  # mmcv's own
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for argument in arguments.keys() - parameters.keys():
            raise ConfigError(f'{option}.{argument}: {name} has no such argument'
                              f'{_did_you_mean(argument, list(parameters)[1:])}')
    if issubclass(cls, _DynamicNorm):
        try:
            cls(8, **arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f'{option}: {error}') from error


def _norm_names(registry):
    names = set()
    while registry is not None:
        names |= {name for name, cls in registry.module_dict.items()
                  if inspect.isclass(cls) and issubclass(cls, NORMS) and not name[0] == '_'}
        registry = registry.parent
    return sorted(names)


def _did_you_mean(wrong, names):
    lower = {name.lower(): name for name in names}
    plain = re.sub(r'[^a-z0-9]|2d$', '', str(wrong).lower())
    swapped = [name for name in lower if sorted(name) == sorted(plain)]  # DBN
    close = swapped or difflib.get_close_matches(plain, lower, n=2, cutoff=0.5)
    meant = ' or '.join(repr(lower[name]) for name in close)
    hint = f'; did you mean {meant}?' if meant else '.'
    return f'{hint} There are: {", ".join(names)}'


def check_evaluation(model: nn.Module) -> None:
    """Raises ConfigError for a head that trains but cannot be evaluated."""
    for name, module in model.named_modules():
        if isinstance(module, SSDHead) and not hasattr(module, 'loss_cls'):
            raise ConfigError(
                f"model.{name}: mmdet's SSDHead cannot be evaluated in this version (it lacks "
                f"loss_cls). Set model.{name}.type='SSDLiteHead' and add "
                f"'dn_mmdet.ssdlite_head' to custom_imports.imports")


def check_data(cfg: Config, split: str, model: nn.Module) -> None:
    """Checks the files of a data set against its config, and its classes against the model.

    Args:
        split: 'train', 'val' or 'test'; a split that the config has not is no error.

    Raises:
        ConfigError: a folder or file is missing, an annotation json is damaged, or
            the classes do not match.
    """
    loader = cfg.get(f'{split}_dataloader')
    if loader is None:
        return
    for option, dataset_cfg in _dataset_cfgs(loader.dataset, f'{split}_dataloader.dataset'):
        cls = _dataset_class(dataset_cfg['type'])
        if cls is None or not issubclass(cls, BaseDataset):
            continue  # its own code has to say what is wrong
        try:
            dataset = DATASETS.build({**copy.deepcopy(dataset_cfg), 'lazy_init': True})
        except (KeyError, TypeError, ValueError, AssertionError, OSError) as error:
            raise ConfigError(f'{option}: {_message(error)}') from error
        _check_num_classes(option, dataset, model)
        if getattr(cls, 'MAKES_ITS_DATA', False) or dataset_cfg.get('backend_args'):
            continue
        _check_paths(option, dataset)
        if not dataset.ann_file and hasattr(dataset, 'img_prefix'):
            _check_class_folders(option, dataset, model)
        if dataset.ann_file.endswith('.json'):
            _check_annotations(option, dataset, split)
    evaluators = cfg.get(f'{split}_evaluator') or []
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        path = evaluator.get('ann_file')
        if path and not is_remote(path) and not evaluator.get('backend_args') \
                and not _is_made(loader.dataset):
            option = f'{split}_evaluator.ann_file'
            _check_exists(option, path, Path.is_file, 'annotation file')
            if path.endswith('.json'):
                _read_json(option, path)


def _dataset_cfgs(node, option):
    """The data sets inside wrappers (RepeatDataset, ConcatDataset, ...)."""
    if 'dataset' in node:
        yield from _dataset_cfgs(node['dataset'], f'{option}.dataset')
    elif 'datasets' in node:
        for index, inner in enumerate(node['datasets']):
            yield from _dataset_cfgs(inner, f'{option}.datasets.{index}')
    else:
        yield option, node


def _dataset_class(kind):
    """By the config's own scope: classification's is mmpretrain."""
    if inspect.isclass(kind):
        return kind
    with DATASETS.switch_scope_and_registry(None) as registry:
        return registry.get(kind)


def _is_made(dataset_cfg):
    classes = (_dataset_class(inner['type']) for _, inner in _dataset_cfgs(dataset_cfg, ''))
    return any(getattr(cls, 'MAKES_ITS_DATA', False) for cls in classes)


def _check_num_classes(option, dataset, model):
    classes = dataset.metainfo.get('classes')
    if classes is None or getattr(dataset, 'return_classes', False):
        return  # detectors by text have as many classes as the text names
    if isinstance(classes, str):
        raise ConfigError(f'{option}.metainfo.classes: expected a tuple of names, got the text '
                          f'{classes!r}; a single class needs a comma: ({classes!r},)')
    for name, module in model.named_modules():
        num_classes = getattr(module, 'num_classes', None)
        if re.search(r'(^|\.)((bbox|mask)_)?head(\.\d+)?$', name) and num_classes is not None \
                and num_classes != len(classes):
            raise ConfigError(
                f'model.{name}.num_classes is {num_classes}, but the data set has '
                f'{len(classes)} classes ({option}.metainfo.classes, by default those of '
                f'{type(dataset).__name__}: {_some(classes)}). Set both to the same')


def _check_paths(option, dataset):
    if dataset.data_root:
        _check_exists(f'{option}.data_root', dataset.data_root, Path.is_dir, 'data folder')
    if dataset.ann_file:
        _check_exists(f'{option}.ann_file', dataset.ann_file, Path.is_file, 'annotation file')
    for key, prefix in dataset.data_prefix.items():
        if prefix:
            _check_exists(f'{option}.data_prefix.{key}', prefix, Path.is_dir, 'data folder')


def _check_class_folders(option, dataset, model):
    """mmpretrain's data sets with a sub-folder per class, which name the classes."""
    try:
        dataset.full_init()
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise ConfigError(f'{option}: {_message(error)}') from error
    _check_num_classes(option, dataset, model)


def _check_exists(option, path, exists, what):
    if not is_remote(path) and not exists(Path(path)):
        raise ConfigError(f'{path}: no such {what} (set by {option}; current folder: '
                          f'{Path.cwd()}). Put the data there, or set for instance '
                          f'--cfg-options {option}=PATH')


def _check_annotations(option, dataset, split):
    path = dataset.ann_file
    content = _read_json(f'{option}.ann_file', path)
    if type(dataset).load_data_list is not CocoDataset.load_data_list:
        return
    for part, keys in COCO_KEYS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if entries is None and part == 'annotations' and split != 'train':
            continue
        if not isinstance(entries, list):
            raise ConfigError(f'{path}: expected COCO annotations, with a list of {part}; set '
                              f'by {option}.ann_file')
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict) or not keys <= entry.keys():
                raise ConfigError(f'{path}: expected COCO annotations, with '
                                  f'{", ".join(sorted(keys))} in each of {part}; number {index} '
                                  f'is {str(entry)[:200]}. It is set by {option}.ann_file')
    if not content['images']:
        raise ConfigError(f'{path}: lists no images; set by {option}.ann_file')
    names = [category['name'] for category in content['categories']]
    absent = [name for name in dataset.metainfo['classes'] if name not in names]
    if absent:
        raise ConfigError(
            f'{path}: has {len(names)} classes ({_some(names)}), and not {_some(absent)} of the '
            f"{len(dataset.metainfo['classes'])} that are expected. Set "
            f'{option}.metainfo.classes (also of the other data sets) to the names in the file '
            f'and num_classes of the heads to their number')
    first = Path(dataset.data_prefix.get('img', ''), content['images'][0]['file_name'])
    _check_exists(f'{option}.data_prefix.img', str(first), Path.is_file,
                  f'image, which {path} names')


def _read_json(option, path):
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except (ValueError, OSError) as error:  # ValueError: no json, or no text
        raise ConfigError(f'{path}: cannot be read as json ({error}); set by {option}. Copy or '
                          f'make it anew') from error


def _some(names):
    names = list(names)
    return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')


def check_amp(cfg: Config) -> None:
    """Raises ConfigError where automatic mixed precision has no GPU to run on."""
    if cfg.get('optim_wrapper', {}).get('type') == 'AmpOptimWrapper' and get_device() == 'cpu':
        raise ConfigError("--amp (optim_wrapper.type='AmpOptimWrapper') needs a GPU, and torch "
                          "sees none here: leave it out (optim_wrapper.type='OptimWrapper')")


def make_folder(path, option: str) -> None:
    """Makes a folder to write to, or raises ConfigError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b'x')
            file.flush()
    except OSError as error:
        raise ConfigError(f'{path}: cannot be written to ({error.strerror}). Choose another '
                          f'folder: {option}') from error


def resumes(cfg: Config) -> str | None:
    """What a config continues, as in ``--resume``: None, 'auto' or a path."""
    return (cfg.get('load_from') or 'auto') if cfg.get('resume') else None


@contextlib.contextmanager
def reserved(work_dir, resume=None, overwrite=False):
    """Holds ``work_dir`` for one training; makes it if need be.

    The lock is the kernel's and ends with the process however that ends, so that a
    killed run leaves nothing to be cleaned up. Nothing that exists is changed.

    Args:
        resume: as in ``--resume``: None, 'auto' or a path.
        overwrite (bool): allow checkpoints in the folder.

    Raises:
        ConfigError: the folder holds checkpoints and neither argument allows it,
            cannot be written to, or another training runs in it.
    """
    work_dir = Path(work_dir)
    found = sorted(path.name for path in work_dir.glob('*.pth')) if work_dir.is_dir() else []
    if found and resume is None and not overwrite:
        raise ConfigError(f'{work_dir}: holds checkpoints of an earlier training '
                          f'({_some(found)}). Continue it with --resume, replace it with '
                          f'--overwrite, or choose another --work-dir')
    make_folder(work_dir, '--work-dir')
    with open(work_dir / LOCK, 'a+') as lock:
        _acquire(lock, work_dir)
        try:
            yield
        finally:
            lock.truncate(0)


def _acquire(lock, work_dir):
    # A POSIX record lock, not flock: data-loading processes, which can outlive a
    # killed run for some seconds, must not inherit it.
    try:
        if fcntl is not None:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        lock.seek(0)
        raise ConfigError(f'{work_dir}: a training is running in it ({lock.read().strip()}). '
                          f'Wait for it, end it, or choose another --work-dir') from error
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    lock.flush()


def is_fresh(work_dir) -> bool:
    """Whether no training has left anything in a folder that could be continued."""
    work_dir = Path(work_dir)
    return not (work_dir / 'last_checkpoint').exists() and not any(work_dir.glob('*.pth'))


def checkpoint_to_resume(work_dir, resume):
    """The path that ``--resume`` means, or None where 'auto' finds a fresh folder.

    Raises:
        ConfigError: 'auto' finds checkpoints but not which is the last.
    """
    if resume != 'auto':
        return resume
    if is_fresh(work_dir):
        return None
    work_dir = Path(work_dir)
    others = sorted(work_dir.glob('*.pth'), key=lambda path: path.stat().st_mtime)
    if not (work_dir / 'last_checkpoint').is_file():
        raise ConfigError(f'{work_dir}: holds checkpoints, but no file last_checkpoint that '
                          f'names the last. Name it: --resume {others[-1]}')
    last = Path(find_latest_checkpoint(str(work_dir)))
    if not last.is_file():
        hint = f' Name it: --resume {others[-1]}' if others else ''
        raise ConfigError(f'{work_dir / "last_checkpoint"}: names {last}, which does not '
                          f'exist.{hint}')
    return str(last)


def remove_checkpoints(work_dir) -> None:
    """Removes the checkpoints that mmengine wrote into a folder, and nothing else."""
    for path in Path(work_dir).iterdir():
        if CHECKPOINTS.fullmatch(path.name) and not path.is_dir():
            path.unlink()


def _message(error):
    return str(error.args[0] if len(error.args) == 1 else error)
