"""A camera that needs no hardware: the belt of `dapo_edge.data.belt`, with the truth on every frame."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapo_edge.errors import FrameTimeout, RecipeError, SourceError
from dapo_edge.runtime.sources.base import Properties, Source
from dapo_edge.runtime.sources.uri import SWITCH, Option, options
from dapo_edge.structures import Frame, Picture

if TYPE_CHECKING:
    from dapo_edge.data.belt import Belt

EXAMPLE = "synthetic://640x480@30?seed=0&frames=200&realtime=1&good=0.5"
MIN_SIDE_PX = 64  # the smallest belt that shows a part
MAX_SIDE_PX = 8192
MIN_FPS, MAX_FPS = 0.01, 1000.0
MAX_COUNT = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """What the address asks for."""

    width: int = 640
    height: int = 480
    fps: float = 30.0
    seed: int = 0
    frames: int | None = None  # None: without end
    realtime: bool = False  # False: frames come as fast as they are asked for
    good: float = 0.5  # share of parts without a defect
    materials: tuple[str, ...] | None = None  # None: all
    loop: int | None = None  # so many frames are drawn and kept, then come again: the camera costs no time to draw


def _count(lowest: int, text: str) -> int:
    if not re.fullmatch("[0-9]{1,19}", text) or not lowest <= int(text) <= MAX_COUNT:
        raise ValueError(text)
    return int(text)


def _share(text: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or float(text) > 1:
        raise ValueError(text)
    return float(text)


OPTIONS = {
    "seed": Option(lambda text: _count(0, text), "a whole number from 0"),
    "frames": Option(lambda text: _count(1, text), "a whole number from 1; leave it out for no end"),
    "realtime": SWITCH,
    "good": Option(_share, "the share of good parts, from 0 to 1"),
    "loop": Option(lambda text: _count(1, text), "a whole number from 1: so many different frames, over and over"),
    "materials": Option(lambda text: tuple(text.split(",")), "names of materials with commas between, + for a space"),
}


class SyntheticSource(Source):
    """`synthetic://WIDTHxHEIGHT@FPS?seed=&frames=&realtime=&good=&materials=&loop=`, all of it optional.

    With `realtime=1` frame i comes i/FPS seconds after the first one. None is left out: a reader that is late gets
    the due ones at once. Otherwise timestamps are the moment of opening plus i/FPS.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._settings = Settings()
        self._belt: Belt | None = None
        self._drawn: dict[int, Picture] = {}
        self._index = 0
        self._start_ns = 0  # wall clock at opening
        self._due_s = 0.0  # monotonic clock of the first frame
        self._closed = threading.Event()

    def _open(self) -> Properties:
        settings = self._settings = self._parse()
        size = (settings.width, settings.height)
        self._belt = self._draw(settings.good)
        self._index, self._start_ns, self._due_s = 0, time.time_ns(), 0.0
        self._closed.clear()
        for number in range(settings.loop or 0):
            self._picture(number)
        return Properties(self.uri, *size, settings.fps, settings.frames, settings.realtime)

    def belt(self, good: float | None = None) -> Belt:
        """The belt itself, to be looked at in any order; `good` replaces the address' share of good parts."""
        self._settings = self._parse()
        return self._draw(self._settings.good if good is None else good)

    def _draw(self, good: float) -> Belt:
        from dapo_edge.data.belt import Belt
        from dapo_edge.data.materials import MATERIALS

        settings = self._settings
        size, materials = (settings.width, settings.height), settings.materials or tuple(MATERIALS)
        return Belt(size, settings.fps, seed=settings.seed, good_share=good, materials=materials)

    def _parse(self) -> Settings:
        address = self._address
        match = re.fullmatch(r"(?:([0-9]{1,6})[xX]([0-9]{1,6}))?(?:@([0-9]*\.?[0-9]+))?/?", address.body)
        if match is None:
            raise SourceError(f"'{self.uri}' gives no size that can be read", f"Write it like {EXAMPLE}")
        asked = options(self.uri, address.query, OPTIONS)
        if match[1]:
            asked |= {"width": int(match[1]), "height": int(match[2])}
        settings = Settings(**asked, fps=float(match[3] or Settings.fps))
        sides = (settings.width, settings.height)
        if min(sides) < MIN_SIDE_PX or max(sides) > MAX_SIDE_PX:
            raise SourceError(f"'{self.uri}' has a side out of range", f"Use {MIN_SIDE_PX} to {MAX_SIDE_PX} pixels")
        if not MIN_FPS <= settings.fps <= MAX_FPS:
            remedy = f"Use {MIN_FPS:g} to {MAX_FPS:g} frames per second"
            raise SourceError(f"'{self.uri}' has a frame rate out of range", remedy)
        self._check_drawable(settings)
        return settings

    def _check_drawable(self, settings: Settings) -> None:
        from dapo_edge.data.flaws import DEFECTS
        from dapo_edge.data.materials import MATERIALS
        from dapo_edge.data.surfaces import check_world

        size, materials = (settings.width, settings.height), settings.materials or tuple(MATERIALS)
        try:
            check_world(settings.seed, size, materials, tuple(DEFECTS), settings.good, max_defects=1)
        except RecipeError as error:
            raise SourceError(f"'{self.uri}' can't be drawn: {error.cause}", error.remedy) from error

    def _read(self, timeout_s: float | None) -> Frame | None:
        settings, index = self._settings, self._index
        if index == settings.frames:
            return None
        picture = self._picture(index)
        if picture is None:  # closed by another thread
            return None
        timestamp_ns = self._start_ns + round(index * 1e9 / settings.fps)
        if settings.realtime:
            if not self._wait_until_due(index, timeout_s):
                return None
            timestamp_ns = time.time_ns()
        self._index += 1
        return Frame(picture.image, index, timestamp_ns, self.uri, picture.truth)

    def _picture(self, index: int) -> Picture | None:
        """Frame `index`: drawn now, kept where it will be asked for again."""
        belt, loop = self._belt, self._settings.loop
        number = index if loop is None else index % loop
        if belt is None or number in self._drawn:
            return self._drawn.get(number)
        picture = belt.frame(number)
        if loop is None:
            self._drawn.clear()  # the one before
        self._drawn[number] = picture
        return picture

    def _wait_until_due(self, index: int, timeout_s: float | None) -> bool:
        """Wait for frame `index`; False when the source was closed meanwhile."""
        if index == 0:
            self._due_s = time.monotonic()  # after drawing the first picture, which takes longest
        wait_s = max(0.0, self._due_s + index / self._settings.fps - time.monotonic())
        if timeout_s is not None and wait_s > timeout_s:
            if self._closed.wait(timeout_s):
                return False
            raise FrameTimeout(f"'{self.uri}' gave no frame within {timeout_s:g} s", "Wait longer, or ask for more fps")
        return not self._closed.wait(wait_s)

    def _close(self) -> None:
        self._closed.set()
        self._belt = None
        self._drawn.clear()
