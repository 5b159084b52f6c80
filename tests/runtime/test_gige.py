"""`aravis://` against a fake GigE Vision camera: real control and stream packets, some of them lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from rigs import gige_rig, leaks
from rigs.camera_checks import open_fails, read

from dapo_edge.errors import DependencyMissing, FrameError, FrameTimeout, SourceError, SourceRefused
from dapo_edge.runtime.sources import Source, aravis, open_source

uri = gige_rig.uri


@pytest.fixture
def camera() -> Iterator[gige_rig.FakeCamera]:
    """Fresh for each test, because there can only be one on an address, and it keeps its settings."""
    with gige_rig.FakeCamera() as camera:
        yield camera


@pytest.mark.usefixtures("camera")
def test_the_camera_is_found_and_delivers() -> None:
    found = [camera for camera in aravis.find_cameras() if camera.serial == gige_rig.SERIAL]
    assert len(found) == 1
    with open_source(found[0].uri) as source:
        assert read(source).image.shape == (512, 512, 3)


@pytest.mark.usefixtures("camera")
def test_rate_order_and_the_cameras_clock() -> None:
    with open_source(uri(AcquisitionFrameRate=100, trigger="off")) as source:
        assert source.properties.fps == 100
        read(source)
        frames = [read(source) for _ in range(50)]
        assert source.has_camera_clock  # type: ignore[attr-defined]
    assert [frame.index for frame in frames] == list(range(1, 51))
    assert 49 / (frames[-1].arrived_s - frames[0].arrived_s) > 40  # 99 on an idle machine
    wall_minus_monotonic = time.time_ns() / 1e9 - time.monotonic()
    latencies = sorted(frame.arrived_s + wall_minus_monotonic - frame.timestamp_ns / 1e9 for frame in frames)
    assert 0 <= latencies[25] < 0.5  # 5 ms on an idle machine


@pytest.mark.usefixtures("camera")
@pytest.mark.parametrize("name", ["Mono8", "BayerRG8", "BayerGB8", "RGB8", "Mono16"])
def test_pixel_formats(name: str) -> None:
    with open_source(uri(PixelFormat=name, Width=256, Height=128)) as source:
        assert read(source).image.shape == (128, 256, 3)
        assert source.pixel_format == name  # type: ignore[attr-defined]


@pytest.mark.usefixtures("camera")
def test_frames_that_found_no_buffer_are_lost() -> None:
    with open_source(uri(AcquisitionFrameRate=100, Width=512, PixelFormat="Mono8", buffers=4)) as source:
        read(source)
        time.sleep(0.4)
        lost = 0
        for _ in range(12):
            try:
                lost += read(source).lost
            except FrameError:  # torn, because a busy machine took its packets too late
                lost += 1
    assert 15 <= lost <= 120  # 36 on an idle machine


@pytest.mark.usefixtures("camera")
def test_a_software_trigger() -> None:
    with open_source(uri(trigger="software")) as source:
        assert not source.properties.live
        assert [read(source).index for _ in range(3)] == [0, 1, 2]
    with open_source(uri(trigger="off")) as source:
        assert read(source)


@pytest.mark.usefixtures("camera")
@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("Wdith=300", "no feature 'Wdith'"),
        ("Width=99999", "greater than allowed maximum '2048'). Width is a number from 1 to 2048"),
        ("Width=12.5", "Invalid string for an integer"),
        ("PixelFormat=Foo", "PixelFormat is one of BayerBG8"),
        ("PayloadSize=3", "read only"),
        ("trigger=Line9", "TriggerSource is one of Line0, Software"),
    ],
)
def test_wrong_features_are_refused_with_what_is_right(query: str, message: str) -> None:
    assert message in open_fails(f"{uri()}{query}")
    with open_source(uri()) as source:
        assert read(source)  # a refused trigger does not leave it waiting for one


@pytest.mark.usefixtures("camera")
def test_a_camera_that_somebody_has() -> None:
    with open_source(uri()) as source:
        read(source)
        assert "in use by another program" in open_fails(uri(), SourceError)
        assert read(source)


@pytest.mark.slow
@pytest.mark.usefixtures("camera")
def test_a_killed_program_gives_its_camera_back() -> None:
    """After the heartbeat: until then it may be asked again."""
    code = (
        "import os, sys; from rigs import gige_rig; gige_rig.need()\n"
        "from dapo_edge.runtime.sources import open_source\n"
        f"source = open_source({uri()!r}).open(); source.read(2); print('reading', flush=True); os.kill(os.getpid(), 9)"
    )
    paths = [path for path in sys.path if path]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"], capture_output=True, timeout=30
    )
    assert run.stdout == b"reading\n", run.stderr
    end_s = time.monotonic() + 15
    attempts = 0
    while True:
        try:
            with open_source(uri()) as source:
                assert read(source).index == 0
            break
        except SourceError as error:
            assert not isinstance(error, SourceRefused), error  # a pipeline opens it again after any other
            assert time.monotonic() < end_s
            attempts += 1
            time.sleep(0.2)
    assert attempts > 0


@pytest.mark.usefixtures("camera")
def test_opening_and_closing_leaks_nothing() -> None:
    def cycle() -> None:
        with open_source(uri(AcquisitionFrameRate=200)) as source:
            read(source)

    assert leaks.leaked(cycle, times=4) == (0, 0)


def test_lost_packets_are_failed_frames() -> None:
    with gige_rig.FakeCamera(lost_per_mille=1), open_source(uri(AcquisitionFrameRate=100)) as source:
        counts: Counter[str] = Counter()
        for index in range(60):
            try:
                assert read(source).index == index
                counts["good"] += 1
            except FrameError as error:
                assert "missing packets" in str(error)
                assert error.index == index
                counts["failed"] += 1
    assert counts["failed"] >= 1  # a frame has 180 packets
    assert counts["good"] >= 1
    assert sum(counts.values()) == 60


@pytest.mark.slow
@pytest.mark.parametrize("trigger", ["off", "Line0"])
def test_a_camera_without_power_is_lost_and_found_again(camera: gige_rig.FakeCamera, trigger: str) -> None:
    source = open_source(uri(trigger=trigger))
    with source:
        if trigger == "off":
            read(source)
        camera.kill()
        start_s = time.monotonic()
        with pytest.raises(SourceError, match="does not answer any more"):
            while time.monotonic() - start_s < 20:
                try:
                    source.read(0.5)
                except (FrameError, FrameTimeout):
                    continue
        assert time.monotonic() - start_s < 15  # 6 s: the heartbeat
    assert type(_refusal(source)) is SourceError
    camera.start()
    with source:
        if trigger == "off":
            assert read(source).index == 0
    assert aravis.AravisSource.reconnects


def _refusal(source: Source) -> SourceError:
    with pytest.raises(SourceError) as caught:
        source.open()
    return caught.value


def test_without_the_library_its_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gi", None)
    with pytest.raises(DependencyMissing, match=r"apt install python3-gi gir1\.2-aravis-0\.8"), open_source(uri()):
        pass
