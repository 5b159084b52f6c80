"""What the tests of INT8 start from: an encoder with what belongs to it, frames, ranges, and outliers planted in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dapo_edge.backends.base import View
from dapo_edge.backends.host import resize_view
from dapo_edge.backends.onnx_graph import EMBEDDING, IMAGE, TOKENS, PlainGraph, assembled, read_plain
from dapo_edge.backends.onnx_linears import weights_digest
from dapo_edge.backends.onnx_quantized import migrated
from dapo_edge.calibration.measure import measure_ranges
from dapo_edge.calibration.ranges import ActivationRanges, CalibrationFrames
from dapo_edge.config import ASSETS, load_recipe
from dapo_edge.engine.build import map_spec
from dapo_edge.engine.export import export_encoder
from dapo_edge.engine.frames import build_frames
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models.method import method_of
from dapo_edge.package import EnginePackage, Preprocessing
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.quantization import Quantization


@dataclass(frozen=True, eq=False)
class Parts:
    """A portable FP32 encoder and all that makes maps of its tokens."""

    encoder: bytes
    bank: PromptBank
    spec: MapSpec
    preprocessing: Preprocessing

    @property
    def graph(self) -> PlainGraph:
        return read_plain(self.encoder)

    def images(self, first: int, count: int) -> NDArray[np.float32]:
        """Normalised RGB [count, 3, S, S] of generated surfaces."""
        resized = np.stack([resize_view(view, self.spec.image_size) for view in views(first, count)])
        rgb = resized[..., ::-1].astype(np.float32) / 255
        mean, std = (np.array(values, np.float32) for values in (self.preprocessing.mean, self.preprocessing.std))
        return np.ascontiguousarray(((rgb - mean) / std).transpose(0, 3, 1, 2))

    def ranges(self, frames: int = 8) -> ActivationRanges:
        """Measured on other surfaces than `images` from 100 on."""
        graph = self.graph
        measured = measure_ranges(self.encoder, self.preprocessing, views(0, frames), self.spec.image_size)
        seen = CalibrationFrames(
            source="synthetic",
            offered=frames,
            used=frames,
            unreadable=0,
            constant=0,
            not_picked=0,
            similarity=measured.similarity,
        )
        return ActivationRanges(
            weights=weights_digest(graph),
            backbone="test",
            batch=graph.shapes[IMAGE][0],
            image_size=self.spec.image_size,
            frames=seen,
            created="2026-01-01",
            versions={},
            linears=measured.linears,
        )


def views(first: int, count: int) -> list[View]:
    return list(build_frames("synthetic", count, good_only=False, seed=first))


def parts_of(package: EnginePackage) -> Parts:
    return Parts(package.encoder_bytes(), package.bank(), package.manifest.map, package.manifest.preprocessing)


@lru_cache(maxsize=1)
def surface_tiny() -> Parts:
    """The model that ships, as the demo recipe builds it."""
    recipe = load_recipe(ASSETS / "surface-tiny.yaml")
    method = method_of(recipe)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        export_encoder(method, path, recipe.batch)
        encoder = path.read_bytes()
    clip = method.clip
    return Parts(
        encoder,
        method.bank(recipe.prompts.defects, recipe.prompts.object),
        map_spec(recipe, method),
        clip.preprocessing,
    )


def with_outliers(parts: Parts, linears: Sequence[str], factor: float, channels: int) -> Parts:
    """Scale the loudest channels of the LayerNorm gain and bias before each Linear by `factor`, its rows by 1 / factor.

    The float function stays what it was: the opposite of a migration.
    """
    graph, ranges = parts.graph, parts.ranges(4)
    migrations = {}
    for name in linears:
        loudest = np.argsort(ranges.linears[name].channel_max)[-channels:]
        migrations[name] = np.ones(len(ranges.linears[name].channel_max), np.float32)
        migrations[name][loudest] = 1 / factor
    everywhere = dict.fromkeys(linears, 1.0)
    return replace(
        parts, encoder=plain_bytes(migrated(graph, Quantization(everywhere, migrations, {}, ranges.weights)))
    )


def plain_bytes(graph: PlainGraph) -> bytes:
    ends = {name: (TensorProto.FLOAT, graph.shapes[name]) for name in (IMAGE, TOKENS, EMBEDDING)}
    return assembled(graph.nodes, list(graph.constants.values()), ends)


def run_openvino(model: bytes, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Tokens [F, L, N, D] and embeddings [F, D] of a whole encoder of batch 1, in float32 but for its INT8."""
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(core.read_model(model, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    results = []
    for image in images:
        request.infer([image[None]])
        results.append([request.get_output_tensor(place).data[0].copy() for place in (0, 1)])
    tokens, embeddings = (np.stack(column) for column in zip(*results, strict=True))
    return tokens, embeddings
