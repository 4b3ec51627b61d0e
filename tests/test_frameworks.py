"""Every mechanism by which torch, mmengine, mmcv and mmdet reach into norm layers.

Each test is a row of the comparison that made the layers contain a BatchNorm
instead of being one. "Awake" is an SC away from identity: a mechanism that drops it
changes the output.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import awake
from mmcv.cnn import ConvModule, build_norm_layer, fuse_conv_bn
from mmdet.models.backbones import DetectoRS_ResNet, MobileNetV2, ResNet
from mmdet.models.layers import FrozenBatchNorm2d
from mmengine.analysis import get_model_complexity_info
from mmengine.hooks import EMAHook
from mmengine.model import (
    BaseModule,
    ExponentialMovingAverage,
    constant_init,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.runner import load_checkpoint
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim import swa_utils
from torch.utils.flop_counter import FlopCounterMode

from dn_mmdet import DNB, DNC, SyncDNB
from dn_mmdet.experiments.ablation import VariantSC

norms = pytest.mark.parametrize('norm', ['DNB', 'DNC'])


def used(model):
    """The model with trained-looking norms: awake, and with running statistics."""
    awake(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def two_blocks(norm='DNB', **kwargs):
    cfg = dict(type=norm)
    return used(
        nn.Sequential(
            ConvModule(3, 8, 3, norm_cfg=cfg, **kwargs),
            ConvModule(8, 8, 3, norm_cfg=cfg, **kwargs),
        )
    ).double()


def images(size=9, num=4):
    return torch.randn(num, 3, size, size, dtype=torch.float64)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, (DNB, DNC))]


class TestFusing:
    @pytest.mark.shows('`fuse_conv_bn` and `efficient_conv_bn_eval` leave it alone')
    @norms
    def test_fuse_conv_bn_leaves_it_alone(self, norm):
        model, x = two_blocks(norm).eval(), images()
        expected = model(x)
        fused = fuse_conv_bn(copy.deepcopy(model))
        assert len(layers_of(fused)) == 2
        assert torch.equal(fused(x), expected)

    def test_fuse_conv_bn_still_folds_batch_norm_beside_it(self, close):
        model = nn.Sequential(two_blocks('BN')[0], two_blocks()[1]).eval()
        x = images()
        expected = model(x)
        fused = fuse_conv_bn(copy.deepcopy(model))
        assert isinstance(fused[0].bn, nn.Identity) and isinstance(fused[1].bn, DNB)
        close(fused(x), expected)

    @pytest.mark.parametrize('between', [DNB, lambda c: nn.GroupNorm(2, c)])
    def test_mmcvs_own_flaw_is_that_of_any_foreign_norm(self, between):
        """conv -> norm -> ReLU -> BN in one parent: the BN is folded into that conv."""
        model = (
            used(nn.Sequential(nn.Conv2d(3, 8, 3), between(8), nn.ReLU(), nn.BatchNorm2d(8)))
            .double()
            .eval()
        )
        x = images()
        assert not torch.allclose(fuse_conv_bn(copy.deepcopy(model))(x), model(x))

    @pytest.mark.shows('`fuse_conv_bn` and `efficient_conv_bn_eval` leave it alone')
    @norms
    @pytest.mark.parametrize('training', [True, False])
    def test_efficient_conv_bn_eval_of_conv_module(self, norm, training, close):
        plain = two_blocks(norm)
        efficient = two_blocks(norm, efficient_conv_bn_eval=True)
        efficient.load_state_dict(plain.state_dict())
        x = images()
        close(efficient.train(training)(x), plain.train(training)(x))

    @norms
    def test_efficient_conv_bn_eval_by_fx(self, norm, close):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Sequential(
                    nn.Conv2d(3, 8, 3),
                    build_norm_layer(dict(type=norm), 8)[1],
                    nn.ReLU(),
                    nn.Conv2d(8, 8, 3),
                    nn.BatchNorm2d(8),
                )

            def forward(self, x):
                return self.body(x)

        model = used(Net()).double()
        for training in (False, True):
            fast = copy.deepcopy(model).train(training)
            turn_on_efficient_conv_bn_eval(fast, 'body')
            called = []
            for name in ('1.sc', '4'):
                fast.body.get_submodule(name).register_forward_hook(
                    lambda *_, name=name, called=called: called.append(name)
                )
            x = images()
            close(fast(x), copy.deepcopy(model).train(training)(x))
            # in eval only the plain BN was folded away; SC ran in both
            assert called == (['1.sc', '4'] if training else ['1.sc'])

    @norms
    def test_symbolic_trace(self, norm):
        model = used(
            nn.Sequential(nn.Conv2d(3, 8, 3), build_norm_layer(dict(type=norm), 8)[1])
        ).double()
        traced, x = torch.fx.symbolic_trace(model), images()
        for training in (True, False):  # the mode is read when the graph runs
            model.train(training)
            traced.train(training)
            assert torch.equal(traced(x), model(x))
        with pytest.raises(ValueError, match='expected 4D input'):
            torch.fx.symbolic_trace(model[1:])(x[0])


class TestConversions:
    @norms
    @pytest.mark.parametrize(
        'convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm]
    )
    def test_to_sync_and_back(self, norm, convert, close):
        model, x = two_blocks(norm), images()
        expected = {t: copy.deepcopy(model).train(t)(x) for t in (True, False)}
        parameters = set(model.parameters())
        converted = convert(model)
        assert all(type(m.bn) is nn.SyncBatchNorm for m in layers_of(converted))
        assert len(layers_of(converted)) == 2
        assert set(converted.parameters()) == parameters
        for training, output in expected.items():
            close(copy.deepcopy(converted).train(training)(x), output)

        reverted = revert_sync_batchnorm(converted)
        assert len(layers_of(reverted)) == 2
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in reverted.modules())
        assert all(type(m.bn).__name__ == '_BatchNormXd' for m in layers_of(reverted))
        for training, output in expected.items():
            close(copy.deepcopy(reverted).train(training)(x), output)

    def test_syncdnb_is_reverted_too(self, close):
        layer, x = used(SyncDNB(3)).double(), images()
        expected = copy.deepcopy(layer)(x)
        close(revert_sync_batchnorm(layer)(x), expected)
        assert not isinstance(layer.bn, nn.SyncBatchNorm)

    def test_conversion_keeps_the_inner_batch_norm_frozen(self):
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(DNB(8, bn_requires_grad=False))
        assert not layer.weight.requires_grad and layer.sc.w_in.requires_grad

    @pytest.mark.parametrize('cls, inputs', [(DNB, 'raw'), (DNB, 'standardized'), (DNC, 'raw')])
    def test_mmdets_frozen_batch_norm(self, cls, inputs, close):
        model = used(nn.Sequential(nn.Conv2d(3, 8, 3), cls(8, inputs=inputs)))
        x = images().float()
        expected = model.eval()(x)
        frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
        assert isinstance(frozen[1].bn, FrozenBatchNorm2d)
        before = copy.deepcopy(frozen.state_dict())
        for training in (False, True):  # frozen statistics in either mode
            close(frozen.train(training)(x), expected)
        frozen(x).square().sum().backward()
        assert all(p.grad.any() for p in frozen[1].sc.parameters())
        assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


class TestFreezing:
    @norms
    def test_norm_eval_freezes_statistics_and_sc_still_learns(self, norm):
        net = MobileNetV2(widen_factor=0.25, norm_eval=True, norm_cfg=dict(type=norm))
        used(net).train()
        before = copy.deepcopy(dict(net.named_buffers()))
        net(images(64).float())[-1].square().mean().backward()
        for module in layers_of(net):
            assert module.training and not module.bn.training
            assert module.sc.w_in.grad.any()
        assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())

    @pytest.mark.parametrize(
        'kwargs, trainable',
        [
            (dict(), {'bn', 'sc'}),
            (dict(requires_grad=True), {'bn', 'sc'}),
            (dict(requires_grad=False), set()),
            (dict(bn_requires_grad=False), {'sc'}),
            (dict(bn_requires_grad=False, requires_grad=True), {'sc'}),
            (dict(bn_requires_grad=False, requires_grad=False), set()),
        ],
    )
    @norms
    def test_requires_grad_of_norm_cfg(self, norm, kwargs, trainable):
        layer = build_norm_layer(dict(type=norm, **kwargs), 8)[1]
        for name, parameter in layer.named_parameters():
            assert parameter.requires_grad == (name.split('.')[0] in trainable), name

    @pytest.mark.parametrize('bn_requires_grad', [True, False])
    def test_frozen_stages(self, bn_requires_grad):
        net = ResNet(
            18,
            base_channels=8,
            norm_eval=False,
            frozen_stages=1,
            num_stages=2,
            strides=(1, 2),
            dilations=(1, 1),
            out_indices=(1,),
            norm_cfg=dict(type='DNB', bn_requires_grad=bn_requires_grad),
        )
        for thawed_first in (False, True):
            if thawed_first:  # train() has to freeze the stages again
                net.requires_grad_(True)
            net.train()
            for name, parameter in net.named_parameters():
                frozen = name.startswith(('conv1', 'bn1', 'layer1'))
                inner = '.bn.' in name
                if frozen or thawed_first or not inner:
                    assert parameter.requires_grad != frozen, name
                else:
                    assert parameter.requires_grad == bn_requires_grad, name
            assert not net.bn1.bn.training and net.layer2[0].bn1.bn.training


class TestInitialisation:
    def test_init_cfg_of_linear_and_conv_passes_by(self):
        class Net(BaseModule):
            def __init__(self):
                super().__init__(
                    init_cfg=[
                        dict(type='Constant', val=7.0, bias=7.0, layer=['Conv2d', 'Linear']),
                        dict(type='Constant', val=1.0, layer=['_BatchNorm', 'GroupNorm']),
                    ]
                )
                self.conv, self.dn, self.fc = nn.Conv2d(3, 8, 1), DNB(8), nn.Linear(8, 8)

        net = Net()
        sc = copy.deepcopy(net.dn.sc.state_dict())
        nn.init.zeros_(net.dn.weight)
        net.init_weights()
        assert net.conv.weight.eq(7).all() and net.fc.bias.eq(7).all()
        assert net.dn.weight.eq(1).all()
        assert all(torch.equal(v, sc[k]) for k, v in net.dn.sc.state_dict().items())

    @pytest.mark.parametrize('depth, last', [(18, 'norm2'), (50, 'norm3')])
    @norms
    def test_resnets_zero_init_walk(self, norm, depth, last):
        net = ResNet(depth, base_channels=8, norm_cfg=dict(type=norm))
        sc = {k: v.clone() for k, v in net.state_dict().items() if '.sc.' in k}
        net.init_weights()
        for block in (b for stage in (net.layer1, net.layer2) for b in stage):
            assert block.norm1.weight.eq(1).all()
            assert not getattr(block, last).weight.any()
        assert sc and all(torch.equal(net.state_dict()[k], v) for k, v in sc.items())

    @pytest.mark.parametrize('zero_init_residual, steps', [(False, 2), (True, 3)])
    @norms
    def test_every_sc_parameter_of_a_resnet50_learns(self, norm, zero_init_residual, steps):
        """By the second step; behind a residual that starts at zero, no gradient enters a
        block in the first, so that the convolutions and SC both start one step later."""
        net = ResNet(
            50,
            base_channels=16,
            norm_eval=False,
            norm_cfg=dict(type=norm),
            zero_init_residual=zero_init_residual,
        )
        net.init_weights()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        x = images(64, num=2).float()
        weights = None
        for _ in range(steps):
            optimizer.zero_grad()
            outputs = net(x)
            weights = weights or [torch.randn_like(out) for out in outputs]
            sum((out * w).mean() for out, w in zip(outputs, weights, strict=True)).backward()
            optimizer.step()
        silent = [
            name for name, p in net.named_parameters() if '.sc.' in name and not p.grad.any()
        ]
        assert silent == []

    def test_constant_init_of_the_layer(self):
        layer = awake(DNB(8))
        sc = copy.deepcopy(layer.sc.state_dict())
        constant_init(layer, 0, bias=3)
        assert not layer.bn.weight.any() and layer.bn.bias.eq(3).all()
        assert all(torch.equal(v, sc[k]) for k, v in layer.sc.state_dict().items())

    def test_detectors_resnet(self):
        net = DetectoRS_ResNet(
            depth=50,
            base_channels=8,
            norm_cfg=dict(type='DNB'),
            sac=dict(type='SAC', use_deform=False),
            stage_with_sac=(False, True, True, True),
            output_img=False,
        )
        net.init_weights()
        assert not net.layer1[0].norm3.weight.any()
        assert net.layer1[0].norm3.sc.w_in.any()
        assert net(images(96, num=2).float())[-1].isfinite().all()


@pytest.mark.shows('gradient checkpointing, `with_cp=True`')
def test_with_cp_gives_the_same_gradients(close):
    """A backbone's option that computes blocks again in the backward pass (re-entrant)."""
    model = awake(
        ResNet(18, base_channels=8, with_cp=True, norm_eval=False, norm_cfg=dict(type='DNB'))
    ).double()
    plain = copy.deepcopy(model)
    blocks = [m for m in plain.modules() if getattr(m, 'with_cp', False)]
    for block in blocks:
        block.with_cp = False
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for net in (model, plain):
        sum(level.square().mean() for level in net(x)).backward()
    assert len(blocks) == 9  # and the backbone itself
    assert model.layer1[0].bn1.num_batches_tracked == 2  # as of a BatchNorm
    for (name, parameter), expected in zip(
        model.named_parameters(), plain.parameters(), strict=True
    ):
        close(parameter.grad, expected.grad)
        assert parameter.grad.any(), name


def test_norm_decay_mult_is_of_w_and_b_alone():
    model = nn.Sequential(ConvModule(3, 8, 3, norm_cfg=dict(type='DNB')))
    constructor = DefaultOptimWrapperConstructor(
        dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5)),
        dict(norm_decay_mult=0.0, bias_decay_mult=0.1),
    )
    groups = constructor(model).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    got = {name: decay.pop(id(p)) for name, p in model.named_parameters()}
    assert got == {
        '0.conv.weight': 0.5,
        '0.bn.bn.weight': 0.0,
        '0.bn.bn.bias': 0.0,
        '0.bn.sc.w_in': 0.5,
        '0.bn.sc.b_in': 0.5,
        '0.bn.sc.w_out': 0.5,
        '0.bn.sc.b_out': 0.5,
    }
    assert not decay


@pytest.mark.parametrize(
    'paramwise, decay, lr',
    [
        (dict(flat_decay_mult=0.0), {'w': 0.5, 'b': 0.0}, 0.1),
        (dict(bias_lr_mult=2.0, bias_decay_mult=0.0), {'w': 0.5, 'b': 0.5}, 0.1),
        (dict(custom_keys={'.sc.b_': dict(decay_mult=0.0)}), {'w': 0.5, 'b': 0.0}, 0.1),
        (
            dict(custom_keys={'.sc.': dict(decay_mult=0.0, lr_mult=0.1)}),
            {'w': 0.0, 'b': 0.0},
            0.01,
        ),
    ],
)
def test_what_paramwise_cfg_does_to_sc(paramwise, decay, lr):
    """docs/models.md says so: `bias_*` reaches what is called bias, which SC's cannot be."""
    model = nn.Sequential(ConvModule(3, 8, 3, norm_cfg=dict(type='DNB')))
    constructor = DefaultOptimWrapperConstructor(
        dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5)), paramwise
    )
    of = {
        id(p): group
        for group in constructor(model).optimizer.param_groups
        for p in group['params']
    }
    for name, parameter in model[0].bn.sc.named_parameters():
        assert of[id(parameter)]['weight_decay'] == decay[name[0]], name
        assert of[id(parameter)]['lr'] == pytest.approx(lr), name


class TestAveraging:
    @pytest.mark.parametrize('update_buffers', [True, False])
    def test_exponential_moving_average(self, update_buffers, close):
        model = two_blocks()
        average = ExponentialMovingAverage(model, momentum=0.25, update_buffers=update_buffers)
        average.update_parameters(model)
        start = copy.deepcopy(model.state_dict())
        for parameter in model.parameters():
            parameter.data.add_(1)
        model.train()(images())
        average.update_parameters(model)
        got = average.module.state_dict()
        for name, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                averaged = update_buffers or 'running' not in name
                close(got[name], 0.75 * start[name] + 0.25 * value if averaged else value)

    @pytest.mark.shows('averaged weights: EMAHook, SWA')
    def test_ema_hook_swaps_everything_for_validation(self, close):
        model = two_blocks()
        runner = SimpleNamespace(model=model, iter=0, max_iters=2)
        hook = EMAHook(momentum=0.25, update_buffers=True)
        hook.before_run(runner)
        hook.before_train(runner)
        hook.after_train_iter(runner, 0)
        for parameter in model.parameters():
            parameter.data.add_(1)
        model(images())
        hook.after_train_iter(runner, 1)
        trained = copy.deepcopy(model).eval()
        averaged = copy.deepcopy(hook.ema_model.module).eval()
        x = images()
        hook.before_val_epoch(runner)
        close(copy.deepcopy(model).eval()(x), averaged(x))
        assert not torch.allclose(averaged(x), trained(x))
        checkpoint = dict(state_dict=model.state_dict())
        hook.after_val_epoch(runner)
        close(copy.deepcopy(model).eval()(x), trained(x))
        hook.before_save_checkpoint(runner, checkpoint)
        assert any('.sc.w_out' in name for name in checkpoint['ema_state_dict'])

    @pytest.mark.shows('averaged weights: EMAHook, SWA')
    @norms
    def test_swa_update_bn_recomputes_the_running_statistics(self, norm, close):
        model = two_blocks(norm)
        averaged = swa_utils.AveragedModel(model)
        averaged.update_parameters(model)
        batches = [images() for _ in range(3)]
        swa_utils.update_bn(batches, averaged)
        mean = torch.zeros(8, dtype=torch.float64)
        var = torch.zeros_like(mean)
        for x in batches:
            features = model[0].conv(x).transpose(0, 1).flatten(1)
            mean += features.mean(1) / 3
            var += features.var(1) / 3
        close(averaged.module[0].bn.running_mean, mean)
        close(averaged.module[0].bn.running_var, var)
        assert all(m.momentum == 0.1 for m in layers_of(averaged))
        assert layers_of(averaged)[0].sc.w_out.any()


class TestBatchNormCheckpoint:
    """A BN model's weights go into its DN twin by key, and give the BN model's output."""

    @pytest.fixture
    def twins(self):
        return two_blocks('BN').eval(), two_blocks('DNB').eval()

    @pytest.mark.shows('BatchNorm checkpoints')
    def test_loads_strictly_and_is_batch_norm(self, twins, close):
        bn, dn = twins
        state = bn.state_dict()
        keys = list(state)
        assert layers_of(dn)[0].sc.w_out.any()
        result = dn.load_state_dict(state, strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert list(state) == keys  # the caller's is left as it was
        x = images()
        close(dn(x), bn(x))
        close(dn.train()(x), bn.train()(x))

    @pytest.mark.parametrize('prefix', ['', 'module.'])
    @pytest.mark.parametrize('strict', [True, False])
    def test_mmengines_loader(self, twins, strict, prefix, tmp_path, close):
        bn, dn = twins
        path = str(tmp_path / 'bn.pth')
        torch.save({prefix + key: value for key, value in bn.state_dict().items()}, path)
        load_checkpoint(dn, path, strict=strict)
        x = images()
        close(dn(x), bn(x))

    @pytest.mark.parametrize('prefix', ['', 'module.'])
    @pytest.mark.parametrize('strict', [True, False])
    def test_mmengines_loader_of_a_dn_checkpoint(self, twins, strict, prefix, tmp_path):
        _, dn = twins
        other = two_blocks().eval()
        path = str(tmp_path / 'dn.pth')
        torch.save({prefix + key: value for key, value in dn.state_dict().items()}, path)
        load_checkpoint(other, path, strict=strict)
        x = images()
        assert torch.equal(other(x), dn(x))

    def test_into_a_wrapped_model(self, twins, close):
        bn, dn = twins
        wrapped = nn.Sequential()
        wrapped.add_module('module', dn)
        wrapped.load_state_dict({f'module.{k}': v for k, v in bn.state_dict().items()})
        x = images()
        close(dn(x), bn(x))

    def test_into_the_layer_itself(self, close):
        bn, dn = used(nn.BatchNorm2d(3)).double(), used(DNB(3)).double()
        dn.load_state_dict(bn.state_dict())
        x = images()
        close(dn(x), bn(x))

    def test_into_a_layer_whose_sc_is_pruned(self, close):
        bn, dn = used(nn.BatchNorm2d(3)).double(), used(DNB(3)).double()
        prune.l1_unstructured(dn.sc, 'w_out', amount=0.5)
        prune.l1_unstructured(dn.sc, 'w_in', amount=0.5)
        dn.load_state_dict(bn.state_dict())
        x = images()
        close(dn(x), bn(x))

    def test_an_sc_that_cannot_be_set_to_identity_is_told(self):
        dn = used(DNB(3))
        parametrizations.spectral_norm(dn.sc, 'w_out')
        with pytest.raises(ValueError, match=r'^sc\.w_out is computed from.*remove_parametrizat'):
            dn.load_state_dict(nn.BatchNorm2d(3).state_dict())

    @pytest.mark.parametrize('key', ['weight', 'bias', 'running_mean', 'running_var'])
    def test_an_incomplete_set_is_reported(self, twins, key):
        bn, dn = twins
        state = bn.state_dict()
        state.pop(f'1.bn.{key}')
        result = dn.load_state_dict(state, strict=False)
        assert result.missing_keys == [f'1.bn.bn.{key}'] and not result.unexpected_keys
        with pytest.raises(RuntimeError, match=f'Missing key.*"1.bn.bn.{key}"'):
            dn.load_state_dict(state)

    def test_a_missing_layer_is_reported(self, twins):
        bn, dn = twins
        state = {k: v for k, v in bn.state_dict().items() if not k.startswith('1.bn.')}
        missing = dn.load_state_dict(state, strict=False).missing_keys
        # torch supplies num_batches_tracked itself where a checkpoint has no versions
        assert len(missing) == 8 and all(key.startswith('1.bn.') for key in missing)

    def test_unexpected_keys_are_reported(self, twins):
        bn, dn = twins
        with pytest.raises(RuntimeError, match='Unexpected key.*1.bn.scale'):
            dn.load_state_dict({**bn.state_dict(), '1.bn.scale': torch.ones(8)})

    def test_other_shapes_are_reported(self, twins):
        bn, dn = twins
        with pytest.raises(RuntimeError, match='size mismatch for 1.bn.bn.weight'):
            dn.load_state_dict({**bn.state_dict(), '1.bn.weight': torch.ones(9)})

    def test_a_part_of_sc_is_not_completed(self, twins):
        bn, dn = twins
        state = {**bn.state_dict(), '1.bn.sc.w_in': layers_of(dn)[1].sc.w_in}
        assert dn.load_state_dict(state, strict=False).missing_keys == [
            '1.bn.sc.b_in',
            '1.bn.sc.w_out',
            '1.bn.sc.b_out',
        ]

    def test_a_dn_checkpoint_into_batch_norm_is_refused(self, twins):
        bn, dn = twins
        with pytest.raises(RuntimeError, match='0.bn.sc.w_in'):
            bn.load_state_dict(dn.state_dict())

    def test_a_sync_checkpoint_and_a_plain_one_are_the_same(self):
        layer, sync = used(DNB(8)), SyncDNB(8)
        sync.load_state_dict(layer.state_dict())
        layer.load_state_dict(sync.state_dict())

    def test_affine_less_batch_norm(self):
        bn = nn.BatchNorm2d(8, affine=False)
        DNB(8, affine=False).load_state_dict(bn.state_dict())
        with pytest.raises(RuntimeError, match='Missing key.*bn.weight'):
            DNB(8).load_state_dict(bn.state_dict())

    @pytest.mark.parametrize(
        'sc',
        [None, dict(type=VariantSC, hidden='channelwise'), dict(type=VariantSC, outputs='scale')],
    )
    def test_assigned_to_a_layer_on_meta(self, sc, close):
        bn = used(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).double().eval()
        with torch.device('meta'):
            dn = nn.Sequential(nn.Conv2d(3, 8, 3), DNB(8, sc=sc)).double().eval()
        result = dn.load_state_dict(bn.state_dict(), assign=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert not any(t.is_meta for t in (*dn.parameters(), *dn.buffers()))
        assert {p.dtype for p in dn.parameters()} == {torch.float64}
        x = images()
        close(dn(x), bn(x))
        dn.train()(x).square().sum().backward()
        assert dn[1].sc.w_out.grad.any() and (sc or dn[1].sc.w_in.any())

    def test_what_a_layer_on_meta_is_not_assigned_stays_missing(self):
        with torch.device('meta'):
            dn = DNB(8)
        state = {k: v for k, v in nn.BatchNorm2d(8).state_dict().items() if k != 'bias'}
        assert dn.load_state_dict(state, assign=True, strict=False).missing_keys == ['bn.bias']
        assert dn.bn.bias.is_meta


def flops_by_mmengine(model, x):
    return get_model_complexity_info(model, None, inputs=(x,), show_table=False, show_arch=False)[
        'flops'
    ]


def flops_by_torch(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.shows("counters of operations: MMEngine's, torch's")
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('count', [flops_by_mmengine, flops_by_torch])
def test_counters_of_operations_see_batch_norm_and_sc(count, training):
    """mmdet's get_flops.py is MMEngine's."""
    x = torch.rand(2, 3, 32, 32)
    counts = {}
    for norm in (nn.BatchNorm2d, DNB, DNC):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8)).train(training)
        counts[norm] = count(model, x)
    sc = sum(weight.numel() for weight in (model[1].sc.w_in, model[1].sc.w_out))
    per_mult_add = 2 if count is flops_by_torch else 1
    assert counts[DNB] - counts[nn.BatchNorm2d] == 2 * sc * per_mult_add  # two images
    assert counts[DNC] - counts[nn.BatchNorm2d] == sc * per_mult_add


def test_counters_that_hang_hooks_on_modules_find_the_inner_norm():
    """As thop and ptflops do it: a hook on each module without children."""
    counted = {}
    model = nn.Sequential(nn.Conv2d(3, 8, 3), DNB(8))
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: counted.update({name: inputs[0].shape})
            )
    with torch.no_grad():
        model(torch.rand(2, 3, 10, 10))
    assert counted == {'0': (2, 3, 10, 10), '1.bn': (2, 8, 8, 8), '1.sc': (2, 8)}
