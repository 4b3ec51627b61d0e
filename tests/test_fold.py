"""A DN layer whose scale and shift are constants becomes the BatchNorm that computes the same."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from conftest import awake
from mmcv.cnn import fuse_conv_bn
from mmengine.model import revert_sync_batchnorm
from test_convert import used
from torch import nn

from dn_mmdet import DNB, DNC, SC, DNB1d, DNB3d, DNC1d, DNC3d, ScaledBN, SyncDNB, SyncDNC
from dn_mmdet.convert import convert_norm, dn_layers
from dn_mmdet.experiments.ablation import VariantSC
from dn_mmdet.experiments.controls import StaticDN
from dn_mmdet.fold import Outputs, PartlyFolded, fold_norm, recalibrate, values_of_maps

SHAPES = {
    DNB: (4, 6, 5, 3),
    DNC: (4, 6, 5, 3),
    DNB1d: (4, 6, 7),
    DNC1d: (4, 6, 7),
    DNB3d: (4, 6, 2, 3, 3),
    DNC3d: (4, 6, 2, 3, 3),
    SyncDNB: (4, 6, 5, 3),
    SyncDNC: (4, 6, 5, 3),
}
KINDS = {
    DNB: nn.BatchNorm2d,
    DNC: nn.BatchNorm2d,
    DNB1d: nn.BatchNorm1d,
    DNC1d: nn.BatchNorm1d,
    DNB3d: nn.BatchNorm3d,
    DNC3d: nn.BatchNorm3d,
    SyncDNB: nn.SyncBatchNorm,
    SyncDNC: nn.SyncBatchNorm,
}


def constant(layer):
    """Its SC makes the same of every image, and not identity; the rest is as after training."""
    used(awake(layer).double())
    if not layer.batch_shared:
        nn.init.zeros_(layer.sc.w_out)
    return layer.eval()


@pytest.mark.parametrize('cls', SHAPES)
@pytest.mark.parametrize(
    'args',
    [{}, dict(affine=False), dict(eps=0.1, momentum=None), dict(bn_requires_grad=False)],
    ids=str,
)
def test_a_layer_of_constant_outputs_folds_exactly_without_images(cls, args, close):
    model = nn.Sequential(constant(cls(6, **args)))
    layer, x = model[0], torch.randn(SHAPES[cls]).double()
    expected = layer(x)
    assert not torch.allclose(expected, layer.bn(x))  # SC acts
    (row,) = fold_norm(model)
    bn = model[0]
    assert row.folded and row.share == 0 and type(bn) is KINDS[cls]
    close(bn(x), expected)
    assert not bn.training and (bn.eps, bn.momentum) == (layer.eps, layer.momentum)
    assert bn.weight.requires_grad == args.get('bn_requires_grad', True)
    assert torch.equal(bn.running_mean, layer.running_mean)


class Shifted(SC):
    def forward(self, mean, std):
        g, h = super().forward(mean, std)
        return g, h + mean


def test_an_sc_of_another_kind_or_with_a_hook_needs_images():
    """Zeros in w_out say nothing of what these give."""
    other, hooked = DNB(4), DNB(4)
    other.sc = Shifted(4)
    hooked.sc.register_forward_hook(lambda sc, args, out: (out[0] + args[0], out[1]))
    for layer in (other, hooked):
        with pytest.raises(ValueError, match='images'):
            fold_norm(nn.Sequential(layer).eval())


@pytest.mark.parametrize('reduction', [4, 1])
def test_the_same_constants_are_found_from_images(reduction, close):
    """An SC that does not look constant: its hidden units never fire."""
    model = nn.Sequential(awake(DNB(6, reduction=reduction, min_channels=1)).eval())
    model[0].sc.w_in.data.zero_()
    x = torch.randn(5, 6, 4, 4)
    expected = model(x)
    (row,) = fold_norm(model, [x[:2], x[2:]], max_change=0)
    assert row.folded and row.images == 5 and row.share == row.g_std == row.h_std == 0
    close(model(x), expected)


def test_scale_and_shift_are_frozen_at_their_mean(close):
    model = nn.Sequential(awake(DNB(6)).double()).eval()
    used(model)
    layer, x = model[0], torch.randn(5, 6, 4, 4).double()
    g, h = layer.sc(x.mean((2, 3)), (x.var((2, 3), correction=0) + layer.eps).sqrt())
    wanted = (1 + g.mean(0)).view(-1, 1, 1) * layer.bn(x) + h.mean(0).view(-1, 1, 1)
    (row,) = fold_norm(model, [x[:2], x[2:]])
    close(model(x), wanted)
    close(
        torch.tensor([row.g_std, row.h_std]),
        torch.stack([t.std(0, correction=0).mean() for t in (g, h)]).float(),
    )


def test_the_share_is_that_of_the_outputs_variance():
    model = nn.Sequential(awake(DNB(6)).double()).train()
    nn.init.uniform_(model[0].bn.weight, 0.5, 1.5)
    nn.init.uniform_(model[0].bn.bias, 1, 2)
    for parameter in (model[0].sc.w_out, model[0].sc.b_out):
        parameter.data[6:] = parameter.data[:6]  # g = h: what both do adds up
    x = torch.randn(400, 6, 9, 9).double() * 2 + torch.randn(400, 6, 1, 1).double() * 0.1
    for _ in range(60):
        model(x[torch.randperm(400)[:64]])
    model.eval()
    dynamic = model(x)
    (row,) = fold_norm(model, [x])
    lost = (model(x) - dynamic).square().sum() / (
        dynamic - dynamic.mean((0, 2, 3), keepdim=True)
    ).square().sum()
    assert 1e-4 < lost and row.share == pytest.approx(lost.item(), rel=0.1)


def test_outputs_of_batches_add_up(close):
    g, h = torch.randn(2, 7, 3).double() + 5
    whole, parts = Outputs.of(g, h), Outputs.of(g[:2], h[:2]) + Outputs.of(g[2:], h[2:])
    assert whole.count == parts.count == 7
    close(parts.mean, whole.mean)
    close(parts.sums, whole.sums)
    close(whole.sums[2], ((g - g.mean(0)) * (h - h.mean(0))).sum(0))


@pytest.mark.parametrize(
    'layer',
    [StaticDN(6), StaticDN(6, rank='low'), StaticDN(6, affine=False), ScaledBN(6, rate=3)],
    ids=['full', 'low', 'no affine', 'scaled'],
)
def test_a_control_folds_into_a_batch_norm_exactly(layer, close):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    used(layer)
    x = torch.randn(4, 6, 5, 3)
    for training in (True, False):
        model = nn.Sequential(copy.deepcopy(layer).train(training))
        expected = model(x)
        fold_norm(model)
        assert type(model[0]) is nn.BatchNorm2d and model[0].training == training
        close(model(x), expected)


def test_variants_of_sc_fold(close):
    sc = dict(type=VariantSC, hidden='channelwise')
    model = nn.Sequential(awake(DNB(6, sc=dict(sc, outputs='scale'))))
    x = torch.randn(5, 6, 4, 4)
    assert fold_norm(model.eval(), [x])[0].g_std > 0
    assert fold_norm(nn.Sequential(DNB(6, sc=sc)))[0].folded


def test_dnc_by_batch_statistics_needs_images():
    model = nn.Sequential(awake(DNC(6, track_running_stats=False)))
    with pytest.raises(ValueError, match='from each image'):
        fold_norm(model)
    assert fold_norm(model, torch.randn(3, 4, 6, 5, 5))[0].images == 3  # a pair for each batch


def test_frozen_norms_stay_frozen(close):
    freeze = torchvision.ops.FrozenBatchNorm2d
    model = awake(convert_norm(nn.Sequential(freeze(6)), 'DNC'))
    model[0].bn.load_state_dict(
        {name: torch.rand(6) + 0.5 for name in ('weight', 'bias', 'running_mean', 'running_var')}
    )
    x = torch.randn(4, 6, 5, 3)
    expected = model.eval()(x)
    fold_norm(model)
    assert type(model[0]) is freeze and not list(model.parameters())
    close(model(x), expected)


def test_a_reverted_synchronised_norm_folds(close):
    model = revert_sync_batchnorm(nn.Sequential(constant(SyncDNC(6))))
    x = torch.randn(4, 6, 5, 3).double()
    expected = model.eval()(x)
    fold_norm(model)
    close(model(x), expected)


def test_a_process_group_stays_the_same_one():
    class Group:
        def __deepcopy__(self, memo):
            raise TypeError('as that of torch')

    model = nn.Sequential(constant(SyncDNB(6)))
    model[0].bn.process_group = group = Group()
    fold_norm(model)
    assert model[0].process_group is group
    assert not dist.is_initialized()


def test_timms_norm_with_activation_comes_back(close):
    layers = pytest.importorskip('timm.layers', reason="needs the extra 'test'")
    source = nn.Sequential(used(layers.BatchNormAct2d(6, act_layer=nn.SiLU)))
    names = set(source.state_dict())
    model = awake(convert_norm(source, 'DNC')).eval()
    x = torch.randn(4, 6, 5, 3)
    expected = model(x)
    fold_norm(model)
    assert type(model[0]) is layers.BatchNormAct2d and set(model.state_dict()) == names
    close(model(x), expected)


def net(norm='DNB', std=0.2):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=5)
    return awake(convert_norm(used(model), norm), std).eval()


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_folded_network_has_the_keys_of_batch_norm_and_fuses(close):
    model = net('DNC').double()
    x = IMAGES.double()
    expected = model(x)
    report = fold_norm(model)
    assert len(report) == 20 and not dn_layers(model)
    torchvision.models.resnet18(weights=None, num_classes=5).double().load_state_dict(
        model.state_dict()
    )
    close(model(x), expected)
    fused = fuse_conv_bn(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    close(fused(x), expected)


def test_some_layers_stay_dynamic():
    by_name, by_number, by_share = net(), net(), net()
    report = fold_norm(by_name, [IMAGES], keep=['layer1', '*.bn2'])
    kept = {row.name for row in report if not row.folded}
    assert kept == set(dn_layers(by_name)) and 'layer1.0.bn1' in kept and len(kept) == 10
    shares = {row.name: row.share for row in report}
    wanted = sorted(shares, key=shares.get)[-3:]
    fold_norm(by_number, [IMAGES], keep=3)
    assert set(dn_layers(by_number)) == set(wanted)
    fold_norm(by_share, [IMAGES], max_change=shares[wanted[0]])
    assert set(dn_layers(by_share)) == set(wanted[1:])
    for model in (by_name, by_number, by_share):
        assert torch.isfinite(model(IMAGES)).all()
    everything = net()
    before = everything(IMAGES)
    assert not any(row.folded for row in fold_norm(everything, keep='*'))
    assert torch.equal(everything(IMAGES), before)


def test_a_layer_used_in_two_places_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = awake(DNB(3))
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    model = Twice()
    (row,) = fold_norm(model, [IMAGES])
    assert model.a is model.b and type(model.a) is nn.BatchNorm2d and row.images == 8


def test_tied_weights_are_folded_once_each(close):
    first, second = awake(DNC(3)).eval(), awake(DNC(3)).eval()
    second.bn.weight = first.bn.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    model = nn.Sequential(first, second)
    expected = model(IMAGES)
    fold_norm(model)
    close(model(IMAGES), expected)


def test_what_is_not_reached_stays_dynamic():
    model = net()
    model.unused = awake(DNB(3))
    report = fold_norm(model, [IMAGES])
    (left,) = (row for row in report if not row.folded)
    assert left.name == 'unused' and left.images == 0 and list(dn_layers(model)) == ['unused']
    model = net()
    model.unused = awake(DNB(3))
    fold_norm(model, [IMAGES], keep=2)  # of those that vary
    assert len(dn_layers(model)) == 3


def test_modes_backends_and_precision_are_kept():
    model = net().train().half().float()
    model.layer1.eval()
    for layer in dn_layers(model).values():
        layer.backend = 'torch'
    modes = {name: module.training for name, module in model.named_modules()}
    fold_norm(model, [IMAGES], keep='layer2')
    assert {name: module.training for name, module in model.named_modules()} == {
        name: modes[name] for name, _ in model.named_modules()
    }
    assert all(layer.backend == 'torch' for layer in dn_layers(model).values())
    halves = nn.Sequential(awake(DNB(3).to(torch.bfloat16)))
    fold_norm(halves, [IMAGES.bfloat16()])
    assert halves[0].weight.dtype == torch.bfloat16


def broken(value):
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize(
    'batches,message',
    [
        (None, '20 layers .such as bn1. make their scale and shift from each image'),
        ([], 'expected images that reach the DN layers, got none'),
        ([IMAGES[:0]], 'got none|batch 0: the model cannot take it'),
        ([IMAGES, IMAGES[:, :2]], 'batch 1: the model cannot take it: .*3 channels'),
        ([(IMAGES, torch.zeros(4))], 'batch 0: the model cannot take it: .*positional'),
        ([IMAGES, broken(float('nan'))], 'batch 1: the statistics in bn1 are not finite'),
        ([broken(float('inf'))], 'batch 0: the statistics in bn1 are not finite'),
        (
            ['images'],
            r'batch 0: the model cannot take it: [^\n]*\. Expected what the forward of the model',
        ),
        (IMAGES, r'batch 0: the model cannot take it: expected 4D input \(got 3D'),
        (dict(inputs=IMAGES), 'expected a list or a loader of batches, got dict'),
        (512, 'expected a list or a loader of batches, got int'),
    ],
    ids=[
        'none',
        'empty',
        'no image',
        'channels',
        'labels too',
        'NaN',
        'infinite',
        'a name',
        'one batch',
        'one batch of arguments',
        'a number',
    ],
)
def test_bad_batches_change_nothing(batches, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        fold_norm(model, batches)
    assert len(dn_layers(model)) == 20
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(
        layer.sc._forward_hooks or layer.backend != 'auto' for layer in dn_layers(model).values()
    )


def with_hook():
    model = net()
    model.bn1.bn.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    'model,args,message',
    [
        (lambda: torchvision.models.resnet18(weights=None), {}, 'no DN layer .*20 BatchNorm2d'),
        (lambda: DNB(3), {}, 'put it into nn.Sequential'),
        (net, dict(keep='layer9'), "keep: 'layer9' matches none of 20 layers .bn1"),
        (net, dict(keep=21), 'keep: expected 0 to 20 layers, got 21'),
        (net, dict(max_change=-1), 'max_change: expected a share of at least 0'),
        (with_hook, {}, 'bn1: has hooks'),
    ],
    ids=['BatchNorm', 'a layer', 'pattern', 'too many', 'negative', 'hooks'],
)
def test_what_cannot_be_folded_is_refused(model, args, message):
    with pytest.raises(ValueError, match=message):
        fold_norm(model(), [IMAGES], **args)


def test_a_batch_norm_that_would_be_fused_wrongly_is_told():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.dn, self.bn = nn.Conv2d(3, 3, 1), awake(DNB(3)), DNC(3)

    with pytest.warns(UserWarning, match='^bn: this BatchNorm follows a dynamic layer'):
        fold_norm(Parent(), keep='dn')


def test_running_statistics_estimated_again_are_those_of_the_images(close):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        awake(DNB(4)),
        nn.BatchNorm2d(4, momentum=0.0),
    ).train()
    model[3].eval()
    maps = model[0](IMAGES)
    recalibrate(model, [IMAGES[:2], IMAGES[2:]])
    close(model[1].running_mean, maps.mean((0, 2, 3)).detach())
    assert model[2].bn.num_batches_tracked == 2 and model[1].momentum == 0.3
    assert not model[3].running_mean.any() and model[1].training and not model[3].training


def test_a_part_is_built_with_the_layers_that_stayed_dynamic(close):
    model = net()
    fold_norm(model, [IMAGES], keep=['layer1.0', 'bn1'])
    built = PartlyFolded(dict(type=net), dynamic=list(dn_layers(model)))
    built.load_state_dict(model.state_dict())
    close(built(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match='there are no DN layers layer7'):
        PartlyFolded(dict(type=net), dynamic=['layer7'])


def test_layers_that_share_an_sc_are_folded_with_their_own_images(close):
    shared, apart = net(), net()
    shared.layer1[0].bn2.sc = shared.layer1[0].bn1.sc
    apart.layer1[0].bn2.sc.load_state_dict(apart.layer1[0].bn1.sc.state_dict())
    reports = [fold_norm(model, [IMAGES]) for model in (shared, apart)]
    assert [row.images for row in reports[0]] == [row.images for row in reports[1]]
    close(shared(IMAGES), apart(IMAGES))


def test_norms_that_no_image_reaches_keep_their_statistics():
    model = net()
    model.unused = nn.BatchNorm2d(3)
    model.unused.running_mean.fill_(7)
    recalibrate(model, [IMAGES])
    assert model.unused.running_mean.tolist() == [7, 7, 7]
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, [])
    with pytest.raises(ValueError, match='batch 1'):
        recalibrate(model, [IMAGES, 'no image'])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.bn1.bn.momentum == model.unused.momentum == 0.1


@pytest.mark.parametrize('kind', ['frozen', 'synchronised'])
def test_timms_norms_of_other_kinds_come_back(kind, close):
    layers = pytest.importorskip('timm.layers', reason="needs the extra 'test'")
    model = convert_norm(nn.Sequential(used(layers.BatchNormAct2d(6, act_layer=nn.SiLU))), 'DNC')
    awake(model).eval()
    if kind == 'frozen':
        model = layers.freeze_batch_norm_2d(model)
    else:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    x = torch.randn(4, 6, 5, 3)
    expected = model(x) if kind == 'frozen' else None  # torch's refuses a CPU
    fold_norm(model)
    wanted = layers.FrozenBatchNormAct2d if kind == 'frozen' else layers.SyncBatchNormAct
    assert type(model[0]) is wanted
    if expected is not None:
        close(model(x), expected)


def test_one_image_cannot_say_how_much_g_and_h_vary():
    model = net()
    with pytest.raises(ValueError, match='max_change: expected several images.*got one for bn1'):
        fold_norm(model, [IMAGES[:1]], max_change=0)
    assert len(dn_layers(model)) == 20
    assert all(row.folded for row in fold_norm(model, [IMAGES[:1]]))
    mixed = nn.Sequential(awake(DNB(3)), awake(DNC(3, track_running_stats=False)))
    fold_norm(mixed, [IMAGES, 2 * IMAGES], max_change=1)
    fold_norm(
        nn.Sequential(awake(DNB(3)), awake(DNC(3, track_running_stats=False))),
        [IMAGES],
        keep='1',
        max_change=1,
    )


def test_the_maps_of_a_layer_that_is_called_several_times_add_up():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.small, self.unused = DNB(3), DNB(3), DNB(3)

        def forward(self, x):
            for side in (8, 4, 2):
                self.head(x[..., :side, :side])
            return self.small(x[..., :5, :5])

    model = Levels()
    found = values_of_maps(model, lambda: model(IMAGES[:1]))
    assert found == dict(head=3 * (64 + 16 + 4), small=75, unused=0)
    assert not model.head._forward_pre_hooks


def test_an_sc_that_is_also_called_by_itself(close):
    class Apart(nn.Sequential):
        def forward(self, x):
            self[0].sc(x.mean((2, 3)), x.std((2, 3)))
            return self[0].forward(x)

    model = Apart(awake(DNB(3))).eval()
    fold_norm(model, [IMAGES])
    assert type(model[0]) is nn.BatchNorm2d


def test_statistics_of_a_norm_with_a_parametrization_are_put_back():
    model = nn.Sequential(nn.BatchNorm2d(3))
    nn.utils.parametrizations.spectral_norm(model[0])
    with pytest.raises(ValueError, match='batch 0: the model cannot take it'):
        recalibrate(model, ['no image'])
    assert model[0].running_var.tolist() == [1, 1, 1]


def test_a_number_of_layers_may_be_numpys():
    model = net()
    fold_norm(model, [IMAGES], keep=np.int64(2))
    assert len(dn_layers(model)) == 2


def test_an_assertion_of_the_model_is_told_with_its_batch():
    class Picky(nn.Sequential):
        def forward(self, x):
            assert x.shape[1] == 3, 'three channels'
            return super().forward(x)

    with pytest.raises(ValueError, match='batch 0: the model cannot take it: three channels'):
        fold_norm(Picky(awake(DNB(3))), [IMAGES[:, :2]])
