"""Data loaders: whether a training gets batches, and an evaluation every image once."""

import inspect

from mmdet.datasets.samplers import (
    ClassAwareSampler,
    CustomSampleSizeSampler,
    MultiDataSampler,
    MultiSourceSampler,
)
from mmdet.registry import DATA_SAMPLERS
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop

from ..messages import ConfigError
from ..registered import is_of, name_of, resolve

ENDLESS = (InfiniteSampler, MultiSourceSampler)
DRAWING = (*ENDLESS, ClassAwareSampler, CustomSampleSizeSampler, MultiDataSampler)


def check_loader(cfg: Config, split: str, length: int | None) -> None:
    """Raises ConfigError where the loader of a split gives no batch, or not every image once.

    Args:
        split: 'train', 'val' or 'test'; a split that the config has not is no error.
        length: images of its data set after ``filter_cfg``; None where that is not known.
    """
    loader, option = cfg.get(f'{split}_dataloader'), f'{split}_dataloader'
    if loader is None:
        return
    if split == 'train':
        _check_steps(loader, option, length)
        _check_end(cfg.get('train_cfg'), loader, option)
    else:
        _check_each_image(loader, option, length)


def _check_steps(loader, option, length):
    """A training of no step ends without a message and saves what it started with."""
    size, number = loader.get('batch_size'), loader.get('num_batch_per_epoch')
    if number is not None and number < 1:
        raise ConfigError(
            f'{option}.num_batch_per_epoch: expected at least one batch, got {number}: '
            f'nothing would be trained. Leave it out, or set it to a number of batches'
        )
    if not length or not size:
        return
    if number is not None and number * size > length:
        raise ConfigError(
            f'{option}.num_batch_per_epoch: {number} batches of {size} are more than the '
            f'{length} images of the data set, and the training would end with an IndexError. '
            f'Leave it out, or set it to at most {length // size}'
        )
    drops = _drop_last(loader, option)
    if drops and length < size and not is_of(DATA_SAMPLERS, loader.get('sampler'), ENDLESS):
        raise ConfigError(
            f'{option}.batch_size: {size} is more than the {length} images of the data set, '
            f'and {drops} leaves out a batch that is not full: nothing would be trained. Set '
            f'a batch_size of at most {length}, or {drops}=False'
        )


def _check_end(train_cfg, loader, option):
    sampler = loader.get('sampler')
    epochs = (
        is_of(LOOPS, train_cfg, EpochBasedTrainLoop)
        if isinstance(train_cfg, dict) and 'type' in train_cfg
        else isinstance(train_cfg, dict) and train_cfg.get('by_epoch')
    )
    if epochs and is_of(DATA_SAMPLERS, sampler, ENDLESS):
        raise ConfigError(
            f'{option}.sampler.type: {name_of(sampler["type"])} gives images without end, and '
            f'train_cfg counts epochs: the first would never end. Set '
            f"{option}.sampler=dict(type='DefaultSampler', shuffle=True), or "
            f"train_cfg=dict(type='IterBasedTrainLoop', max_iters=...)"
        )


def _check_each_image(loader, option, length):
    """Metrics count what was not evaluated as not found, or leave it out."""
    sampler, size = loader.get('sampler'), loader.get('batch_size')
    if is_of(DATA_SAMPLERS, sampler, DRAWING):
        what = (
            'gives images without end' if is_of(DATA_SAMPLERS, sampler, ENDLESS) else 'draws some'
        )
        raise ConfigError(
            f'{option}.sampler.type: {name_of(sampler["type"])} {what}, and each image has to '
            f"be evaluated once. Set {option}.sampler=dict(type='DefaultSampler', shuffle=False)"
        )
    if loader.get('num_batch_per_epoch') is not None:
        raise ConfigError(
            f'{option}.num_batch_per_epoch: {loader["num_batch_per_epoch"]} batches where all '
            f'images have to be evaluated; AP would be that of a part. Leave it out'
        )
    drops = _drop_last(loader, option)
    if not drops or size == 1:
        return
    # AspectRatioBatchSampler drops the last batch even if it is full
    if loader.get('batch_sampler') or not length or not size or length % size:
        images = 'the images' if length is None else f'the {length} images'
        raise ConfigError(
            f'{option}: {drops}=True leaves out the last of {images}, which do not fill a batch '
            f'of {size}, but every image has to be evaluated. Set {drops}=False'
        )


def _drop_last(loader, option):
    """The option that drops the last batch where it is not full, or None."""
    batches = loader.get('batch_sampler')
    if not batches:
        return f'{option}.drop_last' if loader.get('drop_last') else None
    cls = resolve(DATA_SAMPLERS, batches.get('type')) if isinstance(batches, dict) else None
    if cls is None:
        return None
    argument = inspect.signature(cls).parameters.get('drop_last')
    default = argument is not None and argument.default is True
    return f'{option}.batch_sampler.drop_last' if batches.get('drop_last', default) else None
