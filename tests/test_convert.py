"""Conversion keeps everything that a BatchNorm carries, and says what it cannot keep."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchvision
from conftest import awake
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from dn_mmdet import DNB, DNC, DNB1d, DNB3d, SyncDNB, convert
from dn_mmdet.convert import batch_norms, convert_checkpoint, convert_norm, dn_layers, swap_norm

ROOT = Path(__file__).parents[1]


def used(model):
    """The model with BatchNorms as after training: no statistic or weight at its default."""
    for bn in model.modules():
        if isinstance(bn, nn.modules.batchnorm._BatchNorm):
            if bn.track_running_stats:
                bn.running_mean.normal_(std=0.3)
                bn.running_var.uniform_(0.5, 2)
            if bn.affine:
                nn.init.uniform_(bn.weight, 0.5, 1.5)
                nn.init.normal_(bn.bias, std=0.3)
    return model


def small_net(norm=nn.BatchNorm2d, **args):
    return used(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), norm(8, **args), nn.ReLU(), nn.Conv2d(8, 6, 3), norm(6, **args)
        )
    )


def assert_same_outputs(before, after, *inputs, close, train=True):
    """In both modes, and the running statistics after a training step too."""
    before, after = copy.deepcopy(before), copy.deepcopy(after)
    for mode in (False, True) if train else (False,):
        before.train(mode)
        after.train(mode)
        with torch.no_grad():
            close(after(*inputs), before(*inputs))
    expected = [v for k, v in before.state_dict().items() if 'running' in k]
    got = [v for k, v in after.state_dict().items() if 'running' in k]
    for running, running_before in zip(got, expected, strict=True):
        close(running, running_before)


@pytest.mark.parametrize('norm, layer', [('DNB', DNB), ('DNC', DNC)])
def test_output_is_unchanged_and_layers_keep_their_names(norm, layer, close):
    model = small_net().double()
    before = copy.deepcopy(model)
    converted = convert_norm(model, norm)
    assert converted is model
    assert {name: type(child) for name, child in dn_layers(model).items()} == {
        '1': layer,
        '4': layer,
    }
    assert batch_norms(model) == {}
    assert_same_outputs(before, model, torch.randn(4, 3, 9, 7).double(), close=close)


def test_a_converted_model_adapts_once_its_sc_is_awake():
    model = convert_norm(small_net().eval(), 'DNB')
    x = torch.randn(2, 3, 9, 7)
    before = model(x)
    assert not torch.allclose(awake(model)(x), before, atol=1e-2)


@pytest.mark.parametrize(
    'bn, layer, shape',
    [
        (nn.BatchNorm1d(5), DNB1d, (4, 5)),
        (nn.BatchNorm1d(5), DNB1d, (4, 5, 3)),
        (nn.BatchNorm2d(5), DNB, (4, 5, 3, 2)),
        (nn.BatchNorm3d(5), DNB3d, (4, 5, 3, 2, 3)),
        (revert_sync_batchnorm(nn.SyncBatchNorm(5)), SyncDNB, (4, 5, 3, 2)),
    ],
)
def test_each_kind_of_batch_norm_gets_its_kind_of_layer(bn, layer, shape, close):
    bn = used(bn).double()
    converted = convert_norm(copy.deepcopy(bn), 'DNB')
    assert type(converted) is layer
    assert_same_outputs(bn, converted, torch.randn(shape).double(), close=close)


def test_a_synchronised_norm_stays_synchronised(close):
    bn = used(nn.SyncBatchNorm(5)).double().eval()
    converted = convert_norm(copy.deepcopy(bn), 'DNB')
    assert type(converted) is SyncDNB and type(converted.bn) is nn.SyncBatchNorm
    x = torch.randn(4, 5, 3, 2).double()
    close(converted(x), bn(x))


@pytest.mark.parametrize(
    'args',
    [
        dict(eps=1e-3, momentum=0.03),
        dict(momentum=None),
        dict(affine=False),
        dict(track_running_stats=False),
        dict(affine=False, track_running_stats=False),
    ],
)
def test_arguments_of_the_batch_norm_are_kept(args, close):
    model = small_net(**args).double()
    before = copy.deepcopy(model)
    convert_norm(model, 'DNB')
    for name, value in args.items():
        assert getattr(model[1], name) == value
    assert_same_outputs(before, model, torch.randn(4, 3, 9, 7).double(), close=close)


def test_the_batch_norm_itself_is_kept_with_mode_freezing_and_dtype():
    model = small_net().half()
    model[1].eval().requires_grad_(False)
    bns = batch_norms(model)
    seen = []
    model[4].weight.register_hook(seen.append)
    convert_norm(model, 'DNB')
    for name, bn in bns.items():
        assert model.get_submodule(name).bn is bn
    assert [m.training for m in (model[1], model[1].bn, model[1].sc)] == [False] * 3
    assert model[4].training and model[4].sc.training
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in model[1].bn.parameters())
    assert all(p.requires_grad for p in (*model[1].sc.parameters(), *model[4].parameters()))
    assert 'bn_requires_grad=False' in repr(model[1])
    model(torch.randn(2, 3, 9, 9).half()).sum().backward()
    assert len(seen) == 1


def test_a_model_without_storage_stays_without():
    model = convert_norm(small_net().to('meta'), 'DNB')
    assert {p.device.type for p in model.parameters()} == {'meta'}


def test_arguments_reach_every_layer():
    model = convert_norm(
        small_net(),
        'DNB',
        min_channels=3,
        inputs='standardized',
        bound=None,
        bn_requires_grad=False,
        sc_requires_grad=False,
    )
    for layer in dn_layers(model).values():
        assert len(layer.sc.b_in) == 3
        assert (layer.sc.inputs, layer.sc.bound) == ('standardized', None)
        assert not any(p.requires_grad for p in layer.parameters())
        assert not layer.bn.weight.requires_grad


def test_a_module_used_twice_stays_one():
    model = small_net()
    model.append(model[1])
    model.append(nn.Sequential(model[4], nn.BatchNorm2d(6)))
    convert_norm(model, 'DNB')
    assert model[5] is model[1] and model[6][0] is model[4]
    assert len({id(layer) for layer in dn_layers(model).values()}) == 3


@pytest.mark.parametrize(
    'only, skip, expected',
    [
        ('1', None, {'1'}),
        (None, '1', {'4', '6.0', '6.1'}),
        ('6', None, {'6.0', '6.1'}),
        (['6', '4'], '*.1', {'4', '6.0'}),
        ('?', '6.*', {'1', '4'}),
    ],
)
def test_patterns_choose(only, skip, expected):
    model = small_net()
    model.append(nn.Identity())
    model.append(nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6)))
    convert_norm(model, 'DNB', only=only, skip=skip)
    assert set(dn_layers(model)) == expected


def test_converting_the_rest_later_leaves_what_is_converted():
    model = convert_norm(small_net(), 'DNC', only='1')
    first = model[1]
    convert_norm(model, 'DNB')
    assert model[1] is first and type(model[4]) is DNB


def test_a_batch_norm_checkpoint_loads_into_the_converted_model(close):
    source, model = small_net(), convert_norm(small_net(), 'DNB')
    model.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 9, 7)
    close(model.eval()(x), source.eval()(x))


@pytest.mark.shows('copies and pickles')
def test_a_converted_model_can_be_pickled_and_copied(close):
    model = awake(convert_norm(small_net().eval(), 'DNB'))
    x = torch.randn(2, 3, 9, 7)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        close(twin(x), model(x))


@pytest.mark.shows('conversion of mmdet, torchvision and timm models: the output stays')
@pytest.mark.parametrize(
    'build, shape',
    [
        (torchvision.models.mobilenet_v2, (2, 3, 64, 64)),
        (torchvision.models.resnet18, (2, 3, 64, 64)),
        (torchvision.models.shufflenet_v2_x0_5, (2, 3, 64, 64)),
        (torchvision.models.video.r3d_18, (1, 3, 4, 32, 32)),
    ],
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_torchvision_models(build, shape, close):
    model = used(build(weights=None))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    count = len(batch_norms(model))
    before = copy.deepcopy(model).double()
    convert_norm(model, 'DNB').double()
    assert len(dn_layers(model)) == count and not batch_norms(model)
    assert_same_outputs(before, model, torch.randn(shape).double(), close=close)


def test_a_frozen_batch_norm_stays_frozen_inside(close):
    model = small_net(torchvision.ops.FrozenBatchNorm2d)
    for frozen in (model[1], model[4]):
        frozen.running_mean.normal_()
        frozen.running_var.uniform_(0.5, 2)
        frozen.weight.uniform_(0.5, 2)
    before = copy.deepcopy(model)
    convert_norm(model, 'DNB')
    assert type(model[1]) is DNB and not list(model[1].bn.parameters())
    assert_same_outputs(before, model, torch.randn(4, 3, 9, 7), close=close)
    twin = convert_norm(small_net(torchvision.ops.FrozenBatchNorm2d), 'DNB')
    twin.load_state_dict(before.state_dict())
    assert_same_outputs(before, twin, torch.randn(4, 3, 9, 7), close=close)


@pytest.mark.shows('conversion of mmdet, torchvision and timm models: the output stays')
@pytest.mark.parametrize(
    'name',
    ['resnet18', 'efficientnet_b0', 'mobilenetv3_small_050', 'resnetv2_50x1_bit', 'regnety_002'],
)
def test_timm_models(name, close):
    timm = pytest.importorskip('timm', reason='timm is not installed (extra `export`)')
    model = timm.create_model(name, pretrained=False, num_classes=7)
    if name == 'resnetv2_50x1_bit':  # GroupNorm only
        with pytest.raises(
            ValueError,
            match='no BatchNorm to convert in ResNetV2, which holds '
            r'\d+ GroupNormAct',
        ):
            convert_norm(model, 'DNB')
        return
    used(model)
    count = len(batch_norms(model))
    before = copy.deepcopy(model).double()
    convert_norm(model, 'DNB').double()
    assert len(dn_layers(model)) == count and not batch_norms(model)
    x = torch.randn(2, 3, 64, 64).double()
    assert_same_outputs(before, model, x, close=close)
    twin = convert_norm(timm.create_model(name, pretrained=False, num_classes=7), 'DNB').double()
    twin.load_state_dict(before.state_dict())
    assert_same_outputs(before, twin, x, close=close, train=False)


def test_the_activation_inside_timms_norm_is_kept_after_an_awake_sc():
    timm_layers = pytest.importorskip('timm.layers', reason='timm is not installed')
    norm = convert_norm(timm_layers.BatchNormAct2d(4), 'DNB')
    plain = DNB(4)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(awake(norm)(x).clamp(min=0), norm(x))
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm.eval()(x), plain.eval()(x).relu())
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), norm(x))


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    'norm, message',
    [
        (ScaledNorm(6), r'2\.1: test_convert\.ScaledNorm has a forward of its own'),
        (nn.LazyBatchNorm2d(), r'2\.1: .*LazyBatchNorm2d does not know its number of channels'),
    ],
)
@pytest.mark.filterwarnings('ignore:Lazy modules')
def test_what_cannot_be_kept_is_refused_by_name_and_nothing_is_changed(norm, message):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 1), nn.Sequential(nn.ReLU(), norm))
    with pytest.raises(ValueError, match=message):
        convert_norm(model, 'DNB')
    assert not dn_layers(model)
    convert_norm(model, 'DNB', skip='2.1')
    assert set(dn_layers(model)) == {'0'}


@pytest.mark.parametrize(
    'register',
    ['register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook'],
)
def test_hooks_that_would_fall_silent_are_refused(register):
    model = small_net()
    handle = getattr(model[4], register)(lambda *_: None)
    with pytest.raises(ValueError, match='4: .*BatchNorm2d has hooks'):
        convert_norm(model, 'DNB')
    handle.remove()
    assert len(dn_layers(convert_norm(model, 'DNB'))) == 2


@pytest.mark.parametrize(
    'args, error, message',
    [
        (dict(norm='DNX'), ValueError, r"expected one of \('DNB', 'DNC'\).*got 'DNX'"),
        (
            dict(only='backbone.*'),
            ValueError,
            r"only: 'backbone\.\*' matches none of 2 norms \(1, 4",
        ),
        (dict(skip=['1', '7']), ValueError, "skip: '7' matches none"),
        (dict(reductoin=4), TypeError, r'reductoin: no such argument; expected some of'),
        (dict(eps=1e-3), TypeError, 'eps: no such argument.*are those of each BatchNorm'),
        (dict(reduction=0), ValueError, 'reduction: expected an integer of at least 1'),
        (dict(norm='DNC', inputs='standardized'), ValueError, "inputs: expected 'raw', .*: DNC "),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_changed(args, error, message):
    model = small_net()
    with pytest.raises(error, match=message):
        convert_norm(model, **args)
    assert not dn_layers(model)
    assert model[1].weight.requires_grad


def test_a_model_without_batch_norm_says_what_it_holds():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.LayerNorm(8))
    with pytest.raises(
        ValueError,
        match='no BatchNorm to convert in Sequential, which holds 1 GroupNorm, 1 LayerNorm',
    ):
        convert_norm(model, 'DNB')


@pytest.mark.parametrize('patterns', [dict(only=[]), dict(skip='*'), dict(only='1', skip='1')])
def test_patterns_that_leave_nothing_are_named(patterns):
    with pytest.raises(ValueError, match='only, skip: .* leave none of 2: '):
        convert_norm(small_net(), 'DNB', **patterns)


def test_converting_the_same_part_twice_changes_nothing():
    model = convert_norm(small_net(), 'DNB', skip='1')
    before = list(model.modules())
    with pytest.warns(UserWarning, match='already converted: it holds 1 DN layers'):
        convert_norm(model, 'DNB', skip='1')
    assert list(model.modules()) == before


def test_a_converted_model_is_left_and_says_so():
    model = convert_norm(small_net(), 'DNB')
    layers = dn_layers(model)
    with pytest.warns(UserWarning, match='already converted: it holds 2 DN layers'):
        assert convert_norm(model, 'DNB') is model
    assert dn_layers(model) == layers


def test_the_norm_that_mmcv_would_fold_into_the_wrong_convolution_is_named(close):
    block = used(
        nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
        )
    ).eval()
    x = torch.randn(2, 3, 5, 5)

    def fuse_after_converting(**patterns):
        model = nn.ModuleDict(dict(stem=copy.deepcopy(block)))
        return fuse_conv_bn(convert_norm(model, 'DNB', **patterns))['stem'](x)

    with pytest.warns(UserWarning, match=r'stem\.3: .*wrong convolution'):
        wrong = fuse_after_converting(only='stem.1')
    assert not torch.allclose(wrong, block(x), atol=1e-2)
    for patterns in (dict(), dict(skip='stem.1'), dict(only=['stem.1', 'stem.3'])):
        close(fuse_after_converting(**patterns), block(x))


@pytest.mark.parametrize('name', ['repvit_m0_9', 'repvgg_a0', 'mobileone_s0', 'levit_128s'])
def test_models_that_can_fold_say_so_and_do_not_drop_sc(name):
    """timm's: those that were converted before they were folded, and the other way round."""
    timm = pytest.importorskip('timm', reason='needs timm, which has such models')
    from timm.utils.model import reparameterize_model

    model = timm.create_model(name, num_classes=3).eval()
    with pytest.warns(UserWarning, match=r'(fuse|reparameterize) \(.*can fold BatchNorms.*before'):
        converted = awake(convert_norm(copy.deepcopy(model), 'DNB'))
    with pytest.raises(TypeError, match='expected a BatchNorm to fold, got DNB'):
        reparameterize_model(converted)
    assert not batch_norms(reparameterize_model(model))


def test_methods_of_every_module_around_a_norm_are_found():
    class Yolo(nn.Sequential):
        def fuse(self):
            pass

    class RepConv(nn.Sequential):
        def switch_to_deploy(self):
            pass

        def fuse_repvgg_block(self):  # of YOLOv7
            pass

        def _make_fuse_layers(self):  # of HRNet: another matter
            pass

    def build():
        return Yolo(
            nn.Sequential(RepConv(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))),
            RepConv(nn.BatchNorm2d(8)),
            nn.Sequential(nn.BatchNorm2d(8)),
        )

    with pytest.warns(UserWarning) as caught:
        convert_norm(build(), 'DNB')
    assert [str(w.message).partition(' can fold')[0] for w in caught] == [
        'RepConv.fuse_repvgg_block (0.0), RepConv.switch_to_deploy (0.0), Yolo.fuse (the model)'
    ]
    convert_norm(build()[2], 'DNB')  # nothing that folds


def test_a_model_inside_ddp_is_refused():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match='inside DistributedDataParallel.*convert it first'):
            convert_norm(nn.parallel.DistributedDataParallel(small_net()), 'DNB')
    finally:
        dist.destroy_process_group()


def zoo(name):
    return get_config(f'mmdet::{name}.py')


def build(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(copy.deepcopy(cfg.model))


@pytest.fixture
def log(caplog, request):
    """What mmengine's logger says, which hands nothing up to pytest's."""
    MMLogger.get_instance(request.node.name).addHandler(caplog.handler)  # the newest is used
    return lambda: '\n'.join(record.getMessage() for record in caplog.records)


def test_a_swapped_config_builds_dn_layers_and_the_original_is_left():
    cfg = zoo('retinanet/retinanet_r50_fpn_1x_coco')
    before = cfg.pretty_text
    swapped = swap_norm(cfg, 'DNB', min_channels=4)
    assert cfg.pretty_text == before
    assert swapped.model.backbone.norm_cfg == dict(type='DNB', min_channels=4)
    model = build(swapped)
    assert len(dn_layers(model)) == 53 and not batch_norms(model)


def test_defaults_that_a_config_leaves_out_are_written_out():
    cfg = zoo('retinanet/retinanet_r50_fpn_1x_coco')
    del cfg.model.backbone.norm_cfg
    assert swap_norm(cfg, 'DNC').model.backbone.norm_cfg == dict(type='DNC')
    darknet = swap_norm(zoo('yolo/yolov3_d53_8xb8-320-273e_coco'), 'DNB')
    assert darknet.model.neck.norm_cfg == dict(type='DNB')


def test_arguments_of_each_norm_and_its_synchronisation_are_kept():
    swapped = swap_norm(zoo('yolox/yolox_tiny_8xb8-300e_coco'), 'DNB')
    assert swapped.model.neck.norm_cfg == dict(type='DNB', momentum=0.03, eps=0.001)
    rtmdet = swap_norm(zoo('rtmdet/rtmdet_tiny_8xb32-300e_coco'), 'DNB').model
    assert rtmdet.backbone.norm_cfg == dict(type='SyncDNB')


def test_frozen_norms_keep_a_trainable_sc_and_that_is_said(log):
    swapped = swap_norm(zoo('detr/detr_r50_8xb2-150e_coco'), 'DNB')
    assert swapped.model.backbone.norm_cfg == dict(type='DNB', bn_requires_grad=False)
    assert 'bn_requires_grad=False in model.backbone.norm_cfg' in log()
    layer = build(swapped).backbone.layer2[0].bn1
    assert not layer.bn.weight.requires_grad and layer.sc.w_in.requires_grad


def test_norms_that_no_config_reaches_are_counted_and_named(log):
    swap_norm(zoo('yolof/yolof_r50-c5_8xb8-1x_coco'), 'DNB')
    assert 'DNB in place of BatchNorm in 59 layers' in log()
    assert (
        '14 BatchNorms stay, because no config reaches them: 14 in DilatedEncoder (such as '
        'neck.lateral_norm)' in log()
    )


@pytest.mark.slow
def test_a_dumped_config_reloads_in_a_process_that_never_heard_of_dn_mmdet(tmp_path):
    cfg = zoo('yolox/yolox_tiny_8xb8-300e_coco')
    cfg.custom_imports = dict(imports='json')
    swapped = swap_norm(cfg, 'DNB')
    swapped.dump(tmp_path / 'dumped.py')
    code = (
        'from mmdet.apis import init_detector\n'
        'model = init_detector("dumped.py", device="cpu")\n'
        'print(sum(type(m).__name__ == "DNB" for m in model.modules()))'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(len(dn_layers(build(swapped)))) == '74'


def test_a_config_in_the_new_style_names_classes(tmp_path):
    (tmp_path / 'new_style.py').write_text("""
from mmdet.models import FPN, RetinaHead, RetinaNet, ResNet
from torch.nn import BatchNorm2d
model = dict(type=RetinaNet, backbone=dict(type=ResNet, depth=18,
                                           norm_cfg=dict(type=BatchNorm2d, eps=1e-3)),
             neck=dict(type=FPN, in_channels=[64, 128, 256, 512], out_channels=8, num_outs=5,
                       norm_cfg=dict(type='BN')),
             bbox_head=dict(type=RetinaHead, num_classes=3, in_channels=8, feat_channels=8))
""")
    swapped = swap_norm(Config.fromfile(tmp_path / 'new_style.py', lazy_import=True), 'DNB')
    assert swapped.model.backbone.norm_cfg == dict(type='DNB', eps=1e-3)
    swapped.dump(tmp_path / 'dumped.py')
    model = build(Config.fromfile(tmp_path / 'dumped.py'))
    assert len(dn_layers(model)) == 28 and not batch_norms(model)


def test_a_bn_checkpoint_gives_a_swapped_model_bns_output(close):
    cfg = zoo('yolox/yolox_tiny_8xb8-300e_coco')
    source = used(build(cfg)).double().eval()
    model = build(swap_norm(cfg, 'DNB')).double().eval()
    model.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 64, 64).double()
    with torch.no_grad():
        close(
            torch.cat([level.flatten() for kind in model(x, mode='tensor') for level in kind]),
            torch.cat([level.flatten() for kind in source(x, mode='tensor') for level in kind]),
        )


@pytest.mark.parametrize('node', [[dict(type='A')], dict(type='A'), 'A'])
def test_a_norm_is_found_in_a_config_of_another_structure_than_the_model(node):
    assert convert._config_path('neck.2.conv.bn', dict(neck=node)) in ('neck', '')
    assert convert._config_path('neck.stage1.bn', dict(neck=node)) in ('neck', '')


def test_swapping_twice_changes_nothing_and_says_so(log):
    once = swap_norm(zoo('yolox/yolox_tiny_8xb8-300e_coco'), 'DNB')
    assert swap_norm(once, 'DNB').pretty_text == once.pretty_text
    assert 'already converted: this config builds 74 DN layers' in log()


def test_layers_of_the_other_kind_or_of_other_arguments_are_told():
    once = swap_norm(zoo('yolox/yolox_tiny_8xb8-300e_coco'), 'DNC', reduction=16)
    with pytest.raises(ValueError, match='norm_cfg: expected BatchNorm or DNB, got DNC'):
        swap_norm(once, 'DNB')
    once.model.bbox_head.norm_cfg = dict(type='BN')
    with pytest.raises(ValueError, match='norm_cfg: expected BatchNorm or DNB, got DNC'):
        swap_norm(once, 'DNB')
    with pytest.raises(ValueError, match='DNC with bound=0.25 already.*bound=0.5 was asked'):
        swap_norm(once, 'DNC', bound=0.5)
    assert swap_norm(once, 'DNC', reduction=16).model.bbox_head.norm_cfg.type == 'DNC'
    model = convert_norm(small_net(), 'DNC')
    with pytest.raises(ValueError, match='holds DNC and no BatchNorm to convert to DNB'):
        convert_norm(model, 'DNB')
    with pytest.warns(UserWarning, match='nothing was changed, nor was bound set'):
        convert_norm(model, 'DNC', bound=0.5)


def test_a_dict_that_stands_in_several_places_is_swapped_once():
    cfg = zoo('yolox/yolox_tiny_8xb8-300e_coco')
    shared = Config(dict(norm_cfg=dict(type='BN', eps=0.1))).norm_cfg
    for part in ('backbone', 'neck', 'bbox_head'):
        cfg.model[part].norm_cfg = shared
    new = swap_norm(cfg, 'DNB')
    for part in ('backbone', 'neck', 'bbox_head'):
        assert new.model[part].norm_cfg == dict(type='DNB', eps=0.1)


def train_is_replaced(self, mode=True):
    return self


@pytest.mark.parametrize('where', ['instance', 'class'])
def test_a_norm_that_a_model_keeps_in_eval_mode_stays_in_it(where, close):
    kept = type(
        'Kept', (nn.BatchNorm2d,), dict(train=train_is_replaced) if where == 'class' else {}
    )
    net = nn.Sequential(nn.Conv2d(3, 8, 1), kept(8))
    net[1].training = False
    if where == 'instance':
        net[1].train = train_is_replaced.__get__(net[1])
    model = convert_norm(net, 'DNB').train()
    assert not model[1].bn.training
    model(torch.randn(4, 3, 5, 5) + 3)
    assert not model[1].bn.running_mean.any()


def test_configs_that_cannot_be_swapped_say_why():
    with pytest.raises(ValueError, match=r"expected one of \('DNB', 'DNC'\).*got 'BN'"):
        swap_norm(zoo('ssd/ssd300_coco'), 'BN')
    with pytest.raises(
        ValueError,
        match='no BatchNorm that this config could change in '
        'SingleStageDetector, which holds 1 L2Norm',
    ):
        swap_norm(zoo('ssd/ssd300_coco'), 'DNB')
    with pytest.raises(ValueError, match='expected a config with a model, found only a, b'):
        swap_norm(Config(dict(a=1, b=2)), 'DNB')
    with pytest.raises(TypeError, match='requires_grad: no such argument'):
        swap_norm(zoo('ssd/ssd300_coco'), 'DNB', requires_grad=False)


def test_a_converted_checkpoint_loads_strictly_and_computes_bns_output(close):
    source = used(torchvision.models.resnet18(weights=None)).eval()
    model = convert_norm(torchvision.models.resnet18(weights=None), 'DNB', reduction=16).eval()
    converted = convert_checkpoint(source.state_dict(), reduction=16)
    assert converted.keys() == model.state_dict().keys()
    model.load_state_dict(converted)
    x = torch.randn(1, 3, 64, 64)
    close(model(x), source(x))


def test_meta_and_averaged_weights_are_kept_and_the_optimizer_is_not():
    state = small_net().state_dict()
    checkpoint = dict(
        meta=dict(epoch=3),
        state_dict=state,
        optimizer=dict(state={}),
        param_schedulers=[],
        message_hub=dict(log_scalars={}),
        ema_state_dict={
            'steps': torch.tensor(7),
            **{f'module.{k}': v + 1 for k, v in state.items()},
        },
    )
    before = copy.deepcopy(checkpoint)
    converted = convert_checkpoint(checkpoint)
    assert set(converted) == {'meta', 'state_dict', 'message_hub', 'ema_state_dict'}
    assert converted['meta'] == dict(epoch=3)
    assert 'module.1.bn.weight' in converted['ema_state_dict']
    assert torch.equal(
        converted['ema_state_dict']['module.1.sc.w_in'], converted['state_dict']['1.sc.w_in']
    )
    assert list(checkpoint['state_dict']) == list(before['state_dict'])


def test_only_the_layers_of_a_given_model_are_converted():
    model = convert_norm(small_net(), 'DNC', only='4', min_channels=2)
    converted = convert_checkpoint(small_net().state_dict(), model)
    model.load_state_dict(converted)
    assert '1.weight' in converted and '4.bn.weight' in converted


@pytest.mark.parametrize(
    'checkpoint, message',
    [
        (
            dict(state_dict=nn.GroupNorm(1, 2).state_dict()),
            'no BatchNorm to convert among 2 weights',
        ),
        (dict(meta=1, model=2), 'expected weights.*found meta, model'),
        (DNB(4).state_dict(), 'weights alone are not enough to go back to BatchNorm'),
    ],
)
def test_checkpoints_that_cannot_be_converted_say_why(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(checkpoint)
