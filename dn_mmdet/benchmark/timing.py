"""Seconds and bytes of a call: eager, on the GPU alone, on the host alone."""

import contextlib
import math
import statistics
import time

import torch

from .variants import BN, Setting

# Seconds that a timing takes at least: short calls are repeated that often.
LONG_ENOUGH = dict(cpu=4e-3, cuda=4e-3)
# Calls in a block of host times: the GPU is waited for between blocks and never in one.
BLOCK = 20
# Values that a copy moves to show the bandwidth: far more than any cache holds.
COPIED = dict(cpu=2**24, cuda=2**28)


class GraphError(RuntimeError):
    """A call that cannot be captured in a CUDA graph.

    Args:
        key: which call.
    """

    def __init__(self, message, key=None):
        super().__init__(message)
        self.key = key


class Deadline:
    """A point in time after which nothing new is begun.

    Args:
        seconds: from now; None for no limit.
        clock: what time it is, in seconds.
    """

    def __init__(self, seconds: float | None = None, clock=time.monotonic):
        self._clock = clock
        self._end = math.inf if seconds is None else clock() + seconds

    def passed(self) -> bool:
        return self._clock() >= self._end


def synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def in_turn(keys, number: int) -> list:
    """The order of a round: every other one goes backwards, so that drift strikes all alike."""
    return list(keys)[:: 1 if number % 2 == 0 else -1]


def alternate(calls: dict, setting: Setting) -> dict:
    """Seconds per call of each function: in each round once, every other round backwards."""
    repeats = {}
    for key, call in calls.items():
        for _ in range(2):
            call()
        repeats[key] = 1
        while (once := _seconds(call, repeats[key], setting.device)) < LONG_ENOUGH[setting.device]:
            repeats[key] = math.ceil(
                repeats[key] * min(10, 1.2 * LONG_ENOUGH[setting.device] / max(once, 1e-9))
            )
    found = {key: [] for key in calls}
    for i in range(setting.pairs):
        for key in in_turn(calls, i):
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


def gpu_alone(calls: dict, setting: Setting, repeats: int = 10) -> dict:
    """Seconds that the GPU takes for each function, the host left out: CUDA graphs replayed.

    Args:
        repeats: calls in one graph.

    Raises:
        GraphError: there is no CUDA device, or a call cannot be captured.
    """
    if setting.device != 'cuda':
        raise GraphError('GPU time alone needs a CUDA device')
    graphs = {}
    try:
        for key, call in calls.items():
            try:
                graphs[key] = _capture(call, repeats)
            except RuntimeError as error:
                raise GraphError(str(error), key) from error
        seconds = alternate({key: graph.replay for key, graph in graphs.items()}, setting)
    finally:
        for graph in graphs.values():
            graph.reset()
    return {key: [s / repeats for s in values] for key, values in seconds.items()}


def _capture(call, repeats):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(2):  # what is made once is made before
            call()
        torch.cuda.synchronize()
        graph.capture_begin()  # torch.cuda.graph would collect garbage each time
        try:
            for _ in range(repeats):
                call()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # else it hides what went wrong
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph


def host_alone(
    layers: dict, setting: Setting, x, dy, blocks: int = 10, clock=time.perf_counter
) -> dict:
    """Seconds that the host is busy with each call of a layer; the GPU is not waited for.

    ``{variant: {'forward': [...], 'backward': [...], ...}}``: a forward, ``y.backward(dy)``,
    ``torch.autograd.grad`` of x and one parameter alone, and a forward without gradient. x has
    to be small, so that the GPU is done before the host.

    Args:
        blocks: of 20 calls; in each, every layer takes its turn.
    """
    leaf = x.detach().requires_grad_()
    found = {variant: {} for variant in layers}
    for block in range(-1, blocks):  # the first one warms up
        for variant in in_turn(layers, block):
            synchronize(setting.device)
            for _ in range(BLOCK):
                times = _host_once(layers[variant], setting, leaf, dy, clock)
                for name, seconds in times.items() if block >= 0 else ():
                    found[variant].setdefault(name, []).append(seconds)
    synchronize(setting.device)
    return found


def _host_once(layer, setting, leaf, dy, clock):
    parameters = list(layer.parameters())
    leaf.grad = None
    for parameter in parameters:
        parameter.grad = None
    times = {}
    with setting.autocast():  # entered once in a training step, so it is not part of a call
        start = clock()
        y = layer(leaf)
        times['forward'] = clock() - start
    start = clock()
    y.backward(dy)
    times['backward'] = clock() - start
    with setting.autocast():
        y = layer(leaf)
    start = clock()
    torch.autograd.grad(y, (leaf, parameters[0]), dy)
    times['autograd.grad'] = clock() - start
    with setting.autocast(), torch.no_grad():
        start = clock()
        layer(leaf)
        times['forward without gradient'] = clock() - start
    return times


def allocations(call, device: str):
    """The result of a call, the bytes that it left allocated, and the peak while it ran."""
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()['requested_bytes.all.current']
        result = call()
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        return (
            result,
            stats['requested_bytes.all.current'] - before,
            stats['requested_bytes.all.peak'] - before,
        )
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    events = sorted(
        (event.start_ns(), i, event.nbytes())
        for i, event in enumerate(profile.profiler.kineto_results.events())
        if event.name() == '[memory]'
    )
    now = peak = 0
    for _, _, size in events:
        now += size
        peak = max(peak, now)
    return result, now, peak


def copy_bandwidth(setting: Setting) -> float:
    """Bytes per second, read and written, of a copy far larger than any cache."""
    source = torch.randn(COPIED[setting.device], device=setting.device)
    target = torch.zeros_like(source)
    seconds = alternate({BN: lambda: target.copy_(source)}, setting)[BN]
    return 2 * source.nbytes / statistics.median(seconds)
