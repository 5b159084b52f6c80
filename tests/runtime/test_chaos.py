"""A hundred thousand frames of everything that can go wrong: the account balances at every step, memory stays flat."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from line_fakes import FakeInspector, ScriptedCamera

from dapo_edge.errors import FrameError, SourceError
from dapo_edge.runtime.buffers import BufferPool
from dapo_edge.runtime.camera import Patience
from dapo_edge.runtime.inspector import checked_view
from dapo_edge.runtime.outcome import CameraEvent, Outcome
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan, SinkPlan
from dapo_edge.runtime.sources import SOURCES, Properties
from dapo_edge.structures import Frame

FRAMES = 100_000
CAMERAS = 4
WARM = 20_000  # frames, after which memory must not grow any more
GROWTH_BYTES = 30e6
PATIENCE = Patience(silence_s=0.03, opening_s=0.1, first_retry_s=0.001, last_retry_s=0.01, read_s=0.005, tick_s=0.002)


class ChaosCamera(ScriptedCamera):
    """`chaos://seed`: mostly frames; else exceptions, silence, odd shapes, damaged pixels, clocks that jump."""

    openings: ClassVar[list[ChaosCamera]] = []
    handed_out = 0  # frames, with those it says were lost

    def _open(self) -> Properties:
        self._random = random.Random(f"{self._address.body} {len(self.openings)}")
        self.openings.append(self)
        self._index = -1
        self._pool = BufferPool()
        if self._random.random() < 0.2:
            raise SourceError("camera in use", "wait")
        return Properties(uri=self.uri, live=True)

    def _read(self, timeout_s: float | None) -> Frame | None:
        dice = self._random.random()
        self._index += 1
        if dice < 0.0005:
            raise self._random.choice([SourceError("cable", "plug"), RuntimeError("SDK bug"), OSError("I/O")])
        if dice < 0.0008:
            time.sleep(PATIENCE.silence_s * self._random.uniform(0.5, 3))
        self.handed_out += 1
        if dice < 0.02:
            raise FrameError("incomplete buffer", "check the switch").at(self._index, self.uri)
        lost = self._random.randrange(1, 5) if dice < 0.03 else 0
        self.handed_out += lost
        return Frame(self._pixels(dice), self._index, self._timestamp_ns(dice), self.uri, lost=lost)

    def _pixels(self, dice: float) -> Any:
        if dice < 0.04:
            return np.zeros(self._random.choice([(3, 3, 3), (16, 16, 7), (0, 16, 3), (16,)]), np.uint8)
        if dice < 0.05:
            return self._random.choice([None, "torn", np.zeros((16, 16, 3), np.float32)])
        return self._pool.take((128, 128, 3))

    def _timestamp_ns(self, dice: float) -> int:
        return self._random.randrange(-(2**62), 2**62) if dice < 0.1 else time.time_ns()

    def _close(self) -> None:
        pass


class Auditor:
    """A sink that checks the books at every entry, and each camera's order."""

    name = "auditor"
    draws = False

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None
        self.last = dict.fromkeys(range(CAMERAS), -1)
        self.checks = self.inspected = self.resumed = 0
        self.warm_bytes = 0

    def open(self) -> None:
        pass

    def write(self, outcome: Outcome) -> None:
        assert self.pipeline is not None
        for account in self.pipeline._accounts:
            counts = account.counts()
            assert counts.balanced and 0 <= counts.in_flight <= 4 + 3 * 8 + 1, counts
        self.checks += 1
        self.inspected += outcome.inspection is not None
        camera = int(outcome.camera)
        assert outcome.index is not None and outcome.index > self.last[camera], "a camera's results left out of order"
        self.last[camera] = outcome.index
        self.resumed += bool(outcome.frame and outcome.frame.resumed)
        if not self.warm_bytes and self.pipeline.counts().captured > WARM:
            self.warm_bytes = resident_bytes()

    def note(self, event: CameraEvent) -> None:
        pass

    def close(self) -> None:
        pass


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def usable(frame: Frame) -> FrameError | None:
    try:
        checked_view(frame.pixels)  # type: ignore[arg-type]
    except FrameError as error:
        return error
    return None


def test_a_hundred_thousand_frames_of_random_faults() -> None:
    SOURCES["chaos"] = f"{__name__}:ChaosCamera"
    ChaosCamera.openings.clear()
    auditor = Auditor()
    plans = [
        CameraPlan(
            str(number),
            f"chaos://{number}",
            policy=("wait", "newest")[number % 2],  # type: ignore[arg-type]
            max_age_s=0.002 if number == 3 else None,
            frames=FRAMES // CAMERAS,
        )
        for number in range(CAMERAS)
    ]
    pipeline = Pipeline(
        FakeInspector(batch=8, concurrency=3, fault=usable),  # type: ignore[arg-type]
        plans,
        [SinkPlan(auditor, "wait")],
        batch_window_s=0.0005,
        patience=PATIENCE,
    )
    auditor.pipeline = pipeline
    try:
        pipeline.run()
    finally:
        del SOURCES["chaos"]
    counts = pipeline.counts()
    assert counts.balanced and counts.in_flight == 0
    assert counts.captured >= FRAMES and counts.inspected == auditor.inspected
    # A thread that hung until after the end took a last frame with it, which nobody waits for.
    handed_out = sum(camera.handed_out for camera in ChaosCamera.openings)
    assert 0 <= handed_out - counts.captured <= CAMERAS * 5
    assert min(counts.inspected, counts.failed, *(counts.dropped_by[reason] for reason in ("policy", "camera"))) > 500
    assert counts.dropped_by["stale"] > 0 and counts.dropped_by["shutdown"] == 0
    assert sum(camera.reconnects for camera in pipeline.cameras) >= 20 and auditor.resumed >= 15
    assert auditor.checks > FRAMES // 4
    assert resident_bytes() - auditor.warm_bytes <= GROWTH_BYTES
