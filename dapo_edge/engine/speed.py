"""How fast each precision of one encoder is on this machine, and which of them a build should take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

from dapo_edge.backends.base import Backend, View

MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 40, 4.0
WORTHWHILE = 0.95  # of the more precise one's time: less than 5 % is no reason to be less precise


def encode_latencies(backends: Mapping[str, Backend], view: View) -> dict[str, float]:
    """Median milliseconds of the encoder of each backend, called in turn: a machine that slows down slows them all."""

    def encode_ms(backend: Backend) -> float:
        return backend.infer([view]).stage_ms["encode"]

    sides = {name: partial(encode_ms, backend) for name, backend in backends.items()}
    times = by_turns(sides, SECONDS, MIN_ROUNDS, MAX_ROUNDS)
    return {name: statistics.median(values) for name, values in times.items()}


def by_turns(sides: Mapping[str, Callable[[], float]], seconds: float, least: int, most: int) -> dict[str, list[float]]:
    """What each side returns in every round, after one that does not count; for `seconds`, in `least` to `most`."""
    for side in sides.values():
        side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    end = time.monotonic() + seconds
    for done in range(most):
        if done >= least and time.monotonic() > end:
            break
        for name, side in sides.items():
            found[name].append(side())
    return found


def fastest(latencies: Mapping[str, float]) -> str:
    """The precision to take, of those that passed the gate, which come from the most to the least precise.

    A less precise one must be at least 5 % faster than the best so far.
    """
    best, *others = latencies
    for name in others:
        if latencies[name] <= WORTHWHILE * latencies[best]:
            best = name
    return best
