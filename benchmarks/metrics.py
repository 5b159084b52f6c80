"""Measure the streaming metrics against the usual implementation, and write benchmarks/results/<device>/metrics.json.

    python benchmarks/metrics.py [--maps 500] [--out FILE]

The usual one keeps every pixel for scikit-learn and labels every mask again at each of 200 thresholds, as published
evaluation code does. Both see the same maps in one process, one after the other. Memory is the peak of fresh processes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from common import end_with, result_file, results_folder
from numpy.typing import NDArray

from dapo_edge.bench.provenance import provenance
from dapo_edge.evaluation.metrics import AUPRO_FPR_LIMIT, PixelMetrics
from dapo_edge.files import as_bytes, write_atomically

SIDE, STEPS = 518, 200
SCHEMA = "dapo-edge metrics 1"


def pictures(count: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Maps as a zero-shot method makes them, mostly near 0, a little right; and masks, of which 40 % are empty."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        if rng.random() >= 0.4:
            for _ in range(int(rng.integers(1, 4))):
                centre, axes = rng.integers(40, SIDE - 40, 2).tolist(), rng.integers(6, 40, 2).tolist()
                cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        noise = cv2.resize(rng.random((37, 37)).astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        seen = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 8) * rng.uniform(0.2, 1)
        yield np.clip(0.3 * noise**2 + 0.7 * seen, 0, 1), mask.astype(bool)


def streamed(count: int) -> tuple[dict[str, float], float]:
    """Metrics and seconds; making the pictures is not counted."""
    metrics, seconds = PixelMetrics(), 0.0
    for anomaly, mask in pictures(count):
        started = time.perf_counter()
        metrics.add(anomaly, mask)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    curve = metrics.curve()
    found = {
        "pixel_auroc": curve.auroc(),
        "pixel_ap": curve.average_precision(),
        "pixel_f1_max": curve.f1_max(),
        "aupro": metrics.aupro(),
    }
    return found, seconds + time.perf_counter() - started


def usual(count: int) -> tuple[dict[str, float], dict[str, float]]:
    """The same, by scikit-learn over all pixels, and by labels and regions of every mask at each of 200 thresholds."""
    from skimage import measure
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

    stacked = [np.stack(arrays) for arrays in zip(*pictures(count), strict=True)]
    maps, masks = stacked[0], stacked[1]
    started = time.perf_counter()
    truth, scores = masks.ravel().astype(int), maps.ravel()
    precision, recall, _ = precision_recall_curve(truth, scores)
    found = {
        "pixel_auroc": float(roc_auc_score(truth, scores)),
        "pixel_ap": float(average_precision_score(truth, scores)),
        "pixel_f1_max": float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()),
    }
    ranked = time.perf_counter()
    overlaps, rates = [], []
    for threshold in np.linspace(maps.min(), maps.max(), STEPS, endpoint=False):
        above = maps > threshold
        shares = [
            above[n][region.coords[:, 0], region.coords[:, 1]].sum() / region.area
            for n, mask in enumerate(masks)
            for region in measure.regionprops(measure.label(mask))
        ]
        overlaps.append(np.mean(shares))
        rates.append((above & ~masks).sum() / (~masks).sum())
    order = np.argsort(rates)
    x, y = np.asarray(rates)[order], np.asarray(overlaps)[order]
    kept = x < AUPRO_FPR_LIMIT
    found["aupro"] = float(auc(x[kept] / x[kept].max(), y[kept]))
    finished = time.perf_counter()
    return found, {"ranking_s": ranked - started, "aupro_s": finished - ranked, "all_s": finished - started}


def peak_mb(count: int) -> float:
    """Peak memory of a fresh process that streams so many maps."""
    code = f"import runpy; runpy.run_path({__file__!r})['_report_peak']({count})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _report_peak(count: int) -> None:
    streamed(count)
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--maps", type=int, default=500)
    parser.add_argument("--out", type=result_file, default=results_folder() / "metrics.json")
    arguments = parser.parse_args()
    ours, seconds = streamed(arguments.maps)
    theirs, theirs_s = usual(arguments.maps)
    memory = {str(count): peak_mb(count) for count in (200, 2000)}
    result = {
        "schema": SCHEMA,
        **provenance(sys.argv),
        "versions": {name: version(name) for name in ("scikit-learn", "scikit-image")},
        "maps": {"count": arguments.maps, "side_px": SIDE},
        "streaming": {"seconds": seconds, "ms_per_map": 1e3 * seconds / arguments.maps, "metrics": ours},
        "usual": {"seconds": theirs_s["all_s"], **theirs_s, "thresholds": STEPS, "metrics": theirs},
        "ratio": theirs_s["all_s"] / seconds,
        "peak_memory_mb": memory,
    }
    write_atomically(arguments.out, as_bytes(result))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    end_with(main)
