"""One frame's result as a JSON line and as a line of text. The JSON keys are stable; tests pin them."""

from __future__ import annotations

from typing import Any

from dapo_edge.runtime.pipeline import Outcome


def frame_json(outcome: Outcome) -> dict[str, Any]:
    """The `run` line of one frame; a failed frame has "error" instead of a result."""
    frame, result = outcome.frame, outcome.inspection
    head: dict[str, Any] = {"source": outcome.source}
    if frame is not None:
        head = {"source": frame.source, "index": frame.index, "timestamp_ns": frame.timestamp_ns}
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
    """The same for people."""
    frame, result = outcome.frame, outcome.inspection
    place = outcome.source if frame is None else f"{frame.source} #{frame.index}"
    if result is None:
        return f"{place}  failed: {outcome.error}"
    found = ", ".join(f"{region.type} {region.score:.2f} at {list(region.box)}" for region in result.regions[:4])
    more = f" and {len(result.regions) - 4} more" if len(result.regions) > 4 else ""
    return f"{place}  {result.verdict:6} score {result.score:.3f}  {result.ms['total']:.1f} ms  {found}{more}".rstrip()
