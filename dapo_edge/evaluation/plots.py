"""Plots of an evaluation as SVG text, to be put into an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dapo_edge.evaluation.evaluate import Line
from dapo_edge.page import as_svg, new_figure, plain

NAMED = 10  # curves that get a colour and a name; more could not be told apart
GOOD, BAD, THRESHOLD = "#1b7f4b", "#b3261e", "#1c2530"


def curve_plot(title: str, curves: Mapping[str, Line], kind: str) -> str:
    """ROC or precision over recall ("pr") of every category in which it is defined."""
    figure, axes = new_figure()
    known = {name: line for name, line in curves.items() if line.area is not None}
    for name, line in known.items():
        label = plain(f"{name} ({100 * (line.area or 0):.1f})") if len(known) <= NAMED else None
        axes.plot(line.x, line.y, linewidth=1.3, label=label, color=None if label else "#5b6876", alpha=0.9)
    xlabel, ylabel = ("false positive rate", "true positive rate") if kind == "roc" else ("recall", "precision")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    if 0 < len(known) <= NAMED:
        axes.legend(fontsize=7, loc="lower right" if kind == "roc" else "lower left")
    if not known:
        axes.text(0.5, 0.5, "undefined without\ngood and defective ones", ha="center", va="center")
    return as_svg(figure)


def score_plot(good: Sequence[float], bad: Sequence[float], threshold: float | None) -> str:
    """Image scores of good and defective images, as shares of each."""
    figure, axes = new_figure()
    bins = np.linspace(0, 1, 41)
    for scores, colour, label in ((good, GOOD, "good"), (bad, BAD, "defective")):
        if scores:
            weights = np.full(len(scores), 1 / len(scores))
            axes.hist(scores, bins, weights=weights, alpha=0.6, color=colour, label=f"{label} ({len(scores)})")
    if threshold is not None:
        axes.axvline(threshold, color=THRESHOLD, linestyle="--", linewidth=1, label=f"threshold {threshold:.3f}")
    axes.set(title="Image scores", xlabel="image score", ylabel="share of the images", xlim=(0, 1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    return as_svg(figure)


def confusion_plot(words: Sequence[str], counts: NDArray[np.int64]) -> str:
    """True defect regions by the word that they were given, as shares of each row; only rows that occur."""
    rows = np.flatnonzero(counts.sum(axis=1))
    columns = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
    shares = counts[np.ix_(rows, columns)] / counts[rows].sum(axis=1, keepdims=True)
    side = max(4.2, 0.34 * len(columns) + 1.6)
    figure, axes = new_figure((side, max(3.4, 0.3 * len(rows) + 1.4)))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), [plain(words[k]) for k in columns], rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), [plain(words[k]) for k in rows], fontsize=7)
    for y, x in zip(*np.nonzero(shares), strict=True):
        tone = "white" if shares[y, x] > 0.5 else "black"
        axes.text(x, y, int(counts[rows[y], columns[x]]), ha="center", va="center", fontsize=6, color=tone)
    axes.set(title="True regions by the word they were given", xlabel="given", ylabel="true")
    axes.grid(visible=False)
    return as_svg(figure)
