"""Which cameras this machine reaches, and what one of them really delivers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapo_edge.bench import percentiles
from dapo_edge.errors import DapoEdgeError, FrameError, FrameTimeout, SourceError
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.runtime.sources import Properties, Source, aravis, basler, genicam, gentl, open_source
from dapo_edge.runtime.sources.industrial import Found
from dapo_edge.structures import Frame

V4L2_NAMES = Path("/sys/class/video4linux")


@dataclass(frozen=True)
class Listing:
    """The cameras of one kind."""

    kind: str
    cameras: tuple[Found, ...]
    problem: str = ""  # why none of this kind could be looked for, and what to install for it


@dataclass(frozen=True, eq=False)
class Probe:
    """What a source delivered while it was watched."""

    properties: Properties
    opened_s: float  # seconds that opening took
    first_frame_s: float | None  # from open until the first frame; None: there was none
    watched_s: float  # seconds, opening not included
    frames: int  # that can be used
    failed: int
    lost: int  # as the camera or its driver says
    fps: float | None  # measured between the first and the last frame
    interval_ms: dict[str, float] | None  # see `bench.percentiles`; None: fewer than two frames
    latency_ms: dict[str, float] | None  # from the camera's clock until here; None: that clock is not time of day
    pixel_format: str
    last: Frame | None
    error: SourceError | None = None  # what ended it before its time
    last_failure: FrameError | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        known = self.properties
        height, width = self.last.image.shape[:2] if self.last else (None, None)
        return {
            "schema": "dapo-edge cameras probe 1",
            "uri": known.uri,
            "announced": {"width": known.width, "height": known.height, "fps": known.fps, "length": known.length},
            "live": known.live,
            "triggered": known.triggered,
            "width": width,
            "height": height,
            "pixel_format": self.pixel_format,
            "opened_s": self.opened_s,
            "first_frame_s": self.first_frame_s,
            "watched_s": self.watched_s,
            "frames": self.frames,
            "failed": self.failed,
            "lost": self.lost,
            "fps": self.fps,
            "interval_ms": self.interval_ms,
            "latency_ms": self.latency_ms,
            "error": str(self.error) if self.error else None,
            "last_failure": str(self.last_failure) if self.last_failure else None,
        }


def list_cameras(producers: Iterable[Path] = (), v4l2_names: Path = V4L2_NAMES) -> tuple[Listing, ...]:
    """All cameras that are found without knowing an address; RTSP cameras are not among them.

    `producers`: GenTL producers (.cti); none: those in GENICAM_GENTL64_PATH. Raises `SourceRefused` when one of
    `producers` can't be loaded; an SDK that is not installed is a `problem` of its kind.
    """
    given = list(producers)
    if given:
        gentl.producer_paths(given)
    finders: dict[str, Callable[[], Iterable[Found]]] = {
        "V4L2": lambda: _v4l2_cameras(v4l2_names),
        "GenICam": lambda: genicam.find_cameras(given),
        "Basler": basler.find_cameras,
        "Aravis": aravis.find_cameras,
    }
    return tuple(_listing(kind, find) for kind, find in finders.items())


def _listing(kind: str, find: Callable[[], Iterable[Found]]) -> Listing:
    try:
        return Listing(kind, tuple(find()))
    except DapoEdgeError as error:
        return Listing(kind, (), str(error))


def _v4l2_cameras(names: Path) -> list[Found]:
    """The kernel's list; what else a camera's driver offers beside pictures is in it, too."""
    numbered = [(path, path.name.removeprefix("video")) for path in names.glob("video*")]
    found = []
    for path, number in sorted(((p, int(n)) for p, n in numbered if n.isdigit()), key=lambda pair: pair[1]):
        model = _line(path / "name") or path.name
        note = "" if _line(path / "index") in ("", "0") else "another stream of the same camera, often no pictures"
        found.append(Found(f"v4l2:///dev/video{number}", model, note=note))
    return found


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def probe(uri: str, seconds: float = 5.0, frames: int | None = None) -> Probe:
    """Open a source and watch it for some time, or until `frames` have come.

    Raises what opening raises; what goes wrong afterwards is in the result.
    """
    source = open_source(uri)
    start_s = time.monotonic()
    with source:
        return _watch(source, time.monotonic() - start_s, seconds, frames)


def _watch(source: Source, opened_s: float, seconds: float, most: int | None) -> Probe:
    start_s = time.monotonic()
    arrivals: list[float] = []
    delays: list[float] = []
    failed, lost, has_clock = 0, 0, True
    last: Frame | None = None
    error: SourceError | None = None
    failure: FrameError | None = None
    while (left_s := start_s + seconds - time.monotonic()) > 0 and (most is None or len(arrivals) < most):
        try:
            frame = source.read(left_s)
        except FrameTimeout:
            continue
        except FrameError as problem:
            failed, failure = failed + 1, problem
            continue
        except SourceError as problem:
            error = problem
            break
        if frame is None:
            break
        # Not every source's timestamps are a camera's: then they would only measure this loop.
        has_clock = has_clock and source.has_camera_clock
        delays.append((time.time_ns() - frame.timestamp_ns) / 1e6)
        arrivals.append(frame.arrived_s)
        lost += frame.lost
        last = frame
    intervals = np.diff(arrivals) * 1e3
    return Probe(
        properties=source.properties,
        opened_s=opened_s,
        first_frame_s=arrivals[0] - start_s if arrivals else None,
        watched_s=time.monotonic() - start_s,
        frames=len(arrivals),
        failed=failed,
        lost=lost,
        fps=float(1e3 / intervals.mean()) if intervals.size and intervals.mean() > 0 else None,
        interval_ms=percentiles(intervals) if intervals.size else None,
        latency_ms=percentiles(np.asarray(delays)) if delays and has_clock else None,
        pixel_format=_format_of(source, last),
        last=last,
        error=error,
        last_failure=failure,
    )


def _format_of(source: Source, frame: Frame | None) -> str:
    """The camera's own name of its pixels, where it has one, else what reaches us."""
    if frame is None:
        return ""
    received = frame.pixels.format if isinstance(frame.pixels, PixelView) else "BGR8"
    return str(getattr(source, "pixel_format", "") or received)
