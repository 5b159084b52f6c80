"""One frame's result as a JSON line and as a line of text. The JSON keys are stable; tests pin them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from dapo_edge.runtime.pipeline import Outcome

MOST_REGIONS = 4  # in a line for people; the JSON has all


def frame_json(outcome: Outcome) -> dict[str, Any]:
    """The `run` line of one frame; a failed frame has "error" instead of a result."""
    frame, result = outcome.frame, outcome.inspection
    head = {
        "source": outcome.source,
        "index": outcome.index,
        "timestamp_ns": None if frame is None else frame.timestamp_ns,
    }
    if result is None:
        return {**head, "error": str(outcome.error)}
    return {
        **head,
        "score": round(result.score, 6),
        "verdict": result.verdict,
        "defects": [
            {"type": region.type, "score": round(region.score, 6), "area_px": region.area_px, "box": list(region.box)}
            for region in result.regions
        ],
        "ms": {stage: round(ms, 3) for stage, ms in result.ms.items()},
    }


def frame_text(outcome: Outcome) -> str:
    """The same for people, in one line."""
    frame, result = outcome.frame, outcome.inspection
    if frame is None or result is None:
        return f"{outcome.source} #{outcome.index}  failed: {outcome.error}"
    time = datetime.fromtimestamp(frame.timestamp_ns / 1e9).strftime("%H:%M:%S.%f")[:-3]
    stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in result.ms.items() if stage != "total")
    regions = [
        f"{region.type} {region.score:.2f} {region.area_px} px at {list(region.box)}" for region in result.regions
    ]
    if len(regions) > MOST_REGIONS:
        regions[MOST_REGIONS:] = [f"{len(regions) - MOST_REGIONS} more"]
    return (
        f"{frame.source} #{frame.index} {time}  {result.verdict:6} score {result.score:.3f}  "
        f"{result.ms['total']:.1f} ms ({stages})  {', '.join(regions)}"
    ).rstrip()
