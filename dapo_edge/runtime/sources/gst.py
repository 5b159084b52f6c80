"""Cameras by GStreamer: any pipeline that ends in raw video, and the CSI cameras of a Jetson.

GStreamer is used through its own Python binding, because the OpenCV that pip installs is built without it. Frames are
copied once, from GStreamer's buffer into one of ours, so that a frame that is held for long never stops the camera.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dapo_edge.errors import DependencyMissing, FrameError, FrameTimeout, SourceError, SourceRefused
from dapo_edge.extras import require, system_remedy
from dapo_edge.runtime.buffers import BufferPool
from dapo_edge.runtime.sources.base import Properties, Source
from dapo_edge.runtime.sources.frame_ids import lost_between
from dapo_edge.runtime.sources.gst_caps import CAPS, NotTaken, Stream, stream_of
from dapo_edge.runtime.sources.uri import number, one_of, options, pipeline_of, redact_pipeline, secrets_of, whole
from dapo_edge.structures import MAX_PIXELS, MIN_SIDE_PX, Frame

OPEN_S = 5.0  # for a pipeline to start
CAPS_S = 3.0  # for a live one to tell its picture's size; a triggered camera may not know it before its first frame
POLL_S = 0.2  # between two looks at GStreamer's messages, while no frame comes
QUEUED = 4  # frames between GStreamer's thread and ours
APPSINK = f"appsink name=dapo_edge max-buffers={QUEUED} drop=false sync=false"  # never drops: the run does, and counts
NO_NUMBER = 2**64 - 1  # GST_BUFFER_OFFSET_NONE
CONVERT = "End the pipeline in '! videoconvert ! video/x-raw,format=BGR', or ask the camera for another format"


@dataclass(frozen=True)
class _Modules:
    """GStreamer's Python binding."""

    core: Any
    video: Any


class GstSource(Source):
    """`gst://PIPELINE` as in gst-launch-1.0, plain or percent-encoded: `gst://v4l2src ! videoconvert`.

    An appsink is added where the pipeline has none. It takes BGR, RGB, GRAY8, NV12 (BT.601, limited range) and Bayer
    RGGB as they are. A file's pipeline ends with its file; when a live one ends, its camera is gone. Frames that the
    camera's driver lost are counted where the pipeline numbers its buffers, as v4l2src does.
    """

    reconnects: ClassVar[bool] = True

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._modules: _Modules | None = None
        self._pipeline: Any = None
        self._sink: Any = None
        self._bus: Any = None
        self._live = False
        self._pool = BufferPool()
        self._caps: Any = None  # of the frame before, which `_stream` belongs to
        self._stream: Stream | None = None
        self._index = 0
        self._number: int | None = None  # that the pipeline gave the frame before
        self._lost = 0  # since the last frame that could be used

    def _parse(self) -> str:
        """What is launched, credentials included; its elements are only known to GStreamer."""
        text = pipeline_of(self._full_uri.partition("://")[2])
        if not text.strip():
            raise SourceRefused(f"'{self.uri}' holds no pipeline", "Write one, as in gst://v4l2src ! videoconvert")
        return text

    def _open(self) -> Properties:
        self._index, self._number, self._lost, self._caps, self._stream = 0, None, 0, None, None
        text = self._parse()
        modules = self._modules = _gstreamer()
        self._pipeline = self._launched(modules.core, text)
        self._bus = self._pipeline.get_bus()
        self._start(modules.core)
        stream = self._first_stream()
        if stream is None:
            return Properties(self.uri, live=self._live)
        return Properties(self.uri, stream.layout.width, stream.layout.height, stream.fps, live=self._live)

    def _launched(self, core: Any, text: str) -> Any:
        own = not re.search(r"\bappsink\b", text)
        glib = require("gi.repository.GLib")
        try:
            full = f"{text} ! {APPSINK}" if own else text
            pipeline = core.parse_launch_full(full, None, core.ParseFlags.FATAL_ERRORS)
        except glib.Error as error:
            cause = f"'{self.uri}' is no pipeline: {self._redacted(error.message)}"
            raise SourceRefused(cause, "Try it with gst-launch-1.0; gst-inspect-1.0 lists the elements") from None
        sinks = []
        if isinstance(pipeline, core.Bin):
            found = pipeline.iterate_all_by_element_factory_name("appsink")
            while (step := found.next())[0] == core.IteratorResult.OK:
                sinks.append(step[1])
        if len(sinks) != 1:
            raise SourceRefused(f"'{self.uri}' has {len(sinks)} appsinks", "Use one, or none: it is added then")
        self._sink = sinks[0]
        if own:
            self._sink.set_property("caps", core.Caps.from_string(CAPS))
        return pipeline

    def _start(self, core: Any) -> None:
        """Paused, which tells whether it is live, then playing."""
        self._pipeline.set_state(core.State.PAUSED)
        result = self._pipeline.get_state(round(OPEN_S * core.SECOND))[0]
        if result != core.StateChangeReturn.FAILURE:
            self._live = result == core.StateChangeReturn.NO_PREROLL
            if result == core.StateChangeReturn.ASYNC:
                raise self._error() or SourceError(
                    f"the pipeline of '{self.uri}' did not start within {OPEN_S:g} s", "Check its source"
                )
            result = self._pipeline.set_state(core.State.PLAYING)
        if result == core.StateChangeReturn.FAILURE:
            raise self._error(POLL_S) or SourceError(
                f"the pipeline of '{self.uri}' can't be started", "Check its source"
            )

    def _first_stream(self) -> Stream | None:
        """What the pipeline's frames will look like, as soon as it knows."""
        pad, until_s = self._sink.get_static_pad("sink"), time.monotonic() + CAPS_S
        while True:
            caps = pad.get_current_caps()
            if caps is not None:
                return self._stream_of(caps)
            if error := self._error():
                raise error
            if time.monotonic() > until_s or self._sink.is_eos():
                return None
            time.sleep(0.01)

    def _stream_of(self, caps: Any) -> Stream:
        if self._stream is None or not caps.is_equal(self._caps):
            assert self._modules is not None
            try:
                stream = stream_of(caps, self._modules.video)
            except NotTaken as error:
                raise SourceRefused(f"'{self.uri}' gives {error}", CONVERT) from None
            width, height = stream.layout.width, stream.layout.height
            if min(width, height) < MIN_SIDE_PX or width * height > MAX_PIXELS:
                remedy = f"Use at least {MIN_SIDE_PX} pixels on each side and at most {MAX_PIXELS} in all"
                raise SourceRefused(f"'{self.uri}' gives pictures of {width}x{height}", remedy)
            self._caps, self._stream = caps, stream
        return self._stream

    def _read(self, timeout_s: float | None) -> Frame | None:
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while (sink := self._sink) is not None and self._modules is not None:
            wait_s = POLL_S if until_s is None else min(POLL_S, max(0.0, until_s - time.monotonic()))
            sample = sink.try_pull_sample(round(wait_s * self._modules.core.SECOND))
            if sample is not None:
                return self._frame(sample)
            error, ended = self._error(), sink.is_eos()
            if self._sink is None:  # closed by another thread; a sink that is stopped says that it ended
                return None
            if error:
                raise error
            if ended and self._live:
                cause = f"the stream of '{self.uri}' ended"
                raise SourceError(cause, "Check the camera; a live one should never end")
            if ended:
                return None
            if until_s is not None and time.monotonic() >= until_s:
                raise FrameTimeout(f"'{self.uri}' gave no frame within {timeout_s:g} s", "Wait longer")
        return None

    def _frame(self, sample: Any) -> Frame:
        assert self._modules is not None
        core, buffer = self._modules.core, sample.get_buffer()
        layout = self._stream_of(sample.get_caps()).layout
        self._lost += self._lost_before(buffer)
        index, self._index = self._index, self._index + 1
        if buffer.has_flags(core.BufferFlags.CORRUPTED):
            raise self._damaged("is marked as corrupted", index)
        meta = self._modules.video.buffer_get_video_meta(buffer)
        placed = None if meta is None else (meta.offset, meta.stride)
        done, mapped = buffer.map(core.MapFlags.READ)
        if not done:
            raise self._damaged("can't be read", index)
        try:
            pixels = layout.taken(np.frombuffer(mapped.data, np.uint8), self._pool, placed)
        finally:
            buffer.unmap(mapped)
        if pixels is None:
            raise self._damaged("is incomplete", index)
        lost, self._lost = self._lost, 0
        return Frame(pixels, index, time.time_ns(), self.uri, lost=lost)

    def _lost_before(self, buffer: Any) -> int:
        """Frames that are missing in the pipeline's own numbers, which a buffer has where it counts frames by ones."""
        before, self._number = self._number, None
        if buffer.offset == NO_NUMBER or buffer.offset_end != buffer.offset + 1:
            return 0
        self._number = buffer.offset
        return 0 if before is None else lost_between(before, buffer.offset, 2**64)

    def _damaged(self, what: str, index: int) -> FrameError:
        error = FrameError(f"frame {index} of '{self.uri}' {what}", "Check the camera's cable and its bandwidth")
        return error.at(index, self.uri)

    def _error(self, wait_s: float = 0.0) -> SourceError | None:
        """What an element of the pipeline complained about."""
        assert self._modules is not None
        core, bus = self._modules.core, self._bus
        message = bus and bus.timed_pop_filtered(round(wait_s * core.SECOND), core.MessageType.ERROR)
        if message is None:
            return None
        error, debug = message.parse_error()
        details = (debug or "").strip().splitlines()[-1:]
        said = self._redacted(" ".join([error.message, *details]))
        cause = f"{message.src.get_name()} of '{self.uri}': {said}"
        if "not-negotiated" in (debug or "") or error.matches(core.stream_error_quark(), core.StreamError.FORMAT):
            return SourceRefused(cause, CONVERT)
        if error.matches(core.resource_error_quark(), core.ResourceError.NOT_AUTHORIZED):
            return SourceRefused(cause, "Check the user name and the password")
        if error.matches(core.core_error_quark(), core.CoreError.MISSING_PLUGIN):
            return SourceRefused(cause, "Install the GStreamer plugins that it names")
        return SourceError(cause, "Check the camera; gst-launch-1.0 tells more, with GST_DEBUG=3")

    def _redacted(self, text: str) -> str:
        for secret in secrets_of(self._parse()):
            text = text.replace(secret, "***")
        return redact_pipeline(text)

    def _close(self) -> None:
        pipeline, self._pipeline, self._sink, self._bus = self._pipeline, None, None, None
        if pipeline is not None and self._modules is not None:
            pipeline.set_state(self._modules.core.State.NULL)  # wakes whoever waits for a frame


def compilers_unwinder_first() -> None:
    """To be called before GStreamer is loaded.

    It brings libunwind, whose symbols take the place of the compiler's own: then the first C++ exception of a camera's
    SDK that is loaded later ends the process. Whoever comes first is used.
    """
    with contextlib.suppress(OSError):  # another system's compiler
        ctypes.CDLL("libgcc_s.so.1", mode=ctypes.RTLD_GLOBAL)


def _gstreamer() -> _Modules:
    compilers_unwinder_first()
    gi = require("gi")
    try:
        for name in ("Gst", "GstApp", "GstVideo"):
            gi.require_version(name, "1.0")
    except ValueError as error:
        raise DependencyMissing(f"GStreamer's Python binding is incomplete ({error})", system_remedy("gi")) from error
    core, video = require("gi.repository.Gst"), require("gi.repository.GstVideo")
    require("gi.repository.GstApp")  # gives appsinks their methods
    core.init(None)
    return _Modules(core, video)


CSI_OPTIONS = {
    "width": whole(16, 16384, "pixels"),
    "height": whole(16, 16384, "pixels"),
    "fps": whole(1, 1000, "frames per second"),
    "sensor_mode": whole(0, 63),
    "exposure_us": number(1, 1e7, "microseconds"),
    "gain": number(1, 1000, ""),
    "flip": whole(0, 7),
    "format": one_of("BGR", "NV12"),
}


class CsiSource(GstSource):
    """`csi://0?width=1920&height=1080&fps=30&exposure_us=&gain=&sensor_mode=&flip=&format=BGR`: a Jetson's camera.

    The number is nvarguscamerasrc's sensor-id, `flip` nvvidconv's flip-method. `format=NV12` leaves the conversion to
    the backend, which on a GPU costs nothing; its colours are taken for BT.601 with limited range.
    """

    def _parse(self) -> str:
        address = self._address
        if not re.fullmatch("[0-9]{1,2}", address.body):
            raise SourceRefused(f"'{self.uri}' names no sensor", "Write csi://0 for the first one")
        return csi_pipeline(int(address.body), options(self.uri, address.query, CSI_OPTIONS))


def csi_pipeline(sensor: int, asked: dict[str, Any]) -> str:
    """The pipeline from sensor `sensor`, with what the address asks for.

    Source: https://docs.nvidia.com/jetson/archives/r36.4/DeveloperGuide/SD/Multimedia/AcceleratedGstreamer.html
    """
    camera = f"nvarguscamerasrc sensor-id={sensor}"
    if "sensor_mode" in asked:
        camera += f" sensor-mode={asked['sensor_mode']}"
    if "exposure_us" in asked:
        nanoseconds = round(asked["exposure_us"] * 1e3)
        camera += f' exposuretimerange="{nanoseconds} {nanoseconds}"'
    if "gain" in asked:
        camera += f' gainrange="{asked["gain"]:g} {asked["gain"]:g}"'
    size = f"width={asked.get('width', 1920)},height={asked.get('height', 1080)}"
    caps = f"video/x-raw(memory:NVMM),{size},framerate={asked.get('fps', 30)}/1,format=NV12"
    convert = f"nvvidconv flip-method={asked['flip']}" if "flip" in asked else "nvvidconv"
    if asked.get("format") == "NV12":
        return f"{camera} ! {caps} ! {convert} ! video/x-raw,format=NV12"
    return f"{camera} ! {caps} ! {convert} ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR"
