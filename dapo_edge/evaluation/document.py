"""What `dapo-edge eval` prints and its report shows: one JSON document of all results."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable, Mapping, Sequence
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

    Metrics are fractions, None where one is undefined; `mean` is over the categories in which a metric is defined,
    `verdicts` over those that `decides` names: in the others there are no thresholds for the words.
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
        found["compare"] = {
            **second,
            "drift": drift(first, second),
            "flips": flips(results[0], results[1]),
        }
    return found


def _results_json(subject: Subject, results: Results) -> dict[str, Any]:
    categories = {name: category_json(result) for name, result in results.items()}
    return {
        "subject": subject.as_json(),
        "mean": _mean(list(categories.values())),
        "verdicts": _verdicts([image for result in results.values() if result.decides for image in result.images]),
        "decides": [name for name, result in results.items() if result.decides],
        "categories": categories,
        "failed": [
            {"category": category, "image": image.image, "reason": image.error}
            for category, image in all_images(results)
            if image.error
        ],
    }


def category_json(result: CategoryResult) -> dict[str, Any]:
    """Metrics of one category, and what lies behind them."""
    return {
        **result.metrics,
        "verdicts": _verdicts(result.images),
        "decides": result.decides,
        "types": result.types,
        "words": list(result.words),
        "confusion": result.confusion,  # [true word][given word], regions
        "unnamed": result.unnamed,
        "unmasked": result.unmasked,
        "regions": result.regions,
        "regions_lost": result.regions_lost,
        "failed": len(result.failed),
        "seconds": result.seconds,
        "date": result.date,
        "device": result.device,
        "restored": result.restored,
    }


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of what is defined; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean(categories: Sequence[Metrics]) -> Metrics:
    found: Metrics = {name: mean_of(metrics[name] for metrics in categories) for name in METRICS}
    return {**found, **{name: sum(metrics[name] for metrics in categories) for name in COUNTS}}


def _verdicts(images: Sequence[ImageResult]) -> dict[str, dict[str, int]]:
    """How many good and defective images got which verdict at the subject's own thresholds."""
    counts = {kind: dict.fromkeys(VERDICTS, 0) for kind in ("good", "defective")}
    for image in images:
        if image.verdict:
            counts["good" if image.is_good else "defective"][image.verdict] += 1
    return counts


def drift(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Second minus first, metric by metric and category by category; None where one of them is undefined.

    `mean` is that of the categories in which both are defined, so it may differ from the difference of the means.
    """
    categories = {
        category: {
            name: None if metrics[name] is None or other[name] is None else other[name] - metrics[name]
            for name in METRICS
        }
        for (category, metrics), other in zip(first["categories"].items(), second["categories"].values(), strict=True)
    }
    return {
        "mean": {name: mean_of(differences[name] for differences in categories.values()) for name in METRICS},
        "categories": categories,
    }


def flips(first: Results, second: Results) -> dict[str, Any]:
    """Images with another verdict, the largest difference of scores first, and how far scores differ at all.

    Verdicts are compared in the categories in which both subjects decide; `share` is None where there is none.
    """
    pairs = [(c, a, b) for (c, a), (_, b) in zip(all_images(first), all_images(second), strict=True)]
    used = [(c, a, b, abs(a.score - b.score)) for c, a, b in pairs if a.score is not None and b.score is not None]
    decided = {name for name, result in first.items() if result.decides and second[name].decides}
    compared = [pair for pair in used if pair[0] in decided]
    flipped = [pair for pair in compared if pair[1].verdict != pair[2].verdict]
    flipped.sort(key=lambda pair: -pair[3])
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
        "share": len(flipped) / len(compared) if compared else None,
        "score_difference_mean": sum(differences) / len(used) if used else None,
        "score_difference_max": max(differences, default=None),
    }
