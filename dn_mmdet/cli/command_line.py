"""What the command-line tools share: options, reading the config, one message per error."""

import argparse
import contextlib
import errno
import gc
import importlib.util
import os
import sys
from pathlib import Path

import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from ..config_tree import add_imports, dicts, imports_of
from ..environment import check_mmdet
from ..messages import ConfigError, UserError, wants_larger_batch

check_mmdet()  # every tool imports this file before mmdet

from mmdet.utils import setup_cache_size_limit_of_dynamo  # noqa: E402

from ..checks.preflight import remove_checkpoints  # noqa: E402

# Set by torchrun, srun and mpirun.
RANK_VARIABLES = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')

FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override options of the config, for example optim_wrapper.optimizer.lr=0.01. '
        'Write lists as key="[a,b]" or key=a,b, and tuples as key="[(a,b),(c,d)]", with quotes '
        'and without spaces',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='open checkpoints that hold more than weights and logs. Such a file can run any '
        'program with your rights',
    )


def add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='program that started the processes of this run (default: %(default)s)',
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS
    )


def load_config(path, options=None) -> Config:
    """A config file with ``--cfg-options`` merged into it.

    ``mmdet::yolox/yolox_tiny_8xb8-300e_coco.py`` names one that mmdet ships.
    A config that names something of dn_mmdet gets the ``custom_imports`` that it
    needs, so that what is written into the work folder works with every tool.

    Raises:
        ConfigError: it cannot be read or lacks a model.
    """
    package, shipped, _ = str(path).partition('::')
    found = (
        package.isidentifier() and importlib.util.find_spec(package)
        if shipped
        else Path(path).is_file()
    )
    if not found:
        raise ConfigError(f'{path}: no such config file (current folder: {Path.cwd()})')
    try:
        cfg = get_config(path) if shipped else Config.fromfile(path)
    except Exception as error:  # a config is a program and can raise anything
        raise ConfigError(
            f'{path}: cannot be read as a config: {type(error).__name__}: {error}'
        ) from error
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError, AttributeError, AssertionError, ValueError) as error:
        raise ConfigError(f'--cfg-options: cannot be merged into {path}: {error}') from error
    if not isinstance(cfg.get('model'), dict):
        raise ConfigError(f'{path}: expected the config of a model, but it has no model')
    if cfg.get('default_scope') is None:
        cfg.default_scope = 'mmdet'
    _import_what_it_names(cfg)
    return cfg


def _import_what_it_names(cfg):
    kinds = [node.get('type') for _, node in dicts(cfg.model, 'model')]
    names = {MODELS.split_scope_key(kind)[1] for kind in kinds if isinstance(kind, str)}
    needed = {module for name, module in _plugin_names().items() if name in names}
    if needed - set(imports_of(cfg)):
        add_imports(cfg, *sorted(needed))
        import_modules_from_strings(**cfg.custom_imports)


def _plugin_names():
    """The module to import for each name that this package registers for models."""
    layers = {
        name: 'dn_mmdet'
        for name, cls in MODELS.module_dict.items()
        if cls.__module__ == 'dn_mmdet.layers'
    }
    return dict(layers, SSDLiteHead='dn_mmdet.models.ssdlite_head')


def positive(text: str) -> int:
    """The type of an option that takes an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected an integer of at least 1, got {text}')
    return int(text)


def check_launcher(launcher: str) -> None:
    """Raises ConfigError where a launcher's processes cannot be joined."""
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise ConfigError(
            '--launcher pytorch: expected to be started by torchrun; use '
            'tools/dist_train.sh or tools/dist_test.sh'
        )
    if launcher in ('slurm', 'mpi') and get_device() == 'cpu':
        raise ConfigError(f'--launcher {launcher}: needs a GPU, and torch sees none here')


def join_without_gpu(cfg: Config) -> None:
    """Joins the processes of torchrun over gloo where there is no GPU.

    mmengine asks for a GPU when it joins them and when it wraps the model.
    """
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        dist.init_process_group('gloo')
        cfg.setdefault(
            'model_wrapper_cfg',
            dict(
                type='MMDistributedDataParallel',
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=cfg.get('find_unused_parameters', False),
            ),
        )


def leave_processes(cfg: Config) -> None:
    """Waits for the other processes of a training or test that went well, and ends their group.

    Threads of a group that outlives Python may abort the process. The group lives as long as
    something uses it, so the runner has to be out of scope.
    """
    if cfg.launcher != 'none' and dist.is_initialized():
        gc.collect()  # the runner, which refers to itself
        dist.barrier()
        dist.destroy_process_group()


def set_local_rank(local_rank: int) -> None:
    os.environ.setdefault('LOCAL_RANK', str(local_rank))


def is_first_process(launcher: str) -> bool:
    """Whether this process checks and reserves; the others wait for it in mmengine."""
    if launcher == 'none':
        return True
    ranks = [os.environ[name] for name in RANK_VARIABLES if name in os.environ]
    return not ranks or ranks[0] == '0'


def build_runner(cfg: Config):
    join_without_gpu(cfg)
    setup_cache_size_limit_of_dynamo()
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


class RemoveOldCheckpoints(Hook):
    """Empties the work folder of checkpoints after the first step of training.

    Not earlier: most of what can be wrong with the model or the data shows before.
    """

    priority = 'VERY_HIGH'  # before a checkpoint of that step is written

    def __init__(self):
        self.done = False

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.done and runner.rank == 0:
            remove_checkpoints(runner.work_dir)
        self.done = True


@contextlib.contextmanager
def one_message(parser: argparse.ArgumentParser):
    """Turns errors that the user can put right into one message and an exit code, mostly 2."""
    try:
        yield
    except UserError as error:
        _exit(parser, error.exit_code, error)
    except KeyboardInterrupt:
        _exit(parser, 130, 'interrupted')
    except OSError as error:
        if error.errno not in FULL_OR_FORBIDDEN:
            raise
        _exit(
            parser,
            2,
            f'{error.filename or "writing failed"}: {error.strerror}. Free '
            f'some space, or choose a folder that you can write to; a training continues '
            f'from its last whole checkpoint with --resume',
        )
    except ValueError as error:
        if wants_larger_batch(error):
            _exit(
                parser,
                2,
                f'{error}. The last batch of an epoch can be smaller than '
                f'train_dataloader.batch_size: raise that, or set '
                f'train_dataloader.drop_last=True',
            )
        if not _raised_in(error).startswith('dn_mmdet.'):
            raise
        _exit(parser, 2, error)


def _raised_in(error):
    """The name of the module whose code raised."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals.get('__name__', '')


def _exit(parser, code, message):
    sys.stdout.flush()
    parser.exit(code, f'{parser.prog}: error: {message}\n')
