"""An RTSP server in a process of its own, which tests kill, halt and start again: gst-rtsp-server, on 127.0.0.1.

The process runs this same file with the system's Python, which has the bindings.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

SYSTEM_PYTHON = "/usr/bin/python3"
INSTALL = (
    "run: apt-get install -y --no-install-recommends python3-gi gir1.2-gst-rtsp-server-1.0 openssl glib-networking "
    "gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly"
)
ENCODERS = {
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast bitrate=2000 threads=1 key-int-max={keys} "
    "! rtph264pay config-interval=-1 name=pay0 pt=96",
    "mjpeg": "jpegenc ! rtpjpegpay name=pay0 pt=26",
}
CAPS = "video/x-raw,width={width},height={height},framerate={fps}/1,format=I420"


@dataclass(frozen=True)
class Camera:
    """What the server shows at /cam."""

    port: int = 0
    codec: str = "h264"
    width: int = 640
    height: int = 480
    fps: int = 20
    keys: int = 20  # frames from one key frame to the next
    user: str = ""
    password: str = ""
    digest: bool = True  # else: Basic
    certificate: str = ""  # a PEM file with the key: speaks TLS only
    smaller_after_s: float = 0.0  # when it halves its picture; 0: never
    broken: bool = False  # its pipeline can't start, which clients see as 503


def need() -> None:
    """Skip the test when a part is missing."""
    if not _works():
        import pytest  # not there for the system's Python

        pytest.skip(f"gst-rtsp-server is not installed; {INSTALL}")


@lru_cache
def _works() -> bool:
    code = (
        "import gi; gi.require_version('GstRtspServer', '1.0'); gi.require_version('Gst', '1.0')\n"
        "from gi.repository import Gst, GstRtspServer; Gst.init(None)\n"
        "names = ('x264enc', 'rtph264pay', 'jpegenc', 'rtpjpegpay', 'videotestsrc')\n"
        "assert all(Gst.ElementFactory.find(name) for name in names)"
    )
    try:
        return subprocess.run([SYSTEM_PYTHON, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RtspServer:
    """A camera, from `start` to `kill`; the port stays the same when it is started again."""

    def __init__(self, **camera: object) -> None:
        self.camera = Camera(**{"port": free_port(), **camera})  # type: ignore[arg-type]
        self._process: subprocess.Popen[str] | None = None

    @property
    def uri(self) -> str:
        """Without credentials."""
        return f"rtsp{'s' if self.camera.certificate else ''}://127.0.0.1:{self.camera.port}/cam"

    def start(self) -> RtspServer:
        command = [SYSTEM_PYTHON, str(Path(__file__)), json.dumps(asdict(self.camera))]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert self._process.stdout is not None
        ready = self._process.stdout.readline().strip()
        assert ready == "ready", f"the RTSP server did not start ({ready!r})"
        return self

    def kill(self) -> None:
        """As a power cut would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def halt(self) -> None:
        """Keep the connection, and say nothing any more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> RtspServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _serve(camera: Camera) -> None:
    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer

    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(str(camera.port))
    factory = GstRtspServer.RTSPMediaFactory()
    caps = CAPS.format(width=camera.width, height=camera.height, fps=camera.fps)
    encoder = ENCODERS[camera.codec].format(keys=camera.keys)
    source = "filesrc location=/dev/null/nothing" if camera.broken else "videotestsrc is-live=1 pattern=ball"
    factory.set_launch(f"( {source} ! capsfilter name=size caps={caps} ! {encoder} )")
    factory.set_shared(True)
    if camera.smaller_after_s:
        smaller = Gst.Caps.from_string(CAPS.format(width=camera.width // 2, height=camera.height // 2, fps=camera.fps))

        def shrink_later(_factory: object, media: GstRtspServer.RTSPMedia) -> None:
            size = media.get_element().get_by_name("size")
            GLib.timeout_add(round(camera.smaller_after_s * 1e3), lambda: size.set_property("caps", smaller))

        factory.connect("media-configure", shrink_later)
    if camera.user or camera.certificate:
        _protect(GstRtspServer, server, factory, camera)
    server.get_mount_points().add_factory("/cam", factory)
    server.attach(None)
    print("ready", flush=True)
    GLib.MainLoop().run()


def _protect(rtsp, server, factory, camera: Camera) -> None:  # type: ignore[no-untyped-def]
    auth, token = rtsp.RTSPAuth(), rtsp.RTSPToken()
    token.set_string("media.factory.role", "viewer")
    if camera.certificate:
        from gi.repository import Gio

        auth.set_tls_certificate(Gio.TlsCertificate.new_from_file(camera.certificate))
    if not camera.user:
        auth.set_default_token(token)
    elif camera.digest:
        from gi.repository import GstRtsp

        auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
        auth.add_digest(camera.user, camera.password, token)
    else:
        auth.add_basic(rtsp.RTSPAuth.make_basic(camera.user, camera.password), token)
    server.set_auth(auth)
    permissions = rtsp.RTSPPermissions()
    for name in ("media.factory.access", "media.factory.construct"):
        permissions.add_permission_for_role("viewer", name, True)
    factory.set_permissions(permissions)


if __name__ == "__main__":
    _serve(Camera(**json.loads(sys.argv[1])))
