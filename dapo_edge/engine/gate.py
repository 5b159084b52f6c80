"""The accuracy gate: how far a compiled encoder is from eager torch, in tokens, maps and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

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


class EncodingBackend(Backend, Protocol):
    """A backend that also shows what its encoder computes."""

    def encode(self, views: Sequence[View]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Patch tokens [B, L, N, D] and image embeddings [B, D]."""
        ...


@dataclass(frozen=True)
class Drift:
    """Largest or mean differences from eager over all gate frames."""

    token_cosine_min: float
    map_difference_max: float
    map_difference_mean: float
    type_agreement: float  # share of pixels with the same type
    score_difference_max: float
    flips: float  # share of frames with another verdict
    encode_ms: float  # median on this machine


def measure_drift(
    backend: EncodingBackend,
    expected: Sequence[tuple[NDArray[np.float32], MapBatch]],
    views: Sequence[View],
    thresholds: Thresholds,
    on_frame: Callable[[], None] = lambda: None,
) -> Drift:
    """Run `backend` over `views` and compare with the eager tokens and maps in `expected`."""
    rows = []
    for view, (tokens, reference) in zip(views, expected, strict=True):
        got_tokens, _ = backend.encode([view])
        cosine = _lowest_cosine(got_tokens, tokens)
        got = backend.infer([view])
        difference = np.abs(got.anomaly - reference.anomaly)
        rows.append(
            (
                cosine,
                difference.max(),
                difference.mean(),
                (got.types == reference.types).mean(),
                np.abs(got.image_scores - reference.image_scores).max(),
                _verdict(got, thresholds) != _verdict(reference, thresholds),
                got.stage_ms["encode"],
            )
        )
        on_frame()
    table = np.asarray(rows, np.float64)
    return Drift(
        token_cosine_min=float(table[:, 0].min()),
        map_difference_max=float(table[:, 1].max()),
        map_difference_mean=float(table[:, 2].mean()),
        type_agreement=float(table[:, 3].mean()),
        score_difference_max=float(table[:, 4].max()),
        flips=float(table[:, 5].mean()),
        encode_ms=float(np.median(table[:, 6])),
    )


def check_export(drift: Drift) -> None:
    """Refuse an FP32 encoder that is not the eager one. Raises `GateError`."""
    _refuse(
        "the exported FP32 encoder",
        {
            f"patch token cosine {drift.token_cosine_min:.6f} < {FP32_MIN_COSINE}": not (
                drift.token_cosine_min >= FP32_MIN_COSINE
            ),
            f"map difference {drift.map_difference_max:.2g} > {FP32_MAX_MAP_DIFFERENCE}": not (
                drift.map_difference_max <= FP32_MAX_MAP_DIFFERENCE
            ),
        },
        "Nothing was written. Check the versions of torch, onnx and openvino against constraints.txt",
    )


def check_limits(precision: str, drift: Drift, limits: Gate) -> None:
    """Refuse a precision that leaves the recipe's limits. Raises `GateError`."""
    _refuse(
        f"precision {precision}",
        {
            f"map difference {drift.map_difference_max:.3g} > {limits.max_map_difference}": not (
                drift.map_difference_max <= limits.max_map_difference
            ),
            f"verdict flips {drift.flips:.2%} > {limits.max_flips:.2%}": not (drift.flips <= limits.max_flips),
        },
        "Nothing was written. Build with precision: fp32, or widen the limits under 'gate' if you can accept the drift",
    )


def as_json(drift: Drift) -> dict[str, Any]:
    """A drift as JSON values."""
    return asdict(drift)


def _refuse(what: str, broken: dict[str, bool], remedy: str) -> None:
    reasons = [reason for reason, holds in broken.items() if holds]
    if reasons:
        raise GateError(f"{what} failed the accuracy gate: {'; '.join(reasons)}", remedy)


def _lowest_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(axis=-1) / np.maximum(lengths, 1e-30)).min())


def _verdict(batch: MapBatch, thresholds: Thresholds) -> str:
    return decide(float(batch.image_scores[0]), float(batch.anomaly[0].max()), thresholds)
