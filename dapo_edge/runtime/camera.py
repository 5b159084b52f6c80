"""One source of a run, kept alive: read in a thread of its own, watched, closed when it fails or hangs, opened again.

A library that hangs can't be interrupted. Its thread is left behind instead: it no longer counts, closes its source
when it comes back, and a new thread with a new source takes its place. Where several of them hang, only a restart of
the program helps, and the camera's state says so. Nothing of this touches the other cameras.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dapo_edge.errors import DapoEdgeError, DependencyMissing, FrameError, SourceError, SourceRefused
from dapo_edge.runtime.accounting import Account
from dapo_edge.runtime.buffers import BufferPool
from dapo_edge.runtime.intake import Lane
from dapo_edge.runtime.outcome import CameraEvent, CameraState, Outcome
from dapo_edge.runtime.pace import Pace
from dapo_edge.runtime.session import Session
from dapo_edge.runtime.sources import Properties, Source
from dapo_edge.structures import Frame

MOST_LEFT_BEHIND = 3  # threads that hang in one camera's library; no more are risked until one comes back

TOLD_ATTEMPTS, TOLD_EVERY_S = 5, 60.0
MOST_DOUBLINGS = 3  # of the silence allowed to a camera that has not delivered yet and announces no rate


@dataclass(frozen=True)
class Patience:
    """How long a camera may be silent, and how soon it is tried again. Seconds."""

    silence_s: float = 2.0  # at least; a slow camera has two of its intervals
    opening_s: float = 10.0  # an exposure, a handshake and a first key frame fit in
    first_retry_s: float = 0.1
    last_retry_s: float = 5.0
    retry_share: float = 0.2  # of the time since it was lost: a short loss costs little, a long one few attempts
    steady_s: float = 1.0  # live for so long, it counts as found; what is lost again before is the same trouble
    read_s: float = 0.25  # a read that waits for a frame looks up as often
    tick_s: float = 0.05  # how often the watchdog looks


@dataclass
class _Trouble:
    """What a camera has been through since it was last live for a while."""

    since_s: float | None = None  # when it was lost first; None while all is well
    attempts: int = 0  # in vain
    barren: int = 0  # openings in a row without a frame
    told_s: float = 0.0  # when a loss was last told


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
        self._told: CameraState = "connecting"
        self._reopen = reopen
        self._tell = tell
        self._host_pixels = host_pixels
        self._pool = BufferPool()  # for pixels that are converted
        self.wake = wake
        self._jitter = random.Random()
        self._lock = threading.Lock()
        self._session: Session | None = Session(self.plan.name, self, source)
        self._left_behind: list[Session] = []
        self._stopping = False
        self._pace = Pace(self.plan.fps)
        self._taken = 0  # frames of this run, to compare with the plan's limit
        self._next_index = 0
        self._trouble = _Trouble()
        self._live_s = 0.0  # since when it is live
        self._retry_at_s = 0.0
        self._interval_s = 0.0  # between two frames, as last measured

    def start(self) -> None:
        """Begin to open and read the source."""
        assert self._session is not None
        self._tell_state("connecting")
        self._begin(self._session)

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
        if self.state == "live":  # one that is lost has still not been found
            self.state = "ended"

    @property
    def done(self) -> bool:
        """Whether nothing will come any more."""
        session = self._session
        return session is None and (self.state == "ended" or self._stopping)

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
        elif (reason := self._complaint(session, now_s)) is not None:
            self._leave_behind(session)
            self._tell_state("stalled", reason, told=self._trouble.attempts < TOLD_ATTEMPTS)
            self._lose(now_s, reason, session)
        elif (
            self._trouble.since_s is not None
            and self.state == "live"
            and now_s - self._live_s > self._patience.steady_s
        ):
            self._trouble.since_s, self._trouble.attempts = None, 0
            if self._told != "live":
                self._tell_state("live")

    # Called by the session's thread.

    def opened(self, session: Session, properties: Properties) -> None:
        """Settle the policy where the plan has none: what comes at its own pace must not wait, parts must be seen."""
        triggered = self._is_triggered(properties)
        if self.plan.policy is None:
            self.lane.policy = "newest" if properties.live and not triggered else "wait"
        if triggered:  # its first frame may be hours away
            with self._lock:
                if session is self._session:
                    self._found(session)

    def accept(self, session: Session, frame: Frame) -> None:
        """Take a frame that was read."""
        with self._lock:
            if session is not self._session:
                self._came_too_late(1 + frame.lost)
                return
            self._found(session)
            index = session.base_index + frame.index
            self._next_index = max(self._next_index, index + 1)
            self.account.captured(lost=frame.lost)
            if self.lane.policy == "newest" and not self._pace.lets_through(frame.arrived_s):
                self.account.dropped("policy")
                return
            resumed, session.resumes = session.resumes, False
            self._taken += 1
        if resumed or session.base_index:
            frame = replace(frame, index=index, resumed=resumed)
        with session.busy():
            self.lane.put(frame, wanted=lambda: session is self._session)

    def refuse(self, session: Session, error: FrameError) -> None:
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
            return replace(frame, pixels=frame.pixels.bgr(self._pool.take(frame.pixels.shape)))
        except Exception as error:
            cause = f"the pixels of '{frame.source}' can't be converted ({type(error).__name__}: {error})"
            raise FrameError(cause, "Ask the camera for BGR8").at(frame.index, frame.source) from error

    def wait_for_turn(self, session: Session) -> None:
        """Hold a source back that gives frames as fast as they are asked for, and should not."""
        if self.lane.policy == "wait" and (delay_s := self._pace.delay_s()) > 0:
            with session.busy():
                while delay_s > 0 and self.wants(session):
                    time.sleep(min(delay_s, self._patience.read_s))
                    delay_s = self._pace.delay_s()

    def wants(self, session: Session) -> bool:
        """Whether this session is still the one, and should read on."""
        return session is self._session and not self._stopping and not self._has_all

    @property
    def _has_all(self) -> bool:
        return self.plan.frames is not None and self._taken >= self.plan.frames

    def _found(self, session: Session) -> None:
        if self.state == "live":
            return
        if self._trouble.since_s is not None:
            self.reconnects += 1
        session.resumes = self._next_index > 0
        self._live_s, self._trouble.barren = time.monotonic(), 0
        self._tell_state("live", told=self._trouble.attempts <= TOLD_ATTEMPTS)

    def _came_too_late(self, frames: int) -> None:
        """Of a session that was left behind: nobody waits for them any more."""
        if not self._stopping:
            self.account.never_came(frames)

    # Called by the watchdog's thread.

    def _complaint(self, session: Session, now_s: float) -> str | None:
        """What is wrong with a session that has not ended, in words; None when it may go on."""
        patience, properties = self._patience, session.properties
        if not session.source.reconnects:
            return None
        if properties is None:
            return (
                f"not open after {patience.opening_s:.1f} s" if session.silent_s(now_s) > patience.opening_s else None
            )
        if self._is_triggered(properties):
            limit_s = patience.silence_s + 2 * patience.read_s
            return f"its library hangs for {limit_s:.1f} s" if session.away_s(now_s) > limit_s else None
        limit_s = self._silence_s(session, properties)
        return f"no frame for {limit_s:.1f} s" if session.silent_s(now_s) > limit_s else None

    def _is_triggered(self, properties: Properties) -> bool:
        return properties.triggered if self.plan.triggered is None else self.plan.triggered

    def _silence_s(self, session: Session, properties: Properties) -> float:
        """How long it may give nothing."""
        if self.plan.silence_s is not None:
            return self.plan.silence_s
        limit_s = max(2 * session.interval_s, self._patience.silence_s, properties.silence_s or 0.0)
        if session.had_frames or properties.fps is not None:
            return limit_s
        # It may be slower than anyone knows, so that each opening that brought nothing is followed by a longer one.
        return limit_s * 2 ** min(self._trouble.barren, MOST_DOUBLINGS)

    def _conclude(self, session: Session, now_s: float) -> None:
        error = session.error
        with self._lock:
            self._session = None
        if error is None or self._stopping:
            self._end(None)
        elif self._is_final(session, error):
            self._end(error)
        else:
            self._lose(now_s, error.cause, session)

    def _is_final(self, session: Session, error: DapoEdgeError) -> bool:
        """Whether trying again is no use: of a file always, of a camera only what its very first opening says.

        Later the same words mean that it is booting, or that somebody is working on it.
        """
        if not session.source.reconnects:
            return True
        wrong = isinstance(error, (SourceRefused, DependencyMissing)) or not isinstance(error, SourceError)
        return wrong and self._trouble.attempts == 0 and self.account.counts().captured == 0

    def _end(self, error: DapoEdgeError | None) -> None:
        self.error = error
        self._tell_state("ended", "" if error is None else error.cause)

    def _lose(self, now_s: float, reason: str, session: Session | None = None) -> None:
        if session is not None:
            self._trouble.barren += not session.had_frames
            self._interval_s = session.measured_s
        if self._trouble.since_s is None:
            self._trouble.since_s = now_s
        self._trouble.attempts += 1
        patience, lasted_s = self._patience, now_s - self._trouble.since_s
        retry_s = min(max(patience.first_retry_s, patience.retry_share * lasted_s), patience.last_retry_s)
        retry_s *= self._jitter.uniform(0.8, 1.0)  # cameras behind one switch must not come back all at once
        self._retry_at_s = now_s + retry_s
        self._tell_lost(now_s, reason, retry_s)

    def _try_again(self, now_s: float) -> None:
        if len(self._left_behind) >= MOST_LEFT_BEHIND:
            retry_s = self._patience.last_retry_s
            self._retry_at_s = now_s + retry_s
            reason = f"{MOST_LEFT_BEHIND} earlier readers still hang in the camera's library; if it goes on, restart"
            self._tell_lost(now_s, reason, retry_s)
            return
        try:
            source = self._reopen()
        except DapoEdgeError as error:
            self._lose(now_s, error.cause)
            return
        session = Session(self.plan.name, self, source, self._next_index, self._interval_s)
        with self._lock:
            self._session = session
        self._begin(session)

    def _begin(self, session: Session) -> None:
        try:
            session.start()
        except RuntimeError as error:  # the system has no thread left for now
            with self._lock:
                self._session = None
            self._lose(time.monotonic(), str(error), session)

    def _leave_behind(self, session: Session) -> None:
        with self._lock:
            self._session = None
        self._left_behind.append(session)
        if session.properties is None:
            # An opening that waits for its turn gives up. In a thread, because it may just have come through, and
            # closing then waits for a read.
            with contextlib.suppress(RuntimeError):  # no thread left; it ends by its own time limit
                threading.Thread(target=session.source.close, name=f"close {self.plan.name}", daemon=True).start()

    def _tell_lost(self, now_s: float, reason: str, retry_s: float) -> None:
        """Every attempt at first; then now and then, because a camera may be away for a weekend."""
        told = self._trouble.attempts <= TOLD_ATTEMPTS or now_s - self._trouble.told_s > TOLD_EVERY_S
        if told:
            self._trouble.told_s = now_s
        self._tell_state("lost", reason, retry_s, told=told)

    def _tell_state(
        self, state: CameraState, reason: str = "", retry_s: float | None = None, *, told: bool = True
    ) -> None:
        self.state, self.reason = state, reason
        if told:
            self._told = state
            attempts = 0 if state == "ended" else self._trouble.attempts
            self._tell(CameraEvent(self.plan.name, self.uri, state, reason, attempts, retry_s))
