"""`genicam://` against a real GenTL producer."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rigs import genicam_rig, leaks
from rigs.camera_checks import open_fails

from dapo_edge.errors import DependencyMissing, FrameTimeout, SourceError, SourceRefused
from dapo_edge.runtime.sources import industrial, open_source
from dapo_edge.runtime.sources.genicam import GenicamSource, find_cameras
from dapo_edge.runtime.sources.gentl import PATH_VARIABLE, Producer

uri = genicam_rig.uri


@pytest.fixture(autouse=True)
def _producer() -> None:
    genicam_rig.producer()


def node_map(source: object) -> object:
    return source._camera.remote_device.node_map  # type: ignore[attr-defined]


def test_three_cameras_are_found_and_open_by_their_uris() -> None:
    found = find_cameras([genicam_rig.producer()])
    assert [camera.serial for camera in found] == ["0", "1", "2"]
    colours = []
    for camera in found:
        with open_source(camera.uri) as source:
            frame = source.read(2)
            assert frame is not None
            assert frame.image.shape == (400, 400, 3)
            colours.append(int(frame.image.reshape(-1, 3).sum(axis=0).argmax()))  # a ball on white
    assert colours == [2, 1, 0]  # red, green, blue, in BGR


@pytest.mark.parametrize("name", ["1", genicam_rig.GREEN])
def test_a_camera_has_a_serial_number_and_an_id(name: str) -> None:
    with open_source(uri(name, PixelFormat="Mono8", Width=200, Height=100, AcquisitionFrameRate=50)) as source:
        known = source.properties
        assert (known.width, known.height, known.fps) == (200, 100, 50.0)
        assert known.live
        assert not known.triggered
        frame = source.read(2)
        assert frame is not None
        assert frame.image.shape == (100, 200, 3)
        assert source.pixel_format == "Mono8"  # type: ignore[attr-defined]


def test_all_frames_of_a_fast_camera_come_in_order() -> None:
    with open_source(uri(AcquisitionFrameRate=200, PixelFormat="Mono8")) as source:
        source.read(2)
        frames = [source.read(2) for _ in range(100)]
    assert [frame.index for frame in frames if frame] == list(range(1, 101))
    seconds = frames[-1].arrived_s - frames[0].arrived_s  # type: ignore[union-attr]
    assert sum(frame.lost for frame in frames if frame) < 20  # none, on an idle machine
    assert 99 / seconds > 60  # 196 on an idle machine


def test_frames_lost_in_the_driver_are_counted() -> None:
    """All that the camera sent is a frame or a lost one, by its own numbers."""
    with open_source(uri(AcquisitionFrameRate=200, PixelFormat="Mono8", buffers=4)) as source:
        first = source.read(2)
        time.sleep(0.4)
        frames = [source.read(2) for _ in range(10)]
    lost = [frame.lost for frame in frames if frame]
    assert first is not None
    assert first.lost == 0
    assert sum(lost) >= 30  # of 80 while nobody read, 4 had room
    assert len(frames) + sum(lost) >= 75


def test_a_silent_camera_is_a_timeout_and_leaves_the_process_alone() -> None:
    """Waiting inside genicam would hold Python's lock: one tick instead of hundreds."""
    ticks = 0
    done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    with open_source(uri()) as source:
        source.read(2)
        node_map(source).AcquisitionStop.execute()  # type: ignore[attr-defined]
        with pytest.raises(FrameTimeout):
            while True:
                source.read(0.3)
        counter = threading.Thread(target=count)
        counter.start()
        start_s = time.monotonic()
        with pytest.raises(FrameTimeout, match=r"no frame within 0\.5 s"):
            source.read(0.5)
        assert 0.5 <= time.monotonic() - start_s < 1.0
        done.set()
        counter.join()
        assert ticks > 100
        node_map(source).AcquisitionStart.execute()  # type: ignore[attr-defined]
        assert source.read(2)  # it is still open


def test_closing_wakes_a_reader() -> None:
    with open_source(uri()) as source:
        source.read(2)
        node_map(source).AcquisitionStop.execute()  # type: ignore[attr-defined]
        timer = threading.Timer(0.2, source.close)
        timer.start()
        while source.is_open and source.read():
            pass
        timer.join()
        assert not source.is_open


def test_a_silent_camera_is_asked_whether_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(industrial, "ALIVE_EVERY_S", 0.2)
    asked: list[object] = []
    check = GenicamSource._check_alive

    def note_and_check(source: GenicamSource) -> None:
        asked.append(source)
        check(source)

    monkeypatch.setattr(GenicamSource, "_check_alive", note_and_check)
    with open_source(uri(AcquisitionFrameRate=100)) as source, open_source(uri("0")) as gone:
        for _ in range(40):
            source.read(2)
        assert asked == []  # it delivers
        node_map(source).AcquisitionStop.execute()  # type: ignore[attr-defined]
        with pytest.raises(FrameTimeout):
            while True:
                source.read(0.5)
        assert 2 <= len(asked) <= 3
        # A stream stays as it was where its camera has gone: here by the question to one that the producer closed.
        source._pulse = gone._pulse  # type: ignore[attr-defined]
        gone._camera.device.module.close()  # type: ignore[attr-defined]
        with pytest.raises(SourceError, match="does not answer any more") as caught:
            source.read(5)
        assert type(caught.value) is SourceError


def test_a_producer_that_hangs_holds_up_its_own_cameras_only(tmp_path: Path) -> None:
    other = tmp_path / "other.cti"
    other.write_bytes(b"")
    hanging = Producer(other.absolute())
    held, let_go = threading.Event(), threading.Event()

    def hang() -> None:
        with hanging.lock:
            held.set()
            let_go.wait(10)

    thread = threading.Thread(target=hang)
    thread.start()
    held.wait(5)
    try:
        began_s = time.monotonic()
        with open_source(uri()) as source:
            assert source.read(2)
        assert time.monotonic() - began_s < 2.0
        assert thread.is_alive()
    finally:
        let_go.set()
        thread.join()


def test_cameras_share_a_producer_and_leave_each_other_alone() -> None:
    with open_source(uri("0", AcquisitionFrameRate=100)) as first:
        first.read(2)
        with open_source(uri("1")) as second:
            assert second.read(2)
            assert first.read(2)
        open_fails(uri("7"), SourceError)  # looks for cameras while one is open
        assert first.read(2)
        with open_source(uri("1")) as second:
            assert second.read(2)


def test_a_camera_in_use_may_be_asked_again() -> None:
    with open_source(uri()):
        assert "is in use" in open_fails(uri(), SourceError)
    with open_source(uri()) as source:
        assert source.read(2)
    assert GenicamSource.reconnects


def test_a_picture_of_several_parts_is_its_first_part() -> None:
    features = {"ComponentSelector": "Range", "ComponentEnable": 1}
    with open_source(uri(**features) + "&ComponentSelector=Intensity") as source:
        frame = source.read(2)
    assert frame is not None
    assert frame.image.shape == (400, 400, 3)
    np.testing.assert_array_equal(frame.image[0, 0], (255, 255, 255))


def test_what_is_no_picture_is_refused() -> None:
    with open_source(uri(GenDCStreamingMode="On")) as source, pytest.raises(SourceRefused, match="GenDCStreamingMode"):
        source.read(2)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("Wdith=300", "no feature 'Wdith'. Did you mean 'Width'?"),
        ("tirgger=off", "Did you mean 'trigger'?"),
        ("Width=300000", "smaller than Max = 800). Width is a number from 100 to 800"),
        ("Width=200.5", "no whole number"),
        ("PixelFormat=BayerRG8", "PixelFormat is one of RGBa8, Mono8"),
        ("PayloadSize=3", "can't be written now"),
        ("ChunkModeActive=maybe", "ChunkModeActive is 0 or 1"),
        ("AcquisitionFrameRate=fast", "AcquisitionFrameRate is a number from 1.0 to 200.0"),
        ("trigger=software", "has no TriggerMode"),
        ("trigger=Line 1", "The value of 'trigger' is off, software, or the line"),
        ("buffers=0", "1 to 1000"),
        ("timeout=-1", "above 0"),
        ("trigger=off&trigger=off", "twice"),
        ("ComponentSelector=Range&ComponentEnable=1", "'Coord3D_ABC32f_Planar', which is not supported. Choose"),
    ],
)
def test_wrong_features_are_refused_with_what_is_right(query: str, message: str) -> None:
    assert message in open_fails(f"{uri()}&{query}")
    with open_source(uri()) as source:
        assert source.read(2)  # nothing is left open


def test_features_are_set_in_the_order_given() -> None:
    """Range can be switched on, Intensity can't be written: the selector decides which of them is meant."""
    ahead = "&ComponentSelector=Range&ComponentEnable=1&ComponentSelector=Intensity"
    with open_source(uri() + ahead) as source:
        node_map(source).ComponentSelector.value = "Range"  # type: ignore[attr-defined]
        assert node_map(source).ComponentEnable.value is True  # type: ignore[attr-defined]
    assert "ComponentEnable=1 (it can't be written" in open_fails(f"{uri()}&ComponentEnable=1&ComponentSelector=Range")


def test_a_command_is_carried_out() -> None:
    with open_source(f"{uri()}&AcquisitionStart=1") as source:
        assert source.read(2)


def test_which_camera_must_be_clear() -> None:
    message = open_fails(uri(""))
    assert "several cameras are there" in message
    assert genicam_rig.GREEN in message
    message = open_fails(uri("9"), SourceError)
    assert "is not there; found:" in message
    assert genicam_rig.GREEN in message


def test_producers_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(PATH_VARIABLE, f"{tmp_path}:{genicam_rig.producer().parent}")
    with open_source(f"genicam://{genicam_rig.GREEN}") as source:
        assert source.read(2)
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    assert f"{PATH_VARIABLE}={tmp_path} holds none" in open_fails("genicam://1")
    monkeypatch.delenv(PATH_VARIABLE)
    assert f"{PATH_VARIABLE} is not set" in open_fails("genicam://1")


def test_a_producer_that_is_none(tmp_path: Path) -> None:
    assert f"'{tmp_path}/x.cti' is not there" in open_fails(f"genicam://1?cti={tmp_path}/x.cti")
    (tmp_path / "x.cti").write_bytes(b"\x7fELF broken")
    assert f"'{tmp_path}/x.cti' can't be loaded" in open_fails(f"genicam://1?cti={tmp_path}/x.cti")
    import _ctypes  # any library that is there

    assert "no GenTL producer" in open_fails(f"genicam://1?cti={_ctypes.__file__}")


def test_without_harvesters_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "harvesters", None)
    with pytest.raises(DependencyMissing, match=r"dapo-edge\[genicam\]"), open_source(uri()):
        pass


def test_ctrl_c_stays_ours() -> None:
    before = signal.getsignal(signal.SIGINT)
    with open_source(uri()):
        assert signal.getsignal(signal.SIGINT) is before


def test_opening_and_closing_leaks_nothing() -> None:
    def cycle() -> None:
        with open_source(uri(AcquisitionFrameRate=200)) as source:
            source.read(2)

    assert leaks.leaked(cycle) == (0, 0)
