"""What a tool cannot go on with is found beforehand, and told with the option that sets it."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.fileio import dump
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import init_default_scope
from tiny_detector import make_coco, write_config
from torch import nn

from dn_mmdet import DNB
from dn_mmdet.checkpoint import CheckpointError
from dn_mmdet.checks import preflight
from dn_mmdet.checks.preflight import ConfigError
from dn_mmdet.layers import DynamicNorm


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('coco')
    make_coco(root)
    return root


@pytest.fixture(scope='module')
def original(root):
    return Config.fromfile(write_config(root, 'DNB'))


@pytest.fixture
def cfg(original):
    return copy.deepcopy(original)


@pytest.fixture(scope='module')
def model(original):
    return preflight.check_model(original)


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in Path(folder).rglob('*')
    }


def test_a_model_is_built(model):
    assert sum(isinstance(module, DynamicNorm) for module in model.modules()) == 66


def test_layers_that_cannot_learn_are_told(cfg, monkeypatch):
    told = []
    monkeypatch.setattr(preflight, 'tell', told.append)
    preflight.tell_frozen(preflight.check_model(cfg))
    assert not told
    cfg.model.backbone.norm_cfg.requires_grad = False
    preflight.tell_frozen(preflight.check_model(cfg))
    assert re.match('52 of 66 DN layers cannot learn.*backbone.conv1.bn, .*requires_grad', *told)
    told.clear()
    cfg.model.backbone.norm_cfg = dict(type='DNB', bn_requires_grad=False)
    preflight.tell_frozen(preflight.check_model(cfg))
    assert not told
    cfg.model.backbone.frozen_stages = 1
    preflight.tell_frozen(preflight.check_model(cfg).train())
    assert re.match('. of 66 DN layers cannot learn', *told)


@pytest.mark.parametrize(
    'name, meant',
    [
        ('DBN', 'DNB'),
        ('DN-B', 'DNB'),
        ('dnb', 'DNB'),
        ('DNB2d', 'DNB'),
        ('DNc', 'DNC'),
        ('SyncDnb', 'SyncDNB'),
        ('mmdet.DBN', 'DNB'),
        ('DN_C3d', 'DNC3d'),
        ('BM', 'BN'),
        ('Dynamic', None),
    ],
)
def test_a_misspelt_norm_type_is_told_with_the_right_name(name, meant):
    with pytest.raises(ConfigError) as raised:
        preflight.check_norm('model.norm_cfg', dict(type=name))
    message = str(raised.value)
    assert message.startswith(f'model.norm_cfg.type: there is no norm layer {name!r}')
    assert meant is None or f"did you mean '{meant}'" in message
    assert 'There are: ' in message and 'DNB, ' in message and 'SyncDNC' in message


@pytest.mark.parametrize('name', ['DNB', 'DNC', 'BN', 'SyncBN', 'GN', DNB])
def test_a_misspelt_norm_argument_is_told_with_the_right_one(name):
    with pytest.raises(ConfigError, match=r"model\.norm_cfg\.epss?: .* did you mean 'eps'"):
        preflight.check_norm('model.norm_cfg', dict(type=name, epss=1e-3))


@pytest.mark.parametrize(
    'norm_cfg',
    [
        dict(type='BN'),
        dict(type='BN', requires_grad=False),
        dict(type='GN', num_groups=2),
        dict(type='LN'),
        dict(type='DNB', reduction=8, bound=None, requires_grad=True),
        dict(type='SyncDNC', eps=1e-3),
        dict(type=DNB, momentum=None),
        dict(type='mmengine.DNB', reduction=8),
        dict(type='dn_mmdet.layers.DNB', momentum=0.2),
    ],
)
def test_a_right_norm_passes(norm_cfg):
    preflight.check_norm('model.norm_cfg', norm_cfg)


@pytest.mark.parametrize(
    'norm_cfg, expected',
    [
        (dict(), 'expected a type'),
        (dict(type='DNB', inputs='rawe'), 'inputs'),
        (dict(type='DNC', inputs='standardized'), 'inputs'),
        (dict(type='DNB', reduction=0), 'reduction'),
        (dict(type='DNB', bound='x'), 'bound'),
        (dict(type='DNB', backend='cuda'), 'backend'),
        (dict(type='DNB', sc=dict(type='MySC')), 'MySC is not in'),
        (dict(type='DNB', sc=dict(type='SC', bounds=1)), 'bounds'),
    ],
)
def test_a_value_out_of_range_is_told_with_its_option(norm_cfg, expected):
    with pytest.raises(ConfigError, match=f'^model.norm_cfg: .*{expected}'):
        preflight.check_norm('model.norm_cfg', norm_cfg)


def test_a_type_that_is_no_name_is_told():
    with pytest.raises(ConfigError, match='^model.norm_cfg.type: expected a name.* got 3'):
        preflight.check_norm('model.norm_cfg', dict(type=3))


@pytest.mark.parametrize('place', ['backbone', 'neck', 'bbox_head'])
def test_the_norms_of_all_parts_are_checked(cfg, place):
    cfg.model[place].norm_cfg = dict(type='DNX')
    with pytest.raises(ConfigError, match=f'^model.{place}.norm_cfg.type: .*DNX'):
        preflight.check_model(cfg)


def test_norms_inside_lists_are_found():
    node = dict(heads=[dict(a=1), dict(norm_cfg=dict(type='BN'), dw_norm_cfg=None)])
    assert list(preflight._norm_cfgs(node, 'model')) == [
        ('model.heads.1.norm_cfg', dict(type='BN'))
    ]


@pytest.mark.parametrize(
    'change',
    [dict(type='NoSuchDetector'), dict(no_such_argument=1), dict(neck=dict(type='NoSuchNeck'))],
)
def test_a_model_that_cannot_be_built_is_told(cfg, change):
    cfg.model.update(change)
    with pytest.raises(ConfigError, match='cannot be built.*(No|no_)[sS]uch|no_such'):
        preflight.check_model(cfg)


def test_mmdets_ssd_head_is_refused_where_it_cannot_be_evaluated(cfg, model):
    preflight.check_evaluation(model)
    cfg.model.bbox_head.type = 'SSDHead'
    init_default_scope('mmdet')
    expected = "bbox_head.type='SSDLiteHead'.*dn_mmdet.models.ssdlite_head"
    with pytest.raises(ConfigError, match=expected):
        preflight.check_evaluation(MODELS.build(cfg.model))


def test_mixed_precision_needs_a_gpu(cfg, monkeypatch):
    preflight.check_amp(cfg)
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    monkeypatch.setattr(preflight, 'get_device', lambda: 'cpu')
    with pytest.raises(ConfigError, match='--amp .*needs a GPU.*leave it out'):
        preflight.check_amp(cfg)
    for kind in ('mmengine.AmpOptimWrapper', AmpOptimWrapper):
        cfg.optim_wrapper.type = kind
        with pytest.raises(ConfigError, match='--amp'):
            preflight.check_amp(cfg)
    monkeypatch.setattr(preflight, 'get_device', lambda: 'cuda')
    preflight.check_amp(cfg)


def test_a_folder_is_reserved_and_made(tmp_path):
    with preflight.reserved(tmp_path / 'a' / 'b'):
        assert (tmp_path / 'a' / 'b').is_dir()


def test_a_folder_with_checkpoints_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / 'epoch_3.pth').write_bytes(b'x')
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r'epoch_3.pth.*--resume.*--overwrite.*--work-dir'):
        with preflight.reserved(tmp_path):
            pytest.fail('reserved')
    assert snapshot(tmp_path) == before
    for kwargs in (dict(resume='auto'), dict(overwrite=True)):
        with preflight.reserved(tmp_path, **kwargs):
            pass
    assert (tmp_path / 'epoch_3.pth').read_bytes() == b'x'


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match='file/x: cannot be written.*--work-dir'):
        with preflight.reserved(tmp_path / 'file' / 'x'):
            pytest.fail('reserved')


HOLD = """
import sys, time
from dn_mmdet.checkpoint import CheckpointError
from dn_mmdet.checks import preflight
with preflight.reserved(sys.argv[1]):
    print('reserved', flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_ends_even_by_kill_9(tmp_path):
    first = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', HOLD, tmp_path],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with first:
        try:
            assert 'reserved\n' in iter(first.stdout.readline, '')
            before = snapshot(tmp_path)
            for kwargs in (dict(), dict(resume='auto'), dict(overwrite=True)):
                with pytest.raises(ConfigError, match=f'is running in it .process {first.pid} on'):
                    with preflight.reserved(tmp_path, **kwargs):
                        pytest.fail('reserved')
            assert (
                snapshot(tmp_path)[tmp_path / preflight.LOCK] == before[tmp_path / preflight.LOCK]
            )
        finally:
            first.kill()
    assert str(first.pid) in (tmp_path / preflight.LOCK).read_text()  # stale, and no obstacle
    with preflight.reserved(tmp_path):
        assert f'process {os.getpid()}' in (tmp_path / preflight.LOCK).read_text()
    assert (tmp_path / preflight.LOCK).read_text() == ''


def test_resume_finds_the_last_checkpoint(tmp_path):
    assert preflight.checkpoint_to_resume(tmp_path / 'absent', 'auto') is None
    assert preflight.checkpoint_to_resume(tmp_path, 'auto') is None
    assert preflight.checkpoint_to_resume(tmp_path, 'named.pth') == 'named.pth'
    last = tmp_path / 'epoch_2.pth'
    last.touch()
    with pytest.raises(ConfigError, match=f'no file last_checkpoint.*--resume {last}'):
        preflight.checkpoint_to_resume(tmp_path, 'auto')
    (tmp_path / 'last_checkpoint').write_text(str(last))
    assert preflight.checkpoint_to_resume(tmp_path, 'auto') == str(last)
    (tmp_path / 'last_checkpoint').write_text('/moved/epoch_2.pth')
    with pytest.raises(ConfigError, match=f'/moved/epoch_2.pth, which does not.*--resume {last}'):
        preflight.checkpoint_to_resume(tmp_path, 'auto')


def test_a_folder_that_was_moved_goes_on_from_its_own_checkpoint(tmp_path):
    old, new = tmp_path / 'old', tmp_path / 'new'
    old.mkdir()
    assert preflight.moved_checkpoint(old) is None
    (old / 'epoch_2.pth').touch()
    (old / 'last_checkpoint').write_text(str(old / 'epoch_2.pth'))
    assert preflight.moved_checkpoint(old) is None
    shutil.copytree(old, new)
    assert preflight.moved_checkpoint(new) == str(new / 'epoch_2.pth')
    (new / 'epoch_2.pth').unlink()
    assert preflight.moved_checkpoint(new) is None


@pytest.mark.parametrize(
    'then, paramwise',
    [(nn.BatchNorm2d, None), (DNB, dict(norm_decay_mult=0.0)), (DNB, dict(custom_keys={}))],
)
def test_an_optimizer_of_other_parameters_cannot_be_resumed(then, paramwise):
    def model(norm):
        return nn.Sequential(nn.Conv2d(3, 8, 1), norm(8))

    def cfg(paramwise):
        made = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1))
        return Config(dict(optim_wrapper=dict(made, paramwise_cfg=paramwise)))

    saved = torch.optim.SGD(model(then).parameters(), 0.1).state_dict()
    checkpoint = dict(optimizer=saved)
    preflight.check_same_optimizer(cfg(None), model(then), checkpoint, 'x.pth')
    with pytest.raises(CheckpointError, match='x.pth: cannot be resumed: its optimizer has . par'):
        preflight.check_same_optimizer(cfg(paramwise), model(DNB), checkpoint, 'x.pth')
    several = Config(dict(optim_wrapper=dict(a=dict(), b=dict())))
    preflight.check_same_optimizer(several, model(then), dict(optimizer=dict(a={})), 'x.pth')


@pytest.mark.parametrize(
    'value, message',
    [
        ('DNB', r"expected a dict, as in dict\(type='DNB'\), got a text"),
        (dict(type='DNB', momentum='0.1'), "momentum: expected a number or None, got '0.1'"),
        (dict(type='DNB', requires_grad='false'), 'requires_grad'),
        (dict(type='DNB', device='nowhere'), 'model.neck.norm_cfg: .*nowhere'),
    ],
)
def test_values_of_a_norm_cfg_that_are_of_a_wrong_kind_are_told(value, message, cfg):
    cfg.model.neck.norm_cfg = value
    with pytest.raises(ConfigError, match=message):
        preflight.check_model(cfg)


@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(), None),
        (dict(load_from='x.pth'), None),
        (dict(resume=True), 'auto'),
        (dict(resume=True, load_from='x.pth'), 'x.pth'),
        (dict(resume=False), None),
    ],
)
def test_what_a_config_resumes(options, expected):
    assert preflight.resumes(Config(options)) == expected


def test_only_mmengines_checkpoints_are_removed(tmp_path):
    own = {'epoch_1.pth', 'iter_200.pth', 'best_coco_bbox_mAP_epoch_3.pth', 'last_checkpoint'}
    other = {'mine.pth', 'my_epoch_1.pth', 'epoch_1.pth.bak', 'config.py', 'epoch_x.pth'}
    for name in own | other:
        (tmp_path / name).touch()
    (tmp_path / 'epoch_9.pth').mkdir()  # deepspeed's are folders
    preflight.remove_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == other | {'epoch_9.pth'}


@pytest.mark.parametrize(
    'option',
    [
        'load_from',
        'model.init_cfg.checkpoint',
        'model.backbone.init_cfg.checkpoint',
        'hook.0.file',
    ],
)
def test_a_checkpoint_that_the_config_names_is_not_removed(tmp_path, option):
    for name in ('epoch_7.pth', 'mine.pth'):
        (tmp_path / name).touch()
    (tmp_path / 'link.pth').symlink_to('epoch_7.pth')
    cfg = dict(work_dir=str(tmp_path), load_from=None, hook=[dict()], model=dict(backbone=dict()))

    def named(name):
        whole = Config(copy.deepcopy(cfg))
        whole.merge_from_dict({option: str(tmp_path / '..' / tmp_path.name / name)})
        return whole

    for name in ('epoch_7.pth', 'link.pth'):
        with pytest.raises(ConfigError, match=f'--overwrite would remove .*{option}'):
            preflight.check_overwrite(named(name))
    for name in ('mine.pth', 'epoch_8.pth'):
        preflight.check_overwrite(named(name))


BY_HAND = (
    "work_dir = 'x'\nlauncher = 'none'\nmodel = dict(type='SSD', bias=-1.0, scales=[(1, 2)])\n"
)
NO_COPIES = {
    'a comment': BY_HAND + '# of my own\n',
    'a parent': BY_HAND + "_base_ = 'a.py'\n",
    'a variable': BY_HAND + 'lr = 0.1\noptim = dict(lr=lr)\n',
    'an expression': BY_HAND + 'lr = 0.1 / 8\n',
    'an import': 'from os import path\n' + BY_HAND,
    'not of a run': 'model = dict()\n',
    'no config': 'model = (\n',
}


@pytest.fixture
def run(tmp_path):
    """A config in a work folder, as mmengine leaves it, and what mmengine would write there."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    cfg = Config(dict(model=dict(type='SSD', scales=[(1, 2)], low=-float('inf'), half={'a.b': 1})))
    cfg.merge_from_dict(dict(work_dir=str(work_dir), launcher='none'))
    cfg.dump(work_dir / 'config.py')
    (tmp_path / 'config.py').write_text(BY_HAND)
    return Config(cfg.to_dict(), filename=str(tmp_path / 'config.py'))


@pytest.mark.parametrize('test', [False, True])
@pytest.mark.parametrize('text', NO_COPIES.values(), ids=NO_COPIES)
def test_a_config_by_hand_is_not_replaced_by_its_copy(run, text, test):
    Path(run.work_dir, 'config.py').write_text(text)
    with pytest.raises(ConfigError, match='config.py$'):
        preflight.check_config_copy(run, test)


def test_a_training_may_replace_the_copy_of_an_earlier_run(run):
    preflight.check_config_copy(run)
    Path(run.work_dir, 'epoch_1.pth').touch()
    preflight.check_config_copy(run)
    preflight.check_config_copy(Config(run.to_dict(), filename=f'{run.work_dir}/config.py'))
    Path(run.work_dir, 'config.py').unlink()
    preflight.check_config_copy(run)


@pytest.mark.parametrize('suffix', ['.json', '.yml'])
def test_copies_of_other_kinds_of_configs_are_known(run, suffix):
    run.model.pop('low')
    path = Path(run.work_dir, f'config{suffix}')
    content = dict(run.to_dict(), model=dict(type='SSD', color='#fff'))
    dump(content, path)
    copied = Config(content, filename=str(path))
    preflight.check_config_copy(copied)
    path.write_text('# mine\n' + path.read_text())
    with pytest.raises(ConfigError, match='expected another folder'):
        preflight.check_config_copy(copied)


def test_a_test_may_replace_the_copy_of_a_test_alone(run):
    preflight.check_config_copy(run, test=True)
    own = Config(run.to_dict(), filename=f'{run.work_dir}/config.py')
    with pytest.raises(ConfigError, match='expected another folder'):
        preflight.check_config_copy(own, test=True)
    for name in ('epoch_1.pth', preflight.LOCK):  # of a training
        path = Path(run.work_dir, name)
        path.touch()
        with pytest.raises(ConfigError, match='expected another folder'):
            preflight.check_config_copy(run, test=True)
        path.unlink()


def test_every_norm_that_is_offered_can_be_built():
    """No name in the list of suggestions is an error itself."""
    names = preflight._norm_names(MODELS)
    assert {'BN', 'GN', 'LN', 'DNB', 'DNC', 'SyncDNB'} <= set(names)
    for name in names:
        assert issubclass(MODELS.get(name), nn.Module)
