"""A sweep over many configs is bounded, can be killed and resumed, and becomes a table."""

import runpy
import time
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config

from dn_mmdet.zoo.check import FAIL, NOT_APPLICABLE, PASS, Stage
from dn_mmdet.zoo.sweep import (
    BEGIN,
    END,
    FIELDS,
    Ended,
    append_row,
    bounded,
    by_architecture,
    read_rows,
    report,
    row_of,
    with_table,
    write_rows,
)

ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / 'tools' / 'check_zoo.py'))


def run(fn, tmp_path, seconds=30, gigabytes=64):
    return bounded(fn, seconds, gigabytes, tmp_path / 'log.txt')


def test_the_result_comes_back_and_what_is_printed_goes_to_the_log(tmp_path):

    def fn(enter):
        enter(Stage.COMPARING)
        print('hello', flush=True)
        return dict(status=PASS)

    assert run(fn, tmp_path) == dict(status=PASS)
    assert (tmp_path / 'log.txt').read_text() == 'hello\n'


def test_one_that_never_ends_is_ended(tmp_path):

    def busy(enter):
        enter(Stage.COMPARING)
        while True:
            pass

    def asleep(enter):
        enter(Stage.BUILDING_WITH_BN)
        time.sleep(600)

    doing = 'while comparing the outputs of DN-B and BatchNorm'
    assert run(busy, tmp_path, 1) in [  # the second on a busy machine
        Ended(f'ended after {time} {doing}', Stage.COMPARING)
        for time in ('1 s of processor time', '20 s')
    ]
    assert run(asleep, tmp_path, 0.1) == (
        'ended after 2.0 s while building with BatchNorm',
        Stage.BUILDING_WITH_BN,
    )


def test_one_that_wants_too_much_memory_is_ended_alone(tmp_path):

    def fn(enter):
        enter(Stage.TRAINING_WITH_DN)
        return dict(size=np.empty(40 << 30, np.uint8).size)

    assert run(fn, tmp_path, gigabytes=32) == (
        'the process ended with code 1 while training with DN-B',
        Stage.TRAINING_WITH_DN,
    )
    assert 'MemoryError' in (tmp_path / 'log.txt').read_text()


def row(name, result, configs=1):
    return row_of(name, result, 1.25, ['same'] * configs)


ROWS = [
    row(
        'yolox/a.py',
        dict(
            status=PASS,
            reason='',
            replaced=3,
            left=0,
            difference=2e-6,
            train_step='yes',
            prediction='yes',
            image_size=64,
        ),
        configs=3,
    ),
    row('yolox/b.py', dict(status=FAIL, reason='ValueError: x | y', replaced=3, left=1)),
    row('swin/c.py', Ended('ended after 90 s', Stage.BUILDING_WITH_BN)),
]


def test_what_had_to_be_ended_counts_against_what_it_was_doing():
    assert ROWS[2]['status'] == NOT_APPLICABLE
    assert row('d', Ended('ended', Stage.TRAINING_WITH_DN))['status'] == FAIL
    assert row('d', Ended('ended', Stage.COMPARING))['status'] == FAIL
    assert row('d', Ended('ended', Stage.STARTING))['status'] == NOT_APPLICABLE


def test_rows_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / 'zoo.csv'
    write_rows(path, {})
    for each in ROWS:
        append_row(path, each)
    whole = path.read_text()
    path.write_text(whole[:-30])
    rows = read_rows(path)
    assert list(rows) == ['yolox/a.py', 'yolox/b.py']
    write_rows(path, rows)
    append_row(path, ROWS[2])
    append_row(path, dict(ROWS[0], seconds='9.9'))
    rows = read_rows(path)
    assert len(rows) == 3 and rows['yolox/a.py']['seconds'] == '9.9'
    assert set(rows['swin/c.py']) == set(FIELDS)


def test_a_table_of_others_is_not_written_again(tmp_path, capsys):
    (tmp_path / 'zoo.csv').write_text('config,mine\na,1\n')
    with pytest.raises(SystemExit, match='2'):
        TOOL['main'](['--out-dir', str(tmp_path), '--no-checks'])
    assert 'zoo.csv: expected the columns config, status' in capsys.readouterr().err
    assert (tmp_path / 'zoo.csv').read_text() == 'config,mine\na,1\n'


def test_the_report_counts_and_explains():
    text = report({each['config']: each for each in ROWS}, 'the command', 9, ['d.py: left out'])
    assert '3 of the 9 distinct detectors' in text and '(5 configs). The sweep is not fin' in text
    assert 'not finished' not in report({each['config']: each for each in ROWS}, '', 3)
    assert '    the command\n' in text and '- d.py: left out\n' in text
    assert '| pass | 1 |\n| fail | 1 |\n| not applicable | 1 |' in text
    assert '| ValueError: x \\| y | 1 | yolox/b.py |' in text
    assert '| yolox/a.py | 3 | 0 | 2e-06 | 64 | 1.2 |' in text
    assert 'mmdet ' in text and 'torch ' in text


def test_a_page_gets_the_table_between_its_marks():
    page = with_table(f'before {BEGIN} old {END} after', 'new')
    assert page == f'before {BEGIN}\n\nnew\n\n{END} after' == with_table(page, 'new')
    with pytest.raises(ValueError, match='expected a page with the marks'):
        with_table('a page', 'new')


def test_the_docs_are_of_the_rows_that_lie_beside_them():
    rows = read_rows(ROOT / 'docs' / 'results' / 'zoo.csv')
    page = (ROOT / 'docs' / 'models.md').read_text()
    assert with_table(page, by_architecture(rows)) == page
    zoo = (ROOT / 'docs' / 'zoo.md').read_text()
    assert all(
        f'| {status} | {sum(row["status"] == status for row in rows.values())} |' in zoo
        for status in (PASS, FAIL, NOT_APPLICABLE)
    )


def test_the_table_by_architecture():
    assert by_architecture({each['config']: each for each in ROWS}).splitlines()[2:] == [
        '| swin | 0 | 0 | 1 |  | ended after 90 s |',
        '| yolox | 1 | 1 | 0 | 0 | ValueError: x \\| y |',
    ]


@pytest.fixture
def zoo(monkeypatch):
    """Three models in the place of mmdet's; returns the names of those that were checked."""
    models = {name: (Config(dict(name=name)), [name]) for name in ('a/1.py', 'a/2.py', 'b/3.py')}
    checked = []

    def check_in_process(fn, seconds, gigabytes, log):
        return fn(lambda stage: None)

    def check(cfg, say):
        if cfg.name in checked:
            raise KeyboardInterrupt
        checked.append(cfg.name)
        return dict(status=PASS, reason='', difference=0, left=0)

    sweep = TOOL['sweep'].__globals__
    monkeypatch.setitem(sweep, 'distinct', lambda configs, say: models)
    monkeypatch.setitem(sweep, 'shipped_configs', dict)
    monkeypatch.setitem(sweep, 'bounded', check_in_process)
    monkeypatch.setitem(sweep, 'check', check)
    return checked


def test_a_next_run_checks_what_has_no_row(zoo, tmp_path, capsys):
    out = tmp_path / 'zoo'
    TOOL['main'](['--out-dir', str(out), '--only', 'a/*'])
    assert sorted(zoo) == ['a/1.py', 'a/2.py']
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs' / 'models.md').write_text(f'before {BEGIN} old {END} after')
    TOOL['main'](['--out-dir', str(out), '--docs', str(tmp_path / 'docs')])
    assert zoo[2:] == ['b/3.py'] and list(read_rows(out / 'zoo.csv')) == sorted(zoo)
    assert '3 distinct detectors, 1 to check' in capsys.readouterr().out
    assert '3 of the 3 distinct detectors' in (tmp_path / 'docs' / 'zoo.md').read_text()
    assert '| a | 2 |' in (tmp_path / 'docs' / 'models.md').read_text()
    assert len(read_rows(tmp_path / 'docs' / 'results' / 'zoo.csv')) == 3
    with pytest.raises(SystemExit) as ended:  # it checks a/1.py again
        TOOL['main'](['--out-dir', str(out), '--only', 'a/1.py', '--again'])
    assert ended.value.code == 130
