"""Latency per stage, with percentiles, on this machine: warm up, then time one frame at a time."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge import __version__
from dapo_edge.device import as_json, this_device
from dapo_edge.errors import FrameError, SourceError
from dapo_edge.runtime.inspector import Inspector
from dapo_edge.runtime.sources import open_source, redact
from dapo_edge.structures import Frame

SCHEMA = "dapo-edge bench 1"
DEFAULT_SOURCE = "synthetic://1920x1080@30"
DISTINCT_FRAMES = 16  # enough that no cache holds the answer, few enough to stay in memory


def bench(
    inspector: Inspector,
    source: str = DEFAULT_SOURCE,
    *,
    frames: int = 200,
    warmup: int = 20,
    on_frame: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Time `frames` inspections of frames that are already in memory; the design's bench document.

    "total" is the caller's whole wait from frame to inspection. Raises `SourceError` when the source has no frame.
    """
    pictures = _pictures(source)
    endless = itertools.cycle(pictures)
    for _ in range(warmup):
        inspector.inspect(next(endless))
    timings: dict[str, list[float]] = {}
    for done in range(frames):
        for stage, ms in inspector.inspect(next(endless)).ms.items():
            timings.setdefault(stage, []).append(ms)
        on_frame(done + 1, frames)
    stages = {stage: percentiles(np.asarray(values)) for stage, values in timings.items()}
    height, width = pictures[0].image.shape[:2]
    manifest = inspector.package.manifest
    return {
        "schema": SCHEMA,
        "version": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": as_json(this_device()),
        "package": {
            "name": manifest.name,
            "digest": inspector.package.digest,
            "backbone": manifest.backbone,
            "image_size": manifest.image_size,
            "map_size": manifest.map_size,
        },
        "backend": inspector.backend.name,
        "precision": inspector.backend.precision,
        "source": {"uri": redact(source), "width": width, "height": height, "distinct_frames": len(pictures)},
        "warmup": warmup,
        "stages": stages,
        "fps": 1e3 / stages["total"]["mean"],
    }


def percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    """n, mean, std, min, p50, p90, p95, p99, max of a series of milliseconds."""
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, (50, 90, 95, 99)))
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "max": float(values.max()),
    }


def _pictures(uri: str) -> list[Frame]:
    pictures: list[Frame] = []
    with open_source(uri) as source:
        while len(pictures) < DISTINCT_FRAMES:
            try:
                frame = source.read()
            except FrameError:
                continue
            if frame is None:
                break
            pictures.append(frame)
    if not pictures:
        raise SourceError(
            f"'{redact(uri)}' has no frame that can be used", "Name a source with at least one good frame"
        )
    return pictures
