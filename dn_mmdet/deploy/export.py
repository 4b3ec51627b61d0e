"""A detector as one ONNX graph: images in; boxes, scores and labels out, or the head's outputs.

Its norm layers become few plain operators (simplify.py), for a target.
"""

import collections
import copy
import importlib.util
import math
import platform
import time
import warnings
from typing import Any, NamedTuple

import cv2
import mmcv
import numpy as np
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from ..convert import dn_layers
from ..files import replacing
from ..fold import put
from ..messages import ConfigError
from ..provenance import cpu_name
from . import simplify
from .export_heads import kind_of, onnx_non_max_suppression

OUTPUTS = ('boxes', 'scores', 'labels')
PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
OPSET = 18
# Of the head's outputs in onnxruntime, which are computed in float32 from the same weights.
TOLERANCE = 1e-4


def check_installed() -> None:
    """Raises ConfigError where a package that exporting needs is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f'ONNX export needs {", ".join(missing)}, not installed here: in a '
            f"clone of dn_mmdet run `pip install --no-build-isolation -e '.[export]'`"
        )


class Detector(nn.Module):
    """What a detector computes from pixels to boxes, without data structures.

    Args:
        model: an mmdet detector: single-stage, or Faster R-CNN.
        size: (height, width) of the images.
        raw: give the head's own outputs alone.

    Shape:
        - images: (N, 3, H, W), float, pixels from 0 to 255 in the channel order in
          which mmdet reads files (BGR)
        - boxes: (N, K, 4) as (x1, y1, x2, y2) in pixels of the image; scores (N, K);
          labels (N, K). By descending score; K is ``test_cfg.max_per_img``, and what
          is left over has score 0, label -1 and a box of zeros. Not of heads whose
          decoding is not written here (`RawOutputs`)
        - the head's own outputs, named in ``raw_names``: class_scores (N, anchors,
          classes), box_deltas (N, anchors, 4), and others by the kind of head

    Raises:
        ConfigError: a detector of another kind, or images that the detector would pad.
    """

    head: Any  # of the kinds in `export_heads`
    raw_names: tuple[str, ...]

    def __init__(self, model: nn.Module, size: tuple[int, int], raw: bool = False):
        super().__init__()
        kind = kind_of(model)
        self.model = model
        self.eval()
        self.size = tuple(size)
        preprocessor: Any = model.data_preprocessor
        if not isinstance(preprocessor, DetDataPreprocessor):
            raise ConfigError(
                f'model.data_preprocessor: expected a DetDataPreprocessor, which says how the '
                f'pixels are normalised, got {type(preprocessor).__name__}'
            )
        divisor = preprocessor.pad_size_divisor
        if any(side % divisor for side in size):
            raise ConfigError(
                f'--size: expected multiples of {divisor}, to which this detector '
                f'pads its images, got {tuple(size)}'
            )
        self.head = kind(model, self.size)
        self.head.check(raw)
        self.outputs = OUTPUTS if self.head.detect and not raw else ()
        self.raw_names = self.head.raw_names

    def forward(self, images: Tensor):
        raw = self.raw(images)
        detections = self.head.detect(*raw) if self.outputs else ()
        return *detections, *raw

    def raw(self, images):
        return self.head.raw(normalised(images, self.model.data_preprocessor))


def normalised(images: Tensor, preprocessor: Any) -> Tensor:
    """Images (N, 3, H, W) of pixels as mmdet's preprocessor hands them to the backbone."""
    if preprocessor._channel_conversion:  # by slices: few runtimes have indexing
        images = torch.cat((images[:, 2:], images[:, 1:2], images[:, :1]), dim=1)
    if preprocessor._enable_normalize:
        images = (images - preprocessor.mean) / preprocessor.std
    return images


class RawDetector(nn.Module):
    """The head's outputs of a `Detector` alone."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector
        self.size = detector.size
        self.outputs, self.raw_names = (), detector.raw_names

    def forward(self, images):
        return self.detector.raw(images)


def export(detector: Detector, path, target: str = 'portable') -> simplify.Simplified:
    """Writes the ONNX file, with all outputs of the module.

    Of any number of images for ``'portable'``, of one for ``'onnxruntime'``. Returns what
    became of the norms.
    """
    simple = simplify.simplified(detector, torch.zeros(1, 3, *detector.size), target)
    write(
        simple.model,
        torch.zeros(2 if target == 'portable' else 1, 3, *detector.size),
        path,
        [*detector.outputs, *detector.raw_names],
    )
    return simple


def write(model: nn.Module, images: Tensor, path, output_names) -> None:
    """Writes a simplified module; for any number of images, if the example has several."""
    import onnxscript.optimizer

    for module in model.modules():
        if isinstance(module, simplify.PortableDN):
            module.is_one_operator = True
    dynamic = ({0: torch.export.Dim('batch')} if len(images) > 1 else None,)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch's, about torch's own classes
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=['images'],
            output_names=output_names,
            dynamic_shapes=dynamic,
            verbose=False,
            optimize=False,
            custom_translation_table={
                torch.ops.dn_mmdet.simple_norm.default: simplify.onnx_simple_norm,
                torch.ops.dn_mmdet.non_max_suppression.default: onnx_non_max_suppression,
            },
        )
        assert program is not None  # without a file name it returns one
        # Of torch's own optimizations those that matter; the others take a minute.
        onnxscript.optimizer.inline(program.model)
        onnxscript.optimizer.fold_constants(program.model)
        onnxscript.optimizer.remove_unused_nodes(program.model)
    program.save(path)


def keep_outputs(path, out, names=OUTPUTS) -> None:
    """Writes the graph at ``path`` with some of its outputs to ``out``, whole or not at all.

    What only the other outputs need is left out.
    """
    import onnx
    import onnxscript.optimizer

    model = onnx.load(path)
    for output in [output for output in model.graph.output if output.name not in names]:
        model.graph.output.remove(output)
    onnxscript.optimizer.remove_unused_nodes(model)
    onnx.checker.check_model(model)
    with replacing(out) as part:
        onnx.save(model, part)


def operators(path) -> dict[str, int]:
    """How often a file has each operator."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    return dict(collections.Counter(node.op_type for node in nodes))


def open_session(path, threads=1):
    """onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def read_images(paths, size) -> np.ndarray:
    """Image files as the graph takes them: (N, 3, H, W) float32, BGR, resized."""
    height, width = size
    images = []
    for path in paths:
        try:
            pixels = mmcv.imread(str(path))
        except (OSError, cv2.error):  # the latter for an empty file
            pixels = None
        if pixels is None:
            raise ConfigError(f'{path}: cannot be read as an image; leave it out of --images')
        images.append(mmcv.imresize(pixels, (width, height)))
    return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32)


class Agreement(NamedTuple):
    raw: float  # largest difference of the head's outputs, over the range of each
    matched: int  # detections that both give
    detections: int  # of mmdet; 0 where the file has none
    more: int  # detections that mmdet does not give

    def is_bad(self) -> bool:
        """Whether more detections of one side are others than agree; roundings change some."""
        return max(self.detections - self.matched, self.more) > self.matched


@torch.no_grad()
def compare(session, detector: Detector, images: np.ndarray) -> Agreement:
    """onnxruntime against mmdet itself, on images.

    A detection is matched by one of the same class whose score differs by less than
    1e-3 and whose corners by less than half a pixel. Of Faster R-CNN's outputs the RPN's
    are compared: which proposals follow is decided by roundings.
    """
    found = run(session, images)
    x = torch.from_numpy(images)
    expected = dict(zip(detector.raw_names, detector.raw(x), strict=True))
    raw = max(difference(found[name], expected[name].numpy()) for name in detector.head.FIRST)
    matched = total = more = 0
    for index, sample in enumerate(_mmdet_predictions(detector, x) if detector.outputs else ()):
        mine = sample.pred_instances.numpy()
        total += len(mine.scores)
        same = (
            (found['labels'][index][:, None] == mine.labels)
            & (np.abs(found['scores'][index][:, None] - mine.scores) < 1e-3)
            & (np.abs(found['boxes'][index][:, None] - mine.bboxes).max(-1) < 0.5)
        )
        matched += int(same.any(0).sum())
        more += int(((found['scores'][index] > 0) & ~same.any(1)).sum())
    return Agreement(raw, matched, total, more)


def run(session, images: np.ndarray) -> dict[str, np.ndarray]:
    """A session's outputs by name, of images at once, or one by one where it takes one."""
    batch = session.get_inputs()[0].shape[0]
    pieces = np.split(images, len(images)) if batch == 1 else [images]
    found = [session.run(None, dict(images=piece)) for piece in pieces]
    names = [output.name for output in session.get_outputs()]
    return {
        name: np.concatenate(outputs)
        for name, outputs in zip(names, zip(*found, strict=True), strict=True)
    }


def difference(found, expected):
    """The largest, over the range of what was expected; an output that is all one value by it.

    Infinite where one is no number.
    """
    scale = np.ptp(expected) or max(np.abs(expected).max(), 1)
    error = float(np.abs(found - expected).max() / scale)
    return math.inf if math.isnan(error) else error  # max() of several would pass over a NaN


def batch_of(images: torch.Tensor) -> dict:
    """What mmdet's detectors take from a data loader, of images that nothing has resized."""
    size = tuple(images.shape[2:])
    meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    samples = [DetDataSample(metainfo=dict(meta, img_id=i)) for i in range(len(images))]
    return dict(inputs=list(images), data_samples=samples)


def _mmdet_predictions(detector, images):
    return detector.model.test_step(batch_of(images))


def latency(session, image: np.ndarray, runs: int = 50, warm_up: int = 5) -> list[float]:
    """Milliseconds of each run, of one image."""
    feed = {session.get_inputs()[0].name: image[:1]}
    times = []
    for _ in range(warm_up + runs):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(1e3 * (time.perf_counter() - start))
    return times[warm_up:]


def folded_twin(model: nn.Module) -> nn.Module:
    """The same detector with BatchNorm in the place of its DN layers, SC left out.

    What MMDetection would run for a BatchNorm detector; for comparing latencies.
    """
    twin = copy.deepcopy(model)
    for name, layer in dn_layers(twin).items():
        put(twin, name, layer.bn)
    return twin


def versions() -> str:
    import onnxruntime

    return (
        f'onnxruntime {onnxruntime.__version__} on the CPU, one thread, torch '
        f'{torch.__version__}, {platform.machine()}, {cpu_name()}'
    )
