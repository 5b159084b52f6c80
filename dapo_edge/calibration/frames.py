"""The line's own frames for INT8 calibration: from a folder, a video, any source, or generated; usable ones only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.host import resize_view
from dapo_edge.data import protocol
from dapo_edge.engine.frames import generated, spread
from dapo_edge.errors import FrameError, RecipeError, SourceError
from dapo_edge.runtime.sources import Source, open_source, redact
from dapo_edge.structures import Frame

FEWEST, ADVISED = 8, 32  # usable frames: below the first no calibration, below the second a warning
OFFERED_PER_FRAME = 3  # how many frames of a recording are looked at for each one that is wanted
BELT_FROM = 1_000_000  # views of a synthetic belt before this one are left to thresholds and gate: held out
LOWEST_CONTRAST = 1.0  # standard deviation in grey levels; a covered lens has less, the plainest part more
_CHECK = "Check calibration.frames in the recipe, or --frames"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """Frames in their order. Each `frames()` reads them again, one at a time, an unreadable one as its error."""

    source: str  # without passwords
    length: int | None  # how many frames will come; None: nobody knows
    frames: Callable[[], Iterator[Frame | FrameError]]


def calibration_frames(origin: str, count: int, seed: int, *, spare: int = 1) -> Recording:
    """At most `spare` · `count` frames spread evenly over a recording, or exactly `count` generated ones.

    `origin` is a folder, a video, the address of any source, "synthetic", or the address of a synthetic belt. Of a
    source whose length is unknown these are the first frames. Generated ones are none that thresholds or the gate see
    of the same origin. Raises `RecipeError` for a path that does not exist and `SourceError` for what can't be opened.
    """
    name = redact(origin)
    first = protocol.first_picture(protocol.CALIBRATION, seed, count)
    draw = generated(origin, good_only=False, seed=first, belt_from=BELT_FROM)
    if draw is not None:
        return Recording(name, count, lambda: (Frame(draw(index).image, index, 0, name) for index in range(count)))
    if "://" not in origin and not Path(origin).exists():
        raise RecipeError(f"the calibration frames '{name}' do not exist", _CHECK)
    most = spare * count
    if "://" not in origin and Path(origin).is_dir():
        return _of_folder(Path(origin), most)
    with open_source(origin) as source:
        length = source.properties.length
    return Recording(name, length and min(length, most), lambda: _read(origin, length, most))


def _of_folder(folder: Path, most: int) -> Recording:
    from dapo_edge.data.pictures import read_image
    from dapo_edge.runtime.sources.stills import images_in

    paths = spread(images_in(folder), most)

    def read(index: int) -> Frame | FrameError:
        try:
            return Frame(read_image(paths[index]), index, 0, str(paths[index]))
        except FrameError as error:
            return error

    return Recording(str(folder), len(paths), lambda: map(read, range(len(paths))))


def _read(origin: str, length: int | None, most: int) -> Iterator[Frame | FrameError]:
    """At most `most` frames of a source, evenly spread if its length is known, else the first ones."""
    wanted = set(range(most) if length is None else spread(range(length), most))
    with open_source(origin) as source:
        for index in range(max(wanted) + 1):
            frame = _next(source)
            if frame is None:
                return
            if index in wanted:
                yield frame
        if length is None:
            log.warning("the length of '%s' is unknown: calibration looked at its first %d frames", source.uri, most)


def _next(source: Source) -> Frame | FrameError | None:
    try:
        return source.read()
    except FrameError as error:
        return error
    except SourceError as error:
        log.warning("%s Calibration goes on with what was read before", error)
        return None


class Usable:
    """Resizes frames to the encoder's input and counts those that are of no use."""

    def __init__(self, image_size: int) -> None:
        self.offered = self.unreadable = self.constant = 0
        self._image_size = image_size

    @property
    def count(self) -> int:
        """Usable frames so far."""
        return self.offered - self.unreadable - self.constant

    def of(self, frames: Iterable[Frame | FrameError]) -> Iterator[NDArray[np.uint8]]:
        """The usable frames as views [S, S, 3] BGR; the others are named in the log and counted."""
        for frame in frames:
            self.offered += 1
            if isinstance(frame, FrameError):
                self.unreadable += 1
                log.warning("left out of calibration: %s", frame.cause)
                continue
            view = resize_view(frame.image, self._image_size)
            if view.std(axis=(0, 1)).max() < LOWEST_CONTRAST:
                self.constant += 1
                log.warning("left out of calibration: frame %d of '%s' has no contrast", frame.index, frame.source)
                continue
            yield view

    def enough_of(self, recording: Recording) -> Iterator[NDArray[np.uint8]]:
        """The usable frames of a recording; after the last one, a `RecipeError` below 8."""
        yield from self.of(recording.frames())
        found = f"'{recording.source}' gives {self.count} usable frames"
        if self.count < self.offered:
            found += f" of {self.offered} ({self.unreadable} unreadable, {self.constant} without contrast)"
        check_enough(self.count, found)


def advise(source: str, used: int) -> None:
    """Warn of ranges over few frames."""
    if used < ADVISED:
        log.warning(
            "the ranges come from %d frames of '%s': fewer than %d miss values that the line will show; use about 300",
            used,
            source,
            ADVISED,
        )


def check_enough(count: int, found: str) -> None:
    """Raise `RecipeError` for fewer frames than any calibration needs; `found` says where they are."""
    if count < FEWEST:
        raise RecipeError(f"{found}, calibration needs {FEWEST}", f"Add frames of the running line, best 300. {_CHECK}")
