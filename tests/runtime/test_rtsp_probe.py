"""What is asked of an RTSP camera before FFmpeg opens it, and what is said when it won't be opened."""

from __future__ import annotations

import http.server
import socketserver
import threading
from typing import ClassVar

import pytest
from rigs import rtsp_server
from rigs.camera_checks import failure

from dapo_edge.errors import SourceRefused
from dapo_edge.runtime.sources.rtsp import take_own
from dapo_edge.runtime.sources.rtsp_probe import _digest


class _Scripted(socketserver.StreamRequestHandler):
    """A camera that gives one answer to whatever it is asked, and notes who asked."""

    answer = ""
    asked: ClassVar[list[str]] = []

    def handle(self) -> None:
        while line := self.rfile.readline():
            if line.lower().startswith(b"user-agent:"):
                self.asked.append(line.decode().split()[1])
            if line == b"\r\n":
                self.wfile.write(f"RTSP/1.0 {self.answer}\r\n\r\n".encode())


@pytest.mark.parametrize(
    ("answer", "words", "is_refused", "is_tried"),
    [
        ("401 No\r\nWWW-Authenticate: Basic realm=x", "refuses this user name or password", True, False),
        ("401 No\r\nWWW-Authenticate: Digest realm=x, nonce=y, algorithm=SHA-256", "refuses this user", True, True),
        ("403 No", "forbids the access", True, False),
        ("404 No", "no stream at this path", False, False),
        ("454 Odd", "answers 454 Odd", False, False),
        ("302 Moved", "sends no video", False, True),
    ],
)
def test_ffmpeg_tries_only_what_may_work(answer: str, words: str, is_refused: bool, is_tried: bool) -> None:
    handler = type("Handler", (_Scripted,), {"answer": answer, "asked": []})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            error = failure(f"rtsp://me:hush@127.0.0.1:{server.server_address[1]}/x?dapo.open_timeout_s=1")
        finally:
            server.shutdown()
            thread.join()
    assert words in str(error)
    assert isinstance(error, SourceRefused) == is_refused
    assert any(name.startswith("Lavf") for name in handler.asked) == is_tried
    assert "hush" not in str(error)


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
