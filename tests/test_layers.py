"""DN-B and DN-C: the formula, its gradients, BatchNorm's state, and what is refused."""

import copy
import gc
import inspect
import io
import os
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import awake
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import mobilenet_v2

from dn_mmdet import DNB, DNC, SC, DNB1d, DNB3d, DNC1d, DNC3d, SyncDNB, SyncDNC

LAYERS = [DNB, DNC, DNB1d, DNC1d, DNB3d, DNC3d, SyncDNB, SyncDNC]
DN_C = (DNC, DNC1d, DNC3d, SyncDNC)
SHAPE = {DNB1d: (4, 6, 5), DNC1d: (4, 6, 5), DNB3d: (4, 6, 2, 3, 3), DNC3d: (4, 6, 2, 3, 3)}
# Every way in which statistics reach SC.
VARIANTS = [(DNB, 'raw'), (DNB, 'standardized'), (DNC, 'raw')]
# (keyword arguments, training): every way in which BatchNorm chooses statistics.
MODES = [
    (dict(), True),
    (dict(), False),
    (dict(track_running_stats=False), True),
    (dict(track_running_stats=False), False),
    (dict(momentum=None), True),
    (dict(affine=False), True),
    (dict(affine=False), False),
    (dict(affine=False, track_running_stats=False), True),
]


def batch(cls=DNB, dtype=torch.float64):
    shape = SHAPE.get(cls, (4, 6, 5, 3))
    scale = torch.rand(4, 6, *(1,) * (len(shape) - 2), dtype=dtype) * 3
    return torch.randn(shape, dtype=dtype) * scale + torch.randn_like(scale)


def trained(cls, num_features=6, **kwargs):
    """A float64 layer of which nothing is at its initial value."""
    layer = awake(cls(num_features, min_channels=5, **kwargs).double())
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    if layer.track_running_stats:
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


def by_numpy(layer, x):
    """The formula written out, one sample and channel at a time."""
    x, eps = x.numpy(), layer.eps
    num_samples, num_channels = x.shape[:2]
    values = x.reshape(num_samples, num_channels, -1)
    mean, std = values.mean(-1), np.sqrt(values.var(-1) + eps)
    if layer.training or layer.running_mean is None:
        mu, var = values.mean((0, 2)), values.var((0, 2))
    else:
        mu, var = layer.running_mean.numpy(), layer.running_var.numpy()
    sigma = np.sqrt(var + eps)
    w_in, b_in, w_out, b_out = (p.detach().numpy() for p in layer.sc.parameters())

    def sc(mean, std):
        hidden = np.maximum(w_in @ np.concatenate([mean, std]) + b_in, 0)
        out = w_out @ hidden + b_out
        out = out if layer.sc.bound is None else layer.sc.bound * np.tanh(out)
        return out[:num_channels], out[num_channels:]

    y = np.empty_like(values)
    for n in range(num_samples):
        if isinstance(layer, DN_C):
            g, h = sc(mu, sigma)
        elif layer.sc.inputs == 'raw':
            g, h = sc(mean[n], std[n])
        else:
            g, h = sc((mean[n] - mu) / sigma, std[n] / sigma - 1)
        for c in range(num_channels):
            z = (values[n, c] - mu[c]) / sigma[c]
            if layer.affine:
                z = layer.weight[c].item() * z + layer.bias[c].item()
            y[n, c] = (1 + g[c]) * z + h[c]
    return torch.from_numpy(y.reshape(x.shape))


def test_hand_computed(close):
    layer = DNB(1, eps=3.0, momentum=0.5, min_channels=1, bound=None).double()
    layer.weight.data.fill_(2.0)
    layer.bias.data.fill_(1.0)
    for name, value in dict(w_in=[[1.0, 1.0]], w_out=[[0.1], [1.0]], b_out=[0.0, -5.0]).items():
        getattr(layer.sc, name).data = torch.tensor(value, dtype=torch.float64)
    x = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]], dtype=torch.float64)
    # sample means 2 and 6, variances 1, s = 2; mu = 4, var = 1 + 4 = 5
    # hidden: 4 and 8; g = 0.4 and 0.8; h = -1 and 3
    z = 2 * (x - 4) / 8**0.5 + 1
    expected = torch.stack([1.4 * z[0] - 1, 1.8 * z[1] + 3])
    close(layer(x), expected)
    close(layer.running_mean, torch.tensor([2.0], dtype=torch.float64))
    # unbiased: 5 * 4 / 3; halfway from its start, 1
    close(layer.running_var, torch.tensor([0.5 + 10 / 3], dtype=torch.float64))

    layer.eval()
    z = 2 * (x - 2) / (layer.running_var.item() + 3) ** 0.5 + 1
    close(layer(x), torch.stack([1.4 * z[0] - 1, 1.8 * z[1] + 3]))


@pytest.mark.parametrize('kwargs, training', MODES)
@pytest.mark.parametrize('cls, inputs', VARIANTS)
def test_equals_the_formula_in_numpy(cls, inputs, kwargs, training, close):
    layer = trained(cls, inputs=inputs, **kwargs).train(training)
    x = batch()
    expected = by_numpy(layer, x)  # before the forward moves the running statistics
    close(layer(x), expected)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('cls', LAYERS)
def test_every_layer_equals_the_formula(cls, training, close):
    layer = trained(cls).train(training)
    x = batch(cls)
    expected = by_numpy(layer, x)
    close(layer(x), expected)


@pytest.mark.parametrize('bound', [0.1, None])
def test_bound_reaches_sc(bound, close):
    layer = trained(DNB, bound=bound)
    x = batch()
    expected = by_numpy(layer, x)
    close(layer(x), expected)


def test_1d_layers_take_vectors(close):
    for cls in (DNB1d, DNC1d, SyncDNB, SyncDNC):
        layer = trained(cls)
        x = batch()[..., 0, 0]
        expected = by_numpy(layer, x)
        close(layer(x), expected)


@pytest.mark.parametrize('kwargs, training', MODES)
@pytest.mark.parametrize('cls, inputs', VARIANTS)
def test_gradcheck_of_x_and_every_parameter(cls, inputs, kwargs, training):
    if kwargs.get('momentum', 0) is None:
        kwargs = {}  # the step of the averages has no part in the gradient
    layer = trained(cls, num_features=3, inputs=inputs, **kwargs).train(training)
    names = list(dict(layer.named_parameters()))
    assert len(names) == (6 if layer.affine else 4)
    frozen = {k: v.clone() for k, v in layer.named_buffers()}

    def forward(x, *parameters):
        state = {
            **dict(zip(names, parameters, strict=True)),
            **{k: v.clone() for k, v in frozen.items()},
        }
        return torch.func.functional_call(layer, state, (x,))

    x = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    inputs = [x, *(p.detach().clone() for p in layer.parameters())]
    assert torch.autograd.gradcheck(forward, [t.requires_grad_() for t in inputs])


def test_gradgradcheck():
    layer = trained(DNB, num_features=2, track_running_stats=False)
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize(
    'cls, batch_norm',
    [
        (DNB, nn.BatchNorm2d),
        (DNC, nn.BatchNorm2d),
        (DNB1d, nn.BatchNorm1d),
        (DNC1d, nn.BatchNorm1d),
        (DNB3d, nn.BatchNorm3d),
        (DNC3d, nn.BatchNorm3d),
        (SyncDNB, nn.BatchNorm2d),
        (SyncDNC, nn.BatchNorm2d),
    ],
)
def test_fresh_layer_is_batch_norm(cls, batch_norm, close):
    bn = batch_norm(6, eps=1e-3, momentum=0.03).double()
    nn.init.uniform_(bn.weight)
    nn.init.normal_(bn.bias)
    layer = cls(6, eps=1e-3, momentum=0.03).double()
    layer.load_state_dict(bn.state_dict())
    for training in (True, False):
        bn.train(training)
        layer.train(training)
        x = batch(cls).requires_grad_()
        x2 = x.detach().clone().requires_grad_()
        weight = torch.randn_like(x)
        close(layer(x), bn(x2))
        (layer(x) * weight).sum().backward()
        (bn(x2) * weight).sum().backward()
        close(x.grad, x2.grad)
        close(layer.weight.grad, bn.weight.grad)
        close(layer.bias.grad, bn.bias.grad)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(momentum=0.03),
        dict(momentum=None),
        dict(momentum=0.0),
        dict(momentum=1.0),
        dict(affine=False),
    ],
)
@pytest.mark.parametrize('cls', [DNB, DNC, SyncDNB])
def test_running_statistics_follow_batch_norm(cls, kwargs, close):
    layer, bn = trained(cls, **kwargs), nn.BatchNorm2d(6, **kwargs).double()
    for running in ('running_mean', 'running_var'):
        getattr(bn, running).copy_(getattr(layer, running))
    for size in (2, 5, 1, 3):
        x = torch.randn(size, 6, size, 3, dtype=torch.float64) * size + 1
        layer(x)
        bn(x)
        layer.eval()(x)  # changes nothing
        layer.train()
    close(layer.running_mean, bn.running_mean)
    close(layer.running_var, bn.running_var)
    assert layer.num_batches_tracked == bn.num_batches_tracked == 4


@pytest.mark.parametrize('inputs', ['raw', 'standardized'])
def test_dnb_in_eval_gives_a_sample_what_it_gives_it_alone(inputs, close):
    layer = trained(DNB, inputs=inputs).eval()
    x = batch()
    close(layer(x), torch.cat([layer(sample[None]) for sample in x]))


def test_the_mode_that_counts_is_the_inner_batch_norms(close):
    layer = trained(DNB)
    layer.bn.eval()
    before = copy.deepcopy(layer.state_dict())
    x = batch()
    close(layer(x), copy.deepcopy(layer).eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize('cls, inputs', VARIANTS)
def test_every_sc_parameter_learns_by_the_second_step(cls, inputs):
    layer = cls(16, inputs=inputs)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, weight = torch.randn(2, 8, 16, 4, 4).unbind()
    for step in range(2):
        optimizer.zero_grad()
        (layer(x) * weight).sum().backward()
        optimizer.step()
        if step == 0:  # the last linear is zero and lets nothing through to the first
            assert not layer.sc.w_in.grad.any()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.any(), name


@pytest.mark.parametrize('cls', LAYERS)
def test_state_dict_round_trip(cls, close):
    layer, other = trained(cls), cls(6, min_channels=5).double()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = batch(cls)
    assert torch.equal(other(x), layer(x))
    assert list(layer.state_dict()) == [
        'sc.w_in',
        'sc.b_in',
        'sc.w_out',
        'sc.b_out',
        'bn.weight',
        'bn.bias',
        'bn.running_mean',
        'bn.running_var',
        'bn.num_batches_tracked',
    ]


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_alone(copied):
    layer = trained(DNB, bn_requires_grad=False)
    other = copied(layer)
    x = batch()
    assert torch.equal(other(x), layer(x))
    assert not other.bn.weight.requires_grad and other.sc.w_in.requires_grad
    # the checkpoint hook belongs to the copy, not to the original
    other.load_state_dict(nn.BatchNorm2d(6).double().state_dict())
    assert not other.sc.w_out.any() and layer.sc.w_out.any()
    assert not torch.equal(other(x), layer(x))


def test_attributes_of_batch_norm():
    layer = DNB(6, eps=1e-3, momentum=0.03, affine=True, track_running_stats=True)
    assert (layer.num_features, layer.eps, layer.momentum) == (6, 1e-3, 0.03)
    assert layer.affine and layer.track_running_stats
    for name in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
        assert getattr(layer, name) is getattr(layer.bn, name)
        assert name not in layer._parameters and name not in layer._buffers
    bare = DNB(6, affine=False, track_running_stats=False)
    assert bare.weight is bare.bias is bare.running_mean is bare.running_var is None


@pytest.mark.parametrize('cls', [DNB, DNC])
def test_the_mode_can_be_assigned_as_in_torch(cls, close):
    layer, bn = cls(6), nn.BatchNorm2d(6)
    x = torch.randn(4, 6, 5, 5) * 3 + 1
    for norm in (layer, bn):
        norm(x)
        norm.training = False
        norm(2 * x)
    close(layer.running_mean, bn.running_mean)
    close(layer(x), bn(x))


def test_the_same_mode_again_leaves_a_frozen_norm_frozen():
    layer = DNB(6)
    layer.bn.eval()
    layer.training = True  # as wrappers do
    assert not layer.bn.training


def test_settings_of_the_norm_can_be_changed_as_in_torch(close):
    layer, bn = DNB(6), nn.BatchNorm2d(6)
    x = torch.randn(4, 6, 5, 5) * 3 + 1
    for norm in (layer, bn):
        norm.momentum, norm.eps = 0.3, 1e-2
        norm(x)
        norm.track_running_stats = False
        norm(2 * x)
        norm.track_running_stats = True
        norm.momentum = None
        norm(3 * x)
        norm.eval()
    assert (layer.bn.momentum, layer.bn.eps) == (None, 1e-2)
    close(layer(x), bn(x))
    layer.reset_running_stats()
    assert layer.num_batches_tracked == 0 and not layer.bn.running_mean.any()
    for name in ('weight', 'running_mean', 'num_features', 'affine'):
        with pytest.raises(AttributeError):
            setattr(layer, name, None)


@pytest.mark.parametrize('cls', LAYERS)
def test_reset_parameters_gives_a_fresh_layer(cls, close):
    layer = trained(cls)
    layer(batch(cls))
    layer.reset_parameters()
    torch.manual_seed(3)
    x = batch(cls)
    close(layer(x), nn.functional.batch_norm(x, None, None, training=True))
    assert layer.num_batches_tracked == 1 and layer.sc.w_in.any()


def test_a_deleted_layer_is_freed_at_once():
    gc.collect()
    gc.disable()
    try:
        for cls in (DNB, DNC):
            for copied in (
                lambda layer: layer,
                copy.deepcopy,
                lambda layer: pickle.loads(pickle.dumps(layer)),
            ):
                layer = copied(cls(6))
                layer(torch.randn(2, 6, 3, 3)).sum().backward()
                kept = [weakref.ref(t) for t in (layer, layer.sc.w_in, layer.bn.weight)]
                del layer
                assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize('what', [DNB(6), nn.Sequential(nn.Conv2d(3, 6, 1), DNC(6))])
def test_scripting_says_what_to_use_instead(what):
    with pytest.raises(TypeError, match='DN.*cannot be scripted.*use torch.jit.trace'):
        torch.jit.script(what)


def test_numpys_integers_are_integers():
    layer = DNB(
        np.int64(64), reduction=np.int32(4), min_channels=np.uint8(2), bound=np.float32(0.5)
    )
    assert type(layer.num_features) is int and type(layer.bn.num_features) is int
    assert len(layer.sc.b_in) == 16
    assert layer(torch.randn(2, 64, 3, 3)).shape == (2, 64, 3, 3)


def test_factory_arguments():
    layer = DNB(6, device='meta', dtype=torch.float16)
    assert {(t.device.type, t.dtype) for t in [*layer.parameters(), layer.running_mean]} == {
        ('meta', torch.float16)
    }
    assert DNB(6, device='meta', affine=False, track_running_stats=False)(
        torch.empty(2, 6, 3, 3, device='meta')
    ).shape == (2, 6, 3, 3)


def test_repr_says_what_differs():
    assert 'DNB(\n  (sc): SC(6' in repr(DNB(6))
    assert 'bn_requires_grad=False' in repr(DNB(6, bn_requires_grad=False))


@pytest.mark.parametrize(
    'cls, shape, said',
    [
        (DNB, (2, 6, 3), 'expected 4D input .got 3D'),
        (DNC, (6, 3, 3), 'expected 4D'),
        (DNB1d, (2, 6, 3, 3), 'expected 2D or 3D'),
        (DNB3d, (2, 6, 3, 3), 'expected 5D'),
        (DNB, (2, 5, 3, 3), 'expected 6 channels.*got 5'),
        (SyncDNB, (6,), 'at least 2D'),
        (SyncDNB, (2, 3, 6), 'expected 6 channels'),
    ],
)
def test_wrong_shapes_are_refused(cls, shape, said):
    with pytest.raises(ValueError, match=said):
        cls(6)(torch.randn(shape))


@pytest.mark.parametrize('cls', [DNC, DNC1d, DNC3d, SyncDNC])
def test_dnc_has_no_batch_to_be_relative_to(cls):
    with pytest.raises(ValueError, match=f"inputs: expected 'raw', got .*{cls.__name__} "):
        cls(6, inputs='standardized')


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match='momentun'):
        DNB(6, momentun=0.1)


class TestFrozenInnerBatchNorm:
    """``bn_requires_grad=False``, and what tries to undo it."""

    def test_freezes_only_the_inner_batch_norm(self):
        layer = trained(DNB, bn_requires_grad=False)
        layer(batch()).square().sum().backward()
        assert layer.weight.grad is None and layer.bias.grad is None
        assert all(p.grad.any() for p in layer.sc.parameters())

    def test_running_statistics_still_move(self):
        layer = DNB(6, bn_requires_grad=False).double()
        layer(batch())
        assert layer.running_mean.any()

    def test_a_model_misses_no_parameter(self):
        model = nn.Sequential(nn.Conv2d(3, 6, 1), DNB(6, bn_requires_grad=False))
        assert len(list(model.parameters())) == len(list(model.named_parameters())) == 8
        assert sum(p.requires_grad for p in model.parameters()) == 6

    def test_thawing_the_layer_leaves_it_frozen(self):
        layer = DNB(6, bn_requires_grad=False)
        layer.requires_grad_(False)
        layer.requires_grad_(True)
        assert [p.requires_grad for p in layer.bn.parameters()] == [False, False]
        assert all(p.requires_grad for p in layer.sc.parameters())

    @pytest.mark.parametrize('thaw', ['inner', 'model'])
    def test_once_thawed_it_is_like_any_other(self, thaw):
        model = nn.Sequential(DNB(6, bn_requires_grad=False))
        (model if thaw == 'model' else model[0].bn).requires_grad_(True)
        assert len(list(model[0].parameters())) == 6
        model[0].requires_grad_(False)
        assert not any(p.requires_grad for _, p in model[0].named_parameters())

    def test_an_optimizer_of_the_model_leaves_it_as_it_was(self):
        model = nn.Sequential(trained(DNB, bn_requires_grad=False))
        before = model[0].weight.clone(), model[0].bias.clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        sc_before = model[0].sc.w_in.clone()
        model(batch()).square().sum().backward()
        optimizer.step()
        assert torch.equal(model[0].weight, before[0])
        assert torch.equal(model[0].bias, before[1])
        assert not torch.equal(model[0].sc.w_in, sc_before)


@pytest.mark.slow
def test_torchs_own_inputs_for_its_batch_norms_give_the_same():
    script = Path(__file__).with_name('torch_suite.py')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', script],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(script.parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r'(\d+) agree, 0 differ', done.stdout)[1]) > 3000


def test_sc_costs_under_0_6_percent_mult_adds_on_mobilenet_v2():
    model = mobilenet_v2(num_classes=100, norm_layer=DNB).to('meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    counts = counter.get_flop_counts()
    total = sum(counts['Global'].values()) / 2  # a Mult-Add is two flops
    names = [name for name, module in model.named_modules() if isinstance(module, SC)]
    sc = sum(sum(counts[f'MobileNetV2.{name}'].values()) for name in names) / 2
    assert len(names) == 52
    assert 299e6 < total - sc < 302e6  # the plain network's published 300 M
    assert 0.004 < sc / (total - sc) <= 0.006


@pytest.fixture(scope='module')
def ssdlite():
    """SSDLite-MobileNetV2 of mmdet's own config, with the given norm."""
    init_default_scope('mmdet')
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()

    def build(norm):
        config = get_config('mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py')
        for part in ('backbone', 'neck', 'bbox_head'):
            config.model[part].norm_cfg.type = norm
        return MODELS.build(config.model)

    return build


def test_ssdlite_parameter_count(ssdlite):
    counts = {norm: sum(p.numel() for p in ssdlite(norm).parameters()) for norm in ('BN', 'DNB')}
    assert counts == {'BN': 4_228_788, 'DNB': 6_297_390}  # + 49 %


@pytest.mark.parametrize('args', [dict(), dict(affine=False)])
def test_running_statistics_alone_leave_sc_as_it_is(args, close):
    """As code restores that keeps the running statistics of whatever has some."""
    model = nn.Sequential(awake(DNB(6, **args))).eval()
    x = torch.randn(4, 6, 5, 3)
    before = model(x)
    kept = {
        f'{name}.{key}': getattr(module, key).clone()
        for name, module in model.named_modules()
        for key in ('running_mean', 'running_var')
        if getattr(module, 'running_mean', None) is not None
    }
    assert {'0.running_mean', '0.bn.running_mean'} <= kept.keys()
    model.load_state_dict(kept, strict=False)
    close(model(x), before)
    if not args:
        outer = {key: value for key, value in kept.items() if '.bn.' not in key}
        found = model.load_state_dict(outer, strict=False)
        close(model(x), before)
        assert '0.sc.w_out' in found.missing_keys and not found.unexpected_keys


@pytest.mark.parametrize('norm', ['DNB', 'DNC'])
def test_fresh_ssdlite_equals_its_batch_norm_twin(ssdlite, norm):
    twin, model = ssdlite('BN'), ssdlite(norm)
    twin.init_weights()
    model.load_state_dict(twin.state_dict())
    assert sum(isinstance(m, (DNB, DNC)) for m in model.modules()) == 76
    images = torch.randn(2, 3, 320, 320)
    for training in (True, False):
        outputs = []
        for net in (twin, model):
            net.train(training).zero_grad()
            torch.manual_seed(0)
            with torch.set_grad_enabled(training):
                scores, boxes = net(images, mode='tensor')
            outputs.append([*scores, *boxes])
        for got, expected in zip(*reversed(outputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_help_documents_the_layer_itself():
    for argument in inspect.signature(DNB).parameters:
        assert re.search(rf'^    {argument}\b.*: ', inspect.getdoc(DNB), re.M), argument
    for cls in (DNB, DNB1d, DNB3d, DNC, DNC1d, DNC3d, SyncDNB, SyncDNC):
        assert 'DynamicNorm' not in cls.__doc__
