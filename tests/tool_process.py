"""Runs a tool as a user does, in a process of its own.

Importing mmdet takes longer than a tiny training. It happens once, in a server
process that is forked for each run and that sees no GPU.
"""

import multiprocessing
import os
import re
import resource
import runpy
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

TOOLS = Path(__file__).parents[1] / 'tools'
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(
    [
        'dn_mmdet.cli.command_line',
        'dn_mmdet.cli.predict',
        'dn_mmdet.models.ssdlite_head',
        'mmdet.evaluation',
    ]
)


class Tool:
    """A running tool; what it prints goes to a file.

    Args:
        name (str): as 'train'.
        argv: what the user types after it.
        cwd (Path): where; the output goes beside it.
        file_size (int | None): limit in bytes, as of a full disk.
        environ (dict): added to the environment.
    """

    def __init__(self, name, *argv, cwd, file_size=None, **environ):
        self.log = Path(f'{cwd}-{name}-{time.monotonic_ns()}.log')
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1'):
            forkserver.ensure_running()
        self.process = CONTEXT.Process(
            target=_run,
            args=(
                str(TOOLS / f'{name}.py'),
                [str(arg) for arg in argv],
                str(cwd),
                str(self.log),
                file_size,
                environ,
            ),
            daemon=True,
        )  # ends with the tests, however they end
        self.process.start()

    @property
    def output(self):
        return self.log.read_text() if self.log.exists() else ''

    def wait(self, timeout=300):
        """The exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.output)
        return self.process.exitcode

    def wait_for(self, pattern, timeout=300):
        """Until the output matches ``pattern``."""
        end = time.monotonic() + timeout
        while not re.search(pattern, self.output):
            assert self.process.is_alive() and time.monotonic() < end, self.output
            time.sleep(0.01)

    def kill(self):
        """kill -9"""
        assert self.process.is_alive(), self.output
        self.process.kill()
        self.process.join()


def succeed(name, *argv, cwd, **kwargs):
    """What a tool printed, which has to end well."""
    tool = Tool(name, *argv, cwd=cwd, **kwargs)
    code = tool.wait()
    assert code == 0, tool.output
    return tool.output


def refuse(name, *argv, cwd, exit_code=2, **kwargs):
    """The one message of a tool that has to end with this exit code and no traceback."""
    tool = Tool(name, *argv, cwd=cwd, **kwargs)
    code = tool.wait()
    assert code == exit_code, tool.output
    assert 'Traceback' not in tool.output, tool.output
    before, *messages = tool.output.split(f'{name}.py: error: ')
    assert len(messages) == 1, tool.output
    return messages[0]


def _run(path, argv, cwd, log, file_size, environ):
    with open(log, 'wb') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    os.chdir(cwd)
    os.environ.update(environ)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name='__main__')
