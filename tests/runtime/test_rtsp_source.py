"""RTSP cameras against a real server that is killed, halted and started again."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from rigs import leaks, rtsp_server
from rigs.camera_checks import failure
from rigs.rtsp_server import RtspServer

from dapo_edge.errors import SourceError, SourceRefused
from dapo_edge.runtime.sources import open_source
from dapo_edge.runtime.sources.opencv import FFMPEG_OPTIONS, ffmpeg_options
from dapo_edge.runtime.sources.rtsp import RtspSource


@pytest.fixture
def camera() -> RtspServer:
    rtsp_server.need()
    return RtspServer()


# --- what works ---


@pytest.mark.parametrize("query", ["?channel=1", "?dapo.transport=udp&subtype=0"])
def test_frames_come(camera: RtspServer, query: str) -> None:
    with camera, open_source(camera.uri + query) as source:
        assert (source.properties.width, source.properties.height, source.properties.fps) == (640, 480, 20.0)
        assert source.properties.live
        assert not source.properties.triggered
        before_ns = time.time_ns()
        frames = [source.read() for _ in range(10)]
    assert [frame.index for frame in frames if frame] == list(range(10))
    assert all(frame and frame.image.shape == (480, 640, 3) and frame.image.max() > 200 for frame in frames)
    assert frames[9] is not None
    assert before_ns <= frames[9].timestamp_ns <= time.time_ns()
    assert frames[9].source == source.uri


def test_steady_state_makes_no_new_buffers() -> None:
    rtsp_server.need()
    with RtspServer(fps=60) as camera, open_source(camera.uri) as source:
        for _ in range(30):
            frame = source.read()
        assert frame is not None
        assert isinstance(source, RtspSource)
        assert source._pool.made <= 2
        assert frame.image.base is not None  # the pool's memory, which OpenCV wrote into


@pytest.mark.parametrize("digest", [True, False])
def test_credentials_are_used_and_in_no_text(digest: bool, capfd: pytest.CaptureFixture[str]) -> None:
    rtsp_server.need()
    with RtspServer(user="inspector", password="hu@sh", digest=digest) as server:
        uri = server.uri.replace("://", "://inspector:hu%40sh@")
        with open_source(uri) as source:
            frame = source.read()
            assert frame is not None
            shown = f"{source!r} {source.properties} {frame.source}"
        wrong = failure(uri.replace("hu%40sh", "hu%40shed"))
        nowhere = failure(uri + "x")
        none = failure(server.uri)
    assert isinstance(wrong, SourceRefused)
    assert "refuses this user name or password" in str(wrong)
    assert isinstance(none, SourceRefused)
    assert "wants a user name" in str(none)
    assert not isinstance(nowhere, SourceRefused)
    assert "no stream at this path" in str(nowhere)
    everything = f"{shown} {wrong} {nowhere} {none} {capfd.readouterr()}"
    assert not {word for word in ("hu%40", "hu@", "inspector") if word in everything}


def test_tls(tmp_path: Path) -> None:
    rtsp_server.need()
    pem = tmp_path / "camera.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=camera -days 2 -keyout {pem} -out {pem}.crt"
    subprocess.run(command.split(), check=True, capture_output=True)
    pem.write_text(pem.read_text() + Path(f"{pem}.crt").read_text())
    with RtspServer(certificate=str(pem)) as server:
        with open_source(server.uri) as source:
            frame = source.read()
            assert frame is not None
            assert frame.image.shape == (480, 640, 3)
        assert "no stream at this path" in str(failure(server.uri + "x"))
        assert isinstance(failure(server.uri.replace("rtsps", "rtsp")), SourceError)


@pytest.mark.parametrize(("codec", "sizes"), [("mjpeg", {(480, 640), (240, 320)}), ("h264", {(480, 640)})])
def test_a_camera_that_changes_its_size(codec: str, sizes: set[tuple[int, int]]) -> None:
    rtsp_server.need()
    with RtspServer(codec=codec, smaller_after_s=0.5) as server, open_source(server.uri) as source:
        until_s, seen = time.monotonic() + 1.2, []
        while time.monotonic() < until_s:
            frame = source.read()
            assert frame is not None
            seen.append(frame)
    assert {frame.image.shape[:2] for frame in seen} == sizes
    assert [frame.index for frame in seen] == list(range(len(seen)))
    assert all(frame.image.max() > 200 for frame in seen)


# --- how fresh frames are ---


def after_the_end(camera: RtspServer, query: str) -> int:
    """Frames that still come out when the camera is dead."""
    stale = 0
    with camera, open_source(camera.uri + query) as source:
        for _ in range(10):
            source.read()
        camera.kill()
        try:
            while True:
                source.read()
                stale += 1
        except SourceError as error:
            assert "ended the connection" in str(error)
        assert source.read() is None
    return stale


def test_low_latency_leaves_no_old_frames(camera: RtspServer) -> None:
    assert after_the_end(camera, "") <= 2
    assert after_the_end(camera, "?dapo.latency=default") > 2


def test_opening_takes_the_key_frame_it_finds() -> None:
    """A second viewer of a camera with a key frame every 5 s waits for none of them."""
    rtsp_server.need()
    with RtspServer(keys=100) as server, open_source(server.uri) as first:
        for _ in range(5):
            first.read()
        began_s = time.monotonic()
        with open_source(server.uri) as second:
            for _ in range(5):
                second.read()
        assert time.monotonic() - began_s < 2.0


# --- what fails, and how soon ---


def test_a_killed_camera_is_noticed_at_once_and_comes_back(camera: RtspServer) -> None:
    with camera:
        with open_source(camera.uri) as source:
            source.read()
            camera.kill()
            began_s = time.monotonic()
            with pytest.raises(SourceError, match="ended the connection"):
                while True:
                    source.read()
            assert time.monotonic() - began_s < 1.0
        assert "Connection refused" in str(failure(camera.uri))
        camera.start()
        began_s = time.monotonic()
        with open_source(camera.uri) as source:
            assert source.read() is not None
        assert time.monotonic() - began_s < 3.0


def test_a_camera_that_hangs(camera: RtspServer) -> None:
    limits = "?dapo.read_timeout_s=0.5&dapo.open_timeout_s=0.5"
    with camera:
        with open_source(camera.uri + limits) as source:
            source.read()
            camera.halt()
            began_s = time.monotonic()
            with pytest.raises(SourceError, match=r"sent nothing for 0\.5 s"):
                while True:
                    source.read()
            assert 0.4 < time.monotonic() - began_s < 1.5
        began_s = time.monotonic()
        assert "does not answer in time" in str(failure(camera.uri + limits))
        assert time.monotonic() - began_s < 2.0
        camera.go_on()
        with open_source(camera.uri + limits) as source:
            assert source.read() is not None


@contextmanager
def hung_cameras(count: int, uri: str) -> Iterator[None]:
    """So many threads that open a camera again and again."""
    done = threading.Event()

    def keep_opening() -> None:
        while not done.is_set():
            with contextlib.suppress(SourceError):
                open_source(uri).open().close()

    threads = [threading.Thread(target=keep_opening) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_cameras_that_hang_hold_nobody_up(camera: RtspServer, tmp_path: Path) -> None:
    """OpenCV opens one stream at a time: six that hang would take 3 s each, round and round."""
    video = tmp_path / "parts.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    with socket.socket() as silent, camera:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        with hung_cameras(6, f"rtsp://127.0.0.1:{silent.getsockname()[1]}/x?dapo.open_timeout_s=2"):
            time.sleep(0.3)
            assert seconds_to_open(camera.uri) < 1.0
            assert seconds_to_open(video.as_uri()) < 0.5
            camera.kill()
            time.sleep(0.5)
            camera.start()
            assert seconds_to_open(camera.uri) < 3.0


def seconds_to_open(uri: str) -> float:
    began_s = time.monotonic()
    with open_source(uri) as source:
        assert source.read() is not None
    return time.monotonic() - began_s


def test_a_camera_that_can_not_deliver() -> None:
    rtsp_server.need()
    with RtspServer(broken=True) as server:
        error = failure(server.uri)
    assert not isinstance(error, SourceRefused)
    assert "can't deliver the stream now" in str(error)


# --- for years ---


@pytest.mark.parametrize("times", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_openings_leave_nothing_behind(times: int) -> None:
    rtsp_server.need()
    with RtspServer(codec="mjpeg") as server:

        def cycle() -> None:
            with open_source(server.uri) as source:
                assert source.read() is not None

        for _ in range(5):
            cycle()
        before_kb = resident_kb()
        assert leaks.leaked(cycle, times) == (0, 0)
        assert resident_kb() - before_kb < 20_000


def resident_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def test_closing_waits_for_the_reader(camera: RtspServer) -> None:
    with camera:
        source = open_source(camera.uri).open()
        source.read()
        seen: list[object] = []

        def read_on() -> None:
            try:
                while (frame := source.read()) is not None:
                    seen.append(frame.index)
            except SourceError as error:
                seen.append(str(error))

        reader = threading.Thread(target=read_on)
        reader.start()
        time.sleep(0.3)
        source.close()
        reader.join(5)
        assert not reader.is_alive()
        assert len(seen) > 2


# --- one at a time ---


def test_openings_take_turns_with_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FFMPEG_OPTIONS, "the user's")
    order: list[str] = []

    def other() -> None:
        with ffmpeg_options("udp"):
            order.append(os.environ[FFMPEG_OPTIONS])

    with ffmpeg_options("tcp"):
        waiting = threading.Thread(target=other)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        order.append(os.environ[FFMPEG_OPTIONS])
    waiting.join(5)
    assert order == ["tcp", "udp"]
    with ffmpeg_options(None):
        assert os.environ[FFMPEG_OPTIONS] == "the user's"
    assert os.environ[FFMPEG_OPTIONS] == "the user's"


def test_an_opening_that_waits_and_is_closed_does_not_open(camera: RtspServer) -> None:
    source, errors = open_source(camera.uri), []

    def open_it() -> None:
        try:
            source.open()
        except SourceError as error:
            errors.append(str(error))

    with camera:
        opening = threading.Thread(target=open_it)
        with ffmpeg_options("somebody else's"):
            opening.start()
            opening.join(0.5)
            assert opening.is_alive()
            source.close()
            opening.join(2)
            assert not opening.is_alive()
    assert "was closed before it was open" in errors[0]
    assert isinstance(source, RtspSource)
    assert source._capture is None
