"""SSDLite-MobileNetV2 as a whole: training step and inference with each norm."""

import contextlib
import copy

import torch
from torch import nn

from ..provenance import ROOT
from . import parity
from .rows import beside_bn, divide, make_row
from .timing import GraphError, allocations, alternate, gpu_alone
from .variants import BN, DN, FOLDED, GN, Setting, Variant, wake

CONFIG = ROOT / 'configs' / 'ssdlite_mbv2_bn_coco.py'


class Detectors:
    """SSDLite-MobileNetV2 with each norm, all with the same weights, and inputs for it.

    Args:
        variants: which norms, `BN` among them.
        config: of the detector with BatchNorm.
        size (int): of the square images.
    """

    def __init__(self, setting: Setting, variants, config=CONFIG, size: int = 320):
        from ..environment import check_mmdet

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
        from ..convert import convert_norm, dn_layers

        model = copy.deepcopy(model)
        if variant.norm in DN:
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
            self.setting.device, memory_format=self.setting.format
        )

    def _samples(self, batch):
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        shape = (self.size, self.size)
        boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.2, 0.9, 0.9]]) * self.size
        truth = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1])).to(self.setting.device)
        sample = DetDataSample(
            gt_instances=truth,
            metainfo=dict(
                img_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1, 1)
            ),
        )
        return [sample] * batch

    def check(self, batch: int) -> None:
        """Raises ParityError where a DN detector is further from float64 than plain PyTorch.

        That is the reference in the same precision, whose error this deep network
        amplifies as much. Gradients are compared in float32 whatever the setting: those of
        float16, without a gradient scaler, are noise where a map has few values. What a
        layer's backward does in float16 is for `check_layers`.
        """
        images, samples = self.images(batch), self._samples(batch)
        settings = [(self.setting._replace(dtype=torch.float32), True)]
        if self.setting.dtype != torch.float32:
            settings.append((self.setting, False))
        for norm in sorted({v.norm for v in self.models} & set(DN)):
            reference = self._variant(self.models[BN], Variant(norm, 'reference'))
            exact = _results(
                copy.deepcopy(reference).double(), images.double(), samples, None, gradient=True
            )
            for setting, gradient in settings:
                plain = _results(copy.deepcopy(reference), images, samples, setting, gradient)
                allowed = {}
                for name, value in plain.items():
                    tolerance = (
                        parity.DETECTOR_GRADIENT_TOLERANCE
                        if name == 'gradient'
                        else parity.DETECTOR_TOLERANCE[setting.dtype]
                    )
                    allowed[name] = max(tolerance, 2 * parity.relative_error(value, exact[name]))
                for variant, model in self.models.items():
                    if variant.norm == norm and variant.backend != 'reference':
                        actual = _results(copy.deepcopy(model), images, samples, setting, gradient)
                        where = f'SSDLite, {variant.label}, {setting}'
                        parity.check_all(actual, exact, allowed, where)

    def measure(self, task: str, batch: int, failures: list | None = None) -> list[dict]:
        """Rows of the time of a training step or of inference, and of a step's peak memory.

        Args:
            failures: takes a sentence for each thing that was not measured.
        """
        failures = [] if failures is None else failures
        images, samples = self.images(batch), self._samples(batch)
        variants = [v for v in self.models if task == 'inference' or v != FOLDED]
        models = {v: copy.deepcopy(self.models[v]).train(task == 'train') for v in variants}
        calls = {v: self._call(model, images, samples, task) for v, model in models.items()}
        peaks = {v: self._peak_memory(models[v], calls[v]) for v in variants if task == 'train'}
        seconds = alternate(calls, self.setting)
        rows = []
        for variant, values in seconds.items():
            at = dict(part='detector', task=task, batch=batch, variant=variant, map=self.size)
            rows += beside_bn(at, 'time', 's', values, seconds[BN])
            if FOLDED in seconds and variant != FOLDED:
                rows.append(make_row(at, 'time', 'of BN folded', divide(values, seconds[FOLDED])))
            if variant in peaks:
                rows += beside_bn(at, 'peak memory', 'bytes', [peaks[variant]], [peaks[BN]])
        if self.setting.device == 'cuda':
            if task == 'train':  # the losses wait for the GPU, which no graph can
                measure = 'GPU time without losses'
                calls = {v: self._without_losses(model, images) for v, model in models.items()}
            else:
                measure = 'GPU time'
            try:
                alone = gpu_alone(calls, self.setting, repeats=1)
            except GraphError as error:
                alone = {}
                failures.append(
                    f'SSDLite, {task}, batch {batch}, {self.setting}, {measure} of '
                    f'{error.key.label}: not captured in a CUDA graph: {error}'
                )
            for variant, values in alone.items():
                at = dict(part='detector', task=task, batch=batch, variant=variant, map=self.size)
                rows += beside_bn(at, measure, 's', values, alone[BN])
        return rows

    def _peak_memory(self, model, train):
        """The most bytes that are allocated at once in a training step."""
        train()  # makes the momentum, which is held from then on
        model.zero_grad(set_to_none=True)
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        momentum = sum(p.nbytes for p in model.parameters())
        return allocations(train, self.setting.device)[2] + held + momentum

    def _without_losses(self, model, images):
        parameters = list(dict(model.named_parameters()).values())

        def train():
            with self.setting.autocast():
                outputs = [t for level in model(images, mode='tensor') for t in level]
            torch.autograd.grad(outputs, parameters, [torch.ones_like(t) for t in outputs])

        return train

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


def _results(model, images, samples, setting, gradient):
    """What inference and a training step give, by name; with a setting, in its autocast.

    Convolutions are exact to the precision: TF32 has the mantissa of float16.
    """
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with setting.autocast() if setting else contextlib.nullcontext():
            with torch.no_grad():
                outputs = model.eval()(images, mode='tensor')
            losses = model.train()(images, samples, mode='loss')
        found = dict(
            inference=torch.cat([t.flatten() for level in outputs for t in level]),
            loss=_total(losses).detach(),
        )
        if gradient:
            gradients = torch.autograd.grad(
                _total(losses), list(dict(model.named_parameters()).values())
            )
            found['gradient'] = torch.cat([g.flatten() for g in gradients])
        return found
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def _total(losses):
    """The sum of a detector's losses, each a tensor or one for each level."""
    return sum(loss if torch.is_tensor(loss) else sum(loss) for loss in losses.values())


def _replace_by_group_norm(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(8, child.num_features))
