"""The stored reference of a package, and the activation ranges in it, against eager torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import save

from dapo_edge.backends.host import resize_view
from dapo_edge.backends.onnx_flavours import measured_tensors
from dapo_edge.config import Recipe
from dapo_edge.engine.build import map_spec
from dapo_edge.engine.range_probe import RangeProbe
from dapo_edge.engine.reference_data import RecordingBackend
from dapo_edge.errors import GateError, PackageDamaged, PackageIncompatible
from dapo_edge.models.eager import EagerBackend
from dapo_edge.models.method import method_of
from dapo_edge.package import MANIFEST, REFERENCE, EnginePackage, _digest
from dapo_edge.reference_data import ReferenceData


def reference_of(package: EnginePackage) -> ReferenceData:
    reference = package.reference()
    assert reference is not None
    return reference


def test_reference_is_what_eager_computes(package: EnginePackage) -> None:
    reference = reference_of(EnginePackage.open(package.path))
    assert reference.views.shape == (2, 96, 96, 3)
    assert (reference.views[0] != reference.views[1]).any()
    with EagerBackend.open(package, map_size="model") as eager:
        for view, tokens, embedding in zip(reference.views, reference.tokens, reference.embeddings, strict=True):
            expected, expected_embedding = eager.encode([view])
            np.testing.assert_array_equal(tokens, expected[0].astype(np.float16))
            np.testing.assert_array_equal(embedding, expected_embedding[0])
    assert list(reference.ranges) == list(measured_tensors(package.encoder_bytes()))


def test_a_package_of_before_has_no_reference(package_copy: Path) -> None:
    content = json.loads((package_copy / MANIFEST).read_text())
    del content["files"][REFERENCE]
    (package_copy / MANIFEST).write_text(json.dumps({**content, "digest": _digest(content)}))
    (package_copy / REFERENCE).unlink()
    assert EnginePackage.open(package_copy).reference() is None


def test_ranges_equal_hooks_in_eager(tiny_recipe: Recipe, package: EnginePackage) -> None:
    method: Any = method_of(tiny_recipe)
    visual = method.clip.visual
    blocks = list(visual.transformer.resblocks)
    seen: dict[str, list[float]] = {}

    def note(name: str, tensor: torch.Tensor) -> None:
        seen.setdefault(name, []).append(float(tensor.abs().max()))

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda module, inputs, output: note(name, output))

    suffixes = [""] + [f"_{index}" for index in range(1, len(blocks))]
    watch("/encoder/conv1/Conv_output_0", visual.conv1)
    watch("/encoder/ln_pre/LayerNormalization_output_0", visual.ln_pre)
    watch("/encoder/ln_post/LayerNormalization_output_0", visual.ln_post)
    for block, suffix in zip(blocks, suffixes, strict=True):
        watch(f"/encoder/ln_1{suffix}/LayerNormalization_output_0", block.ln_1)
        watch(f"/encoder/ln_2{suffix}/LayerNormalization_output_0", block.ln_2)
        watch(f"/encoder/mlp/c_fc{suffix}/Add_output_0", block.mlp.c_fc)
        watch(f"/encoder/mlp/c_proj{suffix}/Add_output_0", block.mlp.c_proj)
        watch(f"/encoder/out_proj{suffix}/Add_output_0", block.attn.out_proj)
    for index, adapter in enumerate(method.adapters):
        watch(f"/adapters.{index}/Add_output_0", adapter)
    residual = {
        node.output[0]: node.input[0]
        for node in onnx.load_from_string(package.encoder_bytes()).graph.node
        if node.op_type == "LayerNormalization"
    }
    for block, suffix in zip(blocks, suffixes, strict=True):
        name = residual[f"/encoder/ln_2{suffix}/LayerNormalization_output_0"]
        block.ln_2.register_forward_pre_hook(lambda module, inputs, name=name: note(name, inputs[0]))

    rng = np.random.default_rng(0)
    images = [factor * rng.standard_normal((1, 3, 96, 96)).astype(np.float32) for factor in (1, 3, 0.1)]
    probe = RangeProbe(package.encoder_bytes())
    with torch.inference_mode():
        for image in images:
            method(torch.from_numpy(image))
            probe.observe(image)
    assert len(seen) == 3 + 6 * 5 + 3
    for name, values in seen.items():
        assert len(values) == 3
        assert probe.ranges[name] == pytest.approx(max(values), rel=1e-3), name
    assert len(set(probe.ranges.values())) > 100, "each tensor has a range of its own"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_the_first_tensor_without_a_number_is_named(package: EnginePackage, value: float) -> None:
    model = onnx.load_from_string(package.encoder_bytes())
    node = next(node for node in model.graph.node if node.name == "/encoder/mlp/c_fc_2/MatMul")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    numbers = numpy_helper.to_array(weight).copy()
    numbers[:, 7] = value
    weight.CopyFrom(numpy_helper.from_array(numbers, weight.name))
    probe = RangeProbe(model.SerializeToString())
    with pytest.raises(
        GateError, match=r"tensor '/encoder/mlp/c_fc_2/MatMul_output_0' holds (NaN|Inf) on a gate frame"
    ):
        probe.observe(np.random.default_rng(0).standard_normal((1, 3, 96, 96)).astype(np.float32))


class Recorder:
    """A recording backend over the tiny method, with a probe of the built package."""

    def __init__(self, recipe: Recipe, package: EnginePackage, frames: int) -> None:
        self.method: Any = method_of(recipe)
        probe = RangeProbe(package.encoder_bytes())
        self.backend = RecordingBackend(self.method, package.bank(), map_spec(recipe, self.method), probe, frames)


def pictures(count: int) -> list[Any]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(count)]


@pytest.mark.parametrize(("frames", "kept"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (10, [0, 2, 5, 7])])
def test_spread_frames_are_kept_and_all_are_measured(
    tiny_recipe: Recipe, package: EnginePackage, frames: int, kept: list[int]
) -> None:
    recorder = Recorder(tiny_recipe, package, frames)
    views = pictures(frames)
    for view in views:
        recorder.backend.encode([view])
        recorder.backend.infer([view])  # the gate does both; only one counts
    recorded = recorder.backend.recorded()
    np.testing.assert_array_equal(recorded.views, [resize_view(views[index], 96) for index in kept])
    assert recorded.tokens.shape == (len(kept), 3, 36, 48)
    alone = RangeProbe(package.encoder_bytes())
    alone.observe(recorder.backend.preprocess(views[-1:]).numpy())
    assert all(value >= alone.ranges[name] for name, value in recorded.ranges.items()), "the last one was measured, too"


@pytest.mark.parametrize("scale", [1e5, np.nan])
def test_tokens_beyond_fp16_are_refused(tiny_recipe: Recipe, package: EnginePackage, scale: float) -> None:
    recorder = Recorder(tiny_recipe, package, 1)
    with torch.no_grad():
        recorder.method.adapters[1].weight.mul_(scale)
    with pytest.raises(GateError, match=r"patch tokens (reach|hold NaN) .*FP16, which ends at 65504.*adapters"):
        recorder.backend.encode(pictures(1))


# The file.


TENSORS = ("views", "tokens", "embeddings")


def fields() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "views": rng.integers(0, 256, (2, 96, 96, 3), np.uint8),
        "tokens": rng.standard_normal((2, 3, 36, 48)).astype(np.float16),
        "embeddings": rng.standard_normal((2, 48)).astype(np.float32),
        "ranges": {"z": 2.5, "a": 0.0, "ü": 70000.0},
    }


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    data = ReferenceData(**fields())
    path.write_bytes(data.to_bytes())
    read = ReferenceData.read(path)
    for name in TENSORS:
        found, expected = getattr(read, name), getattr(data, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert read.ranges == data.ranges
    assert list(read.ranges) == ["z", "a", "ü"], "the order of execution stays"
    assert {ReferenceData(**fields()).to_bytes() for _ in range(8)} == {data.to_bytes()}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("views must be uint8", lambda data: data.update(views=data["views"].astype(np.float32))),
        ("views must be uint8", lambda data: data.update(views=data["views"][:, :90])),
        ("tokens must be float16", lambda data: data.update(tokens=data["tokens"].astype(np.float32))),
        ("tokens must be float16", lambda data: data.update(tokens=data["tokens"][0])),
        ("embeddings must be float32", lambda data: data.update(embeddings=data["embeddings"][:, 1:])),
        ("embeddings must be float32", lambda data: data.update(embeddings=data["embeddings"].astype(np.float16))),
        ("3 views need as many encodings", lambda data: data.update(views=np.zeros((3, 96, 96, 3), np.uint8))),
        ("0 views need", lambda data: data.update({name: data[name][:0] for name in TENSORS})),
        ("tokens and embeddings must be numbers", lambda data: data["tokens"].fill(np.inf)),
        ("tokens and embeddings must be numbers", lambda data: data["embeddings"].fill(np.nan)),
        ("ranges must be numbers from 0 on", lambda data: data.update(ranges={"x": -1.0})),
        ("ranges must be numbers from 0 on", lambda data: data.update(ranges={"x": np.inf})),
        ("ranges must be numbers from 0 on", lambda data: data.update(ranges={"x": "1"})),
        ("ranges must be numbers from 0 on", lambda data: data.update(ranges={"x": True})),
        ("ranges must be numbers from 0 on", lambda data: data.update(ranges=[1.0])),
    ],
)
def test_contradictions(tmp_path: Path, message: str, change: Callable[[dict[str, Any]], Any]) -> None:
    data = fields()
    change(data)
    with pytest.raises(ValueError, match=message):
        ReferenceData(**data)
    path = tmp_path / "reference.safetensors"
    words = {"format": "dapo-edge reference 1", "ranges": data.pop("ranges")}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in data.items()}
    path.write_bytes(save(tensors, metadata={"reference": json.dumps(words)}))
    with pytest.raises(PackageDamaged, match=rf"contradicts itself.*{message}.*build it again"):
        ReferenceData.read(path)


def test_files_that_are_no_reference(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    whole = ReferenceData(**fields()).to_bytes()
    with pytest.raises(PackageDamaged, match="can't be read"):
        ReferenceData.read(path)
    for data in (b"", whole[:-1], whole[:40], b"\xff" * 100, b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(PackageDamaged, match="can't be read"):
            ReferenceData.read(path)
    tensor = {"views": np.zeros(1, np.uint8)}
    for words in ("not JSON", "[" * 100_000, '{"format": '):
        path.write_bytes(save(tensor, metadata={"reference": words}))
        with pytest.raises(PackageDamaged, match="can't be read"):
            ReferenceData.read(path)
    for words in ("[]", "{}", '{"format": "dapo-edge reference 2"}', '{"format": ["x"]}'):
        path.write_bytes(save(tensor, metadata={"reference": words}))
        with pytest.raises(PackageIncompatible, match="not a reference of this version"):
            ReferenceData.read(path)
    path.write_bytes(save(tensor, metadata={"reference": '{"format": "dapo-edge reference 1", "ranges": {}}'}))
    with pytest.raises(PackageDamaged, match=r"contradicts itself.*tokens"):
        ReferenceData.read(path)
    path.write_bytes(save(tensor))
    with pytest.raises(PackageIncompatible):
        ReferenceData.read(path)


@pytest.mark.parametrize(
    ("name", "shape"), [("views", (2, 64, 64, 3)), ("tokens", (2, 2, 36, 48)), ("tokens", (2, 3, 16, 48))]
)
def test_a_reference_of_another_encoder(package_copy: Path, name: str, shape: tuple[int, ...]) -> None:
    package = EnginePackage.open(package_copy)
    data = fields()
    data[name] = np.zeros(shape, data[name].dtype)
    (package_copy / REFERENCE).write_bytes(ReferenceData(**data).to_bytes())
    with pytest.raises(PackageDamaged, match=r"has image size, layers, patches and dimensions .*\(96, 3, 36, 48\)"):
        package.reference()
    (package_copy / REFERENCE).write_bytes(ReferenceData(**fields()).to_bytes())
    assert reference_of(package).views.shape == (2, 96, 96, 3)
