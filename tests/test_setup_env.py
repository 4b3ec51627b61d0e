"""tools/setup_env.sh says what is missing before it downloads or writes anything."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / 'tools'
NEEDED = ('bash', 'cat', 'cksum', 'dirname', 'env', 'nproc', 'sed')


@pytest.fixture
def path(tmp_path):
    """A folder of programs, the only one on PATH: with g++, without any Python."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name in NEEDED:
        (folder / name).symlink_to(shutil.which(name))
    program(folder / 'g++', 'exit 0')
    return folder


def program(path, text):
    path.write_text(f'#!{shutil.which("bash")}\n{text}\n')
    path.chmod(0o755)


def refuse(path, *arguments):
    """The one line that the set-up says before it ends."""
    done = subprocess.run(
        [TOOLS / 'setup_env.sh', *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ, PATH=str(path)),
    )
    assert done.returncode == 2
    assert done.stdout == ''  # it had not begun
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    'script',
    sorted(TOOLS.glob('*.sh')) + [TOOLS.parent / '.ci' / 'run'],
    ids=lambda script: script.name,
)
def test_every_script_is_valid_and_executable(script):
    subprocess.run(['bash', '-n', script], check=True)
    assert os.access(script, os.X_OK)
    assert re.search('^set -e?uo pipefail', script.read_text(), re.M)


def test_a_missing_compiler_is_named_first(path, tmp_path):
    (path / 'g++').unlink()
    message = refuse(path, 'onedl', tmp_path / 'venv', sys.executable)
    assert 'which needs: g++.' in message and 'apt-get install g++' in message
    assert not (tmp_path / 'venv').exists()


def test_a_missing_python_is_named_with_all_that_it_needs(path, tmp_path):
    message = refuse(path, 'onedl', tmp_path / 'venv', 'python3')
    assert 'apt-get install python3 python3-venv python3-dev' in message


def test_a_python_without_headers_or_venv_is_named(path, tmp_path):
    program(path / 'python3', 'case "$2" in *version_info*) exit 0 ;; *) exit 1 ;; esac')
    message = refuse(path, 'onedl', tmp_path / 'venv')
    assert 'apt-get install python3-venv python3-dev' in message


def test_another_python_version_is_refused(path, tmp_path):
    program(path / 'python3', '[ "$1" = -V ] && echo Python 3.9.2; exit 1')
    message = refuse(path, 'onedl', tmp_path / 'venv')
    assert 'is Python 3.9.2; expected Python 3.10 to 3.12' in message
    assert 'make PYTHON=python3.11' in message
    assert not (tmp_path / 'venv').exists()


def test_an_unknown_stack_is_refused(path, tmp_path):
    message = refuse(path, 'mmlab', tmp_path / 'venv', sys.executable)
    assert "unknown stack 'mmlab': expected onedl or openmmlab" in message


def test_a_set_up_that_is_ready_does_nothing(path, tmp_path):
    stamp = tmp_path / 'venv' / '.ready'
    stamp.parent.mkdir()
    text = b''.join(
        (TOOLS.parent / file).read_bytes()
        for file in (
            'requirements/onedl.txt',
            'pyproject.toml',
            'setup.py',
            *sorted((TOOLS.parent / 'dn_mmdet/kernels/csrc').glob('*.cpp')),
            'tools/setup_env.sh',
        )
    )
    stamp.write_bytes(subprocess.run(['cksum'], input=text, capture_output=True).stdout)
    done = subprocess.run(
        [TOOLS / 'setup_env.sh', 'onedl', tmp_path / 'venv', 'python3'],
        capture_output=True,
        env=dict(os.environ, PATH=str(path)),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b'', b'')


def test_operators_built_for_another_torch_are_built_again(path, tmp_path):
    """A wheel from pip's cache installs, fails to import, and is compiled again."""
    venv = tmp_path / 'venv'
    (venv / 'bin').mkdir(parents=True)
    program(path / 'python3', 'exit 0')
    program(venv / 'bin/pip', 'exit 0')
    program(
        venv / 'bin/python',
        f"""
        case "$*" in
            *import*mmcv.ops*) [ "$(grep -c "install -v" {tmp_path}/log)" -ge 2 ] ;;
            *) echo "$*" >> {tmp_path}/log ;;
        esac""",
    )
    (tmp_path / 'log').touch()
    for name in ('date', 'awk', 'tee', 'grep'):
        (path / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [TOOLS / 'setup_env.sh', 'onedl', venv, 'python3'],
        text=True,
        capture_output=True,
        env=dict(os.environ, PATH=str(path)),
    )
    assert done.returncode == 0, done.stderr
    assert 'compiling it again' in done.stdout
    calls = [
        line.split('-version-check ')[1].split()
        for line in (tmp_path / 'log').read_text().splitlines()
    ]
    assert [call[:2] for call in calls] == [
        ['install', '-q'],
        ['install', '-v'],
        ['cache', 'remove'],
        ['uninstall', '-q'],
        ['install', '-v'],
        ['install', '-q'],
    ]
    assert calls[2][2] == 'onedl-mmcv' and '--no-build-isolation' in calls[4]
    assert '--no-build-isolation' in calls[5]  # else the CPU kernels are left out
    assert (venv / '.ready').is_file()
