"""The frames of a benchmark: drawn or read before the clock starts, read again each time, or as a camera gives them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dapo_edge.errors import FrameError, SourceError
from dapo_edge.runtime.sources import Source, open_source, redact
from dapo_edge.structures import Frame

DISTINCT_FRAMES = 16  # enough that no cache holds the answer, few enough to stay in memory
MOST_LEFT_OUT = 100  # of a camera that gives nothing else, nobody shall wait for ever
MOST_BYTES = 512 << 20  # of them: large ones would fill a small board
SILENT_S = 60.0  # for a camera to give its next frame: a triggered one waits for parts
SYNTHETIC = "synthetic://"


@dataclass(frozen=True, eq=False)
class Feed:
    """A source that was looked into."""

    uri: str  # without credentials
    full_uri: str  # with credentials: never printed
    frames: tuple[Frame, ...]  # its first ones, at least one
    live: bool  # frames come at their own pace; what was looked at is gone
    left_out: tuple[str, ...] = ()  # why others that were looked at can't be used

    @property
    def width(self) -> int:
        """Of the first frame, px."""
        return int(self.frames[0].pixels.shape[1])

    @property
    def height(self) -> int:
        """Of the first frame, px."""
        return int(self.frames[0].pixels.shape[0])

    @property
    def warnings(self) -> list[str]:
        """What its frames do to the figures."""
        found = []
        if self.left_out:
            seen = len(self.left_out) + len(self.frames)
            found.append(
                f"{len(self.left_out)} of the first {seen} frames of '{self.uri}' can't be used, "
                f"and are left out ({self.left_out[0]})"
            )
        sizes = {frame.pixels.shape[:2] for frame in self.frames}
        if len(sizes) > 1:
            found.append(f"the frames have {len(sizes)} different sizes, with which the times vary")
        return found


@dataclass(frozen=True, eq=False)
class Shot:
    """A frame in memory, and what it took to get it there."""

    frame: Frame
    capture_ms: float | None  # None: only the camera knows


def open_feed(uri: str) -> Feed:
    """Look into a source. Raises `SourceError` when it can't be opened, or has no frame that can be used."""
    frames: list[Frame] = []
    left_out: list[str] = []
    with open_source(uri) as source:
        live = source.properties.live
        most = 1 if live else DISTINCT_FRAMES
        while len(frames) < most and len(left_out) < MOST_LEFT_OUT:
            try:
                frame = source.read(SILENT_S if live else None)
            except FrameError as error:
                left_out.append(error.cause)
                continue
            if frame is None:
                break
            frames.append(frame)
            most = min(most, max(1, MOST_BYTES // frame.image.nbytes))
    if not frames:
        raise SourceError(
            f"'{redact(uri)}' has no frame that can be used", "Name a source with at least one good frame"
        )
    return Feed(redact(uri), uri, tuple(frames), live, tuple(left_out))


def shots(feed: Feed) -> Iterator[Shot]:
    """Frames without end, one whenever the last one is done with.

    Capture is, of generated frames, the copy that a driver makes of each one; of files, reading and decoding; of a
    camera whose clock is the time of day, from its timestamp to memory. Ends where a camera does; raises `SourceError`.
    """
    if feed.live:
        return _live(feed.full_uri)
    return _copied(feed.frames) if feed.full_uri.startswith(SYNTHETIC) else _read_again(feed.full_uri)


def _copied(frames: tuple[Frame, ...]) -> Iterator[Shot]:
    for frame in itertools.cycle(frames):
        started = time.perf_counter()
        fresh = replace(frame, pixels=frame.image.copy(), arrived_s=time.monotonic())
        yield Shot(fresh, (time.perf_counter() - started) * 1e3)


def _read_again(uri: str) -> Iterator[Shot]:
    while True:
        any_good = False
        with open_source(uri) as source:
            while (shot := _timed_read(source)) is not None:
                any_good = True
                yield shot
        if not any_good:
            raise SourceError(f"'{redact(uri)}' has no frame any more", "Leave its files alone while they are measured")


def _timed_read(source: Source, timeout_s: float | None = None) -> Shot | None:
    """The next frame that can be used; None at the end."""
    while True:
        started = time.perf_counter()
        try:
            frame = source.read(timeout_s)
        except FrameError:
            continue
        return None if frame is None else Shot(frame, (time.perf_counter() - started) * 1e3)


def _live(uri: str) -> Iterator[Shot]:
    with open_source(uri) as source:
        while (shot := _timed_read(source, SILENT_S)) is not None:
            known = source.has_camera_clock
            yield Shot(shot.frame, max(0.0, (time.time_ns() - shot.frame.timestamp_ns) / 1e6) if known else None)
