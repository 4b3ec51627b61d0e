"""What is not installed is named in one sentence, with the command that installs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dn_mmdet import environment

ROOT = Path(__file__).parents[1]


def run(code, path=None):
    """stderr of a fresh process in which ``code`` has to fail."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(path or '')),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def hide(module, then):
    return f'import sys; sys.modules[{module!r}] = None; {then}'


def as_tool(name):
    return f"import runpy; sys.argv = ['x', '--help']; runpy.run_path('tools/{name}.py')"


@pytest.mark.parametrize('module', ['torch', 'mmengine'])
def test_a_missing_torch_or_mmengine_is_named(module):
    *_, last = run(hide(module, 'import dn_mmdet')).strip().splitlines()
    assert last.startswith(f'ImportError: dn_mmdet needs {module}, which is not installed')
    assert 'make setup' in last and "pip install --no-build-isolation -e '.[onedl]'" in last


def test_the_makefile_has_the_target_that_the_message_names():
    assert '\nsetup:\n' in (ROOT / 'Makefile').read_text()


OPERATORS = "ImportError: MMCV's compiled operators cannot be imported"
MMDET = 'ImportError: MMDetection cannot be imported'


@pytest.mark.parametrize(
    'tool, module, sentence',
    [
        ('train', 'mmdet', MMDET),
        ('test', 'mmcv.ops', OPERATORS),
        pytest.param('train', 'mmcv.ops', OPERATORS, marks=pytest.mark.slow),
        pytest.param('test', 'mmdet', MMDET, marks=pytest.mark.slow),
        pytest.param('predict', 'mmcv.ops', OPERATORS, marks=pytest.mark.slow),
        pytest.param('predict', 'mmdet', MMDET, marks=pytest.mark.slow),
    ],
)
def test_tools_name_a_missing_mmdet_or_missing_operators(tool, module, sentence):
    error = run(hide(module, as_tool(tool)))
    assert error.strip().splitlines()[-1].startswith(sentence)
    assert 'pip install' in error
    assert 'site-packages' not in error  # nothing from inside a framework


@pytest.mark.slow
@pytest.mark.parametrize('module', ['mmcv', 'mmdet'])
def test_so_does_the_head_which_configs_import(module):
    error = run(hide(module, 'import dn_mmdet.models.ssdlite_head'))
    assert error.strip().splitlines()[-1].startswith((OPERATORS, MMDET))


@pytest.mark.slow
def test_an_mmdet_that_refuses_its_mmcv_is_told(tmp_path):
    fake = tmp_path / 'mmdet'
    fake.mkdir()
    (fake / '__init__.py').write_text("assert False, 'MMCV==9.9 is incompatible'")
    error = run('import dn_mmdet.models.ssdlite_head', path=tmp_path)
    assert f'{MMDET} (MMCV==9.9 is incompatible)' in error


@pytest.mark.slow
@pytest.mark.parametrize(
    'error',
    [
        "ImportError('undefined symbol: _ZN3c10')",
        "OSError('libtorch.so: cannot open')",
        "RuntimeError('operator torchvision::nms does not exist')",
    ],
)
def test_operators_built_against_another_torch_are_told(tmp_path, error):
    fake = tmp_path / 'mmcv'
    fake.mkdir()
    (fake / '__init__.py').touch()
    (fake / 'ops.py').write_text(f'raise {error}')
    last = run('import dn_mmdet.models.ssdlite_head', path=tmp_path).strip().splitlines()[-1]
    assert last.startswith(OPERATORS)
    assert '--no-build-isolation' in last and 'mmcv==2.' in last


def test_an_installed_stack_passes():
    environment.check_mmengine()
    environment.check_mmdet()


def test_the_layers_alone_need_no_mmdet():
    code = hide('mmdet', hide('mmcv', 'import dn_mmdet; print(dn_mmdet.DNB(8))'))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith('DNB('), done.stderr


@pytest.mark.parametrize(
    'tool',
    [
        'train',
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                'test',
                'predict',
                'compare',
                'demo',
                'convert_checkpoint',
                'export_onnx',
                'check_zoo',
            )
        ),
    ],
)
def test_a_tool_says_nothing_of_parts_that_no_config_needs(tool):
    done = subprocess.run(
        [sys.executable, f'tools/{tool}.py', '--help'],
        cwd=ROOT,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0 and done.stdout.startswith('usage: '), done.stdout


def test_what_else_is_printed_on_import_is_shown(capsys):
    with pytest.raises(ImportError), environment.without_notes_on_optional_parts():
        print('Could not import OneDL. Skipping OneDL datasets.')
        print('this machine has no disk')
        raise ImportError
    assert capsys.readouterr().out == 'this machine has no disk\n'
