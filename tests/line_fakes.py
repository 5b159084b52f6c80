"""Cameras, an engine and a sink that do what a test tells them, for whoever tests the line."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from dapo_edge.errors import FrameError, FrameTimeout
from dapo_edge.runtime.accounting import Counts
from dapo_edge.runtime.camera import Patience
from dapo_edge.runtime.outcome import CameraEvent, Outcome
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan, SinkPlan
from dapo_edge.runtime.sources import SOURCES, Properties, Source
from dapo_edge.structures import DefectMap, Frame, Inspection

QUICK = Patience(
    silence_s=0.15, opening_s=0.3, first_retry_s=0.01, last_retry_s=0.05, steady_s=0.03, read_s=0.02, tick_s=0.005
)  # for tests: seconds become hundredths
FLAT = DefectMap(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.uint8), ("normal", "a"))

Step = Any  # an index or a frame to deliver, an error to raise, or a function that is called first and returns a step


class ScriptedSource(Source):
    """`scripted://name`: each opening plays the next of the scripts that a test put under this name.

    A script that is over is the end of the source; `None` before it waits, as a camera does that has nothing to say.
    """

    scripts: ClassVar[dict[str, Iterator[Sequence[Step]]]] = {}
    opened: ClassVar[list[ScriptedSource]] = []
    shape = (16, 16, 3)
    handed_out = 0  # frames, good and bad, with those it says were lost

    def _open(self) -> Properties:
        self.opened.append(self)
        self.closed = threading.Event()
        name = self._address.body
        script = next(self.scripts[name], ())
        self._script = iter(script)
        self._index = 0
        return self.announced()

    def announced(self) -> Properties:
        return Properties(uri=self.uri)

    def _read(self, timeout_s: float | None) -> Frame | None:
        step: Step = next(self._script, StopIteration)
        while callable(step) and step is not StopIteration:
            step = step()
        if step is StopIteration:
            return None
        if step is None:
            self.closed.wait(timeout_s)
            raise FrameTimeout("silence", "wait")
        if isinstance(step, BaseException):
            self.handed_out += isinstance(step, FrameError)
            raise step
        self.handed_out += 1
        if isinstance(step, Frame):
            self.handed_out += step.lost
            return step
        self._index = step
        return Frame(np.zeros(self.shape, np.uint8), step, step, self.uri)

    def _close(self) -> None:
        self.closed.set()


class ScriptedCamera(ScriptedSource):
    """`camera://name`: the same, live and opened again when it is lost. A script that is over leaves it silent."""

    reconnects = True

    def announced(self) -> Properties:
        return Properties(uri=self.uri, live=True)

    def _open(self) -> Properties:
        name = self._address.body
        scripts = self.scripts[name]
        properties = super()._open()
        self._script = itertools.chain(self._script, itertools.repeat(None))
        assert scripts is self.scripts[name]
        return properties


@contextlib.contextmanager
def scripted(**scripts: Sequence[Sequence[Step]]) -> Iterator[list[ScriptedSource]]:
    """Register both kinds with these scripts per name, one for each opening. Yields the sources as they are opened."""
    ScriptedSource.scripts = {name: iter(openings) for name, openings in scripts.items()}
    ScriptedSource.opened = []
    added = {
        "scripted": f"{__name__}:ScriptedSource",
        "camera": f"{__name__}:ScriptedCamera",
    }
    SOURCES.update(added)
    try:
        yield ScriptedSource.opened
    finally:
        for scheme in added:
            del SOURCES[scheme]


class FakeInspector:
    """Says `ok` to everything after `seconds`, unless `fault(frame)` returns what to raise or to report."""

    def __init__(
        self,
        *,
        batch: int = 1,
        concurrency: int = 1,
        seconds: float = 0.0,
        fault: Callable[[Frame], BaseException | None] = lambda frame: None,
    ) -> None:
        self.package = SimpleNamespace(manifest=SimpleNamespace(batch=batch))
        self.backend = SimpleNamespace(
            concurrency=concurrency, takes_camera_bytes=False, name="fake", precision="fp32", device="none"
        )
        self.seconds = seconds
        self.fault = fault
        self.batches: list[int] = []
        self.gate = threading.Event()  # cleared: the engine stands still
        self.gate.set()

    def inspect_batch(self, frames: Sequence[Frame], views: Sequence[Any]) -> list[Inspection | FrameError]:
        assert len(frames) == len(views)
        self.batches.append(len(frames))
        self.gate.wait()
        if self.seconds:
            time.sleep(self.seconds)
        results: list[Inspection | FrameError] = []
        for frame in frames:
            fault = self.fault(frame)
            if isinstance(fault, FrameError):
                results.append(fault)
            elif fault is not None:
                raise fault
            else:
                results.append(Inspection(0.1, "ok", FLAT, (), (16, 16)))
        return results


class Collector:
    """A sink that keeps what it gets."""

    draws = True

    def __init__(self, name: str = "collector", *, seconds: float = 0.0, fault: Exception | None = None) -> None:
        self.name = name
        self.seconds = seconds
        self.fault = fault
        self.outcomes: list[Outcome] = []
        self.events: list[CameraEvent] = []
        self.opened = self.closed = 0

    def open(self) -> None:
        self.opened += 1

    def write(self, outcome: Outcome) -> None:
        if self.seconds:
            time.sleep(self.seconds)
        if self.fault:
            raise self.fault
        self.outcomes.append(outcome)

    def note(self, event: CameraEvent) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1

    def states(self, camera: str) -> list[str]:
        return [event.state for event in self.events if event.camera == camera]

    def indices(self, camera: str) -> list[int | None]:
        return [outcome.index for outcome in self.outcomes if outcome.camera == camera]


def files(*names: str, **options: Any) -> list[CameraPlan]:
    return [CameraPlan(name, f"scripted://{name}", **options) for name in names]


def cameras(*names: str, **options: Any) -> list[CameraPlan]:
    return [CameraPlan(name, f"camera://{name}", **options) for name in names]


def line(engine: FakeInspector, plans: Sequence[CameraPlan], *sinks: Any, **options: Any) -> Pipeline:
    plans_of_sinks = [sink if isinstance(sink, SinkPlan) else SinkPlan(sink) for sink in sinks]
    return Pipeline(engine, plans, plans_of_sinks, **{"patience": QUICK, **options})  # type: ignore[arg-type]


def finished(pipeline: Pipeline, *, stopped: bool = False) -> Counts:
    """The account of a run that is over, compared with what the sources gave away."""
    counts = pipeline.counts()
    assert counts.balanced and counts.in_flight == 0
    assert counts.captured == sum(source.handed_out for source in ScriptedSource.opened)
    assert stopped or counts.dropped_by["shutdown"] == 0
    return counts


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


class Running:
    """A pipeline that runs beside the test."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.pipeline.run()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.pipeline.abort()
        self.end()

    def end(self) -> None:
        self.thread.join(10)
        assert not self.thread.is_alive()
