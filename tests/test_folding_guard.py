"""Code that folds a BatchNorm by its attributes is refused or warned; code that looks is not."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import awake
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from dn_mmdet import DNB, DNC


def to_bn_fold(conv, bn):
    """As the YOLOs do it."""
    return fuse_conv_and_bn(conv, bn)


def fuse_conv_and_bn(conv, bn):
    scale = [
        (bn.weight / torch.sqrt(bn.eps + bn.running_var))[:, None, None, None] for _ in range(1)
    ][0]
    return conv.weight * scale


def fuse_by_names(conv, bn):
    names = ('weight', 'running_var', 'eps')
    weight, var, eps = (getattr(bn, name) for name in names)
    return conv.weight * (weight / torch.sqrt(var + eps))[:, None, None, None]


def fuse(conv, bn, eps=1e-5):
    return conv.weight * (bn.weight / (bn.running_var + eps).sqrt())[:, None, None, None]


def fuse_conv(conv, bn):
    return conv.weight * (bn.weight / torch.sqrt(bn.running_var + 1e-5))[:, None, None, None]


def merge_bn(conv, bn):
    return scaled(conv, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)


def scaled(conv, mean, var, eps, weight, bias):
    return conv.weight * (weight / torch.sqrt(var + eps))[:, None, None, None]


class Rep(nn.Module):
    """A block whose shortcut is called as SC is."""

    def __init__(self, conv, bn):
        super().__init__()
        self.conv, self.bn, self.sc = conv, bn, nn.Identity()

    def fuse(self):
        std = (self.bn.running_var + self.bn.eps).sqrt()
        return self.sc(self.conv.weight * (self.bn.weight / std)[:, None, None, None])


class Block(nn.Sequential):
    def switch_to_deploy(self):
        conv, bn = self
        std = (bn.running_var + bn.eps).sqrt()
        return conv.weight * (bn.weight / std).reshape(-1, 1, 1, 1)


def by_another_name(conv, bn):
    return conv.weight * (bn.weight / (bn.running_var + bn.eps) ** 0.5)[:, None, None, None]


def scale(bn):
    return bn.weight * (bn.running_var + bn.eps).rsqrt()


def by_a_part(conv, bn):
    return conv.weight * scale(bn)[:, None, None, None]


def by_a_call(conv, bn):
    return fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )


@pytest.mark.parametrize(
    'fold',
    [
        fuse_conv_bn_eval,
        fuse_conv_and_bn,
        to_bn_fold,
        fuse_by_names,
        fuse,
        fuse_conv,
        merge_bn,
        lambda conv, bn: Rep(conv, bn).fuse(),
        lambda conv, bn: Block(conv, bn).switch_to_deploy(),
    ],
    ids=['torch', 'yolo', 'nested', 'names', 'own eps', 'number', 'helper', 'sc', 'method'],
)
@pytest.mark.parametrize('cls', [DNB, DNC])
def test_code_that_folds_by_attributes_is_refused(cls, fold):
    conv, layer = nn.Conv2d(6, 6, 3).eval(), awake(cls(6)).eval()
    with pytest.raises(TypeError, match=f'expected a BatchNorm to fold, got {cls.__name__}.*lost'):
        fold(conv, layer)
    fold(conv, cls(6).eval())  # a fresh layer is BatchNorm: nothing is lost
    fold(conv, layer.bn)  # on purpose


def merge_statistics(conv, bn):  # of one model on several machines
    return torch.stack([bn.running_mean, bn.running_var])


def deploy_report(conv, bn):
    return f'{bn.eps} {bn.running_var}'


def in_place(conv, bn):
    return conv.weight * (bn.weight / bn.running_var.clone().add_(bn.eps).sqrt_())[:, None, None]


def one_by_one(conv, bn):
    return [1 / math.sqrt(value + bn.eps) for value in bn.running_var]


def by_function(conv, bn):
    x = torch.randn(1, 6, 2, 2)
    return nn.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)


@pytest.mark.parametrize(
    'fold',
    [
        by_another_name,
        by_a_part,
        by_a_call,
        in_place,
        one_by_one,
        by_function,
        merge_statistics,
        deploy_report,
    ],
)
@pytest.mark.parametrize('cls', [DNB, DNC])
def test_code_of_any_name_that_looks_as_if_it_folded_is_warned(cls, fold):
    conv, layer = nn.Conv2d(6, 6, 3).eval(), awake(cls(6)).eval()
    with pytest.warns(
        UserWarning,
        match=f'({fold.__name__}|scale) seems to (fold|compute) a '
        f'BatchNorm.* With a {cls.__name__}, .* would be lost',
    ) as caught:
        fold(conv, layer)
    assert {warning.filename for warning in caught} == {__file__}
    fold(conv, cls(6).eval())
    fold(conv, layer.bn)


def test_code_that_only_looks_goes_on_to_work():
    layer = awake(DNB(6))

    def diffuse(layer):
        return layer.running_var

    def is_refused(layer):
        return {name: getattr(layer, name) for name in dir(layer) if 'running' in name}

    def observe(layer):
        return layer.running_var.sqrt(), layer.running_var

    def average(layer):  # a norm that is called as torch's function
        model = SimpleNamespace(batch_norm=layer)
        return model.batch_norm(torch.ones(2, 6, 2, 2)), torch.stack(
            [model.batch_norm.running_var]
        )

    assert average(layer)[1].shape == (1, 6)
    assert is_refused(layer)['running_var'] is diffuse(layer) is layer.bn.running_var
    assert observe(layer)[1] is layer.bn.running_var


CELLS = {
    'bn.weight / torch.sqrt(bn.running_var + bn.eps)': True,
    '[(value + bn.eps) ** -0.5 for value in bn.running_var]': True,
    'shown = bn.running_var\neps = bn.eps\nother = torch.sqrt(torch.ones(3))': False,
    'print(bn.running_var.sqrt())': False,
}


@pytest.mark.parametrize('text', CELLS)
def test_a_line_of_a_notebook_that_folds_is_warned(text):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        exec(compile(text, 'cell', 'exec'), dict(bn=awake(DNB(6)).eval(), torch=torch))
    assert bool(caught) == CELLS[text]


def test_a_name_alone_does_not_fold():
    layer = awake(DNB(6)).eval()

    def train_fold(model):  # cross-validation
        return [name for name, m in model.named_modules() if hasattr(m, 'running_var')]

    def merge_variances(layers):
        return sum(each.running_var for each in layers)

    assert train_fold(nn.Sequential(layer)) == ['0', '0.bn']
    assert merge_variances([layer, layer]).shape == (6,)
