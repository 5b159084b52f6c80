"""The page of a package: it says what the document says, needs nothing else, and holds few frames."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from pages import Page

from dapo_edge.calibration.ranges import HISTOGRAM_BINS
from dapo_edge.config import Gate
from dapo_edge.engine.package_plots import range_plot, sensitivity_plot
from dapo_edge.engine.package_report import DriftExample, LargestDrifts, report_page, write_report
from dapo_edge.errors import OutputError

ROLES = ("qkv", "out", "fc1", "fc2")


def precision(runs_as: str, encode_ms: float, size: int, **changes: Any) -> dict[str, Any]:
    known = {
        "runs_as": runs_as,
        "token_cosine_min": 0.99912,
        "embedding_cosine_min": 0.99934,
        "map_difference_max": 0.14,
        "map_difference_mean": 9e-4,
        "type_agreement": 0.9912,
        "score_difference_max": 0.071,
        "flips": 0.0025,
        "encode_ms": encode_ms,
        "size_bytes": size,
        "accuracy": {"image_auroc": 0.9812, "pixel_auroc": 0.9634, "aupro": 0.8156},
        "drops": {"image_auroc": 0.0012, "pixel_auroc": -0.0023, "aupro": 0.00001},
        "failed": [],
    }
    return {**known, **changes}


def document(**changes: Any) -> dict[str, Any]:
    """Of a package with INT8, in which block 2 was given back and one Linear was kept by the recipe."""
    names = [f"block{block}.{role}" for block in (1, 2, 3) for role in ROLES]
    kept = {**dict.fromkeys(names[4:8], "the gate failed with it"), "block3.fc2": "asked for in the recipe"}
    found: dict[str, Any] = {
        "schema": "dapo-edge report 2",
        "name": "line3",
        "device": "a CPU of today",
        "created": "2026-11-21T12:00:00+00:00",
        "precision": "int8",
        "reference": {"backend": "eager torch fp32", "encode_ms": 212.3},
        "frames": {"source": "synthetic", "count": 200, "labelled": True},
        "not_judged": ["verdict flips, because the package has no thresholds"],
        "limits": Gate().model_dump(mode="json"),
        "precisions": {
            "fp32": precision("fp32", 90.0, 345_000_000, map_difference_max=1e-6, map_difference_mean=1e-8),
            "fp16": precision("bf16", 60.0, 345_000_000),
            "int8": precision("int8+bf16", 36.0, 92_000_000),
        },
        "quantization": {
            "estimator": "percentile_99.99",
            "alpha": 0.5,
            "quantized": [name for name in names if name not in kept],
            "kept": kept,
            "candidates": [
                {"estimator": "max", "alpha": 0.0, "map_difference": 0.0234},
                {"estimator": "percentile_99.99", "alpha": 0.5, "map_difference": 0.000912},
            ],
            "sensitivity": [
                {"block": block, "harm": harm, "layers": [0.0, 2 * harm], "largest": 0.1}
                for block, harm in ((1, 1e-4), (2, 9e-4), (3, 2e-4))
            ],
            "ranges": {
                name: {
                    "max": 10.0 + place,
                    "chosen": None if name in kept else 5.0,
                    "percentile_99.9": 3.0,
                    "max_migrated": 6.0,
                    "histogram": list(range(HISTOGRAM_BINS)),
                }
                for place, name in enumerate(names)
            },
            "left_in_float": [{"what": "LayerNorms", "count": 8, "why": "statistics of outliers"}],
            "emulation_difference": 0.00023,
            "given_back": [2],
        },
    }
    return json.loads(json.dumps({**found, **changes}))  # as it is read back


def without_int8() -> dict[str, Any]:
    found = document(precision="fp16", quantization=None)
    del found["precisions"]["int8"]
    return found


def anomaly(peak: float) -> NDArray[np.float32]:
    found = np.zeros((12, 16), np.float32)
    found[3:5, 4:9] = peak
    return found


def example(precision: str = "int8", title: str = "a frame", peak: float = 0.4) -> DriftExample:
    view = np.full((240, 320, 3), 90, np.uint8)
    return DriftExample(precision, title, view, anomaly(0.3), anomaly(peak), abs(peak - 0.3))


def test_it_needs_nothing_else() -> None:
    content = report_page(document(), [example()])
    page = Page(content)
    assert not page.of("script")
    assert not page.of("link")
    hrefs = [value for _, found in page.tags for name, value in found.items() if name.endswith("href")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in hrefs)
    assert all(found["src"].startswith("data:image/jpeg;base64,") for found in page.of("img"))
    beside_namespaces = re.sub(rb'xmlns(:\w+)?="[^"]*"', b"", content)
    assert b"://" not in beside_namespaces


def test_the_precision_table() -> None:
    page = Page(report_page(document(), []))
    for row in (
        "runs as fp32 bf16 int8+bf16",
        "image encoder 90.00 ms 60.00 ms 36.00 ms",
        "speed-up over FP32 1.00 × 1.50 × 2.50 ×",
        "encoder file 345.0 MB 345.0 MB 92.0 MB",
        "map difference, mean 1e-08 0.0009 0.0009 ≤",
        "map difference, largest 1e-06 0.14 0.14 fp32 ≤ 0.02, fp16 ≤ 0.1, int8 ≤ 0.3",
        "score difference, largest 0.071 0.071 0.071 fp32 ≤ 0.02, fp16 ≤ 0.1, int8 ≤ 0.2",
        "pixels of equal type 99.12 % 99.12 % 99.12 % ≥",
        "verdict flips 0.25 % 0.25 % 0.25 % ≤ 0.5 %",
        "patch tokens, lowest cosine 0.99912",
        "image embedding, lowest cosine 0.99934",
        "image AUROC 98.1 (-0.12) 98.1 (-0.12) 98.1 (-0.12) drop ≤ 0.5",
        "pixel AUROC 96.3 (+0.23)",
        "AUPRO 81.6 (+0.00) 81.6 (+0.00) 81.6 (+0.00) drop ≤ 1",
        "accuracy gate passed passed passed",
        "fp32 fp16 int8 ✓ limit",
    ):
        assert row in page.words
    assert "2.50 × the speed of FP32" in page.words
    assert "eager torch fp32, 212.3 ms" in page.words
    assert "200 labelled frames of synthetic" in page.words
    assert "a CPU of today" in page.words


def test_limits_of_the_recipe_are_shown() -> None:
    gate = Gate(max_map_difference=0.07, max_score_difference=0.09, max_flips=0.03, max_aupro_drop=0.02)
    page = Page(report_page(document(limits=gate.model_dump(mode="json")), []))
    assert "map difference, largest 1e-06 0.14 0.14 ≤ 0.07 score" in page.words
    assert "score difference, largest 0.071 0.071 0.071 ≤ 0.09 pixels" in page.words
    assert "0.25 % ≤ 3 %" in page.words
    assert "drop ≤ 2" in page.words


def test_the_int8_sections() -> None:
    page = Page(report_page(document(), []))
    assert "7 of 12 Linears compute in INT8, with ranges by percentile_99.99 and outliers moved" in page.words
    assert "maps that differ by 0.00023 in the mean" in page.words
    assert "the gate failed with it 4 of the Linears: block2.qkv, block2.out, block2.fc1, block2.fc2" in page.words
    assert "asked for in the recipe 1 of the Linears: block3.fc2" in page.words
    assert "block1.qkv, block1.out, block1.fc1, block1.fc2, block3.qkv, block3.out, block3.fc1" in page.words
    assert "percentile_99.99 ✓ 0.5 0.000912 max – 0.0234" in page.words, "the best first"
    assert len(page.of("svg")) == 2
    assert "Each block alone in INT8" in page.words
    assert "Activation ranges" in page.words


def test_without_int8_nothing_of_it_is_there() -> None:
    page = Page(report_page(without_int8(), [example("fp16")]))
    assert "fp16 passed the accuracy gate" in page.words
    for word in ("INT8", "int8", "Linears", "alpha"):
        assert word not in page.words
    assert not page.of("svg")
    assert not page.of("details")
    assert "map difference, largest 1e-06 0.14 fp32 ≤ 0.02, fp16 ≤ 0.1 score" in page.words
    assert "Frames with the largest drift in fp16" in page.words


@pytest.mark.parametrize("part", ["sensitivity", "ranges", "candidates", "kept", "quantized"])
def test_empty_parts_leave_no_heading(part: str) -> None:
    found = document()
    found["quantization"][part] = type(found["quantization"][part])()
    if part == "sensitivity":
        found["quantization"]["given_back"] = []
    if part == "kept":
        found["quantization"]["left_in_float"] = []
    page = Page(report_page(found, []))
    headings = {
        "sensitivity": "Each block alone",
        "ranges": "Activation ranges",
        "candidates": "Ways of choosing",
        "kept": "Kept in float",
        "quantized": "Linears in INT8",
    }
    assert headings.pop(part) not in page.words
    assert all(heading in page.words for heading in headings.values())


def test_what_is_null_is_a_dash_or_left_out() -> None:
    found = document(frames={"source": "/data/line", "count": 20, "labelled": False})
    for entry in found["precisions"].values():
        entry.update(flips=None, accuracy=None, drops=None)
    found["quantization"].update(emulation_difference=None, alpha=None)
    page = Page(report_page(found, []))
    assert "verdict flips – – – ≤ 0.5 %" in page.words
    assert "– no thresholds" in page.words
    assert "20 frames of /data/line" in page.words
    assert (
        "The frames have no labels: what a precision costs in image AUROC, pixel AUROC, AUPRO is not known"
        in page.words
    )
    assert "drop ≤" not in page.words
    assert "emulation" not in page.words
    assert "no outliers moved" in page.words


def test_undefined_metrics_are_dashes() -> None:
    found = document()
    undefined = {"image_auroc": None, "pixel_auroc": 0.95, "aupro": None}
    for entry in found["precisions"].values():
        entry.update(accuracy=undefined, drops={"image_auroc": None, "pixel_auroc": 0.0, "aupro": None})
    page = Page(report_page(found, []))
    assert "image AUROC – – – drop ≤ 0.5" in page.words
    assert "pixel AUROC 95.0 (+0.00)" in page.words


def test_a_precision_that_failed_says_why() -> None:
    found = document(precision="fp16")
    found["precisions"]["int8"]["failed"] = ["verdict flips 1.50% > 0.50%", "AUPRO drops by 0.0200 > 0.01"]
    page = Page(report_page(found, []))
    assert "fp16 passed the accuracy gate." in page.words
    assert "accuracy gate passed passed failed" in page.words
    assert "int8 failed: verdict flips 1.50% > 0.50%; AUPRO drops by 0.0200 > 0.01" in page.words
    found["precision"] = "int8"
    page = Page(report_page(found, []))
    assert "int8 failed the accuracy gate: verdict flips 1.50% > 0.50%; AUPRO drops" in page.words
    assert "passed the accuracy gate" not in page.words


def test_names_are_text_and_never_markup() -> None:
    evil = "<img src=x onerror=alert(1)>"
    found = document(name=evil, device=evil, frames={"source": evil, "count": 1, "labelled": True})
    found["quantization"].update(estimator=evil, kept={evil: evil}, quantized=[evil])
    found["quantization"]["candidates"][0]["estimator"] = evil
    found["precisions"]["int8"].update(runs_as=evil, failed=[evil])
    found["reference"]["backend"] = evil
    page = Page(report_page(found, [example(title=evil)]))
    assert page.text.count(evil) >= 11
    assert not [attributes for attributes in page.of("img") if "onerror" in attributes]
    assert all("alert" not in name for _, attributes in page.tags for name in attributes)


def test_file_names_that_are_no_text() -> None:
    page = Page(report_page(document(), [example(title=os.fsdecode(b"part\xff.png"))]))
    assert r"part\udcff.png" in page.words


def test_equal_documents_are_equal_pages(tmp_path: Path) -> None:
    one, other = (report_page(document(), [example()]) for _ in range(2))
    assert one == other
    assert write_report(tmp_path / "sub" / "report.html", document(), [example()]).read_bytes() == one
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        write_report(tmp_path / "file" / "report.html", document(), [])


# The pictures.


def test_examples_show_frame_maps_and_difference() -> None:
    page = Page(report_page(document(), [example(peak=0.5), example(peak=0.35), example("fp16"), example("fp32")]))
    assert [found["alt"] for found in page.of("img")][:4] == [
        "frame", "map, eager torch", "map, int8", "difference, 0 to 0.2",
    ]  # fmt: skip
    assert len(page.of("img")) == 3 * 4, "none of fp32, which differs by rounding"
    pictures = [
        cv2.imdecode(np.frombuffer(base64.b64decode(found["src"].partition(",")[2]), np.uint8), cv2.IMREAD_COLOR)
        for found in page.of("img")
    ]
    assert {picture.shape for picture in pictures} == {(240, 320, 3)}
    frame, expected, found, difference = pictures[:4]
    assert abs(frame.astype(int) - 90).max() <= 3
    assert found[80, 130].sum() > expected[80, 130].sum() > 30, "0.5 is brighter than 0.3"
    assert difference[80, 130].min() > 100, "the largest difference of all is the brightest colour"
    assert difference[10, 10].max() < 30
    assert pictures[7][80, 130].min() < 100, "the second frame has the first one's scale"


def test_a_map_without_numbers_is_shown() -> None:
    broken = anomaly(0.4)
    broken[0, 0] = np.nan
    drifts = LargestDrifts()
    drifts.offer("int8", "broken", np.zeros((24, 32, 3), np.uint8), anomaly(0.3), broken)
    drifts.offer("int8", "same", np.zeros((24, 32, 3), np.uint8), anomaly(0.3), anomaly(0.3))
    page = Page(report_page(document(), drifts.of("int8")))
    assert "largest difference nan broken" in page.words
    assert "difference, 0 to 1" in page.words


def test_the_largest_drifts_are_kept_by_precision() -> None:
    rng = np.random.default_rng(0)
    peaks, drifts = rng.permutation(50) / 100, LargestDrifts(4)
    for number, peak in enumerate(peaks):
        view = np.full((1080, 1920, 3), number, np.uint8)
        drifts.offer("int8", str(number), view, anomaly(0.0), anomaly(peak))
        drifts.offer("fp16", str(number), view, anomaly(0.0), anomaly(peak / 100))
    expected = np.argsort(-peaks)[:4].tolist()
    for precision in ("int8", "fp16"):
        kept = drifts.of(precision)
        assert [int(one.title) for one in kept] == expected
        assert [int(one.view[0, 0, 0]) for one in kept] == expected
        assert {one.view.shape for one in kept} == {(180, 320, 3)}, "no camera frame is held"
    np.testing.assert_allclose([one.difference_max for one in drifts.of("int8")], [0.49, 0.48, 0.47, 0.46], rtol=1e-6)
    np.testing.assert_array_equal(drifts.of("int8")[0].found, anomaly(0.49))
    assert drifts.of("int4") == ()


def test_the_first_of_equal_drifts_is_kept_and_nan_is_the_worst() -> None:
    drifts, view = LargestDrifts(2), np.zeros((24, 32, 3), np.uint8)
    for title in "abc":
        drifts.offer("int8", title, view, anomaly(0.0), anomaly(0.2))
    assert [one.title for one in drifts.of("int8")] == ["a", "b"]
    for title, peak in (("nan", np.nan), ("d", 0.9)):
        drifts.offer("int8", title, view, anomaly(0.0), anomaly(peak))
    assert [one.title for one in drifts.of("int8")] == ["nan", "d"]


def test_what_is_kept_is_not_the_callers_memory() -> None:
    drifts, batch = LargestDrifts(), np.zeros((8, 12, 16), np.float32)
    batch[2, 0, 0] = 0.5
    drifts.offer("int8", "x", np.zeros((24, 32, 3), np.uint8), batch[0], batch[2])
    batch[:] = 1
    kept = drifts.of("int8")[0]
    assert kept.found.max() == 0.5
    assert kept.found.base is None, "a slice would keep the whole batch"


# The plots.


def bars(svg: str, colour: str) -> int:
    return len(re.findall(rf"fill: {colour}", svg))


def test_given_back_blocks_have_a_colour_of_their_own() -> None:
    sensitivity = document()["quantization"]["sensitivity"]
    for given_back, count in (((), 0), ((2,), 1), ((1, 3), 2)):
        svg = sensitivity_plot(sensitivity, given_back)
        assert bars(svg, "#d9822b") == count + bool(given_back), "and one in the legend"
        assert bars(svg, "#2f7fd1") == 3 - count + 1
        assert ("kept in float" in svg) == bool(given_back)


def test_a_plot_of_ranges_has_a_panel_per_kind_and_takes_what_has_no_logarithm() -> None:
    ranges = document()["quantization"]["ranges"]
    ranges["block1.fc1"] = {
        "max": 0.0,
        "chosen": None,
        "percentile_99.9": 0.0,
        "max_migrated": None,
        "histogram": [0] * HISTOGRAM_BINS,
    }
    svg = range_plot(ranges)
    for name in ("QKV", "attention out", "FC1", "FC2", "chosen range", "99.9 % are below"):
        assert f">{name}<" in svg
    zero = {**ranges["block1.qkv"], "max": 0.0, "chosen": None, "percentile_99.9": 0.0, "max_migrated": None}
    assert "moving outliers" in svg
    assert "moving outliers" not in range_plot({"block1.qkv": {**zero, "chosen": 1.0}})


def test_the_page_of_a_large_encoder_stays_small() -> None:
    names = [f"block{block}.{role}" for block in range(1, 25) for role in ROLES]
    found = document()
    found["quantization"].update(
        quantized=names,
        kept={},
        sensitivity=[{"block": n, "harm": 1e-4 * n, "layers": [1e-4] * 4, "largest": 0.1} for n in range(1, 25)],
        ranges={
            name: {
                "max": 9.0,
                "chosen": 5.0,
                "percentile_99.9": 3.0,
                "max_migrated": 6.0,
                "histogram": [9] * HISTOGRAM_BINS,
            }
            for name in names
        },
    )
    assert len(report_page(found, [])) < 300_000
