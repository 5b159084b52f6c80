"""Measure what INT8 gains and costs on this machine, and write benchmarks/results/<device>/int8.json.

    python benchmarks/int8.py [--out FILE] [--parts speed,accuracy,outliers,calibration] [--test-images 500]

Precisions run in one process, by turns, frame by frame, so that a machine that slows down slows all of them. The naive
recipe (naive_int8.py) goes through the same gate as ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from common import DEMO_RECIPE, FRAME_SIZE, end_with, resident_mb, result_file, results_folder, say, vit_b16
from naive_int8 import naive_int8
from packages import judged_vit_package

from dapo_edge import build
from dapo_edge.backends.base import Backend
from dapo_edge.backends.host import all_channels
from dapo_edge.backends.openvino import OpenVinoBackend, fast_float_type
from dapo_edge.bench import percentiles
from dapo_edge.bench.provenance import provenance
from dapo_edge.calibration.frames import Usable, calibration_frames
from dapo_edge.calibration.run import calibrate
from dapo_edge.config import Calibration, Gate, Recipe, load_recipe
from dapo_edge.data import protocol
from dapo_edge.data.belt import Belt
from dapo_edge.data.protocol import surfaces_v1
from dapo_edge.engine.build import build as build_package
from dapo_edge.engine.int8 import Int8, build_int8
from dapo_edge.engine.job import Job
from dapo_edge.engine.judge import Judge
from dapo_edge.engine.range_probe import RangeProbe
from dapo_edge.evaluation.comparison import TEST_SETS
from dapo_edge.evaluation.metrics import Evaluation
from dapo_edge.files import as_bytes, write_atomically
from dapo_edge.models.eager import EagerBackend
from dapo_edge.models.method import Method, method_of
from dapo_edge.package import ENCODER_INT8, EnginePackage, PackageWriter
from dapo_edge.runtime.decide import decide
from dapo_edge.training.views import World

WARM, ROUNDS = 5, 60
CALIBRATION_FRAMES = 300
TEST_SEEDS = {"a": 4, "b": 5, "c": 6}  # of the protocol's test stretch, as the comparison of surfaces-v1 has them
METRICS = ("image_auroc", "pixel_auroc", "aupro", "type_pixel_f1_max", "type_accuracy")
OUTLIER_GAIN, OUTLIER_CHANNELS = 30.0, 6
OUTLIER_BLOCK = 1  # all feature layers of the demo model see its residual stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, default=results_folder() / "int8.json")
    parser.add_argument("--parts", default="speed,accuracy,outliers,calibration")
    parser.add_argument("--test-images", type=int, default=500)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    result |= {
        "schema": "dapo-edge int8 1",
        **provenance(sys.argv),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if "speed" in parts:
            result["vit_b16_224"] = say("speed", speed())
        if "accuracy" in parts:
            result["surfaces_v1"] = say("accuracy", accuracy(folder, arguments.test_images))
        if "outliers" in parts:
            result["outliers"] = say("outliers", outliers(folder))
        if "calibration" in parts:
            result["calibration"] = say("calibration", calibration())
    write_atomically(arguments.out, as_bytes(result))
    print(f"written: {arguments.out}", file=sys.stderr)


def speed() -> dict[str, Any]:
    """ViT-B/16 at 224 px in each precision: encoder alone, and from a 1080p frame to the map."""
    package = judged_vit_package()
    frames = [Belt(FRAME_SIZE, seed=1).frame(index * 15).image for index in range(8)]
    stages: dict[str, dict[str, list[float]]] = {}
    with opened(package) as backends:
        for index in range(WARM + ROUNDS):
            for name, backend in backends.items():
                ms = backend.infer([frames[index % len(frames)]]).stage_ms
                if index >= WARM:
                    for stage, value in {**ms, "total": sum(ms.values())}.items():
                        stages.setdefault(name, {}).setdefault(stage, []).append(value)
        runs_as = {name: backend.precision for name, backend in backends.items()}
    fp32 = stages["fp32"]
    return {
        "taken_by_auto": package.manifest.precision,
        "precisions": {
            name: {
                "runs_as": runs_as[name],
                "ms": {stage: percentiles(np.asarray(values)) for stage, values in own.items()},
                "times_faster_than_fp32": {
                    stage: statistics.median(np.divide(fp32[stage], own[stage])) for stage in ("encode", "total")
                },
            }
            for name, own in stages.items()
        },
        "int8_times_faster_than_fp16": statistics.median(np.divide(stages["fp16"]["encode"], stages["int8"]["encode"]))
        if "fp16" in stages
        else None,
        "gate": package.report()["precisions"],
    }


def accuracy(folder: Path, images: int) -> dict[str, Any]:
    """The demo model on test sets of surfaces-v1 in each precision, and in naive INT8."""
    recipe = load_recipe(DEMO_RECIPE).model_copy(
        update={"precision": "int8", "calibration": Calibration(frames="synthetic", count=CALIBRATION_FRAMES)}
    )
    recipe = recipe.model_copy(update={"gate": Gate(frames="synthetic", count=200)})
    judged: dict[str, Any] = {}

    def spied(job: Job, writer: PackageWriter, draft: Callable[[], EnginePackage], judge: Judge) -> Int8:
        """Put the naive encoder through the very gate of this build, and then our own."""
        encoder = draft().encoder_bytes()
        judged["encoder"] = naive_int8(encoder, _largest_values(job, encoder))
        result = build_int8(job, writer, draft, judge)
        judged["naive"] = _through_gate(judged["encoder"], writer, draft, judge)
        return result

    with patch("dapo_edge.engine.build.build_int8", spied):
        package = build_package(recipe, folder / "tiny.dapo")
    naive = _with_encoder(package, judged["encoder"], folder / "naive.dapo")
    report = package.report()
    with (
        opened(package) as backends,
        OpenVinoBackend.open(naive, map_size="model", precision="int8", cache=False) as naive_backend,
    ):
        tests = {name: _tested(package, {**backends, "naive int8": naive_backend}, name, images) for name in TEST_SEEDS}
    return {
        "images_per_test_set": images,
        "test_sets": tests,
        "gate": {"ours": report["precisions"], "naive": judged["naive"]},
        "search": {key: report["quantization"][key] for key in ("estimator", "alpha", "given_back", "candidates")},
        "emulation_difference": report["quantization"]["emulation_difference"],
    }


def outliers(folder: Path) -> dict[str, Any]:
    """A LayerNorm gain of one block x 30 on some channels, made up for in the weights behind it: who copes?

    The function of the float encoder stays what it was, so every difference is quantisation.
    """
    found = {}
    for name, estimator, migration in (
        ("max", "max", 0.0),
        ("percentile", "percentile", 0.0),
        ("migration", "max", "auto"),
        ("auto", "auto", "auto"),
    ):
        recipe = load_recipe(DEMO_RECIPE).model_copy(
            update={
                "precision": "int8",
                "calibration": Calibration(frames="synthetic", count=64, estimator=estimator, migration=migration),
                "gate": Gate(frames="synthetic", count=200),
            }
        )
        with patch("dapo_edge.engine.build.method_of", planted):
            report = build(recipe, folder / f"outliers-{name}.dapo").report()
        quantization, drift = report["quantization"], report["precisions"]["int8"]
        found[name] = {
            "chosen": {key: quantization[key] for key in ("estimator", "alpha")},
            "whole": quantization["attempts"][0]["failed"],
            "given_back": quantization["given_back"],
            "map_difference": {"whole": min(c["map_difference"] for c in quantization["candidates"])},
            "gate": {key: drift[key] for key in ("map_difference_mean", "map_difference_max", "flips", "drops")},
            "failed": drift["failed"],
        }
    return found


def planted(recipe: Recipe) -> Method:
    """The recipe's method with outliers in one block."""
    import torch

    method = method_of(recipe)
    block = method.clip.visual.transformer.resblocks[OUTLIER_BLOCK - 1]
    with torch.no_grad():
        for norm, linear in ((block.ln_1, block.attn.in_proj_weight), (block.ln_2, block.mlp.c_fc.weight)):
            loudest = norm.weight.abs().argsort(descending=True)[:OUTLIER_CHANNELS]
            norm.weight[loudest] *= OUTLIER_GAIN
            norm.bias[loudest] *= OUTLIER_GAIN
            linear[:, loudest] /= OUTLIER_GAIN
    return method


def calibration(frames: int = 500) -> dict[str, Any]:
    """Ranges of ViT-B/16 over 500 frames of 640x480: time, and resident memory on the way."""
    recipe = vit_b16().model_copy(
        update={"calibration": Calibration(frames="synthetic", count=frames)},
    )
    memory: dict[int, float] = {}

    def step(name: str, done: int, of: int) -> None:
        if name == "measuring activations":
            memory[done] = resident_mb()

    started = time.perf_counter()
    ranges = calibrate(recipe, step)
    return {
        "frames": ranges.frames.used,
        "seconds": round(time.perf_counter() - started, 1),
        "resident_mb": {str(done): round(memory[done], 1) for done in (50, frames // 2, frames)},
        "file_bytes": len(ranges.to_json()),
    }


@contextlib.contextmanager
def opened(package: EnginePackage) -> Iterator[dict[str, OpenVinoBackend]]:
    """The package in every precision that this CPU computes."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(OpenVinoBackend.open(package, map_size="model", precision=name, cache=False))
            for name in ("fp32", *(["fp16"] if fast_float_type() else []), "int8")
        }


def _tested(package: EnginePackage, backends: Mapping[str, Backend], name: str, images: int) -> dict[str, Any]:
    """Metrics of one test set, drops against FP32, and verdicts that differ from its."""
    manifest, thresholds, bank = package.manifest, package.thresholds(), package.bank()
    first = protocol.first_picture(protocol.TEST, TEST_SEEDS[name], images)
    world = World(first, images, manifest.image_size, **TEST_SETS[name](surfaces_v1()))
    channel = np.array([bank.names.index(word) for word in world.names])
    evaluations = {precision: Evaluation(world.names) for precision in backends}
    verdicts: dict[str, list[str]] = {precision: [] for precision in backends}
    size = (manifest.image_size, manifest.image_size)
    for index in range(images):
        view = world[index]
        for precision, backend in backends.items():
            batch = backend.infer([view.image])
            maps = all_channels(batch.patch_probs, manifest.map, size)[0]
            maps[0] = 1 - batch.anomaly[0]
            score = float(batch.image_scores[0])
            evaluations[precision].add(maps[channel], score, view.types)
            verdicts[precision].append(decide(score, float(batch.anomaly[0].max()), thresholds))
    summaries = {precision: evaluation.summary().as_json() for precision, evaluation in evaluations.items()}
    fp32 = summaries["fp32"]
    f1 = {
        precision: {word: curve.f1_max() for word, curve in evaluation.types.curves().items() if curve.defined}
        for precision, evaluation in evaluations.items()
    }
    return {
        precision: {
            **{metric: round(float(summary[metric] or 0), 5) for metric in METRICS},
            "drops": {metric: round(float((fp32[metric] or 0) - (summary[metric] or 0)), 5) for metric in METRICS},
            "worst_type_f1_drop": round(_worst_drop(f1["fp32"], f1[precision]), 5),
            "flips": float(np.mean([a != b for a, b in zip(verdicts[precision], verdicts["fp32"], strict=True)])),
        }
        for precision, summary in summaries.items()
    }


def _worst_drop(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Of any defect type's pixel F1-max."""
    return max(before[word] - after[word] for word in before)


def _largest_values(job: Job, encoder: bytes) -> dict[str, float]:
    """Of every tensor, over the very frames that our own INT8 is calibrated with."""
    settings, probe = job.recipe.calibration, RangeProbe(encoder)
    frames = calibration_frames(str(settings.frames), settings.count, job.recipe.seed)
    with EagerBackend(job.method, job.bank, job.spec) as eager:
        for view in Usable(job.method.image_size).of(frames.frames()):
            probe.observe(eager.preprocess([view]).numpy())
    return probe.ranges


def _through_gate(
    encoder: bytes, writer: PackageWriter, draft: Callable[[], EnginePackage], judge: Judge
) -> dict[str, Any]:
    """What the gate says of an INT8 encoder; the package's own is put back afterwards."""
    own = (writer.folder / ENCODER_INT8).read_bytes()
    writer.write(ENCODER_INT8, encoder)
    try:
        with OpenVinoBackend.open(draft(), map_size="model", precision="int8", cache=False) as backend:
            judged = judge.judge({"int8": backend})["int8"]
    finally:
        writer.write(ENCODER_INT8, own)
    return {**asdict(judged.drift), "drops": asdict(judged.drops) if judged.drops else None, "failed": judged.broken}


def _with_encoder(package: EnginePackage, encoder: bytes, destination: Path) -> EnginePackage:
    """The same package with another INT8 encoder."""
    with PackageWriter(destination) as writer:
        for name in package.manifest.files:
            writer.write(name, (package.path / name).read_bytes())
        writer.write(ENCODER_INT8, encoder)
        return writer.commit(package.manifest.model_dump(exclude={"files", "format"}))


if __name__ == "__main__":
    end_with(main)
