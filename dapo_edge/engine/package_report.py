"""A package's report as one HTML page: what every precision costs in speed and in defects, and where INT8 hurts."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.onnx_linears import block_name
from dapo_edge.config import Gate
from dapo_edge.engine.package_plots import range_plot, sensitivity_plot
from dapo_edge.files import write_atomically
from dapo_edge.gate import largest_differences, points
from dapo_edge.page import coloured, environment, jpeg, percent, thumbnail

EXAMPLES = 6  # of each precision
WORST = 3  # blocks that are named
SAME = "fp32"  # the arithmetic of eager torch: what it differs by is rounding, and not worth a picture
METRICS = {  # and the limit of its drop under `gate`
    "image_auroc": ("image AUROC", "max_auroc_drop"),
    "pixel_auroc": ("pixel AUROC", "max_auroc_drop"),
    "aupro": ("AUPRO", "max_aupro_drop"),
}

Document = Mapping[str, Any]  # report.json, or a part of it
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class DriftExample:
    """One frame on which a precision moved the map, small enough to be kept."""

    precision: str
    title: str
    view: NDArray[np.uint8]  # [h, w, 3] BGR, a thumbnail with the frame's proportions
    expected: NDArray[np.float32]  # anomaly [H, W] by eager torch
    found: NDArray[np.float32]  # anomaly [H, W] by the precision
    difference_max: float  # NaN where a map holds no numbers


class LargestDrifts:
    """Of all frames of a gate, those with the largest map difference of each precision: memory for these alone."""

    def __init__(self, count: int = EXAMPLES) -> None:
        self._count = count
        self._kept: dict[str, list[DriftExample]] = {}

    def offer(
        self,
        precision: str,
        title: str,
        view: NDArray[np.uint8],
        expected: NDArray[np.float32],
        found: NDArray[np.float32],
    ) -> None:
        """One frame [H, W, 3] BGR, and the anomaly maps [H, W] that eager torch and a precision made of it."""
        kept = self._kept.setdefault(precision, [])
        difference = float(np.abs(found - expected).max())
        place = bisect.bisect_right([_rank(example.difference_max) for example in kept], _rank(difference))
        if place < self._count:
            # Copies: a slice of a batch would keep all of it.
            small, maps = thumbnail(view, view.shape), (expected.copy(), found.copy())
            kept.insert(place, DriftExample(precision, title, small, *maps, difference))
            del kept[self._count :]

    def of(self, precision: str) -> tuple[DriftExample, ...]:
        """What was kept of a precision, the largest difference first."""
        return tuple(self._kept.get(precision, ()))


def _rank(difference: float) -> float:
    """Rises from the largest difference to the smallest; NaN, a map without numbers, is the worst."""
    return -math.inf if math.isnan(difference) else -difference


def write_report(path: Path, document: Document, examples: Sequence[DriftExample]) -> Path:
    """Write `report_page` to a file. Raises `OutputError`, `DependencyMissing`."""
    return write_atomically(path, report_page(document, examples))


def report_page(document: Document, examples: Sequence[DriftExample]) -> bytes:
    """The page of a package: what its report.json says, and the frames with the largest drift.

    Equal arguments give equal bytes. Raises `DependencyMissing` without jinja2, matplotlib or OpenCV.
    """
    template = environment(Path(__file__).parent).get_template("package_report.html.j2")
    own = document["precision"]
    html = template.render(
        title=document["name"],
        report=document,
        own=own,
        failed=document["precisions"][own]["failed"],
        tiles=_tiles(document),
        rows=_rows(document),
        metrics=", ".join(label for label, _ in METRICS.values()),
        int8=_int8(document["quantization"]),
        examples=_example_groups(examples),
    )
    return html.encode(errors="backslashreplace")


def _tiles(document: Document) -> list[tuple[str, str, str]]:
    """What a visitor wants to know first: label, value, remark."""
    own, fp32 = document["precisions"][document["precision"]], document["precisions"][SAME]
    drop = (own["drops"] or {}).get("pixel_auroc")
    found = [
        ("precision", document["precision"], f"runs as {own['runs_as']}"),
        ("image encoder", f"{own['encode_ms']:.1f} ms", f"{_speed_up(own, fp32)} the speed of FP32"),
        ("encoder file", _megabytes(own), f"FP32: {_megabytes(fp32)}"),
        ("map difference", f"{own['map_difference_mean']:.2g}", "mean over all pixels"),
        ("verdict flips", _flips(own), "no thresholds" if own["flips"] is None else "of the frames"),
    ]
    if drop is not None:
        found.append(("pixel AUROC", points(drop), "points against eager torch"))
    return found


def _rows(document: Document) -> list[Row]:
    """The precision table, a column per precision: they are few, and what is known of each is much."""
    precisions, limits = document["precisions"], document["limits"]
    equal, flips, mean = limits["min_type_agreement"], limits["max_flips"], limits["max_mean_map_difference"]
    spec: list[tuple[str, str, Callable[[Document], str]]] = [
        ("runs as", "", lambda p: p["runs_as"]),
        ("image encoder", "", lambda p: f"{p['encode_ms']:.2f} ms"),
        ("speed-up over FP32", "", lambda p: _speed_up(p, precisions[SAME])),
        ("encoder file", "", _megabytes),
        ("map difference, mean", f"≤ {mean:g}", lambda p: f"{p['map_difference_mean']:.2g}"),
        ("map difference, largest", _open_limit(document, "map", 0), lambda p: f"{p['map_difference_max']:.2g}"),
        ("score difference, largest", _open_limit(document, "score", 1), lambda p: f"{p['score_difference_max']:.2g}"),
        ("pixels of equal type", f"≥ {100 * equal:g} %", lambda p: f"{100 * p['type_agreement']:.2f} %"),
        ("verdict flips", f"≤ {100 * flips:g} %", _flips),
        ("patch tokens, lowest cosine", "", lambda p: f"{p['token_cosine_min']:.5f}"),
        ("image embedding, lowest cosine", "", lambda p: f"{p['embedding_cosine_min']:.5f}"),
    ]
    if document["frames"]["labelled"]:
        for metric, (label, limit) in METRICS.items():
            spec.append((label, f"drop ≤ {100 * limits[limit]:g}", partial(_metric, metric)))
    return [
        {"label": label, "limit": limit, "cells": [show(found) for found in precisions.values()]}
        for label, limit, show in spec
    ]


def _open_limit(document: Document, kind: str, place: int) -> str:
    """The limit of the largest map or score difference: one for each arithmetic, where the recipe leaves it open."""
    given = document["limits"][f"max_{kind}_difference"]
    if given is not None:
        return f"≤ {given:g}"
    limits = {name: largest_differences(Gate(), one["runs_as"])[place] for name, one in document["precisions"].items()}
    if len(set(limits.values())) == 1:
        return f"≤ {limits.popitem()[1]:g}"
    return ", ".join(f"{name} ≤ {limit:g}" for name, limit in limits.items())


def _metric(metric: str, found: Document) -> str:
    """A metric in percent, and in brackets the points that it is above or below eager torch."""
    drop = (found["drops"] or {}).get(metric)
    return percent((found["accuracy"] or {}).get(metric)) + ("" if drop is None else f" ({points(drop)})")


def _flips(found: Document) -> str:
    return "–" if found["flips"] is None else f"{100 * found['flips']:.2f} %"


def _speed_up(found: Document, fp32: Document) -> str:
    return f"{fp32['encode_ms'] / found['encode_ms']:.2f} ×"


def _megabytes(found: Document) -> str:
    return f"{found['size_bytes'] / 1e6:.1f} MB"


def _int8(found: Document | None) -> Row | None:
    """What only the page of a package with INT8 has, ready to be shown."""
    if found is None:
        return None
    reasons: dict[str, list[str]] = {}
    for linear, why in found["kept"].items():
        reasons.setdefault(why, []).append(linear)
    figures = []
    if found["sensitivity"]:
        figures.append(sensitivity_plot(found["sensitivity"], found["given_back"]))
    if found["ranges"]:
        figures.append(range_plot(found["ranges"]))
    worst = sorted(found["sensitivity"], key=lambda entry: -entry["harm"])[:WORST]
    hurting = [block_name(entry["block"]) for entry in worst]
    candidates = sorted(found["candidates"], key=lambda candidate: candidate["map_difference"])
    return {**found, "reasons": reasons, "figures": figures, "candidates": candidates, "hurting": hurting}


def _example_groups(examples: Sequence[DriftExample]) -> dict[str, list[Row]]:
    """Strips of pictures by precision; differences of one precision have one scale."""
    groups: dict[str, list[Row]] = {}
    for example in examples:
        if example.precision == SAME:
            continue
        scale = _largest([one.difference_max for one in examples if one.precision == example.precision])
        panels = [
            ("frame", example.view),
            ("map, eager torch", coloured(example.expected)),
            (f"map, {example.precision}", coloured(example.found)),
            (f"difference, 0 to {scale:.2g}", coloured(np.abs(example.found - example.expected) / scale)),
        ]
        strip = [(label, jpeg(panel, example.view.shape)) for label, panel in panels]
        text = f"largest difference {example.difference_max:.3f}"
        groups.setdefault(example.precision, []).append({"title": example.title, "text": text, "pictures": strip})
    return groups


def _largest(differences: Sequence[float]) -> float:
    """The largest that is a number, or 1 if none is above 0: a scale to divide by."""
    return max((value for value in differences if math.isfinite(value)), default=0.0) or 1.0
