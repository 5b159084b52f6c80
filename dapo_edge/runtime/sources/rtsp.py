"""Network cameras by RTSP, decoded by OpenCV's FFmpeg.

What is not obvious, each measured with OpenCV 5.0 and gst-rtsp-server:
- FFmpeg's `nobuffer`, which is often advised, throws away the key frame that it found while opening; the next one may
  come later than any time limit. Little probing and a decoder with one thread leave one frame of delay without it.
- OpenCV opens one stream at a time, all others of the process wait: so a camera is asked first whether it answers, and
  only one that falls silent between that and its first frame can hold up others, for its `dapo.open_timeout_s`.
- A camera that falls silent costs one `dapo.read_timeout_s`, because a read that took longer ends this opening.
- OpenCV scales the frames of H.264 and H.265 to the size they had at first; those of MJPEG come in their new size.
- What UDP loses, the decoder paints over, and nobody can tell: keep TCP where pictures are judged.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dapo_edge.errors import SourceError, SourceRefused
from dapo_edge.extras import require
from dapo_edge.runtime.buffers import BufferPool
from dapo_edge.runtime.sources.base import Properties, Source
from dapo_edge.runtime.sources.opencv import ffmpeg_options, quiet
from dapo_edge.runtime.sources.rtsp_probe import describing, server_of, silent
from dapo_edge.runtime.sources.uri import number, one_of, options
from dapo_edge.structures import MAX_PIXELS, MIN_SIDE_PX, Frame

OWN_PREFIX = "dapo."  # of our keys; all others belong to the camera, whose names nobody knows
LOW_LATENCY = "|flags;low_delay|probesize;32|analyzeduration;0"
MAX_FPS = 1000.0  # above, it is the clock of the stream, which FFmpeg takes for a rate that it does not know


@dataclass(frozen=True)
class Settings:
    """What the address asks of us."""

    transport: Literal["tcp", "udp"] = "tcp"
    latency: Literal["low", "default"] = "low"  # default: more probing, and decoding in several threads
    open_timeout_s: float = 3.0
    read_timeout_s: float = 2.0


OPTIONS = {
    "dapo.transport": one_of("tcp", "udp"),
    "dapo.latency": one_of("low", "default"),
    "dapo.open_timeout_s": number(0.1, 60, "seconds"),
    "dapo.read_timeout_s": number(0.1, 60, "seconds"),
}


class RtspSource(Source):
    """`rtsp://user:password@host:554/path?channel=1&dapo.latency=low`, or `rtsps://` for TLS.

    Keys that begin with `dapo.` are taken out and read here, see `Settings`; the camera gets all others. Special
    characters of a password are percent-encoded, as in `%40` for `@`. Timestamps are the moment of arrival.
    """

    reconnects: ClassVar[bool] = True

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._settings = Settings()
        self._capture: Any = None
        self._lock = threading.Lock()  # OpenCV crashes when a capture is released while another thread reads
        self._pool = BufferPool()
        self._shape: tuple[int, ...] = ()  # of the frame before
        self._index = 0
        self._silent = False

    def _parse(self) -> tuple[str, Settings]:
        """The camera's URI, and what is asked of us."""
        scheme, _, rest = self._full_uri.partition("://")
        camera_uri, own = take_own(f"{scheme.lower()}://{rest}")  # FFmpeg knows no upper case
        asked = options(self.uri, own, OPTIONS)
        server_of(camera_uri, self.uri)
        return camera_uri, Settings(**{key.removeprefix(OWN_PREFIX): value for key, value in asked.items()})

    def _open(self) -> Properties:
        camera_uri, settings = self._parse()
        self._settings = settings
        cv2 = require("cv2")
        limits = [
            *(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, round(settings.open_timeout_s * 1e3)),
            *(cv2.CAP_PROP_READ_TIMEOUT_MSEC, round(settings.read_timeout_s * 1e3)),
        ]
        ffmpeg = f"rtsp_transport;{settings.transport}"
        if settings.latency == "low":
            limits += [cv2.CAP_PROP_N_THREADS, 1]
            ffmpeg += LOW_LATENCY
        with describing(camera_uri, self.uri, settings.open_timeout_s) as failure:
            with ffmpeg_options(ffmpeg, self._check_wanted), quiet(cv2):
                began_s = time.monotonic()
                self._capture = cv2.VideoCapture(camera_uri, cv2.CAP_FFMPEG, limits)
            if not self._capture.isOpened():
                timed_out = time.monotonic() - began_s >= settings.open_timeout_s
                raise silent(self.uri) if timed_out else failure
        self._index, self._silent, self._shape = 0, False, ()
        return self._announced(cv2)

    def _announced(self, cv2: Any) -> Properties:
        width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if width > 0 and height > 0 and (min(width, height) < MIN_SIDE_PX or width * height > MAX_PIXELS):
            remedy = f"Use at least {MIN_SIDE_PX} pixels on each side and at most {MAX_PIXELS} in all"
            raise SourceRefused(f"the stream of '{self.uri}' is {width}x{height}", remedy)
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        known = math.isfinite(fps) and 0 < fps <= MAX_FPS
        return Properties(self.uri, width or None, height or None, fps if known else None, live=True)

    def _read(self, timeout_s: float | None) -> Frame | None:
        # `timeout_s` can't be passed on: FFmpeg knows one limit per opening, `dapo.read_timeout_s`.
        with self._lock:
            return None if self._capture is None else self._read_open()

    def _read_open(self) -> Frame:
        began_s = time.monotonic()
        if self._silent:
            raise self._failure()
        done, image = self._capture.read(self._pool.take(self._shape) if self._shape else None)
        # A frame that came out after the limit was inside the decoder: the camera is silent all the same.
        self._silent = time.monotonic() - began_s >= self._settings.read_timeout_s
        if not done:
            raise self._failure()
        self._shape = image.shape
        index, self._index = self._index, self._index + 1
        return Frame(image, index, time.time_ns(), self.uri)

    def _failure(self) -> SourceError:
        if self._silent:
            cause = f"'{self.uri}' sent nothing for {self._settings.read_timeout_s:g} s"
            return SourceError(cause, "Check the camera and its network; dapo.read_timeout_s sets the limit")
        return SourceError(f"'{self.uri}' ended the connection", "Check whether the camera restarted or was unplugged")

    def _close(self) -> None:
        with self._lock:
            if self._capture is not None:
                self._capture.release()
                self._capture = None


def take_own(uri: str) -> tuple[str, str]:
    """The camera's URI without our keys, and our keys as a query."""
    head, mark, query = uri.rpartition("?")
    keys = query.split("&")
    own = [key for key in keys if mark and key.startswith(OWN_PREFIX)]
    if not own:
        return uri, ""
    rest = "&".join(key for key in keys if not key.startswith(OWN_PREFIX))
    return (f"{head}?{rest}" if rest else head), "&".join(own)
