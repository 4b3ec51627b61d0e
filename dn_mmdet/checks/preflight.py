"""Checks of a config and of a work folder, before a tool writes anything."""

import ast
import contextlib
import copy
import errno
import inspect
import io
import os
import re
import socket
import tempfile
import tokenize
from pathlib import Path

from mmdet.models.dense_heads import SSDHead
from mmdet.registry import MODELS, OPTIM_WRAPPERS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.fileio import load
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import find_latest_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..checkpoint import CheckpointError
from ..config_tree import dicts, strings
from ..convert import dn_layers
from ..layers import DynamicNorm
from ..messages import ConfigError, did_you_mean, reason, some, tell
from ..registered import is_of, name_of, resolve
from .data_checks import check_data as check_data
from .data_checks import check_same_classes as check_same_classes
from .data_checks import check_trained_classes as check_trained_classes

try:
    import fcntl
except ImportError:  # Windows has no such locks: two runs in a folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

LOCK = '.train.lock'
NORMS = (DynamicNorm, _BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
# The names that mmengine's CheckpointHook gives.
CHECKPOINTS = re.compile(r'((best_.+_)?(epoch|iter)_\d+\.pth|last_checkpoint)')

RUN_OPTIONS = {'work_dir', 'launcher'}  # what every training and test sets in its config
# What mmengine writes a config with.
LITERALS = (
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Set,
    ast.Dict,
    ast.Call,
    ast.keyword,
    ast.UnaryOp,
    ast.unaryop,
    ast.expr_context,
)


class FolderInUse(ConfigError):
    """Another training runs in the work folder. It may have ended by the next try."""

    exit_code = 75  # what sendmail calls EX_TEMPFAIL


def check_parts(cfg: Config, *names: str) -> None:
    """Raises ConfigError where a config lacks a part that a tool needs."""
    missing = [name for name in names if cfg.get(name) is None]
    if missing:
        raise ConfigError(
            f'{cfg.filename}: expected {", ".join(names)}; it lacks {", ".join(missing)}'
        )


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
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        RuntimeError,
    ) as error:
        raise ConfigError(f'model: cannot be built from the config: {reason(error)}') from error


def _norm_cfgs(model, option):
    """What is under each key that ends in ``norm_cfg``, with the option that sets it."""
    for outer, node in dicts(model, option):
        for key, value in node.items():
            if str(key).endswith('norm_cfg') and isinstance(value, (dict, str)):
                yield f'{outer}.{key}', value


def check_norm(option: str, norm_cfg: dict) -> None:
    """Raises ConfigError where a norm's type or an argument does not exist or is out of range."""
    if isinstance(norm_cfg, str):
        raise ConfigError(f'{option}: expected a dict, as in dict(type={norm_cfg!r}), got a text')
    arguments = dict(norm_cfg)
    name = arguments.pop('type', None)
    if name is None:
        raise ConfigError(
            f"{option}: expected a type, as in dict(type='DNB'), got {dict(norm_cfg)}"
        )
    cls = resolve(MODELS, name)
    if cls is None:
        if not isinstance(name, str):
            raise ConfigError(f"{option}.type: expected a name, such as 'DNB', got {name!r}")
        with MODELS.switch_scope_and_registry(None) as registry:
            names = _norm_names(registry)
        raise ConfigError(
            f'{option}.type: there is no norm layer {name!r}{did_you_mean(name, names)}'
        )
    arguments.pop('requires_grad', None)  # mmcv's own
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for argument in arguments.keys() - parameters.keys():
            raise ConfigError(
                f'{option}.{argument}: {name_of(name)} has no such argument'
                f'{did_you_mean(argument, list(parameters)[1:])}'
            )
    if issubclass(cls, DynamicNorm):
        try:
            cls(8, **arguments)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f'{option}: {reason(error)}') from error


def _norm_names(registry):
    names = set()
    while registry is not None:
        names |= {
            name
            for name, cls in registry.module_dict.items()
            if inspect.isclass(cls) and issubclass(cls, NORMS) and not name[0] == '_'
        }
        registry = registry.parent
    return sorted(names)


def tell_frozen(model: nn.Module) -> None:
    """Tells how many DN layers stay what they are, a BatchNorm at first, because SC is frozen."""
    layers = dn_layers(model)
    frozen = [
        name
        for name, layer in layers.items()
        if {parameter.requires_grad for parameter in layer.sc.parameters()} == {False}
    ]
    if frozen:
        tell(
            f'{len(frozen)} of {len(layers)} DN layers cannot learn, because their SC is frozen '
            f'({some(frozen)}): by requires_grad=False in a norm_cfg, for which '
            f'bn_requires_grad=False freezes only the inner BatchNorm, or by frozen_stages'
        )


def check_evaluation(model: nn.Module) -> None:
    """Raises ConfigError for a head that trains but cannot be evaluated."""
    for name, module in model.named_modules():
        if isinstance(module, SSDHead) and not hasattr(module, 'loss_cls'):
            raise ConfigError(
                f"model.{name}: mmdet's SSDHead cannot be evaluated in this version (it lacks "
                f"loss_cls). Set model.{name}.type='SSDLiteHead' and add "
                f"'dn_mmdet.models.ssdlite_head' to custom_imports.imports"
            )


def check_amp(cfg: Config) -> None:
    """Raises ConfigError where automatic mixed precision has no GPU to run on."""
    if is_of(OPTIM_WRAPPERS, cfg.get('optim_wrapper'), AmpOptimWrapper) and get_device() == 'cpu':
        raise ConfigError(
            "--amp (optim_wrapper.type='AmpOptimWrapper') needs a GPU, and torch "
            "sees none here: leave it out (optim_wrapper.type='OptimWrapper')"
        )


def make_folder(path, option: str) -> None:
    """Makes a folder to write to, or raises ConfigError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b'x')
            file.flush()
    except OSError as error:
        raise ConfigError(
            f'{path}: cannot be written to ({error.strerror}). Choose another folder: {option}'
        ) from error


def check_new(paths, option: str, kind='file') -> None:
    """Raises ConfigError where one of the files that a tool is to write exists."""
    there = [path for path in paths if os.path.lexists(path)]
    if there:
        raise ConfigError(f'{some(there)}: exists already; name another {kind} with {option}')


def check_config_copy(cfg: Config, test=False) -> None:
    """Raises ConfigError where the copy of the config would replace somebody's own file.

    mmengine writes the whole config into the work folder, under the name of its file. A
    training may replace the copy that an earlier training or test left, also if it is the
    config itself: that is how trainings continue. A test may replace only that of a test.
    """
    copied = Path(cfg.work_dir, Path(cfg.filename).name) if cfg.filename else None
    if copied is None or not copied.exists():
        return
    of_training = (copied.parent / LOCK).exists() or not is_fresh(copied.parent)
    if not _is_copy(copied) or test and (of_training or copied.samefile(cfg.filename)):
        raise ConfigError(
            f'--work-dir {cfg.work_dir}: expected another folder, because a copy of the config '
            f'with all its options is written into it and would replace {copied}'
        )


def _is_copy(path):
    """Whether a file is the config of a training or test, as mmengine writes it.

    It is whole and has neither comments nor expressions: nothing by hand would be lost.
    """
    try:
        if path.suffix == '.py':
            content = _literals(path.read_text(encoding='utf-8'))
        else:
            commented = path.suffix != '.json' and re.search(r'(^|\s)#', path.read_text(), re.M)
            content = {} if commented else load(path)
    except Exception:  # no config: a reader can raise anything
        return False
    return RUN_OPTIONS <= set(content) and '_base_' not in content


def _literals(text):
    """Names of the options in a Python file; none if it has more than literals in it."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    if any(token.type == tokenize.COMMENT for token in tokens):
        return set()
    names = set()
    for statement in ast.parse(text).body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if not isinstance(target, ast.Name):
            return set()
        names.add(target.id)
        for node in ast.walk(statement.value):
            is_name = isinstance(node, ast.Name) and node.id in ('dict', 'inf', 'nan')
            if not is_name and not isinstance(node, LITERALS):
                return set()
    return names


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
        ConfigError: the folder holds checkpoints and neither argument allows it, or
            cannot be written to.
        FolderInUse: another training runs in it.
    """
    work_dir = Path(work_dir)
    found = sorted(path.name for path in work_dir.glob('*.pth')) if work_dir.is_dir() else []
    if found and resume is None and not overwrite:
        raise ConfigError(
            f'{work_dir}: holds checkpoints of an earlier training '
            f'({some(found)}). Continue it with --resume, replace it with '
            f'--overwrite, or choose another --work-dir'
        )
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
        raise FolderInUse(
            f'{work_dir}: a training is running in it ({lock.read().strip()}). '
            f'Wait for it, end it, or choose another --work-dir'
        ) from error
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    lock.flush()


def is_reserved(folder) -> bool:
    """Whether a training runs in a folder, as `reserved` marks it."""
    path = Path(folder, LOCK)
    if fcntl is None or not path.is_file():
        return False
    with open(path, 'r+') as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


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
        raise ConfigError(
            f'{work_dir}: holds checkpoints, but no file last_checkpoint that '
            f'names the last. Name it: --resume {others[-1]}'
        )
    last = Path(find_latest_checkpoint(str(work_dir)))
    if not last.is_file():
        hint = f' Name it: --resume {others[-1]}' if others else ''
        raise ConfigError(
            f'{work_dir / "last_checkpoint"}: names {last}, which does not exist.{hint}'
        )
    return str(last)


def moved_checkpoint(work_dir) -> str | None:
    """The last checkpoint of a folder that was moved or copied, or None.

    mmengine would go on from the path in its file last_checkpoint, which is in the old folder.
    """
    if not Path(work_dir, 'last_checkpoint').is_file():
        return None
    named = Path(find_latest_checkpoint(str(work_dir)))
    here = Path(work_dir, named.name)
    return str(here) if here.is_file() and here.resolve() != named.resolve() else None


def check_same_optimizer(cfg: Config, model: nn.Module, checkpoint: dict, path) -> None:
    """Raises CheckpointError where the optimizer's state to resume is of other parameters."""
    then = checkpoint['optimizer'].get('param_groups')
    if then is None or 'optimizer' not in cfg.optim_wrapper:
        return  # several optimizers
    now = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper)).optimizer.param_groups
    sizes = [[len(group['params']) for group in groups] for groups in (then, now)]
    if sizes[0] != sizes[1]:
        (groups, of_it), (wanted, of_ours) = ((len(each), sum(each)) for each in sizes)
        raise CheckpointError(
            f'{path}: cannot be resumed: its optimizer has {of_it} parameters in {groups} groups, '
            f'that of this config {of_ours} in {wanted}. The model, paramwise_cfg or what is '
            f'frozen was another. Resume with the config of that training, or start a new one '
            f'from its weights: --cfg-options load_from={path}'
        )


def old_checkpoints(work_dir) -> list[Path]:
    """The checkpoints that mmengine wrote into a folder."""
    work_dir = Path(work_dir)
    return [
        path
        for path in (work_dir.iterdir() if work_dir.is_dir() else ())
        if CHECKPOINTS.fullmatch(path.name) and not path.is_dir()
    ]


def remove_checkpoints(work_dir) -> None:
    """Removes the checkpoints that mmengine wrote into a folder, and nothing else."""
    for path in old_checkpoints(work_dir):
        path.unlink()


def check_overwrite(cfg: Config) -> None:
    """Raises ConfigError where `remove_checkpoints` would remove what the config names."""
    removed = {path.parent.resolve() / path.name for path in old_checkpoints(cfg.work_dir)}
    for option, text in strings(cfg.to_dict()):
        if not text.endswith(('.pth', 'last_checkpoint')):
            continue
        path = Path(os.path.expanduser(text))
        if removed & {path.parent.resolve() / path.name, path.resolve()}:
            raise ConfigError(
                f'--overwrite would remove {text}, but the training needs it ({option}): '
                f'move it, or choose another --work-dir'
            )
