"""tools/gpu_check.sh with a Python that only notes what it is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / 'tools' / 'gpu_check.sh'
PYTHON = """#!{bash}
echo "$*" >> {log}
case "$*" in
    *' -') printf '%s\\n' {here} ;;
    '-m pytest'*) echo '{tests}' ; {pytest} ;;
    *--bars*) echo 'the bars' ;;
    *benchmark.py*) {benchmark} ;;
esac
"""
WRITES = """while [ $# -gt 0 ]; do [ "$1" = --csv ] && echo row >> "$2"; shift; done; echo table"""
ALL = 'torch cuda test-tools extensions mmdet'


def check(tmp_path, here=ALL, tests='7 passed in 1s', pytest='true', benchmark=WRITES, **env):
    """The finished process, and the lines of what the Python was asked for."""
    python, log = tmp_path / 'python', tmp_path / 'asked'
    python.write_text(
        PYTHON.format(
            bash=shutil.which('bash'),
            log=log,
            here=here,
            tests=tests,
            pytest=pytest,
            benchmark=benchmark,
        )
    )
    python.chmod(0o755)
    done = subprocess.run(
        [TOOL, tmp_path / 'out'],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, 'PYTHON': str(python), **env},
    )
    return done, log.read_text().splitlines()


def test_most_important_first_and_each_setting(tmp_path):
    done, asked = check(tmp_path, COMMIT='abc')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'the bars' in done.stdout and 'GPU tests: 7 passed in 1s' in done.stdout
    timed = [line for line in asked if '--csv' in line]
    first, second = (set(line.split()) for line in timed[:2])
    assert {'--amp', '--batch', '24', 'step', 'host', 'layers', 'DNB:auto'} <= first & second
    assert ('--channels-last' in first) != ('--channels-last' in second)
    assert all('--commit abc' in line and '--seconds' in line for line in timed)
    for part in ('layers', 'detector'):
        settings = {
            ('--amp' in line, '--channels-last' in line, '--batch 24' in line)
            for line in timed
            if part in line.split('--parts')[1].split('--')[0]
        }
        assert len(settings) == (8 if part == 'layers' else 4)
    assert sum('--compile-only' in line for line in asked) == 6
    tests = next(line for line in asked if line.startswith('-m pytest'))
    assert '-m gpu' in tests and '-p no:benchmark' in tests and '-p cuda_isolation' in tests
    assert 'tests/test_kernels.py' in tests and 'test_gpu_check.py' not in tests
    assert 'tests/test_host_gpu.py' in tests and 'tests/test_host_autograd.py' in tests
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'bars.txt',
        'benchmark_gpu.csv',
        'log.txt',
        'table.txt',
        'tests.txt',
    ]


def test_a_stage_that_fails_is_named_and_costs_no_other(tmp_path):
    done, asked = check(
        tmp_path,
        pytest='exit 1',
        tests='1 failed, 6 passed',
        benchmark=('case "$*" in *detector*) echo why >&2; exit 1 ;; esac; ' + WRITES),
    )
    assert done.returncode == 1
    failed = [line for line in done.stderr.splitlines() if 'gpu_check: failed' in line]
    assert len(failed) == 5, failed
    assert 'tests' in failed[0] and 'SSDLite' in failed[1]
    assert 'why' in done.stdout and 'GPU tests: 1 failed, 6 passed' in done.stdout
    assert len([line for line in asked if '--csv' in line]) == 13
    assert 'SSDLite' in (tmp_path / 'out' / 'bars.txt').read_text()


def test_time_has_an_end(tmp_path):
    done, asked = check(tmp_path, SECONDS_IN_ALL='12', pytest='sleep 60')
    assert done.returncode == 1
    assert 'tests (stopped after' in done.stderr
    assert 'layers, float16, contiguous (cut)' in done.stderr
    assert not [line for line in asked if '--csv' in line]


@pytest.mark.parametrize(
    'here, message',
    [
        ('torch test-tools', 'sees no CUDA device'),
        ("''", 'sees no CUDA device'),
        ('torch cuda', 'pip install mmengine triton pytest'),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(tmp_path, here, message):
    done, asked = check(tmp_path, here=here)
    assert done.returncode == 2 and message in done.stderr
    assert len(asked) == 1 and not (tmp_path / 'out').exists()


def test_files_that_no_check_has_written_are_refused(tmp_path):
    mine = tmp_path / 'out' / 'log.txt'
    mine.parent.mkdir()
    mine.write_text('mine')
    done, asked = check(tmp_path)
    assert done.returncode == 2 and 'log.txt: exists already' in done.stderr
    assert mine.read_text() == 'mine' and len(asked) == 1
    mine.unlink()
    for _ in range(2):  # the second replaces the results of the first
        done, _ = check(tmp_path, STAGES='detector')
        assert done.returncode == 0, done.stderr


def test_without_mmdet_the_layers_alone_are_timed(tmp_path):
    done, asked = check(tmp_path, here='torch cuda test-tools')
    assert done.returncode == 1 and 'mmdet or mmcv.ops cannot be imported' in done.stderr
    assert any('build_ext' in line for line in asked)  # 'extensions' is missing as well
    timed = [line for line in asked if '--csv' in line]
    assert len(timed) == 9 and not any('detector' in line for line in timed)


def test_stages_can_be_chosen(tmp_path):
    done, asked = check(tmp_path, STAGES='detector')
    assert done.returncode == 0
    assert len(asked) == 1 + 2 + 1  # a look, two layouts, the table


def test_torch_compile_is_timed_where_asked_for(tmp_path):
    done, asked = check(tmp_path, STAGES='compiled')
    assert done.returncode == 0
    timed = [line for line in asked if '--parts compiled' in line]
    assert ['--compile-only' in line for line in timed] == [True] * 3 + [False]
    assert '--csv' in timed[-1]
