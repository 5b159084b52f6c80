"""The report: one file that needs nothing else, and that says what the document says."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pages import Page
from painted import paint, save, subject, write_folder

from dapo_edge.evaluation.document import document
from dapo_edge.evaluation.evaluate import DataSet, _roc, evaluate
from dapo_edge.evaluation.histograms import Curve
from dapo_edge.evaluation.plots import curve_plot
from dapo_edge.evaluation.report import signed, write_report
from dapo_edge.page import percent


def report(
    root: Path, out: Path, subjects: list[Any] | None = None, layout: str = "folder"
) -> tuple[Page, dict[str, Any]]:
    data, used = DataSet.read(layout, root), subjects or [subject()]
    results = evaluate(used, data)
    found = document(used, results, data, "own", 1.0)
    return Page(write_report(out / "report.html", found, used, results, data).read_bytes()), found


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    page, _ = report(write_folder(tmp_path / "set"), tmp_path)
    assert not page.of("script")
    assert not page.of("link")
    assert page.of("img")
    for image in page.of("img"):
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/jpeg;base64"
        assert cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR).shape == (320, 320, 3)
    hrefs = [value for _, attributes in page.tags for name, value in attributes.items() if name.endswith("href")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in hrefs)
    assert "url(http" not in (tmp_path / "report.html").read_text()
    assert len(page.of("svg")) == 6


def test_it_shows_what_the_document_says(tmp_path: Path) -> None:
    page, found = report(write_folder(tmp_path / "set", ("bolt", "nut")), tmp_path)
    words = " ".join(page.text.split())
    for category in ("bolt", "nut"):
        assert f"{category} 10 6 {percent(found['categories'][category]['image_auroc'])}" in words
    assert f"mean 20 12 {percent(found['mean']['image_auroc'])}" in words
    counts = found["verdicts"]["defective"]
    escaped = percent(counts["ok"] / sum(counts.values()))
    assert f"defective {counts['ok']} {counts['unsure']} {counts['ng']} {escaped} escaped" in words
    assert "rust 6 100.0" in words
    assert len(page.of("figure")) == 4 * (8 + 8), "as many misses as false alarms, four pictures each"


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    root = write_folder(tmp_path / "set", (evil,))
    save(root / evil / evil / "0.png", np.zeros((64, 64), np.uint8))
    page, _ = report(root, tmp_path)
    assert evil in page.text
    assert not [image for image in page.of("img") if "onerror" in image]
    assert all("alert" not in name for _, attributes in page.tags for name in attributes)


def test_names_that_matplotlib_would_read_as_more(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("price $x_{$", "_nut", os.fsdecode(b"t\xff")), good=2, bad=1)
    (root / "_nut" / "good" / "0.png").rename(os.fsdecode(os.fsencode(root / "_nut" / "good") + b"/\xff.png"))
    page, _ = report(root, tmp_path)
    assert "price $x_{$ (" in page.text
    assert "_nut (" in page.text


def test_an_image_that_shows_two_types_may_be_listed_twice(tmp_path: Path) -> None:
    image, mask = paint("rust", 1)
    save(tmp_path / "a.png", image[..., ::-1])
    save(tmp_path / "m.png", mask)
    (tmp_path / "images.csv").write_text("image,type,mask\na.png,rust,m.png\na.png,stain,m.png\n")
    data, used = DataSet.read("csv", tmp_path), [subject()]
    results = evaluate(used, data)
    found = document(used, results, data, "own", 1.0)
    page = Page(write_report(tmp_path / "report.html", found, used, results, data).read_bytes())
    assert ": rust, " in page.text
    assert ": stain, " in page.text


def test_a_comparison_shows_drift_and_flips(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", strength=100)
    page, found = report(root, tmp_path, [subject(), subject(0.3, name="weak")])
    flipped = found["compare"]["flips"]["images"]
    assert flipped
    assert f"{len(flipped)} verdicts differ between A and B" in " ".join(page.text.split())
    drift = found["compare"]["drift"]["mean"]["aupro"]
    assert f"({100 * drift:+.2f})" in page.text
    assert "map B" in page.text


def test_undefined_metrics_and_failed_images_are_shown(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", good=0, bad=1)
    (root / "nut" / "rust" / "9.png").write_bytes(b"no image")
    page, _ = report(root, tmp_path, [subject(limit=None)])
    words = " ".join(page.text.split())
    assert "nut 2 2 –" in words
    assert "Every verdict is “unsure”" in words
    assert "Images that could not be used" in words
    assert "no known format" in words
    assert "undefined without" in words


def test_the_same_evaluation_gives_the_same_bytes(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    data, used = DataSet.read("folder", root), [subject()]
    results = evaluate(used, data)
    found = document(used, results, data, "own", 1.0)
    one, other = (write_report(tmp_path / name, found, used, results, data).read_bytes() for name in "ab")
    assert one == other


@pytest.mark.parametrize(
    ("share", "metric", "tone"),
    [(0.01, "aupro", "up"), (-0.01, "aupro", "down"), (0.01, "image_ece", "down"), (0.0, "aupro", "")],
)
def test_better_is_green_and_worse_is_red(share: float, metric: str, tone: str) -> None:
    assert signed(share, metric) == f'<span class="{tone}">({100 * share:+.2f})</span>'
    assert signed(None, metric) == ""


def test_a_long_curve_keeps_its_shape_and_loses_its_points() -> None:
    rng = np.random.default_rng(0)
    curve = Curve(rng.integers(0, 3, 100_000), rng.integers(0, 3, 100_000))
    text = curve_plot("x", {"one": _roc(curve)}, "roc")
    points = max(len(re.findall(r"[ML] ", path)) for path in re.findall(r'd="([^"]*)"', text))
    assert len(_roc(curve).x) <= 300
    assert 30 < points <= 300
    assert len(text) < 60_000
