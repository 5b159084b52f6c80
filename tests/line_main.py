"""`dapo-edge` with a fake engine and cameras that behave badly, as a program: `python line_main.py run ...`.

hang://NAME?frames=N gives N frames and then hangs, deaf to everything, as a vendor's library may. slow://MS needs that
long for each frame. The engine says `ok` to all; DAPO_TEST_ENGINE_MS is its time for one batch. With
DAPO_TEST_LOADING_S it says "loading" and takes that long for it. DAPO_TEST_ENGINE=hang,fail lets it say "hanging" and
never come back from its first batch, and refuse the second one. It refuses all as soon as DAPO_TEST_FAILS_WITH exists.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from line_fakes import FakeInspector

import dapo_edge.runtime.inspector
from dapo_edge.cli import main
from dapo_edge.errors import BackendError, FrameError
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.package import Thresholds
from dapo_edge.runtime.sources import SOURCES, Properties, Source
from dapo_edge.runtime.tiling import Plan, Views, plan
from dapo_edge.structures import Frame, Inspection


class HangingCamera(Source):
    reconnects = True

    def _open(self) -> Properties:
        self._index = 0
        self._frames = int(self._address.query.partition("=")[2] or 0)
        return Properties(self.uri, 64, 48, 100.0, live=True)

    def _read(self, timeout_s: float | None) -> Frame | None:
        if self._index == self._frames:
            threading.Event().wait()
        time.sleep(0.005)
        self._index += 1
        return Frame(np.zeros((48, 64, 3), np.uint8), self._index - 1, time.time_ns(), self.uri)

    def _close(self) -> None:
        pass


class SlowCamera(HangingCamera):
    def _read(self, timeout_s: float | None) -> Frame | None:
        time.sleep(float(self._address.body) / 1e3)
        self._index += 1
        return Frame(np.zeros((48, 64, 3), np.uint8), self._index - 1, time.time_ns(), self.uri)


class Engine(FakeInspector):
    """What the command line asks of an inspector."""

    def __init__(self, package: object, **options: Any) -> None:
        if os.environ.get("DAPO_TEST_LOADING_S"):
            print("loading", file=sys.stderr, flush=True)
            time.sleep(float(os.environ["DAPO_TEST_LOADING_S"]))
        self.ways = [way for way in os.environ.get("DAPO_TEST_ENGINE", "").split(",") if way]
        seconds = float(os.environ.get("DAPO_TEST_ENGINE_MS", 0)) / 1e3
        super().__init__(seconds=seconds, concurrency=max(1, len(self.ways)))
        self.thresholds = Thresholds()
        self.max_batch = 4
        self.options = options

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def plan(self, views: Views, frame_size: tuple[int, int]) -> Plan:
        return plan(views, frame_size, MapSpec(96, (6, 6), 0.07, False, 2.0, "max"), "model")

    def inspect_batch(self, frames: Sequence[Frame], views: Sequence[Any]) -> list[Inspection | FrameError]:
        way = self.ways.pop(0) if self.ways else ""
        if way == "hang":
            print("hanging", file=sys.stderr, flush=True)
            threading.Event().wait()
        if way == "fail" or Path(os.environ.get("DAPO_TEST_FAILS_WITH", "none")).exists():
            raise BackendError("the device is gone", "Restart it")
        return super().inspect_batch(frames, views)


if __name__ == "__main__":
    SOURCES["hang"] = f"{__name__}:HangingCamera"
    SOURCES["slow"] = f"{__name__}:SlowCamera"
    dapo_edge.runtime.inspector.Inspector = Engine  # type: ignore[misc, assignment]
    main()
