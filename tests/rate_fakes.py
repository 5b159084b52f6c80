"""An engine whose times are known, for whoever tests how rates are measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from line_fakes import FakeInspector

from dapo_edge.bench.feed import Feed
from dapo_edge.errors import FrameError
from dapo_edge.runtime.sources import open_source
from dapo_edge.structures import Frame, Inspection


class Engine(FakeInspector):
    """Needs `seconds` for a frame; with `stall_s` it stands still for so long at the first frame of every second."""

    def __init__(
        self,
        seconds: float = 0.0,
        *,
        stall_s: float = 0.0,
        fault: Callable[[Frame], BaseException | None] = lambda frame: None,
    ) -> None:
        super().__init__(seconds=seconds, fault=fault)
        self.seen: list[tuple[float, int]] = []  # when a frame came to the engine, and its index
        self._stall_s = stall_s
        self._stalls_at_s = time.monotonic() + 1
        self._lock = threading.Lock()

    def inspect_batch(
        self, frames: Sequence[Frame], views: Sequence[Any] | None = None
    ) -> list[Inspection | FrameError]:
        started = time.perf_counter()
        self.seen += [(frame.arrived_s, frame.index) for frame in frames]
        with self._lock:
            if self._stall_s and time.monotonic() >= self._stalls_at_s:
                time.sleep(self._stall_s)
                self._stalls_at_s += 1
        results = super().inspect_batch(frames, views or [None] * len(frames))
        ms = (time.perf_counter() - started) * 1e3
        return [
            replace(result, ms={"encode": ms, "total": ms}) if isinstance(result, Inspection) else result
            for result in results
        ]

    def inspect(self, frame: Frame) -> Inspection:
        (result,) = self.inspect_batch([frame])
        if isinstance(result, FrameError):
            raise result
        return result


def feed(uri: str = "synthetic://", *, live: bool = False, size: str = "64x64") -> Feed:
    """Three generated pictures, said to be of `uri`."""
    with open_source(f"synthetic://{size}?frames=3") as source:
        return Feed(uri, uri, tuple(source), live)
