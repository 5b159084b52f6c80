"""Lines arrive whole, in files that are rotated and on stdout; and whoever can't write them says why."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dapo_edge.errors import OutputError
from dapo_edge.outputs.lines import LineFile, Stdout
from dapo_edge.terminal import ReaderGone, prepare_streams, print_text


def test_files_are_rotated_and_the_oldest_go(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    file = LineFile(path, max_mb=100e-6, keep=2)
    file.open()
    for number in range(20):
        file.append(f"{number:029d}")  # with its end 30 bytes, so that three fit
    file.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["r.jsonl", "r.jsonl.1", "r.jsonl.2"]
    kept = [
        int(line) for name in ("r.jsonl.2", "r.jsonl.1", "r.jsonl") for line in (tmp_path / name).read_text().split()
    ]
    assert kept == list(range(12, 20))
    assert all(entry.stat().st_size <= 100 for entry in tmp_path.iterdir())


def test_rotation_without_old_files_and_lines_longer_than_a_file(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "r", max_mb=10e-6, keep=0)
    file.open()
    for text in ("a" * 50, "b"):
        file.append(text)
    file.close()
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["b\n"]


def test_a_file_that_was_moved_or_removed_is_begun_anew(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "r")
    file.open()
    file.append("1")
    (tmp_path / "r").rename(tmp_path / "old")
    file.append("2")
    (tmp_path / "r").unlink()
    file.append("3")
    file.close()
    assert ((tmp_path / "old").read_text(), (tmp_path / "r").read_text()) == ("1\n", "3\n")


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:4])

    file = LineFile(tmp_path / "r")
    file.open()
    file.append("whole")
    file.close()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode, buffering: Full(self, mode.replace("b", "")))
        with pytest.raises(OutputError, match=r"No space left.*Free some space"):
            file.append("cut off")
    file.close()
    assert (tmp_path / "r").read_bytes() == b"whole\n"


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "r.jsonl", tmp_path, Path("/proc/r.jsonl"), Path("a\0b")):
        with pytest.raises(OutputError, match="can't be written"):
            LineFile(path).open()
    if Path("/dev/full").exists():
        file = LineFile(Path("/dev/full"))
        with pytest.raises(OutputError, match="No space left"):
            file.append("x")
        file.close()


def test_streams_are_no_files_to_append_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/stdout"), Path("/dev/fd/1"), Path("/proc/self/fd/1")):
        with pytest.raises(OutputError, match=r"is a stream.*Name a file; for lines to stdout, leave the path out"):
            LineFile(path).open()
    assert not list(tmp_path.glob("pipe.*"))


def test_dev_null_is_no_file_to_rotate() -> None:
    file = LineFile(Path(os.devnull), max_mb=1e-6, keep=1)
    file.open()
    for _ in range(3):
        file.append("x" * 10)
    file.close()
    assert Path(os.devnull).is_char_device()


def test_stdout_that_breaks_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    stdout = Stdout(lambda: told.append("broken"))
    stdout.append("fine")
    assert capsys.readouterr().out == "fine\n"

    def gone(text: str) -> None:
        raise ReaderGone

    monkeypatch.setattr("dapo_edge.outputs.lines.print_text", gone)
    for _ in range(2):
        stdout.append("lost")  # which is no failure: the reader has had enough
    assert told == ["broken"]
    assert isinstance(stdout.broken, ReaderGone)


def test_stdout_that_can_not_be_written_refuses_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def full(text: str) -> None:
        calls.append(text)
        raise OutputError("full", "free some space")

    monkeypatch.setattr("dapo_edge.outputs.lines.print_text", full)
    stdout = Stdout()
    for _ in range(2):
        with pytest.raises(OutputError, match="full"):
            stdout.append("lost")
    assert calls == ["lost"]
    assert isinstance(stdout.broken, OutputError)


def test_a_closed_stdout_shows_when_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = sys.stderr
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)
        prepare_streams()
        with pytest.raises(OutputError, match="stdout is closed"):
            Stdout().open()
        with pytest.raises(OutputError, match="stdout is closed"):
            print_text("x")
    assert sys.stderr is stderr
    Stdout().open()
