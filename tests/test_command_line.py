"""Configs are read with all that they need; what a user can mend ends in one message."""

import argparse
import errno
import gc
import os
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from tiny_detector import make_coco, write_config

from dn_mmdet import DNB
from dn_mmdet.checkpoint import CheckpointError
from dn_mmdet.checks.preflight import ConfigError
from dn_mmdet.cli import command_line

MODEL = "model = dict(type='Net', norm_cfg=dict(type='{}'))\n"


@pytest.fixture
def config(tmp_path):
    """Writes a config and returns its path."""

    def write(text):
        path = tmp_path / 'config.py'
        path.write_text(text)
        return path

    return write


@pytest.fixture
def message(capsys):
    """What `one_message` makes of an error: (exit code, message)."""

    def run(error):
        parser = argparse.ArgumentParser(prog='tool')
        with pytest.raises(SystemExit) as done, command_line.one_message(parser):
            raise error
        text = capsys.readouterr().err
        assert text.startswith('tool: error: ') and text.endswith('\n')
        return done.value.code, text[len('tool: error: ') : -1]

    return run


def test_a_config_of_somebody_else_gets_a_scope_and_the_import_that_it_needs(config):
    cfg = command_line.load_config(config(MODEL.format('DNB')))
    assert cfg.default_scope == 'mmdet'
    assert cfg.custom_imports.imports == ['dn_mmdet']


@pytest.mark.parametrize('imports', ["'os'", "['os']"])
def test_the_imports_that_it_has_stay(config, imports):
    text = f'custom_imports = dict(imports={imports}, allow_failed_imports=True)\n'
    cfg = command_line.load_config(config(MODEL.format('SyncDNC') + text))
    assert cfg.custom_imports == dict(imports=['os', 'dn_mmdet'], allow_failed_imports=True)


def test_a_norm_with_its_scope_needs_the_import_too(config):
    cfg = command_line.load_config(config(MODEL.format('mmengine.DNB')))
    assert cfg.custom_imports.imports == ['dn_mmdet']


def test_our_ssd_head_is_found_without_an_import(config):
    cfg = command_line.load_config(config(MODEL.format('BN').replace('Net', 'SSDLiteHead')))
    assert cfg.custom_imports.imports == ['dn_mmdet.models.ssdlite_head']


@pytest.mark.parametrize(
    'text',
    [MODEL.format('BN'), MODEL.format('DNB') + "custom_imports = dict(imports=['dn_mmdet'])\n"],
)
def test_a_config_that_needs_nothing_more_stays_as_it_is(config, text):
    path = config(text + "default_scope = 'mmengine'\n")
    assert command_line.load_config(path).to_dict() == Config.fromfile(path).to_dict()


def test_what_is_written_into_the_work_folder_can_be_read_again(config, tmp_path):
    cfg = command_line.load_config(config(MODEL.format('DNB')))
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


def test_options_are_merged(config):
    cfg = command_line.load_config(config(MODEL.format('BN')), {'model.norm_cfg.type': 'DNB'})
    assert cfg.model.norm_cfg.type == 'DNB'
    assert cfg.custom_imports.imports == ['dn_mmdet']


@pytest.mark.parametrize(
    'text, expected',
    [
        ('model = dict(', 'cannot be read as a config'),
        ('model = dict(a=1/0)', 'ZeroDivisionError'),
        ("_base_ = './absent.py'", 'cannot be read as a config'),
        ("_base_ = 'mmdet::ssd/absent.py'", 'cannot be read as a config'),
        ('lr = 1', 'it has no model'),
    ],
)
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')  # mmengine's, on errors
def test_a_config_that_cannot_be_used_is_named(config, text, expected):
    path = config(text)
    with pytest.raises(ConfigError, match=expected) as raised:
        command_line.load_config(path)
    assert str(path) in str(raised.value)
    del raised
    gc.collect()


def test_a_config_that_is_absent_is_named_with_the_current_folder():
    with pytest.raises(ConfigError, match=f'absent.py: no such config.*{os.getcwd()}'):
        command_line.load_config('absent.py')


@pytest.mark.parametrize('options', [{'model.type.a': 1}, {'names.5.a': 1}, {'lr.a': 1}])
def test_options_that_do_not_fit_are_refused(config, options):
    path = config(MODEL.format('BN') + 'lr = 1\nnames = [dict(a=1)]\n')
    with pytest.raises(ConfigError, match='--cfg-options'):
        command_line.load_config(path, options)


def test_a_launcher_that_cannot_work_is_refused(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(command_line, 'get_device', lambda: 'cpu')
    with pytest.raises(ConfigError, match='tools/dist_train.sh'):
        command_line.check_launcher('pytorch')
    for launcher in ('slurm', 'mpi'):
        with pytest.raises(ConfigError, match=f'{launcher}: needs a GPU'):
            command_line.check_launcher(launcher)
    command_line.check_launcher('none')


@pytest.mark.parametrize(
    'launcher, variables, first',
    [
        ('none', dict(RANK='1'), True),
        ('pytorch', dict(RANK='0'), True),
        ('pytorch', dict(RANK='1'), False),
        ('slurm', dict(SLURM_PROCID='0'), True),
        ('slurm', dict(SLURM_PROCID='3'), False),
        ('mpi', dict(OMPI_COMM_WORLD_RANK='1'), False),
    ],
)
def test_one_process_is_the_first(monkeypatch, launcher, variables, first):
    for name in command_line.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command_line.is_first_process(launcher) is first


@pytest.mark.parametrize('rank', [0, 1])
def test_old_checkpoints_go_once_the_first_step_is_done(tmp_path, rank):
    hook = command_line.RemoveOldCheckpoints()
    runner = SimpleNamespace(rank=rank, work_dir=tmp_path)
    old = tmp_path / 'epoch_1.pth'
    old.touch()
    for point in (hook.before_run, hook.before_train, hook.before_train_epoch):
        point(runner)
    hook.before_train_iter(runner, 0)
    assert old.exists()
    hook.after_train_iter(runner, 0)
    assert old.exists() == (rank == 1)
    old.touch()
    hook.after_train_iter(runner, 1)
    assert old.exists()  # by now it is this run's own


@pytest.mark.parametrize('error', [ConfigError('what'), CheckpointError('what')])
def test_our_errors_become_one_message(message, error):
    assert message(error) == (2, 'what')


def test_an_interruption_is_no_traceback(message):
    assert message(KeyboardInterrupt()) == (130, 'interrupted')


@pytest.mark.parametrize(
    'number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES]
)
def test_a_full_or_read_only_disk_is_told(message, number):
    code, text = message(OSError(number, os.strerror(number), '/a/file'))
    assert code == 2 and text.startswith(f'/a/file: {os.strerror(number)}.')
    assert '--resume' in text


def test_one_value_per_channel_says_what_to_change(message):
    code, text = message(
        ValueError(
            'Expected more than 1 value per channel when training, '
            'got input size torch.Size([1, 8, 1, 1])'
        )
    )
    assert code == 2 and 'train_dataloader.drop_last=True' in text and '[1, 8, 1, 1]' in text


def test_a_layers_own_error_is_a_message(message):
    with pytest.raises(ValueError) as raised:
        DNB(8)(torch.zeros(2, 8))
    code, text = message(raised.value)
    assert code == 2 and text == str(raised.value)


@pytest.mark.parametrize(
    'error',
    [
        ValueError('somewhere else'),
        KeyError('x'),
        OSError(errno.ENOENT, 'absent'),
        RuntimeError('a bug'),
    ],
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)), command_line.one_message(argparse.ArgumentParser()):
        raise error


def test_the_tiny_config_needs_nothing_added(tmp_path):
    """It imports what it names, so that the tests of the tools also run mmdet's own."""
    make_coco(tmp_path)
    path = write_config(tmp_path, 'DNB')
    assert command_line.load_config(path).to_dict() == Config.fromfile(path).to_dict()
