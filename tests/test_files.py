"""Writing files: what a check whether a folder takes them leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dapo_edge.errors import OutputError
from dapo_edge.files import check_writable, write_atomically


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    check_writable(tmp_path / "there" / "new" / "deep")
    assert list((tmp_path / "there").iterdir()) == []
    (tmp_path / "there" / "kept.txt").touch()
    check_writable(tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["kept.txt"]


def test_an_empty_folder_that_was_there_stays(tmp_path: Path) -> None:
    check_writable(tmp_path)
    assert tmp_path.is_dir()


def test_a_refusal_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        check_writable(tmp_path / "file" / "new")

    def full(**options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    with pytest.raises(OutputError, match="No space left"):
        check_writable(tmp_path / "new" / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_looking_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / ".probe").write_text("precious")
    check_writable(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(".probe", "precious")]


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path):
        with pytest.raises(OutputError, match="is no plain file"):
            write_atomically(place, b"content")
    assert pipe.is_fifo()
