"""How a GPU is timed, and what is made of it, on a CUDA device that is the CPU."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_cuda import REPLAY, FakeCuda
from tiny_detector import write_config

from dn_mmdet import benchmark
from dn_mmdet.benchmark import BN, GraphError, Setting, Variant, bars
from dn_mmdet.benchmark.timing import BLOCK, host_alone

TOOL = Path(__file__).parents[1] / 'tools' / 'benchmark.py'
FUSED = Variant('DNB', 'torch')
CUDA = Setting('cuda', pairs=3)


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location('benchmark_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_gpu_alone_is_the_time_of_replays(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    calls = Counter()
    found = benchmark.gpu_alone(
        {BN: lambda: calls.update(bn=1), FUSED: lambda: calls.update(dn=1)}, CUDA, repeats=5
    )
    assert calls == dict(bn=7, dn=7)  # two to warm up and five in the graph; none in a replay
    assert cuda.captures == 2 and cuda.live == 0
    for values in found.values():
        assert len(values) == 3
        assert values == pytest.approx([REPLAY / 5] * 3, rel=0.3)


def test_what_cannot_be_captured_is_said_and_leaves_no_graph(monkeypatch):
    cuda = FakeCuda(monkeypatch, uncapturable=lambda i: i == 1)
    with pytest.raises(GraphError, match='operation not permitted when capturing') as error:
        benchmark.gpu_alone({BN: lambda: None, FUSED: lambda: None}, CUDA)
    assert error.value.key == FUSED and cuda.live == 0
    with pytest.raises(GraphError, match='needs a CUDA device'):
        benchmark.gpu_alone({BN: lambda: None}, Setting('cpu'))


def test_a_capture_that_fails_inside_is_ended_and_says_why(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    calls = []

    def fails_at_third():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError('the cause')

    with pytest.raises(GraphError, match='the cause'):
        benchmark.gpu_alone({BN: fails_at_third}, CUDA)
    assert not cuda.capturing


def test_a_variant_that_cannot_be_captured_costs_its_gpu_time_alone(monkeypatch):
    cuda = FakeCuda(monkeypatch, uncapturable=lambda i: i == 1)
    failures = []
    with cuda.mode:
        rows = benchmark.measure_layers(
            CUDA, 2, Counter({(8, 4): 1, (8, 2): 2}), [BN, FUSED], failures=failures
        )
    timed = {(row['norm'], row['measure']) for row in rows if row['part'] == 'layers'}
    assert ('BN', 'sum of GPU times') in timed and ('DNB', 'sum of GPU times') not in timed
    assert ('DNB', 'sum of times') in timed
    assert len(failures) == 1 and 'DNB torch' in failures[0]


def test_sums_weigh_shapes_by_their_layers(monkeypatch):
    shapes = Counter({(8, 4): 1, (16, 2): 3})
    seconds = {(BN, 8): 4.0, (FUSED, 8): 2.0, (BN, 16): 1.0, (FUSED, 16): 3.0}

    def alternate(calls, setting):
        channels = measured.pop(0) if len(calls) > 1 else None
        return {v: [seconds.get((v, channels), 1.0)] * setting.pairs for v in calls}

    measured = [8, 8, 16, 16]  # training and inference; larger maps first
    monkeypatch.setattr(benchmark.layers, 'alternate', alternate)
    rows = benchmark.measure_layers(Setting('cpu', pairs=2), 2, shapes, [BN, FUSED])
    found = {
        (row['norm'], row['unit']): row
        for row in rows
        if (row['task'], row['measure']) == ('train', 'sum of times')
    }
    assert found['BN', 's']['median'] == 4 + 3 * 1
    assert found['DNB', 'of BN']['median'] == pytest.approx((2 + 3 * 3) / (4 + 3 * 1))
    assert found['DNB', 'of BN']['layers'] == 4


def test_no_time_left_is_said_and_the_rest_is_there():
    now = iter([0, 0.5, 2])
    deadline = benchmark.Deadline(1, clock=lambda: next(now))
    failures = []
    rows = benchmark.measure_layers(
        Setting('cpu', pairs=1),
        2,
        Counter({(8, 4): 1, (8, 2): 2}),
        [BN, FUSED],
        deadline=deadline,
        failures=failures,
    )
    assert failures == [
        'layers, batch 2, float32, contiguous: no time left for 2 of 3 layers, '
        'those from 8 x 2 x 2 on'
    ]
    assert {row['layers'] for row in rows if row['part'] == 'layers'} == {1}


def test_host_times_are_between_the_calls_and_layers_take_turns():
    turns = []

    class Layer(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.name = name

        def forward(self, x):
            turns.append(self.name)
            return x * self.weight

    time = iter(range(10**6))
    x = torch.randn(2, 3)
    found = host_alone(
        {BN: Layer('bn'), FUSED: Layer('dn')},
        Setting('cpu'),
        x,
        torch.ones_like(x),
        blocks=2,
        clock=lambda: next(time),
    )
    for by_call in found.values():
        assert set(by_call) == {'forward', 'backward', 'autograd.grad', 'forward without gradient'}
        assert all(values == [1] * (2 * BLOCK) for values in by_call.values())
    blocks = turns[:: 3 * BLOCK]  # three forwards a call
    assert blocks == ['dn', 'bn', 'bn', 'dn', 'dn', 'bn']


def test_one_step_runs_all_layers_and_alternates():
    shapes = Counter({(8, 4): 2, (16, 2): 1})
    time = iter(range(10**6))
    rows = benchmark.measure_step(
        Setting('cpu'), 2, shapes, [BN, FUSED], rounds=2, clock=lambda: next(time)
    )
    found = {(row['norm'], row['measure'], row['unit']): row['median'] for row in rows}
    assert found['DNB', 'time', 's'] == 3  # ticks of the clock from start to the end
    assert found['DNB', 'host time of forward', 's'] == 1
    assert found['DNB', 'time', 'of BN'] == 1
    assert found['BN', 'peak memory', 'of BN'] == 1
    assert {row['layers'] for row in rows} == {3}


@pytest.mark.slow
def test_detector_on_a_gpu(tmp_path, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    setting = Setting('cuda', torch.float16, pairs=1)
    with cuda.mode:
        detectors = benchmark.Detectors(setting, [BN, FUSED], write_config(tmp_path), size=64)
        detectors.check(3)
        train, inference = (detectors.measure(task, 3) for task in ('train', 'inference'))
    assert {row['measure'] for row in train} == {'time', 'peak memory', 'GPU time without losses'}
    assert {row['measure'] for row in inference} == {'time', 'GPU time'}
    assert cuda.captures == 4 and cuda.live == 0


@pytest.mark.slow
def test_the_tool_on_a_gpu(main, tmp_path, monkeypatch, capsys):
    cuda = FakeCuda(monkeypatch)
    table, picture = tmp_path / 'gpu.csv', tmp_path / 'gpu.png'
    with cuda.mode:
        for layout in ([], ['--channels-last']):
            code = main(
                [
                    '--device',
                    'cuda',
                    '--size',
                    '32',
                    '--batch',
                    '24',
                    '--pairs',
                    '1',
                    '--amp',
                    *layout,
                    '--norms',
                    'BN',
                    'DNB:auto',
                    '--parts',
                    'layers',
                    'step',
                    'host',
                    '--commit',
                    'abc',
                    '--csv',
                    str(table),
                ]
            )
            assert code == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(['--bars', str(table), '--plot', str(picture)]) == 0
    shown = capsys.readouterr().out
    assert 'a fake GPU' in shown and 'commit abc' in shown
    assert shown.count('not measured') == 4  # SSDLite: time and memory, in each layout
    assert picture.stat().st_size > 10_000
    rows = benchmark.read_rows(table)
    assert {row['memory_format'] for row in rows} == set(bars.LAYOUTS)
    assert {row['part'] for row in rows} == {'layer', 'layers', 'step', 'host'}


def test_a_backend_that_does_not_run_here_is_left_out_and_said(main, tmp_path, capsys):
    table = tmp_path / 'rows.csv'
    assert (
        main(
            [
                '--size',
                '32',
                '--batch',
                '4',
                '--pairs',
                '1',
                '--parts',
                'host',
                '--norms',
                'BN',
                'DNB:triton',
                'DNB:torch',
                '--csv',
                str(table),
            ]
        )
        == 1
    )
    assert "not measured: DNB triton: backend='triton': " in capsys.readouterr().err
    assert {row['backend'] for row in benchmark.read_rows(table)} == {'', 'torch'}


def test_compile_only_runs_every_dtype_and_layout_and_times_nothing(main, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(
        benchmark,
        'run_layers',
        lambda setting, batch, shapes, variants: ran.append(
            (setting.dtype, setting.channels_last, tuple(shapes))
        ),
    )
    for i in ('1/2', '2/2'):
        assert main(['--compile-only', i, '--norms', 'BN', 'DNB:auto']) == 0
    assert capsys.readouterr().out == ''
    assert len(set(ran)) == 8
    shapes = [
        shape for dtype, last, part in ran if dtype == torch.float16 and last for shape in part
    ]
    assert sorted(shapes) == sorted(benchmark.ssdlite_shapes())


def row(what, layout, median, **others):
    return dict(
        dict(
            part=what.part,
            task=what.task,
            measure=what.measure,
            unit='of BN',
            memory_format=layout,
            dtype='float16',
            batch=24,
            norm='DNB',
            backend='auto',
            median=median,
            q10=median,
            q90=median,
            layers=76,
            device='GPU',
            torch='1',
            triton='2',
            commit='abc',
        ),
        **others,
    )


def test_bars_say_what_was_reached():
    eager, _, alone, *_ = bars.GPU_BARS
    text = benchmark.bars_table(
        [
            row(eager, 'contiguous', 0.64),
            row(eager, 'channels_last', 1.04),
            row(alone, 'contiguous', 0.51),
            row(alone, 'channels_last', 0.9, layers=60),
            row(eager, 'contiguous', 9, backend='triton'),
            row(eager, 'contiguous', 9, batch=192),
            row(eager, 'contiguous', 9, dtype='float32'),
        ]
    ).splitlines()
    found = {line[:56].strip(): line[78:].split() for line in text[3:]}
    assert len(found) == 2 * len(bars.GPU_BARS)

    def ending(what, layout):
        return ' '.join(
            next(
                words
                for name, words in found.items()
                if name.split('  ')[0] == what and name.endswith(layout)
            )
        )

    assert ending(eager.what, 'contiguous').endswith('0.65 aim')
    assert ending(eager.what, 'channels_last').endswith('0.90 must')
    assert ending(alone.what, 'contiguous').endswith('0.40 MISSED')
    assert ending(alone.what, 'channels_last').endswith('1.00 aim (60 of 76 layers)')
    assert sum('not measured' in line for line in text) == 2 * len(bars.GPU_BARS) - 4


def test_bars_without_rows_and_of_another_file(main, tmp_path, capsys):
    assert benchmark.bars_table([]).count('not measured') == 2 * len(bars.GPU_BARS)
    (tmp_path / 'a.csv').write_text('a,b\n1,2\n')
    assert main(['--bars', str(tmp_path / 'a.csv')]) == 1
    assert 'expected the columns date, commit' in capsys.readouterr().err
    assert main(['--bars', str(tmp_path / 'none.csv')]) == 1
    assert 'No such file' in capsys.readouterr().err


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--norms', 'BN', 'DNX'], "expected 'BN', 'GN'"),
        (['--norms', 'BN', 'DNB'], 'DNB:BACKEND'),
        (['--norms', 'DNB:auto'], 'the others are compared with BN'),
        (['--compile-only', '3/2'], 'expected I/N'),
        (['--compile-only', 'x'], 'expected I/N'),
    ],
)
def test_wrong_options(main, argv, message, capsys):
    with pytest.raises(SystemExit, match='2'):
        main(argv)
    assert message in capsys.readouterr().err
