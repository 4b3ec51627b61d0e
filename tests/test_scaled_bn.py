"""ScaledBN is BatchNorm, and its weight and bias learn at another rate."""

import pytest
import torch
from mmengine.hub import get_config
from mmengine.optim import OneCycleLR
from mmengine.registry import MODELS, init_default_scope
from test_convert import used
from torch import nn

from dn_mmdet import DNB, ScaledBN
from dn_mmdet.convert import convert_norm
from dn_mmdet.fold import fold_norm


def exact(layer):
    """In float64, where the start is not rounded to float32."""
    layer.double().u.data.fill_(1 / layer.k)
    return layer


def trained_beside_batch_norm(rate, optimizer, factor, **options):
    """ScaledBN, and a BatchNorm whose learning rate is ``factor`` times as high, after 3 steps."""
    scaled, bn = exact(ScaledBN(6, rate=rate)), nn.BatchNorm2d(6).double()
    steps = [
        (scaled, optimizer(scaled.parameters(), lr=0.01, **options)),
        (bn, optimizer(bn.parameters(), lr=0.01 * factor, **options)),
    ]
    for _ in range(3):
        x, dy = torch.randn(2, 4, 6, 5, 3, dtype=torch.float64)
        for layer, each in steps:
            each.zero_grad()
            layer(x).backward(dy)
            each.step()
    assert (bn.weight - 1).abs().max() > 0.01
    return scaled, bn


@pytest.mark.parametrize('momentum', [0.0, 0.9])
@pytest.mark.parametrize('rate', [3, 10, 30])
def test_scaled_bn_moves_as_batch_norm_at_that_rate_does(rate, momentum, close):
    scaled, bn = trained_beside_batch_norm(rate, torch.optim.SGD, rate, momentum=momentum)
    weight, bias = scaled.scale_and_shift()
    close(weight, bn.weight)
    close(bias, bn.bias)


@pytest.mark.parametrize('optimizer', [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize('rate', [3, 10, 30])
def test_with_adam_it_is_the_root_of_the_rate(rate, optimizer, close):
    scaled, bn = trained_beside_batch_norm(rate, optimizer, rate**0.5, eps=1e-30, weight_decay=0)
    weight, bias = scaled.scale_and_shift()
    close(weight, bn.weight)
    close(bias, bn.bias)


def test_weight_decay_of_scaled_bn_is_that_of_the_usual_rate(close):
    layer = exact(ScaledBN(6, rate=10))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.01)
    (0 * layer.u.sum() + 0 * layer.v.sum()).backward()
    optimizer.step()
    close(layer.scale_and_shift()[0], torch.full((6,), 1 - 0.1 * 0.01, dtype=torch.float64))


def test_lr_mult_does_nothing_under_one_cycle_and_so_is_written_into_the_layer():
    """The reason for `ScaledBN`."""
    groups = [dict(params=[nn.Parameter(torch.zeros(1))], lr=lr) for lr in (0.1, 1.0)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    OneCycleLR(optimizer, eta_max=0.1, total_steps=10)
    assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([0.1 / 25] * 2)


@pytest.mark.parametrize('strict', [True, False])
def test_a_batch_norm_checkpoint_loads_and_is_the_same(strict, close):
    source = used(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))).double().eval()
    model = nn.Sequential(nn.Conv2d(3, 6, 1), ScaledBN(6, rate=30)).double().eval()
    model.load_state_dict(source.state_dict(), strict=strict)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    close(model(x), source(x))
    again = nn.Sequential(nn.Conv2d(3, 6, 1), ScaledBN(6, rate=30)).double().eval()
    again.load_state_dict(model.state_dict())
    close(again(x), source(x))
    fold_norm(again)
    assert type(again[1]) is nn.BatchNorm2d
    close(again(x), source(x))


def test_its_inner_norm_is_not_converted():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), ScaledBN(6, rate=30), nn.BatchNorm2d(6))
    convert_norm(model, 'DNB')
    assert type(model[1].bn) is nn.BatchNorm2d and type(model[2]) is DNB
    with pytest.raises(ValueError, match='no BatchNorm to convert'):
        convert_norm(nn.Sequential(ScaledBN(6, rate=30)), 'DNB')


@pytest.mark.parametrize(
    'args, message',
    [
        (dict(rate=0), 'rate: expected a number above 0, got 0'),
        (dict(rate='3'), "got '3'"),
        (dict(rate=float('inf')), 'got inf'),
        (dict(rate=3, eps='1e-5'), 'eps must be positive'),
        (dict(rate=3, momentum='0.1'), 'momentum: expected a number or None'),
    ],
)
def test_arguments_out_of_range_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        ScaledBN(6, **args)


def test_a_config_may_name_it_where_it_was():
    assert MODELS.get('dn_mmdet.experiments.controls.ScaledBN') is ScaledBN


def test_a_detector_is_built_with_it_and_trained():
    init_default_scope('mmdet')
    cfg = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    cfg.model.backbone.update(
        init_cfg=None, norm_cfg=dict(type='ScaledBN', rate=30, requires_grad=True)
    )
    model = MODELS.build(cfg.model).train()
    layers = [module for module in model.modules() if isinstance(module, ScaledBN)]
    assert len(layers) == 20 and layers[0].bn.training is False  # norm_eval
    loss = sum(level.square().mean() for level in model.extract_feat(torch.randn(2, 3, 64, 64)))
    loss.backward()
    assert layers[-1].u.grad.any() and layers[-1].v.grad.any()
