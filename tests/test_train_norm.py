"""tools/train.py --norm: any config trains with Dynamic Normalization in BatchNorm's place."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from tiny_detector import make_coco, write_config

from dn_mmdet.convert import batch_norms, dn_layers

ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / 'tools' / 'train.py'))


def configure(*argv):
    return TOOL['configure'](TOOL['parse'](argv)[1])


def build(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(cfg.model)


def test_a_config_that_mmdet_ships(tmp_path):
    cfg = configure('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', '--norm', 'DNB')
    assert cfg.work_dir == 'work_dirs/yolox_tiny_8xb8-300e_coco_dnb'
    cfg.dump(tmp_path / 'dumped.py')
    reloaded = Config.fromfile(tmp_path / 'dumped.py')
    assert reloaded.custom_imports.imports == ['dn_mmdet'] and '_base_' not in reloaded
    model = build(reloaded)
    assert len(dn_layers(model)) == 74 and not batch_norms(model)


def test_options_reach_the_norms_before_they_are_swapped():
    cfg = configure(
        'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
        '--norm',
        'DNC',
        '--cfg-options',
        'model.neck.norm_cfg.eps=0.5',
    )
    assert cfg.model.neck.norm_cfg == dict(type='DNC', momentum=0.03, eps=0.5)


@pytest.mark.parametrize(
    'argv, message',
    [
        (('mmdet::yolox/of_mine.py',), 'cannot be read as a config'),
        (('no_such_package::a.py',), 'no such config file'),
        (('::a.py',), 'no such config file'),
        (
            ('mmdet::ssd/ssd300_coco.py', '--norm', 'DNB'),
            'found no BatchNorm that this config could',
        ),
        (('mmdet::ssd/ssd300_coco.py', '--norm', 'GN'), "choose from '?DNB'?, '?DNC'?"),
        (
            (
                'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
                '--norm',
                'DNB',
                '--cfg-options',
                'model.neck.norm_cfg.type=BNN',
            ),
            "there is no norm layer 'BNN'; did you mean",
        ),
    ],
)
def test_what_cannot_be_done_is_one_message_and_writes_nothing(
    argv, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        TOOL['main'](list(argv))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and not any(tmp_path.iterdir())
    assert re.search(message, error), error


@pytest.mark.shows('training by config and by `--norm`')
@pytest.mark.slow
def test_trains_and_leaves_a_config_and_a_checkpoint_that_need_no_option(tmp_path):
    make_coco(tmp_path)
    run(tmp_path, 'train.py', write_config(tmp_path, 'BN'), '--norm', 'DNB', '--work-dir', 'run')
    dumped = Config.fromfile(tmp_path / 'run' / 'tiny_bn.py')
    checkpoint = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)
    model = build(dumped)
    model.load_state_dict(checkpoint['state_dict'])
    assert len(dn_layers(model)) > 50 and not batch_norms(model)
    assert any(layer.sc.w_out.any() for layer in dn_layers(model).values())
    run(tmp_path, 'test.py', 'run/tiny_bn.py', 'run/epoch_1.pth')


def run(cwd, tool, *argv):
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', ROOT / 'tools' / tool, *argv],
        cwd=cwd,
        text=True,
        capture_output=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES=''),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_detector_whose_train_gives_nothing_back(tmp_path, monkeypatch):
    """As mmdet's for distillation."""
    (tmp_path / 'images').mkdir()
    make_coco(tmp_path)
    argv = [str(write_config(tmp_path, 'DNB')), '--work-dir', str(tmp_path / 'work')]
    cfg, args = configure(*argv), TOOL['parse'](argv)[1]
    modes = []

    def train(self, mode=True):
        modes.append(mode)

    monkeypatch.setattr('mmdet.models.SingleStageDetector.train', train, raising=False)
    TOOL['check'](cfg, args)
    assert modes
