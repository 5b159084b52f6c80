"""The accuracy gate: how far a compiled encoder is from eager torch, in tokens, maps and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.base import Backend, MapBatch, View
from dapo_edge.config import Gate
from dapo_edge.errors import GateError
from dapo_edge.package import Thresholds
from dapo_edge.runtime.decide import decide

# FP32 computes the same graph: what remains is the order of additions (design: OpenVINO against eager).
FP32_MIN_COSINE = 0.99999
FP32_MAX_MAP_DIFFERENCE = 1e-3
FP32_MAX_SCORE_DIFFERENCE = 1e-3
FP32_MIN_TYPE_AGREEMENT = 0.999


@dataclass(frozen=True)
class Drift:
    """Largest or mean differences from eager over all gate frames."""

    runs_as: str  # the arithmetic that was measured: fp32, bf16, fp16
    token_cosine_min: float
    embedding_cosine_min: float
    map_difference_max: float
    map_difference_mean: float
    type_agreement: float  # share of pixels with the same type
    score_difference_max: float
    flips: float | None  # share of frames with another verdict; None while there are no thresholds
    encode_ms: float  # median on this machine


def measure_drift(
    reference: Backend,
    backends: Mapping[str, Backend],
    views: Iterable[View],
    thresholds: Thresholds,
    on_frame: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Drift], float]:
    """Compare each backend with the reference, view by view.

    Returns the drift of each, and the reference encoder's median milliseconds.
    """
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in backends}
    reference_ms = []
    for view in views:
        tokens, embedding = reference.encode([view])
        expected = reference.infer([view])
        reference_ms.append(expected.stage_ms["encode"])
        for name, backend in backends.items():
            got_tokens, got_embedding = backend.encode([view])
            got = backend.infer([view])
            difference = np.abs(got.anomaly - expected.anomaly)
            rows[name].append(
                (
                    _lowest_cosine(got_tokens, tokens),
                    _lowest_cosine(got_embedding, embedding),
                    difference.max(),
                    difference.mean(),
                    (got.types == expected.types).mean(),
                    np.abs(got.image_scores - expected.image_scores).max(),
                    _verdict(got, thresholds) != _verdict(expected, thresholds),
                    got.stage_ms["encode"],
                )
            )
        on_frame()
    drifts = {name: _summary(backends[name].precision, rows[name], thresholds) for name in backends}
    return drifts, float(np.median(reference_ms))


def _summary(precision: str, rows: list[tuple[float, ...]], thresholds: Thresholds) -> Drift:
    table = np.asarray(rows, np.float64)
    return Drift(
        runs_as=precision,
        token_cosine_min=float(table[:, 0].min()),
        embedding_cosine_min=float(table[:, 1].min()),
        map_difference_max=float(table[:, 2].max()),
        map_difference_mean=float(table[:, 3].mean()),
        type_agreement=float(table[:, 4].mean()),
        score_difference_max=float(table[:, 5].max()),
        flips=None if thresholds.image is None else float(table[:, 6].mean()),
        encode_ms=float(np.median(table[:, 7])),
    )


def check_export(drift: Drift) -> None:
    """Refuse an FP32 encoder that is not the eager one. Raises `GateError`."""
    lowest = min(drift.token_cosine_min, drift.embedding_cosine_min)
    _refuse(
        "the exported FP32 encoder",
        {
            f"cosine of tokens or embedding {lowest:.6f} < {FP32_MIN_COSINE}": lowest >= FP32_MIN_COSINE,
            f"map difference {drift.map_difference_max:.2g} > {FP32_MAX_MAP_DIFFERENCE}": drift.map_difference_max
            <= FP32_MAX_MAP_DIFFERENCE,
            f"score difference {drift.score_difference_max:.2g} > {FP32_MAX_SCORE_DIFFERENCE}": (
                drift.score_difference_max <= FP32_MAX_SCORE_DIFFERENCE
            ),
            f"equal types {drift.type_agreement:.4f} < {FP32_MIN_TYPE_AGREEMENT}": drift.type_agreement
            >= FP32_MIN_TYPE_AGREEMENT,
        },
        "Nothing was written. Check the versions of torch, onnx and openvino against constraints.txt",
    )


def check_limits(what: str, drift: Drift, limits: Gate, remedy: str) -> None:
    """Refuse what leaves the recipe's limits. Raises `GateError`."""
    flips = drift.flips or 0.0
    _refuse(
        what,
        {
            f"map difference {drift.map_difference_max:.3g} > {limits.max_map_difference}": drift.map_difference_max
            <= limits.max_map_difference,
            f"score difference {drift.score_difference_max:.3g} > {limits.max_score_difference}": (
                drift.score_difference_max <= limits.max_score_difference
            ),
            f"verdict flips {flips:.2%} > {limits.max_flips:.2%}": flips <= limits.max_flips,
        },
        remedy,
    )


def _refuse(what: str, kept: dict[str, bool], remedy: str) -> None:
    """Each limit in words, and whether it is kept; a comparison with NaN is False, so NaN never passes."""
    reasons = [reason for reason, holds in kept.items() if not holds]
    if reasons:
        raise GateError(f"{what} failed the accuracy gate: {'; '.join(reasons)}", remedy)


def _lowest_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(axis=-1) / np.maximum(lengths, 1e-30)).min())


def _verdict(batch: MapBatch, thresholds: Thresholds) -> str:
    return decide(float(batch.image_scores[0]), float(batch.anomaly[0].max()), thresholds)
