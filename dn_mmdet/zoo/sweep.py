"""Checks of many configs, each in a process of its own, as rows of a csv file and a table."""

import multiprocessing
import os
import platform
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import mmcv
import mmdet
import mmengine
import torch

from ..files import write_text
from ..tables import append_rows, csv_text, read_table
from ..version import __version__
from .check import FAIL, NOT_APPLICABLE, PASS, Stage

FIELDS = (
    'config',
    'status',
    'reason',
    'replaced',
    'left',
    'difference',
    'train_step',
    'prediction',
    'image_size',
    'seconds',
    'configs',
    'versions',
)
# Where a page holds the table of `by_architecture`.
BEGIN, END = '<!-- written by tools/check_zoo.py -->', '<!-- end -->'


class Ended(NamedTuple):
    """Why a check has no result, and what it was doing."""

    reason: str
    stage: Stage


def bounded(fn, seconds, gigabytes, log) -> dict | Ended:
    """``fn(enter)`` in a forked process, which starts with all imports done.

    Args:
        fn: returns a dict; the `Stage` that it entered last is named if it has to be
            ended.
        seconds: of processor time after which it is ended; 20 times as long by the
            clock.
        gigabytes: of memory that it may allocate.
        log: file for all that it prints.

    Returns:
        fn's dict, or why there is none.
    """
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(fn, sender, seconds, gigabytes, log), daemon=True
    )
    process.start()
    sender.close()
    end, stage = time.monotonic() + 20 * seconds, Stage.STARTING
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            message = receiver.recv()
            if isinstance(message, dict):
                return message
            stage = message
        reason = f'ended after {20 * seconds} s'
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            reason = f'ended after {seconds} s of processor time'
        else:
            reason = f'the process ended with code {process.exitcode}'
    finally:
        process.kill()
        process.join()
    return Ended(f'{reason} while {stage.words}', stage)


def _child(fn, sender, seconds, gigabytes, log):
    memory = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    processor = max(int(seconds), 1)
    resource.setrlimit(resource.RLIMIT_CPU, (processor, processor + 1))
    file = open(log, 'w', buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file  # they need not be 1 and 2, as in a test or a notebook
    sender.send(fn(sender.send))


def row_of(name, result, seconds, configs) -> dict:
    """A row of the table. A check that had to be ended counts against what it was doing."""
    if isinstance(result, Ended):
        result = dict(status=result.stage.status, reason=result.reason)
    return dict(
        dict.fromkeys(FIELDS, ''),
        **result,
        config=name,
        seconds=f'{seconds:.1f}',
        configs=len(configs),
        versions=versions(),
    )


def versions() -> str:
    return (
        f'dn_mmdet {__version__}, mmdet {mmdet.__version__}, mmcv {mmcv.__version__}, '
        f'mmengine {mmengine.__version__}, torch {torch.__version__}, Python '
        f'{platform.python_version()}'
    )


def read_rows(path) -> dict[str, dict]:
    """Rows by config; of several for one config the last counts.

    A last line without its end, which a killed run can leave, is none.

    Raises:
        ConfigError: it has other columns.
    """
    if not Path(path).exists():
        return {}
    rows = read_table(path, [FIELDS], {}, empty='', unfinished=True)
    return {row['config']: row for row in rows}


def append_row(path, row) -> None:
    append_rows(path, [row], FIELDS)


def write_rows(path, rows) -> None:
    """Writes all rows again, in order."""
    write_text(path, csv_text((rows[name] for name in sorted(rows)), FIELDS))


def report(rows, command, total, left_out=()) -> str:
    """The rows as a page of Markdown.

    Args:
        rows: by config.
        command: that made them.
        total: how many rows a finished sweep has.
        left_out: sentences on configs that have none.
    """
    rows = [rows[name] for name in sorted(rows)]
    by_status = {PASS: [], FAIL: [], NOT_APPLICABLE: []}
    for row in rows:
        by_status[row['status']].append(row)
    parts = [
        "# DN-B over MMDetection's model zoo",
        f'{len(rows)} of the {total} distinct detectors among the configs that mmdet ships '
        f'({sum(int(row["configs"]) for row in rows)} configs).'
        + (' The sweep is not finished; its order is random.' if len(rows) < total else ''),
        'Each detector is built twice: with BatchNorm, and with DN-B in its place (`swap_norm`). '
        'The DN-B model loads the state of the BatchNorm model and has to give the same output. '
        'Then it trains one step on two random images, and predicts. The weights are random. Of '
        'a tracker, only the detector is checked. SSD gets the head that can predict '
        '(`SSDLiteHead`).',
        f'    {command}',
        *(f'- {text}' for text in sorted({row['versions'] for row in rows})),
        *(f'- {_cell(text)}' for text in left_out),
        _table(
            ('result', 'detectors'), [(status, len(mine)) for status, mine in by_status.items()]
        ),
        '**pass**: the model is built, gives the output of the BatchNorm model, trains one step '
        'with finite losses and an SC that changes, and predicts. The column "difference" has the '
        'largest difference of the outputs, divided by the largest value. It is computed in '
        'float64 if float32 rounds so that a comparison inside the detector comes out '
        'differently. **not applicable**: the model has no BatchNorm, or fails with BatchNorm '
        'too.',
        '## fail',
        _by_reason(by_status[FAIL]),
        '## not applicable',
        _by_reason(by_status[NOT_APPLICABLE]),
        '## pass',
        'The column "left" counts BatchNorms that the classes of mmdet create whatever the config '
        'says. `convert_norm` can convert these in the model. The column "seconds" has the '
        'processor time of the whole check.',
        _table(
            ('config', 'norms replaced', 'left', 'difference', 'image size', 'seconds'),
            [
                (
                    row['config'],
                    row['replaced'],
                    row['left'],
                    f'{float(row["difference"]):.0e}',
                    row['image_size'],
                    row['seconds'],
                )
                for row in by_status[PASS]
            ],
        ),
    ]
    return '\n\n'.join(parts) + '\n'


def _by_reason(rows):
    """A table of reasons, the most frequent first, with the configs of each."""
    if not rows:
        return 'None.'
    configs = defaultdict(list)
    for row in rows:
        configs[row['reason']].append(row['config'])
    reasons = sorted(configs, key=lambda reason: -len(configs[reason]))
    return _table(
        ('reason', 'detectors', 'configs'),
        [(_cell(each), len(configs[each]), ', '.join(configs[each])) for each in reasons],
    )


def by_architecture(rows) -> str:
    """A Markdown table: per folder of mmdet's configs, what works with DN-B."""
    by_folder = defaultdict(list)
    for name, row in rows.items():
        by_folder[name.split('/')[0]].append(row)
    lines = []
    for folder, mine in sorted(by_folder.items()):
        count = Counter(row['status'] for row in mine)
        left = [int(row['left']) for row in mine if row['status'] == PASS]
        reasons = Counter(row['reason'] for row in mine if row['status'] != PASS)
        lines.append(
            (
                folder,
                count[PASS],
                count[FAIL],
                count[NOT_APPLICABLE],
                _range(left),
                _cell('; '.join(reason for reason, _ in reasons.most_common(2))),
            )
        )
    return _table(('configs in', 'pass', 'fail', 'not applicable', 'norms left', 'why not'), lines)


def with_table(page: str, table: str) -> str:
    """A page of Markdown with the table written again between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not (rest and after):
        raise ValueError(f'expected a page with the marks {BEGIN} and {END}')
    return f'{before}{BEGIN}\n\n{table}\n\n{END}{after}'


def _range(numbers):
    return '-'.join(str(n) for n in sorted({min(numbers), max(numbers)})) if numbers else ''


def _cell(text):
    return text.replace('|', '\\|')


def _table(head, lines):
    rows = [head, ['---'] * len(head), *lines]
    return '\n'.join(f'| {" | ".join(map(str, row))} |' for row in rows)
