"""The Inspector: a package opened for work, frames in, inspections out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from dapo_edge.backends.base import Backend, View, backend_class
from dapo_edge.errors import BackendError, FrameError, RecipeError
from dapo_edge.kernels.map_spec import MapSize, check_map_size
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.package import EnginePackage, Thresholds
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.runtime.batching import Task, look_at
from dapo_edge.runtime.decide import decide, regions_of_parts
from dapo_edge.runtime.slots import Slots
from dapo_edge.runtime.tiling import Plan, Views, plan
from dapo_edge.structures import MAX_PIXELS, MIN_SIDE_PX, DefectMap, Frame, Inspection

CLOSE_S = 2.0  # for calls in hand to end

log = logging.getLogger(__name__)


class Inspector:
    """Inspects frames with an engine package. A context manager; threads may share one, and wait for their turn."""

    def __init__(
        self,
        package: EnginePackage | str | Path,
        *,
        backend: str = "openvino",
        map_size: MapSize | None = None,
        precision: str | None = None,
        throughput: bool = False,
    ) -> None:
        """Open and verify a package, and load its encoder.

        `map_size` overrides the package's: "model", "frame" or (width, height). `precision` overrides its precision.
        `throughput`: the most frames per second of several cameras, at the cost of the single frame's latency.
        """
        if not isinstance(package, (EnginePackage, str, Path)):
            raise RecipeError(
                f"a package is a path or an EnginePackage, not {package!r:.60}", "Give the path of a .dapo"
            )
        kind = backend_class(backend)
        if map_size is not None:
            check_map_size(map_size)
        package = package if isinstance(package, EnginePackage) else EnginePackage.open(package)
        size = map_size or package.manifest.map_size
        engine = kind.open(package, map_size=size, precision=precision, throughput=throughput)
        self._setup(package, engine, size)

    @classmethod
    def on(cls, package: EnginePackage, backend: Backend, *, map_size: MapSize | None = None) -> Self:
        """An inspector over a backend that is already open: the eager reference, or a fake.

        `map_size`: what the backend was opened with; None for the package's.
        """
        inspector = cls.__new__(cls)
        inspector._setup(package, backend, map_size or package.manifest.map_size)
        return inspector

    def _setup(self, package: EnginePackage, backend: Backend, map_size: MapSize) -> None:
        self.package = package
        self.backend = backend
        self.map_size: MapSize = map_size if isinstance(map_size, str) else (map_size[0], map_size[1])
        self._own_thresholds = package.thresholds()
        self.thresholds = self._own_thresholds
        self._slots = Slots(backend.concurrency)

    @property
    def max_batch(self) -> int:
        """Views that the encoder takes at a time: as many frames are worth waiting for."""
        return self.package.manifest.batch

    def inspect(self, image: Frame | PixelView | NDArray[Any], views: Views | None = None) -> Inspection:
        """Inspect one BGR image [H, W, 3] uint8 (or grey [H, W]), or a camera's own bytes: all of it, or its `views`.

        Raises `FrameError` when it can't be one, or does not hold the views.
        """
        (result,) = self.inspect_batch([image], [views])
        if isinstance(result, FrameError):
            raise result
        return result

    def inspect_batch(
        self, images: Sequence[Frame | PixelView | NDArray[Any]], views: Sequence[Views | None] | None = None
    ) -> list[Inspection | FrameError]:
        """Inspect several images in as few engine calls as there is memory for; `views` says what to look at of each.

        A frame that can't be used has its `FrameError` in its place, the others go on. All frames of one call see the
        same bank and thresholds. `ms`: of each engine stage a frame has the share of its views in the call's;
        "stitch" and "decide" are its own, and "total" is what passed from the call to its result.
        """
        started = time.perf_counter()
        if views is not None and len(views) != len(images):
            raise RecipeError(f"{len(images)} images, but {len(views)} views", "Give views for each image, or none")
        tasks = [self._task(image, wanted) for image, wanted in zip(images, views or repeat(None), strict=False)]
        with self._slots.one():
            thresholds = self.thresholds
            good = [task for task in tasks if isinstance(task, Task)]
            look_at(good, self.backend, self.package.manifest, self.map_size)
        return [task if isinstance(task, FrameError) else self._judged(task, thresholds, started) for task in tasks]

    def plan(self, views: Views, frame_size: tuple[int, int]) -> Plan:
        """What `views` cut out of frames of (width, height) px. Raises `RecipeError` where they do not fit."""
        return plan(views, frame_size, self.package.manifest.map, self.map_size)

    def set_bank(self, bank: PromptBank, thresholds: Thresholds | None = None) -> None:
        """Use other words from the next call on, from any thread; the engine stays as it is.

        Thresholds belong to words: without new ones every verdict is `unsure` until the package's own bank is back.
        """
        if not isinstance(bank, PromptBank):
            raise RecipeError(f"a prompt bank is needed, not {bank!r:.60}", "Read one with PromptBank.read(path)")
        with self._slots.all():
            self.backend.set_bank(bank)
            self.thresholds = thresholds or self._own_thresholds

    def close(self) -> None:
        """Free the engine. One that hangs is left to the end of the process: nothing can be freed under it."""
        try:
            with self._slots.all(CLOSE_S):
                self.backend.close()
        except TimeoutError:
            log.warning("the engine has not come back for %g s and stays loaded until the program ends", CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _task(self, image: Frame | PixelView | NDArray[Any], views: Views | None) -> Task | FrameError:
        try:
            frame = checked_view(image.pixels if isinstance(image, Frame) else image)
            if views is None or views.whole_frame:
                return Task(frame, None)
            height, width = frame.shape[:2]
            return Task(frame, self.plan(views, (width, height)))
        except FrameError as error:
            return error
        except RecipeError as error:  # the camera's frames have another size now
            return FrameError(error.cause, error.remedy)

    def _judged(self, task: Task, thresholds: Thresholds, started_s: float) -> Inspection:
        """Regions and verdict; `started_s` is when the call came, by `time.perf_counter`."""
        begun = time.perf_counter()
        manifest, names = self.package.manifest, task.bank.names
        found = task.frame_map(manifest.map)
        stitched = time.perf_counter()
        highest = float(found.anomaly.max())  # NaN if any pixel is
        if not (math.isfinite(highest) and math.isfinite(found.score)):
            raise BackendError(
                f"the engine returned values that are not numbers ({self.backend.name}, {self.backend.precision})",
                "Run in fp32, or build the package again: a float type overflowed or the weights are damaged",
            )
        thresholds = thresholds.for_bank(task.bank)
        limit = thresholds.pixel.value if thresholds.pixel else None
        regions = () if limit is None else regions_of_parts(found.anomaly, found.parts, names, limit, task.size)
        verdict = decide(found.score, highest, thresholds) if manifest.trained else "unsure"
        finished = time.perf_counter()
        own_ms = {"stitch": (stitched - begun) * 1e3} if task.is_cut else {}
        own_ms |= {"decide": (finished - stitched) * 1e3, "total": (finished - started_s) * 1e3}
        type_scores = dict(zip(names[1:], map(float, found.type_scores), strict=True))
        defect_map = DefectMap(found.anomaly, found.types, names)
        return Inspection(found.score, verdict, defect_map, regions, task.size, limit, task.ms | own_ms, type_scores)


def checked_view(image: PixelView | NDArray[Any]) -> View:
    """Any camera picture as BGR uint8 [H, W, 3] or as it came, or a `FrameError` that says why not."""
    if isinstance(image, PixelView):
        _check_size(*image.shape[:2])
        return image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = f"{image.dtype} array" if isinstance(image, np.ndarray) else type(image).__name__
        raise FrameError(f"a frame must be a uint8 array, not {found}", "Scale it to 0..255 first, by a fixed factor")
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise FrameError(f"a frame must be [H, W, 3] BGR or [H, W] grey, not {list(image.shape)}", "Convert it first")
    _check_size(*image.shape[:2])
    channels = image.shape[2]
    return np.repeat(image, 3, axis=2) if channels == 1 else image[:, :, :3]


def _check_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE_PX or height * width > MAX_PIXELS:
        raise FrameError(
            f"a frame of {width} x {height} px can't be inspected",
            f"Give at least {MIN_SIDE_PX} px per side and at most {MAX_PIXELS // 10**6} million pixels",
        )
