"""The ablation's variants of SC: each is what its name says, in every backend."""

import pytest
import torch
from conftest import awake

from dn_mmdet import DNB, DNC, SC
from dn_mmdet.experiments.ablation import CHOICES, VariantSC

CHANGES = [{name: value} for name, values in CHOICES.items() for value in values[1:]]


@pytest.mark.parametrize('statistics', ['mean', 'std'])
@pytest.mark.parametrize('hidden', ['plain', 'channelwise'])
def test_one_statistic_alone_is_all_that_its_outputs_depend_on(statistics, hidden):
    sc = awake(VariantSC(16, statistics=statistics, hidden=hidden))
    mean, std, other = torch.randn(3, 4, 16).unbind()
    changed = dict(mean=(mean, other), std=(other, std))[statistics]
    for before, after in zip(sc(mean, std), sc(*changed), strict=True):
        assert torch.equal(before, after)
    changed = dict(mean=(other, std), std=(mean, other))[statistics]
    assert not torch.equal(sc(mean, std)[0], sc(*changed)[0])


def test_scale_or_shift_alone_leaves_the_other_at_zero():
    statistics = torch.randn(2, 4, 16).unbind()
    for outputs, place in (('scale', 0), ('shift', 1)):
        sc = awake(VariantSC(16, outputs=outputs))
        assert sc.w_out.shape == (16, 8) and sc.b_out.shape == (16,)
        made = sc(*statistics)
        assert made[place].any() and not made[1 - place].any()
        assert all(t.shape == (4, 16) for t in made)


def test_the_default_choices_are_sc_itself():
    plain, variant = awake(SC(16)), VariantSC(16)
    variant.load_state_dict(plain.state_dict())
    for actual, expected in zip(
        variant(*torch.ones(2, 4, 16)), plain(*torch.ones(2, 4, 16)), strict=True
    ):
        assert torch.equal(actual, expected)


def test_2_sigmoid_1(close):
    sc, free = awake(VariantSC(16, bound=1.0, squash='sigmoid')), VariantSC(16, bound=None)
    free.load_state_dict(sc.state_dict())
    statistics = torch.randn(2, 4, 16).unbind()
    for made, raw in zip(sc(*statistics), free(*statistics), strict=True):
        close(made, 2 * torch.sigmoid(raw) - 1)


def test_normalised_hidden_units_forget_the_size_of_the_statistics(close):
    sc = awake(VariantSC(16, hidden='normalized', bound=None))
    sc.b_in.data.zero_()
    mean, std = torch.randn(4, 16), torch.rand(4, 16)
    for small, large in zip(sc(1e3 * mean, 1e3 * std), sc(1e6 * mean, 1e6 * std), strict=True):
        close(small, large)
    assert not torch.equal(sc(mean, std)[0], sc(std, mean)[0])


def test_channelwise_is_four_parameters_a_channel_and_each_channel_for_itself():
    sc = awake(VariantSC(16, hidden='channelwise'))
    assert sum(p.numel() for p in sc.parameters()) == 4 * 16
    mean, std = torch.randn(4, 16), torch.rand(4, 16)
    other = mean.clone()
    other[:, 3] += 1
    for before, after in zip(sc(mean, std), sc(other, std), strict=True):
        assert (before != after).any(0).nonzero().tolist() == [[3]]


def test_channelwise_by_hand():
    sc = VariantSC(1, hidden='channelwise', bound=None)
    sc.w_out.data = torch.tensor([[[2.0], [3.0]], [[-1.0], [0.5]]])
    g, h = sc(torch.tensor([[5.0]]), torch.tensor([[7.0]]))
    assert (g.item(), h.item()) == (31.0, -1.5)


def test_a_stopped_gradient_leaves_sc_to_train_and_the_statistics_alone():
    mean, std = (t.requires_grad_() for t in torch.rand(2, 4, 16).unbind())
    sc = awake(VariantSC(16, gradient='stopped'))
    sum(out.sum() for out in sc(mean, std)).backward()
    assert mean.grad is None and std.grad is None
    assert all(parameter.grad.any() for parameter in sc.parameters())


def test_default_init_does_not_start_at_batch_norm():
    layer = DNB(16, sc=dict(type=VariantSC, init='default'))
    limit = layer.sc.w_out.shape[1] ** -0.5
    assert 0.9 * limit < layer.sc.w_out.abs().max() <= limit
    x = torch.randn(4, 16, 5, 5)
    assert (layer(x) - layer.bn(x)).abs().max() > 0.01


@pytest.mark.parametrize('variant', CHANGES, ids=lambda v: '-'.join(*v.items()))
@pytest.mark.parametrize('kind', [DNB, DNC])
def test_trains_the_same_in_every_backend(kind, variant, close):
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    found = []
    for backend in ('reference', 'auto'):
        layer = kind(8, backend=backend, dtype=torch.float64, sc=dict(variant, type=VariantSC))
        if 'init' not in variant:
            close(layer(x), layer.bn(x))  # fresh
        torch.manual_seed(0)
        y = awake(layer)(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in layer.parameters())])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert expected.any()
        close(actual, expected)


@pytest.mark.parametrize('variant', CHANGES, ids=lambda v: '-'.join(*v.items()))
def test_a_batch_norm_checkpoint_loads_as_batch_norm(variant, close):
    bn = torch.nn.BatchNorm2d(16)
    layer = awake(DNB(16, sc=dict(variant, type=VariantSC)))
    layer.load_state_dict(bn.state_dict())
    x = torch.randn(4, 16, 5, 5)
    close(layer(x), bn(x))


@pytest.mark.parametrize('name', CHOICES)
def test_an_unknown_choice_is_named(name):
    with pytest.raises(ValueError, match=f'{name}: expected one of'):
        DNB(16, sc={'type': VariantSC, name: 'none'})


def test_an_argument_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match='outputz'):
        DNB(16, sc=dict(type=VariantSC, outputz='scale'))


def test_repr_shows_what_was_changed():
    assert repr(VariantSC(16, hidden='channelwise', outputs='both')) == (
        "VariantSC(16, inputs='raw', bound=0.25, parameters=64, hidden='channelwise')"
    )
