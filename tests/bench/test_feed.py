"""Where a benchmark's frames come from."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from line_fakes import scripted

from dapo_edge.bench.feed import DISTINCT_FRAMES, open_feed, shots
from dapo_edge.errors import FrameError, SourceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((40, 60, 3), number, np.uint8))
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    return tmp_path


def test_generated_frames_are_drawn_once_and_copied_each_time() -> None:
    feed = open_feed("synthetic://64x80@30")
    assert (len(feed.frames), feed.width, feed.height, feed.live) == (DISTINCT_FRAMES, 64, 80, False)
    taken = list(itertools.islice(shots(feed), DISTINCT_FRAMES + 1))
    np.testing.assert_array_equal(taken[0].frame.image, taken[-1].frame.image)
    assert not np.shares_memory(taken[0].frame.image, taken[-1].frame.image)
    assert all(shot.capture_ms is not None and shot.capture_ms > 0 for shot in taken)


def test_large_frames_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_edge.bench.feed.MOST_BYTES", 5 * 64 * 80 * 3)
    assert len(open_feed("synthetic://64x80@30").frames) == 5
    monkeypatch.setattr("dapo_edge.bench.feed.MOST_BYTES", 1)
    assert len(open_feed("synthetic://64x80@30").frames) == 1


def test_files_are_read_again_and_bad_ones_left_out(folder: Path) -> None:
    feed = open_feed(str(folder))
    assert len(feed.frames) == 3
    levels = [int(shot.frame.image[0, 0, 0]) for shot in itertools.islice(shots(feed), 7)]
    assert levels == [0, 1, 2, 0, 1, 2, 0]


def test_what_is_left_out_and_what_differs_is_said(folder: Path) -> None:
    (first,) = open_feed(str(folder)).warnings
    assert first.startswith("1 of the first 4 frames of")
    assert "bad.png" in first
    cv2.imwrite(str(folder / "9.png"), np.zeros((20, 30, 3), np.uint8))
    (_, second) = open_feed(str(folder)).warnings
    assert second == "the frames have 2 different sizes, with which the times vary"
    assert open_feed("synthetic://64x80@30").warnings == []


def test_files_that_vanish_are_an_error(folder: Path) -> None:
    feed = open_feed(str(folder))
    frames = shots(feed)
    next(frames)
    for path in folder.glob("[0-9].png"):
        path.unlink()
    with pytest.raises(SourceError):
        list(itertools.islice(frames, 10))
    shutil.rmtree(folder)


def test_a_camera_that_gives_nothing_but_torn_frames_is_not_waited_for() -> None:
    torn = itertools.repeat(FrameError("it is torn", "Look at the cable"))
    with scripted(belt=[torn]), pytest.raises(SourceError, match="has no frame that can be used"):
        open_feed("camera://belt")


def test_a_source_without_frames(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(SourceError, match="has no frame that can be used"):
        open_feed(str(tmp_path))


def test_a_camera_is_read_as_it_goes_and_says_no_capture_time() -> None:
    with scripted(belt=[[0, 1], [0, 1, 2, 3]]):
        feed = open_feed("camera://belt")
        assert (len(feed.frames), feed.live) == (1, True)
        taken = list(itertools.islice(shots(feed), 4))
    assert [shot.frame.index for shot in taken] == [0, 1, 2, 3]
    assert [shot.capture_ms for shot in taken] == [None] * 4


def test_passwords_stay_out_of_the_feed_s_name() -> None:
    with scripted(**{"me:secret@belt": [[0]]}):
        feed = open_feed("scripted://me:secret@belt")
    assert "secret" not in feed.uri
