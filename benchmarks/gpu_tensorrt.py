"""The part of the GPU benchmark that is the whole backend: TensorRT and the kernels through pycuda, without torch."""

from __future__ import annotations

import contextlib
import datetime
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checks  # of tests/gpu
import numpy as np
from gpu_measure import Effort, Steps, Workload, series
from numpy.typing import NDArray
from works import MEAN, STD

from dapo_edge import gate
from dapo_edge.backends.recorded import RecordedBackend
from dapo_edge.backends.tensorrt import TensorRtBackend
from dapo_edge.backends.tensorrt_compile import compile_package
from dapo_edge.config import packaged_recipe, parse_recipe
from dapo_edge.package import (
    ENCODER,
    PROMPTS,
    REFERENCE,
    REPORT,
    THRESHOLDS,
    EnginePackage,
    PackageWriter,
    Preprocessing,
    Thresholds,
)
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.reference_data import ReferenceData

SEEDED = "ViT, seeded weights of benchmarks/gpu_encoder.py"


def tensorrt_part(
    package: Path | None, encoder: Path | None, precision: str, workload: Workload, effort: Effort
) -> Steps:
    """Stages, whole call and launch of a compiled package, or of an encoder that is compiled first, at batch 1."""
    with _package(package, encoder, precision, workload) as opened:
        manifest = opened.manifest
        with TensorRtBackend.open(opened, map_size="model", precision=precision) as backend:
            checked = check(opened, backend)
            yield {
                "package": {
                    "name": manifest.name,
                    "backbone": manifest.backbone,
                    "image_size": manifest.image_size,
                    "types": len(backend.bank.names) - 1,
                },
                "runs_on": backend.device,
                "precision": backend.precision,
                "target": _target(opened, precision),
                "checked": checked,
            }
            measured = timed(backend, workload, effort)
        released = manifest.image_size == 518 and "ViT" in manifest.backbone and _is_large(opened)
        vit_l = {"encode_us": measured["stages_ms"]["encode"]["median"] * 1e3} if released else None
        yield {**measured, "vit_l": vit_l}


def check(package: EnginePackage, backend: TensorRtBackend) -> dict[str, float]:
    """Maps of the stored views against eager torch's. Raises `SystemExit` beyond the recipe's limit."""
    data = package.reference()
    if data is None:
        raise SystemExit(f"'{package.path}' carries no reference: build it again")
    limit, _ = gate.largest_differences(packaged_recipe(package.manifest.recipe).gate, backend.precision)
    recorded, largest = RecordedBackend(package, data), 0.0
    for view in data.views:
        for _ in range(2):  # plainly, then as a graph
            got, expected = backend.infer([view]), recorded.infer([view])
            largest = float(np.maximum(largest, np.abs(got.anomaly - expected.anomaly).max()))
    if not largest <= limit:
        raise SystemExit(f"the backend is wrong, by {largest} of the anomaly map: nothing was timed")
    return {"anomaly": largest, "limit": limit}


def timed(backend: TensorRtBackend, workload: Workload, effort: Effort) -> dict[str, Any]:
    """One frame after the other, as a line sends them."""
    frames = [_picture(workload, seed) for seed in range(8)]
    started, calls = time.perf_counter(), 0
    while calls < 16 or time.perf_counter() - started < effort.warmup_s:
        backend.infer([frames[calls % 8]])
        calls += 1
    warmup = f"{calls} frames"
    stages: dict[str, list[float]] = {}
    total, outside = [], []
    for index in range(effort.frames):
        before = time.perf_counter()
        result = backend.infer([frames[index % 8]])
        total.append((time.perf_counter() - before) * 1e3)
        outside.append(total[-1] - sum(result.stage_ms.values()))
        for stage, ms in result.stage_ms.items():
            stages.setdefault(stage, []).append(ms)
    return {
        "frame": list(workload.frame),
        "stages_ms": {stage: series(values, warmup) for stage, values in stages.items()},
        "total_ms": series(total, warmup),  # the caller's wait: into pinned memory, GPU, out of pinned memory
        "outside_gpu_ms": series(outside, warmup),
        "graph_host": launches(backend, effort),
    }


def launches(backend: TensorRtBackend, effort: Effort) -> dict[str, Any] | None:
    """Microseconds of this thread per graph launch; None with plain launches."""
    *_, path = backend._paths.values()  # the one that was used last
    if path._graph is None:
        return None
    values = []
    with backend._cuda.active():
        for _ in range(effort.samples):
            backend._cuda.synchronise()
            started = time.perf_counter()
            path._graph.launch()
            values.append((time.perf_counter() - started) * 1e6)
        backend._cuda.synchronise()
    return series(values, "all frames before")


@contextlib.contextmanager
def _package(package: Path | None, encoder: Path | None, precision: str, workload: Workload) -> Iterator[EnginePackage]:
    if package is not None:
        yield EnginePackage.open(package)
        return
    assert encoder is not None
    with tempfile.TemporaryDirectory() as scratch:
        made = assemble(encoder, Path(scratch) / "seeded.dapo", workload)
        compile_package(made, precision=precision)
        yield made


def assemble(encoder: Path, destination: Path, workload: Workload) -> EnginePackage:
    """A package around what `gpu_encoder.py` wrote, with a bank of random rows."""
    with np.load(encoder / "reference.npz") as arrays:
        ranges = json.loads(str(arrays["ranges"]))
        data = ReferenceData(arrays["views"], arrays["tokens"], arrays["embeddings"], ranges)
    shape, types = workload.encoder, workload.types
    names = ("normal", *(f"defect {number}" for number in range(1, types + 1)))
    bank = PromptBank(names, _unit(checks.random_bank(types, shape.dimensions)))
    recipe = parse_recipe(
        {
            "name": "seeded",
            "backbone": {"model": "ViT-L-14-336-quickgelu"},
            "image_size": shape.image_size,
            "feature_layers": list(shape.taps),
            "prompts": {"defects": list(names[1:])},
        }
    )
    with PackageWriter(destination) as writer:
        writer.write(ENCODER, (encoder / "encoder.onnx").read_bytes())
        writer.write(PROMPTS, bank.to_bytes())
        writer.write(THRESHOLDS, Thresholds().model_dump_json().encode())
        writer.write(REPORT, b"{}")
        writer.write(REFERENCE, data.to_bytes())
        return writer.commit(
            {
                "name": "seeded",
                "method": "dapo",
                "backbone": SEEDED,
                "weights": "seeded",
                "trained": False,
                "tuned": False,
                "precision": "fp16",
                "batch": 1,
                "image_size": shape.image_size,
                "feature_layers": shape.taps,
                "dimensions": shape.dimensions,
                "map_size": "model",
                "map": workload.spec,
                "preprocessing": Preprocessing(mean=MEAN, std=STD, resize="pillow-bicubic"),
                "recipe": recipe.model_dump(mode="json"),
                "versions": {},
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            }
        )


def _target(package: EnginePackage, precision: str) -> dict[str, Any]:
    """What the target says of itself: how it was built, and how much of it is fused."""
    from dapo_edge import targets

    target = targets.best(package, targets.fingerprint_here(), precision).target
    return {
        "fingerprint": target.fingerprint.model_dump(),
        "attention": target.attention.model_dump(),
        "islands": len(target.islands),
        "gate": dict(target.gate),
        "options": dict(target.options),
        "seconds": target.seconds,
    }


def _is_large(package: EnginePackage) -> bool:
    """Whether the encoder has the size of ViT-L: 0.3 billion weights of 4 bytes."""
    return package.manifest.files[ENCODER].size > 1 << 30


def _picture(workload: Workload, seed: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(checks.random_view("BGR8", workload.frame, seed).rgb()[..., ::-1])


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
