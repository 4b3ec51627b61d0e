"""SC: what it computes, where it starts, what no framework's initialiser finds."""

import pytest
import torch
from conftest import awake
from torch import nn
from torch.nn.utils import prune

from dn_mmdet import SC


def test_hand_computed():
    sc = SC(1, min_channels=1, bound=None).double()
    for name, value in dict(
        w_in=[[2.0, -1.0]], b_in=[0.5], w_out=[[3.0], [-2.0]], b_out=[0.25, 1.0]
    ).items():
        getattr(sc, name).data = torch.tensor(value, dtype=torch.float64)
    mean, std = torch.tensor([[1.0], [-4.0]]).double(), torch.tensor([[0.5], [1.0]]).double()
    g, h = sc(mean, std)
    # hidden: relu(2 * 1 - 0.5 + 0.5) = 2 and relu(2 * -4 - 1 + 0.5) = 0
    assert g.tolist() == [[6.25], [0.25]]
    assert h.tolist() == [[-3.0], [1.0]]

    sc.bound = 0.5
    g, h = sc(mean, std)
    torch.testing.assert_close(g, 0.5 * torch.tanh(torch.tensor([[6.25], [0.25]]).double()))
    torch.testing.assert_close(h, 0.5 * torch.tanh(torch.tensor([[-3.0], [1.0]]).double()))


@pytest.mark.parametrize(
    'channels, reduction, min_channels, hidden',
    [
        (16, 32, 8, 8),
        (256, 32, 8, 8),
        (320, 32, 8, 10),
        (1280, 32, 8, 40),
        (64, 4, 8, 16),
        (3, 1, 1, 3),
    ],
)
def test_hidden_width(channels, reduction, min_channels, hidden):
    sc = SC(channels, reduction, min_channels)
    shapes = {name: tuple(p.shape) for name, p in sc.named_parameters()}
    assert shapes == dict(
        w_in=(hidden, 2 * channels),
        b_in=(hidden,),
        w_out=(2 * channels, hidden),
        b_out=(2 * channels,),
    )


def test_fresh_gives_exactly_zero_whatever_the_input():
    g, h = SC(16)(torch.randn(4, 16) * 1e6, torch.rand(4, 16) * 1e6)
    assert not g.any() and not h.any()


@pytest.mark.parametrize('bound', [0.25, 0.5, 1])
def test_outputs_stay_within_the_bound(bound):
    g, h = awake(SC(16, bound=bound), std=10)(torch.randn(8, 16) * 100, torch.rand(8, 16))
    assert bound / 2 < max(g.abs().max(), h.abs().max()) <= bound


def test_unbounded_outputs_exceed_any_bound():
    g, _ = awake(SC(16, bound=None), std=10)(torch.randn(8, 16) * 100, torch.rand(8, 16))
    assert g.abs().max() > 100


def test_every_parameter_has_a_gradient_by_the_second_step():
    sc = SC(16)
    optimizer = torch.optim.SGD(sc.parameters(), lr=1.0)
    mean, std, target = torch.randn(3, 8, 16).unbind()
    for _ in range(2):
        optimizer.zero_grad()
        g, h = sc(mean, std.abs())
        (g * target + h * target.roll(1)).sum().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in sc.parameters())


def test_gradcheck():
    sc = awake(SC(4, min_channels=3).double())
    mean, std = torch.randn(3, 4).double(), torch.rand(3, 4).double()
    names = list(dict(sc.named_parameters()))

    def forward(mean, std, *parameters):
        return torch.func.functional_call(
            sc, dict(zip(names, parameters, strict=True)), (mean, std)
        )

    inputs = [mean, std, *(p.detach() for p in sc.parameters())]
    assert torch.autograd.gradcheck(forward, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize('parameters', [torch.float16, torch.bfloat16])
def test_computes_in_the_statistics_dtype(parameters, close):
    sc = awake(SC(16)).to(parameters)
    mean, std = torch.randn(4, 16) * 1e5, torch.rand(4, 16) * 1e5  # beyond float16
    wide = SC(16).double()
    wide.load_state_dict(sc.state_dict())
    for got, exact in zip(sc(mean, std), wide(mean.double(), std.double()), strict=True):
        assert got.dtype == torch.float32
        close(got.double(), exact, torch.float32)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_does_not_narrow_it(dtype):
    sc = awake(SC(16))
    mean, std = torch.randn(4, 16) * 1e5, torch.rand(4, 16) * 1e5
    with torch.autocast('cpu', dtype):
        narrow = sc(mean, std)
    for got, expected in zip(narrow, sc(mean, std), strict=True):
        assert torch.equal(got, expected)


def test_holds_nothing_that_initialisers_look_for():
    sc = SC(16)
    assert not any(isinstance(m, (nn.Linear, nn.Conv2d)) for m in sc.modules())
    assert not {'weight', 'bias'} & set(dict(sc.named_parameters()))
    assert not hasattr(sc, 'weight') and not hasattr(sc, 'bias')


def test_identity_state_dict_is_identity_and_a_copy():
    sc = awake(SC(16))
    state = sc.identity_state_dict('a.sc.')
    assert set(state) == {f'a.sc.{name}' for name in sc.state_dict()}
    assert torch.equal(state['a.sc.w_in'], sc.w_in)
    assert not state['a.sc.w_out'].any() and not state['a.sc.b_out'].any()
    state['a.sc.w_in'].zero_()
    assert sc.w_in.any() and sc.w_out.any()


def test_a_state_that_something_else_computes_is_not_set_to_zero():
    """Spectral norm would divide zero by zero."""
    sc = torch.nn.utils.spectral_norm(awake(SC(16)), 'w_out')
    with pytest.raises(ValueError, match='remove_spectral_norm'):
        sc.identity_state_dict()
    state = prune.identity(awake(SC(16)), 'w_out').identity_state_dict()
    assert not state['w_out_orig'].any() and state['w_out_mask'].all()


class Shifted(SC):
    def forward(self, mean, std):
        g, h = super().forward(mean, std)
        return g, h + mean


def test_identity_is_asked_of_a_forward_of_its_own_and_of_hooks():
    assert SC(4).is_identity() and not awake(SC(4)).is_identity()
    assert not Shifted(4).is_identity()
    hooked = SC(4)
    hooked.register_forward_hook(lambda sc, args, out: (out[0] + 0.1, out[1]))
    assert not hooked.is_identity()


@pytest.mark.parametrize('name, value', [('bound', -1), ('bound', 0), ('inputs', 'raW')])
def test_settings_are_checked_when_they_are_changed(name, value):
    sc = SC(4)
    before = getattr(sc, name)
    with pytest.raises(ValueError, match=f'{name}: expected'):
        setattr(sc, name, value)
    assert getattr(sc, name) == before


@pytest.mark.parametrize(
    'bad, said',
    [
        (dict(num_features=0), 'num_features'),
        (dict(num_features='16'), 'num_features'),
        (dict(reduction=0), 'reduction'),
        (dict(reduction=1.5), 'reduction'),
        (dict(min_channels=0), 'min_channels'),
        (dict(inputs='standardised'), 'standardized'),
        (dict(bound=0), 'bound'),
        (dict(bound=-1), 'bound'),
        (dict(bound=float('nan')), 'bound'),
        (dict(bound='0.5'), 'bound'),
    ],
)
def test_bad_arguments_are_named(bad, said):
    with pytest.raises(ValueError, match=said):
        SC(**{'num_features': 16, **bad})


def test_extra_repr():
    assert repr(SC(64)) == "SC(64, hidden=8, inputs='raw', bound=0.25)"
