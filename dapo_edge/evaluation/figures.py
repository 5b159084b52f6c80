"""Figures of the comparison: the world, the maps of five methods side by side, and what each part of DAPO is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dapo_edge.data.flaws import DEFECTS
from dapo_edge.data.materials import MATERIALS
from dapo_edge.data.protocol import surfaces_v1
from dapo_edge.data.surfaces import make_surface
from dapo_edge.evaluation.comparison import BASELINES, TEST_SETS, VARIANTS, Comparison, Results
from dapo_edge.files import write_atomically
from dapo_edge.structures import NORMAL

# Pictures of the figure: test set and numbers, chosen for different materials and types before any map was seen.
SHOWN = (("b", (2, 4, 9)), ("c", (3, 6, 11)), ("d", (3, 8)))
FIVE = ("handcrafted", "two prompts", "adapters only", "dapo - deep visual tokens", "dapo")
CURVES = ("map_loss", "image_loss", "pixel_auroc", "image_auroc", "aupro")
BARS = (("b", "pixel_auroc"), ("b", "aupro"), ("b", "image_auroc"), ("c", "pixel_auroc"), ("c", "type_accuracy"))


def draw_world(path: Path, side: int = 96) -> None:
    """Every defect on every material, and every material without one, with their names."""
    kinds = (None, *DEFECTS)
    rows = []
    for row, kind in enumerate(kinds):
        tiles = [
            make_surface(
                1000 * row + column,
                (side, side),
                materials=(material,),
                defects=(kind or "hole",),
                good_share=0.0 if kind else 1.0,
            ).image
            for column, material in enumerate(MATERIALS)
        ]
        rows.append(np.hstack(tiles))
    figure = _figure(11, 12.6)
    axis = figure.subplots()
    axis.imshow(np.vstack(rows)[..., ::-1])
    middles = side * (0.5 + np.arange(len(kinds)))
    axis.set_xticks(middles[: len(MATERIALS)], [name.replace(" ", "\n") for name in MATERIALS], fontsize=8)
    axis.set_yticks(middles, [kind or "good" for kind in kinds], fontsize=8)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.set_frame_on(False)
    _save(figure, path, dpi=100)


def draw_maps(comparison: Comparison, path: Path) -> None:
    """Picture, truth, and the anomaly maps of five methods with seed 0."""
    lines = [(test, index) for test, indices in SHOWN for index in indices]
    figure = _figure(1.5 * (len(FIVE) + 2), 1.55 * len(lines))
    axes = figure.subplots(len(lines), len(FIVE) + 2)
    row = 0
    for test, indices in SHOWN:
        images, types = comparison.pictures(test, indices)
        names = (NORMAL, *TEST_SETS[test](surfaces_v1())["defects"])
        maps = [comparison.maps(VARIANTS[name], 0, test, indices) for name in FIVE]
        for number in range(len(indices)):
            truth = ", ".join(names[kind] for kind in np.unique(types[number]) if kind) or "good"
            axes[row, 0].imshow(images[number][..., ::-1])
            axes[row, 0].set_ylabel(f"{test}: {truth}", fontsize=8)
            axes[row, 1].imshow(types[number] > 0, cmap="gray", vmin=0, vmax=1)
            for column, anomaly in enumerate(maps, start=2):
                axes[row, column].imshow(anomaly[number], cmap="inferno", vmin=0, vmax=1)
            row += 1
    for axis, title in zip(axes[0], ("picture", "truth", *FIVE), strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    _save(figure, path, dpi=90)


def draw_tuning(results: Results, path: Path) -> None:
    """Loss and validation metrics over the epochs of every method that learns, mean over seeds."""
    figure = _figure(2.6 * len(CURVES), 3.6)
    panels = figure.subplots(1, len(CURVES))
    learning = {name: [run["tuning"] for run in runs.values() if "tuning" in run] for name, runs in results.items()}
    for name, histories in learning.items():
        if not histories:
            continue
        epochs = [epoch["epoch"] for epoch in histories[0]]
        style = "--" if name in BASELINES else "-"
        for axis, metric in zip(panels, CURVES, strict=True):
            values = np.array([[epoch[metric] for epoch in history] for history in histories], np.float64)
            axis.plot(epochs, values.mean(axis=0), style, marker=".", label=name)
    for axis, metric in zip(panels, CURVES, strict=True):
        axis.set(title=metric.replace("_", " "), xlabel="epoch")
        axis.grid(alpha=0.3)
    panels[-1].legend(fontsize=6)
    _save(figure, path, dpi=90)


def draw_ablation(results: Results, path: Path) -> None:
    """Bars of the mean over seeds, every seed a dot."""
    names = list(results)
    figure = _figure(2.6 * len(BARS), 3.6)
    for axis, (test, metric) in zip(figure.subplots(1, len(BARS), sharey=True), BARS, strict=True):
        known = [
            [run[test][metric] for run in results[name].values() if run[test][metric] is not None] for name in names
        ]
        means = [float(np.mean(values)) if values else 0.0 for values in known]
        axis.barh(names, means, color=["#9aa5b1" if name in BASELINES else "#2f7fd1" for name in names])
        for place, values in enumerate(known):
            axis.plot(values, [place] * len(values), "k.", markersize=4)
        axis.set(title=f"{test}: {metric.replace('_', ' ')}", xlim=(max(0.0, min(filter(None, means)) - 0.1), 1))
        axis.grid(axis="x", alpha=0.3)
    axis.invert_yaxis()
    _save(figure, path, dpi=90)


def _figure(width: float, height: float) -> Any:
    """In inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path, dpi: int) -> None:
    import io

    buffer = io.BytesIO()
    extra = {"pil_kwargs": {"quality": 82}} if path.suffix == ".jpg" else {}
    figure.savefig(buffer, dpi=dpi, format=path.suffix[1:], **extra)
    write_atomically(path, buffer.getvalue())
