"""Times of single frames, and what is told of them: percentiles, histogram, distribution, course over the run."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The order of a frame's way. A backend leaves out what it does not do: a CPU has no upload and no download.
STAGES = (
    "capture", "wait", "upload", "preprocess", "encode", "map", "download", "stitch", "decide", "emit", "total"
)  # fmt: skip
BINS = 60
LEAST_SPREAD_MS = 0.01  # between the first and the last edge of a histogram
WINDOWS = 120  # of a timeline: what a plot can show
SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)  # of a CDF


class Samples:
    """Milliseconds per stage of each frame, and when the frame was done."""

    def __init__(self) -> None:
        self._ms: dict[str, array[float]] = {}  # 8 bytes each: runs last for hours
        self._done_s = array("d")

    def __len__(self) -> int:
        return len(self._ms.get("total", ()))

    def add(self, ms: Mapping[str, float], done_s: float) -> None:
        """One frame's times, "total" the last; `done_s` is when it was done, by `time.monotonic`."""
        # A frame counts by its total: where Ctrl-C comes in between, what was noted of the last one belongs to none.
        self._done_s.append(done_s)
        for stage, value in ms.items():
            self._ms.setdefault(stage, array("d")).append(value)

    def of(self, stage: str) -> NDArray[np.float64]:
        """One stage's times, in the order of the frames; empty where no frame has the stage."""
        return np.array(self._ms.get(stage, ()), np.float64)

    def done_s(self) -> NDArray[np.float64]:
        """When each frame was done, by `time.monotonic`."""
        return np.array(self._done_s[: len(self)], np.float64)

    def stages(self) -> dict[str, dict[str, float]]:
        """Percentiles per stage, in the order of a frame's way; stages that nobody knows come before "total"."""
        order = {stage: place for place, stage in enumerate(STAGES)}
        names = sorted(self._ms, key=lambda name: order.get(name, len(STAGES) - 1.5))
        return {name: percentiles(self.of(name)) for name in names}

    def histogram(self) -> dict[str, list[float]]:
        """Of "total": bin edges in milliseconds (one more than counts), and counts.

        The last bin holds all above p99.9, so that one stall does not squeeze everything else into one bar.
        """
        total = self.of("total")
        top = float(np.percentile(total, 99.9))
        low = float(total.min())
        edges = np.linspace(low, max(top, low + LEAST_SPREAD_MS), BINS + 1)
        counts, _ = np.histogram(np.minimum(total, edges[-1]), edges)
        return {"edges_ms": [round(float(edge), 4) for edge in edges], "counts": [int(count) for count in counts]}

    def cdf(self) -> dict[str, list[float]]:
        """Of "total": which share of the frames took at most so many milliseconds."""
        values = np.percentile(self.of("total"), [100 * share for share in SHARES])
        return {"share": list(SHARES), "ms": [round(float(value), 4) for value in values]}

    def timeline(self, started_s: float) -> list[dict[str, Any]]:
        """Of "total" over the run, in at most `WINDOWS` equal windows: n, p50, p99 and max.

        `at_s` is a window's middle, in seconds since `started_s`. A window in which no frame was done has n 0 and no
        times: that is what a stall looks like.
        """
        done, total = self.done_s() - started_s, self.of("total")
        end = float(done.max())
        count = max(1, min(WINDOWS, len(done) // 5))
        edges = np.linspace(0, max(end, 1e-9), count + 1)
        window = np.clip(np.searchsorted(edges, done, side="left") - 1, 0, count - 1)
        points: list[dict[str, Any]] = []
        for number in range(count):
            values = total[window == number]
            point: dict[str, Any] = {"at_s": float((edges[number] + edges[number + 1]) / 2), "n": len(values)}
            if len(values):
                p50, p99 = (float(value) for value in np.percentile(values, (50, 99)))
                point |= {"p50": p50, "p99": p99, "max": float(values.max())}
            points.append(point)
        return points


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
