"""The generated camera: reproducible, bounded, paced, and strict about its address."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from dapo_edge.errors import FrameTimeout, SourceError
from dapo_edge.runtime.sources import Properties, open_source

SMALL = "synthetic://96x64@50"


def test_frames_carry_the_truth_and_repeat_with_the_seed() -> None:
    runs = []
    for seed in (0, 0, 1):
        with open_source(f"{SMALL}?frames=6&seed={seed}&good=0") as source:
            assert source.properties == Properties(f"{SMALL}?frames=6&seed={seed}&good=0", 96, 64, 50.0, 6)
            runs.append(list(source))
            assert source.read() is None
    first = runs[0]
    assert [frame.index for frame in first] == list(range(6))
    for frame in first:
        assert frame.image.shape == (64, 96, 3)
        assert frame.image.dtype == np.uint8
        assert frame.truth is not None
        assert frame.truth.types.shape == (64, 96)
    assert any(frame.truth is not None and frame.truth.mask.any() for frame in first)
    np.testing.assert_array_equal(first[5].image, runs[1][5].image)
    assert (first[5].image != runs[2][5].image).any()
    assert set(np.diff([frame.timestamp_ns for frame in first])) == {20_000_000}


def test_only_good_parts() -> None:
    with open_source(f"{SMALL}?frames=40&good=1") as source:
        assert not any(frame.truth.mask.any() for frame in source if frame.truth)


def test_without_a_bound_it_goes_on() -> None:
    with open_source("synthetic://64x64") as source:
        assert source.properties.length is None
        assert source.properties.fps == 30.0
        assert all(source.read() is not None for _ in range(50))


def test_everything_has_a_default() -> None:
    with open_source("synthetic://") as source:
        assert (source.properties.width, source.properties.height, source.properties.fps) == (640, 480, 30.0)
    with open_source("synthetic://@25") as source:
        assert (source.properties.width, source.properties.fps) == (640, 25.0)


def test_realtime_keeps_the_rate_and_leaves_nothing_out() -> None:
    with open_source("synthetic://64x64@50?realtime=1&frames=12") as source:
        assert source.properties.live
        first = source.read()
        started = time.monotonic()
        assert first is not None
        time.sleep(0.1)
        frames = list(source)
        took = time.monotonic() - started
    assert [frame.index for frame in frames] == list(range(1, 12))
    assert 0.2 < took < 5  # 11 frames of 20 ms; the reader's pause is made up for
    assert abs(frames[-1].timestamp_ns - time.time_ns()) < 2e9


def test_closing_wakes_a_reader_that_waits() -> None:
    source = open_source("synthetic://64x64@0.05?realtime=1").open()
    assert source.read() is not None
    threading.Timer(0.5, source.close).start()
    started = time.monotonic()
    assert source.read() is None
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("synthetic://63x480", "64 to 8192"),
        ("synthetic://640x8193", "64 to 8192"),
        ("synthetic://640x480@0", "0.01 to 1000"),
        ("synthetic://640x480@2000", "0.01 to 1000"),
        ("synthetic://640x480@-1", "Write it like"),
        ("synthetic://640x480@nan", "Write it like"),
        ("synthetic://640", "Write it like"),
        ("synthetic://٣x٣", "Write it like"),
        (f"{SMALL}?frame=3", "Did you mean 'frames'? Valid keys: seed"),
        (f"{SMALL}?frames=0", "whole number from 1"),
        (f"{SMALL}?frames=", "whole number from 1"),
        (f"{SMALL}?seed=-1", "whole number from 0"),
        (f"{SMALL}?seed=1e3", "whole number from 0"),
        (f"{SMALL}?seed=99999999999999999999", "whole number from 0"),
        (f"{SMALL}?good=1.5", "from 0 to 1"),
        (f"{SMALL}?good=inf", "from 0 to 1"),
        (f"{SMALL}?realtime=yes", "0 or 1"),
        (f"{SMALL}?seed=1&seed=2", "twice"),
    ],
)
def test_a_wrong_address_says_what_is_valid(uri: str, word: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(uri).open()
    assert word in str(caught.value)


def test_a_loop_is_drawn_once_and_comes_again() -> None:
    with open_source(f"{SMALL}?loop=3&frames=8") as source:
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(8))
    assert all(frames[index].image is frames[index % 3].image for index in range(8))
    with open_source(f"{SMALL}?frames=3") as source:
        assert all((frame.image == again.image).all() for frame, again in zip(source, frames, strict=False))


def test_a_frame_that_is_not_due_yet_is_waited_for_no_longer_than_asked() -> None:
    with open_source("synthetic://64x64@2?realtime=1&frames=2") as source:
        assert source.read(0.1)
        with pytest.raises(FrameTimeout):
            source.read(0.05)
        assert source.read(2)
        assert source.read(0.1) is None
