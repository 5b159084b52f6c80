"""The types that cross folders: a frame goes in, an inspection comes out. All are frozen; arrays are not copied."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dapo_edge.kernels.pixels import PixelView

NORMAL = "normal"  # name of row 0 of every bank, map and truth
MIN_SIDE_PX = 16  # below this no patch of any encoder is filled: a thumbnail or a damaged header
MAX_PIXELS = 100_000_000  # 300 MB as BGR; above, one picture could take the memory of a whole device

Verdict = Literal["ok", "ng", "unsure"]
Box = tuple[int, int, int, int]  # x, y, width, height in pixels of the frame


@dataclass(frozen=True, eq=False)
class Truth:
    """What is really on a picture; only generated and labelled ones know it."""

    types: NDArray[np.uint8]  # [H, W], index into `names`
    names: tuple[str, ...]  # row 0 is NORMAL, then the defect types

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Defective pixels, [H, W] bool."""
        return self.types > 0


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and what is really on it."""

    image: NDArray[np.uint8]  # [H, W, 3] BGR
    truth: Truth

    @property
    def types(self) -> NDArray[np.uint8]:
        """[H, W] uint8: 0 is good, k is `names[k]`."""
        return self.truth.types

    @property
    def names(self) -> tuple[str, ...]:
        """Row 0 is "normal", then the defect types that were asked for, in that order."""
        return self.truth.names

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Defective pixels, [H, W] bool."""
        return self.truth.mask

    @property
    def defects(self) -> tuple[str, ...]:
        """Names of the defect types that are visible, in the order of `names`."""
        counts = np.bincount(self.types.ravel(), minlength=len(self.names))
        return tuple(name for name, count in zip(self.names[1:], counts[1:], strict=True) if count)


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a source."""

    pixels: NDArray[np.uint8] | PixelView  # [H, W, 3] BGR, or the camera's own bytes
    index: int  # counts from 0 within the source
    timestamp_ns: int  # when it was captured: wall clock, nanoseconds since 1970
    source: str  # the URI it came from
    truth: Truth | None = None
    lost: int = 0  # frames that the camera or its driver lost since the frame before this one
    resumed: bool = False  # the first one after the source was lost and found again
    arrived_s: float = field(default_factory=time.monotonic)  # on this machine's monotonic clock, which no one sets

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """[H, W, 3] uint8 BGR; a camera's own bytes are converted once, when it is first asked for."""
        return self.pixels if isinstance(self.pixels, np.ndarray) else self.pixels.bgr()


@dataclass(frozen=True, eq=False)
class DefectMap:
    """Per-pixel result at the map's own size. Row 0 of `names` is normal."""

    anomaly: NDArray[np.float32]  # [H, W] in [0, 1]: 1 - probability of normal
    types: NDArray[np.uint8]  # [H, W] index into `names`: the most probable channel
    names: tuple[str, ...]  # K + 1


@dataclass(frozen=True)
class Region:
    """One connected area above the pixel threshold, in pixels of the frame."""

    type: str
    score: float  # highest anomaly inside, in [0, 1]
    area_px: int
    box: Box


@dataclass(frozen=True, eq=False)
class Inspection:
    """What is known about one frame."""

    score: float  # image score in [0, 1]
    verdict: Verdict
    defect_map: DefectMap
    regions: tuple[Region, ...]  # most defective first
    frame_size: tuple[int, int]  # width, height in pixels
    pixel_threshold: float | None = None  # anomaly above which a pixel is defective; None: not calibrated
    ms: Mapping[str, float] = field(default_factory=dict)  # stage -> milliseconds, with "total"
    type_scores: Mapping[str, float] = field(default_factory=dict)  # defect type -> highest probability on the map

    @property
    def anomaly_map(self) -> NDArray[np.float32]:
        """[H, W] float32 in [0, 1]."""
        return self.defect_map.anomaly

    @property
    def type_map(self) -> NDArray[np.uint8]:
        """[H, W] uint8, index into `types`."""
        return self.defect_map.types

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the map's channels; the first one is normal."""
        return self.defect_map.names
