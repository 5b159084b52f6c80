"""`basler://` against pylon's own camera emulation."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from rigs import basler_rig, leaks
from rigs.camera_checks import open_fails, read, woken_by_close

from dapo_edge.errors import DependencyMissing, FrameError, FrameTimeout, SourceError
from dapo_edge.runtime.sources import open_source
from dapo_edge.runtime.sources.basler import BaslerSource, find_cameras

uri, node = basler_rig.uri, basler_rig.node
SMALL = {"Width": 640, "Height": 480, "PixelFormat": "Mono8"}


@pytest.fixture(autouse=True)
def _emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    basler_rig.emulate(monkeypatch)
    basler_rig.search_only_these(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of one colour each, brighter and brighter."""
    for number in range(5):
        level = 40 * number + 10
        cv2.imwrite(str(tmp_path / f"p{number}.png"), np.full((96, 128, 3), (level, level + 10, level + 20), np.uint8))
    return tmp_path


def test_emulated_cameras_are_found() -> None:
    found = find_cameras()
    assert [camera.serial for camera in found] == list(basler_rig.SERIALS)
    with open_source(found[1].uri) as source:
        assert read(source).index == 0


def test_our_own_pictures_come_in_order(folder: Path) -> None:
    with open_source(uri(**basler_rig.showing(folder))) as source:
        frames = [read(source) for _ in range(7)]
    assert [frame.image[5, 5].tolist() for frame in frames[:5]] == [
        [40 * number + 10, 40 * number + 20, 40 * number + 30] for number in range(5)
    ]
    assert frames[5].image[5, 5].tolist() == [10, 20, 30]  # the folder goes round
    assert [frame.index for frame in frames] == list(range(7))
    assert {frame.lost for frame in frames} == {0}


@pytest.mark.parametrize("name", ["Mono8", "Mono10", "Mono12", "Mono16"])
def test_grey_of_any_depth_is_the_same_picture(folder: Path, name: str) -> None:
    grey = cv2.imread(str(folder / "p2.png"), cv2.IMREAD_GRAYSCALE)
    with open_source(uri(**basler_rig.showing(folder, name))) as source:
        frames = [read(source) for _ in range(3)]
    assert np.abs(frames[2].image.astype(int) - int(grey[0, 0])).max() <= 1  # pylon's weights of the colours


@pytest.mark.parametrize("order", ["RG", "GR", "GB", "BG"])
@pytest.mark.parametrize("bits", [8, 12])
def test_every_bayer_pattern_has_the_right_colours(folder: Path, order: str, bits: int) -> None:
    with open_source(uri(**basler_rig.showing(folder, f"Bayer{order}{bits}"))) as source:
        image = read(source).image
    np.testing.assert_array_equal(image, np.broadcast_to([10, 20, 30], (96, 128, 3)))


@pytest.mark.parametrize("name", ["RGB8Packed", "BGR8Packed", "BGRA8Packed"])
def test_colours(folder: Path, name: str) -> None:
    with open_source(uri(**basler_rig.showing(folder, name))) as source:
        np.testing.assert_array_equal(read(source).image, np.broadcast_to([10, 20, 30], (96, 128, 3)))


def test_three_failed_buffers_are_three_failed_frames(folder: Path) -> None:
    with open_source(uri(**basler_rig.showing(folder))) as source:
        read(source)
        node(source, "ForceFailedBufferCount").FromString("3")
        node(source, "ForceFailedBuffer").Execute()
        good, failed, lost = [], [], 0
        for _ in range(15):
            try:
                frame = read(source)
                good.append(frame.index)
                lost += frame.lost
            except FrameError as error:
                failed.append(error.index)
                assert "incomplete" in str(error)
    assert len(failed) == 3
    assert lost == 0  # each frame counts once
    assert sorted([*good, *failed]) == list(range(1, 16))  # type: ignore[type-var]


def test_a_software_trigger_takes_one_picture_per_read() -> None:
    with open_source(uri(trigger="software", ExposureTime=1000, **SMALL)) as source:
        known = source.properties
        assert not known.live
        assert not known.triggered
        assert known.fps is None
        times_ms = []
        for index in range(8):
            start_s = time.perf_counter()
            assert read(source).index == index
            times_ms.append((time.perf_counter() - start_s) * 1e3)
    assert sorted(times_ms)[4] < 60  # 13 ms on an idle machine


def test_a_line_triggers() -> None:
    with open_source(uri(trigger="Line1", **SMALL)) as source:
        assert source.properties.triggered
        assert source.properties.fps is None
        with pytest.raises(FrameTimeout, match="trigger"):
            source.read(0.1)
        node(source, "TriggerSource").FromString("Software")
        node(source, "TriggerSoftware").Execute()  # as if the part had come
        assert read(source).index == 0


def test_a_trigger_that_is_set_in_the_camera_stays() -> None:
    with open_source(uri(TriggerSelector="FrameStart", TriggerSource="Line2", TriggerMode="On")) as source:
        assert source.properties.triggered
    with open_source(uri(TriggerSelector="FrameStart", TriggerMode="On", trigger="off", **SMALL)) as source:
        assert source.properties.live
        assert read(source).index == 0


def test_newest_counts_what_it_leaves_out() -> None:
    with open_source(uri(grab="newest", AcquisitionFrameRateEnable=1, AcquisitionFrameRate=100, **SMALL)) as source:
        read(source)
        time.sleep(0.3)
        frame = read(source)
        assert 10 <= frame.lost <= 40
        assert frame.index == 1


def test_all_is_the_default_and_leaves_out_nothing() -> None:
    with open_source(uri(**SMALL)) as source:
        read(source)
        time.sleep(0.2)
        assert [read(source).lost for _ in range(20)] == [0] * 20


def test_a_removed_camera_is_opened_again() -> None:
    """Emulated grabbing goes on after the removal, as if nothing had happened."""
    source = open_source(uri(**SMALL))
    with source:
        read(source)
        node(source, "FirePnPCallback").Execute()
        with pytest.raises(SourceError, match="was removed") as caught:
            for _ in range(100):
                read(source)
        assert type(caught.value) is SourceError
        assert source.read(1) is None
    with source:
        assert read(source).index == 0
    assert BaslerSource.reconnects


def test_a_triggered_camera_that_is_removed_is_no_silent_one() -> None:
    with open_source(uri(trigger="Line1", **SMALL)) as source:
        with pytest.raises(FrameTimeout):
            source.read(0.05)
        node(source, "FirePnPCallback").Execute()
        began_s = time.monotonic()
        with pytest.raises(SourceError, match="was removed"):
            source.read()
        assert time.monotonic() - began_s < 1.5


def test_closing_wakes_a_reader() -> None:
    with open_source(uri(trigger="Line1", **SMALL)) as source:
        assert woken_by_close(source) < 1.5


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("Gian=3", "no feature 'Gian'. Did you mean 'Gain'?"),
        ("Width=99999", "must be equal or smaller than Max = 4096). Width is a number from 1 to 4096"),
        ("Width=12.5", "no whole number"),
        ("PixelFormat=Foo", "PixelFormat is one of Mono8, Mono10"),
        ("PixelFormat=RGB16Packed", "'RGB16Packed', which is not supported. Choose another in the URI"),
        ("DeviceModelName=x", "can't be written now"),
        ("grab=some", "The value of 'grab' is all, or newest"),
        ("trigger=Line9", "TriggerSource is one of Software, Line1"),
        ("ReverseX=maybe", "ReverseX is 0 or 1"),
    ],
)
def test_wrong_features_are_refused_with_what_is_right(query: str, message: str) -> None:
    assert message in open_fails(f"{uri()}{query}")
    with open_source(uri(**SMALL)) as source:
        assert read(source)  # nothing is left open


def test_which_camera_must_be_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "several cameras are there" in open_fails("basler://")
    assert "0815-0001" in open_fails("basler://4711", SourceError)
    monkeypatch.setenv("PYLON_CAMEMU", "1")
    with open_source("basler://") as source:  # the only one
        assert read(source)
    monkeypatch.delenv("PYLON_CAMEMU")
    assert "is not there; found: none" in open_fails(uri(), SourceError)


def test_without_pypylon_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypylon.pylon", None)
    with pytest.raises(DependencyMissing, match=r"dapo-edge\[basler\]"), open_source(uri()):
        pass


def test_frames_need_no_new_memory() -> None:
    with open_source(uri(**SMALL)) as source:
        for _ in range(30):
            read(source)
        assert source._reader._pool.made <= 2  # type: ignore[attr-defined]


def test_opening_and_closing_leaks_nothing() -> None:
    def cycle() -> None:
        with open_source(uri(**SMALL)) as source:
            read(source)

    assert leaks.leaked(cycle) == (0, 0)
