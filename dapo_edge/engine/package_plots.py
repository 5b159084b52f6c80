"""The plots of a package's report: which blocks INT8 hurts, and where the ranges of its Linears end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dapo_edge.backends.onnx_linears import ROLES
from dapo_edge.evaluation.page import as_svg, new_figure

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


def range_plot(ranges: Mapping[str, Mapping[str, float]]) -> str:
    """Largest activation, 99.9th percentile and chosen range of every Linear's input, a panel per kind of Linear."""
    figure, panels = new_figure((5.2, 4.4), (2, 2), sharex=True, sharey=True)
    for role, axes in zip(ROLES, np.ravel(panels), strict=True):
        found = {int(block.removeprefix("block")): entry for block, entry in _of_role(ranges, role)}
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
    panels[0, 0].legend(fontsize=7)
    figure.suptitle("Activation ranges of the Linears' inputs", fontsize=11)
    figure.supxlabel("block", fontsize=9)
    return as_svg(figure)


def _of_role(ranges: Mapping[str, Mapping[str, float]], role: str) -> list[tuple[str, Mapping[str, float]]]:
    """(block, entry) of the Linears of one kind, named as `onnx_linears.Linear.name`."""
    pairs = ((name.split("."), entry) for name, entry in ranges.items())
    return [(block, entry) for (block, found), entry in pairs if found == role]
