"""Cameras to verdicts: capture, batch, inspect, emit, each in threads of its own with bounded queues between them.

captured = inspected + dropped + failed + in flight holds per camera at any moment; at the end nothing is in flight.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from dapo_edge.errors import FrameError, RecipeError, sources_error
from dapo_edge.runtime import accounting
from dapo_edge.runtime.accounting import Account, Counts, Stopwatch
from dapo_edge.runtime.camera import Camera, Patience
from dapo_edge.runtime.delivery import Delivery
from dapo_edge.runtime.inspector import Inspector
from dapo_edge.runtime.intake import Intake, Ticket
from dapo_edge.runtime.outcome import CameraEvent, Outcome
from dapo_edge.runtime.plan import CameraPlan, SinkPlan
from dapo_edge.runtime.sources import Source, open_source
from dapo_edge.structures import Frame, Inspection

WIND_UP_S = 0.4  # for threads to end by themselves; one that hangs in a foreign library is left behind

log = logging.getLogger(__name__)


class Pipeline:
    """One run: `run()` blocks until every source has ended or `stop()` was called; iterating over it is the same."""

    def __init__(
        self,
        inspector: Inspector,
        cameras: Sequence[CameraPlan],
        sinks: Sequence[SinkPlan] = (),
        *,
        batch_window_s: float = 0.005,
        drain_s: float = 3.5,
        patience: Patience | None = None,
        opener: Callable[[str], Source] = open_source,
    ) -> None:
        """Check the plans; nothing is opened yet. Raises `RecipeError`, and `SourceError` for unknown addresses.

        `batch_window_s`: how long the first frame of a batch waits for others. `drain_s`: after `stop()`, how long
        what was captured may take to come out. `opener` makes a source of a plan's address.
        """
        if not cameras:
            raise RecipeError("a run needs a source", "Name at least one")
        _check_unique("source", [plan.name for plan in cameras])
        _check_unique("sink", [plan.sink.name for plan in sinks])
        self.inspector = inspector
        self.patience = patience or Patience()
        self._drain_s = drain_s
        self._news = threading.Event()  # for the watchdog, which else looks up every tick
        self._clock = Stopwatch()
        self._intake = Intake(inspector.package.manifest.batch, batch_window_s)
        self._opener = opener
        self._sources = [opener(plan.uri) for plan in cameras]
        for source in self._sources:
            source.check()
        self._plans = list(cameras)
        self._sinks = list(sinks)
        self._delivery = Delivery((), "wait", self._news.set)
        self._accounts = [Account() for _ in cameras]
        self._cameras: list[Camera] = []
        self._stop_asked = self._abort_asked = False  # plain flags: a signal handler may hold no lock
        self._error: BaseException | None = None

    def stop(self) -> None:
        """End the capture; what was captured is inspected and emitted. From any thread or signal handler."""
        self._stop_asked = True

    def abort(self) -> None:
        """Drop what waits, too."""
        self._stop_asked = self._abort_asked = True

    @property
    def cameras(self) -> Sequence[Camera]:
        """The sources of the run, once it has begun."""
        return tuple(self._cameras)

    def run(self) -> None:
        """Inspect until all sources have ended.

        Raises what broke, after everything else was inspected and emitted: `SourceError` of files that break off and
        of cameras that refuse from the start, `OutputError` of sinks. `BackendError` ends the run at once.
        """
        if self._cameras:
            raise RecipeError("this run is over", "Make another Pipeline")
        self._open_all()
        self._cameras = self._made_cameras()
        self._delivery.start(self._intake.lanes)
        workers = [
            threading.Thread(target=self._work, name=f"inspect {number}", daemon=True)
            for number in range(self.inspector.backend.concurrency)
        ]
        for worker in workers:
            worker.start()
        self._clock = Stopwatch()
        for camera in self._cameras:
            camera.start()
        try:
            self._supervise(workers)
        except BaseException:
            self.abort()
            self._wind_up(workers)
            raise
        self._wind_up(workers)
        self._raise_what_broke()

    def __iter__(self) -> Iterator[Outcome]:
        """Run, and yield every result; the run waits for whoever takes them. Leaving the loop aborts the run."""
        tap = _Tap()
        self._sinks.append(SinkPlan(tap, "wait", queue=1))
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self.run()
            except BaseException as error:
                errors.append(error)
            finally:
                tap.end()

        thread = threading.Thread(target=run, name="run", daemon=True)
        thread.start()
        try:
            yield from tap.entries()
        finally:
            if thread.is_alive():
                self.abort()
                tap.leave()
            thread.join()
        if errors:
            raise errors[0]

    def counts(self) -> Counts:
        """Of all cameras."""
        return accounting.total([account.counts() for account in self._accounts])

    def as_json(self) -> dict[str, Any]:
        """Statistics at this moment, as in the summary line."""
        counts = self.counts()
        return {
            **counts.as_json(),
            "seconds": round(self._clock.seconds, 3),
            "fps": self._clock.rate(counts.inspected),
            "cameras": [self._camera_json(number) for number in range(len(self._plans))],
            "sinks": [sink.as_json() for sink in self._delivery.queues],
        }

    def _camera_json(self, number: int) -> dict[str, Any]:
        account, counts = self._accounts[number], self._accounts[number].counts()
        camera = self._cameras[number] if self._cameras else None
        return {
            "name": self._plans[number].name,
            "source": self._sources[number].uri,
            "state": camera.state if camera else "connecting",
            **({"reason": camera.reason} if camera and camera.reason else {}),
            **counts.as_json(),
            "fps": self._clock.rate(counts.inspected),
            "reconnects": camera.reconnects if camera else 0,
            "waiting_ms": account.waiting_ms(),
        }

    def _open_all(self) -> None:
        """Files and sinks: a path that is wrong shows before anything runs. Cameras may come later."""
        with contextlib.ExitStack() as undo:
            files = [source for source in self._sources if not source.reconnects]
            for source in files:
                undo.callback(source.close)
                source.open()
            for plan in self._sinks:
                plan.sink.open()
                undo.callback(plan.sink.close)
            undo.pop_all()
        paced = any(source.properties.live for source in files) or len(files) < len(self._sources)
        self._delivery = Delivery(self._sinks, "newest" if paced else "wait", self._news.set)

    def _made_cameras(self) -> list[Camera]:
        cameras = []
        for plan, source, account in zip(self._plans, self._sources, self._accounts, strict=True):
            cameras.append(
                Camera(
                    source,
                    functools.partial(self._opener, plan.uri),
                    self._intake.add(plan, account),
                    self._delivery.note,
                    host_pixels=not self.inspector.backend.takes_camera_bytes,
                    wake=self._news.set,
                    patience=self.patience,
                )
            )
        return cameras

    def _supervise(self, workers: Sequence[threading.Thread]) -> None:
        """The watchdog's loop, until the last result is delivered."""
        until_s: float | None = None
        while not self._delivery.finished:
            for camera in self._cameras:
                camera.watch()
                self._note_refusal(camera)
            if self._stop_asked and until_s is None:
                until_s = time.monotonic() + self._drain_s
                for camera in self._cameras:
                    camera.stop()
            if self._error or self._abort_asked or (until_s is not None and time.monotonic() > until_s):
                return
            if all(camera.done for camera in self._cameras):
                self._intake.close()
            if not any(worker.is_alive() for worker in workers):
                self._delivery.close()
            self._news.wait(self.patience.tick_s)
            self._news.clear()

    def _cut_off(self) -> None:
        for camera in self._cameras:
            camera.stop()
        self._intake.abort()
        self._delivery.abort()

    def _wind_up(self, workers: Sequence[threading.Thread]) -> None:
        """After the last frame: close what the run opened, as far as it does not hang."""
        self._cut_off()
        until_s = time.monotonic() + WIND_UP_S
        for worker in workers:
            worker.join(max(0.0, until_s - time.monotonic()))
        for camera in self._cameras:
            camera.join(until_s)
        for sink in self._delivery.queues:
            sink.join(until_s)
        given_up = sum(account.close() for account in self._accounts)
        if given_up:
            log.warning("%d frames were still in the engine and are counted as dropped", given_up)
        self._clock.end()

    def _note_refusal(self, camera: Camera) -> None:
        """A camera that refuses from the start ends the run: somebody must change something first."""
        error = camera.error
        if error is not None and camera.refused and self._error is None:
            self._error = error

    def _raise_what_broke(self) -> None:
        if self._error is not None:
            raise self._error
        broken = [camera.error for camera in self._cameras if camera.error is not None]
        if broken and not self._stop_asked:  # who stops a run does not want to hear of its files
            raise sources_error(broken)
        problem = self._delivery.problem()
        if problem is not None:
            raise problem

    def _work(self) -> None:
        try:
            self._inspect_all()
        except BaseException as error:
            self._error = error
        self._news.set()

    def _inspect_all(self) -> None:
        while (tickets := self._intake.take()) is not None:
            for ticket in tickets:
                if isinstance(ticket.item, Outcome):
                    self._delivery.deliver(ticket, ticket.item)
            frames = [(ticket, ticket.item) for ticket in tickets if isinstance(ticket.item, Frame)]
            if frames:
                self._inspect(frames)

    def _inspect(self, batch: Sequence[tuple[Ticket, Frame]]) -> None:
        started_s = time.monotonic()
        views = [ticket.lane.plan.views for ticket, _ in batch]
        try:
            results = self.inspector.inspect_batch([frame for _, frame in batch], views)
        except BaseException:
            for ticket, _ in batch:
                ticket.lane.account.failed()
            raise
        for (ticket, frame), result in zip(batch, results, strict=True):
            account, name = ticket.lane.account, ticket.lane.plan.name
            if isinstance(result, FrameError):
                account.failed()
                outcome = Outcome(frame.source, frame.index, frame, error=result, camera=name)
            else:
                waited_s = started_s - frame.arrived_s
                account.inspected(result.verdict, waited_s)
                outcome = Outcome(frame.source, frame.index, frame, _with_wait(result, waited_s), camera=name)
            self._delivery.deliver(ticket, outcome)


def _with_wait(inspection: Inspection, waited_s: float) -> Inspection:
    return replace(inspection, ms={"wait": waited_s * 1e3, **inspection.ms})


def _check_unique(what: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"two {what}s are called '{twice[0]}'", "Give each a name of its own")


class _Tap:
    """A sink that hands results to a loop in another thread."""

    name = "loop"
    draws = True

    def __init__(self) -> None:
        self._queue: queue.Queue[Outcome | None] = queue.Queue(maxsize=1)
        self._left = False

    def open(self) -> None:
        pass

    def write(self, outcome: Outcome) -> None:
        while not self._left:
            try:
                self._queue.put(outcome, timeout=0.1)
            except queue.Full:
                continue
            return

    def note(self, event: CameraEvent) -> None:
        pass

    def close(self) -> None:
        pass

    def end(self) -> None:
        """After the last result."""
        while not self._left:
            try:
                self._queue.put(None, timeout=0.1)
            except queue.Full:
                continue
            return

    def leave(self) -> None:
        """Nobody takes results any more."""
        self._left = True

    def entries(self) -> Iterator[Outcome]:
        """Results as they come."""
        while (entry := self._queue.get()) is not None:
            yield entry
