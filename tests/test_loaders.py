"""A training without a step, and an evaluation of some of the images, are refused at first."""

import copy

import pytest
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.runner import Runner
from tiny_detector import make_coco, write_config

from dn_mmdet.checks import preflight
from dn_mmdet.checks.loaders import check_loader
from dn_mmdet.checks.preflight import ConfigError


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp('coco')
    make_coco(root)
    return Config.fromfile(write_config(root, 'DNB'))


@pytest.fixture
def cfg(original):
    """A training on four images, in batches of two."""
    return copy.deepcopy(original)


@pytest.fixture(scope='module')
def model(original):
    return preflight.check_model(original)


ASPECT = dict(type='AspectRatioBatchSampler', drop_last=True)


@pytest.mark.parametrize('split', ['val', 'test'])
@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(drop_last=True, batch_size=3), r': {0}\.drop_last=True leaves out .* 4 images'),
        (dict(drop_last=True, batch_size=8), r': {0}\.drop_last=True leaves out'),
        (dict(batch_sampler=ASPECT), r': {0}\.batch_sampler\.drop_last=True leaves out'),
        (dict(num_batch_per_epoch=1), r'\.num_batch_per_epoch: 1 batches'),
        (dict(num_batch_per_epoch=0), r'\.num_batch_per_epoch: 0 batches'),
        (dict(sampler=dict(type='InfiniteSampler')), r'\.sampler\.type: .* without end'),
        (dict(sampler=dict(type='mmengine.InfiniteSampler')), r'\.sampler\.type'),
        (dict(sampler=dict(type=InfiniteSampler)), r'\.sampler\.type: InfiniteSampler'),
        (dict(sampler=dict(type='ClassAwareSampler')), r'\.sampler\.type: .* draws'),
        (dict(sampler=dict(type='GroupMultiSourceSampler')), r'\.sampler\.type'),
    ],
    ids=str,
)
def test_an_evaluation_of_some_of_the_images_is_told(cfg, model, split, options, expected):
    loader = f'{split}_dataloader'
    cfg[loader].update(options)
    with pytest.raises(ConfigError, match=f'^{loader}{expected.format(loader)}.* (Set|Leave)'):
        preflight.check_data(cfg, split, model)


@pytest.mark.parametrize(
    'options',
    [
        dict(drop_last=True, batch_size=2),  # four images
        dict(drop_last=True, batch_size=1),
        dict(batch_size=1, batch_sampler=ASPECT),
        dict(batch_size=3, batch_sampler=dict(type='AspectRatioBatchSampler')),
        dict(batch_size=3, drop_last=False),
        dict(sampler=dict(type='DefaultSampler', shuffle=True, round_up=False)),
        dict(sampler=dict(type='NotOurs')),
    ],
    ids=str,
)
def test_a_loader_that_gives_all_images_passes(cfg, model, options):
    cfg.val_dataloader.update(options)
    preflight.check_data(cfg, 'val', model)


def test_images_that_cannot_be_counted_may_not_be_dropped(cfg):
    cfg.val_dataloader.update(drop_last=True, batch_size=2)
    check_loader(cfg, 'val', 4)
    with pytest.raises(ConfigError, match='the last of the images, .* Set val_dataloader.drop_'):
        check_loader(cfg, 'val', None)
    cfg.val_dataloader.batch_size = 1
    check_loader(cfg, 'val', None)


DROPS = dict(drop_last=True, batch_sampler=None)


@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(DROPS, batch_size=5), r'\.batch_size: 5 is more than the 4 .*drop_last=False'),
        (dict(batch_size=5, batch_sampler=ASPECT), r'\.batch_size: 5 .*batch_sampler\.drop_last'),
        (
            dict(num_batch_per_epoch=0),
            r'\.num_batch_per_epoch: expected at least one batch, got 0',
        ),
        (dict(num_batch_per_epoch=-1), r'\.num_batch_per_epoch: expected at least one'),
        (dict(num_batch_per_epoch=3), r'\.num_batch_per_epoch: 3 batches of 2 .* at most 2'),
        (dict(sampler=dict(type='InfiniteSampler')), r'\.sampler\.type: .* never end.*IterBased'),
    ],
    ids=str,
)
def test_a_training_without_a_step_or_an_end_is_told(cfg, model, options, expected):
    cfg.train_dataloader.update(options)
    with pytest.raises(ConfigError, match=f'^train_dataloader{expected}'):
        preflight.check_data(cfg, 'train', model)


@pytest.mark.parametrize(
    'options',
    [
        dict(DROPS, batch_size=4),
        dict(batch_size=5),
        dict(batch_size=4, batch_sampler=ASPECT),
        dict(num_batch_per_epoch=2),
        dict(num_batch_per_epoch=1),
    ],
    ids=str,
)
def test_a_training_of_some_steps_passes(cfg, model, options):
    cfg.train_dataloader.update(options)
    preflight.check_data(cfg, 'train', model)
    assert len(Runner.build_dataloader(cfg.train_dataloader)) > 0


def test_an_endless_sampler_fits_a_training_that_counts_steps(cfg, model):
    cfg.train_dataloader.update(DROPS, batch_size=8, sampler=dict(type='InfiniteSampler'))
    for train_cfg in (
        dict(type='IterBasedTrainLoop', max_iters=9),
        dict(by_epoch=False, max_iters=9),
        dict(type='NotOurs'),
    ):
        cfg.train_cfg = train_cfg
        preflight.check_data(cfg, 'train', model)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=9)
    with pytest.raises(ConfigError, match='never end'):
        preflight.check_data(cfg, 'train', model)


def test_wrappers_are_counted(cfg, model):
    """As many images as mmengine would find."""
    inner = cfg.train_dataloader.dataset
    repeat = dict(type='RepeatDataset', times=3, dataset=inner)
    mix = dict(type='MultiImageMixDataset', dataset=inner, pipeline=[])
    balanced = dict(type='ClassBalancedDataset', oversample_thr=0.9, dataset=inner)
    for dataset, length in (
        (repeat, 12),
        (mix, 4),
        (dict(type='ConcatDataset', datasets=[repeat, inner]), 16),
        (dict(inner, indices=3), 3),
        (dict(type='ConcatDataset', datasets=[inner, balanced]), None),
    ):
        cfg.train_dataloader.update(DROPS, batch_size=length or 99)
        cfg.train_dataloader.dataset = dataset
        preflight.check_data(cfg, 'train', model)
        if length is not None:
            assert len(Runner.build_dataloader(cfg.train_dataloader)) == 1
            cfg.train_dataloader.batch_size = length + 1
            with pytest.raises(ConfigError, match=f'more than the {length} images'):
                preflight.check_data(cfg, 'train', model)
