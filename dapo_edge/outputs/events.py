"""What a run has to say, as JSON lines and as lines for people: results, cameras, statistics.

The JSON keys are stable; tests pin them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import unquote

from dapo_edge.runtime.outcome import CameraEvent, Outcome
from dapo_edge.structures import Frame

MOST_REGIONS = 4  # in a line for people; the JSON has all


def frame_json(outcome: Outcome) -> dict[str, Any]:
    """The `run` line of one frame; a failed frame has "error" instead of a result."""
    frame, result = outcome.frame, outcome.inspection
    head = {
        **({"camera": outcome.camera} if outcome.camera else {}),
        "source": outcome.source,
        "index": outcome.index,
        "timestamp_ns": None if frame is None else frame.timestamp_ns,
        **({} if frame is None else _gap(frame)),
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


def _gap(frame: Frame) -> dict[str, Any]:
    """What is missing before this frame; nothing as a rule."""
    return {**({"lost": frame.lost} if frame.lost else {}), **({"resumed": True} if frame.resumed else {})}


def frame_text(outcome: Outcome, *, by_name: bool = False) -> str:
    """The same for people, in one line. `by_name`: the camera's name says enough, without its whole address."""
    frame, result = outcome.frame, outcome.inspection
    place = _place(outcome, by_name)
    if frame is None or result is None:
        return f"{place} #{outcome.index}  failed: {outcome.error}"
    time = datetime.fromtimestamp(frame.timestamp_ns / 1e9).strftime("%H:%M:%S.%f")[:-3]
    stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in result.ms.items() if stage != "total")
    regions = [
        f"{region.type} {region.score:.2f} {region.area_px} px at {list(region.box)}" for region in result.regions
    ]
    if len(regions) > MOST_REGIONS:
        regions[MOST_REGIONS:] = [f"{len(regions) - MOST_REGIONS} more"]
    gap = [f"{frame.lost} lost before it"] if frame.lost else []
    gap += ["first after a loss"] if frame.resumed else []
    return (
        f"{place} #{frame.index} {time}  {result.verdict:6} score {result.score:.3f}  "
        f"{result.ms['total']:.1f} ms ({stages})  {', '.join(gap + regions)}"
    ).rstrip()


def _place(outcome: Outcome, by_name: bool) -> str:
    """Where a frame comes from: its camera, and the file of a picture."""
    source = outcome.source
    if by_name:
        source = unquote(source.rpartition("/")[2]) if source.startswith("image:") else ""
    return "  ".join(filter(None, (outcome.camera, source)))


def camera_json(event: CameraEvent) -> dict[str, Any]:
    """The `run` line of a camera that changed its state."""
    return {
        "camera": {
            "name": event.camera,
            "source": event.source,
            "state": event.state,
            "reason": event.reason,
            "attempt": event.attempt,
            "retry_s": None if event.retry_s is None else round(event.retry_s, 3),
            "timestamp_ns": event.timestamp_ns,
        }
    }


def camera_text(event: CameraEvent) -> str:
    """The same for people, in one line."""
    time = datetime.fromtimestamp(event.timestamp_ns / 1e9).strftime("%H:%M:%S.%f")[:-3]
    reason = f": {event.reason}" if event.reason else ""
    retry = "" if event.retry_s is None else f"; attempt {event.attempt + 1} in {event.retry_s:.1f} s"
    return f"{event.camera}  {event.source} {time}  {event.state}{reason}{retry}"


def statistics_text(statistics: Mapping[str, Any]) -> list[str]:
    """A pipeline's statistics for people: one line, then one for each camera where there are several.

    Sinks that lost or failed entries have a line each, with their first error. A summary also says which "device" and
    "precision" it was.
    """
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in statistics["verdicts"].items())
    engine = f" on {statistics['device']}, {statistics['precision']}" if "device" in statistics else ""
    seconds = "" if engine else f"after {statistics['seconds']:.0f} s: "
    lines = [f"{seconds}{_counts(statistics)}; {verdicts}; {statistics['fps']} frames/s{engine}"]
    if len(statistics["cameras"]) > 1:
        lines += [_camera(camera) for camera in statistics["cameras"]]
    for sink in statistics["sinks"]:
        error = sink.get("error")
        if sink["lost"] or sink["failed"] or error:
            counts = ", ".join(f"{sink[name]} {name}" for name in ("written", "lost", "failed"))
            lines.append(f"sink {sink['name']}: {counts}" + (f"; {error}" if error else ""))
    return lines


def _counts(account: Mapping[str, Any]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in account["dropped_by"].items() if count)
    names = ("captured", "inspected", "dropped", "failed")
    counts = {name: f"{account[name]} {name}" for name in names}
    counts["dropped"] += f" ({reasons})" if reasons else ""
    if account["in_flight"]:
        counts["in_flight"] = f"{account['in_flight']} in flight"
    return ", ".join(counts.values())


def _camera(camera: Mapping[str, Any]) -> str:
    waits = camera["waiting_ms"]
    waiting = f"; waited {waits['p50']:.1f} ms, 99 % at most {waits['p99']:.1f} ms" if waits else ""
    again = f"; found again {camera['reconnects']} times" if camera["reconnects"] else ""
    return f"{camera['name']}  {camera['source']}  {camera['state']}: {_counts(camera)}{waiting}{again}"
