"""Measured ranges against eager torch, and their file against everything that can happen to a file."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from dapo_edge.backends.host import resize_view
from dapo_edge.backends.onnx_graph import read_plain
from dapo_edge.backends.onnx_linears import find_linears
from dapo_edge.calibration import measure
from dapo_edge.calibration.histograms import ESTIMATORS
from dapo_edge.calibration.measure import Measured, TappedEncoder, measure_ranges
from dapo_edge.calibration.ranges import ActivationRanges, _digest, histogram_edges
from dapo_edge.calibration.run import EncoderUnderTest, ranges_over, recording_of
from dapo_edge.config import Recipe, parse_recipe
from dapo_edge.engine.export import export_encoder
from dapo_edge.errors import BackendError, GateError, OutputError, RecipeError
from dapo_edge.models.method import method_of


def exported(recipe: Recipe, folder: Path) -> EncoderUnderTest:
    method = method_of(recipe)
    export_encoder(method, folder / "encoder.onnx", recipe.batch)
    return EncoderUnderTest.of(method, (folder / "encoder.onnx").read_bytes())


@pytest.fixture(scope="module")
def encoder(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> EncoderUnderTest:
    return exported(tiny_recipe, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def calibrated(tiny_recipe: Recipe) -> Recipe:
    return parse_recipe(
        {**tiny_recipe.model_dump(mode="json"), "calibration": {"frames": "synthetic://96x64@2", "count": 9}}
    )


@pytest.fixture(scope="module")
def ranges(calibrated: Recipe, encoder: EncoderUnderTest) -> ActivationRanges:
    return ranges_over(recording_of(calibrated.calibration, 0), encoder, 9)


def pictures(count: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, 256, (90 + 7 * place, 120, 3), np.uint8) for place in range(count)]


def measured(encoder: EncoderUnderTest, views: Any) -> Measured:
    return measure_ranges(encoder.model, encoder.preprocessing, views, 96)


def eager_inputs(recipe: Recipe, views: list[NDArray[np.uint8]]) -> dict[str, list[NDArray[np.float32]]]:
    """|input| of each Linear per view, from hooks in torch behind preprocessing in NumPy."""
    method: Any = method_of(recipe)
    seen: dict[str, list[NDArray[np.float32]]] = {}

    def note(name: str, tensor: torch.Tensor) -> None:
        seen.setdefault(name, []).append(tensor.abs().reshape(-1, tensor.shape[-1]).numpy())

    def watch(name: str, module: torch.nn.Module, *, output: bool) -> None:
        module.register_forward_hook(lambda module, inputs, found: note(name, found if output else inputs[0]))

    for number, block in enumerate(method.clip.visual.transformer.resblocks, start=1):
        watch(f"block{number}.qkv", block.ln_1, output=True)
        watch(f"block{number}.fc1", block.mlp.c_fc, output=False)
        watch(f"block{number}.fc2", block.mlp.c_proj, output=False)
        watch(f"block{number}.out", block.attn.out_proj, output=False)
    mean, std = np.array(method.clip.mean), np.array(method.clip.std)
    with torch.inference_mode():
        for view in views:
            image = (resize_view(view, 96)[..., ::-1] / 255 - mean) / std
            method(torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32)))
    return seen


def test_ranges_equal_hooks_in_eager(tiny_recipe: Recipe, encoder: EncoderUnderTest) -> None:
    views = pictures(3)
    found = measured(encoder, iter(views))
    seen = eager_inputs(tiny_recipe, views)
    assert found.frames == 3
    assert list(found.linears) == [f"block{b}.{role}" for b in range(1, 6) for role in ("qkv", "out", "fc1", "fc2")]
    for name, linear in found.linears.items():
        magnitudes = np.concatenate(seen[name])
        assert linear.max == pytest.approx(magnitudes.max(), rel=1e-4)
        assert sum(linear.histogram) == magnitudes.size
        for percent in ("99.9", "99.99"):
            expected = np.percentile(magnitudes, float(percent), method="inverted_cdf")
            assert linear.estimates[f"percentile_{percent}"] == pytest.approx(expected, abs=linear.max / 512)
        if name.endswith("fc2"):
            assert linear.channels is None
            with pytest.raises(ValueError, match="were not kept"):
                linear.channel_max  # noqa: B018
        else:
            np.testing.assert_allclose(linear.channel_max, magnitudes.max(axis=0), rtol=6e-3)
    assert len({linear.max for linear in found.linears.values()}) == 20


def test_memory_holds_a_part_of_a_large_tensor_but_the_largest_values_stay_exact(
    encoder: EncoderUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = pictures(8)
    whole = measured(encoder, views).linears
    monkeypatch.setattr(measure, "MOST_COUNTED", 600)
    part = measured(encoder, views).linears
    for name, linear in part.items():
        assert linear.max == whole[name].max
        assert linear.channels == whole[name].channels
        assert sum(linear.histogram) < 0.3 * sum(whole[name].histogram)
        assert linear.estimates["percentile_99.9"] == pytest.approx(whole[name].estimates["percentile_99.9"], rel=0.2)


def test_a_batch_gives_the_same_ranges(tiny_recipe: Recipe, encoder: EncoderUnderTest, tmp_path: Path) -> None:
    views = pictures(7)
    alone = measured(encoder, views)
    together = measured(exported(tiny_recipe.model_copy(update={"batch": 3}), tmp_path), views)
    assert (together.frames, together.similarity) == (7, pytest.approx(alone.similarity, abs=1e-5))
    for name, linear in together.linears.items():
        expected = alone.linears[name]
        assert sum(linear.histogram) == sum(expected.histogram), "views that fill a group up are not counted"
        assert linear.estimates == pytest.approx(expected.estimates, rel=1e-3)
        assert linear.channels == (expected.channels and pytest.approx(expected.channels, rel=1e-2))


def test_a_broken_view_of_a_batch_is_named_but_not_one_that_fills_it_up(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batched = exported(tiny_recipe.model_copy(update={"batch": 3}), tmp_path)
    whole, runs = TappedEncoder.tap, itertools.count(1)
    broken_run = 0

    def tap(self: TappedEncoder, place: int) -> NDArray[np.float32]:
        tensor = whole(self, place).copy()
        if place == 6 and next(runs) == broken_run:
            tensor[1:] = np.nan
        return tensor

    monkeypatch.setattr(TappedEncoder, "tap", tap)
    broken_run = 3
    assert measured(batched, pictures(7)).frames == 7
    runs, broken_run = itertools.count(1), 2
    with pytest.raises(GateError, match=r"input of block2\.fc1 .* holds NaN on calibration frame 5"):
        measured(batched, pictures(7))


def with_weight(model: bytes, linear: str, change: Callable[[NDArray[np.float32]], None]) -> bytes:
    """The encoder with another weight in one Linear."""
    name = next(found.weight for found in find_linears(read_plain(model)) if found.name == linear)
    proto = onnx.load_from_string(model)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    numbers = numpy_helper.to_array(tensor).copy()
    change(numbers)
    tensor.CopyFrom(numpy_helper.from_array(numbers, name))
    return proto.SerializeToString()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_linear_behind_a_broken_weight_is_named(encoder: EncoderUnderTest, value: float) -> None:
    def plant(weight: NDArray[np.float32]) -> None:
        weight[:, 7] = value

    broken = dataclasses.replace(encoder, model=with_weight(encoder.model, "block3.fc1", plant))
    with pytest.raises(GateError, match=r"input of block3\.fc2 \(tensor '/encoder/mlp/.*'\) holds (NaN|Inf) on calibr"):
        measured(broken, pictures(1))


def test_a_broken_last_weight_shows_in_the_embedding(encoder: EncoderUnderTest) -> None:
    def plant(weight: NDArray[np.float32]) -> None:
        weight[:] = np.nan

    broken = dataclasses.replace(encoder, model=with_weight(encoder.model, "block5.fc2", plant))
    with pytest.raises(GateError, match="image embedding of a calibration frame is 0 or no number"):
        measured(broken, pictures(1))


def test_an_input_that_is_always_0_is_named(encoder: EncoderUnderTest) -> None:
    def plant(weight: NDArray[np.float32]) -> None:
        weight[:] = 0

    dead = with_weight(encoder.model, "block2.qkv", plant)
    name = next(found.bias for found in find_linears(read_plain(dead)) if found.name == "block2.qkv")
    proto = onnx.load_from_string(dead)
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    bias.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(bias)), name))
    broken = dataclasses.replace(encoder, model=proto.SerializeToString())
    with pytest.raises(GateError, match=r"input of block2\.out \(tensor .*\) is 0 on every calibration frame"):
        measured(broken, pictures(2))


def test_what_is_no_encoder(encoder: EncoderUnderTest) -> None:
    for model in (b"", b"nothing", encoder.model[:5000]):
        with pytest.raises(BackendError):
            measured(dataclasses.replace(encoder, model=model), pictures(1))


def test_a_file_is_read_as_it_was_written(ranges: ActivationRanges, encoder: EncoderUnderTest, tmp_path: Path) -> None:
    path = ranges.write(tmp_path / "new" / "tiny.ranges.json")
    again = ActivationRanges.read(path)
    assert again == ranges
    assert again.to_json() == path.read_text()
    assert again.check_fit(read_plain(encoder.model)) is again
    lines = [line for line in path.read_text().splitlines() if '"block' in line]
    assert len(lines) == 20, "one line per Linear"
    assert path.stat().st_size < 25_000
    assert json.loads(path.read_text())["frames"] == {
        "source": "synthetic://96x64@2", "offered": 9, "used": 9, "unreadable": 0, "constant": 0, "not_picked": 0,
        "similarity": ranges.frames.similarity,
    }  # fmt: skip
    linear = again.linears["block4.fc1"]
    assert tuple(linear.estimates) == ESTIMATORS
    edges = histogram_edges(linear.max)
    assert (len(edges), edges[-1]) == (65, linear.max)
    assert (np.diff(edges) > 0).all()


def edited(ranges: ActivationRanges, change: Callable[[dict[str, Any]], Any], *, honest: bool = False) -> str:
    """The file's text after somebody changed its content, and, if `honest`, its digest too."""
    content = json.loads(ranges.to_json())
    change(content)
    if honest:
        rest = {key: value for key, value in content.items() if key not in ("format", "digest", "linears")}
        content["digest"] = _digest(rest, content["linears"])
    return json.dumps(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["linears"]["block3.fc1"]["estimates"].update(mse=1.0),
        lambda content: content["linears"].pop("block3.fc1"),
        lambda content: content.pop("linears"),
        lambda content: content.update(image_size=224),
        lambda content: content.update(weights="0" * 32),
        lambda content: content.pop("digest"),
        lambda content: content.update(more=1),
    ],
)
def test_an_edited_file_is_refused(ranges: ActivationRanges, change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(RecipeError, match=r"'x\.json' were edited or cut off.*dapo-edge calibrate"):
        ActivationRanges.from_json(edited(ranges, change), "x.json")


def linear_of(content: dict[str, Any]) -> dict[str, Any]:
    return content["linears"]["block1.qkv"]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: linear_of(content)["estimates"].update(mse=99.0),
        lambda content: linear_of(content)["estimates"].update(entropy=0.0),
        lambda content: linear_of(content)["estimates"].pop("entropy"),
        lambda content: linear_of(content)["channels"].__setitem__(0, 1e9),
        lambda content: linear_of(content)["channels"].__setitem__(0, -1),
        lambda content: linear_of(content).update(channels=[]),
        lambda content: linear_of(content)["histogram"].pop(),
        lambda content: linear_of(content)["histogram"].__setitem__(3, -5),
        lambda content: content.update(image_size="96"),
        lambda content: content.pop("backbone"),
        lambda content: content.update(linears=None),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    ranges: ActivationRanges, change: Callable[[dict[str, Any]], Any]
) -> None:
    with pytest.raises(RecipeError, match=r"'x\.json' are wrong at '\w+.*dapo-edge calibrate"):
        ActivationRanges.from_json(edited(ranges, change, honest=True), "x.json")


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"format": "dapo-edge ranges 2"}', '{"format": ["x"]}'])
def test_another_format(text: str) -> None:
    with pytest.raises(RecipeError, match="no activation ranges of this version"):
        ActivationRanges.from_json(text, "x.json")


def test_files_that_can_not_be_read(ranges: ActivationRanges, tmp_path: Path) -> None:
    path = tmp_path / "x.ranges.json"
    for content, text in (
        (None, "can't be read"),
        (b"\xff\xfe\x00", "it is not text"),
        (b"", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (ranges.to_json().encode()[:-50], "no JSON"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RecipeError, match=text):
            ActivationRanges.read(path)
    with pytest.raises(RecipeError, match="can't be read"):
        ActivationRanges.read(tmp_path)
    with pytest.raises(OutputError):
        ranges.write(path / "below-a-file.json")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"image_size": 64}, "of image size 96 px, the encoder has 64 px"),
        ({"batch": 2}, "of an encoder of batch 1, this one has batch 2"),
        ({"seed": 1}, r"of an encoder with other weights \(.*tiny-test-clip.* on 20"),
    ],
)
def test_ranges_of_another_encoder(
    ranges: ActivationRanges, tiny_fields: dict[str, Any], tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    other = exported(parse_recipe({**tiny_fields, **changes}), tmp_path)
    with pytest.raises(RecipeError, match=f"the activation ranges are {text}.*dapo-edge calibrate"):
        ranges.check_fit(read_plain(other.model))


def test_ranges_of_other_linears(ranges: ActivationRanges, encoder: EncoderUnderTest) -> None:
    fewer = {name: linear for name, linear in ranges.linears.items() if name != "block5.fc2"}
    with pytest.raises(RecipeError, match=r"of other Linears \(19\)"):
        ranges.model_copy(update={"linears": fewer}).check_fit(read_plain(encoder.model))
