"""The plots of a benchmark's page, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dapo_edge.page import as_svg, new_figure, plain

BAR, P50, P99, MAX, LIMIT = "#9dbfe4", "#2f7fd1", "#d9822b", "#9aa5b1", "#b3261e"
MET, MISSED, OTHER, TOTAL = "#1b7f4b", "#b3261e", "#c9d1d9", "#5b6876"
SENSORS = {  # of a timeline's points
    "power_w": "power, W",
    "clock_mhz": "clock, MHz",
    "temperature_c": "hottest, °C",
    "host_mb": "memory, MB",
}

LEAST_SPAN = 0.03  # to each side of a sensor's values: what is steady shall look so

Document = Mapping[str, Any]  # a part of the bench document


def histogram_plot(histogram: Document, total: Document, deadline_ms: float | None) -> str:
    """How many frames took how long."""
    figure, axes = new_figure()
    edges, counts = histogram["edges_ms"], histogram["counts"]
    axes.stairs(counts, edges, fill=True, color=BAR)
    axes.axvline(total["p50"], color=P50, linewidth=1.4, label=f"p50 {total['p50']:.1f} ms")
    axes.axvline(total["p99"], color=P99, linewidth=1.4, label=f"p99 {total['p99']:.1f} ms")
    _mark_deadline(axes, deadline_ms, edges[0], edges[-1])
    beyond = "; the last bar holds all above" if total["max"] > edges[-1] else ""
    axes.set(title="Latency", xlabel=f"milliseconds{beyond}", ylabel="frames", ylim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)
    return as_svg(figure)


def tail_plot(cdf: Document, total: Document, deadline_ms: float | None) -> str:
    """The share of frames that took at least so many milliseconds: logarithmic, since the tail is what matters.

    It ends at the slowest frame, a share of one in all.
    """
    figure, axes = new_figure()
    slower = 1 - np.asarray(cdf["share"], np.float64)
    shown = slower * total["n"] > 1 + 1e-9
    milliseconds = [*np.asarray(cdf["ms"], np.float64)[shown], total["max"]]
    axes.plot(milliseconds, [*(100 * slower[shown]), 100 / total["n"]], marker=".", color=P50)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda percent, place: f"{percent:g} %")
    _mark_deadline(axes, deadline_ms, milliseconds[0], milliseconds[-1])
    axes.set(title="Tail", xlabel="milliseconds", ylabel="frames that took at least so long")
    if deadline_ms is not None:
        axes.legend(fontsize=7)
    return as_svg(figure)


def timeline_plot(timeline: Sequence[Document], deadline_ms: float | None) -> str:
    """Latency over the run, and below it what sensors told; gaps are windows without a finished frame."""
    known = [name for name in SENSORS if any(name in point for point in timeline)]
    heights = [2.8, *(0.9 for _ in known)]
    figure, panels = new_figure(
        (5.2, 0.7 + sum(heights)), (len(heights), 1), sharex=True, squeeze=False, height_ratios=heights
    )
    axes = panels[0, 0]
    at_s = [point["at_s"] for point in timeline]
    for name, colour in (("max", MAX), ("p99", P99), ("p50", P50)):
        axes.plot(at_s, _column(timeline, name), marker=".", markersize=3, linewidth=1.1, color=colour, label=name)
    top = max((point["max"] for point in timeline if "max" in point), default=0.0)
    _mark_deadline(axes, deadline_ms, 0.0, top, horizontal=True)
    axes.set(title="Over the run", ylabel="milliseconds")
    _from_zero(axes)
    axes.legend(fontsize=7, ncols=4)
    for name, panel in zip(known, panels[1:, 0], strict=True):
        at, values = zip(*((point["at_s"], point[name]) for point in timeline if name in point), strict=True)
        panel.plot(at, values, marker=".", markersize=3, linewidth=1.1, color=TOTAL)
        panel.set_ylabel(SENSORS[name], fontsize=8)
        panel.ticklabel_format(axis="y", useOffset=False)
        room = max(0.1 * (max(values) - min(values)), LEAST_SPAN * max(values), 1e-9)
        panel.set_ylim(min(values) - room, max(values) + room)
    panels[-1, 0].set_xlabel("seconds")
    return as_svg(figure)


def waterfall_plot(stages: Mapping[str, Document]) -> str:
    """Medians of the stages, one after the other, up to that of the total; "other" is what no stage explains.

    Medians need not add up: where they come to more than the total, the last stages reach beyond it.
    """
    medians = {name: found["p50"] for name, found in stages.items() if name != "total"}
    total = stages["total"]["p50"]
    other = total - sum(medians.values())
    if other > 0:
        medians["other"] = other
    figure, axes = new_figure((5.2, 0.9 + 0.34 * (len(medians) + 1)))
    ends = np.cumsum(list(medians.values()))
    for row, ((name, median), end) in enumerate(zip(medians.items(), ends, strict=True)):
        _bar(axes, row, end - median, median, OTHER if name == "other" else P50)
    _bar(axes, len(medians), 0.0, total, TOTAL)
    axes.set_yticks(range(len(medians) + 1), [plain(name) for name in (*medians, "total")])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    widest = max(total, float(ends[-1]) if len(ends) else 0.0)
    axes.set(title="Where the time goes", xlabel="milliseconds, medians", xlim=(0, 1.16 * widest or 1.0))
    return as_svg(figure)


def probes_plot(probes: Sequence[Document], deadline_ms: float) -> str:
    """p99 at each rate that was tried; rates that frames never came to an end at have none."""
    figure, axes = new_figure()
    for met, colour, label in ((True, MET, "met"), (False, MISSED, "missed")):
        chosen = [probe for probe in probes if probe["met"] == met and probe["p99_ms"] is not None]
        if chosen:
            rates, p99 = [probe["fps"] for probe in chosen], [probe["p99_ms"] for probe in chosen]
            axes.plot(rates, p99, "o", color=colour, label=label)
    axes.axhline(deadline_ms, color=LIMIT, linestyle="--", linewidth=1, label=f"deadline {deadline_ms:g} ms")
    _log_scale(axes)
    axes.set(title="Rates that were tried", xlabel="frames/s of each camera", ylabel="p99, ms")
    axes.legend(fontsize=7)
    return as_svg(figure)


def batches_plot(batches: Sequence[Document]) -> str:
    """What a frame costs in calls of so many frames."""
    figure, axes = new_figure()
    counts = [row["frames_per_call"] for row in batches]
    axes.plot(counts, [row["ms_per_frame"] for row in batches], marker="o", color=P50)
    axes.set(title="Frames per call", xlabel="frames per call", ylabel="ms per frame")
    _from_zero(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return as_svg(figure)


def cameras_plot(cameras: Sequence[Document]) -> str:
    """What so many cameras get altogether, and how long their frames take where they came at a rate."""
    timed = [row for row in cameras if row["p99_ms"] is not None]
    figure, panels = new_figure((5.2, 4.6 if timed else 3.4), (2 if timed else 1, 1), sharex=True, squeeze=False)
    counts = [row["cameras"] for row in cameras]
    panels[0, 0].plot(counts, [row["achieved_fps"] for row in cameras], marker="o", color=P50)
    panels[0, 0].set(title="Cameras", ylabel="frames/s of all")
    _from_zero(panels[0, 0])
    if timed:
        for name, colour in (("p99_ms", P99), ("p50_ms", P50)):
            values = [row[name] for row in timed]
            panels[1, 0].plot([row["cameras"] for row in timed], values, marker="o", color=colour, label=name[:3])
        panels[1, 0].set_ylabel("milliseconds")
        _from_zero(panels[1, 0])
        panels[1, 0].legend(fontsize=7)
    panels[-1, 0].set_xlabel("cameras")
    panels[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    return as_svg(figure)


def _bar(axes: Any, row: int, left: float, width: float, colour: str) -> None:
    axes.barh(row, width, left=left, color=colour, height=0.66)
    axes.annotate(
        f"{width:.2f}", (left + width, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
    )


def _from_zero(axes: Any) -> None:
    axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1e-9))


def _log_scale(axes: Any) -> None:
    """With labels at 1, 2 and 5 of each decade: rates that were tried seldom span two."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _column(timeline: Sequence[Document], name: str) -> list[float]:
    return [point.get(name, math.nan) for point in timeline]


def _mark_deadline(axes: Any, deadline_ms: float | None, low: float, high: float, horizontal: bool = False) -> None:
    """A line, or its name alone where it lies so far off that the line would squeeze everything else."""
    if deadline_ms is None:
        return
    style = {"color": LIMIT, "linestyle": "--", "linewidth": 1}
    label = f"deadline {deadline_ms:g} ms"
    reach = high - low
    if low - reach <= deadline_ms <= high + reach:
        (axes.axhline if horizontal else axes.axvline)(deadline_ms, label=label, **style)
    else:
        axes.plot([], [], label=f"{label}, {'above' if deadline_ms > high else 'below'}", **style)
