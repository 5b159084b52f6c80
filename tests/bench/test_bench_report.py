"""The page of a benchmark: it says what the document says, and needs nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import documents
import pytest
from documents import document
from pages import Page

from dapo_edge.bench.plots import histogram_plot, tail_plot, timeline_plot, waterfall_plot
from dapo_edge.bench.report import check_can_write, write_report
from dapo_edge.errors import DependencyMissing, OutputError


def page(result: dict[str, Any], folder: Path) -> Page:
    write_report(result, folder / "bench.html")
    return Page((folder / "bench.html").read_bytes())


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    found = page(documents.everything(), tmp_path)
    assert not found.of("script") + found.of("link") + found.of("img")
    hrefs = [value for _, attributes in found.tags for name, value in attributes.items() if name.endswith("href")]
    assert all(value.startswith(("#", "data:")) for value in hrefs)
    assert len(found.of("svg")) == 7
    assert (tmp_path / "bench.html").stat().st_size < 600_000


def test_it_shows_what_the_document_says(tmp_path: Path) -> None:
    result = document(**documents.sensed(), deadline=documents.deadline())
    words = page(result, tmp_path).words
    for stage, known in result["stages"].items():
        assert f"{stage} 400 {known['mean']:.2f} {known['std']:.2f} {known['min']:.2f} {known['p50']:.2f}" in words
    assert f"p99 {result['stages']['total']['p99']:.1f} ms" in words
    assert f"frames/s {result['fps']:.1f}" in words
    assert "p99 meets the deadline of 45 ms: 1 late or lost (0.25%)." in words
    assert "energy per frame 1.14 J" in words
    assert "power 31.4 W, 44.0 W at most, 1.14 J per frame (RAPL package-0 + NVML NVIDIA L4)" in words
    assert "command dapo-edge bench pcb-line3.dapo --report bench.html" in words
    assert "commit 0123456789ab, with changes" in words
    assert "9f" * 32 in words
    for series in ("power, W", "clock, MHz", "hottest, °C", "memory, MB"):
        assert series in words


def test_what_a_machine_does_not_tell_has_its_reason(tmp_path: Path) -> None:
    words = page(document(), tmp_path).words
    assert "power not available (no sensor that can be read: no energy counters of the CPU)" in words
    assert "energy per frame" not in words
    assert "power, W" not in words


def test_warnings_come_before_the_figures(tmp_path: Path) -> None:
    words = page(document(warnings=["times were not steady"]), tmp_path).words
    assert 0 < words.index("times were not steady") < words.index("half of the frames are faster")
    assert "Before you use" not in page(document(), tmp_path).words


@pytest.mark.parametrize("frames", [1, 2, 60])
def test_a_partial_run_is_marked_and_shown(frames: int, tmp_path: Path) -> None:
    found = page(document(frames, interrupted=True), tmp_path)
    assert f"Interrupted. This page shows the part of the run that was measured: {frames} frames" in found.words
    assert len(found.of("svg")) == 4
    assert "Interrupted" not in page(document(), tmp_path).words


def test_a_missed_deadline_is_red(tmp_path: Path) -> None:
    found = page(document(deadline=documents.deadline(False)), tmp_path)
    assert "p99 misses the deadline of 36 ms: 190 late or lost (47.50%)" in found.words
    assert {"class": "down"} in found.of("p")
    assert {"class": "up"} not in found.of("p")


def test_a_rate_that_the_source_did_not_give(tmp_path: Path) -> None:
    words = page(document(mode="rate", rate=documents.rate()), tmp_path).words
    assert "asked 30.0, source gave 24.9 frames/s; 24.8 inspected per second" in words
    assert "400 captured = 397 inspected + 2 dropped + 1 failed" in words


@pytest.mark.parametrize(
    ("fps", "text"), [(21.4, "highest rate that meets the deadline: 21.4 frames/s"), (None, "no rate met the deadline")]
)
def test_rates_that_were_tried(fps: float | None, text: str, tmp_path: Path) -> None:
    changes = {"find_rate": documents.found_rate(fps), "deadline": documents.deadline()}
    words = page(document(mode="find-rate", rate=documents.rate(), **changes), tmp_path).words
    assert text in words
    assert "30.00 812.0 31 can't keep up missed" in words
    assert "Rates that were tried" in words


def test_two_packages_side_by_side(tmp_path: Path) -> None:
    other = documents.compare()
    other["stages"]["upload"] = other["stages"].pop("capture")
    result = document(compare=other)
    words = page(result, tmp_path).words
    assert "Against pcb-line4: ViT-B-16, 224 px, fp32" in words
    assert "2.19 times as fast as pcb-line4 (openvino, fp32), 95 % sure between 2.15 and 2.24" in words
    ours, theirs = result["stages"]["encode"], other["stages"]["encode"]
    cells = (ours["p50"], theirs["p50"], ours["p99"], theirs["p99"])
    assert f"encode {' '.join(f'{value:.2f}' for value in cells)} {theirs['p50'] / ours['p50']:.2f} ×" in words
    assert f"upload – {other['stages']['upload']['p50']:.2f} – " in words


def test_sweeps_with_and_without_a_rate(tmp_path: Path) -> None:
    words = page(document(sweeps=documents.sweeps()), tmp_path).words
    assert "4 120.0 132.0 30.00 33.3" in words
    assert "4 10.0 40.0 26.0 37.0 41.0 0 keeps up" in words
    words = page(document(sweeps=documents.sweeps(at_a_rate=False)), tmp_path).words
    assert "4 – – 26.0 – – – –" in words


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>$x_{$"
    result = document(
        package=documents.package(evil),
        warnings=[evil],
        command=evil,
        compare=documents.compare(evil),
    )
    result["source"]["uri"] = evil
    result["stages"] = {evil: result["stages"]["encode"], **result["stages"]}
    found = page(result, tmp_path)
    assert found.words.count(evil) >= 6
    assert not found.of("img")


def test_a_gap_in_the_run_is_a_gap_in_the_plot() -> None:
    points = [{"at_s": float(at), "n": 5, "p50": 30.0, "p99": 31.0, "max": 32.0} for at in range(6)]
    whole, torn = timeline_plot(points, None), timeline_plot([*points[:3], {"at_s": 3.0, "n": 0}, *points[4:]], None)
    assert torn.count("M ") > whole.count("M ")
    assert "seconds" in timeline_plot([{"at_s": 0.0, "n": 0, "power_w": 3.0}], 40.0)


def test_the_rest_of_the_total_is_other() -> None:
    stages = {"encode": {"p50": 30.0}, "total": {"p50": 33.0}}
    assert "other<" in waterfall_plot(stages)
    assert ">3.00<" in waterfall_plot(stages)
    stages["map"] = {"p50": 5.0}
    assert "other<" not in waterfall_plot(stages), "medians need not add up"
    assert "total<" in waterfall_plot({"total": {"p50": 0.0}})


@pytest.mark.parametrize(("limit", "text"), [(38.0, "deadline 38 ms"), (900.0, "deadline 900 ms, above")])
def test_a_deadline_far_off_does_not_squeeze_the_plot(limit: float, text: str) -> None:
    known = document()
    assert f">{text}<" in histogram_plot(known["histogram"], known["stages"]["total"], limit)
    assert f">{text}<" in tail_plot(known["cdf"], known["stages"]["total"], limit)


def test_a_page_that_can_t_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        write_report(document(10), tmp_path / "file" / "bench.html")


def test_a_page_takes_the_place_of_a_page_only(tmp_path: Path) -> None:
    (tmp_path / "bench.html").write_text("the last one")
    check_can_write(tmp_path / "bench.html")
    for place in (tmp_path, Path(os.devnull)):
        with pytest.raises(OutputError, match="no plain file"):
            check_can_write(place)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_packages_are_named_before_anything_is_measured(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_can_write(tmp_path / "bench.html")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyMissing, match=r"pip install 'dapo-edge\[report\]'"):
        check_can_write(tmp_path / "bench.html")
