"""The benchmark proves parity before it times, and what it says of its figures is right."""

import copy
import csv
import importlib.util
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from tiny_detector import write_config
from torch import nn

from dn_mmdet import DNB, benchmark
from dn_mmdet.benchmark import BN, FOLDED, GN, REFERENCE, Setting, Variant
from dn_mmdet.kernels import torch_ops

TOOL = Path(__file__).parents[1] / 'tools' / 'benchmark.py'
FUSED = Variant('DNB', 'torch')
# Without MMDetection and MMCV, as on a machine that has only torch and mmengine.
BARE = """
import runpy, sys
sys.modules.update(mmdet=None, mmcv=None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location('benchmark_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def wrong_affine(x, m, a, c):
    return torch_ops.as_dense(x) * 1.01


@pytest.mark.slow
def test_layers_alone_where_mmdet_is_missing(tmp_path):
    command = [
        sys.executable,
        '-W',
        'ignore',
        '-c',
        BARE,
        TOOL,
        '--parts',
        'layers',
        '--size',
        '32',
        '--batch',
        '2',
        '--pairs',
        '2',
        '--compiled',
        '0',
        '--csv',
        'rows.csv',
        '--plot',
        'layers.png',
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for text in (
        'layers, forward + backward, batch 2, time',
        'layers, inference, batch 2, time',
        'bytes saved',
        'copy bandwidth',
        'DNB torch',
        '1.15  0.95',
    ):
        assert text in run.stdout
    assert (tmp_path / 'layers.png').stat().st_size > 10_000
    with open(tmp_path / 'rows.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row['q10']) <= float(row['median']) <= float(row['q90'])
        assert row['device'] and row['torch'] == torch.__version__.partition('+')[0]
        assert len(row['commit'].rstrip('+')) == 10 or row['commit'] == 'unknown'
    shapes, fused = benchmark.ssdlite_shapes(32), benchmark.Setting('cpu').fused
    variants = 2 + 2 * (len(fused) + 1)  # BN, GN; DN-B and DN-C, fused and reference
    timed = [row for row in rows if row['part'] == 'layer' and row['unit'] == 'of BN']
    assert len(timed) == len(shapes) * 2 * variants  # train and inference
    assert all(float(row['median']) == 1 for row in timed if row['norm'] == 'BN')
    assert all(row['pairs'] == '2' for row in timed)
    whole = [row for row in rows if row['part'] == 'layers' and row['measure'] == 'time']
    assert {row['layers'] for row in whole} == {'76'} and len(whole) == 2 * variants


def test_nothing_is_printed_or_written_without_parity(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch_ops, 'affine', wrong_affine)
    table = tmp_path / 'rows.csv'
    assert main(['--size', '32', '--batch', '2', '--csv', str(table)]) == 1
    shown = capsys.readouterr()
    assert shown.out == '' and 'output differs from the reference' in shown.err
    assert not table.exists()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('channels_last', [False, True])
def test_parity_of_the_detector_comes_first_too(tmp_path, monkeypatch, dtype, channels_last):
    setting = Setting('cpu', dtype, channels_last)
    detectors = benchmark.Detectors(setting, [BN, FUSED], write_config(tmp_path), size=64)
    detectors.check(2)
    monkeypatch.setattr(torch_ops, 'affine', wrong_affine)
    with pytest.raises(benchmark.ParityError, match='SSDLite, DNB torch'):
        detectors.check(2)


def test_detector_rows(tmp_path):
    variants = [BN, FOLDED, GN, FUSED]
    detectors = benchmark.Detectors(
        Setting('cpu', pairs=2), variants, write_config(tmp_path), size=64
    )
    before = copy.deepcopy(detectors.models[FUSED].state_dict())
    rows = detectors.measure('train', 2)
    assert {(row['norm'], row['backend']) for row in rows} == {
        tuple(v) for v in variants if v != FOLDED
    }
    peaks = {
        row['norm']: row['median']
        for row in rows
        if row['measure'] == 'peak memory' and row['unit'] == 'of BN'
    }
    assert peaks['BN'] == 1 and peaks['DNB'] > 1  # SC's parameters
    rows = detectors.measure('inference', 2)
    assert {row['unit'] for row in rows} == {'s', 'of BN', 'of BN folded'}
    assert {row['backend'] for row in rows} == {'', 'folded', 'torch'}
    for name, tensor in detectors.models[FUSED].state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_detectors_share_weights_and_are_awake(tmp_path):
    models = benchmark.Detectors(
        Setting('cpu'), [BN, FOLDED, GN, FUSED, REFERENCE], write_config(tmp_path), size=64
    ).models
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = {v: model.eval()(x, mode='tensor')[0][0] for v, model in models.items()}
    torch.testing.assert_close(out[FOLDED], out[BN], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out[FUSED], out[REFERENCE], rtol=1e-3, atol=1e-3)
    assert (out[FUSED] - out[BN]).abs().max() > 1e-2
    kinds = {v: Counter(type(m) for m in model.modules()) for v, model in models.items()}
    assert kinds[GN][nn.GroupNorm] == kinds[BN][nn.BatchNorm2d] == kinds[FUSED][DNB] > 50
    assert not kinds[GN][nn.BatchNorm2d] and not kinds[FOLDED][nn.BatchNorm2d]


def test_shapes_are_those_of_mmdets_detector():
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    cfg = Config.fromfile(benchmark.CONFIG)
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model).eval()
    found = Counter()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, inputs, __: found.update([inputs[0].shape]))
    with torch.no_grad():
        model(torch.zeros(1, 3, 320, 320), mode='tensor')
    assert sum(found.values()) == 76
    assert Counter({(c, h): k for (_, c, h, _), k in found.items()}) == benchmark.ssdlite_shapes()


def test_rounds_alternate_and_each_gives_a_pair():
    calls = []
    setting = Setting('cpu', pairs=4)
    long = 2 * benchmark.LONG_ENOUGH['cpu']
    found = benchmark.alternate(
        {
            BN: lambda: (calls.append('bn'), busy(long)),
            FUSED: lambda: (calls.append('dn'), busy(2 * long)),
        },
        setting,
    )
    assert calls[-8:] == ['bn', 'dn', 'dn', 'bn'] * 2
    assert len(found[BN]) == len(found[FUSED]) == 4
    assert all(seconds >= long for seconds in found[BN])


def busy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_allocations_are_counted():
    def call():
        other = torch.empty(3000)
        kept = torch.empty(1000)
        del other
        return kept

    result, left, peak = benchmark.allocations(call, 'cpu')
    assert result.shape == (1000,) and 4000 <= left < 4200 and 16000 <= peak < 16400


def test_rows_are_not_appended_to_another_table(tmp_path):
    (tmp_path / 'rows.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='expected the columns date, commit'):
        benchmark.write_rows(tmp_path / 'rows.csv', [])


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--pairs', '0'], 'at least 1'),
        (['--plot', 'x.png', '--parts', 'detector'], '--parts'),
        (['--csv', 'missing/rows.csv'], 'no such folder'),
        (['--csv', 'mine.csv'], 'mine.csv: expected the columns date, commit'),
        (['--plot', 'mine.csv'], 'mine.csv: exists already'),
    ],
)
def test_wrong_options(main, argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('mine.csv').write_text('a,b\n1,2\n')
    with pytest.raises(SystemExit, match='2'):
        main(argv)
    assert message in capsys.readouterr().err
    assert Path('mine.csv').read_text() == 'a,b\n1,2\n'


def test_the_figure_of_a_table_is_drawn_again(main, tmp_path, monkeypatch):
    """As the commands in docs/results do it: the check of the options lets it pass."""
    monkeypatch.chdir(tmp_path)
    benchmark.write_rows('rows.csv', [])
    Path('rows.png').touch()
    parse = main.__globals__['parse']
    assert parse(['--csv', 'rows.csv', '--plot', 'rows.png']).plot == 'rows.png'
