"""Packages and encoders that several benchmarks time: made once, kept in .cache/benchmarks.

    python benchmarks/packages.py RECIPE PACKAGE

builds one with an INT8 encoder that no gate has seen.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import DEMO_RECIPE, HERE, vit_b16
from numpy.typing import NDArray

from dapo_edge import Inspector, build
from dapo_edge.backends.onnx_graph import read_plain
from dapo_edge.backends.onnx_quantized import for_cpu
from dapo_edge.backends.openvino import HINT_OF, OpenVinoBackend, fast_float_type
from dapo_edge.calibration.frames import calibration_frames
from dapo_edge.calibration.run import EncoderUnderTest, ranges_over
from dapo_edge.config import Calibration, Gate, Recipe, load_recipe
from dapo_edge.engine.quantize import quantization_of
from dapo_edge.extras import require
from dapo_edge.kernels.map_spec import MapSize
from dapo_edge.package import ENCODER_INT8, QUANTIZATION, EnginePackage, PackageWriter, Preprocessing
from dapo_edge.quantization import Quantization

CACHE = HERE.parent / ".cache" / "benchmarks"
SOURCES = HERE.parent / "dapo_edge"
MAKES_ENCODERS = ("models", "engine", "calibration", "backends/onnx_*.py", "quantization.py", "assets")
INT8_FRAMES = 8  # that scales are measured on: they move no time


def reference_package() -> EnginePackage:
    """The demo's package, its thresholds set on few frames."""
    recipe = load_recipe(DEMO_RECIPE)
    quick = {
        "thresholds": recipe.thresholds.model_copy(update={"count": 8}),
        "gate": recipe.gate.model_copy(update={"count": 2}),
    }
    return cached("reference.dapo", lambda path: build(recipe.model_copy(update=quick), path))


def vit_package() -> EnginePackage:
    """ViT-B/16 at 224 px with an INT8 encoder, without the minutes in which a build makes sure of its accuracy."""
    return cached("vit-b16.dapo", functools.partial(build_with_int8, vit_b16()))


def judged_vit_package() -> EnginePackage:
    """ViT-B/16 at 224 px as `dapo-edge build` makes it: with the fastest precision that the accuracy gate lets pass."""
    recipe = vit_b16().model_copy(
        update={
            "precision": "auto",
            "calibration": Calibration(frames="synthetic", count=64),
            "gate": Gate(count=16),
        }
    )
    return cached("judged-vit-b16.dapo", lambda path: build(recipe, path))


def build_with_int8(recipe: Recipe, path: Path) -> EnginePackage:
    """A package with an INT8 encoder, all Linears by their largest values on a few frames, that no gate has seen.

    A build looks for scales and makes sure of the accuracy for minutes, which changes no time.
    """
    plain = build(recipe.model_copy(update={"precision": "fp32"}), path.with_name(f"plain-{path.name}"))
    manifest = plain.manifest
    int8, quantization = int8_encoder(plain.encoder_bytes(), manifest.preprocessing, manifest.backbone)
    with PackageWriter(path) as writer:
        for name in manifest.files:
            writer.write(name, (plain.path / name).read_bytes())
        writer.write(ENCODER_INT8, int8)
        writer.write(QUANTIZATION, quantization.to_bytes())
        package = writer.commit(manifest.model_dump(exclude={"files", "format"}))
    shutil.rmtree(plain.path)
    return package


@contextlib.contextmanager
def opened(package: EnginePackage, precision: str, map_size: MapSize = "model") -> Iterator[Inspector]:
    """An inspector that asks no gate about its precision: it is here for its speed."""
    with OpenVinoBackend.open(package, map_size=map_size, precision=precision, cache=False) as backend:
        yield Inspector.on(package, backend, map_size=map_size)


def tokens_of(inspector: Inspector, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Patch tokens [1, L, N, D] of a frame."""
    assert isinstance(inspector.backend, OpenVinoBackend)
    return inspector.backend.encode([frame])[0]


def bare_encoder(package: EnginePackage, precision: str) -> Callable[[], object]:
    """The encoder as OpenVINO runs it for anybody, one image at a time, on one fixed input."""
    return bare_inference(package.encoder_bytes(precision), precision)


def bare_inference(encoder: bytes, precision: str) -> Callable[[], object]:
    """`bare_encoder` of an ONNX file."""
    model = compiled(encoder, precision, "LATENCY")
    request, image = model.create_infer_request(), fixed_input(model)
    return functools.partial(request.infer, [image], share_inputs=True, share_outputs=True)


def compiled(encoder: bytes, precision: str, hint: str) -> Any:
    """OpenVINO's model of an ONNX file; what is not INT8 in INT8, and fp16, is of the CPU's fastest float type."""
    core = require("openvino").Core()
    float_type = HINT_OF["fp32" if precision == "fp32" else fast_float_type() or "fp32"]
    properties = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": float_type}
    return core.compile_model(core.read_model(encoder, b""), "CPU", properties)


def fixed_input(model: Any) -> NDArray[np.float32]:
    """[B, 3, S, S], what normalised pictures look like to an encoder."""
    return np.random.default_rng(0).standard_normal(tuple(model.input().shape)).astype(np.float32)


def int8_encoder(encoder: bytes, preprocessing: Preprocessing, backbone: str) -> tuple[bytes, Quantization]:
    """All Linears of an FP32 encoder in INT8, by the largest values on a few frames; no gate has seen it."""
    frames = calibration_frames("synthetic", INT8_FRAMES, 0)
    ranges = ranges_over(frames, EncoderUnderTest(encoder, preprocessing, backbone), INT8_FRAMES)
    quantization = quantization_of(read_plain(encoder), ranges, "max", 0.0)
    return for_cpu(encoder, quantization), quantization


def cached(name: str, made: Callable[[Path], object]) -> EnginePackage:
    """A package of this very code, from the cache or made now; those of older code go."""
    folder = CACHE / _code_digest()
    if not (folder / name).exists():
        if not folder.exists():
            shutil.rmtree(CACHE, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        made(folder / name)
    return EnginePackage.open(folder / name)


@functools.lru_cache(maxsize=1)
def _code_digest() -> str:
    """Of everything that decides what an encoder is."""
    digest = hashlib.sha256(json.dumps(vit_b16().model_dump(mode="json"), sort_keys=True).encode())
    for pattern in MAKES_ENCODERS:
        for path in sorted(SOURCES.glob(pattern)):
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in files:
                if file.is_file() and file.suffix != ".pyc":
                    digest.update(file.relative_to(SOURCES).as_posix().encode() + b"\n" + file.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":  # in a process of its own, what torch leaves behind is missing to nobody
    build_with_int8(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
