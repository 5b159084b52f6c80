"""What a run tells its sinks: what became of each frame, and what state each camera is in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from dapo_edge.errors import FrameError
from dapo_edge.structures import Frame, Inspection

# connecting: being opened for the first time. live: frames come. stalled: open, but silent for too long.
# lost: closed, and tried again after a while. ended: no more frames will come.
CameraState = Literal["connecting", "live", "stalled", "lost", "ended"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One captured frame: inspected, or failed with the reason."""

    source: str  # URI of the frame
    index: int | None  # within its source; None when a failed frame does not know it
    frame: Frame | None = None
    inspection: Inspection | None = None
    error: FrameError | None = None
    camera: str = ""  # name of the source in this run


@dataclass(frozen=True)
class CameraEvent:
    """A camera changed its state."""

    camera: str
    source: str  # URI without credentials
    state: CameraState
    reason: str = ""  # of a state that is not wanted
    attempt: int = 0  # how many times it was tried in vain since it was last live
    retry_s: float | None = None  # seconds until the next attempt
    timestamp_ns: int = field(default_factory=time.time_ns)  # wall clock, nanoseconds since 1970


class Sink(Protocol):
    """Where results go. Each sink has its own thread and queue in a run; its methods are called by that thread only."""

    name: str  # in statistics, unique within a run

    def open(self) -> None:
        """Get ready, so that a wrong path shows before the first frame. Called before the run by the caller's thread.

        Raises `OutputError`.
        """
        ...

    def write(self, outcome: Outcome) -> None:
        """Take one result. What it raises is counted as a failed entry; the next one is tried all the same."""
        ...

    def note(self, event: CameraEvent) -> None:
        """Take a camera's change of state."""
        ...

    def close(self) -> None:
        """Complete what was begun. Called once, after the last entry."""
        ...
