"""The page of a benchmark: one HTML file that needs nothing else, with what the document says and its plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo_edge.bench import plots, words
from dapo_edge.extras import require
from dapo_edge.files import check_file, write_atomically
from dapo_edge.page import environment

Document = Mapping[str, Any]
STAGE_COLUMNS = ("n", "mean", "std", "min", "p50", "p90", "p95", "p99", "max")


def check_can_write(path: Path) -> None:
    """Raises `DependencyMissing` and `OutputError` now, instead of after an hour of measuring."""
    for package in ("jinja2", "matplotlib"):
        require(package)
    check_file(path)


def write_report(result: Document, path: Path) -> None:
    """Write the page of a bench document, finished or interrupted. Raises `OutputError`, `DependencyMissing`."""
    template = environment(Path(__file__).parent).get_template("report.html.j2")
    html = template.render(
        title=words.title(result),
        setting=words.setting(result),
        result=result,
        tiles=_tiles(result),
        sentences=[line for line in (words.speed(result), words.rate(result)) if line is not None],
        deadline=words.deadline(result),
        columns=STAGE_COLUMNS,
        figures=_figures(result),
        comparison=_comparison(result),
        tables=_tables(result),
        small_print=_small_print(result),
    )
    write_atomically(path, html.encode(errors="backslashreplace"))


def _tiles(result: Document) -> list[tuple[str, str, str]]:
    """What a visitor wants to know first: label, value, remark."""
    total, jitter = result["stages"]["total"], result["jitter_ms"]
    found = [
        ("p50", f"{total['p50']:.1f} ms", "half of the frames are faster"),
        ("p99", f"{total['p99']:.1f} ms", f"{jitter['p99_minus_p50_ms']:.1f} ms above p50, slowest {total['max']:.1f}"),
    ]
    if result["compare"] is None:
        found.append(("frames/s", f"{result['fps']:.1f}", f"{result['frames']} frames"))
    else:
        times = result["compare"]["times_faster"]
        found.append(
            ("against the other", f"{times['median']:.2f} ×", f"as fast: {times['low']:.2f} to {times['high']:.2f}")
        )
    if result["find_rate"] is not None:
        fps = result["find_rate"]["fps"]
        found.append(("highest rate", f"{fps:.1f} /s" if fps else "none", "that meets the deadline"))
    if result["deadline"] is not None:
        deadline = result["deadline"]
        verdict = "met" if deadline["met"] else "missed"
        found.append((f"deadline {deadline['ms']:g} ms", verdict, f"{deadline['misses']} frames late or lost"))
    joules = result["power"].get("joules_per_frame")
    if joules is not None:
        found.append(("energy per frame", f"{joules:.3g} J", f"{result['power']['mean_w']:.1f} W"))
    return found


def _figures(result: Document) -> list[str]:
    stages, deadline = result["stages"], result["deadline"]
    limit = deadline["ms"] if deadline else None
    found = [
        plots.histogram_plot(result["histogram"], stages["total"], limit),
        plots.tail_plot(result["cdf"], stages["total"], limit),
        plots.waterfall_plot(stages),
        plots.timeline_plot(result["timeline"], limit),
    ]
    if result["find_rate"] is not None and limit is not None:
        found.append(plots.probes_plot(result["find_rate"]["probes"], limit))
    if result["sweeps"]["batches"]:
        found.append(plots.batches_plot(result["sweeps"]["batches"]))
    if result["sweeps"]["cameras"]:
        found.append(plots.cameras_plot(result["sweeps"]["cameras"]))
    return found


def _comparison(result: Document) -> dict[str, Any] | None:
    """Both packages side by side, stage by stage."""
    other = result["compare"]
    if other is None:
        return None
    rows = []
    for stage in dict.fromkeys((*result["stages"], *other["stages"])):
        ours, theirs = result["stages"].get(stage), other["stages"].get(stage)
        cells = [_milliseconds(found, key) for key in ("p50", "p99") for found in (ours, theirs)]
        ratio = f"{theirs['p50'] / ours['p50']:.2f} ×" if ours and theirs and ours["p50"] > 0 else words.UNKNOWN
        rows.append({"stage": stage, "cells": [*cells, ratio]})
    rows.sort(key=lambda row: row["stage"] == "total")
    return {"title": words.title(other), "text": words.comparison(result), "rows": rows}


def _tables(result: Document) -> list[tuple[str, str | None, words.Rows]]:
    """Titles, texts and rows of what is not in every document."""
    search, sweeps = result["find_rate"], result["sweeps"]
    found: list[tuple[str, str | None, words.Rows]] = []
    if search is not None:
        found.append(("Rates that were tried", words.found_rate(result), words.rows(words.PROBES, search["probes"])))
    if sweeps["batches"]:
        found.append(("Frames per call", None, words.rows(words.BATCHES, sweeps["batches"])))
    if sweeps["cameras"]:
        found.append(("Cameras", None, words.rows(words.CAMERAS, sweeps["cameras"])))
    return found


def _small_print(result: Document) -> dict[str, str]:
    device, software = result["device"], result["software"]
    versions = ", ".join(f"{name} {version}" for name, version in software.items() if name != "git")
    jitter = result["jitter_ms"]
    return {
        "command": result["command"],
        "device": device["line"] + (f", Jetson Linux {device['l4t']}" if device.get("l4t") else ""),
        **words.machine(result),
        "jitter": f"standard deviation {jitter['std_ms']:.2f} ms, p99 less p50 {jitter['p99_minus_p50_ms']:.2f} ms",
        "software": f"dapo-edge {result['version']} ({words.commit(result)}), {versions}",
        "package digest": result["package"]["digest"],
        "date": result["date"],
        "document": result["schema"],
    }


def _milliseconds(found: Document | None, key: str) -> str:
    return words.UNKNOWN if found is None else f"{found[key]:.2f}"
