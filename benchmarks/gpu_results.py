"""The file of the GPU benchmark: parts of several runs, and the limits that are judged over all of them."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

SCHEMA = "dapo-edge gpu 1"


class Results:
    """What is known of one GPU: what other runs left in the file, and what this one puts there."""

    def __init__(self, path: Path, name: str) -> None:
        """Raises `SystemExit` when the file is of another GPU or format."""
        self.path, self.name = path, name
        self._parts: dict[str, Any] = {}
        if path.is_file():
            self._parts = _parts_of(path, name)

    def put(self, what: str, measured: dict[str, Any]) -> dict[str, Any]:
        """Write the file with this part in the place of an earlier one, and return what is in it.

        A run that is stopped in the middle of it leaves the file as it was.
        """
        self._parts[what] = measured
        result = {
            "schema": SCHEMA,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "gpu": self.name,
            "limits": limits(self._parts),
            "parts": self._parts,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=2) + "\n"
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.path)
        return json.loads(text)


def _parts_of(path: Path, name: str) -> dict[str, Any]:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if (before["schema"], before["gpu"]) == (SCHEMA, name):
            return dict(before["parts"])
    except (ValueError, KeyError, TypeError):  # cut off, or something else altogether
        pass
    raise SystemExit(f"'{path}' is of another GPU or format: move it away, or name another folder with --out")


def limits(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wished for beside what was measured; `holds` is None for what was not."""
    batch = _at(parts, "kernels", "batch")
    # Cold: between two frames of a line the encoder's weights go through L2.
    ours = _at(batch, "1", "graph", "cold", "us", "median")
    bandwidth = _at(batch, "16", "tokens_to_map", "cold", "share_of_copy")
    trt_us = _at(parts, "tensorrt", "vit_l", "encode_us")
    compiled = _at(parts, "compile", "encoder", "us", "median")
    eager = _at(parts, "torch", "encoder", "eager", "us", "median")
    # Eager alone is no rival: a share of its time would be flattered.
    encoders = [us for us in (trt_us, compiled, eager) if us] if trt_us or compiled else []
    share = ours / min(encoders) if ours and encoders else None
    faster = compiled / trt_us if compiled and trt_us else None
    host = _at(parts, "tensorrt", "graph_host", "median")
    return [
        _limit("preprocess + map, batch 1, cold L2, us", "<=", 100, ours),
        _limit("preprocess + map, share of the fastest encoder's time", "<=", 0.05, share),
        _limit("patch + map kernels, batch 16, share of a copy's bandwidth", ">=", 0.5, bandwidth),
        _limit("host time of a frame's graph launch, us", "<=", 20, host),
        _limit("ViT-L/14 at 518 px by TensorRT FP16, ms", "<=", 2.6, trt_us / 1e3 if trt_us else None),
        _limit("ViT-L/14 at 518 px, times faster than torch.compile FP16", ">=", 1.5, faster),
    ]


def _limit(what: str, relation: str, limit: float, measured: float | None) -> dict[str, Any]:
    holds = None if measured is None else measured <= limit if relation == "<=" else measured >= limit
    return {"what": what, "relation": relation, "limit": limit, "measured": measured, "holds": holds}


def _at(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content
