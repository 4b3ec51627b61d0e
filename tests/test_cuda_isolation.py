"""The plugin for many GPU tests at once: a CUDA error, a crash, a hang each cost one test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CONFTEST = """
import torch
broken = []
torch.cuda.is_initialized = lambda: True
def synchronize():
    if broken:
        raise RuntimeError('CUDA error: an illegal memory access was encountered')
torch.cuda.synchronize = synchronize
"""
CASES = """
import os, time
import conftest, pytest

@pytest.mark.parametrize('i', range(12))
def test_fine(i):
    assert not conftest.broken, 'runs in a process whose device is lost'

def test_breaks_the_device():
    conftest.broken.append(True)
    raise RuntimeError('CUDA error: found by the test')

def test_fails_alone():
    assert 1 == 2

def test_dies():
    os._exit(3)

def test_hangs():
    time.sleep(100)

@pytest.mark.parametrize('i', range(12))
def test_fine_too(i):
    assert not conftest.broken, 'runs in a process whose device is lost'

@pytest.mark.parametrize('i', range(100))
def test_takes_a_while(i):
    time.sleep(0.2)
"""


def run(folder, *options):
    (folder / 'conftest.py').write_text(CONFTEST)
    (folder / 'test_cases.py').write_text(CASES)
    (folder / 'pytest.ini').write_text('[pytest]\n')
    env = {**os.environ, 'PYTHONPATH': f'{TESTS}:{folder}'}
    env.pop('PYTEST_XDIST_WORKER', None)
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-q',
        '-p',
        'cuda_isolation',
        '-p',
        'no:cacheprovider',
        '-n',
        '2',
        '--timeout=20',
        '--timeout-method=thread',
        '--max-worker-restart=20',
        '--results',
        'results.txt',
        *options,
    ]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_each_fault_costs_one_test(tmp_path):
    found = run(tmp_path, '-k', 'not takes_a_while')
    assert found.returncode == 1
    failed = re.findall(r'^FAILED (?:test_cases.py::)?(\w+)', found.stdout, re.M)
    assert sorted(failed) == [
        'test_breaks_the_device',
        'test_dies',
        'test_fails_alone',
        'test_hangs',
    ], found.stdout
    assert '4 failed, 24 passed' in found.stdout
    results = (tmp_path / 'results.txt').read_text()
    assert results.count('PASSED') == 24
    assert 'CUDA error: found by the test' in results  # which the crash alone would not say
    assert 'assert 1 == 2' in results


def test_results_are_there_before_the_end_and_time_has_one(tmp_path):
    found = run(tmp_path, '--stop-after', '0', '-k', 'takes_a_while')
    assert found.returncode == 2 and '--stop-after' in found.stdout
    assert 1 <= (tmp_path / 'results.txt').read_text().count('PASSED') < 100
