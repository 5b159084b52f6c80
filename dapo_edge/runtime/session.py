"""One opening of a source, in a thread of its own: opened, read and closed there, however long a library takes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from dapo_edge.errors import DapoEdgeError, FrameError, FrameTimeout, SourceError
from dapo_edge.runtime.sources import Properties, Source, redact
from dapo_edge.structures import Frame


class Reader(Protocol):
    """Who takes what a session reads. Called by the session's thread."""

    read_s: float  # how long one read may wait for a frame

    def wants(self, session: Session) -> bool:
        """Whether this session is still the one, and should read on."""
        ...

    def opened(self, session: Session, properties: Properties) -> None:
        """The source is open."""
        ...

    def wait_for_turn(self, session: Session) -> None:
        """Return when the next frame may be asked for."""
        ...

    def prepared(self, frame: Frame) -> Frame:
        """The frame as the backend takes it. Raises `FrameError`."""
        ...

    def accept(self, session: Session, frame: Frame) -> None:
        """Take a frame."""
        ...

    def refuse(self, session: Session, error: FrameError) -> None:
        """Take note of a frame that can't be used."""
        ...

    def wake(self) -> None:
        """The session has ended."""
        ...


class Session(threading.Thread):
    """One opening of a source, until it ends, breaks or is left behind. Opens, reads and closes it in this thread."""

    def __init__(self, name: str, reader: Reader, source: Source, base_index: int = 0, interval_s: float = 0.0) -> None:
        super().__init__(name=f"camera {name}", daemon=True)  # daemon: it may hang in a foreign library
        self.source = source
        self.base_index = base_index
        self.error: DapoEdgeError | None = None
        self.properties: Properties | None = None  # once it is open
        self.had_frames = False
        self.resumes = False  # whether its next frame is the first one after a loss
        self._announced_s = 0.0  # between two frames
        self.measured_s = interval_s
        self._reader = reader
        self._since_s = time.monotonic()  # of the silence
        self._returned_s = self._since_s  # from the library, with or without a frame
        self._busy = threading.Event()

    def run(self) -> None:
        try:
            self._read_all()
        except DapoEdgeError as error:
            self.error = error
        except Exception as error:  # a camera's library raises what it likes
            cause = redact(f"'{self.source.uri}' failed with {type(error).__name__}: {error}")
            self.error = SourceError(cause, "It is opened again by itself; look at the camera if this goes on")
        finally:
            try:
                self.source.close()
            except Exception as error:  # nothing can be done about it, and the next opening shows whether it matters
                self.error = self.error or SourceError(f"'{self.source.uri}' can't be closed ({error})", "Unplug it")
            self._reader.wake()

    def _read_all(self) -> None:
        reader, source = self._reader, self.source
        if not reader.wants(self):
            return
        source.open()
        properties = source.properties
        self._announced_s = 1 / properties.fps if properties.fps else 0.0
        reader.opened(self, properties)
        self._since_s = self._returned_s = time.monotonic()
        self.properties = properties
        while reader.wants(self):
            reader.wait_for_turn(self)
            try:
                frame = self._next()
            except FrameError as error:
                self._heard()
                reader.refuse(self, error)
                continue
            if frame is None:
                return
            self._heard()
            reader.accept(self, frame)

    def _next(self) -> Frame | None:
        """The next frame, however long it takes; None at the end, or when no more are wanted."""
        while self._reader.wants(self):
            self._returned_s = time.monotonic()
            with contextlib.suppress(FrameTimeout):
                frame = self.source.read(self._reader.read_s)
                return None if frame is None else self._reader.prepared(frame)
        return None

    @property
    def interval_s(self) -> float:
        """Between two frames: as announced or measured, whichever is longer."""
        return max(self._announced_s, self.measured_s)

    def silent_s(self, now_s: float) -> float:
        """How long the source has given nothing, while it was asked."""
        return 0.0 if self._busy.is_set() else now_s - self._since_s

    def away_s(self, now_s: float) -> float:
        """How long the library has not come back from what it was last asked."""
        return 0.0 if self._busy.is_set() else now_s - self._returned_s

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While the run holds the source back: its silence is no fault."""
        self._busy.set()
        try:
            yield
        finally:
            self._since_s = self._returned_s = time.monotonic()
            self._busy.clear()

    def _heard(self) -> None:
        now_s = time.monotonic()
        gap_s = now_s - self._since_s
        self.measured_s += 0.1 * (gap_s - self.measured_s) if self.measured_s else gap_s  # one late one is no new rate
        self._since_s = now_s
        self.had_frames = True
