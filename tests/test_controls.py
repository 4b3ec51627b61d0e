"""The controls: each is what its equation says, starts as BatchNorm and learns as it should."""

import copy

import pytest
import torch
from conftest import awake
from mmengine.registry import MODELS
from torch import nn

from dn_mmdet import DNB, ScaledBN
from dn_mmdet.convert import batch_norms, dn_layers
from dn_mmdet.experiments.ablation import VariantSC
from dn_mmdet.experiments.controls import StaticDN
from dn_mmdet.experiments.recording import norm_counts

STATIC = [
    dict(rank='full'),
    dict(rank='low'),
    dict(rank='full', bound=None),
    dict(rank='low', affine=False),
]


class ConstantSC(nn.Module):
    """g and h that depend on nothing, in SC's place."""

    inputs, bound, num_features = 'raw', 0.25, 6

    def __init__(self, g, h):
        super().__init__()
        self.g, self.h = nn.Parameter(g), nn.Parameter(h)

    def forward(self, mean, std):
        return self.g.expand(len(mean), -1), self.h.expand(len(mean), -1)


def moved(layer):
    """The layer away from its start, statistics too."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        layer.bn.running_mean.normal_()
        layer.bn.running_var.uniform_(0.5, 2)
    return layer


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'make',
    [lambda args=args: StaticDN(6, **args) for args in STATIC] + [lambda: ScaledBN(6, rate=10)],
)
def test_a_fresh_control_is_batch_norm(make, training, close):
    layer, bn = make().train(training), nn.BatchNorm2d(6).train(training)
    x = 3 * torch.randn(4, 6, 5, 3) + 1
    close(layer(x), bn(x))
    for name, buffer in bn.named_buffers():
        assert torch.equal(getattr(layer.bn, name), buffer)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('rank', ['full', 'low'])
def test_static_dn_is_dn_b_with_a_constant_in_scs_place(rank, training, close):
    layer = moved(StaticDN(6, rank=rank)).double().train(training)
    out = layer.b_out if rank == 'full' else layer.w_out @ layer.r + layer.b_out
    g, h = (0.25 * torch.tanh(out)).detach().chunk(2)
    dnb = DNB(6, backend='reference').double().train(training)
    dnb.sc = ConstantSC(g, h)
    dnb.bn.load_state_dict(layer.bn.state_dict())
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    dy = torch.randn_like(x)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    for module, given in ((layer, xs[0]), (dnb, xs[1])):
        y = module(given)
        close(y, layer_output(module, given, g, h))
        y.backward(dy)
    close(xs[0].grad, xs[1].grad)
    close(layer.bn.weight.grad, dnb.bn.weight.grad)
    close(layer.bn.bias.grad, dnb.bn.bias.grad)
    slope = 0.25 * (1 - torch.tanh(out.detach()) ** 2)
    close(layer.b_out.grad, slope * torch.cat((dnb.sc.g.grad, dnb.sc.h.grad)))
    close(layer.bn.running_var, dnb.bn.running_var)


def layer_output(module, x, g, h):
    """(1 + g) z + h with z from a copy of the inner norm."""
    z = copy.deepcopy(module.bn)(x)
    return (1 + g[:, None, None]) * z + h[:, None, None]


def test_low_rank_gradients_by_hand(close):
    layer = moved(StaticDN(6, rank='low', bound=None)).double()
    assert layer.w_out.shape == (12, 8) and layer.r.shape == (8,)
    x, dy = torch.randn(2, 4, 6, 5, 3, dtype=torch.float64)
    layer(x).backward(dy)
    close(layer.w_out.grad, torch.outer(layer.b_out.grad, layer.r.detach()))
    close(layer.r.grad, layer.w_out.detach().T @ layer.b_out.grad)
    assert layer.b_out.grad.all()


def test_every_parameter_of_a_static_layer_learns():
    for args in STATIC:
        layer = moved(StaticDN(6, **args))
        layer(torch.randn(4, 6, 5, 3)).square().sum().backward()
        assert all(p.grad.any() for p in layer.parameters()), args


def test_initialisers_leave_the_controls_as_they_are():
    from mmengine.model import BaseModule

    class Model(BaseModule):
        def __init__(self, norm):
            super().__init__(init_cfg=dict(type='Constant', val=7, layer=['_BatchNorm']))
            self.norm = norm

    scaled, static = ScaledBN(6, rate=10), StaticDN(6, rank='low')
    for layer in (scaled, static):
        before = {k: v.clone() for k, v in layer.named_parameters() if not k.startswith('bn.')}
        Model(layer).init_weights()
        assert before and all(
            torch.equal(dict(layer.named_parameters())[k], v) for k, v in before.items()
        )


@pytest.mark.parametrize('training', [True, False])
def test_the_other_samples_statistics_are_used_in_training_and_in_eval(training, close):
    layer = awake(DNB(6, sc=dict(type=VariantSC, sample='other'))).double().train(training)
    own = DNB(6, backend='reference').double().train(training)
    own.load_state_dict(layer.state_dict())
    x = torch.randn(5, 6, 5, 3, dtype=torch.float64)
    m, s = x.mean((2, 3)), (x.var((2, 3), correction=0) + layer.eps).sqrt()
    g, h = own.sc(m, s)
    z = copy.deepcopy(layer.bn)(x)
    wanted = torch.stack(
        [
            (1 + g[other, :, None, None]) * z[n] + h[other, :, None, None]
            for n, other in enumerate((2, 3, 4, 0, 1))
        ]
    )
    close(layer(x), wanted)
    assert (layer(x) - own(x)).abs().max() > 0.01
    own.load_state_dict(layer.state_dict())
    close(layer.eval()(x[:1]), own.eval()(x[:1]))  # alone: its own statistics


def test_an_image_does_not_change_its_own_scale_and_shift_when_the_others_is_used():
    sc = awake(VariantSC(6, sample='other'))
    mean, std = torch.randn(2, 4, 6).unbind()
    changed = mean.clone()
    changed[1] += 1
    differs = (sc(changed, std)[0] != sc(mean, std)[0]).any(1)
    assert differs.tolist() == [False, False, False, True]  # 3 uses 3 + 2 mod 4


def test_part_of_a_model_is_converted_and_keeps_its_names():
    """What the presets that ask "where" do, and options of the model around it."""

    @MODELS.register_module(force=True)
    class Toy(nn.Module):
        def __init__(self, width, extra=None):
            super().__init__()
            self.extra = extra
            self.depthwise_conv = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
            self.linear_conv = nn.Sequential(nn.Conv2d(width, 3, 1), nn.BatchNorm2d(3))

    try:
        cfg = dict(
            type='PartlyConverted', part=dict(type='Toy', width=4), norm='DNB', only='*depthwise*'
        )
        model = MODELS.build(dict(cfg, extra='given'))
        assert type(model) is Toy and model.extra == 'given'
        assert list(dn_layers(model)) == ['depthwise_conv.1']
        assert list(batch_norms(model)) == ['linear_conv.1']
        with pytest.raises(ValueError, match='nowhere'):
            MODELS.build(dict(cfg, only='nowhere'))
    finally:
        MODELS.module_dict.pop('Toy')


def test_arguments_out_of_range_are_named():
    with pytest.raises(ValueError, match="rank: expected 'full' or 'low', got 'none'"):
        StaticDN(6, rank='none')


def test_controls_are_counted_by_their_names():
    model = nn.Sequential(StaticDN(4), nn.BatchNorm2d(4), ScaledBN(4, rate=3), StaticDN(4), DNB(4))
    assert norm_counts(model) == dict(BN=1, DNB=1, ScaledBN=1, StaticDN=2)
