from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import EdgestillError
from runtime.files import atomic_write, sha256, utf8_name, write_json, write_text


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def write(target, text, error):
    """A block that writes and then fails."""
    with atomic_write(target) as temporary:
        temporary.write_text(text)
        raise error(temporary)


def test_the_file_appears_whole_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder" / "model.onnx"
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"weights")
        assert temporary.parent == target.parent
        assert temporary.suffix == ".onnx"
        assert not target.exists()
    assert target.read_bytes() == b"weights"
    assert names_in(target.parent) == ["model.onnx"]


def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write(target, "half", lambda _: ZeroDivisionError())
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("code", "word"), [(errno.ENOSPC, "space"), (errno.EACCES, "Check who"), (errno.EROFS, "read")]
)
def test_a_disk_that_refuses_is_one_line_with_a_remedy(tmp_path, code, word):
    with pytest.raises(EdgestillError, match=word) as caught:
        write(tmp_path / "a", "half", lambda path: OSError(code, os.strerror(code), str(path)))
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == []


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgestillError, match="cannot be written"), atomic_write(tmp_path / "file" / "a"):
        pass


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(EdgestillError, match="cannot be written"), atomic_write(tmp_path / "a"):
        pass
    assert names_in(tmp_path) == []


def test_another_files_error_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        (tmp_path / "other").read_text()


def test_sha256_is_hashlibs(tmp_path):
    data = np.random.default_rng(0).bytes(3_000_001)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_json_takes_paths_and_numpy_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"path": Path("x/y"), "n": np.float32(1.5), "row": np.arange(2), "ü": "é"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "path": "x/y",
        "n": 1.5,
        "row": [0, 1],
        "ü": "é",
    }
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", {"n": float("nan")})
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("name", ["語" * 84, "a" * 255, "b" * 250 + ".json"])
def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path, name):
    write_text(tmp_path / name, "whole")
    assert names_in(tmp_path) == [name]


@pytest.mark.parametrize("place", ["", "folder"])
def test_a_folder_of_that_name_is_reported_before_the_work(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(EdgestillError, match="There is a folder of that name"), atomic_write(place):
        pytest.fail("the block began")
    assert names_in(tmp_path) == ["folder"]


def test_text_is_utf8_whatever_the_machine_has_and_other_names_are_escaped(tmp_path):
    write_text(tmp_path / "a", os.fsdecode(b"\xc3\xbc \xff\n"))
    assert (tmp_path / "a").read_bytes() == b"\xc3\xbc \\udcff\n"


@pytest.mark.parametrize("name", [b"a.avi", b"\xff.avi", b"a.\xff"])
def test_a_file_can_be_opened_by_its_utf8_name(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    with utf8_name(path) as opened:
        opened.encode()
        Path(opened).write_bytes(b"through")
    assert path.read_bytes() == b"through"
