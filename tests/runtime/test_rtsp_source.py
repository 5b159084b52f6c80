"""RTSP cameras against a real server that is killed, halted and started again."""

from __future__ import annotations

import http.server
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from rigs import leaks, rtsp_server
from rigs.rtsp_server import RtspServer

from dapo_edge.errors import SourceError, SourceRefused
from dapo_edge.runtime.sources import open_source
from dapo_edge.runtime.sources.opencv import FFMPEG_OPTIONS, ffmpeg_options
from dapo_edge.runtime.sources.rtsp import RtspSource, take_own
from dapo_edge.runtime.sources.rtsp_probe import _digest


@pytest.fixture
def camera() -> RtspServer:
    rtsp_server.need()
    return RtspServer()


def failure(uri: str) -> SourceError:
    with pytest.raises(SourceError) as caught, open_source(uri) as source:
        source.read()
    assert "\n" not in str(caught.value)
    return caught.value


# --- what works ---


@pytest.mark.parametrize("query", ["", "?channel=1&dapo.latency=default", "?dapo.transport=udp&subtype=0"])
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


def test_steady_state_makes_no_new_buffers(camera: RtspServer) -> None:
    with camera, open_source(camera.uri) as source:
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
    with RtspServer(codec=codec, smaller_after_s=1.5) as server, open_source(server.uri) as source:
        until_s, seen = time.monotonic() + 3.0, []
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
        for _ in range(20):
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
        for _ in range(25):
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
    limits = "?dapo.read_timeout_s=1&dapo.open_timeout_s=1"
    with camera:
        with open_source(camera.uri + limits) as source:
            source.read()
            camera.halt()
            began_s = time.monotonic()
            with pytest.raises(SourceError, match="sent nothing for 1 s"):
                while True:
                    source.read()
            assert 0.9 < time.monotonic() - began_s < 2.0
        began_s = time.monotonic()
        assert "does not answer in time" in str(failure(camera.uri + limits))
        assert time.monotonic() - began_s < 2.0
        camera.go_on()
        with open_source(camera.uri + limits) as source:
            assert source.read() is not None


def test_a_camera_that_can_not_deliver() -> None:
    rtsp_server.need()
    with RtspServer(broken=True) as server:
        error = failure(server.uri)
    assert not isinstance(error, SourceRefused)
    assert "can't deliver the stream now" in str(error)


def test_addresses_that_lead_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    port = rtsp_server.free_port()
    assert "Connection refused" in str(failure(f"rtsp://127.0.0.1:{port}/x"))
    assert "Connection refused" in str(failure(f"RTSPS://127.0.0.1:{port}/x"))
    assert "can't be reached" in str(failure("rtsp://no-such-camera.invalid/x"))
    for uri in ("rtsp://me:hu/sh@127.0.0.1/x", "rtsp:///x", "rtsp://127.0.0.1:port/x"):
        assert isinstance(failure(uri), SourceRefused)
    for query, word in (
        ("dapo.latncy=low", "Did you mean 'dapo.latency'"),
        ("dapo.read_timeout_s=0", "0.1 to 60 seconds"),
        ("dapo.transport=tcp&dapo.transport=udp", "twice"),
        ("dapo.transport=http", "tcp or udp"),
    ):
        error = failure(f"rtsp://me:hush@127.0.0.1/x?{query}")
        assert isinstance(error, SourceRefused)
        assert word in str(error)
        assert "hush" not in str(error)
    assert "WARN" not in capfd.readouterr().err


class _Web(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_a_server_of_something_else() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Web) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        port = server.server_address[1]
        assert "no RTSP server" in str(failure(f"rtsp://127.0.0.1:{port}/x"))
        assert "TLS" in str(failure(f"rtsps://127.0.0.1:{port}/x"))
        server.shutdown()
        thread.join()


# --- for years ---


def test_fifty_openings_leave_nothing_behind() -> None:
    rtsp_server.need()
    with RtspServer(codec="mjpeg") as server:

        def cycle() -> None:
            with open_source(server.uri) as source:
                assert source.read() is not None

        for _ in range(5):
            cycle()
        before_kb = resident_kb()
        assert leaks.leaked(cycle, times=50) == (0, 0)
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


# --- parts ---


def test_our_keys_are_taken_out_and_the_others_stay() -> None:
    assert take_own("rtsp://h/x") == ("rtsp://h/x", "")
    assert take_own("rtsp://h/x?channel=1&subtype=0") == ("rtsp://h/x?channel=1&subtype=0", "")
    assert take_own("rtsp://h/x?dapo.latency=low") == ("rtsp://h/x", "dapo.latency=low")
    assert take_own("rtsp://h/x?a=1&dapo.latency=low&b=2") == ("rtsp://h/x?a=1&b=2", "dapo.latency=low")
    assert take_own("rtsp://u:p?w@h/x") == ("rtsp://u:p?w@h/x", "")


def test_digest_as_in_the_standard() -> None:
    """The example of RFC 2617, section 3.5."""
    challenge = {"realm": "testrealm@host.com", "nonce": "dcd98b7102dd2f0e8b11d0f600bfb0c093", "qop": "auth,auth-int"}
    who = ("/dir/index.html", "Mufasa", "Circle Of Life", "GET", "0a4f113b")
    header = _digest({**challenge, "opaque": "5ccc069c403ebaf9f0171e9517f40e41"}, *who)
    assert header is not None
    assert 'response="6629fae49393a05397450978507c4ef1"' in header
    assert 'opaque="5ccc069c403ebaf9f0171e9517f40e41"' in header
    assert "nc=00000001, qop=auth" in header
    assert _digest({**challenge, "algorithm": "SHA-256"}, *who) is None
    assert _digest({"realm": "camera"}, *who) is None


def test_ffmpeg_options_go_side_by_side_or_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FFMPEG_OPTIONS, "the user's")
    entered, order = threading.Event(), []

    def other() -> None:
        entered.set()
        with ffmpeg_options("udp"):
            order.append(os.environ[FFMPEG_OPTIONS])

    def same() -> None:
        with ffmpeg_options("tcp"):
            order.append(os.environ[FFMPEG_OPTIONS])

    with ffmpeg_options("tcp"):
        beside = threading.Thread(target=same)
        beside.start()
        beside.join(5)
        assert order == ["tcp"]  # did not wait
        waiting = threading.Thread(target=other)
        waiting.start()
        entered.wait(5)
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(5)
    assert order == ["tcp", "udp"]
    with ffmpeg_options(None):
        assert os.environ[FFMPEG_OPTIONS] == "the user's"
    assert os.environ[FFMPEG_OPTIONS] == "the user's"
