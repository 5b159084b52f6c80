"""Measure the spine's promises on this machine and write benchmarks/results/<device>/spine.json.

    python benchmarks/spine.py [--out FILE] [--rounds 5] [--full-size]

`--full-size` also builds the released DAPO configuration, ViT-L/14 at 518 px: two minutes more, and 7 GB of memory.

Start-up times are medians of fresh processes. The two ViT-B/16 pipelines run in one process, in turn, by rounds, so
that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import DEMO_RECIPE, FRAME_SIZE, end_with, released, resident_mb, result_file, results_folder, say, vit_b16
from numpy.typing import NDArray
from usual import Usual

from dapo_edge import Inspector, build
from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.bench import percentiles
from dapo_edge.bench.provenance import provenance
from dapo_edge.config import load_recipe
from dapo_edge.data.belt import Belt
from dapo_edge.data.surfaces import make_surface
from dapo_edge.files import as_bytes, write_atomically
from dapo_edge.models.eager import EagerBackend
from dapo_edge.package import EnginePackage, Threshold, Thresholds
from dapo_edge.prompt_bank import PromptBank

WARM, EAGER_FRAMES, OUR_FRAMES = 3, 5, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, default=results_folder() / "spine.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full-size", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        demo = build(load_recipe(DEMO_RECIPE), Path(scratch) / "demo.dapo")
        vit = build(vit_b16(), Path(scratch) / "vit-b16.dapo")
        result = {
            "schema": "dapo-edge spine 1",
            **provenance(sys.argv),
            "start_up": say("start-up", start_up(demo)),
            "parity": say("parity", {"surface-tiny": parity(demo, 8), "ViT-B-16": parity(vit, 8)}),
            "vit_b16_224_1080p": say("ViT-B/16", against_eager(vit, arguments.rounds)),
            "memory": say("memory", memory(demo)),
            "belt": say("belt", {precision: belt(demo, precision) for precision in ("fp32", "fp16")}),
        }
        if arguments.full_size:
            full_size = build(released(), Path(scratch) / "released.dapo")
            result["parity"]["ViT-L-14-336-quickgelu at 518 px"] = say("full size", parity(full_size, 1))
    write_atomically(arguments.out, as_bytes(result))
    print(f"written: {arguments.out}", file=sys.stderr)


def start_up(package: EnginePackage) -> dict[str, float]:
    """Fresh processes: import, help, and first result of a package whose compiled model is, or is not, cached."""
    cached = {**os.environ, "DAPO_EDGE_CACHE": str(package.path.parent / "cache")}
    first = (
        "import time; t = time.perf_counter()\n"
        "import numpy as np\nfrom dapo_edge import Inspector\n"
        f"with Inspector({str(package.path)!r}) as inspector: inspector.inspect(np.zeros((1080, 1920, 3), np.uint8))\n"
        "print((time.perf_counter() - t) * 1e3)"
    )
    imported = "import time; t = time.perf_counter(); import dapo_edge; print((time.perf_counter() - t) * 1e3)"

    def printed(code: str, environment: dict[str, str]) -> float:
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    def helped() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dapo_edge", "--help"], capture_output=True, check=True)
        return (time.perf_counter() - started) * 1e3

    def uncached() -> float:
        with tempfile.TemporaryDirectory() as empty:
            return printed(first, {**os.environ, "DAPO_EDGE_CACHE": empty})

    printed(first, cached)
    return {
        "import_ms": _median(lambda: printed(imported, cached)),
        "help_ms": _median(helped),
        "first_result_ms": _median(lambda: printed(first, cached)),
        "first_result_without_cache_ms": _median(uncached),
    }


def parity(package: EnginePackage, count: int) -> dict[str, float]:
    """OpenVINO FP32 against eager torch on generated defects, with a bank that gives the map contrast."""
    views = [make_surface(seed, (640, 480), good_share=0).image for seed in range(count)]
    cosine, difference, agreement = [], [], []
    with (
        OpenVinoBackend.open(package, map_size="model", precision="fp32") as compiled,
        EagerBackend.open(package, map_size="model") as eager,
    ):
        bank = contrasting_bank(package, compiled.encode(views[:1])[0])
        for view in views:
            got, expected = compiled.encode([view])[0], eager.encode([view])[0]
            lengths = np.linalg.norm(got, axis=-1) * np.linalg.norm(expected, axis=-1)
            cosine.append(((got * expected).sum(-1) / lengths).min())
            for backend in (compiled, eager):
                backend.set_bank(bank)
            ours, reference = compiled.infer([view]), eager.infer([view])
            difference.append(np.abs(ours.anomaly - reference.anomaly).max())
            agreement.append((ours.types == reference.types).mean())
    return {
        "token_cosine_min": float(min(cosine)),
        "map_difference_max": float(max(difference)),
        "type_agreement_min": float(min(agreement)),
    }


def contrasting_bank(package: EnginePackage, tokens: NDArray[np.float32]) -> PromptBank:
    """Rows around real patch tokens [1, L, N, D]: with seeded weights the words' own rows give nearly flat maps."""
    names = package.bank().names
    patches = tokens[0].reshape(-1, tokens.shape[-1])
    rows = patches[:: len(patches) // len(names)][: len(names)] - patches.mean(axis=0)
    return PromptBank(names, rows / np.linalg.norm(rows, axis=1, keepdims=True))


def against_eager(package: EnginePackage, rounds: int) -> dict[str, Any]:
    """One 1080p frame in, anomaly and type map out, batch 1: the package against the usual torch pipeline."""
    frames = [Belt(FRAME_SIZE, seed=1).frame(index * 15).image for index in range(8)]
    eager = EagerBackend.open(package, map_size="model")
    bank = contrasting_bank(package, eager.encode(frames[:1])[0])
    usual = Usual(package.manifest, bank).around(lambda image: eager.method(image)[0])
    timings: dict[str, list[float]] = {"eager": [], "ours": []}
    stages: dict[str, list[float]] = {}
    ratios = []
    regions = []
    with Inspector(package) as inspector:
        inspector.set_bank(bank)
        expected = usual(frames[0])[0]
        difference = float(np.abs(expected - inspector.inspect(frames[0]).anomaly_map).max())
        # A threshold that the maps cross in several places, so that finding regions is part of what is timed.
        maps = np.stack([usual(frame)[0] for frame in frames])
        middle = (float(maps.min()) + float(maps.max())) / 2
        limit = Threshold(value=middle, false_reject_rate=0, confidence_95=(0, 1))
        inspector.set_bank(bank, Thresholds(image=limit, pixel=limit, bank=bank.digest))
        for _ in range(rounds):
            eager_ms = _time(lambda index: usual(frames[index % 8]), EAGER_FRAMES)
            ours = [inspector.inspect(frames[index % 8]) for index in range(WARM + OUR_FRAMES)][WARM:]
            ours_ms = [result.ms["total"] for result in ours]
            for result in ours:
                regions.append(len(result.regions))
                for stage, ms in result.ms.items():
                    stages.setdefault(stage, []).append(ms)
            timings["eager"] += eager_ms
            timings["ours"] += ours_ms
            ratios.append(statistics.median(eager_ms) / statistics.median(ours_ms))
        if statistics.mean(regions) < 1:
            raise SystemExit(f"{statistics.mean(regions)} regions per frame: finding them was hardly timed")
        outside = 1 - np.median(stages["encode"]) / np.median(stages["total"])
    return {
        "precision": "fp32",
        "defect_types": len(package.bank().names) - 1,
        "eager_ms": percentiles(np.asarray(timings["eager"])),
        "ours_ms": {stage: percentiles(np.asarray(values)) for stage, values in stages.items()},
        "times_faster": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "share_outside_encoder": float(outside),
        "regions_per_frame": statistics.mean(regions),
        "map_difference_to_the_usual_resize": difference,
    }


def memory(package: EnginePackage, frames: int = 2000) -> dict[str, float]:
    """Resident memory after 100 frames of the belt, and after `frames` more."""
    with Inspector(package, map_size="frame") as inspector:
        world = Belt((640, 480), seed=3)
        for index in range(100):
            inspector.inspect(world.frame(index).image)
        before = resident_mb()
        for index in range(100, 100 + frames):
            inspector.inspect(world.frame(index).image)
        return {"frames": frames, "resident_mb": before, "growth_mb": resident_mb() - before}


def belt(package: EnginePackage, precision: str, frames: int = 200) -> dict[str, Any]:
    """Frames per second from the generated belt, made and inspected in one thread."""
    with Inspector(package, precision=precision) as inspector:
        world = Belt((640, 480), seed=3)
        for index in range(20):
            inspector.inspect(world.frame(index).image)
        started = time.perf_counter()
        for index in range(20, 20 + frames):
            inspector.inspect(world.frame(index).image)
        return {"runs_as": inspector.backend.precision, "fps": frames / (time.perf_counter() - started)}


def _time(call: Callable[[int], object], frames: int) -> list[float]:
    timings = []
    for index in range(WARM + frames):
        started = time.perf_counter()
        call(index)
        timings.append((time.perf_counter() - started) * 1e3)
    return timings[WARM:]


def _median(measure: Callable[[], float], times: int = 5) -> float:
    return round(statistics.median(measure() for _ in range(times)), 1)


if __name__ == "__main__":
    end_with(main)
