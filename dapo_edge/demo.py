"""The demo's second half: a generated belt through a package, leaving a video, a contact sheet and the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.bench import percentiles
from dapo_edge.device import as_json, this_device
from dapo_edge.outputs.events import frame_json
from dapo_edge.outputs.overlay import Recorder, contact_sheet, draw, save_picture
from dapo_edge.package import EnginePackage, writing_to
from dapo_edge.runtime.inspector import Inspector
from dapo_edge.runtime.pipeline import Statistics, inspect_stream
from dapo_edge.runtime.sources import open_source

BELT_FPS = 10  # few, so that many parts pass in a short video
BELT = f"synthetic://640x480@{BELT_FPS}?seed=7"
SHEET_PICTURES, SHEET_COLUMNS = 12, 4


def inspect_belt(
    package: EnginePackage, folder: Path, frames: int, on_frame: Callable[[int, int], None]
) -> dict[str, Any]:
    """Inspect `frames` frames of the belt; write belt.mp4, contact-sheet.png and results.jsonl into `folder`."""
    statistics = Statistics()
    timings: list[Mapping[str, float]] = []
    sheet: list[NDArray[np.uint8]] = []
    lines: list[str] = []
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with Inspector(package) as inspector, Recorder(folder / "belt.mp4", fps=BELT_FPS) as recorder:
        for outcome in inspect_stream(inspector, [open_source(f"{BELT}&frames={frames}")], statistics):
            lines.append(json.dumps(frame_json(outcome)))
            if outcome.frame is not None and outcome.inspection is not None:
                timings.append(outcome.inspection.ms)
                overlay = draw(outcome.frame, outcome.inspection)
                recorder.write(overlay)
                if len(sheet) * max(1, frames // SHEET_PICTURES) <= outcome.frame.index:
                    sheet.append(overlay)
            on_frame(statistics.captured, frames)
        backend = inspector.backend
    with writing_to(folder / "results.jsonl"):
        (folder / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_picture(folder / "contact-sheet.png", contact_sheet(sheet[:SHEET_PICTURES], SHEET_COLUMNS))
    stages = {stage: percentiles(np.asarray([ms[stage] for ms in timings])) for stage in timings[0]}
    return {
        "schema": "dapo-edge demo 1",
        "package": str(package.path),
        "weights": package.manifest.weights,
        "device": as_json(this_device()),
        "backend": backend.name,
        "precision": backend.precision,
        "summary": statistics.as_json(),
        "stages": stages,
        "files": sorted(str(path) for path in folder.iterdir()),
    }
