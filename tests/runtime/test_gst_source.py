"""GStreamer's pipelines, with `videotestsrc` as the camera; the text of a Jetson's pipeline needs no Jetson."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from rigs import basler_rig, gst_rig, leaks
from rigs.camera_checks import failure, woken_by_close

from dapo_edge.errors import DependencyMissing, FrameTimeout, SourceError, SourceRefused
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.runtime.sources import open_source, redact
from dapo_edge.runtime.sources.gst import GstSource, csi_pipeline
from dapo_edge.structures import Frame

RED = "videotestsrc pattern=red num-buffers=3"


@pytest.fixture
def gst() -> None:
    gst_rig.need()


def frames(uri: str) -> list[Frame]:
    with open_source(uri) as source:
        return list(source)


@pytest.mark.usefixtures("gst")
@pytest.mark.parametrize(
    ("caps", "pixel_format", "red"),
    [
        ("video/x-raw,format=BGR", None, [0, 0, 255]),
        ("video/x-raw,format=RGB", "RGB8", [0, 0, 255]),
        ("video/x-raw,format=GRAY8", "GRAY8", [81, 81, 81]),
        ("video/x-raw,format=NV12", "NV12", [0, 0, 255]),
        ("video/x-bayer,format=rggb", "BayerRG8", [0, 0, 255]),
    ],
)
def test_formats_and_rows_with_padding(caps: str, pixel_format: str | None, red: list[int]) -> None:
    taken = frames(f"gst://{RED} ! {caps},width=61,height=45,framerate=20/1")  # GStreamer's rows end at 4 bytes
    assert [frame.index for frame in taken] == [0, 1, 2]
    for frame in taken:
        assert (frame.pixels.format if isinstance(frame.pixels, PixelView) else None) == pixel_format
        assert frame.image.shape == (45, 61, 3)
        np.testing.assert_allclose(frame.image.reshape(-1, 3), np.tile(red, (45 * 61, 1)), atol=2)


@pytest.mark.usefixtures("gst")
def test_other_formats_need_a_converter() -> None:
    for text in ("video/x-raw,format=I420", "video/x-raw,format=NV12,colorimetry=bt709", "video/x-bayer,format=bggr"):
        error = failure(f"gst://videotestsrc ! {text},width=64,height=48")
        assert isinstance(error, SourceRefused)
        assert "videoconvert" in str(error)
    for text in ("video/x-raw,format=I420", "video/x-raw,format=NV12,colorimetry=bt709", "video/x-bayer,format=bggr"):
        error = failure(f"gst://videotestsrc ! {text},width=64,height=48 ! appsink")
        assert isinstance(error, SourceRefused)
        assert any(word in str(error) for word in ("I420", "not BT.601", "bggr"))
    hd = "video/x-raw,format=NV12,colorimetry=bt709,width=1280,height=720"
    (frame,) = frames(f"gst://videotestsrc pattern=red num-buffers=1 ! {hd} ! videoconvert")
    np.testing.assert_allclose(frame.image[300, 300], [0, 0, 255], atol=3)


@pytest.mark.usefixtures("gst")
def test_properties_and_the_end_of_a_file() -> None:
    with open_source("gst://videotestsrc num-buffers=4 ! video/x-raw,width=64,height=48,framerate=15/1") as source:
        found = source.properties
        assert (found.width, found.height, found.fps, found.live) == (64, 48, 15.0, False)
        assert len(list(source)) == 4
        assert source.read() is None


@pytest.mark.usefixtures("gst")
def test_percent_encoded_and_with_an_appsink_of_its_own() -> None:
    assert len(frames("gst://videotestsrc%20num-buffers%3D4%20!%20videoconvert")) == 4
    assert len(frames("gst://videotestsrc num-buffers=4 ! video/x-raw,format=BGR ! appsink name=mine sync=false")) == 4


@pytest.mark.usefixtures("gst")
def test_a_live_camera_and_its_loss() -> None:
    with open_source("gst://videotestsrc is-live=1 num-buffers=40 ! video/x-raw,framerate=100/1") as source:
        assert source.properties.live
        assert source.reconnects
        before_ns = time.time_ns()
        taken = [source.read(2.0) for _ in range(40)]
        assert [frame.index for frame in taken if frame] == list(range(40))
        assert sum(frame.lost for frame in taken if frame) == 0
        assert taken[-1] is not None
        assert before_ns < taken[-1].timestamp_ns <= time.time_ns()
        with pytest.raises(SourceError, match=r"the stream of .* ended"):
            source.read(2.0)
        assert source.read() is None


@pytest.mark.usefixtures("gst")
def test_frames_that_an_element_dropped_are_counted() -> None:
    with open_source("gst://videotestsrc num-buffers=400 ! identity drop-probability=0.5") as source:
        taken = list(source)
    assert len(taken) < 300
    numbers = np.cumsum([1 + frame.lost for frame in taken])
    assert 350 < numbers[-1] <= 400  # what is missing before the first and after the last one nobody knows


@pytest.mark.usefixtures("gst")
def test_no_frame_in_time() -> None:
    slow = "gst://videotestsrc is-live=1 ! video/x-raw,framerate=1/1"
    with open_source(slow) as source:
        source.read(5.0)
        began_s = time.monotonic()
        with pytest.raises(FrameTimeout):
            source.read(0.3)
        assert 0.29 < time.monotonic() - began_s < 0.6
        assert source.read() is not None


@pytest.mark.usefixtures("gst")
def test_closing_wakes_a_reader_that_waits() -> None:
    source = open_source("gst://videotestsrc is-live=1 ! video/x-raw,framerate=1/5").open()
    source.read()
    assert woken_by_close(source) < 1.0


@pytest.mark.usefixtures("gst")
def test_a_picture_that_changes_its_size() -> None:
    text = (
        "videotestsrc num-buffers=5 ! video/x-raw,format=BGR,width=64,height=48 ! c. "
        "videotestsrc num-buffers=5 ! video/x-raw,format=BGR,width=32,height=32 ! c. concat name=c"
    )
    assert [frame.image.shape for frame in frames(f"gst://{text}")] == [(48, 64, 3)] * 5 + [(32, 32, 3)] * 5


@pytest.mark.usefixtures("gst")
@pytest.mark.parametrize(
    ("text", "refused", "words"),
    [
        ("nosuch ! videoconvert", True, 'no element "nosuch"'),
        ("videotestsrc patern=ball", True, 'no property "patern"'),
        ("videotestsrc ! ! x", True, "is no pipeline"),
        ("", True, "holds no pipeline"),
        ("videotestsrc ! fakesink", True, "could not link"),
        ("videotestsrc ! appsink videotestsrc ! appsink", True, "has 2 appsinks"),
        ("audiotestsrc", True, "videoconvert"),
        ("videotestsrc ! video/x-raw,width=8,height=8", True, "8x8"),
        ("filesrc location=/nothing/there ! decodebin", False, 'No such file "/nothing/there"'),
    ],
)
def test_pipelines_that_can_not_run(text: str, refused: bool, words: str) -> None:
    error = failure(f"gst://{text}")
    assert isinstance(error, SourceRefused) == refused
    assert words in str(error)


@pytest.mark.usefixtures("gst")
def test_passwords_are_in_no_message() -> None:
    for text in (
        "filesrc location=rtsp://me:hush@127.0.0.1/x password=hush ! fakesink",
        "filesrc location=/tmp/x token=hush nope=1",
        'videotestsrc pattern="rtsp://me:hush me@h" ! fakesink',
    ):
        assert "hush" not in str(failure(f"gst://{text}"))
    with open_source("gst://videotestsrc name=hush-x num-buffers=1 ! identity name=token=1") as source:
        assert source.uri.endswith("token=***")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("gst://a location=rtsp://me:hush@h/x?token=t ! b", "gst://a location=rtsp://***@h/x?token=*** ! b"),
        (
            'gst://a location="rtsp://me:hu sh@h/x" ! b key-int-max=3',
            'gst://a location="rtsp://***@h/x" ! b key-int-max=3',
        ),
        ("gst://a user-id=me user-pw = 'a b'!b", "gst://a user-id=*** user-pw = ***!b"),
        ("gst://rtspsrc%20location%3Drtsp%3A%2F%2Fme%3Ahush%40h%2Fx", "gst://rtspsrc location=rtsp://***@h/x"),
        ("gst://videotestsrc ! tee name=t", "gst://videotestsrc ! tee name=t"),
    ],
)
def test_redacted_pipelines(uri: str, shown: str) -> None:
    assert redact(uri) == shown
    assert redact(shown) == shown


@pytest.mark.usefixtures("gst")
def test_openings_leave_nothing_behind() -> None:
    def cycle() -> None:
        with open_source("gst://videotestsrc is-live=1 ! video/x-raw,format=BGR,framerate=100/1") as source:
            assert source.read(2.0) is not None

    handles, threads = leaks.leaked(cycle, times=50)
    assert handles <= 0
    assert threads <= 2  # GStreamer keeps a few idle threads in a pool of its own


@pytest.mark.usefixtures("gst")
def test_steady_state_makes_no_new_buffers() -> None:
    with open_source("gst://videotestsrc num-buffers=100 ! video/x-raw,format=NV12") as source:
        assert isinstance(source, GstSource)
        assert sum(1 for _ in source) == 100
        assert source._pool.made <= 2


def test_without_gstreamer_the_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gi", None)
    with pytest.raises(DependencyMissing, match=r"apt install python3-gi .*--system-site-packages"):
        open_source("gst://videotestsrc").open()


# --- CSI ---


def test_the_pipeline_of_a_jetson() -> None:
    """The shape that Jetson code uses everywhere, see NVIDIA's guide to accelerated GStreamer."""
    assert csi_pipeline(0, {}) == (
        "nvarguscamerasrc sensor-id=0 ! video/x-raw(memory:NVMM),width=1920,height=1080,framerate=30/1,format=NV12 ! "
        "nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR"
    )
    asked = {"width": 1280, "height": 720, "fps": 60, "sensor_mode": 4, "exposure_us": 500.0, "gain": 2.5, "flip": 2}
    assert csi_pipeline(1, {**asked, "format": "NV12"}) == (
        'nvarguscamerasrc sensor-id=1 sensor-mode=4 exposuretimerange="500000 500000" gainrange="2.5 2.5" ! '
        "video/x-raw(memory:NVMM),width=1280,height=720,framerate=60/1,format=NV12 ! "
        "nvvidconv flip-method=2 ! video/x-raw,format=NV12"
    )


@pytest.mark.usefixtures("gst")
def test_csi_addresses() -> None:
    for uri, words in (
        ("csi://0", 'no element "nvarguscamerasrc"'),
        ("csi://front", "names no sensor"),
        ("csi://0?widht=3", "Did you mean 'width'"),
        ("csi://0?format=RGB", "BGR or NV12"),
        ("csi://0?exposure_us=0", "1 to 1e+07"),
    ):
        error = failure(uri)
        assert isinstance(error, SourceRefused)
        assert words in str(error)


@pytest.mark.usefixtures("gst")
def test_a_camera_of_another_sdk_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its C++ exceptions are refusals, as ever: in a process of its own, because the order of loading matters."""
    basler_rig.emulate(monkeypatch)
    code = (
        f"import sys; sys.path[:] = {[*sys.path, str(gst_rig.SYSTEM_PACKAGES)]!r}\n"
        "from dapo_edge.errors import SourceRefused\n"
        "from dapo_edge.runtime.sources import open_source\n"
        "with open_source('gst://videotestsrc num-buffers=2') as source: source.read()\n"
        f"try: open_source({basler_rig.uri(Width=99999)!r}).open()\n"
        "except SourceRefused as error: print('refused')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (0, b"refused\n"), run.stderr[-2000:]
