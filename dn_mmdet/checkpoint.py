"""Opening checkpoints without executing them, and whether one fits a model.

A checkpoint is a pickle, and a pickle can call any function. torch refuses those
with ``weights_only=True``, but upstream mmengine cannot open its own checkpoints
that way (torch >= 2.6), and onedl-mmengine falls back to executing what was
refused. Here what mmengine writes is on an allow-list, and the rest is refused.
"""

import ast
import contextlib
import inspect
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mmengine.runner.checkpoint as mmengine_loaders
import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import nn

from .layers import DynamicNorm, dn_layers_in
from .messages import UserError, some, tell
from .registered import loaded

REMEDY = 'If you trust its author as you trust a program that you run, pass --trust-checkpoint.'


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or refused, or that belongs to another model."""


# The functions that mmengine's logs and its one-cycle schedule store with their state.
METHODS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}


def _method(owner, name):
    """Stands for `getattr` in a checkpoint, by which a pickle names a method.

    The real one reaches anything from anything.
    """
    if inspect.isclass(owner) and name in METHODS.get(owner, ()):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r})')


def _allowed():
    """What an mmengine checkpoint holds beyond tensors and plain containers.

    Numbers and arrays of numbers and strings; numpy 1 and 2 name two functions
    differently. Arrays of objects are not among them.
    """
    array = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    codes = np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?SU'
    return [
        *METHODS,
        (_method, 'builtins.getattr'),
        slice,
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in codes},
        *(
            (function, f'numpy.{core}.multiarray.{name}')
            for core in ('core', '_core')
            for function, name in ((array, '_reconstruct'), (scalar, 'scalar'))
        ),
    ]


def open_checkpoint(path: str | Path, map_location: Any = 'cpu', trust: bool = False) -> dict:
    """The content of a checkpoint file. Nothing in it is executed unless ``trust``.

    ``meta.config``, a text which mmengine would run as Python code on resume, is
    left out. (mmengine 0.10 writes ``meta.cfg``, which nothing runs.)

    Args:
        path (str | Path): a local file.
        map_location: as in `torch.load`.
        trust (bool): execute whatever the file asks for.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, or refused.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f'{path}: no such checkpoint file (current folder: {Path.cwd()})')
    try:
        with torch.serialization.safe_globals(_allowed()):
            checkpoint = torch.load(path, map_location=map_location, weights_only=not trust)
    except OSError as error:
        if error.errno is not None:  # torch's zip reader raises some without
            raise CheckpointError(f'{path}: cannot be read: {error.strerror}') from error
        raise CheckpointError(_damaged(path, error)) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused(path, error)) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise CheckpointError(_damaged(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'{path}: expected a checkpoint (a dict), but it holds a {type(checkpoint).__name__}'
        )
    if not trust and isinstance(checkpoint.get('meta'), dict):
        checkpoint['meta'].pop('config', None)
    return checkpoint


def _damaged(path, error):
    size = path.stat().st_size
    return (
        f'{path}: cannot be read as a checkpoint ({size:,} bytes; '
        f'{_first_sentence(error)}): it is truncated, damaged or no checkpoint. Copy it again '
        f'or use an earlier one'
    )


def _refused(path, error):
    match = re.search(r'GLOBAL (\S+)|function (.+)|(getattr\(.+\))', str(error))
    if match is None:
        return _damaged(path, error)
    named = next(group for group in match.groups() if group)
    return (
        f'{path}: refused and not executed, because it holds more than weights and logs, '
        f'namely {named}. {REMEDY}'
    )


def _first_sentence(error):
    return re.split(r'\. |\n', str(error) or type(error).__name__)[0]


@contextlib.contextmanager
def safe_loading(trust=False):
    """While this context lasts, all that mmengine loads goes through `open_checkpoint`.

    That is ``load_from``, resuming, ``init_cfg=dict(type='Pretrained')`` and
    `DetInferencer`, each from local files, http(s), ``torchvision://`` and
    ``open-mmlab://``. The other schemes are refused. It uses mmengine's own
    registry of loaders, whose entries it restores.
    """
    loaders = _loaders(trust)
    for prefixes, ours, _ in loaders:
        CheckpointLoader.register_scheme(prefixes, ours, force=True)
    try:
        yield
    finally:
        for prefixes, _, theirs in loaders:
            CheckpointLoader.register_scheme(prefixes, theirs, force=True)


def _loaders(trust):
    """Prefixes, the loader of here and mmengine's own, for each scheme that mmengine has."""

    def load_from_local(filename, map_location=None):
        return open_checkpoint(filename, map_location, trust)

    def load_from_http(filename, map_location=None):
        return open_checkpoint(_download(filename), map_location, trust)

    def load_from_torchvision(filename, map_location=None):
        url = _look_up(filename, mmengine_loaders.get_torchvision_models())
        return open_checkpoint(_download(url), map_location, trust)

    def load_from_openmmlab(filename, map_location=None):
        url = _look_up(filename, mmengine_loaders.get_external_models())
        return open_checkpoint(_download(url), map_location, trust)

    def load_from_elsewhere(filename, map_location=None):
        raise CheckpointError(
            f'{filename}: there is no safe loader for this kind of address: download the '
            f'file and give its path'
        )

    return (
        ('', load_from_local, mmengine_loaders.load_from_local),
        (('http://', 'https://'), load_from_http, mmengine_loaders.load_from_http),
        (
            ('modelzoo://', 'torchvision://'),
            load_from_torchvision,
            mmengine_loaders.load_from_torchvision,
        ),
        (
            ('open-mmlab://', 'openmmlab://'),
            load_from_openmmlab,
            mmengine_loaders.load_from_openmmlab,
        ),
        ('pavi://', load_from_elsewhere, mmengine_loaders.load_from_pavi),
        (
            [r'(\S+\:)?s3://', r'(\S+\:)?petrel://'],
            load_from_elsewhere,
            mmengine_loaders.load_from_ceph,
        ),
        ('mmcls://', load_from_elsewhere, mmengine_loaders.load_from_mmcls),
    )


def is_remote(filename: str | Path) -> bool:
    return '://' in str(filename)


def _look_up(filename, urls):
    name = filename.split('://', 1)[1]
    if not is_remote(urls.get(name, '')):
        raise CheckpointError(f'{filename}: mmengine knows no web address for this name')
    return urls[name]


def _download(url):
    """The path of a url's file in torch's cache; the main process fetches it first."""
    path = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(url).path).name)
    if is_main_process():
        _fetch(url, path)
    barrier()
    _fetch(url, path)  # on a machine that does not share the main process's cache
    return path


def _fetch(url, path):
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        raise CheckpointError(
            f'{url}: cannot be fetched: {error}. Download it on another machine and '
            f'give the path of the file, or leave the option out'
        ) from error


def weights(checkpoint: dict, path: str | Path) -> dict[str, Any]:
    """The state dict in a checkpoint, without the prefix ``module.``, as in mmengine.

    Raises:
        CheckpointError: the checkpoint holds no weights.
    """
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(
            f'{path}: expected weights under "state_dict", found '
            f'{", ".join(map(str, list(checkpoint)[:8])) or "nothing"}'
        )
    stripped: Any = OrderedDict((re.sub(r'^module\.', '', key), v) for key, v in state.items())
    if hasattr(state, '_metadata'):
        stripped._metadata = state._metadata
    return stripped


def meta_of(checkpoint: dict) -> dict:
    """What mmengine writes beside the weights (config, seed, classes); empty without any."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


def check_resumable(checkpoint: dict, path: str | Path) -> None:
    """Raises CheckpointError where the state of training is missing."""
    missing = [key for key in ('meta', 'message_hub', 'optimizer') if key not in checkpoint]
    missing += [f'meta.{key}' for key in ('epoch', 'iter') if key not in meta_of(checkpoint)]
    if missing:
        raise CheckpointError(
            f'{path}: cannot be resumed, because it lacks {", ".join(missing)}. To '
            f'start a new training from its weights, use --cfg-options '
            f'load_from={path}'
        )


def check_fits(model: nn.Module, checkpoint: dict, path: str | Path, whole: bool = True) -> None:
    """Loads the weights into ``model`` and raises CheckpointError where they do not fit.

    A BatchNorm checkpoint fits a DN model of the same shape, and the log says so.

    Args:
        whole (bool): True if every weight has to fit, as for testing, predicting
            and resuming. False if some are enough, as for a detector that starts
            from the weights of another.
    """
    state = weights(checkpoint, path)
    ours = {
        key: value for key, value in model.state_dict().items() if 'num_batches_tracked' not in key
    }
    sizes = [
        key
        for key in state.keys() & ours.keys()
        if getattr(state[key], 'shape', None) != ours[key].shape
    ]
    _check_norms(model, checkpoint, state, path, whole)
    for key in sizes:
        del state[key]
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f'{path}: the weights do not fit the model of the config: {error}'
        ) from error
    missing = sorted(
        key for key in missing if key not in sizes and 'num_batches_tracked' not in key
    )
    fitting = len(ours) - len(missing) - len(sizes)
    if not fitting or whole and (missing or unexpected or sizes):
        kinds = {'missing': missing, 'not in the model': unexpected, 'of another size': sizes}
        found = '; '.join(
            f'{len(keys)} {kind} (such as {min(keys)})' for kind, keys in kinds.items() if keys
        )
        raise CheckpointError(
            f'{path}: the weights are not of the model that the config builds, which has '
            f'{len(ours)} of them: {found}. Use the config that the checkpoint was '
            f'trained with{_experiment(checkpoint)}'
        )


def _check_norms(model, checkpoint, state, path, whole):
    """Dynamic against batch normalization, and DN-B against DN-C, which share their keys."""
    theirs = dn_layers_in(state)
    ours = {name for name, module in model.named_modules() if isinstance(module, DynamicNorm)}
    modules = dict(model.named_modules())
    plain = sorted(name for name in theirs - ours if name in modules)
    if plain:
        raise CheckpointError(
            f'{path}: trained with Dynamic Normalization in {len(theirs)} layers, but the config '
            f'builds {type(modules[plain[0]]).__name__} in {len(plain)} of them, such as '
            f"{plain[0]}. Set their norm_cfg to type='DNB' (or the norm that it was trained "
            f'with), or use the config of that training{_experiment(checkpoint)}'
        )
    folded = meta_of(checkpoint).get('folded')
    if ours - theirs and folded and whole:
        tell(
            f'{path} was written by tools/fold.py: {len(ours - theirs)} layers are BatchNorms '
            f'in the checkpoint and DN layers in this config. They compute the BatchNorm and '
            f'do not adapt to the input. The config beside the checkpoint builds them as '
            f'BatchNorms'
        )
    elif ours and not theirs and whole:
        tell(
            f'{path} holds no SC weights: the {len(ours)} Dynamic Normalization layers '
            f'compute the same as BatchNorm'
        )
    named = _named(meta_of(checkpoint).get('cfg'))
    trained = _kinds(cls for cls, _ in named)
    built = _kinds(type(module) for module in modules.values())
    if theirs and trained and built and trained != built:
        _other_meaning(
            f'{path}: trained with DN-{" and DN-".join(sorted(trained))}, the config builds DN-'
            f'{" and DN-".join(sorted(built))}. The weights have the same names in both, but '
            f'another meaning.',
            checkpoint,
            whole,
        )
    arguments = [given for cls, given in named if _kinds([cls])]
    for setting in ('inputs', 'bound'):
        # only what the config says: a default may have been another, or a subclass's own
        says = all(given.get(setting, UNKNOWN) is not UNKNOWN for given in arguments)
        then = {given[setting] for given in arguments} if says else set()
        now = {getattr(modules[name].sc, setting, None) for name in ours}
        if theirs and then and not then & now:
            _other_meaning(
                f'{path}: trained with {setting}={some(map(repr, then))} in its DN layers, the '
                f'config sets {some(map(repr, now))}. The weights would have another meaning.',
                checkpoint,
                whole,
            )


def _other_meaning(text, checkpoint, whole):
    """An error where the weights are to be used as they are, a warning where training goes on."""
    if whole:
        raise CheckpointError(
            f'{text} Use the config that the checkpoint was trained with{_experiment(checkpoint)}'
        )
    tell(f'{text} The training starts from them nevertheless{_experiment(checkpoint)}')


def _kinds(classes):
    """'B' where DN-B is among some classes, 'C' where DN-C is."""
    return {
        'C' if cls.batch_shared else 'B'
        for cls in classes
        if inspect.isclass(cls) and issubclass(cls, DynamicNorm)
    }


UNKNOWN = object()  # an argument that is no number and no text


def _named(text):
    """The classes that the model in a config's text names, and their arguments.

    The text is not executed, so only arguments that are numbers and texts are known; what
    makes an SC of its own (``sc=``) hides those that it sets.
    """
    try:
        statements = ast.parse(text or '').body
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return []  # not what mmengine writes
    model = [
        statement
        for statement in statements
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == 'model'
    ]
    return [
        (loaded(MODELS, name), arguments)
        for statement in model or statements
        for name, arguments in _type_names(statement)
    ]


def _type_names(node):
    """Every ``type`` in a statement: a text, or the dotted path of a class; what is beside it."""
    for child in ast.walk(node):
        if isinstance(child, ast.Call):
            pairs = [(keyword.arg, keyword.value) for keyword in child.keywords]
        elif isinstance(child, ast.Dict):
            pairs = [
                (getattr(key, 'value', None), value)
                for key, value in zip(child.keys, child.values, strict=True)
            ]
        else:
            continue
        arguments = {
            key: value.value if isinstance(value, ast.Constant) else UNKNOWN
            for key, value in pairs
        }
        if 'sc' in arguments:
            arguments = {}
        for key, value in pairs:
            if key == 'type':
                text = getattr(value, 'value', None)
                yield text if isinstance(text, str) else ast.unparse(value), arguments


def _experiment(checkpoint):
    name = meta_of(checkpoint).get('experiment_name')
    return f' (experiment {name})' if isinstance(name, str) else ''
