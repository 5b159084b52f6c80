"""What a run tells its sinks: what became of each frame, and what state each camera is in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from dapo_edge.errors import FrameError
from dapo_edge.structures import DefectMap, Frame, Inspection

# connecting: being opened for the first time. live: frames come. stalled: open, but silent for too long.
# lost: closed, and tried again after a while. ended: no more frames will come.
CameraState = Literal["connecting", "live", "stalled", "lost", "ended"]
_NO_PIXELS = np.empty((0, 0, 3), np.uint8)
_NO_MAP, _NO_TYPES = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint8)


@dataclass(frozen=True, eq=False)
class Outcome:
    """One captured frame: inspected, or failed with the reason."""

    source: str  # URI of the frame
    index: int | None  # within its source; None when a failed frame does not know it
    frame: Frame | None = None
    inspection: Inspection | None = None
    error: FrameError | None = None
    camera: str = ""  # name of the source in this run

    @property
    def nbytes(self) -> int:
        """Of pixels and maps."""
        size = 0
        if self.frame is not None:
            pixels = self.frame.pixels
            # A frame that failed may hold anything.
            data = pixels if isinstance(pixels, np.ndarray) else getattr(pixels, "data", None)
            size += data.nbytes if isinstance(data, np.ndarray) else 0
        if self.inspection is not None:
            size += self.inspection.anomaly_map.nbytes + self.inspection.type_map.nbytes
        return size

    def without_pictures(self) -> Outcome:
        """The same result with empty pixels and maps, which little memory holds."""
        frame, inspection = self.frame, self.inspection
        if frame is not None:
            frame = replace(frame, pixels=_NO_PIXELS, truth=None)
        if inspection is not None:
            inspection = replace(inspection, defect_map=DefectMap(_NO_MAP, _NO_TYPES, inspection.types))
        return replace(self, frame=frame, inspection=inspection)


@dataclass(frozen=True)
class CameraEvent:
    """A camera changed its state."""

    camera: str
    source: str  # URI without credentials
    state: CameraState
    reason: str = ""  # of a state that is not wanted
    attempt: int = 0  # how many times it was tried in vain since it was last live for a while
    retry_s: float | None = None  # seconds until the next attempt
    timestamp_ns: int = field(default_factory=time.time_ns)  # wall clock, nanoseconds since 1970


class Sink(Protocol):
    """Where results go. Each sink has its own thread and queue in a run; its methods are called by that thread only."""

    name: str  # in statistics, unique within a run
    draws: bool  # needs pixels and maps; else its outcomes come without, and many may wait in little memory

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
