"""A watched folder: every picture once, whole, and in order."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from PIL import Image
from rigs import leaks
from rigs.camera_checks import woken_by_close

from dapo_edge.errors import FrameError, FrameTimeout, SourceError, SourceRefused
from dapo_edge.runtime.sources import Source, open_source
from dapo_edge.runtime.sources.stills import FolderSource
from dapo_edge.runtime.sources.watch import WatchedFolder, is_being_written
from dapo_edge.structures import Frame

WAIT_S = 3.0  # for what must come
QUIET_S = 0.3  # in which nothing must come


def watched(folder: Path, query: str = "settle_s=0.05") -> Source:
    return open_source(f"dir://{folder}?watch=1&{query}")


def picture(path: Path, value: int = 100) -> Path:
    Image.new("RGB", (32, 24), (value, 0, 0)).save(path)
    return path


def value(frame: Frame | None) -> int:
    assert frame is not None
    return int(frame.image[0, 0, 2])


def nothing_comes(source: Source) -> None:
    with pytest.raises(FrameTimeout):
        source.read(QUIET_S)


def test_what_is_there_first_and_then_what_appears(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        picture(tmp_path / f"part{number}.png", number)
    (tmp_path / "notes.txt").write_text("x")
    with watched(tmp_path) as source:
        properties = source.properties
        assert (properties.live, properties.triggered, properties.length) == (True, True, None)
        assert [value(source.read(WAIT_S)) for _ in range(3)] == [1, 9, 10]
        nothing_comes(source)
        picture(tmp_path / "part2.png", 2)
        picture(tmp_path / ".part3.png", 3)
        frame = source.read(WAIT_S)
        assert frame is not None
        assert (value(frame), frame.index, frame.source) == (2, 3, f"image://{tmp_path}/part2.png")
        nothing_comes(source)


def test_an_empty_folder_is_no_fault_and_the_wait_is_as_long_as_asked(tmp_path: Path) -> None:
    with watched(tmp_path) as source:
        began_s = time.monotonic()
        with pytest.raises(FrameTimeout):
            source.read(0.2)
        assert 0.19 < time.monotonic() - began_s < 0.5


def test_a_file_that_is_still_written_is_left_alone(tmp_path: Path) -> None:
    data = picture(tmp_path / "whole.png", 77).read_bytes()
    (tmp_path / "whole.png").unlink()
    with watched(tmp_path) as source:
        with (tmp_path / "slow.png").open("wb") as file:
            for start in range(0, len(data), 10):
                file.write(data[start : start + 10])
                file.flush()
                if start % 20 == 0:
                    with pytest.raises(FrameTimeout):
                        source.read(0.03)
        assert value(source.read(WAIT_S)) == 77
        nothing_comes(source)


def test_a_writer_that_pauses_longer_than_settling_takes(tmp_path: Path) -> None:
    data = picture(tmp_path / "whole.png", 78).read_bytes()
    (tmp_path / "whole.png").unlink()
    with watched(tmp_path, "settle_s=0.02") as source:
        with (tmp_path / "slow.png").open("wb") as file:
            file.write(data[:40])
            file.flush()
            nothing_comes(source)
            file.write(data[40:])
        assert value(source.read(WAIT_S)) == 78


def test_who_writes_is_seen_and_who_reads_is_not(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    with path.open("ab"):
        assert is_being_written(path)
    with path.open("rb"):
        assert not is_being_written(path)
    assert not is_being_written(tmp_path / "none.png")


def test_a_file_that_is_renamed_into_the_folder(tmp_path: Path) -> None:
    hidden = picture(tmp_path / ".a.png", 5)
    old_s = time.time() - 1000
    os.utime(hidden, (old_s, old_s))
    with watched(tmp_path) as source:
        nothing_comes(source)
        hidden.rename(tmp_path / "a.png")
        assert value(source.read(WAIT_S)) == 5


def test_the_same_name_written_again_is_a_new_picture(tmp_path: Path) -> None:
    with watched(tmp_path) as source:
        for number in (1, 2, 3):
            picture(tmp_path / "current.png", number)
            assert value(source.read(WAIT_S)) == number
        (tmp_path / "current.png").unlink()
        nothing_comes(source)
        picture(tmp_path / "current.png", 4)
        assert value(source.read(WAIT_S)) == 4


def test_a_truncated_picture_fails_once(tmp_path: Path) -> None:
    data = picture(tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:50])
    picture(tmp_path / "b.png", 6)
    with watched(tmp_path, "settle_s=0.05&delete=1") as source:
        with pytest.raises(FrameError) as caught:
            source.read(WAIT_S)
        assert (caught.value.index, caught.value.source) == (0, f"image://{tmp_path}/a.png")
        frame = source.read(WAIT_S)
        assert (value(frame), frame and frame.index) == (6, 1)
        nothing_comes(source)
        assert (tmp_path / "a.png").exists()  # what failed can be looked at
        (tmp_path / "a.png").write_bytes(data)
        assert value(source.read(WAIT_S)) == 100


def test_pictures_that_are_taken_away_are_no_failures(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        picture(tmp_path / f"{number}.png", number)
    with watched(tmp_path) as source:
        assert value(source.read(WAIT_S)) == 1
        (tmp_path / "2.png").unlink()
        assert value(source.read(WAIT_S)) == 3
        nothing_comes(source)


def test_deleting_keeps_the_folder_and_the_memory_empty(tmp_path: Path) -> None:
    with watched(tmp_path, "settle_s=0.02&delete=1") as source:
        assert isinstance(source, WatchedFolder)
        for number in range(20):
            picture(tmp_path / f"{number}.png", number)
            assert value(source.read(WAIT_S)) == number
        nothing_comes(source)
        assert list(tmp_path.iterdir()) == []
        assert source._known == {}


def test_only_what_is_in_the_folder_is_remembered(tmp_path: Path) -> None:
    with watched(tmp_path, "settle_s=0.02") as source:
        assert isinstance(source, WatchedFolder)
        for number in range(20):
            path = picture(tmp_path / f"{number}.png", number)
            assert value(source.read(WAIT_S)) == number
            path.unlink()
        nothing_comes(source)
        assert len(source._known) == 0


def test_many_at_once_come_all_and_in_order(tmp_path: Path) -> None:
    with watched(tmp_path, "settle_s=0.1") as source:
        for number in range(100):
            picture(tmp_path / f"p{number}.png", number)
        values = [value(source.read(WAIT_S)) for _ in range(100)]
        nothing_comes(source)
    assert sorted(values) == list(range(100))


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with watched(folder) as source:
        assert source.reconnects
        folder.rmdir()
        with pytest.raises(SourceError, match="can't be read"):
            source.read(WAIT_S)


def test_closing_wakes_a_reader_that_waits(tmp_path: Path) -> None:
    assert woken_by_close(watched(tmp_path).open()) < 1.0


def test_openings_leave_nothing_behind(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")

    def cycle() -> None:
        with watched(tmp_path, "settle_s=0.02") as source:
            source.read(WAIT_S)

    assert leaks.leaked(cycle, times=10) == (0, 0)


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    assert isinstance(open_source(f"dir://{tmp_path}?watch=0"), FolderSource)
    for query, words in (
        ("watch=2", "0 or 1"),
        ("watch=1&settle_s=0", "0.02 to 60 seconds"),
        ("watch=1&delte=1", "Did you mean 'delete'"),
        ("watch=0&delete=1", "unknown key 'delete'"),
    ):
        with pytest.raises(SourceRefused, match=words):
            open_source(f"dir://{tmp_path}?{query}").open()
    with pytest.raises(SourceRefused, match="not a folder"):
        watched(tmp_path / "a.png").open()
    with pytest.raises(SourceError, match="No such file"):
        watched(tmp_path / "none").open()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SourceRefused, match="can't be deleted"):
        watched(tmp_path, "delete=1").open()


def test_a_picture_that_can_not_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    picture(tmp_path / "a.png")
    monkeypatch.setattr(Path, "unlink", refuse)
    with watched(tmp_path, "settle_s=0.02&delete=1") as source, pytest.raises(SourceError, match="can't be deleted"):
        source.read(WAIT_S)
