"""CSV files: what is read, what is refused, and what is appended."""

import pytest

from dn_mmdet.messages import ConfigError
from dn_mmdet.tables import append_rows, check_columns, csv_text, read_table

COLUMNS = ('name', 'count')


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / 'new' / 'rows.csv'
    append_rows(path, [dict(name='a, "b"', count=1)], COLUMNS)
    append_rows(path, [dict(name='two\nlines'), dict(name='c', count=3)], COLUMNS)
    rows = read_table(path, [COLUMNS], dict(count=int))
    assert rows == [
        dict(name='a, "b"', count=1),
        dict(name='two\nlines', count=None),
        dict(name='c', count=3),
    ]
    assert csv_text([dict(row, other=1) for row in rows], COLUMNS) == path.read_text()
    assert read_table(path, [COLUMNS], {}, empty='')[1]['count'] == ''


def test_columns_may_have_several_versions(tmp_path):
    path = tmp_path / 'rows.csv'
    path.write_text('name\na\n')
    assert read_table(path, [COLUMNS, ('name',)], {}) == [dict(name='a')]
    for call in (
        lambda: read_table(path, [COLUMNS], {}),
        lambda: append_rows(path, [dict(name='b')], COLUMNS),
    ):
        with pytest.raises(ConfigError, match='expected the columns name, count, found name;'):
            call()
    assert path.read_text() == 'name\na\n'


def test_an_empty_file_has_no_columns(tmp_path):
    (tmp_path / 'rows.csv').touch()
    with pytest.raises(ConfigError, match='found none; name another file'):
        check_columns(tmp_path / 'rows.csv', COLUMNS)


def test_no_file_and_a_folder(tmp_path):
    check_columns(tmp_path / 'none.csv', COLUMNS)
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / 'none.csv', [COLUMNS], {})
    with pytest.raises(IsADirectoryError):  # before anything is measured
        check_columns(tmp_path, COLUMNS)


def test_a_row_with_more_than_the_columns_is_refused_whole(tmp_path):
    append_rows(tmp_path / 'rows.csv', [dict(name='a', count=1)], COLUMNS)
    before = (tmp_path / 'rows.csv').read_text()
    with pytest.raises(ValueError, match='other'):
        append_rows(tmp_path / 'rows.csv', [dict(name='c'), dict(name='b', other=1)], COLUMNS)
    assert (tmp_path / 'rows.csv').read_text() == before


def test_rows_with_too_few_cells_and_with_texts_for_numbers(tmp_path):
    path = tmp_path / 'rows.csv'
    path.write_text('name,count\na\n')
    assert read_table(path, [COLUMNS], dict(count=int)) == [dict(name='a', count=None)]
    path.write_text('name,count\na,many\n')
    with pytest.raises(ConfigError, match="rows.csv: count: expected a number, got 'many'"):
        read_table(path, [COLUMNS], dict(count=int))


def test_a_last_line_without_its_end_is_ended_before_others_follow(tmp_path):
    path = tmp_path / 'rows.csv'
    path.write_text('name,count\na,1')  # by hand
    append_rows(path, [dict(name='b', count=2)], COLUMNS)
    assert path.read_text() == 'name,count\na,1\nb,2\n'


def test_half_a_row_of_a_killed_process(tmp_path):
    path = tmp_path / 'rows.csv'
    path.write_text('name,count\na,1\nb,2')
    assert [row['name'] for row in read_table(path, [COLUMNS], {})] == ['a', 'b']
    rows = read_table(path, [COLUMNS], {}, unfinished=True)
    assert rows == [dict(name='a', count='1')]
