"""The contract of a source: open it, read frames one after the other, close it.

A new kind of source is one file with one subclass of `Source` and one line in `SOURCES`. The subclass is made from the
URI alone, does nothing until `_open`, and fills in three methods; state, errors of use and iteration are handled here.
What is wrong with the URI itself is told by `check`, and by `open` before any hardware is touched.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar

from dapo_edge.errors import FrameError, FrameTimeout, SourceError
from dapo_edge.runtime.sources.uri import Address, redact, split
from dapo_edge.structures import Frame


@dataclass(frozen=True)
class Properties:
    """What is known about a source once it is open. None: unknown, or not the same for all frames."""

    uri: str  # without credentials
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    fps: float | None = None  # frames per second
    length: int | None = None  # frames; None also for a source without end
    live: bool = False  # frames come at their own pace, whether they are read or not
    triggered: bool = False  # frames come when something happens on the line: silence is no fault
    silence_s: float | None = None  # how long it may give nothing before that is a fault; None: the run's own limit


class Source(ABC):
    """Frames from one place. One thread reads; `close` may come from another one."""

    reconnects: ClassVar[bool] = False  # a camera, which is opened again when it is lost; a file is not
    has_camera_clock = False  # timestamps are the camera's own time of day; else when this machine got the frame

    def __init__(self, uri: str) -> None:
        self.uri = redact(uri)  # for messages and frames
        self._full_uri = uri  # with credentials: never print it
        self._properties: Properties | None = None
        self._ended = False
        self._opening = threading.Lock()  # held for the moments in which an opening begins, succeeds or is given up
        self._given_up = False

    @property
    def is_open(self) -> bool:
        """Whether it can be read."""
        return self._properties is not None

    @property
    def properties(self) -> Properties:
        """What is known about the source, which must be open."""
        if self._properties is None:
            raise SourceError(f"the source '{self.uri}' is not open", "Use it inside 'with', or call open() first")
        return self._properties

    def check(self) -> None:
        """Refuse what is wrong with the URI itself. Touches no hardware, file or network, and imports no SDK.

        Raises `SourceRefused`, or `SourceError` where `open` does. What only a device can know, such as the names of a
        camera's own features, is left to `open`.
        """
        self._parse()

    def open(self) -> Source:
        """Get ready to read from the first frame; does nothing when already open.

        `close` from another thread meanwhile gives it up: a `SourceError`, as soon as the camera's library comes back.
        """
        if self._properties is None:
            self._ended = self._given_up = False
            try:
                properties = self._open()
                with self._opening:
                    self._check_wanted()
                    self._properties = properties
            except BaseException:
                self._close()
                raise
        return self

    def read(self, timeout_s: float | None = None) -> Frame | None:
        """The next frame, or None after the last one.

        `FrameError`: this frame can't be used and counts as failed; the next call goes on with the frame after it.
        `FrameTimeout`: none came within `timeout_s` seconds (None: waits as long as it takes); the next call waits on.
        Some libraries can't be interrupted and come back later than asked. Any other `SourceError`: the source broke
        down, and the next call returns None.
        """
        if self.properties and self._ended:
            return None
        try:
            frame = self._read(timeout_s)
        except SourceError as error:
            self._ended = not isinstance(error, (FrameError, FrameTimeout))
            raise
        self._ended = frame is None
        return frame

    def close(self) -> None:
        """Let go of the device or file. Safe to call twice, and before `open`; it never waits for an opening."""
        with self._opening:
            self._given_up = True
            was_open, self._properties = self._properties is not None, None
        if was_open:
            self._close()

    def __enter__(self) -> Source:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Source:
        # Not a generator: after a FrameError, a second `for` over the same source goes on with the next frame.
        return self

    def __next__(self) -> Frame:
        frame = self.read()
        if frame is None:
            raise StopIteration
        return frame

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.uri}>"

    @property
    def _address(self) -> Address:
        """The parts of the URI, credentials included."""
        address = split(self._full_uri)
        if address is None:
            raise SourceError(f"'{self.uri}' is not a URI", "Use open_source(), which also takes plain paths")
        return address

    def _check_wanted(self) -> None:
        """For openings that wait for something: raise `SourceError` once `close` was called."""
        if self._given_up:
            raise SourceError(f"'{self.uri}' was closed before it was open", "Open it again")

    def _parse(self) -> object:
        """What the URI asks for, which `_open` begins with; see `check` for errors."""
        return None

    @abstractmethod
    def _open(self) -> Properties:
        """Acquire everything, or raise `SourceError`."""

    @abstractmethod
    def _read(self, timeout_s: float | None) -> Frame | None:
        """The next frame, None after the last one; see `read` for errors."""

    @abstractmethod
    def _close(self) -> None:
        """Release what `_open` acquired, also when it failed half-way."""
