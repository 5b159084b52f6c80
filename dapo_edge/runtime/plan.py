"""What a run is made of: which cameras, how their frames queue, and where results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dapo_edge.runtime.outcome import Sink

if TYPE_CHECKING:
    from dapo_edge.runtime.tiling import Views

# wait: the source is held back until there is room. newest: the oldest waiting frame makes room, and is counted.
Policy = Literal["wait", "newest"]


@dataclass(frozen=True)
class CameraPlan:
    """One source of a run."""

    name: str  # unique within the run
    uri: str  # with credentials: never printed
    policy: Policy | None = None  # None: newest for a live source, wait for files
    max_age_s: float | None = None  # a frame that waited longer is dropped as stale; None: none is
    fps: float | None = None  # at most so many frames per second are taken; None: all that come
    frames: int | None = None  # stop after so many were taken; None: at the source's end
    queue: int = 4  # frames that may wait for the engine
    views: Views | None = None  # regions and tiles; None: the whole frame at once
    silence_s: float | None = None  # how long it may give nothing; None: two intervals, and 2 s at least
    triggered: bool | None = None  # frames come when something happens, so silence is no fault; None: the source says


@dataclass(frozen=True)
class SinkPlan:
    """One sink of a run, and what happens when it is slower than the line."""

    sink: Sink
    policy: Policy | None = None  # None: wait where all sources wait for the engine, else newest, which loses entries
    queue: int = 256  # entries that may wait for the sink
    max_bytes: int = 256 << 20  # of their pixels and maps; one entry may always wait
