"""How an encoder is quantised: range estimator, migration and kept Linears, chosen by what they do to the maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.onnx_graph import PlainGraph
from dapo_edge.backends.onnx_linears import ROLES, Linear, block_name, find_linears, weights_digest
from dapo_edge.backends.onnx_quantized import for_cpu
from dapo_edge.calibration.histograms import ESTIMATORS
from dapo_edge.calibration.ranges import ActivationRanges
from dapo_edge.config import Calibration
from dapo_edge.engine.sensitivity import MapDifference, MapMeter
from dapo_edge.errors import RecipeError, did_you_mean
from dapo_edge.extras import require
from dapo_edge.quantization import Quantization

ALPHAS = (0.4, 0.5, 0.6, 0.7, 0.8)  # SmoothQuant found its best between these
ASKED_FOR = "asked for in the recipe"

_NEVER = {"Conv": "patch embedding", "LayerNormalization": "LayerNorms", "Softmax": "softmaxes"}
_WHY = {
    "patch embedding": "errors in it reach every token",
    "residual sums": "they hold the largest outliers: quantising them ruins ViTs",
    "LayerNorms": "statistics of outliers need the digits",
    "softmaxes": "small probabilities would vanish",
    "attention products": "attention fuses into one kernel in float, and rarely in INT8",
    "adapters and projection": "they end in the defect map itself, and cost little",
}

# A channel that hardly moved on the calibration frames may move on the line, so it is not blown up without bound.
_QUIETEST = 1e-3  # of the largest channel


@dataclass(frozen=True)
class Trial:
    """One way to quantise the whole encoder, and what it does to the maps of the search frames."""

    estimator: str  # one of histograms.ESTIMATORS
    alpha: float  # of the migration, 0 = none
    difference: MapDifference


@dataclass(frozen=True, eq=False)
class Search:
    """The best way that was found."""

    quantization: Quantization
    encoder: bytes  # for OpenVINO
    trials: tuple[Trial, ...]  # all that were tried, in order


def quantization_of(
    graph: PlainGraph, ranges: ActivationRanges, estimator: str, alpha: float, keep: Sequence[str] = ()
) -> Quantization:
    """Quantise every Linear but the kept ones, with ranges by `estimator` and migration of strength `alpha`, 0..1.

    `estimator` is one of `histograms.ESTIMATORS`; `keep` names blocks (block3) or Linears (block3.fc1). Raises
    `RecipeError` for names that the encoder has not.
    """
    linears = find_linears(graph)
    kept = dict.fromkeys(kept_names(linears, keep), ASKED_FOR)
    chosen: dict[str, float] = {}
    migrations: dict[str, NDArray[np.float32]] = {}
    for linear in linears:
        if linear.name in kept:
            continue
        seen = ranges.linears[linear.name]
        limit = seen.estimates[estimator]
        if alpha > 0 and seen.channels is not None:  # nothing before fc2 could be divided
            migration = migration_of(seen.channel_max, _weight(graph, linear), alpha)
            migrations[linear.name] = migration
            limit = migrated_range(limit, seen.channel_max, migration)
        chosen[linear.name] = limit
    settings = {"estimator": estimator, "alpha": alpha}
    return Quantization(chosen, migrations, kept, weights_digest(graph), settings)


def migration_of(channels: NDArray[np.float32], weight: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    """m [in] that moves outliers from activations x / m into the weight m · W [in, out].

    m_j = max|x_j|^alpha / max|W_j|^(1 - alpha) (SmoothQuant, Xiao et al. 2023, equation 4), `channels` being max|x_j|.
    A common factor cancels between the scales of x and W: the geometric mean is set to 1, which keeps both away from
    the ends of float16.
    """
    x, w = channels.astype(np.float64), np.abs(weight).max(axis=1).astype(np.float64)
    if x.max() == 0 or w.max() == 0:
        return np.ones(len(x), np.float32)
    x, w = np.maximum(x, _QUIETEST * x.max()), np.maximum(w, _QUIETEST * w.max())
    logarithm = alpha * np.log(x) - (1 - alpha) * np.log(w)
    return np.exp(logarithm - logarithm.mean()).astype(np.float32)


def migrated_range(limit: float, channels: NDArray[np.float32], migration: NDArray[np.float32]) -> float:
    """The range of x / m, from the range `limit` of x that an estimator chose.

    max_j min(max|x_j|, limit) / m_j. No value is clipped that the estimator would not have clipped without migration:
    |x_j| / m_j beyond it means |x_j| > min(max|x_j|, limit), hence beyond `limit`. With `limit` the maximum it is the
    maximum of x / m. Both hold as far as `channels` are exact: a ranges file keeps 3 digits of them, so a channel's
    largest values may be clipped by up to 0.5 %. To clip the same share of the range instead would be wrong: outliers
    that migration has levelled are no longer there to be clipped.
    """
    return float((np.minimum(channels, limit) / migration).max())


def best_quantization(
    encoder: bytes,
    graph: PlainGraph,
    ranges: ActivationRanges,
    settings: Calibration,
    meter: MapMeter,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Search:
    """Try what the recipe leaves open, with all blocks in INT8, and keep what moves the maps least.

    Estimators are compared first, without migration where that is open too, then migrations with the best of them;
    where one helps, the estimators once more with it. `graph` is the plain graph of `encoder`; afterwards the meter's
    chain holds the INT8 blocks of the best. Raises `RecipeError` for kept names that the encoder has not.
    """
    trials: list[Trial] = []

    def attempt(untried: Iterable[tuple[str, float]]) -> Trial:
        untried = tuple(untried)
        for estimator, alpha in untried:
            on_progress(len(trials), _most_trials(settings))
            quantization = quantization_of(graph, ranges, estimator, alpha, settings.keep)
            meter.chain.set_int8(for_cpu(encoder, quantization))
            trials.append(Trial(estimator, alpha, meter.difference(meter.chain.quantized_blocks)))
        return min(trials, key=lambda trial: trial.difference.harm)

    estimators, (first, *others) = estimators_of(settings.estimator), alphas_of(settings.migration)
    best = attempt((estimator, first) for estimator in estimators)
    best = attempt((best.estimator, alpha) for alpha in others)
    if best.alpha != first:  # clipping was chosen for outliers that are no longer there
        best = attempt((estimator, best.alpha) for estimator in estimators if estimator != best.estimator)
    quantization = quantization_of(graph, ranges, best.estimator, best.alpha, settings.keep)
    model = for_cpu(encoder, quantization)
    meter.chain.set_int8(model)
    on_progress(len(trials), len(trials))
    return Search(quantization, model, tuple(trials))


def estimators_of(setting: str) -> tuple[str, ...]:
    """What the recipe's `estimator` leaves to try."""
    return tuple(name for name in ESTIMATORS if setting in ("auto", name.partition("_")[0]))


def alphas_of(setting: str | float) -> tuple[float, ...]:
    """What the recipe's `migration` leaves to try, none first."""
    return (0.0, *ALPHAS) if isinstance(setting, str) else (float(setting),)


def _most_trials(settings: Calibration) -> int:
    estimators, alphas = len(estimators_of(settings.estimator)), len(alphas_of(settings.migration))
    return estimators + (alphas - 1) + (estimators - 1 if alphas > 1 else 0)


@dataclass(frozen=True)
class FloatOperators:
    """Operators of one kind that stay in float in every INT8 encoder."""

    what: str
    count: int
    why: str


def float_operators(graph: PlainGraph) -> tuple[FloatOperators, ...]:
    """What is never quantised: everything with a product or a sum of activations but the blocks' Linears."""
    inside = {linear.node for linear in find_linears(graph)}
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        constant = any(name in graph.constants for name in node.input)
        if node.op_type in ("MatMul", "Gemm") and node.name not in inside:
            counts["adapters and projection" if constant else "attention products"] += 1
        elif node.op_type == "Add" and not constant:
            counts["residual sums"] += 1
        elif node.op_type in _NEVER:
            counts[_NEVER[node.op_type]] += 1
    return tuple(FloatOperators(what, counts[what], _WHY[what]) for what in _WHY if counts[what])


def kept_names(linears: Sequence[Linear], keep: Sequence[str]) -> Iterator[str]:
    """Names of the Linears that a recipe keeps, in the order of execution within each of its entries.

    Raises `RecipeError` for names that the encoder has not.
    """
    members: dict[str, list[str]] = {}
    for linear in linears:
        members[linear.name] = [linear.name]
        members.setdefault(block_name(linear.block), []).append(linear.name)
    for name in keep:
        if name not in members:
            raise RecipeError(
                f"calibration.keep names '{name}', which the encoder has not",
                f"{did_you_mean(name, members)}Its blocks are {block_name(1)} to {block_name(linears[-1].block)}, "
                f"each with {', '.join(ROLES)}",
            )
        yield from members[name]


def _weight(graph: PlainGraph, linear: Linear) -> NDArray[np.float32]:
    onnx = require("onnx")
    return onnx.numpy_helper.to_array(graph.constants[linear.weight])
