"""The Inspector: a package opened for work, one frame in, one inspection out."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from dapo_edge.backends.base import Backend, View, backend_class, type_scores
from dapo_edge.errors import BackendError, FrameError, RecipeError
from dapo_edge.kernels.map_spec import MapSize, check_map_size
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.package import EnginePackage, Thresholds
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.runtime.decide import decide, find_regions
from dapo_edge.structures import MAX_PIXELS, MIN_SIDE_PX, DefectMap, Frame, Inspection


class Inspector:
    """Inspects frames with an engine package. A context manager; threads that share one wait for each other."""

    def __init__(
        self,
        package: EnginePackage | str | Path,
        *,
        backend: str = "openvino",
        map_size: MapSize | None = None,
        precision: str | None = None,
    ) -> None:
        """Open and verify a package, and load its encoder.

        `map_size` overrides the package's: "model", "frame" or (width, height). `precision` overrides its precision.
        """
        if not isinstance(package, (EnginePackage, str, Path)):
            raise RecipeError(
                f"a package is a path or an EnginePackage, not {package!r:.60}", "Give the path of a .dapo"
            )
        kind = backend_class(backend)
        if map_size is not None:
            check_map_size(map_size)
        package = package if isinstance(package, EnginePackage) else EnginePackage.open(package)
        self._setup(package, kind.open(package, map_size=map_size or package.manifest.map_size, precision=precision))

    @classmethod
    def on(cls, package: EnginePackage, backend: Backend) -> Self:
        """An inspector over a backend that is already open: the eager reference, or a fake."""
        inspector = cls.__new__(cls)
        inspector._setup(package, backend)
        return inspector

    def _setup(self, package: EnginePackage, backend: Backend) -> None:
        self.package = package
        self.backend = backend
        self._own_thresholds = package.thresholds()
        self.thresholds = self._own_thresholds
        self._lock = threading.Lock()

    def inspect(self, image: Frame | PixelView | NDArray[Any]) -> Inspection:
        """Inspect one BGR image [H, W, 3] uint8 (or grey [H, W]), or a camera's own bytes.

        Raises `FrameError` when it can't be one.
        """
        started = time.perf_counter()
        view = checked_view(image.image if isinstance(image, Frame) else image)
        with self._lock:
            thresholds = self.thresholds
            batch = self.backend.infer([view])
        decided = time.perf_counter()
        anomaly, score = batch.anomaly[0], float(batch.image_scores[0])
        highest = float(anomaly.max())  # NaN if any pixel is
        if not (math.isfinite(highest) and math.isfinite(score)):
            raise BackendError(
                f"the engine returned values that are not numbers ({self.backend.name}, {self.backend.precision})",
                "Run in fp32, or build the package again: a float type overflowed or the weights are damaged",
            )
        size = (view.shape[1], view.shape[0])
        names = batch.bank.names
        thresholds = thresholds.for_bank(batch.bank)
        limit = thresholds.pixel.value if thresholds.pixel else None
        spec = self.package.manifest.map
        regions = () if limit is None else find_regions(anomaly, batch.patch_probs[0], names, spec, limit, size)
        verdict = decide(score, highest, thresholds) if self.package.manifest.trained else "unsure"
        finished = time.perf_counter()
        ms = {**batch.stage_ms, "decide": (finished - decided) * 1e3, "total": (finished - started) * 1e3}
        defect_map = DefectMap(anomaly, batch.types[0], names)
        return Inspection(score, verdict, defect_map, regions, size, limit, ms, type_scores(batch))

    def set_bank(self, bank: PromptBank, thresholds: Thresholds | None = None) -> None:
        """Use other words from the next frame on; the engine stays as it is.

        Thresholds belong to words: without new ones every verdict is `unsure` until the package's own bank is back.
        """
        if not isinstance(bank, PromptBank):
            raise RecipeError(f"a prompt bank is needed, not {bank!r:.60}", "Read one with PromptBank.read(path)")
        with self._lock:
            self.backend.set_bank(bank)
            self.thresholds = thresholds or self._own_thresholds

    def close(self) -> None:
        """Free the engine."""
        with self._lock:
            self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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
