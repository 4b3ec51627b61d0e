"""docs/deploying.md: its code runs, and its commands have the tool's options."""

import collections
import csv
import re
import runpy
import shlex
from pathlib import Path

import pytest

from dn_mmdet.cli import command_line

TESTS = Path(__file__).parent
CONFIG = TESTS.parent / 'configs' / 'ssdlite_mbv2_dnb_digits.py'
PAGE = (TESTS.parent / 'docs' / 'deploying.md').read_text()


def test_the_code_runs_and_gives_batch_norm():
    pytest.importorskip('timm', reason="needs the extra 'test'")
    blocks = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
    assert len(blocks) == 2
    exec(blocks[0], names := {})
    kinds = {type(module).__name__ for module in names['model'].modules()}
    assert type(names['model'].bn1).__name__ == 'DNB' and 'BatchNorm2d' in kinds
    assert sum(row.folded for row in names['report']) == 19
    with pytest.warns(UserWarning, match='or after dn_mmdet.fold.fold_norm'):
        exec(blocks[1], names)
    assert not any('Norm' in type(module).__name__ for module in names['model'].modules())


def test_the_commands_are_the_tools():
    parse = runpy.run_path(str(TESTS.parent / 'tools' / 'fold.py'))['parse']
    commands = re.findall(r'^    python tools/fold.py (.*?)(?: *#.*)?$', PAGE, re.MULTILINE)
    parsed = [parse(shlex.split(command))[1] for command in commands]
    assert [args.keep for args in parsed] == [
        None,
        None,
        12,
        ['backbone.conv1', '*.linear_conv.bn'],
        *[None] * 5,
    ]
    std = command_line.load_config(CONFIG).model.data_preprocessor.std
    for args, contrast in zip(parsed[4:7], (0.4, 0.6, 0.4), strict=True):
        assert args.changed['model.data_preprocessor.std'] == pytest.approx(
            [value / contrast for value in std]
        )


def table_and_rows(name, kind):
    """The cells of a table in the page, and the CSV file that it was made from."""
    table = PAGE.split(f'<!-- {kind} of results/{name} -->')[1].split('<!-- end -->')[0]
    cells = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in table.strip().splitlines()[2:]
    ]
    with open(TESTS.parent / 'docs' / 'results' / name, newline='') as file:
        return cells, list(csv.DictReader(file))


def test_the_table_of_runtimes_is_that_of_the_rows():
    shown, rows = table_and_rows('runtimes.csv', 'rows')
    assert rows and shown == [
        [f'{row["runtime"]} {row["version"]}', row['model'], row['ms'], row['ratio'], row['error']]
        for row in rows
    ]


def test_the_errors_are_the_largest_of_each_runtime():
    shown, rows = table_and_rows('runtimes_digits.csv', 'errors')
    errors = collections.defaultdict(list)
    for row in rows:
        errors[f'{row["runtime"]} {row["version"]}'].append(row['error'])
    assert shown == [[name, max(found, key=float)] for name, found in errors.items()]
    assert all(float(row['error']) < 1e-5 for row in rows)
    slower = [float(row['ratio']) for row in rows if row['model'] == 'dynamic']
    assert f"{min(slower):.0f} to {max(slower):.0f} times BatchNorm's" in PAGE
