"""What the benchmarks share: where results go, the workload that several of them time, and how they report."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from dapo_edge.config import Recipe, parse_recipe
from dapo_edge.data.surfaces import DEFECTS
from dapo_edge.device import this_device

HERE = Path(__file__).parent
DEMO_RECIPE = HERE.parent / "dapo_edge" / "assets" / "surface-tiny.yaml"
FRAME_SIZE = (1920, 1080)


def results_folder() -> Path:
    """Where results of this very device lie."""
    device = this_device()
    return HERE / "results" / re.sub(r"[^a-z0-9]+", "-", f"{device.cpu} {device.cores} cores".lower()).strip("-")


def vit_b16() -> Recipe:
    """ViT-B/16 at 224 px with seeded weights and 18 defect types."""
    return parse_recipe(
        {
            "name": "vit-b16-224",
            "backbone": {"model": "ViT-B-16"},
            "feature_layers": [3, 6, 9, 12],
            "prompts": {"defects": list(DEFECTS)},
            "gate": {"count": 2},
        }
    )


def resident_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def say(what: str, value: dict[str, Any]) -> dict[str, Any]:
    """Print a part of the result as soon as it is there, and hand it on."""
    print(f"{what}: {json.dumps(value)}", file=sys.stderr)
    return value
