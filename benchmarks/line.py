"""Measure the line runtime on this machine and write benchmarks/results/<device>/line.json.

    python benchmarks/line.py [--out FILE] [--rounds 5]

Four generated cameras of 1280x720 share one package. Their frames are drawn before the clock starts. Encoder
alone and whole line run in one process, by turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import DEMO_RECIPE, end_with, resident_mb, result_file, results_folder, say, vit_b16

from dapo_edge import Inspector, build, open_source
from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.bench import percentiles
from dapo_edge.bench.provenance import provenance
from dapo_edge.config import load_recipe
from dapo_edge.data.surfaces import make_surface
from dapo_edge.files import as_bytes, write_atomically
from dapo_edge.package import EnginePackage
from dapo_edge.runtime.outcome import CameraEvent, Outcome
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan, SinkPlan
from dapo_edge.runtime.tiling import Views

CAMERAS, FRAMES, SIZE = 4, 100, "1280x720"
LOAD, LOAD_SECONDS = 0.7, 12
TILED_SIZE, TILE, OVERLAP = (4000, 3000), (1000, 1000), 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, default=results_folder() / "line.json")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    recipe = load_recipe(DEMO_RECIPE)
    with tempfile.TemporaryDirectory() as scratch:
        small = build(recipe, Path(scratch) / "small.dapo")
        batched = build(recipe.model_copy(update={"batch": 4}), Path(scratch) / "batched.dapo")
        large = build(vit_b16(), Path(scratch) / "vit-b16.dapo")
        throughputs = {
            name: say(name, throughput(package, arguments.rounds, frames))
            for name, package, frames in (
                ("surface-tiny, batch 1", small, FRAMES),
                ("surface-tiny, batch 4", batched, FRAMES),
                ("ViT-B/16 at 224 px, batch 1", large, FRAMES // 10),
            )
        }
        line_fps = throughputs["surface-tiny, batch 1"]["line_fps"]
        result = {
            "schema": "dapo-edge line 1",
            **provenance(sys.argv),
            "cameras": f"{CAMERAS} of {SIZE}, fp32",
            "throughput": throughputs,
            "load": say("load", waiting(small, LOAD * line_fps / CAMERAS)),
            "runtime_alone": say("runtime alone", runtime_alone()),
            "tiles": say("tiles", tiles(small)),
            "trigger": say("trigger", trigger_to_verdict(small)),
        }
    write_atomically(arguments.out, as_bytes(result))
    print(f"written: {arguments.out}", file=sys.stderr)


def throughput(package: EnginePackage, rounds: int, frames: int) -> dict[str, Any]:
    """Frames per second: the encoder alone, all cameras through the whole line, and one frame after the other."""
    alone, line, loop = [], [], []
    with Inspector(package, throughput=True) as inspector, Inspector(package) as quick:
        for number in range(rounds + 1):
            figures = (encoder_alone(inspector, frames), whole_line(inspector, frames), one_by_one(quick, frames))
            if number:  # the first round warms up
                for series, figure in zip((alone, line, loop), figures, strict=True):
                    series.append(figure)
    ratios = [ours / theirs for ours, theirs in zip(line, alone, strict=True)]
    return {
        "encoder_alone_fps": statistics.median(alone),
        "line_fps": statistics.median(line),
        "one_by_one_fps": statistics.median(loop),
        "line_to_encoder": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def encoder_alone(inspector: Inspector, frames: int) -> float:
    """As many threads as the line has, each with nothing to do but to encode; frames per second."""
    backend, manifest = inspector.backend, inspector.package.manifest
    assert isinstance(backend, OpenVinoBackend)
    views = [np.zeros((manifest.image_size, manifest.image_size, 3), np.uint8)] * manifest.batch
    calls = frames * CAMERAS // (manifest.batch * backend.concurrency)

    def work() -> None:
        with backend._request() as request:
            for _ in range(calls):
                request.encode(views)

    return calls * backend.concurrency * manifest.batch / seconds_of(work, backend.concurrency)


def whole_line(inspector: Inspector, frames: int) -> float:
    """All cameras at the highest rate that the engine allows; frames per second."""
    order = Order()
    pipeline = Pipeline(inspector, cameras(f"@1000?loop=4&frames={frames}", policy="wait"), [SinkPlan(order)])
    pipeline.run()
    counts = pipeline.counts()
    assert counts.inspected == counts.captured == frames * CAMERAS and not order.broken
    return pipeline.as_json()["fps"]


def one_by_one(inspector: Inspector, frames: int) -> float:
    """What a `while read(): inspect()` loop does with the same frames; frames per second."""
    pictures = []
    for plan in cameras(f"@1000?loop=4&frames={max(4, frames // 4)}"):
        with open_source(plan.uri) as source:
            pictures += list(source)
    started = time.perf_counter()
    for picture in pictures:
        inspector.inspect(picture)
    return len(pictures) / (time.perf_counter() - started)


def waiting(package: EnginePackage, fps: float) -> dict[str, Any]:
    """How long frames of live cameras wait for the engine, from their arrival, at a share of what it can do."""
    with Inspector(package, throughput=True) as inspector:
        order = Order()
        frames = round(LOAD_SECONDS * fps)
        options = f"@{fps:.3f}?loop=4&frames={frames}&realtime=1"
        pipeline = Pipeline(inspector, cameras(options, policy="newest"), [SinkPlan(order)])
        pipeline.run()
    assert not order.broken
    waits = np.asarray(order.waits_ms)
    return {
        "share_of_line_fps": LOAD,
        "fps_per_camera": fps,
        "interval_ms": 1e3 / fps,
        "waiting_ms": percentiles(waits),
        "p99_in_intervals": float(np.percentile(waits, 99)) * fps / 1e3,
        "dropped": pipeline.counts().dropped,
    }


def runtime_alone() -> dict[str, float]:
    """Frames per second of the runtime around an engine that does nothing."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from line_fakes import FakeInspector

    pipeline = Pipeline(
        FakeInspector(concurrency=3),  # type: ignore[arg-type]
        cameras("@1000?loop=4&frames=5000", policy="wait"),
        [SinkPlan(Order())],
    )
    pipeline.run()
    fps = pipeline.as_json()["fps"]
    return {"fps": fps, "ms_per_frame": 1e3 / fps}


def tiles(package: EnginePackage) -> dict[str, Any]:
    """A frame of 12 million pixels in overlapping tiles."""
    frame = make_surface(5, TILED_SIZE, good_share=0).image
    views = Views((), TILE, OVERLAP)
    with Inspector(package) as inspector:
        inspector.inspect(frame, views)
        before = resident_mb()
        results = [inspector.inspect(frame, views) for _ in range(10)]
        after = resident_mb()
        count = len(inspector.plan(views, TILED_SIZE).boxes)
    stages = {stage: statistics.median(result.ms[stage] for result in results) for stage in results[0].ms}
    height, width = results[0].anomaly_map.shape
    return {
        "frame": list(TILED_SIZE),
        "tile": TILE[0],
        "overlap": OVERLAP,
        "tiles": count,
        "map": [width, height],
        "ms": stages,
        "growth_mb": after - before,
    }


def trigger_to_verdict(package: EnginePackage) -> dict[str, Any] | str:
    """A software trigger of Basler's camera emulator, to the verdict in a sink."""
    import os

    os.environ["PYLON_CAMEMU"] = "1"
    try:
        import pypylon.pylon  # noqa: F401
    except ImportError:
        return "not measured: pypylon is not installed"
    order = Order()
    with Inspector(package) as inspector:
        plan = CameraPlan("basler", "basler://?trigger=software&PixelFormat=Mono8", fps=20, frames=100)
        Pipeline(inspector, [plan], [SinkPlan(order)]).run()
    return {"frame_to_verdict_ms": percentiles(np.asarray(order.verdict_ms)), "camera": "pylon emulation, Mono8"}


def cameras(options: str, **plan: Any) -> list[CameraPlan]:
    """As many as are measured, each with pictures of its own."""
    return [CameraPlan(f"c{n}", f"synthetic://{SIZE}{options}&seed={n}", **plan) for n in range(CAMERAS)]


def seconds_of(work: Callable[[], None], threads: int) -> float:
    """How long so many threads take that all do the same."""
    workers = [threading.Thread(target=work) for _ in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


class Order:
    """A sink that checks each camera's order, and keeps how long frames waited."""

    name = "order"
    draws = False

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.waits_ms: list[float] = []
        self.verdict_ms: list[float] = []  # from the frame's arrival until it is here
        self.broken = False

    def open(self) -> None:
        pass

    def write(self, outcome: Outcome) -> None:
        assert outcome.index is not None and outcome.frame and outcome.inspection
        self.broken |= outcome.index != self.last.get(outcome.camera, -1) + 1
        self.last[outcome.camera] = outcome.index
        self.waits_ms.append(outcome.inspection.ms["wait"])
        self.verdict_ms.append((time.monotonic() - outcome.frame.arrived_s) * 1e3)

    def note(self, event: CameraEvent) -> None:
        pass

    def close(self) -> None:
        pass


if __name__ == "__main__":
    end_with(main)
