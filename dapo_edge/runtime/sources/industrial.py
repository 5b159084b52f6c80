"""What all industrial cameras have in common: features and triggers by the URI, frames counted by the camera's ids.

`genicam.py`, `basler.py` and `aravis.py` each fill in the calls of one SDK. Accounting, waiting, triggers, formats
and the words of errors are here, so that a camera behaves the same whichever way it is reached.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import unquote

from dapo_edge.errors import FrameError, FrameTimeout, SourceError, SourceRefused
from dapo_edge.kernels.pixels import Bytes
from dapo_edge.runtime.sources.base import Properties, Source
from dapo_edge.runtime.sources.features import (
    Feature,
    Nodes,
    Trigger,
    frame_rate,
    reason_of,
    set_features,
    set_trigger,
    whole_number,
)
from dapo_edge.runtime.sources.frame_ids import FrameIds, wall_clock
from dapo_edge.runtime.sources.pixel_formats import PixelReader
from dapo_edge.runtime.sources.uri import Option, split_query
from dapo_edge.structures import Frame

SLICE_S = 0.1  # longest wait inside an SDK, so that `close` from another thread ends a read soon


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    if not 1 <= int(text) <= 1000:
        raise ValueError(text)
    return int(text)


def _trigger(text: str) -> str:
    if not text.isidentifier():
        raise ValueError(text)
    return text


OPTIONS = {
    "trigger": Option(_trigger, "off, software, or the line it comes by, such as Line1; else as the camera is set"),
    "timeout": Option(_seconds, "the seconds within which a frame must follow a software trigger, above 0"),
    "buffers": Option(_count, "how many frames the driver may hold until they are read, 1 to 1000"),
}
DEFAULT_TIMEOUT_S = 2.0
SLACK_S = 1.0  # between an unanswered software trigger, which is a failed frame, and a camera that hangs
ALIVE_EVERY_S = 1.0  # between two looks whether a silent camera is still there
DEFAULT_BUFFERS = 8


@dataclass(frozen=True)
class Found:
    """A camera that was found, and how to open it."""

    uri: str
    model: str
    serial: str = ""
    note: str = ""  # e.g. in use


@dataclass(frozen=True, eq=False)
class Grab:
    """One buffer of a camera, as its SDK describes it. `data` need only be valid until it has been read."""

    data: Bytes  # flat
    width: int
    height: int
    pitch: int | None = None  # bytes from row to row; None: no padding
    frame_id: int | None = None
    camera_ns: int | None = None  # the camera's clock, whatever it counts from
    skipped: int = 0  # frames that the SDK threw away for this one
    failed: str = ""  # why it can't be used


class IndustrialSource(Source):
    """A camera that speaks GenICam. See the subclasses for their URIs."""

    reconnects = True
    own_options: ClassVar[dict[str, Option]] = OPTIONS

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._lock = threading.Lock()  # an SDK crashes when a camera is closed while another thread reads
        self._closing = threading.Event()
        self._options: dict[str, Any] = {}
        self._trigger: Trigger = "off"
        self._reader: PixelReader | None = None
        self._forget()

    def _forget(self) -> None:
        self._ids = FrameIds()
        self._index = 0
        self._lost = 0  # before frames that failed, to be told with the next good one
        self._due_s: float | None = None  # until when the frame of the last software trigger must come
        self._alive_s = time.monotonic()  # when it was last known to be there
        self._is_late = False  # it did not, so it may still come as if it belonged to the next trigger
        self.has_camera_clock = False  # timestamps are the camera's own time of day

    @property
    def pixel_format(self) -> str:
        """The camera's own name of what it delivers; '' before it is open."""
        return self._reader.name if self._reader else ""

    def _parse(self) -> tuple[dict[str, Any], list[Feature]]:
        # Other keys are features, which only the camera knows.
        return split_query(self.uri, self._address.query, self.own_options)

    def _open(self) -> Properties:
        self._closing.clear()
        self._forget()
        self._options, features = self._parse()
        with self._sdk("can't be opened"):
            nodes = self._connect(unquote(self._address.body).strip("/"))
            if nodes.get("AcquisitionMode") not in (None, "Continuous"):  # left over from another program
                features.insert(0, ("AcquisitionMode", "Continuous"))
            set_features(self.uri, nodes, features, self.own_options)
            self._trigger = set_trigger(self.uri, nodes, self._options.get("trigger"))
            self._reader = PixelReader(nodes.get("PixelFormat") or "", self.uri)
            self._start(self._options.get("buffers", DEFAULT_BUFFERS))
        free_running = self._trigger == "off"
        return Properties(
            uri=self.uri,
            width=whole_number(nodes, "Width"),
            height=whole_number(nodes, "Height"),
            fps=frame_rate(nodes) if free_running else None,
            live=self._trigger != "software",
            triggered=self._trigger == "hardware",
            silence_s=self._answer_s + SLACK_S if self._trigger == "software" else None,
        )

    @property
    def _answer_s(self) -> float:
        """Within which a frame must follow a software trigger."""
        return float(self._options.get("timeout", DEFAULT_TIMEOUT_S))

    def _read(self, timeout_s: float | None) -> Frame | None:
        with self._lock:
            end_s = None if timeout_s is None else time.monotonic() + timeout_s
            if self._trigger == "software" and self._due_s is None and not self._closing.is_set():
                self._fire()
            while not self._closing.is_set():
                left_s = SLICE_S if end_s is None else min(SLICE_S, max(0.0, end_s - time.monotonic()))
                with self._sdk("broke down"):
                    frame = self._poll(left_s)
                if frame is not None:
                    return frame
                self._check_due()
                self._look_after()
                if end_s is not None and time.monotonic() >= end_s:
                    cause = f"the camera of '{self.uri}' gave no frame within {timeout_s:g} s"
                    raise FrameTimeout(cause, "Check its trigger, exposure time, cable and network")
        return None

    def _look_after(self) -> None:
        """A triggered camera may be silent for days, so it is asked now and then whether it is still there."""
        now_s = time.monotonic()
        if now_s - self._alive_s >= ALIVE_EVERY_S:
            with self._sdk("does not answer any more"):
                self._check_alive()
            self._alive_s = now_s

    def _fire(self) -> None:
        if self._is_late:
            self._drop_late()
        with self._sdk("can't be triggered"):
            self._execute_trigger()
        self._due_s = time.monotonic() + self._answer_s

    def _drop_late(self) -> None:
        """Throw away what came after its trigger was given up: it has been counted as failed, and is an old picture."""
        index, frame = self._index, True
        while frame:
            with contextlib.suppress(FrameError), self._sdk("broke down"):
                frame = self._poll(0.0) is not None
        self._index, self._is_late = index, False

    def _check_due(self) -> None:
        if self._due_s is None or time.monotonic() < self._due_s:
            return
        self._due_s, self._is_late = None, True
        index, self._index = self._index, self._index + 1
        cause = f"the camera of '{self.uri}' answered a software trigger with no frame"
        raise FrameError(cause, "Check its exposure time, or give a longer timeout= in the URI").at(index, self.uri)

    def _deliver(self, grab: Grab) -> Frame:
        """The frame of a buffer, in memory of its own. Raises `FrameError`."""
        arrived_s, now_ns = time.monotonic(), time.time_ns()
        self._due_s, self._alive_s = None, arrived_s
        index, self._index = self._index, self._index + 1
        # A camera's ids jump over what its SDK skipped, if it has ids.
        self._lost += max(grab.skipped, self._ids.lost_before(grab.frame_id, failed=bool(grab.failed)))
        try:
            if grab.failed:
                cause = f"frame {index} of '{self.uri}' is incomplete ({grab.failed})"
                raise FrameError(cause, "Check cable, network and packet size; lower the frame rate")
            assert self._reader is not None
            pixels = self._reader.read(grab.data, grab.width, grab.height, grab.pitch)
        except FrameError as error:
            raise error.at(index, self.uri) from None
        captured_ns = wall_clock(grab.camera_ns, now_ns)
        self.has_camera_clock = captured_ns is not None
        lost, self._lost = self._lost, 0
        return Frame(pixels, index, captured_ns or now_ns, self.uri, lost=lost, arrived_s=arrived_s)

    @contextlib.contextmanager
    def _sdk(self, what: str) -> Iterator[None]:
        """Turn the SDK's exceptions into a `SourceError`."""
        try:
            yield
        except self._sdk_errors() as error:
            remedy = "Check cable, power and network, and that no other program uses the camera"
            raise SourceError(f"the camera of '{self.uri}' {what} ({reason_of(error)})", remedy) from error

    def _close(self) -> None:
        self._closing.set()
        with self._lock, contextlib.suppress(SourceError), self._sdk("can't be closed"):  # it may be gone
            self._disconnect()

    @abstractmethod
    def _connect(self, name: str) -> Nodes:
        """Take possession of the camera. Raises `SourceError`, or what `_sdk_errors` says."""

    @abstractmethod
    def _start(self, buffers: int) -> None:
        """Let frames come into so many buffers."""

    @abstractmethod
    def _poll(self, wait_s: float) -> Frame | None:
        """The next frame by `_deliver`, its buffer given back; None: none came in time."""

    @abstractmethod
    def _check_alive(self) -> None:
        """Raise `SourceError`, or what `_sdk_errors` says, when the camera is gone. Called about once a second."""

    @abstractmethod
    def _execute_trigger(self) -> None:
        """Take one picture."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Stop and let go of whatever `_connect` and `_start` got hold of, also when they failed half-way."""

    def _sdk_errors(self) -> tuple[type[Exception], ...]:
        """The SDK's own exceptions; none before it is imported."""
        return ()


def choose(found: Sequence[Found], name: str, keys: Sequence[tuple[str, ...]], uri: str) -> int:
    """Index of the camera called `name` in any of its `keys`; '' is the only one there is.

    Raises `SourceError`: not there, with what is there; `SourceRefused`: there are several.
    """
    matching = [index for index, words in enumerate(keys) if not name or name in words]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(f"{camera.model} {camera.serial}".strip() for camera in found) or "none"
    if matching:
        named = "several cameras are there" if not name else f"several cameras are called '{name}'"
        raise SourceRefused(f"'{uri}' is not clear: {named} ({listed})", "Put a serial number behind the ://")
    remedy = "Check cable, power and network; `dapo-edge cameras list` shows all that can be reached"
    raise SourceError(f"the camera of '{uri}' is not there; found: {listed}", remedy)
