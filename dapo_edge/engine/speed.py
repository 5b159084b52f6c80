"""How fast each precision of one encoder is on this machine, and which of them a build should take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

from dapo_edge.backends.base import Backend, View

MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 40, 4.0
WORTHWHILE = 0.95  # of the more precise one's time: less than 5 % is no reason to be less precise


def encode_latencies(backends: Mapping[str, Backend], view: View) -> dict[str, float]:
    """Median milliseconds of the encoder of each backend, called in turn: a machine that slows down slows them all."""
    for backend in backends.values():
        backend.infer([view])
    times: dict[str, list[float]] = {name: [] for name in backends}
    end = time.monotonic() + SECONDS
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.monotonic() > end:
            break
        for name, backend in backends.items():
            times[name].append(backend.infer([view]).stage_ms["encode"])
    return {name: statistics.median(values) for name, values in times.items()}


def fastest(latencies: Mapping[str, float]) -> str:
    """The precision to take, of those that passed the gate, which come from the most to the least precise.

    A less precise one must be at least 5 % faster than the best so far.
    """
    best, *others = latencies
    for name in others:
        if latencies[name] <= WORTHWHILE * latencies[best]:
            best = name
    return best
