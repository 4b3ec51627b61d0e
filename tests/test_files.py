"""What is written is there whole or not at all."""

import json

import pytest

from dn_mmdet.files import read_json, replacing, write_json, write_text


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / 'table.csv'
    write_text(path, 'old\r\n')
    assert path.read_bytes() == b'old\r\n'  # as it was given
    with replacing(path) as part:
        part.write_text('new')
        assert path.read_text() == 'old\n' and part.name == path.name
        assert part.parent.parent == path.parent  # on the same disk
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / 'run.json'
    write_json(path, dict(a=[1]))
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text('ha')
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == dict(a=[1])
    assert list(tmp_path.iterdir()) == [path]  # a full disk is not filled further


def test_of_two_writers_the_last_one_wins(tmp_path):
    path = tmp_path / 'run.json'
    with replacing(path) as mine:
        mine.write_text('mine')
        with replacing(path) as theirs:
            theirs.write_text('theirs')
        assert path.read_text() == 'theirs'
    assert path.read_text() == 'mine' and list(tmp_path.iterdir()) == [path]


def test_what_was_not_written_yet_is_the_default(tmp_path):
    path = tmp_path / 'starts.json'
    assert read_json(path) is None and read_json(path, 0) == 0
    write_json(path, 1)
    assert read_json(path, 0) == 1
