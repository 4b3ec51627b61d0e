"""A simplified model computes the same, in the operators that its target allows."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from conftest import awake
from mmcv.cnn import ConvModule
from test_convert import used
from torch import nn

from dn_mmdet import DNB, DNC
from dn_mmdet.convert import convert_norm
from dn_mmdet.deploy import export, simplify
from dn_mmdet.deploy.simplify import simplified
from dn_mmdet.experiments.ablation import VariantSC
from dn_mmdet.experiments.controls import StaticDN

with_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export.PACKAGES),
    reason="needs pip install -e '.[export]'",
)
# What some runtime rejects, computes wrongly or runs slowly.
FORBIDDEN = {
    'BatchNormalization',
    'ReduceSumSquare',
    'ReduceMean',
    'ReduceL2',
    'InstanceNormalization',
}


class Net(nn.Module):
    """Convolutions of every kind before a norm."""

    def __init__(self, norm=DNB, **args):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = norm(8, **args)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm2 = norm(8, **args)
        self.expand = nn.Conv2d(8, 32, 1)
        self.norm3 = norm(32, **args)
        self.project = nn.Conv2d(32, 8, 1, bias=False)
        self.norm4 = norm(8, **args)

    def forward(self, x):
        x = self.norm1(self.stem(x)).clip(0, 6)
        y = self.norm2(self.depthwise(x)).relu()
        y = self.norm3(self.expand(y)).clip(0, 6)
        return self.norm4(self.project(y)) + x[:, :, 1:-1, 1:-1]


def net(norm=DNB, **args):
    return awake(used(Net(norm, **args)), 0.3).eval()


def images(number=1, size=21):
    return torch.randn(number, 3, size, size)


def check(model, x, target, close):
    """The simplified model, once its output is that of the model."""
    simple = simplified(model, x[:1], target)
    with torch.no_grad():
        close(simple.model(x), model(x))
    return simple


@pytest.mark.parametrize('target', simplify.TARGETS)
@pytest.mark.parametrize(
    'args',
    [dict(), dict(inputs='standardized'), dict(bound=None), dict(affine=False), dict(eps=0.1)],
    ids=str,
)
def test_every_kind_of_convolution(args, target, close):
    simple = check(net(**args), images(), target, close)
    assert simple.dynamic == ['norm1', 'norm2', 'norm3', 'norm4']
    assert simple.folded == simple.left == []
    kinds = [type(norm).__name__ for norm in simple.model.children() if 'DN' in str(type(norm))]
    if target == 'portable':
        assert kinds == ['PortableDN'] * 4
    else:
        assert kinds == ['OnnxruntimeDN'] * 2 + ['WideningDN', 'OnnxruntimeDN']
    assert all(norm.is_whole for norm in simple.model.modules() if hasattr(norm, 'is_whole'))


def test_a_batch_is_as_its_images_one_by_one(close):
    x = images(3)
    simple = check(net(), x, 'portable', close)
    with torch.no_grad():
        close(simple.model(x), torch.cat([simple.model(image[None]) for image in x]))


@pytest.mark.parametrize('target', simplify.TARGETS)
def test_channels_with_hardly_any_weight_are_guarded(target, close):
    model = net()
    for norm in (model.norm1, model.norm2, model.norm3, model.norm4):
        with torch.no_grad():
            norm.bn.weight[:4] = torch.tensor([0, 1e-12, -1e-6, 1e-3])
            norm.bn.bias[:4] = torch.tensor([2.0, -3, 1, 0.5])
    simple = check(model, images(), target, close)
    assert not any(norm.is_whole for norm in simple.model.modules() if hasattr(norm, 'is_whole'))


def test_a_grey_image_has_no_variance(close):
    for target in simplify.TARGETS:
        simple = simplified(net(), images(), target)
        with torch.no_grad():
            assert simple.model(torch.full((1, 3, 21, 21), 100.0)).isfinite().all()


def test_batch_norms_and_constants_become_part_of_convolutions(close):
    for norm in (nn.BatchNorm2d, DNC, StaticDN):
        simple = check(net(norm), images(2), 'portable', close)
        assert len(simple.folded) == 4 and not simple.dynamic and not simple.left
        assert not any(
            'Norm' in type(m).__name__ or 'DN' in type(m).__name__
            for m in list(simple.model.modules())[1:]
        )
    untrained = used(Net()).eval()
    assert len(check(untrained, images(), 'onnxruntime', close).folded) == 4


def test_the_model_itself_stays_as_it_is(close):
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    simplified(model, images())
    assert model.training and isinstance(model.norm1, DNB)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class ReadTwice(nn.Module):
    """A convolution whose output goes on beside the norm, and a norm with none before it."""

    def __init__(self):
        super().__init__()
        self.first = DNB(3)
        self.conv = nn.Conv2d(3, 8, 1)
        self.norm = DNB(8)
        self.also = nn.BatchNorm2d(8)
        self.then = nn.Conv2d(8, 8, 1)
        self.last = DNB(8)

    def forward(self, x):
        x = self.conv(self.first(x))
        return self.norm(x) + x + self.also(x) + self.last(self.then(x) * 2)


@pytest.mark.parametrize('target', simplify.TARGETS)
def test_a_convolution_that_others_read_stays(target, close):
    simple = check(awake(used(ReadTwice()), 0.3).eval(), images(), target, close)
    assert simple.dynamic == ['first', 'norm', 'last'] and simple.left == ['also']


class SharedConvolution(nn.Module):
    """As RTMDet's heads: one convolution, and for each level a norm of its own."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList(
            ConvModule(3, 16, 1, norm_cfg=dict(type='DNB')) for _ in range(3)
        )
        for level in self.levels:
            level.conv = self.levels[0].conv

    def forward(self, x):
        return torch.cat([level(x * i) for i, level in enumerate(self.levels)])


@pytest.mark.parametrize('target', simplify.TARGETS)
def test_a_shared_convolution_gets_a_copy_for_each_norm(target, close):
    simple = check(awake(used(SharedConvolution()), 0.3).eval(), images(), target, close)
    assert simple.dynamic == [f'levels.{i}.bn' for i in range(3)]
    assert len({id(level.conv) for level in simple.model.levels}) == 3


def test_a_norm_and_its_convolution_that_are_used_twice_go_together(close):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), DNB(3)

        def forward(self, x):
            return self.norm(self.conv(self.norm(self.conv(x))[..., :5]))

    for target in simplify.TARGETS:
        check(awake(used(Twice()), 0.3).eval(), images(), target, close)


def test_what_has_no_simpler_form_is_left_and_named(close):
    model = net(sc=dict(type=VariantSC, outputs='scale'))
    simple = check(model, images(), 'portable', close)
    assert simple.left == ['norm1', 'norm2', 'norm3', 'norm4'] and not simple.dynamic
    flat = nn.Sequential(nn.Flatten(), convert_norm(nn.Sequential(nn.BatchNorm1d(12)))).eval()
    awake(used(flat))
    assert simplified(flat, torch.randn(1, 3, 2, 2)).left == ['1.0']


def test_regions_are_a_batch_in_every_target(close):
    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), DNB(8)

        def forward(self, x):
            return self.norm(self.conv(torch.cat((x, 2 * x))))

    check(awake(used(Regions()), 0.3).eval(), images(), 'onnxruntime', close)


def test_timms_norm_with_activation(close):
    timm_layers = pytest.importorskip('timm.layers', reason="needs the extra 'tests'")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), timm_layers.BatchNormAct2d(8))
    model = awake(used(convert_norm(model)), 0.3).eval()
    for target in simplify.TARGETS:
        assert check(model, images(), target, close).dynamic == ['1']


def test_bad_input():
    with pytest.raises(ValueError, match=r"target: expected one of .*, got 'tflite'"):
        simplified(net(), images(), 'tflite')
    with pytest.raises(ValueError, match="one image for target='onnxruntime', got 2"):
        simplified(net(), images(2), 'onnxruntime')
    simple = simplified(net(), images(), 'onnxruntime')
    with pytest.raises(ValueError, match='expected one image, got 2: simplify the model for'):
        simple.model(images(2))
    with pytest.raises(RuntimeError, match='stands for a layer while torch.onnx.export runs'):
        norm = simplified(net(), images()).model.norm1
        norm.is_one_operator = True
        norm(torch.zeros(1, 8, 4, 4))


def written(model, tmp_path, target, number):
    """The file of a model, and a session of it."""
    simple = simplified(model, images(), target)
    export.write(simple.model, images(number), tmp_path / 'net.onnx', ['y'])
    return tmp_path / 'net.onnx', export.open_session(tmp_path / 'net.onnx')


@with_extra
def test_the_portable_file_takes_any_batch_and_has_no_forbidden_operator(tmp_path, close):
    model = net()
    path, session = written(model, tmp_path, 'portable', 2)
    assert not FORBIDDEN & set(export.operators(path))
    assert export.operators(path)['GlobalAveragePool'] == 8
    for number in (1, 2, 5):
        x = images(number)
        (y,) = session.run(None, dict(images=x.numpy()))
        with torch.no_grad():
            close(torch.from_numpy(y), model(x))


@with_extra
def test_the_file_for_onnxruntime_has_its_fast_forms(tmp_path, close):
    model = net()
    with torch.no_grad():
        model.norm1.bn.weight[0] = 0  # guarded
    path, session = written(model, tmp_path, 'onnxruntime', 1)
    count = export.operators(path)
    # 4 convolutions, and in 3 layers the sum of squares and the affine as others
    assert count['Conv'] == 4 + 2 * 3 and count['Gemm'] == 8 and 'GlobalAveragePool' not in count
    x = images()
    (y,) = session.run(None, dict(images=x.numpy()))
    with torch.no_grad():
        close(torch.from_numpy(y), model(x))
    assert np.isfinite(
        session.run(None, dict(images=np.full((1, 3, 21, 21), 9, np.float32)))[0]
    ).all()


class Returned(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 1), norm(16)

    def forward(self, x):
        features = self.conv(x)
        return self.norm(features), dict(features=[features])


@pytest.mark.parametrize('target', simplify.TARGETS)
@pytest.mark.parametrize('norm', [DNB, nn.BatchNorm2d])
def test_a_convolution_whose_output_is_returned_too_stays(norm, target, close):
    model, x = awake(used(Returned(norm)), 0.3).eval(), images()
    simple = simplified(model, x, target)
    with torch.no_grad():
        for actual, expected in zip(simple.model(x), model(x), strict=True):
            if isinstance(expected, dict):
                actual, expected = actual['features'][0], expected['features'][0]
            close(actual, expected)


@pytest.mark.parametrize('target', simplify.TARGETS)
@pytest.mark.parametrize('tiny', [1e-15, 1e-20, 1e-25, 1e-30])
def test_channels_that_are_as_good_as_dead_are_guarded_too(target, tiny, close):
    model = net()
    for norm in (model.norm1, model.norm2, model.norm3, model.norm4):
        with torch.no_grad():
            norm.bn.weight[:4] = tiny
            norm.bn.bias[:4] = 0
    check(model, images(), target, close)


def test_a_norm_that_is_called_by_keyword(close):
    class ByKeyword(Returned):
        def __init__(self, norm):
            super().__init__(norm)
            self.keyword = 'input' if norm is nn.BatchNorm2d else 'x'

        def forward(self, x):
            return self.norm(**{self.keyword: self.conv(x)})

    for norm in (DNB, nn.BatchNorm2d):
        check(awake(used(ByKeyword(norm)), 0.3).eval(), images(), 'portable', close)


def test_norms_that_are_not_understood_are_left():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Own(4), nn.BatchNorm2d(4, track_running_stats=False))
    assert simplified(model.eval(), images()).left == ['1', '2']


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r'expected one of float32, got .*use model.float'):
        simplified(net().to(dtype), images().to(dtype))
