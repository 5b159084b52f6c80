"""Bench documents as a run makes them, of numbers that are drawn: for the page and the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dapo_edge.bench.samples import Samples

STAGES_MS = {"capture": 0.6, "preprocess": 2.9, "encode": 31.0, "map": 1.2, "decide": 0.4, "emit": 0.1}
NOT_THERE = {"unavailable": "no NVIDIA GPU"}


def samples(frames: int = 400, slower: float = 1.0, seed: int = 1) -> Samples:
    """Stages with a tail, and one stall in the middle."""
    rng, found, at_s = np.random.default_rng(seed), Samples(), 0.0
    for number in range(frames):
        ms = {stage: float(median * slower * rng.lognormal(0, 0.04)) for stage, median in STAGES_MS.items()}
        ms["encode"] += 60.0 if number == frames // 2 else 0.0
        ms["total"] = sum(ms.values()) + 0.3
        at_s += ms["total"] / 1e3
        found.add(ms, at_s)
    return found


def package(name: str = "pcb-line3") -> dict[str, Any]:
    return {
        "name": name,
        "digest": "9f" * 32,
        "backbone": "ViT-B-16",
        "image_size": 224,
        "map_size": [1920, 1080],
        "batch": 1,
        "defects": 18,
    }


def document(frames: int = 400, **changes: Any) -> dict[str, Any]:
    """One frame at a time on a machine without sensors, with `changes` on top."""
    found = samples(frames)
    total = found.of("total")
    seconds = float(found.done_s()[-1])
    return {
        "schema": "dapo-edge bench 2",
        "version": "0.1.0",
        "date": "2026-11-21T12:00:00+00:00",
        "command": "dapo-edge bench pcb-line3.dapo --report bench.html",
        "device": {"line": "Some CPU, 2 cores, 8 GB, Linux x86_64", "cores": 2, "l4t": None},
        "software": {"python": "3.11.7", "numpy": "2.2.6", "git": {"commit": "0123456789abcdef", "dirty": True}},
        "package": package(),
        "backend": "openvino",
        "precision": "int8",
        "source": {
            "uri": "synthetic://1920x1080@30",
            "width": 1920,
            "height": 1080,
            "distinct_frames": 16,
            "live": False,
        },
        "mode": "latency",
        "interrupted": False,
        "warm_up": {"frames": 60, "seconds": 2.4, "steady": True},
        "frames": frames,
        "failed": 0,
        "seconds": seconds,
        "fps": frames / seconds,
        "stages": found.stages(),
        "jitter_ms": {
            "std_ms": float(total.std()),
            "p99_minus_p50_ms": float(np.percentile(total, 99) - np.median(total)),
        },
        "deadline": None,
        "rate": None,
        "find_rate": None,
        "compare": None,
        "sweeps": {"batches": [], "cameras": []},
        "histogram": found.histogram(),
        "cdf": found.cdf(),
        "timeline": found.timeline(0.0),
        "power": {"unavailable": "no sensor that can be read: no energy counters of the CPU"},
        "clocks": {"cpu": {"unavailable": "this machine tells no clock of its CPU"}, "gpu": NOT_THERE},
        "temperature": {"unavailable": "this machine has no thermal zone"},
        "memory": {"host": {"before_mb": 410.0, "peak_mb": 455.5}, "device": NOT_THERE},
        "power_mode": {"unavailable": "this machine names no power mode"},
        "warnings": [],
        **changes,
    }


def sensed() -> dict[str, Any]:
    """What a machine with every sensor adds to a document."""
    timeline = document()["timeline"]
    for point in timeline:
        point |= {"power_w": 31 + point["at_s"] / 10, "clock_mhz": 1377.0, "temperature_c": 52.0, "host_mb": 455.0}
    sensor = "RAPL package-0 + NVML NVIDIA L4"
    return {
        "timeline": timeline,
        "power": {"sensor": sensor, "left_out": [], "mean_w": 31.4, "max_w": 44.0, "joules_per_frame": 1.14},
        "clocks": {
            "cpu": {"sensor": "cpufreq", "mean_mhz": 3200.0, "min_mhz": 2100.0, "max_mhz": 3400.0},
            "gpu": {"sensor": "NVML NVIDIA L4", "mean_mhz": 1377.0, "min_mhz": 1300.0, "max_mhz": 1410.0},
        },
        "temperature": {"max_c": 63.5, "sensor": "x86_pkg_temp"},
        "memory": {
            "host": {"before_mb": 410.0, "peak_mb": 455.5},
            "device": {"peak_mb": 612.0, "of": "this process"},
        },
        "power_mode": "CPU governor performance",
    }


def deadline(met: bool = True) -> dict[str, Any]:
    if met:
        return {"ms": 45.0, "misses": 1, "share": 0.0025, "met": True}
    return {"ms": 36.0, "misses": 190, "share": 0.475, "met": False}


def rate(**changes: Any) -> dict[str, Any]:
    return {
        "asked_fps": 30.0,
        "cameras": 1,
        "offered_fps": 24.9,
        "achieved_fps": 24.8,
        "captured": 400,
        "inspected": 397,
        "dropped": 2,
        "failed": 1,
        "saturated": False,
        "source_too_slow": True,
        **changes,
    }


def found_rate(fps: float | None = 21.4) -> dict[str, Any]:
    tried = ((10.0, 38.1, True), (20.0, 39.9, True), (30.0, 812.0, False), (25.0, 97.2, False), (21.4, 44.0, True))
    probes = [
        {"fps": rate, "p99_ms": p99, "misses": 0 if met else 31, "saturated": rate == 30, "met": met}
        for rate, p99, met in tried
    ]
    return {"fps": fps, "probes": probes}


def compare(name: str = "pcb-line4") -> dict[str, Any]:
    return {
        "package": package(name),
        "backend": "openvino",
        "precision": "fp32",
        "stages": samples(slower=2.2, seed=2).stages(),
        "times_faster": {"median": 2.19, "low": 2.15, "high": 2.24},
        "pairs": 400,
        "verdicts_differ": 3,
        "score_difference_max": 0.0123,
    }


def sweeps(at_a_rate: bool = True) -> dict[str, Any]:
    batches = [
        {
            "frames_per_call": count,
            "call_ms": {"p50": 30.0 * count, "p99": 33.0 * count},
            "ms_per_frame": 30.0,
            "fps": 33.3,
        }
        for count in (1, 2, 4)
    ]
    unknown = dict.fromkeys(("fps_per_camera", "offered_fps", "p50_ms", "p99_ms", "misses", "saturated"))
    known = {"fps_per_camera": 10.0, "p50_ms": 37.0, "p99_ms": 41.0, "misses": 0, "saturated": False}
    cameras = [
        {"cameras": count, "achieved_fps": 26.0, **(known | {"offered_fps": 10.0 * count} if at_a_rate else unknown)}
        for count in (1, 2, 4)
    ]
    return {"batches": batches, "cameras": cameras}


def everything(
    warnings: Sequence[str] = ("the source gave 24.9 of the 30 frames/s that were asked for",),
) -> dict[str, Any]:
    """All that a document can hold at once, which no single run asks for."""
    return document(
        **sensed(),
        mode="rate",
        deadline=deadline(),
        rate=rate(),
        find_rate=found_rate(),
        compare=compare(),
        sweeps=sweeps(),
        warnings=list(warnings),
    )
