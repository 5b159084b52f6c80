"""The accuracy gate: how far a compiled encoder is from eager torch, in tokens, maps and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
# Of any single pixel and image score, over hundreds of frames: bf16 moves one by up to 0.05, and INT8 moves them
# further before any decision changes. What overflows is far beyond.
FLOAT_LIMITS, BF16_LIMITS, INT8_LIMITS = (0.02, 0.02), (0.1, 0.1), (0.3, 0.2)
# INT8 on another machine may move the maps of the same frames by this much, where x is what it did when it was built:
# the float type beside it may be another one. Sums that saturate move them by many times x.
REPEAT_MEAN, REPEAT_MAX = (2.0, 1e-3), (2.0, 0.05)  # (factor of x, and beyond)
# Frames whose tokens are compared, too. A ViT-L at 518 px makes 17 MB of them per frame, so not those of every frame.
TOKEN_FRAMES = 16


@dataclass(frozen=True)
class Drift:
    """Largest or mean differences from eager over all gate frames."""

    runs_as: str  # the arithmetic that was measured: fp32, bf16, fp16, int8+bf16
    token_cosine_min: float
    embedding_cosine_min: float
    map_difference_max: float
    map_difference_mean: float
    type_agreement: float  # share of pixels with the same type
    score_difference_max: float
    flips: float | None  # share of frames with another verdict; None while there are no thresholds
    encode_ms: float  # median on this machine


@dataclass(frozen=True)
class Drops:
    """By how much a precision is worse than eager where the truth is known; below 0 it is better.

    None: not defined, because good or defective frames are missing.
    """

    image_auroc: float | None
    pixel_auroc: float | None
    aupro: float | None
    image_pairs: int = 0  # of one good and one defective frame each: how fine the image AUROC can be


@dataclass(frozen=True, eq=False)
class Expected:
    """What the reference made of one frame."""

    anomaly: NDArray[np.float32]  # [H, W] in [0, 1]
    types: NDArray[np.uint8]  # [H, W]
    score: float
    verdict: str
    encode_ms: float
    tokens: NDArray[np.float32] | None  # [1, L, N, D], of up to TOKEN_FRAMES frames
    embedding: NDArray[np.float32] | None  # [1, D], likewise


Found = Callable[[int, View, Expected, Mapping[str, MapBatch]], None]  # frame, and the batch of each backend


def expectations(
    reference: Backend,
    views: Sequence[View] | Iterable[View],
    count: int,
    thresholds: Thresholds,
    on_frame: Callable[[], None] = lambda: None,
) -> tuple[Expected, ...]:
    """Run the reference over `count` views once, for any number of comparisons: H x W x 5 bytes are kept of each."""
    compared = min(TOKEN_FRAMES, count)
    wanted = {place * count // compared for place in range(compared)}
    found = []
    for index, view in enumerate(views):
        batch = reference.infer([view])
        tokens, embedding = reference.encode([view]) if index in wanted else (None, None)
        found.append(
            Expected(
                anomaly=batch.anomaly[0],
                types=batch.types[0],
                score=float(batch.image_scores[0]),
                verdict=_verdict(batch, thresholds),
                encode_ms=batch.stage_ms["encode"],
                tokens=tokens,
                embedding=embedding,
            )
        )
        on_frame()
    return tuple(found)


def measure_drift(
    expected: Sequence[Expected],
    backends: Mapping[str, Backend],
    views: Iterable[View],
    thresholds: Thresholds,
    on_found: Found = lambda index, view, expected, batches: None,
) -> dict[str, Drift]:
    """Compare each backend with what the reference made of the same views, view by view."""
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in backends}
    for index, (view, truth) in enumerate(zip(views, expected, strict=True)):
        batches = {}
        for name, backend in backends.items():
            cosines = _cosines(backend, view, truth)
            got = batches[name] = backend.infer([view])
            difference = np.abs(got.anomaly[0] - truth.anomaly)
            rows[name].append(
                (
                    *cosines,
                    difference.max(),
                    difference.mean(),
                    (got.types[0] == truth.types).mean(),
                    abs(float(got.image_scores[0]) - truth.score),
                    _verdict(got, thresholds) != truth.verdict,
                    got.stage_ms["encode"],
                )
            )
        on_found(index, view, truth, batches)
    return {name: _summary(backends[name].precision, rows[name], thresholds) for name in backends}


def _cosines(backend: Backend, view: View, expected: Expected) -> tuple[float, float]:
    """Lowest cosine of the tokens and of the embedding; 1 for a frame of which they are not compared."""
    if expected.tokens is None or expected.embedding is None:
        return 1.0, 1.0
    tokens, embedding = backend.encode([view])
    return _lowest_cosine(tokens, expected.tokens), _lowest_cosine(embedding, expected.embedding)


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
    refuse(
        "the exported FP32 encoder",
        _broken(
            {
                f"cosine of tokens or embedding {lowest:.6f} < {FP32_MIN_COSINE}": lowest >= FP32_MIN_COSINE,
                f"map difference {drift.map_difference_max:.2g} > {FP32_MAX_MAP_DIFFERENCE}": drift.map_difference_max
                <= FP32_MAX_MAP_DIFFERENCE,
                f"score difference {drift.score_difference_max:.2g} > {FP32_MAX_SCORE_DIFFERENCE}": (
                    drift.score_difference_max <= FP32_MAX_SCORE_DIFFERENCE
                ),
                f"equal types {drift.type_agreement:.4f} < {FP32_MIN_TYPE_AGREEMENT}": drift.type_agreement
                >= FP32_MIN_TYPE_AGREEMENT,
            }
        ),
        "Nothing was written. Check the versions of torch, onnx and openvino against constraints.txt",
    )


def broken_limits(drift: Drift, drops: Drops | None, limits: Gate) -> tuple[str, ...]:
    """The recipe's limits that a precision leaves, each in words; none when it passes."""
    map_limit, score_limit = largest_differences(limits, drift.runs_as)
    flips = drift.flips or 0.0
    kept = {
        f"map difference {drift.map_difference_max:.3g} > {map_limit}": drift.map_difference_max <= map_limit,
        f"mean map difference {drift.map_difference_mean:.3g} > {limits.max_mean_map_difference}": (
            drift.map_difference_mean <= limits.max_mean_map_difference
        ),
        f"equal types {drift.type_agreement:.2%} < {limits.min_type_agreement:.2%}": (
            drift.type_agreement >= limits.min_type_agreement
        ),
        f"score difference {drift.score_difference_max:.3g} > {score_limit}": drift.score_difference_max <= score_limit,
        f"verdict flips {flips:.2%} > {limits.max_flips:.2%}": flips <= limits.max_flips,
    }
    drops = drops or Drops(None, None, None)
    # One good and one defective frame that change places move an AUROC of few frames further than most limits.
    auroc_limit = max(limits.max_auroc_drop, 1 / drops.image_pairs if drops.image_pairs else 0.0)
    for what, drop, limit in (
        ("image AUROC", drops.image_auroc, auroc_limit),
        ("pixel AUROC", drops.pixel_auroc, limits.max_auroc_drop),
        ("AUPRO", drops.aupro, limits.max_aupro_drop),
    ):
        if drop is not None:
            kept[f"{what} drops by {drop:.4f} > {limit:.4g}"] = drop <= limit
    return _broken(kept)


def broken_repeat(drift: Drift, report: Mapping[str, Any]) -> tuple[str, ...]:
    """What INT8 does to the package's reference frames here beyond what it did when it was built, in words.

    `report` is the package's.
    """
    try:
        built = report["quantization"]["on_reference"]
        mean, largest = float(built["map_difference_mean"]), float(built["map_difference_max"])
    except (KeyError, TypeError, ValueError):
        return ("the package's report does not say what INT8 did to its reference frames when it was built",)
    mean_limit, max_limit = REPEAT_MEAN[0] * mean + REPEAT_MEAN[1], REPEAT_MAX[0] * largest + REPEAT_MAX[1]
    return _broken(
        {
            f"mean map difference {drift.map_difference_mean:.3g} > {mean_limit:.3g}": (
                drift.map_difference_mean <= mean_limit
            ),
            f"map difference {drift.map_difference_max:.3g} > {max_limit:.3g}": drift.map_difference_max <= max_limit,
        }
    )


def largest_differences(limits: Gate, runs_as: str) -> tuple[float, float]:
    """How far any map pixel and any image score may move in an arithmetic: as the recipe says, else by default."""
    map_limit, score_limit = FLOAT_LIMITS
    if "int8" in runs_as:
        map_limit, score_limit = INT8_LIMITS
    elif "bf16" in runs_as:
        map_limit, score_limit = BF16_LIMITS
    return limits.max_map_difference or map_limit, limits.max_score_difference or score_limit


def points(drop: float) -> str:
    """A drop as people read it: signed percentage points, below 0 where it is worse."""
    return f"{round(-100 * drop, 2) + 0.0:+.2f}"  # no minus before a zero


def refuse(what: str, broken: Sequence[str], remedy: str) -> None:
    """Raise `GateError` if limits are broken."""
    if broken:
        raise GateError(f"{what} failed the accuracy gate: {'; '.join(broken)}", remedy)


def _broken(kept: Mapping[str, bool | np.bool_]) -> tuple[str, ...]:
    """Each limit in words, and whether it is kept; a comparison with NaN is False, so NaN never passes."""
    return tuple(reason for reason, holds in kept.items() if not holds)


def _lowest_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(axis=-1) / np.maximum(lengths, 1e-30)).min())


def _verdict(batch: MapBatch, thresholds: Thresholds) -> str:
    return decide(float(batch.image_scores[0]), float(batch.anomaly[0].max()), thresholds)
