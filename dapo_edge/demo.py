"""The demo's second half: a generated belt through a package, leaving a video, a contact sheet and the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.bench import percentiles
from dapo_edge.data.belt import CROSSING_S
from dapo_edge.data.protocol import surfaces_v1
from dapo_edge.device import as_json, this_device
from dapo_edge.files import write_atomically
from dapo_edge.folders import writing_to
from dapo_edge.outputs.events import frame_json
from dapo_edge.outputs.overlay import Recorder, contact_sheet, draw, save_picture
from dapo_edge.package import EnginePackage
from dapo_edge.runtime.confusion import Confusion, TrueDefect
from dapo_edge.runtime.inspector import Inspector
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan

WIDTH_PX, HEIGHT_PX = 640, 480
BELT_FPS = 5  # few, so that many parts pass in a short video
# All materials but the two that the reference model was never shown.
MATERIALS = ",".join(name.replace(" ", "+") for name in surfaces_v1().pretraining_materials)
BELT = f"synthetic://{WIDTH_PX}x{HEIGHT_PX}@{BELT_FPS}?seed=22&materials={MATERIALS}"
# The belt lays one part on each HEIGHT_PX of its length: how many frames pass between two parts in the middle of the
# picture, and from there until a part reaches the left border.
STEP_PX = WIDTH_PX / (BELT_FPS * CROSSING_S)
PART_FRAMES, LEAD_FRAMES = round(HEIGHT_PX / STEP_PX), round((WIDTH_PX - HEIGHT_PX) / 2 / STEP_PX)
SHEET_PICTURES, SHEET_COLUMNS = 12, 4


def inspect_belt(
    package: EnginePackage, folder: Path, frames: int, on_frame: Callable[[int, int], None]
) -> dict[str, Any]:
    """Inspect `frames` frames of the belt; write belt.mp4, contact-sheet.png and results.jsonl into `folder`."""
    timings: list[Mapping[str, float]] = []
    sheet: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    confusion = Confusion()
    shown = sheet_frames(frames)
    lines: list[str] = []
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with Inspector(package) as inspector, Recorder(folder / "belt.mp4", fps=BELT_FPS) as recorder:
        pipeline = Pipeline(inspector, [CameraPlan("belt", f"{BELT}&frames={frames}")])
        for outcome in pipeline:
            lines.append(json.dumps(frame_json(outcome)))
            frame, inspection = outcome.frame, outcome.inspection
            if frame is not None and frame.truth is not None and inspection is not None:
                timings.append(inspection.ms)
                defects = confusion.add(inspection, frame.truth)
                overlay = draw(frame, inspection)
                recorder.write(overlay)
                if frame.index in shown:
                    sheet.append(overlay)
                    captions.append(caption(defects))
            on_frame(len(lines), frames)
        backend = inspector.backend
    write_atomically(folder / "results.jsonl", ("\n".join(lines) + "\n").encode())
    save_picture(folder / "contact-sheet.png", contact_sheet(sheet, SHEET_COLUMNS, captions))
    stages = {stage: percentiles(np.asarray([ms[stage] for ms in timings])) for stage in timings[0]}
    return {
        "schema": "dapo-edge demo 1",
        "package": str(package.path),
        "weights": package.manifest.weights,
        "device": as_json(this_device()),
        "backend": backend.name,
        "precision": backend.precision,
        "summary": pipeline.as_json(),
        "confusion": confusion.as_json(),
        "stages": stages,
        "files": sorted(str(path) for path in folder.iterdir()),
    }


def sheet_frames(frames: int) -> frozenset[int]:
    """Which of so many frames go on the sheet: each with another part, wholly in view, spread over the run."""
    parts = -(-frames // PART_FRAMES)
    spread = np.linspace(0, parts - 1, min(parts, SHEET_PICTURES))
    return frozenset(max(0, PART_FRAMES * round(part) - LEAD_FRAMES) for part in spread)


def caption(defects: Sequence[TrueDefect]) -> str:
    """The truth in words, from left to right: `truth: scratch`; what is barely visible stands in brackets."""
    ordered = sorted(defects, key=lambda defect: defect.box[0])
    visible = dict.fromkeys(defect.type for defect in ordered if defect.visible)
    barely = dict.fromkeys(f"({defect.type})" for defect in ordered if defect.type not in visible)
    return "truth: " + (", ".join([*visible, *barely]) or "good")
