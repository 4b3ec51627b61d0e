"""The benchmark of inference runtimes: what it measures, and runtimes that are missing or fail."""

import csv
import runpy
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from test_export import trained, with_extra
from tiny_detector import write_config

from dn_mmdet.cli import command_line
from dn_mmdet.deploy import runtimes

main = runpy.run_path(str(Path(__file__).parents[1] / 'tools' / 'benchmark_runtimes.py'))['main']
pytestmark = with_extra


class Broken(runtimes.Runtime):
    package, needs = 'torch', ()

    def prepare(self, detector, folder):
        raise ArithmeticError('a layer that it does not know')


class Absent(runtimes.Runtime):
    needs = ('no_such_runtime',)


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Measures a small detector in some runtimes: exit code and rows."""
    init_default_scope('mmdet')
    config, checkpoint = write_config(tmp_path, 'DNB'), tmp_path / 'model.pth'
    model = trained(MODELS.build(command_line.load_config(config).model))
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    monkeypatch.setitem(runtimes.RUNTIMES, 'broken', Broken)
    monkeypatch.setitem(runtimes.RUNTIMES, 'absent', Absent)
    out = tmp_path / 'rows.csv'

    def run(*names, weights=(checkpoint,)):
        arguments = [config, *weights, '--size', 64, 64, '--rounds', 2, '--out', out]
        code = main([*map(str, arguments), '--runtimes', *names])
        with open(out, newline='') as file:
            return code, list(csv.DictReader(file))

    return run


def test_a_runtime_that_fails_is_named_and_the_others_are_measured(measure, capsys):
    code, rows = measure('absent', 'broken', 'onnxruntime')
    printed = capsys.readouterr().out
    assert code == 1
    assert 'broken: failed: ArithmeticError: a layer that it does not know' in printed
    assert 'absent: left out, not installed: no_such_runtime' in printed
    assert {row['runtime'] for row in rows} == {'onnxruntime'}
    reference, dynamic, half, whole = rows
    assert (reference['model'], reference['ratio']) == (runtimes.REFERENCE, '1.000')
    assert dynamic['model'] == 'dynamic'
    assert half['model'].endswith('folded') and whole['model'].split(' of ')[0] in whole['model']
    assert all(float(row['error']) < 1e-4 and float(row['ms']) > 0 for row in rows)


@pytest.mark.slow
def test_without_a_checkpoint_the_weights_are_random(measure):
    code, rows = measure('onnxruntime-detections', weights=())
    assert code == 0 and len(rows) == 4
    assert all(float(row['error']) < 1e-3 for row in rows)  # roundings grow in random weights


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # the converters' own, on names that are deprecated
@pytest.mark.parametrize('name', list(runtimes.RUNTIMES))
def test_every_runtime_that_is_installed_agrees_with_pytorch(measure, name):
    missing = runtimes.RUNTIMES[name].missing()
    if missing:
        pytest.skip(f'needs {", ".join(missing)}')
    code, rows = measure(name)
    assert code == 0 and len(rows) == 4
    assert all(float(row['error']) < 1e-4 for row in rows)


@pytest.mark.parametrize(
    'norm, options, expected',
    [
        ('BN', ['--size', '64', '64'], 'builds no DN layers'),
        ('DNB', ['--size', '0', '64'], 'expected an integer of at least 1, got 0'),
        ('DNB', ['--size', '64', '64', '--rounds', '0'], 'expected an integer of at least 1'),
        ('DNB', ['--size', '64', '64', '--out', 'other.csv'], 'other.csv: expected the columns'),
    ],
)
def test_bad_input_is_one_message(tmp_path, monkeypatch, capsys, norm, options, expected):
    init_default_scope('mmdet')
    monkeypatch.chdir(tmp_path)
    Path('other.csv').write_text('name,value\na,1\n')
    with pytest.raises(SystemExit) as done:
        main([str(write_config(tmp_path, norm)), *options])
    message = capsys.readouterr().err
    assert done.value.code == 2 and expected in message
    assert Path('other.csv').read_text() == 'name,value\na,1\n'
    assert not Path('runtimes.csv').exists()
