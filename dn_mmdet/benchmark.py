"""Times norms against BatchNorm: layer by layer, and in SSDLite-MobileNetV2 as a whole.

Before anything is timed, every Dynamic Normalization that takes part is compared with the
reference, with SC awake; one that is off raises, and there are no figures at all.

Each round runs all variants once, every other round in the opposite order, and gives one
ratio to BatchNorm per variant, so that a machine that slows down slows both. A result is the
median of the ratios; quantiles say how far rounds differ. "Layers" are geometric means over
the norm layers of the detector, within a round.

The layer part needs only torch and mmengine (and triton for its backend).
"""
import contextlib
import copy
import csv
import datetime
import math
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .functional import fused_backends
from .layers import DNB, DNC
from .sc import SC

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs' / 'ssdlite_mbv2_bn_coco.py'
FIELDS = ('date', 'commit', 'device', 'threads', 'torch', 'triton', 'mmengine', 'mmdet', 'part',
          'task', 'batch', 'dtype', 'memory_format', 'channels', 'map', 'layers', 'norm',
          'backend', 'measure', 'unit', 'median', 'q10', 'q25', 'q75', 'q90', 'pairs')
# Seconds that a timing takes at least: short calls are repeated that often.
LONG_ENOUGH = dict(cpu=4e-3, cuda=4e-3)
# Relative errors against float64, in norms, above which nothing is timed. Of the detector,
# whose 76 layers amplify rounding, twice what the reference is off is allowed if that is more.
LAYER_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DETECTOR_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# Passes over the feature map in a training step: reading x; reading x and writing y; reading
# dy and x; reading both and writing dx.
TRAFFIC = 8

# (part, task, measure): must and aim, as ratios to BatchNorm, except copy bandwidth.
BARS = {('layers', 'train', 'time'): (1.15, 0.95),
        ('layers', 'train', 'bytes saved'): (1.03, 1.0),
        ('layers', 'train', 'peak memory'): (1.03, 1.0),
        ('layers', 'train', 'copy bandwidth'): (0.75, 0.9),
        ('layers', 'train', 'reference / fused'): (2.0, 3.0),
        ('detector', 'train', 'time'): (1.10, 1.03),
        ('detector', 'train', 'peak memory'): (1.03, 1.0),
        ('detector', 'inference', 'time'): (1.18, 1.05)}


class ParityError(AssertionError):
    """A norm that is to be timed does not compute what the reference does."""


class Variant(NamedTuple):
    """A norm in one implementation."""
    norm: str
    backend: str = ''

    @property
    def label(self):
        return f'{self.norm} {self.backend}'.strip()


FUSED = 'torch', 'cpp', 'triton'
BN, GN, FOLDED = Variant('BN'), Variant('GN'), Variant('BN', 'folded')
REFERENCE, COMPILED = Variant('DNB', 'reference'), Variant('DNB', 'compiled')


class Setting(NamedTuple):
    """What all timings of one run have in common."""
    device: str
    dtype: torch.dtype = torch.float32  # of feature maps; another than float32 under autocast
    channels_last: bool = False
    pairs: int = 15

    @property
    def fused(self):
        return fused_backends(self.device)

    @property
    def format(self):
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self):
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)


def ssdlite_shapes(size: int = 320) -> Counter:
    """(channels, height) of the square inputs of SSDLite-MobileNetV2's norm layers.

    Counted, and written out here so that layers can be timed where mmdet is missing.
    """
    found = Counter()
    height, width = -(-size // 2), 32
    found[32, height] += 1
    features = []
    for stage, (expand, channels, blocks, stride) in enumerate((
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
            (6, 160, 3, 2), (6, 320, 1, 1))):
        for block in range(blocks):
            if expand != 1:
                found[width * expand, height] += 1
            height = -(-height // (stride if block == 0 else 1))
            found[width * expand, height] += 1
            found[channels, height] += 1
            width = channels
        if stage == 4:
            features.append((width, height))
    found[1280, height] += 1
    features.append((1280, height))
    for channels in (512, 256, 256, 128):
        found[channels // 2, height] += 1
        height = -(-height // 2)
        found[channels // 2, height] += 1
        found[channels, height] += 1
        features.append((channels, height))
    for feature in features:  # a depthwise convolution each for classes and boxes
        found[feature] += 2
    return found


def make_layer(variant: Variant, channels: int) -> nn.Module:
    """One norm layer; SC as after training, the same in every backend."""
    if variant == BN:
        return nn.BatchNorm2d(channels)
    if variant == GN:
        return nn.GroupNorm(8, channels)
    backend = 'reference' if variant == COMPILED else variant.backend
    layer = (DNB if variant.norm == 'DNB' else DNC)(channels, backend=backend)
    wake(layer)
    if variant == COMPILED:
        torch.compiler.reset()  # else the eighth layer counts as a recompilation too many
        layer = torch.compile(layer, fullgraph=True, dynamic=False)
    return layer


def wake(model: nn.Module) -> nn.Module:
    """Draws every SC in a model anew, always the same: a fresh one computes BatchNorm."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for parameter in module.parameters() if isinstance(module, SC) else ():
            with torch.no_grad():
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values / parameter.shape[-1]**0.5)
    return model


def check_layers(setting: Setting, batch: int, shapes, variants) -> None:
    """Raises ParityError where a DN layer's output or a gradient is not the reference's."""
    tolerance = LAYER_TOLERANCE[setting.dtype]
    for channels, height in shapes:
        x, dy = _layer_data(setting, batch, channels, height)
        for norm in {v.norm for v in variants} & {'DNB', 'DNC'}:
            exact = make_layer(Variant(norm, 'reference'), channels).to(setting.device).double()
            expected = _step(exact, x.double(), dy.double())
            for variant in variants:
                if variant.norm != norm:
                    continue
                layer = make_layer(variant, channels).to(setting.device)
                with setting.autocast():
                    actual = _step(layer, x, dy)
                for name, wanted in expected.items():
                    _check(name, actual[name], wanted, tolerance,
                           f'{variant.label} on {tuple(x.shape)}')


def _step(layer, x, dy):
    """All that a training step and inference give, by name."""
    x = x.detach().requires_grad_()
    names, parameters = zip(*dict(layer.named_parameters()).items(), strict=True)
    names = [name.removeprefix('_orig_mod.') for name in names]  # torch.compile's
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, *parameters), dy)
    with torch.no_grad():
        inferred = layer.eval()(x)
    return dict(zip(('output', 'gradient of x', *names), (y, *gradients), strict=True),
                inference=inferred)


def _error(actual, wanted):
    actual, wanted = actual.detach().double(), wanted.detach().double()
    return ((actual - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def _check(name, actual, wanted, tolerance, where):
    error = _error(actual, wanted)
    if not error <= tolerance:
        raise ParityError(f'{where}: {name} differs from the reference by {error:.2g} of its '
                          f'norm (allowed {tolerance:.2g}); nothing is timed')


def _layer_data(setting, batch, channels, height):
    generator = torch.Generator(setting.device).manual_seed(0)
    return (torch.randn(batch, channels, height, height, device=setting.device,
                        generator=generator).to(setting.dtype, memory_format=setting.format)
            for _ in range(2))


def measure_layers(setting: Setting, batch: int, shapes: Counter, variants,
                   num_compiled: int) -> list[dict]:
    """Rows for each shape and over all layers, forward + backward and inference.

    Args:
        shapes: (channels, height) of square maps and how many layers have it.
        num_compiled: on how many of the largest shapes `COMPILED` takes part; each is
            compiled anew.
    """
    by_size = sorted(shapes, key=lambda shape: shape[0] * shape[1]**2, reverse=True)
    rows, ratios, sizes, speeds = [], {}, {}, []
    bandwidth = copy_bandwidth(setting)
    for channels, height in by_size:
        taking_part = [v for v in variants if v != COMPILED
                       or (channels, height) in by_size[:num_compiled]]
        x, dy = _layer_data(setting, batch, channels, height)
        common = dict(part='layer', batch=batch, channels=channels, map=height,
                      layers=shapes[channels, height])
        for task in ('train', 'inference'):
            layers = {v: make_layer(v, channels).to(setting.device).train(task == 'train')
                      for v in taking_part}
            if task == 'train':
                sizes[channels, height] = {v: _layer_memory(setting, layer, x, dy)
                                           for v, layer in layers.items() if v != COMPILED}
            seconds = alternate({v: _layer_call(setting, layer, x, dy, task)
                                 for v, layer in layers.items()}, setting)
            for variant, values in seconds.items():
                ratio = _divide(values, seconds[BN])
                ratios.setdefault((task, variant), {})[channels, height] = ratio
                at = dict(common, task=task, variant=variant)
                rows += [_row(at, 'time', 's', values), _row(at, 'time', 'of BN', ratio)]
            if task == 'train' and (channels, height) in by_size[:4]:
                speeds.append({v: [TRAFFIC * x.nbytes / s / bandwidth for s in values]
                               for v, values in seconds.items()})
    common = dict(part='layers', batch=batch, layers=sum(shapes.values()))
    for (task, variant), by_shape in ratios.items():
        at = dict(common, task=task, variant=variant,
                  layers=sum(shapes[shape] for shape in by_shape))
        rows.append(_row(at, 'time', 'of BN', _geometric_means(by_shape, shapes)))
        if task == 'train' and variant.norm == 'DNB' and variant.backend in setting.fused:
            against = ratios[task, REFERENCE]
            faster = {shape: _divide(against[shape], by_shape[shape]) for shape in by_shape}
            rows.append(_row(at, 'reference / fused', 'times',
                             _geometric_means(faster, shapes)))
    for variant in variants:
        at = dict(common, task='train', variant=variant)
        if variant == COMPILED:
            continue
        for i, measure in enumerate(('bytes saved', 'peak memory')):
            total, of_bn = (sum(sizes[shape][v][i] * shapes[shape] for shape in shapes)
                            if measure == 'bytes saved' else max(
                                sizes[shape][v][i] for shape in shapes)
                            for v in (variant, BN))
            rows += [_row(at, measure, 'bytes', [total]),
                     _row(at, measure, 'of BN', [total / of_bn])]
        at['layers'] = sum(shapes[shape] for shape in by_size[:4])
        rows.append(_row(at, 'copy bandwidth', 'share', [
            statistics.geometric_mean(values)
            for values in zip(*(speed[variant] for speed in speeds), strict=True)]))
    return rows


def _layer_call(setting, layer, x, dy, task):
    if task == 'inference':
        def infer():
            with torch.no_grad(), setting.autocast():
                layer(x)
        return infer
    leaf = x.detach().requires_grad_()
    wanted = (leaf, *dict(layer.named_parameters()).values())

    def train():
        with setting.autocast():
            y = layer(leaf)
        torch.autograd.grad(y, wanted, dy)
    return train


def _layer_memory(setting, layer, x, dy):
    """Bytes kept for backward, and the peak of a training step, its inputs included.

    What is kept is all that a forward leaves allocated but its output, saved tensors or
    not, and x: every norm here keeps that.
    """
    leaf = x.detach().requires_grad_()
    _layer_call(setting, layer, x, dy, 'train')()  # what is made once is made
    with setting.autocast():
        y, left, _ = allocations(lambda: layer(leaf), setting.device)
    saved = left - y.nbytes + x.nbytes
    del y
    _, _, peak = allocations(_layer_call(setting, layer, x, dy, 'train'), setting.device)
    return saved, peak + x.nbytes + dy.nbytes


def allocations(call, device: str):
    """The result of a call, the bytes that it left allocated, and the peak while it ran."""
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()['requested_bytes.all.current']
        result = call()
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        return (result, stats['requested_bytes.all.current'] - before,
                stats['requested_bytes.all.peak'] - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        result = call()
    events = sorted((event.start_ns(), i, event.nbytes()) for i, event in
                    enumerate(profile.profiler.kineto_results.events())
                    if event.name() == '[memory]')
    now = peak = 0
    for _, _, size in events:
        now += size
        peak = max(peak, now)
    return result, now, peak


def alternate(calls: dict, setting: Setting) -> dict:
    """Seconds per call of each function: in each round once, every other round backwards."""
    repeats = {}
    for key, call in calls.items():
        for _ in range(2):
            call()
        repeats[key] = 1
        while (once := _seconds(call, repeats[key], setting.device)) < LONG_ENOUGH[setting.device]:
            repeats[key] = math.ceil(repeats[key] * min(
                10, 1.2 * LONG_ENOUGH[setting.device] / max(once, 1e-9)))
    found = {key: [] for key in calls}
    for i in range(setting.pairs):
        for key in (list(calls) if i % 2 == 0 else reversed(calls)):
            seconds = _seconds(calls[key], repeats[key], setting.device)
            found[key].append(seconds / repeats[key])
    return found


def _seconds(call, repeats, device):
    if device == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def copy_bandwidth(setting: Setting) -> float:
    """Bytes per second, read and written, of a copy far larger than any cache."""
    source = torch.zeros(2**28 if setting.device == 'cuda' else 2**24, device=setting.device)
    target = torch.zeros_like(source)
    seconds = alternate({BN: lambda: target.copy_(source)}, setting)[BN]
    return 2 * source.nbytes / statistics.median(seconds)


class Detectors:
    """SSDLite-MobileNetV2 with each norm, all with the same weights, and inputs for it.

    Args:
        variants: which norms, `BN` among them.
        config: of the detector with BatchNorm.
        size (int): of the square images.
    """

    def __init__(self, setting: Setting, variants, config=CONFIG, size: int = 320):
        from .environment import check_mmdet
        check_mmdet()
        from mmdet.registry import MODELS
        from mmengine.config import Config
        from mmengine.registry import init_default_scope
        cfg = Config.fromfile(config)
        init_default_scope('mmdet')
        self.setting, self.size = setting, size
        torch.manual_seed(0)
        model = MODELS.build(cfg.model).to(setting.device, memory_format=setting.format)
        self._settle(model)
        self.models = {variant: self._variant(model, variant) for variant in variants}

    def _settle(self, model):
        """Running statistics of these inputs, so that inference does not run on vanishing maps."""
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        momentum = norms[0].momentum
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(self.images(4), mode='tensor')
        for norm in norms:
            norm.momentum = momentum

    def _variant(self, model, variant):
        from .convert import convert_norm, dn_layers
        model = copy.deepcopy(model)
        if variant.norm in ('DNB', 'DNC'):
            model = wake(convert_norm(model, variant.norm))
            for layer in dn_layers(model).values():
                layer.backend = variant.backend
        elif variant == GN:
            _replace_by_group_norm(model)
        elif variant == FOLDED:
            from mmcv.cnn import fuse_conv_bn
            model = fuse_conv_bn(model.eval())
        return model.to(self.setting.device, memory_format=self.setting.format)

    def images(self, batch):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, self.size, self.size, generator=generator).to(
            self.setting.device, memory_format=self.setting.format)

    def _samples(self, batch):
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData
        shape = (self.size, self.size)
        boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.2, 0.9, 0.9]]) * self.size
        truth = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1])).to(self.setting.device)
        sample = DetDataSample(gt_instances=truth, metainfo=dict(
            img_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1, 1)))
        return [sample] * batch

    def check(self, batch: int) -> None:
        """Raises ParityError where a DN detector is further from float64 than plain PyTorch.

        That is the reference in the same precision, whose error this deep network
        amplifies as much.
        """
        images, samples = self.images(batch), self._samples(batch)
        for norm in sorted({v.norm for v in self.models} & {'DNB', 'DNC'}):
            plain = self._variant(self.models[BN], Variant(norm, 'reference'))
            exact = self._results(copy.deepcopy(plain).double(), images.double(), samples)
            plain = self._results(plain, images, samples)
            for variant, model in self.models.items():
                if variant.norm != norm or variant.backend == 'reference':
                    continue
                actual = self._results(copy.deepcopy(model), images, samples)
                for name, wanted in exact.items():
                    allowed = max(DETECTOR_TOLERANCE[self.setting.dtype],
                                  2 * _error(plain[name], wanted))
                    _check(name, actual[name], wanted, allowed, f'SSDLite, {variant.label}')

    def _results(self, model, images, samples):
        exact = images.dtype == torch.float64
        with contextlib.nullcontext() if exact else self.setting.autocast():
            with torch.no_grad():
                outputs = model.eval()(images, mode='tensor')
            losses = model.train()(images, samples, mode='loss')
        loss = _total(losses)
        gradients = torch.autograd.grad(loss, list(dict(model.named_parameters()).values()))
        return dict(inference=torch.cat([t.flatten() for level in outputs for t in level]),
                    loss=loss, gradient=torch.cat([g.flatten() for g in gradients]))

    def measure(self, task: str, batch: int) -> list[dict]:
        images, samples = self.images(batch), self._samples(batch)
        variants = [v for v in self.models if task == 'inference' or v != FOLDED]
        calls, peaks = {}, {}
        for variant in variants:
            model = copy.deepcopy(self.models[variant]).train(task == 'train')
            calls[variant] = self._call(model, images, samples, task)
            if task == 'train':
                calls[variant]()
                held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
                _, _, peak = allocations(calls[variant], self.setting.device)
                # and each parameter's momentum; gradients are part of the step's own peak
                peaks[variant] = peak + held + sum(p.nbytes for p in model.parameters())
        seconds = alternate(calls, self.setting)
        rows = []
        for variant, values in seconds.items():
            at = dict(part='detector', task=task, batch=batch, variant=variant, map=self.size)
            rows += [_row(at, 'time', 's', values),
                     _row(at, 'time', 'of BN', _divide(values, seconds[BN]))]
            if FOLDED in seconds and variant != FOLDED:
                rows.append(_row(at, 'time', 'of BN folded', _divide(values, seconds[FOLDED])))
            if variant in peaks:
                rows += [_row(at, 'peak memory', 'bytes', [peaks[variant]]),
                         _row(at, 'peak memory', 'of BN', [peaks[variant] / peaks[BN]])]
        return rows

    def _call(self, model, images, samples, task):
        if task == 'inference':
            def infer():
                with torch.no_grad(), self.setting.autocast():
                    model(images, mode='tensor')
            return infer
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

        def train():
            optimizer.zero_grad(set_to_none=True)
            with self.setting.autocast():
                losses = model(images, samples, mode='loss')
            _total(losses).backward()
            optimizer.step()
        return train


def _total(losses):
    """The sum of a detector's losses, each a tensor or one for each level."""
    return sum(loss if torch.is_tensor(loss) else sum(loss) for loss in losses.values())


def _replace_by_group_norm(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(8, child.num_features))


def _divide(values, others):
    return [a / b for a, b in zip(values, others, strict=True)]


def _geometric_means(by_shape, shapes):
    """Of each round: over all layers, a shape counting as often as layers have it."""
    weights = [shapes[shape] for shape in by_shape]
    return [math.exp(sum(w * math.log(v) for w, v in zip(weights, values, strict=True))
                     / sum(weights)) for values in zip(*by_shape.values(), strict=True)]


def _row(at, measure, unit, values):
    at = dict(at)
    variant = at.pop('variant')
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.1, 0.25, 0.75, 0.9], dtype=torch.float64)).tolist()
    return dict(at, norm=variant.norm, backend=variant.backend, measure=measure, unit=unit,
                pairs=len(values),
                **dict(zip(('median', 'q10', 'q25', 'q75', 'q90'), quantiles, strict=True)))


def provenance(setting: Setting) -> dict:
    """What every row says of where its figures come from."""
    return dict(date=datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d %H:%M'),
                commit=_commit(), device=_device_name(setting.device),
                threads=torch.get_num_threads(),
                **{name: _version(*names) for name, names in dict(
                    torch=('torch', ), triton=('triton', ),
                    mmengine=('mmengine', 'onedl-mmengine'),
                    mmdet=('mmdet', 'onedl-mmdetection')).items()},
                dtype=str(setting.dtype).removeprefix('torch.'),
                memory_format='channels_last' if setting.channels_last else 'contiguous')


def _commit():
    """The commit of the checkout that this package is in, marked where files differ from it."""
    try:
        git = ['git', '-C', str(ROOT)]
        commit = subprocess.run([*git, 'rev-parse', '--short=12', 'HEAD'], capture_output=True,
                                text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, 'diff', 'HEAD', '--quiet', '--', 'dn_mmdet'],
                                 capture_output=True).returncode
        return commit + ('+changes' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def _version(*names):
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return 'none'


def _device_name(device):
    if device == 'cuda':
        return torch.cuda.get_device_name()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return f'{names[0] if names else platform.processor()}, {os.cpu_count()} cores'


def write_rows(path, rows) -> None:
    """Writes rows to a CSV file, or appends them to one of the same columns.

    Raises:
        ValueError: the file has other columns.
    """
    path = Path(path)
    new = not path.exists()
    if not new and read_header(path) != FIELDS:
        raise ValueError(f'{path}: expected the columns of a benchmark ({", ".join(FIELDS)}); '
                         f'choose another file')
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, FIELDS, restval='')
        if new:
            writer.writeheader()
        writer.writerows({k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()}
                         for row in rows)


def read_header(path) -> tuple:
    with open(path, newline='') as file:
        return tuple(next(csv.reader(file), ()))


def table(rows) -> str:
    """The rows over all layers and of the detector, as text, beside what was asked for."""
    shown = [row for row in rows if row['part'] != 'layer' and row['unit'] not in ('s', 'bytes')]
    first = rows[0]
    lines = [f"{first['device']}, {first['threads']} threads; torch {first['torch']}, triton "
             f"{first['triton']}; commit {first['commit']}; {first['dtype']}, "
             f"{first['memory_format']}",
             f'{"":63} median   10 % - 90 %    must   aim']
    for row in shown:
        task = 'forward + backward' if row['task'] == 'train' and row['part'] == 'layers' \
            else dict(train='train step').get(row['task'], row['task'])
        name = ' '.join(filter(None, (row['norm'], row['backend'])))
        label = (f"{row['part']}, {task}, batch {row['batch']}, {row['measure']}"
                 f"{'' if row['unit'] in ('of BN', 'share', 'times') else ', ' + row['unit']}")
        must, aim = _bar(row)
        lines.append(f"{label:48} {name:14} {row['median']:6.3f}  {row['q10']:6.3f} - "
                     f"{row['q90']:6.3f}  {must:>5}  {aim:>4}")
    return '\n'.join(lines)


def _bar(row):
    """What DN-B's fused backends have to reach, and should."""
    key = row['part'], row['task'], row['measure']
    if row['norm'] != 'DNB' or row['backend'] not in FUSED \
            or row['unit'] == 'of BN folded':
        return '', ''
    return BARS.get(key, ('', ''))


def plot(rows, path) -> None:
    """Draws each layer's training ratio over the size of its map."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, task in zip(axes, ('train', 'inference'), strict=True):
        found = {}
        for row in rows:
            if (row['part'], row['task'], row['unit']) == ('layer', task, 'of BN'):
                name = ' '.join(filter(None, (row['norm'], row['backend'])))
                size = row['batch'] * row['channels'] * row['map']**2
                found.setdefault(name, []).append((size, row['median']))
        for name, points in found.items():
            axis.plot(*zip(*sorted(points), strict=True), '.-', label=name, linewidth=0.8)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set(xscale='log', yscale='log', xlabel='values in the feature map',
                 title='forward + backward' if task == 'train' else 'inference')
    axes[0].set_ylabel('time, of BatchNorm')
    axes[1].legend(fontsize='small')
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['memory_format']}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
