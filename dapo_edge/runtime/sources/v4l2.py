"""USB and other cameras of Linux' own video interface, V4L2.

The interface is used directly. OpenCV's reader hides the buffers that the driver marked as bad, and the numbers that
tell how many frames were lost, and waits ten seconds for a camera that another program holds.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import FrameError, FrameTimeout, SourceError, SourceRefused
from dapo_edge.extras import require
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.runtime.buffers import BufferPool
from dapo_edge.runtime.sources import v4l2_api as api
from dapo_edge.runtime.sources.base import Properties, Source
from dapo_edge.runtime.sources.frame_ids import lost_between
from dapo_edge.runtime.sources.uri import Option, number, options, path_of, split_query, whole
from dapo_edge.runtime.sources.v4l2_pixels import DECODED, Reader, reader_of
from dapo_edge.structures import MAX_PIXELS, MIN_SIDE_PX, Frame

POLL_S = 0.2  # between two looks whether the source was closed
BUFFERS = 4
SEQUENCES = 2**32  # numbers of buffers, before they begin again at 0
RATE_TOLERANCE = 0.01
EXAMPLE = "v4l2:///dev/video0?width=1280&height=720&fps=30&fourcc=MJPG"

OPTIONS = {
    "width": whole(MIN_SIDE_PX, 16384, "pixels"),
    "height": whole(MIN_SIDE_PX, 16384, "pixels"),
    "fps": number(0.1, 1000, "frames per second"),
    "fourcc": Option(lambda text: _fourcc(text), "four characters such as MJPG or YUYV"),
    "buffers": whole(2, 32, "frames between driver and reader"),
}


def _fourcc(text: str) -> str:
    if not 1 <= len(text) <= 4 or not text.isascii():
        raise ValueError(text)
    return text.upper()


class V4l2Source(Source):
    """`v4l2:///dev/video0?width=&height=&fps=&fourcc=&buffers=`, and any control that `v4l2-ctl --list-ctrls` names.

    `fourcc` is one of `DECODED`, or of the formats that `PixelView` takes as they are. Timestamps are the driver's own
    where it gives any. Frames that the driver lost are counted by its sequence numbers.
    """

    reconnects: ClassVar[bool] = True

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._device: api.Device | None = None
        self._maps: list[mmap.mmap] = []
        self._controls: dict[str, api.Control] = {}
        self._reader: Reader | None = None
        self._lock = threading.Lock()  # a descriptor that is closed while another thread uses it may be another file
        self._pool = BufferPool()
        self._index = 0
        self._sequence: int | None = None
        self._lost = 0

    def _parse(self) -> Path:
        # Other keys may be controls, which only the camera knows: `_asked` sees to them.
        split_query(self.uri, self._address.query, OPTIONS)
        return path_of(self._address.body)

    def _open(self) -> Properties:
        path = self._parse()
        device = self._device = self._opened(path)
        try:
            self._check_kind(device, path)
            asked = self._asked(device)
            self._set_format(device, asked)
            self._set_rate(device, asked.pop("fps", None))
            self._set_controls(device, asked)
            form, interval = device.format(), device.interval()
            self._reader = self._made_reader(device, form)
            self._start(device, asked.get("buffers", BUFFERS))
        except OSError as error:
            raise self._failure(path, error) from error
        self._index, self._sequence, self._lost = 0, None, 0
        fps = None if interval is None else float(1 / interval)
        return Properties(self.uri, form.width, form.height, fps, live=True)

    def _opened(self, path: Path) -> api.Device:
        try:
            return api.Device(str(path))
        except OSError as error:
            raise self._failure(path, error) from error

    def _check_kind(self, device: api.Device, path: Path) -> None:
        try:
            can = device.node_capabilities()
        except OSError as error:
            raise SourceRefused(f"'{path}' is not a camera of V4L2", f"Write it like {EXAMPLE}") from error
        if not can & api.CAP_CAPTURE and can & api.CAP_MULTIPLANAR:
            cause = f"'{path}' delivers its pictures in several planes, as image processors of boards do"
            raise SourceRefused(cause, "Use GStreamer: csi://0, or gst://v4l2src and the board's converter")
        if not can & api.CAP_CAPTURE or not can & api.CAP_STREAMING:
            cause = f"'{path}' gives no pictures: it is the camera's second device, or none of a camera"
            raise SourceRefused(cause, "v4l2-ctl --list-devices shows them; the first one of each is the camera")

    def _asked(self, device: api.Device) -> dict[str, Any]:
        """What the address says, once the camera's controls are known."""
        self._controls = {control.name: control for control in device.controls() if control.writable}
        ranges = {name: whole(control.minimum, control.maximum) for name, control in self._controls.items()}
        return options(self.uri, self._address.query, {**ranges, **OPTIONS})

    def _set_format(self, device: api.Device, asked: dict[str, Any]) -> None:
        form = device.format()
        if not {"width", "height", "fourcc"} & asked.keys():
            return
        width, height = asked.pop("width", form.width), asked.pop("height", form.height)
        code = api.fourcc_code(asked.pop("fourcc", api.fourcc_name(form.fourcc)))
        wanted = api.Format(type=api.CAPTURE, width=width, height=height, fourcc=code, field=form.field)
        device.call(api.SET_FORMAT, wanted)
        got = device.format()
        if (got.width, got.height, got.fourcc) != (width, height, code):
            cause = (
                f"'{self.uri}' gives {got.width}x{got.height} {api.fourcc_name(got.fourcc)}, "
                f"not {width}x{height} {api.fourcc_name(code)}"
            )
            raise SourceRefused(cause, "v4l2-ctl --list-formats-ext shows what the camera can do")

    def _set_rate(self, device: api.Device, fps: float | None) -> None:
        if fps is None:
            return
        device.set_interval(1 / Fraction(fps).limit_denominator(1000))
        interval = device.interval()
        got = float(1 / interval) if interval else 0.0
        if abs(got - fps) > RATE_TOLERANCE * fps:
            cause = f"'{self.uri}' gives {got:g} frames per second, not {fps:g}"
            raise SourceRefused(cause, "v4l2-ctl --list-formats-ext shows the rates of each size")

    def _set_controls(self, device: api.Device, asked: dict[str, Any]) -> None:
        for name, value in asked.items():
            if name not in self._controls or name in OPTIONS:
                continue
            try:
                got = device.set_control(self._controls[name], value)
            except OSError as error:
                cause = f"'{self.uri}' refuses {name}={value} ({error.strerror})"
                raise SourceRefused(cause, "It may be set automatically: switch that off by a key before it") from error
            if got != value:
                raise SourceRefused(f"'{self.uri}' makes {name}={got} of {value}", f"Ask for {name}={got}")

    def _made_reader(self, device: api.Device, form: api.Format) -> Reader:
        if min(form.width, form.height) < MIN_SIDE_PX or form.width * form.height > MAX_PIXELS:
            remedy = f"Use at least {MIN_SIDE_PX} pixels on each side and at most {MAX_PIXELS} in all"
            raise SourceRefused(f"'{self.uri}' gives pictures of {form.width}x{form.height}", remedy)
        reader = reader_of(form, self._pool)
        if isinstance(reader, str):
            offered = ", ".join(device.formats())
            raise SourceRefused(f"'{self.uri}' gives {reader}", f"Choose another fourcc; the camera offers {offered}")
        if api.fourcc_name(form.fourcc) in DECODED:
            require("cv2")
        return reader

    def _start(self, device: api.Device, count: int) -> None:
        request = api.BufferRequest(count=count, type=api.CAPTURE, memory=api.MMAP)
        device.call(api.REQUEST_BUFFERS, request)
        for index in range(request.count):
            buffer = api.Buffer(index=index, type=api.CAPTURE, memory=api.MMAP)
            device.call(api.QUERY_BUFFER, buffer)
            self._maps.append(mmap.mmap(device.descriptor, buffer.length, offset=buffer.offset))
            device.call(api.QUEUE, buffer)
        device.call(api.STREAM_ON, ctypes.c_int(api.CAPTURE))

    def _read(self, timeout_s: float | None) -> Frame | None:
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            wait_s = POLL_S if until_s is None else min(POLL_S, max(0.0, until_s - time.monotonic()))
            with self._lock:
                if self._device is None:
                    return None
                if self._device.wait(wait_s):
                    return self._taken(self._device)
            if until_s is not None and time.monotonic() >= until_s:
                raise FrameTimeout(f"'{self.uri}' gave no frame within {timeout_s:g} s", "Wait longer")

    def _taken(self, device: api.Device) -> Frame:
        buffer = api.Buffer(type=api.CAPTURE, memory=api.MMAP)
        try:
            device.call(api.DEQUEUE, buffer)
            try:
                return self._frame(buffer)
            finally:
                device.call(api.QUEUE, buffer)
        except OSError as error:
            raise self._failure(path_of(self._address.body), error) from error

    def _frame(self, buffer: api.Buffer) -> Frame:
        if self._sequence is not None:
            self._lost += lost_between(self._sequence, buffer.sequence, SEQUENCES)
        self._sequence = buffer.sequence
        index, self._index = self._index, self._index + 1
        pixels = None if buffer.flags & api.FLAG_ERROR else self._pixels(buffer)
        if pixels is None:
            error = FrameError(f"frame {index} of '{self.uri}' is damaged", "Check the cable and the USB bandwidth")
            raise error.at(index, self.uri)
        lost, self._lost = self._lost, 0
        return Frame(pixels, index, _captured_ns(buffer), self.uri, lost=lost)

    def _pixels(self, buffer: api.Buffer) -> NDArray[np.uint8] | PixelView | None:
        # The view of the driver's memory ends here: an exception with this frame in its trace would keep it mapped.
        assert self._reader is not None
        return self._reader(np.frombuffer(self._maps[buffer.index], np.uint8, count=buffer.bytes_used))

    def _failure(self, path: Path, error: OSError) -> SourceError:
        """The driver's refusal, with what to do about it."""
        if error.errno in (errno.EACCES, errno.EPERM):
            remedy = "Add the user to the group that owns it: sudo usermod -aG video USER, then log in again"
            return SourceRefused(f"'{path}' can't be opened ({error.strerror})", remedy)
        if error.errno == errno.EBUSY:
            holder = holder_of(path)
            cause = f"'{path}' is used by {holder}" if holder else f"'{path}' is used by another program"
            return SourceError(cause, "End that program; a camera has one user at a time")
        if error.errno in (errno.ENODEV, errno.ENXIO, errno.ENOENT):
            remedy = "Plug the camera in; v4l2-ctl --list-devices shows all"
            return SourceError(f"there is no camera at '{path}' ({error.strerror})", remedy)
        return SourceError(f"the driver of '{path}' failed ({error.strerror})", "dmesg may tell why; plug it in again")

    def _close(self) -> None:
        with self._lock:
            device, self._device = self._device, None
            self._maps = []  # unmapped with their last view: the driver keeps a device that is mapped
            if device is not None:
                device.close()  # ends streaming, too


def _captured_ns(buffer: api.Buffer) -> int:
    """Wall clock at which the driver stamped the buffer, nanoseconds since 1970."""
    now_ns = time.time_ns()
    if buffer.flags & api.FLAG_CLOCK != api.FLAG_MONOTONIC:
        return now_ns
    stamp_ns = buffer.seconds * 10**9 + buffer.microseconds * 1000
    return now_ns - max(0, time.monotonic_ns() - stamp_ns)


def holder_of(path: Path) -> str | None:
    """A process that has the device open, as `name (process 1234)`, among those that may be looked into."""
    device = os.path.realpath(path)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.path.realpath(entry) == device for entry in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:  # ended meanwhile, or another user's
            continue
    return None
