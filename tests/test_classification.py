"""The classification configs: twins but for the norm, and a backbone that detectors load."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

mmpretrain = pytest.importorskip(
    'mmpretrain', reason="needs the extra 'cls'", exc_type=ImportError
)

import mmcv  # noqa: E402
from test_configs import flat  # noqa: E402
from tiny_detector import make_coco, write_config  # noqa: E402
from tool_process import succeed  # noqa: E402

from dn_mmdet.checkpoint import open_checkpoint  # noqa: E402
from dn_mmdet.checks.preflight import ConfigError, check_data, check_model  # noqa: E402
from dn_mmdet.layers import DynamicNorm  # noqa: E402
from dn_mmdet.models.classification import ListedImageFolder, StridedMobileNetV2  # noqa: E402

CONFIGS = Path(__file__).parents[1] / 'configs'
DATA = ('imagenet100', 'tinyin100', 'tinyin100_32px')


def read(norm, data):
    return Config.fromfile(CONFIGS / f'mobilenetv2_{norm}_{data}.py')


@pytest.fixture
def folders(tmp_path):
    """data/tinyin100 with two classes of two images each, in a folder to work in."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('n01', 'n02'):
            for i in range(2):
                mmcv.imwrite(
                    rng.integers(0, 255, (64, 64, 3), np.uint8),
                    str(tmp_path / f'data/tinyin100/{split}/{name}/{i}.JPEG'),
                )
    return tmp_path


@pytest.mark.parametrize('data', DATA)
@pytest.mark.parametrize('norm', ['dnb', 'dnc'])
def test_twins_differ_in_nothing_but_the_norm(norm, data):
    bn, dn = flat(dict(read('bn', data))), flat(dict(read(norm, data)))
    differing = {key: dn.get(key) for key in bn.keys() | dn.keys() if bn.get(key) != dn.get(key)}
    assert differing == {
        'norm_cfg.type': norm.upper(),
        'model.backbone.norm_cfg.type': norm.upper(),
    }


@pytest.mark.parametrize('norm,layers', [('bn', 0), ('dnb', 52), ('dnc', 52)])
def test_builds_and_trains(norm, layers):
    model = check_model(read(norm, 'tinyin100'))
    assert sum(isinstance(module, DynamicNorm) for module in model.modules()) == layers
    model.init_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    samples = [mmpretrain.structures.DataSample().set_gt_label(i) for i in (0, 99)]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        loss = model(torch.randn(2, 3, 64, 64), samples, mode='loss')['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    moved = [
        not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)


def test_at_64_px_the_last_map_has_4_x_4_cells():
    backbone = check_model(read('bn', 'tinyin100')).backbone
    with torch.no_grad():
        (out,) = backbone(torch.randn(1, 3, 64, 64))
    assert out.shape == (1, 1280, 4, 4)


def test_strides_are_checked():
    for strides in ((2,) * 7, (2, 1, 2, 2, 2, 1, 2, 4)):
        with pytest.raises(ValueError, match='expected eight numbers'):
            StridedMobileNetV2(strides)


def test_a_class_list_chooses_and_orders_the_labels(folders):
    (folders / 'list.txt').write_text('n02\n')
    root = str(folders / 'data/tinyin100')
    chosen = ListedImageFolder(str(folders / 'list.txt'), data_root=root, data_prefix='train')
    assert [Path(chosen[i]['img_path']).parent.name for i in range(2)] == ['n02', 'n02']
    assert [chosen[i]['gt_label'] for i in range(len(chosen))] == [0, 0]
    every = ListedImageFolder(data_root=root, data_prefix='train')
    assert [every[i]['gt_label'] for i in range(len(every))] == [0, 0, 1, 1]
    assert every.metainfo['classes'] == ('n01', 'n02')


@pytest.mark.parametrize(
    'text,message',
    [
        ('', 'got 0'),
        ('n01\nn01\n', '1 of them different'),
        ('n01\nn03\n', 'found none'),
        (None, 'no such class list'),
    ],
)
def test_a_class_list_that_does_not_fit_is_told(text, message, folders):
    path = folders / 'list.txt'
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ListedImageFolder(
            str(path), data_root=str(folders / 'data/tinyin100'), data_prefix='train'
        )


def test_the_checks_before_training_know_folders_of_classes(folders, monkeypatch):
    monkeypatch.chdir(folders)
    cfg = read('dnb', 'tinyin100')
    model = check_model(cfg)
    with pytest.raises(ConfigError, match='num_classes is 100, but the data set has 2'):
        check_data(cfg, 'train', model)
    cfg.model.head.num_classes = 2
    model = check_model(cfg)
    for split in ('train', 'val', 'test'):
        check_data(cfg, split, model)
    shutil.rmtree('data/tinyin100/val')
    with pytest.raises(ConfigError, match='data/tinyin100/val: no such data folder'):
        check_data(cfg, 'val', model)


def test_a_trained_backbone_is_that_of_the_ssdlite_config(close):
    """All names and shapes, and the output of every stage, as far as strides agree."""
    ours = check_model(read('dnb', 'imagenet100')).double()
    cfg = Config.fromfile(CONFIGS / 'ssdlite_mbv2_dnb_voc07.py')
    cfg.model.backbone.norm_cfg.eps = 1e-5
    theirs = check_model(cfg).double()
    state = {key: value for key, value in ours.state_dict().items() if key.startswith('backbone.')}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not any(key.startswith('backbone.') for key in missing)
    x = torch.randn(1, 3, 96, 96).double()
    close(theirs.backbone(x)[-1], ours.backbone(x)[-1])


@pytest.mark.slow
def test_the_tools_train_and_test_and_a_detector_starts_from_the_backbone(folders):
    options = (
        '--cfg-options',
        'model.head.num_classes=2',
        'data_preprocessor.num_classes=2',
        'model.backbone.widen_factor=0.1',
        'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=0',
        'val_dataloader.num_workers=0',
        'test_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'val_dataloader.persistent_workers=False',
        'test_dataloader.persistent_workers=False',
        'train_cfg.max_epochs=1',
        'param_scheduler.total_steps=1',
        'val_evaluator.topk=1',
        'test_evaluator.topk=1',
    )
    config = CONFIGS / 'mobilenetv2_dnb_tinyin100.py'
    succeed('train', config, '--work-dir', 'work', *options, cwd=folders)
    output = succeed('test', config, 'work/epoch_1.pth', '--out', 'out.pkl', *options, cwd=folders)
    assert 'accuracy/top1' in output
    assert (folders / 'out.pkl').is_file()

    (folders / 'images').mkdir()
    make_coco(folders)
    succeed(
        'train',
        write_config(folders, 'DNB'),
        '--work-dir',
        'detector',
        '--cfg-options',
        'load_from=work/epoch_1.pth',
        'optim_wrapper.optimizer.lr=0.',
        cwd=folders,
    )
    before, after = (
        open_checkpoint(folders / name / 'epoch_1.pth')['state_dict']
        for name in ('work', 'detector')
    )
    shared = [
        key for key in before if key.startswith('backbone.') and key.endswith(('.weight', '.w_in'))
    ]
    assert len(shared) > 100
    for key in shared:
        assert torch.equal(after[key], before[key]), key


def test_the_import_prints_nothing():
    found = subprocess.run(
        [sys.executable, '-c', 'import dn_mmdet.models.classification'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == ''
