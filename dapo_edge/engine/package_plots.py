"""The plots of a package's report: which blocks INT8 hurts, and where the ranges of its Linears end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dapo_edge.backends.onnx_linears import ROLES
from dapo_edge.calibration.ranges import histogram_edges
from dapo_edge.page import as_svg, new_figure

QUANTIZED, KEPT, LAYER = "#2f7fd1", "#d9822b", "#5b6876"
LARGEST, USUAL, CHOSEN = "#b3261e", "#9aa5b1", "#2f7fd1"
ROLE_NAMES = dict(zip(ROLES, ("QKV", "attention out", "FC1", "FC2"), strict=True))


def sensitivity_plot(sensitivity: Sequence[Mapping[str, Any]], given_back: Collection[int]) -> str:
    """A bar per block: how far the map moves with this block alone in INT8; a dot per feature layer.

    `given_back` are the blocks that stay in float.
    """
    figure, axes = new_figure((max(5.2, 0.3 * len(sensitivity) + 1.2), 3.7))
    for label, colour, is_kept in (("in INT8", QUANTIZED, False), ("kept in float", KEPT, True)):
        chosen = [entry for entry in sensitivity if (entry["block"] in given_back) == is_kept]
        if chosen:
            blocks = [entry["block"] for entry in chosen]
            axes.bar(blocks, [entry["harm"] for entry in chosen], color=colour, label=label, width=0.7)
    places = [entry["block"] for entry in sensitivity for _ in entry["layers"]]
    layers = [difference for entry in sensitivity for difference in entry["layers"]]
    axes.plot(places, layers, ".", color=LAYER, markersize=4, label="one feature layer")
    axes.set_xticks([entry["block"] for entry in sensitivity])
    axes.tick_params(axis="x", labelsize=8)
    axes.set(title="Each block alone in INT8", xlabel="block", ylabel="mean map difference", ylim=(0, None))
    axes.legend(fontsize=7)
    return as_svg(figure)


def range_plot(ranges: Mapping[str, Mapping[str, Any]]) -> str:
    """How the inputs of every Linear are distributed, and the range that was chosen; a panel per kind of Linear.

    Behind each block's marks, the darker a height, the more values of the calibration frames lie there.
    """
    figure, panels = new_figure((5.2, 4.4), (2, 2), sharex=True, sharey=True)
    for role, axes in zip(ROLES, np.ravel(panels), strict=True):
        found = {int(block.removeprefix("block")): entry for block, entry in _of_role(ranges, role)}
        for block, entry in found.items():
            _draw_distribution(axes, block, entry)
        for key, label, style in (
            ("max", "largest", {"color": LARGEST, "marker": ".", "linestyle": ""}),
            ("percentile_99.9", "99.9 % are below", {"color": USUAL, "marker": ".", "linestyle": ""}),
            ("max_migrated", "largest after moving outliers", {"color": CHOSEN, "marker": "x", "linestyle": ""}),
            ("chosen", "chosen range", {"color": CHOSEN, "linewidth": 1.4}),
        ):
            if all(entry[key] is None for entry in ranges.values()):
                continue  # nothing was migrated
            # A range of 0 has no place on a logarithmic axis.
            values = np.array([entry[key] for entry in found.values()], np.float64)
            axes.plot(list(found), np.where(values > 0, values, np.nan), label=label, **style)
        axes.set_title(ROLE_NAMES[role], fontsize=9)
    panels[0, 0].xaxis.get_major_locator().set_params(integer=True)
    panels[0, 0].set_yscale("log")
    shown = [entry["percentile_99.9"] for entry in ranges.values() if entry["percentile_99.9"] > 0]
    if shown:
        panels[0, 0].set_ylim(bottom=min(shown) / 10)  # the bulk of the values; what is below says nothing
    panels[0, 0].legend(fontsize=7)
    figure.suptitle("Activation ranges of the Linears' inputs", fontsize=11)
    figure.supxlabel("block", fontsize=9)
    return as_svg(figure)


def _draw_distribution(axes: Any, block: int, entry: Mapping[str, Any]) -> None:
    if entry["max"] > 0:
        counts = np.asarray(entry["histogram"], np.float64)[1:, None]  # the first bin, all that is near 0, says nothing
        edges, width = histogram_edges(entry["max"])[1:], [block - 0.4, block + 0.4]
        axes.pcolormesh(width, edges, np.sqrt(counts), cmap="Greys", vmax=1.5 * np.sqrt(counts.max()), rasterized=True)


def _of_role(ranges: Mapping[str, Mapping[str, Any]], role: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(block, entry) of the Linears of one kind, named as `onnx_linears.Linear.name`."""
    pairs = ((name.split("."), entry) for name, entry in ranges.items())
    return [(block, entry) for (block, found), entry in pairs if found == role]
