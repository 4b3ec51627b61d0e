"""A CUDA device that is the CPU: for what decides how a GPU is timed, without one.

Tensors asked for on 'cuda' come on the CPU. What is called in a graph's capture runs once; a
replay takes a thousandth of a second on the clock of the events and nothing else.
"""

import contextlib
import time

import torch
from torch.overrides import TorchFunctionMode

from dn_mmdet.benchmark import timing

REPLAY = 1e-3


def _on_cpu(value):
    return 'cpu' if isinstance(value, (str, torch.device)) and str(value) == 'cuda' else value


class _OnCPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(
            *(_on_cpu(arg) for arg in args),
            **{name: _on_cpu(arg) for name, arg in (kwargs or {}).items()},
        )


class FakeCuda:
    """Counts what is done with the device.

    Args:
        uncapturable: says of a capture, by its number from 0, whether it fails.
    """

    def __init__(self, monkeypatch, uncapturable=lambda i: False):
        self.captures, self.replays, self.skipped = 0, 0, 0.0
        self.capturing, self.live, self.waits = False, 0, 0
        fake, generator, autocast = self, torch.Generator, torch.autocast

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.time = time.perf_counter() + fake.skipped

            def elapsed_time(self, end):
                return 1e3 * (end.time - self.time)

        class Stream:
            def wait_stream(self, other):
                assert isinstance(other, Stream)

        class Graph:
            def capture_begin(self):
                assert not fake.capturing and fake.on_side_stream
                if uncapturable(fake.captures):
                    fake.captures += 1
                    raise RuntimeError('CUDA error: operation not permitted when capturing')
                fake.capturing = True

            def capture_end(self):
                assert fake.capturing
                fake.capturing = False
                fake.captures += 1
                fake.live += 1

            def replay(self):
                assert not fake.capturing
                fake.replays += 1
                fake.skipped += REPLAY

            def reset(self):
                fake.live -= 1

        @contextlib.contextmanager
        def stream(side):
            fake.on_side_stream = True
            try:
                yield
            finally:
                fake.on_side_stream = False

        def synchronize():
            assert not fake.capturing, 'waits for the device in a capture'
            fake.waits += 1

        def memory_stats():  # each call leaves 10 MB, and took as much besides
            fake.allocated += 10**7
            return {
                'requested_bytes.all.current': fake.allocated,
                'requested_bytes.all.peak': fake.allocated + 10**7,
            }

        self.on_side_stream, self.allocated = False, 0
        for name, value in dict(
            Event=Event,
            Stream=Stream,
            CUDAGraph=Graph,
            stream=stream,
            synchronize=synchronize,
            current_stream=Stream,
            is_available=lambda: True,
            device_count=lambda: 1,
            empty_cache=lambda: None,
            reset_peak_memory_stats=lambda: None,
            get_device_name=lambda: 'a fake GPU',
            memory_stats=memory_stats,
        ).items():
            monkeypatch.setattr(torch.cuda, name, value)

        class Generator:  # a class: annotations name it
            def __new__(cls, device='cpu'):
                return generator(_on_cpu(device))

        monkeypatch.setattr(torch, 'Generator', Generator)
        monkeypatch.setattr(
            torch,
            'autocast',
            lambda device, *args, **kwargs: autocast(_on_cpu(device), *args, **kwargs),
        )
        monkeypatch.setitem(timing.COPIED, 'cuda', timing.COPIED['cpu'])
        self.mode = _OnCPU()
