"""The demo's choice of pictures, their captions, and its table; the run itself is in test_end_to_end."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dapo_edge.data.belt import Belt
from dapo_edge.demo import BELT_FPS, HEIGHT_PX, PART_FRAMES, SHEET_PICTURES, WIDTH_PX, caption, sheet_frames
from dapo_edge.runtime.confusion import true_defects
from dapo_edge.structures import NORMAL, Truth
from dapo_edge.tables import demo_table


@pytest.mark.parametrize("frames", [1, 12, 40, 200, 1000])
def test_the_sheet_shows_different_parts_from_the_whole_run(frames: int) -> None:
    shown = sorted(sheet_frames(frames))
    assert shown[0] == 0
    assert frames - 2 * PART_FRAMES * max(1, frames // 200) <= shown[-1] < frames
    step = Belt((WIDTH_PX, HEIGHT_PX), BELT_FPS).step_px
    parts = [-(-index * step // HEIGHT_PX) for index in shown]  # the first one that is not cut off at the left
    assert len(set(parts)) == len(parts)
    for index, part in zip(shown, parts, strict=True):
        assert index * step <= part * HEIGHT_PX and (part + 1) * HEIGHT_PX <= index * step + WIDTH_PX
    assert len(shown) == min(SHEET_PICTURES, 1 + (frames - 1) // PART_FRAMES)


def test_a_part_takes_as_many_frames_as_the_sheet_believes() -> None:
    belt = Belt((WIDTH_PX, HEIGHT_PX), BELT_FPS)
    assert PART_FRAMES * belt.step_px == HEIGHT_PX


def test_captions() -> None:
    types = np.zeros((480, 640), np.uint8)
    truth = Truth(types, (NORMAL, "spot", "glue"))
    assert caption(true_defects(truth)) == "truth: good"
    types[:40, 638:] = 1
    assert caption(true_defects(truth)) == "truth: (spot)"
    types[100:140, 100:140] = types[200:240, 100:140] = 2
    assert caption(true_defects(truth)) == "truth: glue, (spot)"
    types[100:140, 300:340] = 1
    assert caption(true_defects(truth)) == "truth: glue, spot"


def document() -> dict[str, Any]:
    long = {"missing piece": 61, "discolouration": 50, "contamination": 40, "scratch": 30, "missed": 20}
    return {
        "package": "engines/surface-tiny.dapo",
        "weights": "trained",
        "backend": "openvino",
        "precision": "fp32",
        "device": {"line": "a CPU"},
        "summary": {"inspected": 200, "captured": 200},
        "confusion": {
            "frames": 200,
            "verdicts": {row: {"ok": 11, "ng": 120, "unsure": 3} for row in ("defective", "barely", "good")},
            "words": ["missing piece", "scratch"],
            "types": {
                "missing piece": {"word": True, "regions": 201, "found": 181, "right": 61, "called": long},
                "glue": {"word": False, "regions": 7, "found": 7, "right": 0, "called": {"[bold]": 7}},
            },
            "false_alarms": 3,
            "false_alarms_per_frame": 0.015,
        },
        "stages": {"encode": dict.fromkeys(("mean", "p50", "p90", "p95", "p99", "max"), 1.25)},
        "files": ["engines/surface-tiny-demo/belt.mp4"],
    }


def test_the_table_fits_100_columns() -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(demo_table(document()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = {" ".join(line.split()) for line in lines}
    assert "only a sliver of one 11 120 3" in rows
    assert "missing piece 201 181 61 discolouration 50, contamination 40, scratch 30" in rows
    assert "glue 7 7 no such word [bold] 7" in rows
    assert "all 208 188 61" in rows
    assert "0.01 false alarms per frame (3 in all)" in rows or "0.02 false alarms per frame (3 in all)" in rows
