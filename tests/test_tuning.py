"""Tile sizes against each other: every choice compiles, gives right values, and is a row."""

import pytest
import torch

pytest.importorskip('triton', reason='needs Triton, which is not made for this system')
from dn_mmdet.benchmark import Setting, compile_tunings, measure_tunings, tuning_table  # noqa: E402
from dn_mmdet.kernels import choice  # noqa: E402

if choice.gpu_host() is None:
    pytest.skip('the compiled host was not built', allow_module_level=True)
from dn_mmdet.benchmark import tuning  # noqa: E402
from dn_mmdet.kernels import host, plans  # noqa: E402

SMALL = dict(train=((8, 2),), inference=((8, 2), (40, 3)))


def test_the_default_is_among_the_choices_and_none_is_there_twice():
    for tunings in tuning.TUNINGS.values():
        assert next(iter(tunings.items())) == ('default', {})
        made = [plans.Tuning(**changes) for changes in tunings.values()]
        assert len(set(made)) == len(made)


def test_what_is_compiled_before_is_what_runs():
    setting = Setting('cuda', torch.float16, True)
    found = tuning.signatures(setting, 24, SMALL)
    kernels = {signature.kernel for signature in found}
    assert {
        'sample_moments_kernel',
        'sample_affine_kernel',
        'moments_kernel',
        'input_gradient_kernel',
    } <= kernels
    assert len(found) > len(kernels)


@pytest.mark.slow
def test_every_choice_compiles():
    setting = Setting('cuda', torch.float16)
    one = dict(train=((8, 2),), inference=())
    assert compile_tunings(setting, 2, 90, one, processes=1) == len(
        tuning.signatures(setting, 2, one)
    )


def test_without_a_gpu():
    with pytest.raises(RuntimeError, match='compared on a GPU'):
        measure_tunings(Setting('cpu'), 2)


def test_tuned_is_undone_whatever_happens():
    other = plans.Tuning(sum_rows=32)
    with pytest.raises(KeyError), host.tuned(other):
        assert host._tuning is other
        raise KeyError
    assert host._tuning is plans.TUNING


def test_table():
    def row(name, channels, median, task='train'):
        return dict(
            part='tuning',
            task=task,
            channels=channels,
            map=3,
            median=median,
            measure=f'GPU time, {name}',
        )

    rows = [
        row('default', 64, 1e-5),
        row('default', 96, 2e-5),
        row('other', 64, 3e-5),
        row('default', 64, 9.0, 'inference'),
        dict(row('x', 64, 9.0), part='layers'),
    ]
    assert tuning_table(rows, 'train') == (
        '| | 64 @ 3 x 3 | 96 @ 3 x 3 |\n|---|--:|--:|\n| default | 10.0 | 20.0 |\n'
        '| other | 30.0 |  |'
    )


@pytest.mark.gpu
@pytest.mark.parametrize('channels_last', [False, True])
def test_measured_on_a_gpu(channels_last):
    setting = Setting('cuda', torch.float16, channels_last, pairs=1)
    rows = measure_tunings(setting, 2, SMALL)
    assert len(rows) == len(tuning.TRAINING) + 2 * len(tuning.INFERENCE)
    assert all(0 < row['median'] < 1 for row in rows)
