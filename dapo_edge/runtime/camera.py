"""One source of a run, kept alive: read in a thread of its own, watched, closed when it fails or hangs, opened again.

A library that hangs can't be interrupted. Its thread is left behind instead: it no longer counts, closes its source
when it comes back, and a new thread with a new source takes its place. Nothing of this touches the other cameras.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dapo_edge.errors import DapoEdgeError, DependencyMissing, FrameError, FrameTimeout, SourceError, SourceRefused
from dapo_edge.runtime.accounting import Account
from dapo_edge.runtime.intake import Lane
from dapo_edge.runtime.outcome import CameraEvent, CameraState, Outcome
from dapo_edge.runtime.pace import Pace
from dapo_edge.runtime.sources import Properties, Source
from dapo_edge.structures import Frame

MOST_LEFT_BEHIND = 3  # threads that hang in one camera's library; no more are risked until one comes back

TOLD_ATTEMPTS, TOLD_EVERY_S = 5, 60.0


@dataclass(frozen=True)
class Patience:
    """How long a camera may be silent, and how soon it is tried again. Seconds."""

    silence_s: float = 2.0  # at least; a slow camera has two of its intervals
    opening_s: float = 10.0  # an exposure, a handshake and a first key frame fit in
    first_retry_s: float = 0.1
    last_retry_s: float = 5.0
    retry_share: float = 0.2  # of the time since it was lost: a short loss costs little, a long one few attempts
    read_s: float = 0.25  # a read that waits for a frame looks up as often
    tick_s: float = 0.05  # how often the watchdog looks


class Camera:
    """A source that is read into a lane. `watch` must be called every `Patience.tick_s`, by one thread."""

    def __init__(
        self,
        source: Source,
        reopen: Callable[[], Source],
        lane: Lane,
        tell: Callable[[CameraEvent], None],
        *,
        host_pixels: bool = True,
        wake: Callable[[], None] = lambda: None,
        patience: Patience | None = None,
    ) -> None:
        """`reopen` makes a fresh source, `tell` takes every change of state, `wake` says that `watch` has work.

        `host_pixels`: a camera's own bytes are made BGR in its own thread, because the backend would have to.
        """
        self.plan = lane.plan
        self.lane = lane
        self.account: Account = lane.account
        self.uri = source.uri
        self.state: CameraState = "connecting"
        self.reason = ""  # of a state that is not wanted
        self.reconnects = 0  # times it was lost and found again
        self.error: DapoEdgeError | None = None  # what ended it for good
        self._reconnects = source.reconnects
        self._patience = patience or Patience()
        self.read_s = self._patience.read_s
        self._told_s = 0.0  # when its state was last told
        self._reopen = reopen
        self._tell = tell
        self._host_pixels = host_pixels
        self.wake = wake
        self._jitter = random.Random()
        self._lock = threading.Lock()
        self._session: _Session | None = _Session(self, source)
        self._left_behind: list[_Session] = []
        self._stopping = False
        self._pace = Pace(self.plan.fps)
        self._taken = 0  # frames of this run, to compare with the plan's limit
        self._next_index = 0
        self._lost_s: float | None = None  # when it was lost; None while all is well
        self._retry_at_s = 0.0
        self._attempts = 0  # in vain since it was last live

    def start(self) -> None:
        """Begin to open and read the source."""
        assert self._session is not None
        self._tell_state("connecting")
        self._session.start()

    def stop(self) -> None:
        """Take no more frames. Those that it holds already still go their way."""
        self._stopping = True

    @property
    def refused(self) -> bool:
        """Whether a camera ended because it can't be had as it is asked for. A file ends by its own fault, later."""
        return self.error is not None and self._reconnects

    def join(self, until_s: float) -> None:
        """Wait for its thread until a moment of the monotonic clock. One that hangs in a library is left behind."""
        session = self._session
        if session is not None and session.ident is not None:
            session.join(max(0.0, until_s - time.monotonic()))

    @property
    def done(self) -> bool:
        """Whether nothing will come any more."""
        session = self._session
        return session is None and (self.state == "ended" or self._stopping)

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping

    def watch(self) -> None:
        """See whether the source ended, broke or fell silent, and do something about it."""
        now_s = time.monotonic()
        self._left_behind = [session for session in self._left_behind if session.is_alive()]
        session = self._session
        if session is None:
            if self.state != "ended" and not self._stopping and now_s >= self._retry_at_s:
                self._try_again(now_s)
        elif not session.is_alive():
            self._conclude(session, now_s)
        elif self._stopping:
            if session.silent_s(now_s) > self._patience.read_s * 2:
                self._leave_behind(session)
        elif (limit_s := self._limit_s(session)) is not None and session.silent_s(now_s) > limit_s:
            reason = f"no frame for {limit_s:.1f} s" if session.opened else f"not open after {limit_s:.1f} s"
            self._leave_behind(session)
            self._tell_state("stalled", reason)
            self._lose(now_s, reason, session)

    # Called by the session's thread.

    def opened(self, properties: Properties) -> None:
        """Settle the policy where the plan has none: what comes at its own pace must not wait, parts must be seen."""
        if self.plan.policy is None:
            self.lane.policy = "newest" if properties.live and not properties.triggered else "wait"

    def accept(self, session: _Session, frame: Frame) -> None:
        """Take a frame that was read."""
        with self._lock:
            if session is not self._session:
                self._came_too_late(1 + frame.lost)
                return
            self._found(session)
            index = session.base_index + frame.index
            self._next_index = max(self._next_index, index + 1)
            resumed, session.resumes = session.resumes, False
            self._taken += 1
            self.account.captured(lost=frame.lost)
        if self.lane.policy == "newest" and not self._pace.lets_through(frame.arrived_s):
            self.account.dropped("policy")
            return
        if resumed or session.base_index:
            frame = replace(frame, index=index, resumed=resumed)
        with session.busy():
            self.lane.put(frame, wanted=lambda: session is self._session)

    def refuse(self, session: _Session, error: FrameError) -> None:
        """Count a frame that can't be used."""
        with self._lock:
            if session is not self._session:
                self._came_too_late(1)
                return
            self._found(session)
            index = None if error.index is None else session.base_index + error.index
            if index is not None:
                self._next_index = max(self._next_index, index + 1)
            self._taken += 1
            self.account.came_unusable()
        report = Outcome(error.source or self.uri, index, error=error, camera=self.plan.name)
        with session.busy():
            self.lane.put(report, wanted=lambda: session is self._session)

    def prepared(self, frame: Frame) -> Frame:
        """The frame as the backend takes it. Raises `FrameError`."""
        if not self._host_pixels or isinstance(frame.pixels, np.ndarray):
            return frame
        try:
            return replace(frame, pixels=frame.image)
        except Exception as error:
            cause = f"the pixels of '{frame.source}' can't be converted ({type(error).__name__}: {error})"
            raise FrameError(cause, "Ask the camera for BGR8").at(frame.index, frame.source) from error

    def wait_for_turn(self, session: _Session) -> None:
        """Hold a source back that gives frames as fast as they are asked for, and should not."""
        if self.lane.policy == "wait" and (delay_s := self._pace.delay_s()) > 0:
            with session.busy():
                while delay_s > 0 and self.wants(session):
                    time.sleep(min(delay_s, self._patience.read_s))
                    delay_s = self._pace.delay_s()

    def wants(self, session: _Session) -> bool:
        """Whether this session is still the one, and should read on."""
        return session is self._session and not self._stopping and not self._has_all

    @property
    def _has_all(self) -> bool:
        return self.plan.frames is not None and self._taken >= self.plan.frames

    def _found(self, session: _Session) -> None:
        if self.state == "live":
            return
        if self._lost_s is not None:
            self.reconnects += 1
        session.resumes = self._next_index > 0
        self._lost_s, self._attempts = None, 0
        self._tell_state("live")

    def _came_too_late(self, frames: int) -> None:
        """Of a session that was left behind: nobody waits for them any more."""
        if not self._stopping:
            self.account.never_came(frames)

    # Called by the watchdog's thread.

    def _limit_s(self, session: _Session) -> float | None:
        """How long this session may be silent; None for as long as it likes."""
        if not session.source.reconnects:
            return None
        if not session.opened:
            return self._patience.opening_s
        return None if session.triggered else max(2 * session.interval_s, self._patience.silence_s)

    def _conclude(self, session: _Session, now_s: float) -> None:
        error = session.error
        with self._lock:
            self._session = None
        if error is None or self._stopping:
            self._end(None)
        elif self._is_final(session, error):
            self._end(error)
        else:
            self._lose(now_s, error.cause, session)

    def _is_final(self, session: _Session, error: DapoEdgeError) -> bool:
        """Whether trying again is no use: for a file never, for a camera only what was wrong from the start."""
        if not session.source.reconnects or isinstance(error, DependencyMissing):
            return True
        never_seen = self._next_index == 0 and self.account.counts().captured == 0
        return never_seen and (isinstance(error, SourceRefused) or not isinstance(error, SourceError))

    def _end(self, error: DapoEdgeError | None) -> None:
        self.error = error
        self._tell_state("ended", "" if error is None else error.cause)

    def _lose(self, now_s: float, reason: str, session: _Session) -> None:
        with self._lock:
            if self._lost_s is None:
                self._lost_s = now_s
            self._attempts += 1
        patience = self._patience
        retry_s = min(max(patience.first_retry_s, patience.retry_share * (now_s - self._lost_s)), patience.last_retry_s)
        retry_s *= self._jitter.uniform(0.8, 1.0)  # cameras behind one switch must not come back all at once
        self._retry_at_s = now_s + retry_s
        self._tell_lost(now_s, reason, retry_s)

    def _try_again(self, now_s: float) -> None:
        if len(self._left_behind) >= MOST_LEFT_BEHIND:
            retry_s = self._patience.last_retry_s
            self._retry_at_s = now_s + retry_s
            self._tell_lost(now_s, f"{MOST_LEFT_BEHIND} earlier readers still hang in the camera's library", retry_s)
            return
        try:
            source = self._reopen()
        except DapoEdgeError as error:
            self._end(error)
            return
        session = _Session(self, source, self._next_index)
        with self._lock:
            self._session = session
        session.start()

    def _leave_behind(self, session: _Session) -> None:
        with self._lock:
            self._session = None
        self._left_behind.append(session)

    def _tell_lost(self, now_s: float, reason: str, retry_s: float) -> None:
        """Every attempt at first; then now and then, because a camera may be away for a weekend."""
        if self._attempts <= TOLD_ATTEMPTS or self.state != "lost" or now_s - self._told_s > TOLD_EVERY_S:
            self._told_s = now_s
            self._tell_state("lost", reason, retry_s)

    def _tell_state(self, state: CameraState, reason: str = "", retry_s: float | None = None) -> None:
        self.state, self.reason = state, reason
        self._tell(CameraEvent(self.plan.name, self.uri, state, reason, self._attempts, retry_s))


class _Session(threading.Thread):
    """One opening of a source, until it ends, breaks or is left behind. Opens, reads and closes it in this thread."""

    def __init__(self, camera: Camera, source: Source, base_index: int = 0) -> None:
        super().__init__(name=f"camera {camera.plan.name}", daemon=True)  # daemon: it may hang in a foreign library
        self.source = source
        self.base_index = base_index
        self.error: DapoEdgeError | None = None
        self.opened = False
        self.triggered = False
        self.resumes = False  # whether its next frame is the first one after a loss
        self._announced_s = self._measured_s = 0.0  # between two frames
        self._camera = camera
        self._since_s = time.monotonic()  # of the silence
        self._busy = threading.Event()

    def run(self) -> None:
        try:
            self._read_all()
        except DapoEdgeError as error:
            self.error = error
        except Exception as error:  # a camera's library raises what it likes
            cause = f"'{self.source.uri}' failed with {type(error).__name__}: {error}"
            self.error = SourceError(cause, "It is opened again by itself; look at the camera if this goes on")
        finally:
            try:
                self.source.close()
            except Exception as error:  # nothing can be done about it, and the next opening shows whether it matters
                self.error = self.error or SourceError(f"'{self.source.uri}' can't be closed ({error})", "Unplug it")
            self._camera.wake()

    def _read_all(self) -> None:
        camera, source = self._camera, self.source
        source.open()
        properties = source.properties
        self.triggered = properties.triggered
        self._announced_s = self._measured_s = 1 / properties.fps if properties.fps else 0.0
        camera.opened(properties)
        self._since_s = time.monotonic()
        self.opened = True
        while camera.wants(self):
            camera.wait_for_turn(self)
            try:
                frame = self._next()
            except FrameError as error:
                self._heard()
                camera.refuse(self, error)
                continue
            if frame is None:
                return
            self._heard()
            camera.accept(self, frame)

    def _next(self) -> Frame | None:
        """The next frame, however long it takes; None at the end, or when no more are wanted."""
        while self._camera.wants(self):
            with contextlib.suppress(FrameTimeout):
                frame = self.source.read(self._camera.read_s)
                return None if frame is None else self._camera.prepared(frame)
        return None

    @property
    def interval_s(self) -> float:
        """Between two frames: as announced or measured, whichever is longer."""
        return max(self._announced_s, self._measured_s)

    def silent_s(self, now_s: float) -> float:
        """How long the source has given nothing, while it was asked."""
        return 0.0 if self._busy.is_set() else now_s - self._since_s

    def busy(self) -> _Busy:
        """While the run holds the source back: its silence is no fault."""
        return _Busy(self)

    def _heard(self) -> None:
        now_s = time.monotonic()
        self._measured_s += 0.1 * (now_s - self._since_s - self._measured_s)  # one late frame is no new rate
        self._since_s = now_s


class _Busy:
    def __init__(self, session: _Session) -> None:
        self._session = session

    def __enter__(self) -> None:
        self._session._busy.set()

    def __exit__(self, *error: object) -> None:
        self._session._since_s = time.monotonic()
        self._session._busy.clear()
