"""A file is what one of its writers wrote, whole, and one process at a time has what it holds."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from sadkern.files import BusyError, clear_halves, hold, write_json, write_whole


def test_several_that_write_one_file_each_write_it_whole(tmp_path):
    path = tmp_path / "file"

    def write(letter):
        for _ in range(50):
            write_whole(path, letter * 5000)
            assert len(set(path.read_bytes())) == 1
            assert path.stat().st_size == 5000

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(write, (b"a", b"b", b"c"))) == [None] * 3
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"before")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_what_killed_writers_left_is_cleared_away_and_nothing_else(tmp_path):
    for name in (".file.0123.part", ".file", "file.part", "file"):
        (tmp_path / name).touch()
    clear_halves(tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == [".file", "file", "file.part"]


def test_what_is_no_number_is_null_to_every_reader_of_json(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": [1.5, math.nan], "b": (math.inf, {"c": -math.inf}), "d": "é"})
    text = path.read_text()
    assert text.endswith("}\n")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [1.5, None], "b": [None, {"c": None}], "d": "é"
    }  # fmt: skip


def test_one_has_a_file_at_a_time(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"kept")
    with hold(path), pytest.raises(BusyError, match=r"file is being written by another process"):
        hold(path)
    with hold(path) as file:
        file.write(b", and more")
    assert path.read_bytes() == b"kept, and more"
