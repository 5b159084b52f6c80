"""Who is compared, on which models, and the packages, banks and pictures that all of them get."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from common import DEMO_RECIPE, FRAME_SIZE, bank_around, released, vit_b16

from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.config import Gate, Recipe, load_recipe
from dapo_edge.data.belt import Belt
from dapo_edge.errors import BackendError, RecipeError
from dapo_edge.package import EnginePackage

FRAMES = 4  # different pictures
JPEG_QUALITY = 90
REFERENCE = "eager-fp32"  # whose maps every other contender's are compared with
OURS = {"cpu": "ours-int8", "cuda": "ours-tensorrt"}  # what each peer on such a device is compared with


@dataclass(frozen=True)
class Contender:
    """One row of a table."""

    title: str
    loader: str  # module:function
    precision: str
    device: str = "cpu"
    of_anomalib: bool = False  # runs by anomalib's Python, and is a model of its own

    @property
    def is_peer(self) -> bool:
        """Whether it runs the same model as we do, and is not ours."""
        return not (self.of_anomalib or self.loader.endswith(":ours"))


CONTENDERS = {
    "eager-fp32": Contender("torch eager FP32", "peer_models:eager", "fp32"),
    "eager-bf16": Contender("torch eager BF16", "peer_models:eager", "bf16"),
    "compile-fp32": Contender("torch.compile FP32", "peer_models:compiled", "fp32"),
    "compile-bf16": Contender("torch.compile BF16", "peer_models:compiled", "bf16"),
    "ort-fp32": Contender("ONNX Runtime FP32", "peer_models:onnxruntime", "fp32"),
    "ort-int8-qdq": Contender("ONNX Runtime INT8, our Q/DQ encoder", "peer_models:onnxruntime", "int8-qdq"),
    "ort-int8-dynamic": Contender("ONNX Runtime INT8, quantize_dynamic", "peer_models:onnxruntime", "int8-dynamic"),
    "openvino": Contender("OpenVINO, compile_model", "peer_models:openvino", "its own choice"),
    "anomalib-winclip": Contender(
        "anomalib WinCLIP by its OpenVINO inferencer", "peer_anomalib:winclip", "its own choice", of_anomalib=True
    ),
    "ours-fp32": Contender("dapo-edge FP32", "peer_models:ours", "fp32"),
    "ours-fast": Contender("dapo-edge fast float", "peer_models:ours", "fp16"),
    "ours-int8": Contender("dapo-edge INT8", "peer_models:ours", "int8"),
    "cuda-eager": Contender("torch eager FP16, GPU", "peer_gpu:eager", "fp16", "cuda"),
    "cuda-compile": Contender("torch.compile FP16, GPU", "peer_gpu:compiled", "fp16", "cuda"),
    "cuda-graph": Contender("torch eager FP16 as a CUDA graph", "peer_gpu:graph", "fp16", "cuda"),
    "cuda-ort": Contender("ONNX Runtime CUDA, FP32", "peer_gpu:onnxruntime", "fp32", "cuda"),
    "ours-tensorrt": Contender("dapo-edge TensorRT", "peer_gpu:ours", "fp16", "cuda"),
}
INT8_OF_ORT = ("ort-int8-qdq", "ort-int8-dynamic")  # people would take the faster one


@dataclass(frozen=True)
class Configuration:
    """One model that every contender runs."""

    title: str
    package: str  # name of its folder, without .dapo
    recipe: Callable[[], Recipe]
    asked: dict[str, float]  # of issue 8: how many times faster than whom our INT8 has to be
    anomalib: bool = False  # whether WinCLIP runs beside it, which is the size of a ViT-B


def _quick(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"gate": Gate(count=1)})


def _vit_l(image_size: int) -> Recipe:
    return released().model_copy(update={"image_size": image_size, "name": f"vitl14-{image_size}"})


CONFIGURATIONS = {
    "b16-224": Configuration(
        "ViT-B/16 at 224 px",
        "b16",
        lambda: _quick(vit_b16()),
        {REFERENCE: 4.0, "ort-int8": 1.4, "best": 1.2},
        anomalib=True,
    ),
    "l14-336": Configuration("ViT-L/14 at 336 px", "l336", lambda: _vit_l(336), {}),
    "l14-518": Configuration("ViT-L/14 at 518 px", "l518", lambda: _vit_l(518), {REFERENCE: 4.0}),
    "reference": Configuration(
        "surface-tiny, the bundled model", "reference", lambda: _quick(load_recipe(DEMO_RECIPE)), {}
    ),
}


def contenders_for(configuration: Configuration, only: Sequence[str] = ()) -> list[str]:
    """Names of rows. With `only`, besides those only what all are compared with."""
    needed = {REFERENCE, *(OURS[CONTENDERS[name].device] for name in only)}
    return [
        name
        for name, row in CONTENDERS.items()
        if (configuration.anomalib or not row.of_anomalib) and (not only or name in needed.union(only))
    ]


def package_of(configuration: Configuration, folders: tuple[Path, ...]) -> EnginePackage:
    """The package from the first folder that has it, else built into the last one.

    Raises `RecipeError` where a package of that name is another model's.
    """
    recipe = configuration.recipe()
    name = f"{configuration.package}.dapo"
    found = next((folder / name for folder in folders if (folder / name).exists()), None)
    if found is None:
        found = folders[-1] / name
        _build(recipe, found)
    package = EnginePackage.open(found.resolve())
    manifest = package.manifest
    wrong_size = recipe.image_size not in (None, manifest.image_size)
    if manifest.backbone != recipe.backbone.model or wrong_size or not package.holds_int8:
        raise RecipeError(
            f"'{found}' is {manifest.backbone} at {manifest.image_size} px, INT8: {package.holds_int8}, "
            f"and can't stand for {configuration.title} with INT8",
            "Remove it, or name another folder of packages",
        )
    return package


def _build(recipe: Recipe, path: Path) -> None:
    """In a process of its own: what torch leaves behind would be missing to the contenders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".yaml")
    written.write_text(json.dumps(recipe.model_dump(mode="json")), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, str(Path(__file__).with_name("packages.py")), str(written), str(path)]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise BackendError(f"the build of '{path.name}' ended with {done.returncode}", "Look at what it printed above")


def write_inputs(package: EnginePackage, folder: Path, size: tuple[int, int] = FRAME_SIZE) -> None:
    """`frames.npz` and `bank.safetensors` for every contender: pictures of a belt, and rows that see contrast in them.

    The package's own words would not do: good parts are normal everywhere, and then every contender has the same types.
    """
    frames = [Belt(size, seed=1).frame(index * 15).image for index in range(FRAMES)]
    arrays: dict[str, Any] = {"raw": np.stack(frames)}
    for index, frame in enumerate(frames):
        done, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        assert done
        arrays[f"jpeg{index}"] = data
    np.savez(folder / "frames.npz", **arrays)
    with OpenVinoBackend.open(package, map_size="model", precision="fp32") as backend:
        bank = bank_around(backend.encode(frames[:1])[0], len(package.bank().names) - 1)
    (folder / "bank.safetensors").write_bytes(bank.to_bytes())
