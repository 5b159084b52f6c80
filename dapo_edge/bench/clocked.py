"""The line runtime with a clock at its end, watched until it is done."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from dapo_edge.bench.feed import Feed
from dapo_edge.bench.latency import Emitter, Tick
from dapo_edge.bench.metronome import MemoryCamera
from dapo_edge.bench.samples import Samples
from dapo_edge.errors import FrameError, SourceError
from dapo_edge.runtime.accounting import Counts
from dapo_edge.runtime.inspector import Inspector
from dapo_edge.runtime.outcome import CameraEvent, Outcome
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan, SinkPlan
from dapo_edge.runtime.sources import Source, open_source

TICK_S = 0.05  # how often a run says how far it is
CAMERA_S = 15.0  # for a camera to be found, as long as a preview waits


class Clock:
    """A sink that writes each result's line to nowhere, and notes what became of the frame since it arrived."""

    name = "clock"
    draws = False

    def __init__(self, warm_up: int, sources: Mapping[str, MemoryCamera]) -> None:
        """`warm_up`: results that do not count. `sources`: by name, those that know what their capture took."""
        self.samples = Samples()
        self.failed = 0
        self.error: FrameError | None = None  # of the last frame that failed
        self.first_s: float | None = None  # arrival of the first frame that counts, by time.monotonic
        self.last_s = 0.0  # arrival of the last one
        self.counts: Callable[[], Counts] = Counts  # of the run, as soon as there is one
        self.before = Counts()  # when the first frame that counts was done
        self._warm_up, self._sources = warm_up, sources
        self._emitter, self._open = Emitter(), contextlib.ExitStack()
        self._seen = 0

    @property
    def done(self) -> int:
        """Frames that count."""
        return len(self.samples) + self.failed

    def open(self) -> None:
        """Open where lines go."""
        self._open.enter_context(self._emitter)

    def write(self, outcome: Outcome) -> None:
        """Time one frame."""
        emit_ms = self._emitter.emit(outcome)
        done_s = time.monotonic()
        self._seen += 1
        if self._seen <= self._warm_up:
            return
        frame, result = outcome.frame, outcome.inspection
        self.last_s = done_s if frame is None else frame.arrived_s
        if self.first_s is None:
            self.first_s, self.before = self.last_s, self.counts()
        if frame is None or result is None:
            self.failed, self.error = self.failed + 1, outcome.error
            return
        ms = dict(result.ms)
        source = self._sources.get(outcome.camera)
        if source is not None:
            ms["capture"] = source.capture_ms[frame.index]
            ms["wait"] = max(0.0, ms["wait"] - ms["capture"])
        self.samples.add({**ms, "emit": emit_ms, "total": (done_s - frame.arrived_s) * 1e3}, done_s)

    def note(self, event: CameraEvent) -> None:
        """Cameras are watched elsewhere."""

    def close(self) -> None:
        """Close it."""
        self._open.close()


class ClockedLine:
    """One run of the line runtime, its frames timed; made for one `run`."""

    def __init__(
        self,
        inspector: Inspector,
        feed: Feed,
        cameras: Sequence[CameraPlan],
        *,
        warm_up: int,
        sources: Mapping[str, MemoryCamera] | None = None,
    ) -> None:
        """`sources`: the cameras' own, by name; else they are opened by their addresses. `warm_up`: of all together."""
        self._feed = feed
        self._sources = sources or {}
        self.clock = Clock(warm_up, self._sources)
        self._pipeline = Pipeline(inspector, cameras, [SinkPlan(self.clock, "wait")], opener=self._source)
        self.clock.counts = self._pipeline.counts
        self._error: BaseException | None = None
        self.broken: SourceError | None = None  # with which the source broke off, after frames that count
        self._found_s = time.monotonic()  # when a camera was there last

    def run(self, of: int, seconds: float | None, progress: Tick) -> bool:
        """Run to the end, or for `seconds` from the first frame that counts.

        Returns whether it was cut short: by a KeyboardInterrupt, or because the source broke off. Before the first
        timed frame these are raised, as is at any time what else the line raises and what `progress` does. Raises
        `SourceError` for a camera that is not there, and when not one frame could be timed.
        """
        thread = threading.Thread(target=self._work, name="bench", daemon=True)
        self._found_s = time.monotonic()
        try:
            thread.start()
            try:
                self._watch(thread, of, seconds, progress)
            except BaseException:
                self._pipeline.abort()
                with contextlib.suppress(KeyboardInterrupt):  # again; the end only takes a moment
                    thread.join()
                thread.join()
                raise
        except KeyboardInterrupt:
            if not len(self.clock.samples):
                raise
            return True
        except SourceError as error:
            self._error = error
        if isinstance(self._error, SourceError) and len(self.clock.samples):
            self.broken = self._error
            return True
        if self._error is not None:
            raise self._error
        self._check_any()
        return False

    @property
    def dropped(self) -> dict[str, int]:
        """Frames since the first one that counts, by reason; those that the end of the run cut off are left out."""
        before, after = self.clock.before.dropped_by, self._pipeline.counts().dropped_by
        return {reason: after[reason] - before[reason] for reason in after if reason != "shutdown"}

    def _source(self, uri: str) -> Source:
        return self._sources[uri] if self._sources else open_source(uri)

    def _work(self) -> None:
        try:
            self._pipeline.run()
        except BaseException as error:
            self._error = error

    def _watch(self, thread: threading.Thread, of: int, seconds: float | None, progress: Tick) -> None:
        while thread.is_alive():
            thread.join(TICK_S)
            now_s = time.monotonic()
            progress(min(self.clock.done, of) if of else self.clock.done, of)
            if seconds is not None and self._lasted_s(now_s) >= seconds:
                self._pipeline.stop()
            self._check_camera(now_s)

    def _lasted_s(self, now_s: float) -> float:
        """Since the first frame that counts; nothing until there are two, of which a rate can be told."""
        first_s = self.clock.first_s
        return 0.0 if first_s is None or self.clock.done < 2 else now_s - first_s

    def _check_camera(self, now_s: float) -> None:
        """A run waits for a lost camera for ever; a measurement can't. Raises `SourceError`."""
        cameras = self._pipeline.cameras
        if self._sources or all(camera.state in ("live", "ended") for camera in cameras):
            self._found_s = now_s
        elif now_s - self._found_s > CAMERA_S:
            reason = next((f" ({camera.reason})" for camera in cameras if camera.reason), "")
            raise SourceError(
                f"'{self._feed.uri}' gave no frame for {CAMERA_S:g} s{reason}",
                "Look at it with: dapo-edge cameras probe",
            )

    def _check_any(self) -> None:
        clock = self.clock
        if len(clock.samples):
            return
        if clock.error is not None:
            raise SourceError(
                f"none of {clock.failed} frames can be inspected ({clock.error.cause})", clock.error.remedy
            ) from clock.error
        raise SourceError(
            f"'{self._feed.uri}' ended before the first frame that counts", "Warm up for less, or name a longer source"
        )
