"""Thresholds from good parts: the lowest limit that rejects no more of them than asked, and how sure that share is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dapo_edge.package import Threshold


def threshold_at(values: Sequence[float], false_reject_rate: float) -> Threshold:
    """The limit that at most `false_reject_rate` of the good frames exceed; `values` are one per good frame.

    It lies half-way to the next higher value, so that rounding does not decide about the frame that it came from; above
    the highest value, half of the gap below it further on, but never beyond half-way to 1, the highest possible value.
    """
    falling = sorted(values, reverse=True)
    allowed = math.floor(false_reject_rate * len(falling))
    gap = falling[allowed - 1] - falling[allowed] if allowed else min(falling[0] - falling[1], 1 - falling[0])
    value = falling[allowed] + gap / 2
    above = sum(other > value for other in falling)
    return Threshold(
        value=value, false_reject_rate=above / len(falling), confidence_95=clopper_pearson(above, len(falling))
    )


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share of which `hits` out of `trials` were seen (Clopper and Pearson, 1934)."""
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _bisect(lambda share: 1 - _binomial_cdf(hits - 1, trials, share) < tail)
    high = 1.0 if hits == trials else _bisect(lambda share: _binomial_cdf(hits, trials, share) > tail)
    return low, high


def _binomial_cdf(hits: int, trials: int, share: float) -> float:
    if share <= 0:
        return 1.0
    if share >= 1:
        return float(hits >= trials)
    logs = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(share) + (trials - k) * math.log1p(-share)
        for k in range(hits + 1)
    )  # fmt: skip
    return math.fsum(math.exp(term) for term in logs)


def _bisect(below: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2
