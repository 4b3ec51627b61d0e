"""The norm layers of SSDLite, one by one and all in one step.

"Layers" are sums and geometric means over the 76 norm layers of the detector, within a round.
This part needs only torch and mmengine (and triton for its backend).
"""

import contextlib
import copy
import statistics
import time
from collections import Counter

import torch

from . import parity
from .rows import beside_bn, divide, geometric_means, make_row, sums
from .timing import (
    Deadline,
    GraphError,
    allocations,
    alternate,
    copy_bandwidth,
    gpu_alone,
    host_alone,
    in_turn,
    synchronize,
)
from .variants import BN, COMPILED, DN, REFERENCE, Setting, Variant, make_layer

# Passes over the feature map in a training step: reading x; reading x and writing y; reading
# dy and x; reading both and writing dx.
TRAFFIC = 8
# Values of a map up to which its reference is computed in float64, in float32 above: there a
# training step in float64 would take 35 GB and more.
EXACT_UP_TO = 2**28
# The map whose host time is taken: the GPU is done with it before the host is.
HOST_MAP = dict(batch=2, channels=96, height=5)


def ssdlite_shapes(size: int = 320) -> Counter:
    """(channels, height) of the square inputs of SSDLite-MobileNetV2's norm layers.

    Counted, and written out here so that layers can be timed where mmdet is missing.
    """
    found = Counter()
    height, width = -(-size // 2), 32
    found[32, height] += 1
    features = []
    for stage, (expand, channels, blocks, stride) in enumerate(
        (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
    ):
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


def by_size(shapes) -> list[tuple[int, int]]:
    """The shapes, the largest map first."""
    return sorted(shapes, key=lambda shape: shape[0] * shape[1] ** 2, reverse=True)


def check_layers(setting: Setting, batch: int, shapes, variants) -> None:
    """Raises ParityError where a DN layer's output or a gradient is not the reference's.

    Allowed is the tolerance, or twice what plain PyTorch in the same precision is off if that
    is more: of two values per channel even float32 keeps little of the gradient of x.
    """
    for channels, height in shapes:
        x, dy = layer_data(setting, batch, channels, height)
        dtype = torch.float64 if x.numel() <= EXACT_UP_TO else torch.float32
        for norm in {v.norm for v in variants} & set(DN):
            plain = make_layer(Variant(norm, 'reference'), channels).to(setting.device)
            exact = _step(copy.deepcopy(plain).to(dtype), x.to(dtype), dy.to(dtype))
            allowed = {
                name: max(
                    parity.LAYER_TOLERANCE[setting.dtype],
                    2 * parity.relative_error(actual, exact[name]),
                )
                for name, actual in _step(plain, x, dy, setting).items()
            }
            for variant in variants:
                if variant.norm == norm and variant.backend != 'reference':
                    layer = make_layer(variant, channels).to(setting.device)
                    where = f'{variant.label} on {tuple(x.shape)}, {setting}'
                    parity.check_all(_step(layer, x, dy, setting), exact, allowed, where)
            del exact
        del x, dy
    _free(setting)


def _step(layer, x, dy, setting=None):
    """All that a training step and inference give, by name; with a setting, in its autocast."""
    autocast = setting.autocast if setting else contextlib.nullcontext
    x = x.detach().requires_grad_()
    layer.train()
    names, parameters = zip(*dict(layer.named_parameters()).items(), strict=True)
    names = [name.removeprefix('_orig_mod.') for name in names]  # torch.compile's
    with autocast():
        y = layer(x)
    gradients = torch.autograd.grad(y, (x, *parameters), dy)
    with torch.no_grad(), autocast():
        inferred = layer.eval()(x)
    return dict(
        zip(('output', 'gradient of x', *names), (y, *gradients), strict=True), inference=inferred
    )


def layer_data(setting, batch, channels, height):
    generator = torch.Generator(setting.device).manual_seed(0)
    return (
        torch.randn(
            batch, channels, height, height, device=setting.device, generator=generator
        ).to(setting.dtype, memory_format=setting.format)
        for _ in range(2)
    )


def _free(setting):
    """Gives cached memory back: a graph's has to be taken from the device."""
    if setting.device == 'cuda':
        torch.cuda.empty_cache()


def run_layers(setting: Setting, batch: int, shapes, variants) -> None:
    """Runs each layer once in training and inference, so that its kernels are compiled."""
    for channels, height in shapes:
        x, dy = layer_data(setting, batch, channels, height)
        for variant in variants:
            _step(make_layer(variant, channels).to(setting.device), x, dy, setting)
    synchronize(setting.device)


def measure_layers(
    setting: Setting,
    batch: int,
    shapes: Counter,
    variants,
    num_compiled: int = 0,
    deadline: Deadline | None = None,
    failures: list | None = None,
) -> list[dict]:
    """Rows for each shape and over all layers, forward + backward and inference.

    Args:
        shapes: (channels, height) of square maps and how many layers have it.
        num_compiled: on how many of the largest shapes `COMPILED` takes part; each is
            compiled on its own.
        deadline: the largest shapes come first; those that it cuts off are a failure.
        failures: takes a sentence for each thing that was not measured.
    """
    deadline, failures = deadline or Deadline(), [] if failures is None else failures
    ordered = by_size(shapes)
    rows, times, memory = [], {}, {}
    graphed = [v for v in variants if v != COMPILED] if setting.device == 'cuda' else []
    bandwidth = copy_bandwidth(setting)
    for done, shape in enumerate(ordered):
        channels, height = shape
        if deadline.passed():
            cut = sum(shapes[shape] for shape in ordered[done:])
            failures.append(
                f'layers, batch {batch}, {setting}: no time left for {cut} of '
                f'{sum(shapes.values())} layers, those from {channels} x {height} x '
                f'{height} on'
            )
            break
        taking_part = [v for v in variants if v != COMPILED or done < num_compiled]
        common = dict(
            part='layer', batch=batch, channels=channels, map=height, layers=shapes[shape]
        )
        found, memory[shape] = _measure_shape(
            setting, batch, shape, taking_part, graphed, failures
        )
        for (measure, task), seconds in found.items():
            for variant, values in seconds.items():
                times.setdefault((measure, task, variant), {})[shape] = values
                at = dict(common, task=task, variant=variant)
                rows += beside_bn(at, measure, 's', values, seconds[BN])
        _free(setting)
    common = dict(part='layers', batch=batch)
    return (
        rows
        + _time_rows(common, times, shapes)
        + _memory_rows(common, memory, shapes)
        + _bandwidth_rows(common, times, shapes, setting, bandwidth)
    )


def _measure_shape(setting, batch, shape, variants, graphed, failures):
    """Of one layer: {(measure, task): {variant: seconds}}, and {variant: bytes}."""
    channels, height = shape
    found, memory = {}, {}
    x, dy = layer_data(setting, batch, channels, height)
    for task in ('train', 'inference'):
        layers = {
            v: make_layer(v, channels).to(setting.device).train(task == 'train') for v in variants
        }
        if task == 'train':
            memory = {
                v: _layer_memory(setting, layer, x, dy)
                for v, layer in layers.items()
                if v != COMPILED
            }
        calls = {v: layer_call(setting, layer, x, dy, task) for v, layer in layers.items()}
        with _entered_once(setting, task):
            found['time', task] = alternate(calls, setting)
            found['GPU time', task] = _gpu_alone(calls, graphed, setting, failures, x.numel())
    return found, memory


def _gpu_alone(calls, graphed, setting, failures, size):
    """`gpu_alone` of the variants in `graphed`, which loses those that cannot be captured."""
    while graphed:
        try:
            return gpu_alone({v: calls[v] for v in graphed}, setting, 3 if size > 2e7 else 10)
        except GraphError as error:
            failures.append(
                f'GPU time of {error.key.label}, {setting}: not captured in a CUDA graph: {error}'
            )
            if error.key == BN:
                graphed.clear()  # there is nothing to compare with
            else:
                graphed.remove(error.key)
    return {}


def _time_rows(common, times, shapes):
    """Over all layers that were timed: sums, and geometric means of the ratios."""
    rows = []
    ratios = {
        key: {
            shape: divide(values, times[(*key[:2], BN)][shape])
            for shape, values in by_shape.items()
        }
        for key, by_shape in times.items()
    }
    for (measure, task, variant), by_shape in ratios.items():
        at = dict(
            common, task=task, variant=variant, layers=sum(shapes[shape] for shape in by_shape)
        )
        rows.append(make_row(at, measure, 'of BN', geometric_means(by_shape, shapes)))
        own = sums(times[measure, task, variant], shapes)
        of_bn = sums({shape: times[measure, task, BN][shape] for shape in by_shape}, shapes)
        rows += beside_bn(at, f'sum of {measure}s', 's', own, of_bn)
        against = ratios.get((measure, task, REFERENCE))
        if (measure, task, variant.norm) == ('time', 'train', 'DNB') and variant.fused and against:
            faster = {shape: divide(against[shape], by_shape[shape]) for shape in by_shape}
            rows.append(
                make_row(at, 'reference / fused', 'times', geometric_means(faster, shapes))
            )
    return rows


def _memory_rows(common, memory, shapes):
    """Over all layers: the bytes that all of them save, and the largest peak of one."""
    variants = next(iter(memory.values()), {})
    saved = {
        v: sum(sizes[v][0] * shapes[shape] for shape, sizes in memory.items()) for v in variants
    }
    peaks = {v: max(sizes[v][1] for sizes in memory.values()) for v in variants}
    rows = []
    for variant in variants:
        at = dict(
            common, task='train', variant=variant, layers=sum(shapes[shape] for shape in memory)
        )
        rows += beside_bn(at, 'bytes saved', 'bytes', [saved[variant]], [saved[BN]])
        rows += beside_bn(at, 'peak memory', 'bytes', [peaks[variant]], [peaks[BN]])
    return rows


def _bandwidth_rows(common, times, shapes, setting, bandwidth):
    """Of the four largest maps: bytes that a training step has to move, over the copy's rate."""
    rows = []
    for (measure, task, variant), by_shape in times.items():
        if (measure, task) != ('time', 'train') or variant == COMPILED:
            continue
        largest = by_size(by_shape)[:4]
        speeds = []
        for channels, height in largest:
            size = common['batch'] * channels * height**2 * setting.dtype.itemsize
            speeds.append([TRAFFIC * size / s / bandwidth for s in by_shape[channels, height]])
        at = dict(
            common, task='train', variant=variant, layers=sum(shapes[shape] for shape in largest)
        )
        rows.append(
            make_row(
                at,
                'copy bandwidth',
                'share',
                [statistics.geometric_mean(values) for values in zip(*speeds, strict=True)],
            )
        )
    return rows


@contextlib.contextmanager
def _entered_once(setting, task):
    """What a model's inference enters once is no part of a layer's: it takes as long as one."""
    if task == 'inference':
        with torch.no_grad(), setting.autocast():
            yield
    else:
        yield


def layer_call(setting, layer, x, dy, task):
    if task == 'inference':
        return lambda: layer(x)  # within `_entered_once`
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
    layer_call(setting, layer, x, dy, 'train')()  # what is made once is made
    with setting.autocast():
        y, left, _ = allocations(lambda: layer(leaf), setting.device)
    saved = left - y.nbytes + x.nbytes
    del y
    _, _, peak = allocations(layer_call(setting, layer, x, dy, 'train'), setting.device)
    return saved, peak + x.nbytes + dy.nbytes


def measure_host(setting: Setting, variants, blocks: int = 10) -> list[dict]:
    """Rows of the time that the host takes for each call of a layer, on a tiny map."""
    x, dy = layer_data(setting, **HOST_MAP)
    layers = {v: make_layer(v, HOST_MAP['channels']).to(setting.device) for v in variants}
    found = host_alone(layers, setting, x, dy, blocks)
    rows = []
    for variant, by_call in found.items():
        for name, values in by_call.items():
            at = dict(
                part='host',
                task='train',
                variant=variant,
                batch=HOST_MAP['batch'],
                channels=HOST_MAP['channels'],
                map=HOST_MAP['height'],
                layers=1,
            )
            rows += [
                make_row(at, name, 's', values),
                make_row(
                    at,
                    name,
                    'of BN',
                    [statistics.median(values) / statistics.median(found[BN][name])],
                ),
            ]
    return rows


def measure_step(
    setting: Setting,
    batch: int,
    shapes: Counter,
    variants,
    rounds: int = 7,
    clock=time.perf_counter,
) -> list[dict]:
    """Rows of one training step of all layers: every forward, then one backward.

    Eager, as in a detector's training: the host runs ahead, and the GPU is waited for once.
    """
    steps = {v: _Step(setting, batch, shapes, v) for v in variants}
    found = {v: {} for v in variants}
    for i in range(-2, rounds):  # two rounds warm up
        for variant in in_turn(steps, i):
            times = steps[variant].run(clock)
            for name, seconds in times.items() if i >= 0 else ():
                found[variant].setdefault(name, []).append(seconds)
    common = dict(part='step', task='train', batch=batch, layers=sum(shapes.values()))
    rows = []
    for variant, by_name in found.items():
        at = dict(common, variant=variant)
        for name, values in by_name.items():
            rows += beside_bn(at, name, 's', values, found[BN][name])
    peaks = {v: step.peak() for v, step in steps.items()}
    for variant, peak in peaks.items():
        at = dict(common, variant=variant)
        rows += beside_bn(at, 'peak memory', 'bytes', [peak], [peaks[BN]])
    del steps
    _free(setting)
    return rows


class _Step:
    """All layers of one variant, each with a map of its own."""

    def __init__(self, setting, batch, shapes, variant):
        self.setting = setting
        self.layers, self.xs, self.dys = [], [], []
        for (channels, height), count in shapes.items():
            for _ in range(count):
                x, dy = layer_data(setting, batch, channels, height)
                self.layers.append(make_layer(variant, channels).to(setting.device))
                self.xs.append(x.requires_grad_())
                self.dys.append(dy)

    def run(self, clock) -> dict:
        self._forget_gradients()
        synchronize(self.setting.device)
        start = clock()
        with self.setting.autocast():
            ys = [layer(x) for layer, x in zip(self.layers, self.xs, strict=True)]
        forward = clock()
        torch.autograd.backward(ys, self.dys)
        backward = clock()
        synchronize(self.setting.device)
        return {
            'time': clock() - start,
            'host time of forward': forward - start,
            'host time of backward': backward - forward,
        }

    def peak(self) -> int:
        """The most bytes that are allocated at once, maps and parameters included."""
        held = sum(t.nbytes for t in (*self.xs, *self.dys))
        for layer in self.layers:
            held += sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
        self._forget_gradients()
        return allocations(lambda: self.run(time.perf_counter), self.setting.device)[2] + held

    def _forget_gradients(self):
        for x in self.xs:
            x.grad = None
        for layer in self.layers:
            layer.zero_grad(set_to_none=True)
