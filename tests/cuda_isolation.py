"""A pytest plugin for many GPU tests at once: the fault of one does not become another's.

    pytest -p cuda_isolation -n 8 --timeout=60 --timeout-method=thread --results FILE

A CUDA error of a kernel stays with its process: whatever runs there afterwards fails too. So a
worker of pytest-xdist whose device no longer answers after a failed test ends itself in that
test, which xdist then reports as crashed, and a new worker takes the tests that are left. A
test that hangs ends its worker in the same way, by pytest-timeout's method 'thread'.

Results are written as they come, so that they are there even when the run is killed.
"""

import os
import time

import pytest


def pytest_addoption(parser):
    group = parser.getgroup('GPU tests')
    group.addoption('--results', metavar='FILE', help='append each result here as it comes')
    group.addoption(
        '--stop-after', metavar='SECONDS', type=float, help='begin no test after this time'
    )


def pytest_configure(config):
    if os.environ.get('PYTEST_XDIST_WORKER') is None:
        config.pluginmanager.register(_Results(config), 'gpu-results')


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and os.environ.get('PYTEST_XDIST_WORKER') and _device_is_lost():
        path = item.config.getoption('--results')
        if path:
            _write(
                path,
                f'CUDA ERROR {report.nodeid} ({report.when}): its process ends; the '
                f'error:\n{report.longreprtext[-4000:]}',
            )
        os._exit(1)  # no atexit handler: they would wait for the device
    return report


def _device_is_lost():
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # torch.AcceleratorError is one
        return True
    return False


def _write(path, text):
    with open(path, 'a') as file:  # one write each: workers share the file
        file.write(text + '\n')


class _Results:
    """What the process that hands out the tests sees: each result, and the time."""

    def __init__(self, config):
        self.path = config.getoption('--results')
        seconds = config.getoption('--stop-after')
        self.end = None if seconds is None else time.monotonic() + seconds
        self.session, self.stopped = None, False

    def pytest_sessionstart(self, session):
        self.session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self.stopped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.INTERRUPTED

    def pytest_runtest_logreport(self, report):
        if self.path and (report.when == 'call' or report.outcome != 'passed'):
            text = f'{report.outcome.upper()} {report.nodeid} {report.duration:.1f} s'
            if report.failed:
                text += '\n' + report.longreprtext[-4000:]
            _write(self.path, text)
        if self.end is not None and time.monotonic() > self.end:
            self.stopped = True
            reason = 'the time for these tests is up (--stop-after)'
            self.session.shouldstop = reason
            workers = self.session.config.pluginmanager.getplugin('dsession')
            if workers is not None:
                workers.shouldstop = reason
