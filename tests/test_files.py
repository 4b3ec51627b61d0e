"""What is written is there whole or not at all."""

import json

import pytest

from dn_mmdet.files import replacing, write_json, write_text


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / 'table.csv'
    write_text(path, 'old\r\n')
    assert path.read_bytes() == b'old\r\n'  # as it was given
    with replacing(path) as part:
        part.write_text('new')
        assert path.read_text() == 'old\n' and part.parent == path.parent
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / 'run.json'
    write_json(path, dict(a=[1]))
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text('ha')
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == dict(a=[1])
