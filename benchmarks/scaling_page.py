"""The figure of scaling.py, one panel for each curve, and its table, one row for each."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo_edge.extras import require
from dapo_edge.files import write_atomically

UNITS = {
    "image size": "image size, px",
    "defect types": "defect types K, 1080p map",
    "map size": "map, megapixels",
    "cameras": "cameras, ms per frame",
    "tiles": "tiles of a 4000x3000 frame",
}
LOGARITHMIC = ("defect types", "map size")
MARKED = ("image size", "defect types", "cameras")  # few and round enough to be named on the axis
ENCODER, OUTSIDE, EXPLAINED = "#9aa5b1", "#2f7fd1", "#d1572f"
COLUMNS, INCHES = 3, 3.0


def draw(document: Mapping[str, Any], path: Path) -> Path:
    """Write the PNG. Raises `OutputError` where it can't be written, `DependencyMissing` without matplotlib."""
    figures = require("matplotlib.figure")
    curves = document["curves"]
    lines = -(-(len(curves) + 1) // COLUMNS)
    figure = figures.Figure(figsize=(INCHES * COLUMNS, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    for (name, curve), axis in zip(curves.items(), panels, strict=False):
        _panel(axis, name, curve)
    # Not every curve has all of them.
    legend = {label: handle for axis in panels for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    for axis in panels[len(curves) :]:
        axis.set_axis_off()
    panels[len(curves)].legend(legend.values(), legend.keys(), loc="center", fontsize=9, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, dpi=100, format="png")
    return write_atomically(path, content.getvalue())


def in_markdown(document: Mapping[str, Any]) -> str:
    """What was fitted to each curve, to be read by people."""
    lines = ["| curve | fixed, ms | the rest passes at | largest deviation |", "|---|--:|--:|--:|"]
    for name, curve in document["curves"].items():
        fit, cells = curve["fit"], ["-", "-", "-"]
        if fit:
            bandwidth = f"{fit['gb_per_s']:.1f} GB/s" if fit["gb_per_s"] else "-"
            apart = f"{100 * fit['largest_deviation']:+.0f} % at {fit['at']}"
            cells = [f"{fit['fixed_ms']:.2f}", bandwidth, apart]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _panel(axis: Any, name: str, curve: Mapping[str, Any]) -> None:
    points = curve["points"]
    x = [point["x"] for point in points]
    for key, colour, label in (
        ("encoder_ms", ENCODER, "encoder alone, ms"),
        ("outside_ms", OUTSIDE, "all the rest, ms (quartiles)"),
    ):
        middle = [point[key]["median"] for point in points]
        spread = [
            [point[key]["median"] - point[key]["low"] for point in points],
            [point[key]["high"] - point[key]["median"] for point in points],
        ]
        axis.errorbar(x, middle, spread, color=colour, marker="o", markersize=3.5, capsize=2, linewidth=1, label=label)
    if curve["fit"]:
        explained = [point["explained_ms"] for point in points]
        axis.plot(x, explained, "--", color=EXPLAINED, linewidth=1.4, label="all the rest, explained by its bytes")
    ticker = require("matplotlib.ticker")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    if name in LOGARITHMIC:
        axis.set_xscale("log")
    if name in MARKED:
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xticks(x)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter(ticker.NullFormatter())
    axis.set_ylabel("ms", fontsize=8)
    axis.set_xlabel(UNITS[name], fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3, which="both", linewidth=0.4)
    axis.set_title(name, fontsize=10)
