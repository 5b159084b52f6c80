"""What `dapo-edge eval` prints and its report shows: one JSON document of all results."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dapo_edge import __version__
from dapo_edge.device import as_json, this_device
from dapo_edge.evaluation.evaluate import CategoryResult, DataSet, ImageResult, all_images
from dapo_edge.evaluation.metrics import Summary
from dapo_edge.evaluation.subject import Subject

SCHEMA = "dapo-edge eval 1"
COUNTS = ("images", "defective_images")
METRICS = tuple(name for name in Summary.__dataclass_fields__ if name not in (*COUNTS, "type_chance"))
VERDICTS = ("ok", "unsure", "ng")

Results = Mapping[str, CategoryResult]
Metrics = dict[str, Any]


def document(
    subjects: Sequence[Subject], results: Sequence[Results], data: DataSet, words: str, seconds: float
) -> dict[str, Any]:
    """All results of the first subject; under `compare` those of the second, and how far it is from the first.

    Metrics are fractions, None where one is undefined; `mean` is over the categories in which a metric is defined.
    """
    first = _results_json(subjects[0], results[0])
    found = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"dapo-edge": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "device": as_json(this_device()),
        "dataset": {
            "layout": data.layout.name,
            "root": str(data.root),
            "categories": list(data.categories),
            "images": sum(map(len, data.categories.values())),
            "masks_without_image": [str(path) for path in data.masks_without_image],
        },
        "words": words,
        "seconds": seconds,
        **first,
    }
    if len(subjects) > 1:
        second = _results_json(subjects[1], results[1])
        found["compare"] = {**second, "drift": drift(first, second), "flips": flips(*results)}
    return found


def _results_json(subject: Subject, results: Results) -> dict[str, Any]:
    categories = {name: category_json(result) for name, result in results.items()}
    return {
        "subject": subject.as_json(),
        "mean": _mean([category["metrics"] for category in categories.values()]),
        "verdicts": _verdicts([image for _, image in all_images(results)]),
        "categories": {name: {**category.pop("metrics"), **category} for name, category in categories.items()},
        "failed": [
            {"category": category, "image": image.image, "reason": image.error}
            for category, image in all_images(results)
            if image.error
        ],
    }


def category_json(result: CategoryResult) -> dict[str, Any]:
    """Metrics of one category, and what lies behind them."""
    types = result.evaluation.types
    return {
        "metrics": result.evaluation.summary().as_json(),
        "verdicts": _verdicts(result.images),
        "types": {
            name: {
                "pixel_auroc": _number(curve.auroc()),
                "pixel_ap": _number(curve.average_precision()),
                "pixel_f1_max": _number(curve.f1_max()),
            }
            for name, curve in types.curves().items()
        },
        "words": list(types.names[1:]),
        "confusion": types.confusion.tolist(),  # [true word][predicted word], regions
        "unnamed": result.unnamed,
        "unmasked": result.unmasked,
        "failed": len(result.failed),
        "seconds": result.seconds,
    }


def _mean(categories: Sequence[Metrics]) -> Metrics:
    found: Metrics = {}
    for name in METRICS:
        known = [metrics[name] for metrics in categories if metrics[name] is not None]
        found[name] = sum(known) / len(known) if known else None
    return {**found, **{name: sum(metrics[name] for metrics in categories) for name in COUNTS}}


def _verdicts(images: Sequence[ImageResult]) -> dict[str, dict[str, int]]:
    """How many good and defective images got which verdict at the subject's own thresholds."""
    counts = {kind: dict.fromkeys(VERDICTS, 0) for kind in ("good", "defective")}
    for image in images:
        if image.verdict:
            counts["good" if image.is_good else "defective"][image.verdict] += 1
    return counts


def drift(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Second minus first: of every metric's mean, and of each category; None where one of them is undefined."""

    def difference(a: Metrics, b: Metrics) -> Metrics:
        return {name: None if a[name] is None or b[name] is None else b[name] - a[name] for name in METRICS}

    return {
        "mean": difference(first["mean"], second["mean"]),
        "categories": {
            name: difference(first["categories"][name], second["categories"][name]) for name in first["categories"]
        },
    }


def flips(first: Results, second: Results) -> dict[str, Any]:
    """Images with another verdict, the largest difference of scores first, and how far scores differ at all."""
    pairs = [(c, a, b) for (c, a), (_, b) in zip(all_images(first), all_images(second), strict=True)]
    used = [(c, a, b, abs(a.score - b.score)) for c, a, b in pairs if a.score is not None and b.score is not None]
    flipped = sorted((pair for pair in used if pair[1].verdict != pair[2].verdict), key=lambda pair: -pair[3])
    differences = [pair[3] for pair in used]
    return {
        "images": [
            {
                "category": category,
                "image": a.image,
                "defect": a.defect,
                "verdicts": [a.verdict, b.verdict],
                "scores": [a.score, b.score],
            }
            for category, a, b, _ in flipped
        ],
        "share": len(flipped) / len(used) if used else None,
        "score_difference_mean": sum(differences) / len(used) if used else None,
        "score_difference_max": max(differences, default=None),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
