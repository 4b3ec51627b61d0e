"""A detector's head outputs in several inference runtimes: right, and how fast.

Each runtime is one class: it converts a model, and runs it on one thread.
"""

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..fold import calibrate, measure, replace_layers, values_of_maps
from . import export, simplify

FIELDS = ('runtime', 'version', 'model', 'ms', 'ratio', 'error')
REFERENCE = 'BN, folded'


class Row(NamedTuple):
    """One model in one runtime."""

    runtime: str
    version: str
    model: str
    ms: float  # CPU time of an image, median
    ratio: float  # to `REFERENCE` in the same round, median
    error: float  # of the head's outputs, largest, over their range


class Runtime:
    """Converts a `RawDetector` and gives a call that runs it.

    Args:
        detector: a `export.RawDetector`.
        folder: for files.
    """

    package: str
    needs: tuple[str, ...] = ()  # modules
    target = 'portable'

    @classmethod
    def version(cls):
        return importlib.metadata.version(cls.package)

    @classmethod
    def missing(cls):
        return [name for name in cls.needs if importlib.util.find_spec(name) is None]

    def prepare(self, detector, folder: Path):
        """A function: images (1, 3, H, W), float32 -> a list of arrays."""
        raise NotImplementedError

    def onnx(self, detector, folder):
        """The detector's file, beside ``folder``, where another runtime may have written it."""
        path = folder.with_name(f'{folder.name}_{self.target}.onnx')
        if not path.exists():
            export.export(detector, path, self.target)
        return path


class Onnxruntime(Runtime):
    package, needs, target = 'onnxruntime', ('onnxruntime',), 'onnxruntime'

    def prepare(self, detector, folder):
        session = export.open_session(self.onnx(detector, folder))
        return lambda images: session.run(None, dict(images=images))


class OnnxruntimeDetections(Onnxruntime):
    """The whole detector, suppression and all; its head's outputs are what is compared."""

    def onnx(self, detector, folder):
        return super().onnx(detector.detector, folder.with_name(f'{folder.name}_detections'))

    def prepare(self, detector, folder):
        session = export.open_session(self.onnx(detector, folder))
        return lambda images: session.run(None, dict(images=images))[len(export.OUTPUTS) :]


class OpenVINO(Runtime):
    package, needs = 'openvino', ('openvino',)

    def prepare(self, detector, folder):
        import openvino

        core = openvino.Core()
        model = core.read_model(self.onnx(detector, folder))
        model.reshape([1, 3, *detector.size])
        compiled = core.compile_model(
            model,
            'CPU',
            dict(INFERENCE_NUM_THREADS=1, NUM_STREAMS=1, INFERENCE_PRECISION_HINT='f32'),
        )
        request = compiled.create_infer_request()

        def run(images):
            found = request.infer([images])
            return [found[output] for output in compiled.outputs]

        return run


class MNN(Runtime):
    package, needs = 'MNN', ('MNN', '_tools')

    def prepare(self, detector, folder):
        import MNN.nn as nn

        # Not MNN.tools, which installs a package by itself when it is imported.
        from _tools import mnnconvert

        path = folder / 'model.mnn'
        with _quiet():
            mnnconvert(
                [
                    '',
                    '-f',
                    'ONNX',
                    '--modelFile',
                    str(self.onnx(detector, folder)),
                    '--MNNModel',
                    str(path),
                    '--bizCode',
                    'x',
                ]
            )
            config = dict(precision='high', backend='CPU', numThread=1)
            runtime = nn.create_runtime_manager((config,))
            module = nn.load_module_from_file(
                str(path), ['images'], list(detector.raw_names), runtime_manager=runtime
            )
        import MNN.expr as expr

        def run(images):
            x = expr.placeholder(list(images.shape), expr.NCHW)
            x.write(images)
            outputs = module.forward([x])
            return [np.array(expr.convert(output, expr.NCHW).read()) for output in outputs]

        return run


class Ncnn(Runtime):
    package, needs = 'ncnn', ('ncnn', 'pnnx')

    def prepare(self, detector, folder):
        import ncnn
        import pnnx

        simple = simplify.simplified(_Levels(detector), torch.zeros(1, 3, *detector.size))
        x = torch.zeros(1, 3, *detector.size)
        with _quiet(), torch.no_grad():
            pnnx.export(simple.model, str(folder / 'model.pt'), (x,), fp16=False)
            number = len(simple.model(x))
        net = ncnn.Net()
        net.opt.num_threads = 1
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = False
        if net.load_param(str(folder / 'model.ncnn.param')) or net.load_model(
            str(folder / 'model.ncnn.bin')
        ):
            raise RuntimeError('ncnn does not load what pnnx wrote')

        def run(images):
            extractor = net.create_extractor()
            extractor.input('in0', ncnn.Mat(np.ascontiguousarray(images[0])))
            return [np.array(extractor.extract(f'out{i}')[1])[None] for i in range(number)]

        run.levels = True
        return run


class LiteRT(Runtime):
    package, needs = 'ai-edge-litert', ('ai_edge_litert', 'litert_torch')

    def prepare(self, detector, folder):
        import litert_torch
        from ai_edge_litert.interpreter import Interpreter

        x = torch.zeros(1, 3, *detector.size)
        simple = simplify.simplified(_Levels(detector), x)
        path = folder / 'model.tflite'
        with _quiet():
            litert_torch.convert(simple.model, (x,)).export(str(path))
        runner = Interpreter(model_path=str(path), num_threads=1).get_signature_runner()
        (name,) = runner.get_input_details()

        def run(images):
            found = runner(**{name: images})
            return [found[f'output_{i}'] for i in range(len(found))]

        run.levels = True
        return run


class ExecuTorch(Runtime):
    package, needs = 'executorch', ('executorch',)

    def prepare(self, detector, folder):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime as Loader

        x = torch.zeros(1, 3, *detector.size)
        simple = simplify.simplified(_Levels(detector), x)
        lowered = to_edge_transform_and_lower(
            torch.export.export(simple.model, (x,)), partitioner=[XnnpackPartitioner()]
        )
        buffer = lowered.to_executorch().buffer
        program = Loader.get().load_program(buffer)
        method = program.load_method('forward')

        def run(images):
            return [output.numpy() for output in method.execute([torch.from_numpy(images)])]

        run.levels, run.alive = True, (buffer, program)  # a method keeps neither
        return run


RUNTIMES: dict[str, type[Runtime]] = {
    'onnxruntime': Onnxruntime,
    'onnxruntime-detections': OnnxruntimeDetections,
    'openvino': OpenVINO,
    'litert': LiteRT,
    'ncnn': Ncnn,
    'mnn': MNN,
    'executorch': ExecuTorch,
}


class _Levels(nn.Module):
    """A detector's head outputs level by level, before they are joined.

    It holds mmdet's model alone: pnnx loses convolutions that two children have.
    """

    def __init__(self, detector):
        super().__init__()
        self.model = detector.detector.model

    def forward(self, images):
        images = export.normalised(images, self.model.data_preprocessor)
        return tuple(level for output in self.model(images, mode='tensor') for level in output)


@contextlib.contextmanager
def _quiet():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@torch.no_grad()
def models_of(
    detector: export.Detector, images: np.ndarray, folded: float = 0.5
) -> dict[str, nn.Module]:
    """The models to compare: with BatchNorm, with all layers dynamic, and with some folded.

    The largest maps are folded first, with g and h as they are for the images; what a
    trained model loses by that is for `tools/fold.py` to say.
    """
    outputs = calibrate(detector, [torch.from_numpy(images)])
    values = values_of_maps(detector, lambda: detector(torch.from_numpy(images[:1])))
    reached = [name for name in values if values[name]]
    order = sorted(reached, key=values.__getitem__, reverse=True)
    report = measure(detector, outputs)
    found = {REFERENCE: export.folded_twin(detector), 'dynamic': detector}
    for part in (folded, 1):
        number = round(part * len(order))
        new = copy.deepcopy(detector)
        replace_layers(new, outputs, report, kept=order[number:])
        found[f'{number} of {len(order)} folded'] = new
    return found


@torch.no_grad()
def measured(
    name: str,
    models: dict[str, export.Detector],
    images: np.ndarray,
    folder: Path,
    rounds: int = 40,
) -> list[Row]:
    """The rows of one runtime: every model once a round, in an order of chance, on one thread.

    CPU time and not the clock's is taken, so that other work on the machine counts less.
    """
    runtime = RUNTIMES[name]()
    calls, errors = {}, {}
    for number, (label, model) in enumerate(models.items()):
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        raw = export.RawDetector(model)
        call = runtime.prepare(raw, place)
        expected = (_Levels(raw) if getattr(call, 'levels', False) else raw)(
            torch.from_numpy(images)
        )
        errors[label] = max(
            export.difference(mine.reshape(right.shape), right.numpy())
            for mine, right in zip(call(images), expected, strict=True)
        )
        calls[label] = call
    times = {label: [] for label in calls}
    order = random.Random(0)
    for round_ in range(rounds + 3):
        for label, call in order.sample(list(calls.items()), len(calls)):
            start = time.process_time()
            call(images)
            if round_ >= 3:
                times[label].append(1e3 * (time.process_time() - start))
    return [
        Row(
            name,
            runtime.version(),
            label,
            statistics.median(taken),
            statistics.median(a / b for a, b in zip(taken, times[REFERENCE], strict=True)),
            errors[label],
        )
        for label, taken in times.items()
    ]
