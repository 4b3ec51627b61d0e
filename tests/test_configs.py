"""Every config: a diff of its BN twin in nothing but the norm, and it builds and trains."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dn_mmdet.convert import dn_layers
from dn_mmdet.layers import DynamicNorm

CONFIGS = Path(__file__).parents[1] / 'configs'
DATA = ('coco', 'voc07', 'voc07_128px', 'digits')
NORMS = ('dnb', 'dnc')
NORM_LAYERS = dict(coco=76, voc07=76, voc07_128px=66, digits=66)


def read(norm, data):
    return Config.fromfile(CONFIGS / f'ssdlite_mbv2_{norm}_{data}.py')


def build(cfg, dtype=torch.float32):
    init_default_scope('mmdet')
    return MODELS.build(cfg.model).to(dtype)


def flat(node, name=''):
    """{'model.neck.norm_cfg.type': 'BN', ...}"""
    if isinstance(node, dict):
        return {
            key: value
            for child in node
            for key, value in flat(node[child], f'{name}.{child}').items()
        }
    return {name[1:]: node}


def batch(model, size=96, dtype=torch.float32):
    """Two images with a box each, as a data loader gives them to the detector."""
    inputs = torch.randn(2, 3, size, size, dtype=dtype)
    samples = []
    for label in (0, 1):
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(size, size), pad_shape=(size, size), batch_input_shape=(size, size)
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[8.0, 16.0, 64.0, 80.0]]), labels=torch.tensor([label])
        )
        samples.append(sample)
    return inputs, samples


@pytest.mark.parametrize('data', DATA)
@pytest.mark.parametrize('norm', NORMS)
def test_twins_differ_in_nothing_but_the_norm(norm, data):
    bn, dn = flat(dict(read('bn', data))), flat(dict(read(norm, data)))
    differing = {key: dn.get(key) for key in bn.keys() | dn.keys() if bn.get(key) != dn.get(key)}
    assert differing == {
        f'{place}norm_cfg.type': norm.upper()
        for place in ('', 'model.backbone.', 'model.neck.', 'model.bbox_head.')
    }
    for part in ('backbone', 'neck', 'bbox_head'):
        assert dn[f'model.{part}.norm_cfg.eps'] == 1e-3
        assert dn[f'model.{part}.norm_cfg.momentum'] == bn[f'model.{part}.norm_cfg.momentum']


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_line_1_names_the_parent(path):
    assert path.read_text().startswith('_base_ = ')


@pytest.mark.parametrize('data', DATA)
@pytest.mark.parametrize('norm', NORMS)
def test_every_norm_is_dynamic(norm, data):
    model = build(read(norm, data))
    dynamic = {name for name, module in model.named_modules() if isinstance(module, DynamicNorm)}
    plain = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    assert len(dynamic) == NORM_LAYERS[data]
    assert plain == {f'{name}.bn' for name in dynamic}


@pytest.mark.parametrize('norm', NORMS)
def test_a_fresh_dn_detector_computes_what_its_bn_twin_does(norm, close):
    """Also the gradients of all that they share.

    In training only those of the backbone: of two images on SSDLite's last, 1 x 1, maps
    BatchNorm's own gradient cancels to noise.
    """
    models = [build(read(name, 'coco'), torch.float64) for name in ('bn', norm)]
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    inputs, _ = batch(models[0], dtype=torch.float64)
    for training in (True, False):
        outputs = [model.train(training)(inputs, mode='tensor') for model in models]
        for bn, dn in zip(*(scores + boxes for scores, boxes in outputs), strict=True):
            close(dn, bn)
        gradients = []
        for model in models:
            model.zero_grad()
            maps = model.backbone(inputs) if training else sum(model(inputs, mode='tensor'), [])
            sum(map(torch.sum, map(torch.sin, maps))).backward()
            gradients.append(
                {
                    name.replace('.bn.bn.', '.bn.'): parameter.grad
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
            )
        assert len(gradients[0]) == (156 if training else 252)
        for name, gradient in gradients[0].items():
            scale = gradient.abs().max().clamp(min=1)
            close(gradients[1][name] / scale, gradient / scale)


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('ssdlite_*.py')), ids=lambda path: path.stem)
def test_builds_and_trains(path):
    model = build(Config.fromfile(path))
    model.init_weights()
    for layer in dn_layers(model).values():
        nn.init.constant_(layer.sc.b_in, 2)  # two images of noise can leave all units at zero
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs, samples = batch(model)
    for _ in range(2):  # SC's first linear has a gradient from the second step on
        optimizer.zero_grad()
        loss, _ = model.parse_losses(model(inputs, samples, mode='loss'))
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    still = [
        name for name, parameter in model.backbone.named_parameters() if not parameter.grad.any()
    ]
    assert not still


def test_no_digit_is_mirrored():
    assert 'Flip' not in read('bn', 'digits').pretty_text
