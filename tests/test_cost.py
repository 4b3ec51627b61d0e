"""Mult-Adds agree with what a hand counts."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dn_mmdet import DNB, DNC
from dn_mmdet.experiments.controls import BNSE
from dn_mmdet.experiments.cost import ELEMENT_WISE, mult_adds, peak_memory


def counted(model, x):
    return mult_adds(model, lambda: model(x))


def test_convolutions_count_by_groups_and_stride():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
    )
    assert counted(model, torch.randn(1, 4, 6, 6)) == {'convolutions': (4 * 8 * 9 + 8 * 9) * 9}


def test_linears_count_inputs_times_outputs():
    found = counted(nn.Linear(5, 7), torch.randn(3, 5))
    assert found == {'linears': 3 * 5 * 7}


def test_element_wise_work_is_apart():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6(), nn.AdaptiveAvgPool2d(1))
    found = counted(model, torch.randn(2, 4, 6, 6))
    values = 2 * 4 * 36
    assert found == dict(zip(ELEMENT_WISE, (values, values, values), strict=True))


@pytest.mark.parametrize('norm,per_value,rows', [(DNB, 3, 2), (DNC, 1, 1)])
def test_a_dn_layer_counts_as_its_fused_form(norm, per_value, rows):
    layer = norm(16).train()
    found = counted(layer, torch.randn(2, 16, 3, 3))
    assert found == {
        'SC': rows * (2 * 16 * 8 + 8 * 2 * 16),
        'norms (element-wise)': per_value * 2 * 16 * 9,
    }
    assert layer.training and not layer._forward_hooks


def test_counting_changes_no_state():
    layer = nn.BatchNorm2d(4)
    before = layer.running_mean.clone()
    counted(layer, 5 + torch.randn(2, 4, 3, 3))
    assert torch.equal(layer.running_mean, before)


def test_the_se_control_costs_what_sc_does():
    for channels in (16, 96, 960, 1280):
        x = torch.randn(1, channels, 2, 2)
        dnb, bnse = DNB(channels), BNSE(channels)
        ratio = sum(p.numel() for p in bnse.parameters()) / sum(
            p.numel() for p in dnb.parameters()
        )
        assert 0.95 < ratio < 1.02
        assert counted(bnse, x)['linears'] == counted(dnb, x)['SC']


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads what Linux tells')
def test_peak_memory_without_a_gpu_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    resident = pages * os.sysconf('SC_PAGE_SIZE') / 2**20
    assert resident <= peak_memory()['megabytes'] + 1 < 20 * resident
