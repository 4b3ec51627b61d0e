"""What a run of tools/compare.py writes down about itself: a hook inside the training.

Into the work folder go ``environment.json`` (versions, device, data), ``log.jsonl``
(losses and validations, one line each) and, at the end, ``measured.json``.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from torch import nn

from ..convert import batch_norms, dn_layers
from ..files import write_json, write_text
from ..fold import affine_of
from ..provenance import hardware
from ..scaled_bn import ScaledBN
from ..version import __version__
from .controls import BNSE, StaticDN
from .cost import first_image, mult_adds, peak_memory

# The process that started the run, which a run does not outlive.
PARENT = 'DN_MMDET_COMPARE_PID'
# Names in `norm_counts` of norms that are no Dynamic Normalization; others may be.
PLAIN = {
    'BN',
    'BatchNorm1d',
    'BatchNorm3d',
    'SyncBatchNorm',
    'FrozenBatchNorm2d',
    '_BatchNormXd',  # what mmengine makes of a SyncBatchNorm on one device
    'BNSE',
    'GN',
    'LayerNorm',
}
SHORT = dict(BatchNorm2d='BN', GroupNorm='GN')
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Diverged(FloatingPointError):
    """The training loss is no number any more."""


class Orphaned(RuntimeError):
    """The process that started this run has ended."""


@HOOKS.register_module()
class RecordRun(Hook):
    """Writes the log of a run so that it is whole whenever the run is killed.

    After a kill, training goes on from the last checkpoint; lines of steps after
    it are dropped, since these steps come again. A validation that the kill cut
    off is made up for.

    Args:
        lines (int): of training in the log, about.
        images (int): of the validation set, from which the generated scales and
            shifts are taken at the end.

    Raises:
        Diverged: the loss is infinite or NaN.
        Orphaned: the process that `PARENT` names has ended.
    """

    priority = 'LOWEST'  # after the checkpoint of the same moment

    def __init__(self, lines=400, images=64):
        self.lines = lines
        self.images = images

    def before_train(self, runner):
        self.folder = Path(runner.work_dir)
        self.log = self.folder / 'log.jsonl'
        lines = [line for line in read_log(self.folder) if line['step'] <= runner.iter]
        write_text(self.log, ''.join(json.dumps(line) + '\n' for line in lines))
        write_json(self.folder / 'environment.json', environment(runner))
        self.every = max(1, runner.max_iters // self.lines)
        self.logged = []
        self.since_line = self.since_losses = time.perf_counter()
        if runner.epoch and (
            runner.epoch % runner.train_loop.val_interval == 0 or runner.epoch == runner.max_epochs
        ):
            self._validate_where_missing(runner)

    def before_train_epoch(self, runner):
        self.since_losses = time.perf_counter()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        check_parent()
        step = runner.iter + 1
        loss = outputs['loss'].item()
        if not math.isfinite(loss):
            message = f'the loss became {loss} in step {step} of {runner.max_iters}'
            self._write_line(step, runner, diverged=message)
            raise Diverged(message)
        self.logged.append(
            {
                name: value.item()
                for name, value in outputs.items()
                if name == 'loss' or name.startswith('accuracy')
            }
        )
        if step % self.every == 0 or batch_idx + 1 == len(runner.train_dataloader):
            now = time.perf_counter()
            means = {
                name: sum(each[name] for each in self.logged) / len(self.logged)
                for name in self.logged[0]
            }
            self._write_line(
                step,
                runner,
                **means,
                lr=runner.optim_wrapper.get_lr()['lr'][0],
                time=(now - self.since_losses) / len(self.logged),
            )
            self.logged = []
            self.since_losses = now

    def after_val_epoch(self, runner, metrics=None):
        numbers = {key: plain(value) for key, value in (metrics or {}).items()}
        self._write_line(runner.iter, runner, metrics=numbers)

    def after_train(self, runner):
        self._validate_where_missing(runner)
        memory = peak_memory()
        model = getattr(runner.model, 'module', runner.model)
        batches = _first_batches(runner, self.images)
        try:
            counts, reason = _mult_adds_of_one_image(model, runner), None
        except Exception as error:  # a model's own code; no reason to lose a whole training
            counts, reason = None, f'{type(error).__name__}: {error}'
        measured = dict(
            norms=norm_counts(model),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            mult_adds=counts,
            mult_adds_not_measured=reason,
            peak_memory=memory,
            scale_and_shift=scale_and_shift(model, batches),
        )
        write_json(self.folder / 'measured.json', measured)

    def _validate_where_missing(self, runner):
        """The metrics after the step that training is at, where a kill cut them off."""
        if runner.val_loop is not None and not any(
            line['step'] == runner.iter and 'metrics' in line for line in read_log(self.folder)
        ):
            runner.val_loop.run()

    def _write_line(self, step, runner, **content):
        now = time.perf_counter()
        line = dict(
            step=step,
            steps=runner.max_iters,
            epoch=step / len(runner.train_dataloader),
            seconds=now - self.since_line,
            **content,
        )
        self.since_line = now
        with open(self.log, 'a') as file:
            file.write(json.dumps(line) + '\n')


def check_parent(*_) -> None:
    """Raises Orphaned where the process that `PARENT` names has ended."""
    parent = os.environ.get(PARENT)
    if parent is not None and os.getppid() != int(parent):
        raise Orphaned(f'process {parent}, which started this run, has ended')


def read_log(folder) -> list[dict]:
    """The whole lines of a run's log; none where it has none yet."""
    path = Path(folder, 'log.jsonl')
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith('\n')]


def plain(value):
    """A metric as json takes it."""
    return value.tolist() if hasattr(value, 'tolist') else value


def environment(runner) -> dict:
    """What the figures of a run can depend on besides its config."""
    modules = ('torch', 'torchvision', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain')
    return dict(
        versions=dict(
            python=platform.python_version(),
            dn_mmdet=__version__,
            **{name: sys.modules[name].__version__ for name in modules if name in sys.modules},
        ),
        hardware=hardware(),
        threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        data={
            split: describe(loader.dataset)
            for split, loader in (
                ('train', runner.train_dataloader),
                ('val', runner.val_dataloader if runner.val_loop is not None else None),
            )
            if loader is not None
        },
    )


def describe(dataset) -> dict:
    """Count and fingerprint of a data set's samples, the same on every machine.

    The fingerprint covers file names (without folders), labels, boxes and classes,
    not the pixels. It is None for data sets that do not list their samples.
    """
    times = 1
    while not isinstance(dataset, BaseDataset) and hasattr(dataset, 'dataset'):
        times *= getattr(dataset, 'times', 1)
        dataset = dataset.dataset
    if not isinstance(dataset, BaseDataset):
        return dict(samples=len(dataset), times=times, fingerprint=None)
    dataset.full_init()
    digest = hashlib.sha256(repr(dataset.metainfo.get('classes')).encode())
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        label = info.get('gt_label')
        boxes = [
            (
                list(map(float, instance['bbox'])),
                int(instance['bbox_label']),
                int(instance.get('ignore_flag', 0)),
            )
            for instance in info.get('instances', ())
        ]
        digest.update(
            repr(
                (Path(info.get('img_path', '')).name, None if label is None else int(label), boxes)
            ).encode()
        )
    return dict(samples=len(dataset), times=times, fingerprint=digest.hexdigest()[:16])


def norm_counts(model: nn.Module) -> dict[str, int]:
    """How many norm layers of each type a model has, inner ones left out."""
    layers: list[nn.Module] = [*dn_layers(model).values()]
    layers += [
        module for module in model.modules() if isinstance(module, (BNSE, ScaledBN, StaticDN))
    ]
    inside = {module for layer in layers for module in layer.modules()}
    layers += [bn for bn in batch_norms(model).values() if bn not in inside]
    layers += [
        module
        for module in model.modules()
        if module not in inside and isinstance(module, (nn.GroupNorm, nn.LayerNorm))
    ]
    names = [SHORT.get(type(layer).__name__, type(layer).__name__) for layer in layers]
    return {name: names.count(name) for name in sorted(set(names))}


def nothing_to_fold(norms) -> bool:
    """Whether names as of `norm_counts` are of plain norms alone."""
    return set(norms) <= PLAIN


def _first_batches(runner, images):
    """Batches of the validation set with that many images, or all of it."""
    if runner.val_loop is None:
        return []
    loader = runner.val_dataloader
    return list(itertools.islice(loader, math.ceil(images / loader.batch_size)))


def _mult_adds_of_one_image(model, runner):
    """See `mult_adds`; of the first image of the validation set, or None without one."""
    if runner.val_loop is None:
        return None
    image = first_image(model, runner.val_dataloader)
    return mult_adds(model, lambda: model(*image, mode='tensor'))


@torch.no_grad()
def scale_and_shift(model: BaseModel, batches) -> list[dict]:
    """The distribution of gamma and beta in every norm layer with a scale.

    For DN layers these are ``gamma = w (1 + g)`` and ``beta = b (1 + g) + h`` over
    samples and channels; for BatchNorms their weight and bias, over channels.

    Returns:
        per layer, in the model's order: its name, the `QUANTILES` of gamma and beta,
        and their standard deviation over the samples, averaged over channels.
    """
    layers, generated = dn_layers(model), defaultdict(list)

    def keep(name):
        return lambda _, inputs, outputs: generated[name].append(
            [t.float().cpu() for t in outputs]
        )

    handles = [layer.sc.register_forward_hook(keep(name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        for data in batches if layers else ():
            model.val_step(data)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    found = {}
    for name, pairs in generated.items():
        g, h = (torch.cat(of_batches) for of_batches in zip(*pairs, strict=True))
        found[name] = _distribution(name, layers[name].bn, g, h)
    for name, bn in batch_norms(model).items():
        if getattr(bn, 'weight', None) is not None:
            found[name] = _distribution(name, bn, torch.zeros(1), torch.zeros(1))
    return [found[name] for name, _ in model.named_modules() if name in found]


def _distribution(name, bn, g, h):
    """Of the scale and shift (N, C) of a DN layer, or with g = h = 0 (1,) those of a BatchNorm."""
    w, b = affine_of(bn, g)
    levels = torch.tensor(QUANTILES)
    found = dict(layer=name)
    for label, values in (('gamma', w * (1 + g)), ('beta', b * (1 + g) + h)):
        over_samples = values.std(0, correction=0).mean().item() if values.dim() == 2 else 0.0
        found[label] = torch.quantile(values.flatten(), levels).tolist()
        found[f'{label}_over_samples'] = over_samples
    return found
