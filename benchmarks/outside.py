"""Measure which share of a frame's time is spent outside the encoder: benchmarks/results/<device>/outside.json.

    python benchmarks/outside.py [--out FILE] [--full-size PACKAGE]

1080p frames, one after the other, from the raw frame to map, regions and verdict. A bank drawn around real tokens gives
maps with contrast everywhere, more than a line shows; that of seeded weights gives flat ones, where every type may win
anywhere: the worst case. `--full-size` also times a package of ViT-L/14 at 518 px. The first run builds the ViT-B/16,
which takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import FRAME_SIZE, bank_around, end_with, result_file, results_folder, say
from packages import judged_vit_package, opened, tokens_of

from dapo_edge.bench.bystanders import Bystanders
from dapo_edge.bench.feed import open_feed, shots
from dapo_edge.bench.latency import warm_up
from dapo_edge.bench.provenance import provenance
from dapo_edge.bench.samples import percentiles
from dapo_edge.files import as_bytes, write_atomically
from dapo_edge.kernels.map_spec import MapSize
from dapo_edge.package import EnginePackage
from dapo_edge.runtime.inspector import Inspector

SOURCE = f"synthetic://{FRAME_SIZE[0]}x{FRAME_SIZE[1]}"
FRAMES, FRAMES_OF_A_VIT_L = 200, 8
STAGES = ("preprocess", "encode", "map", "decide")
TYPES = 20  # on the large map; on others as many as the package has


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, default=results_folder() / "outside.json")
    parser.add_argument("--full-size", type=Path, metavar="PACKAGE")
    arguments = parser.parse_args()
    large = EnginePackage.open(arguments.full_size) if arguments.full_size else None
    vit = judged_vit_package()
    found = {
        "ViT-B/16 at 224 px, INT8": measured(vit, "int8"),
        "ViT-B/16 at 224 px, FP32": measured(vit, "fp32"),
        "the same in INT8, 1080p map of 20 types": measured(vit, "int8", FRAME_SIZE),
        "the same with flat maps": measured(vit, "int8", FRAME_SIZE, contrast=False),
    }
    if large:
        for precision in ("int8", "fp32"):
            name = f"{large.manifest.backbone} at {large.manifest.image_size} px, {precision.upper()}"
            found[name] = measured(large, precision, frames=FRAMES_OF_A_VIT_L)
    flags = ["--full-size", arguments.full_size.name] if arguments.full_size else []
    result = {
        "schema": "dapo-edge outside 1",
        **provenance(["python", "benchmarks/outside.py", *flags]),
        "shares": found,
    }
    print(in_markdown(result))
    print(f"written: {write_atomically(arguments.out, as_bytes(result))}", file=sys.stderr)


def in_markdown(document: Mapping[str, Any]) -> str:
    """The table of benchmarks/README.md: medians in milliseconds."""
    lines = [f"| | {' | '.join((*STAGES, 'total'))} | outside the encoder |", f"|---|{'--:|' * (len(STAGES) + 2)}"]
    for name, found in document["shares"].items():
        ms = {stage: values["p50"] for stage, values in found["ms"].items()}
        stages = " | ".join(f"{ms[stage]:.{2 if stage == 'decide' else 1}f}" for stage in STAGES)
        lines.append(f"| {name} | {stages} | {ms['total']:.1f} | {100 * found['share_outside_encoder']:.1f} % |")
    return "\n".join(lines)


def measured(
    package: EnginePackage, precision: str, map_size: MapSize = "model", *, contrast: bool = True, frames: int = FRAMES
) -> dict[str, Any]:
    """Milliseconds per stage, and the median over frames of 1 - encode / total."""
    feed, stages, shares = open_feed(SOURCE), dict[str, list[float]](), []
    with _inspector(package, precision, map_size, contrast=contrast) as inspector:
        warm = 3 if frames < FRAMES else None
        warm_up(inspector, feed, warm)
        others = Bystanders()
        for _, shot in zip(range(frames), shots(feed), strict=False):
            ms = inspector.inspect(shot.frame).ms
            shares.append(1 - ms["encode"] / ms["total"])
            for stage, value in ms.items():
                stages.setdefault(stage, []).append(value)
        return say(
            f"{package.manifest.name}, {precision}, {map_size}",
            {
                "runs_as": inspector.backend.precision,
                "share_outside_encoder": statistics.median(shares),
                "ms": {stage: percentiles(np.asarray(values)) for stage, values in stages.items()},
                "others": others.summary(),
            },
        )


@contextlib.contextmanager
def _inspector(package: EnginePackage, precision: str, map_size: MapSize, *, contrast: bool) -> Iterator[Inspector]:
    with opened(package, precision, map_size) as inspector:
        tokens = tokens_of(inspector, open_feed(SOURCE).frames[0].image)
        bank = bank_around(tokens, len(package.bank().names) - 1 if map_size == "model" else TYPES)
        if not contrast:
            # Rows that all patches are equally far from.
            noise = np.random.default_rng(0).standard_normal(bank.rows.shape).astype(np.float32)
            bank = type(bank)(bank.names, noise / np.linalg.norm(noise, axis=1, keepdims=True))
        inspector.set_bank(bank)
        yield inspector


if __name__ == "__main__":
    end_with(main)
