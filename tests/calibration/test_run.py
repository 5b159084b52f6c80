"""Calibration as a whole: which frames are taken, what is warned about, and that memory does not grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from dapo_edge.backends.host import resize_view
from dapo_edge.calibration import run
from dapo_edge.calibration.frames import calibration_frames
from dapo_edge.calibration.ranges import ActivationRanges
from dapo_edge.calibration.run import EncoderUnderTest, calibrate, ranges_over, recording_of
from dapo_edge.config import Recipe, parse_recipe
from dapo_edge.data.surfaces import make_surface
from dapo_edge.engine.export import export_encoder
from dapo_edge.errors import RecipeError, SourceError
from dapo_edge.models.method import method_of


@pytest.fixture(scope="module")
def encoder(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> EncoderUnderTest:
    path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    method = method_of(tiny_recipe)
    export_encoder(method, path)
    return EncoderUnderTest.of(method, path.read_bytes())


def recipe_with(fields: dict[str, Any], **calibration: Any) -> Recipe:
    return parse_recipe({**fields, "calibration": calibration})


def noisy(image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    lit = image * (1 + 0.02 * rng.standard_normal()) + rng.normal(0, 3, image.shape)
    return lit.clip(0, 255).astype(np.uint8)


def save(folder: Path, images: Any) -> str:
    folder.mkdir()
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / f"{number}.png"), image)
    return str(folder)


def surface(seed: int) -> NDArray[np.uint8]:
    return make_surface(seed, (96, 96), framing="part" if seed % 2 else "surface").image


class Steps:
    """Notes progress."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def __call__(self, step: str, done: int, of: int) -> None:
        self.seen.append((step, done, of))

    def of(self, step: str) -> list[tuple[int, int]]:
        return [(done, of) for name, done, of in self.seen if name == step]


def test_from_recipe_to_ranges(tiny_fields: dict[str, Any], encoder: EncoderUnderTest) -> None:
    recipe, steps = recipe_with(tiny_fields, frames="synthetic", count=10), Steps()
    found = calibrate(recipe, steps)
    assert (found.image_size, found.batch, found.backbone) == (96, 1, encoder.backbone)
    assert (found.frames.offered, found.frames.used, found.frames.source) == (10, 10, "synthetic")
    assert set(found.versions) == {"dapo-edge", "openvino", "numpy", "pillow"}
    assert list(dict.fromkeys(step for step, _, _ in steps.seen)) == [
        "loading the backbone", "exporting the encoder", "measuring activations",
    ]  # fmt: skip
    assert steps.of("measuring activations") == [(done, 10) for done in range(11)]
    again = ranges_over(recording_of(recipe.calibration, recipe.seed), encoder, 10)
    assert again.linears == found.linears, "equal frames give equal ranges"
    assert again.weights == found.weights
    other = ranges_over(recording_of(recipe.calibration, 1), encoder, 10)
    assert other.linears != found.linears, "another seed draws other frames"


def test_rare_frames_of_a_long_recording_are_picked(encoder: EncoderUnderTest, tmp_path: Path) -> None:
    rare = {place: surface(place) for place in range(4, 40, 4)}
    images = [rare.get(number, noisy(surface(0), number)) for number in range(40)]
    folder, steps = save(tmp_path / "f", images), Steps()
    everything = ranges_over(calibration_frames(folder, 40, 0), encoder, 40)
    picked = ranges_over(calibration_frames(folder, 14, 0, spare=3), encoder, 14, steps)
    assert (picked.frames.offered, picked.frames.used, picked.frames.not_picked) == (40, 14, 26)
    assert steps.of("picking frames")[-1] == (40, 40)
    assert steps.of("measuring activations") == [(done, 14) for done in range(15)]
    evenly = ranges_over(calibration_frames(folder, 14, 0), encoder, 14)
    assert evenly.frames.not_picked == 0

    def reached(ranges: ActivationRanges) -> float:
        return float(np.mean([ranges.linears[name].max / linear.max for name, linear in everything.linears.items()]))

    assert reached(picked) == pytest.approx(1, abs=0.02)
    assert reached(evenly) < reached(picked)


def test_no_choice_where_all_frames_are_wanted(
    encoder: EncoderUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Embedder", None)
    folder = save(tmp_path / "f", [surface(number) for number in range(12)])
    assert ranges_over(calibration_frames(folder, 12, 0, spare=3), encoder, 12).frames.used == 12


def test_frames_all_of_one_part_are_warned_about(
    encoder: EncoderUnderTest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = save(tmp_path / "one", [noisy(surface(1), number) for number in range(40)])
    found = ranges_over(calibration_frames(one, 40, 0), encoder, 40)
    assert found.frames.similarity > 0.99
    assert "look like one and the same part" in caplog.text
    assert "record many parts" in caplog.text
    caplog.clear()
    many = save(tmp_path / "many", [surface(number) for number in range(40)])
    assert ranges_over(calibration_frames(many, 40, 0), encoder, 40).frames.similarity < 0.95
    assert not caplog.records


def test_good_parts_of_one_product_are_not_one_part(caplog: pytest.LogCaptureFixture) -> None:
    """With the bundled model, whose embeddings mean something."""
    recipe = parse_recipe(
        {
            "name": "paper",
            "backbone": {"model": "surface-tiny", "pretrained": "surfaces-v1"},
            "prompts": {"defects": ["hole"]},
            "calibration": {"frames": "synthetic://?good=1&materials=paper", "count": 32},
        }
    )
    assert calibrate(recipe).frames.similarity < run.ONE_PART_COSINE
    assert not caplog.records


@pytest.mark.parametrize(("count", "error"), [(0, SourceError), (1, RecipeError), (7, RecipeError)])
def test_too_few_frames_are_refused_before_the_backbone_is_loaded(
    tiny_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, error: type[Exception]
) -> None:
    monkeypatch.setattr(run, "method_of", None)
    folder = save(tmp_path / "f", [surface(number) for number in range(count)])
    with pytest.raises(error, match="holds no image" if count == 0 else f"holds {count} frames, calibration needs 8"):
        calibrate(recipe_with(tiny_fields, frames=folder))
    with pytest.raises(RecipeError, match="names no calibration frames"):
        calibrate(parse_recipe(tiny_fields))
    with pytest.raises(RecipeError, match="unknown method 'dapu'"):
        calibrate(recipe_with(tiny_fields, frames="synthetic").model_copy(update={"method": "dapu"}))


def test_frames_that_turn_out_to_be_too_few(encoder: EncoderUnderTest, tmp_path: Path) -> None:
    folder = save(tmp_path / "f", [surface(number) if number < 7 else surface(number) // 200 for number in range(20)])
    for count in (20, 8):
        with pytest.raises(RecipeError, match=r"7 usable frames of 20 \(0 unreadable, 13 without contrast\)"):
            ranges_over(calibration_frames(folder, count, 0, spare=3), encoder, count)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def test_memory_does_not_grow_with_the_frames(encoder: EncoderUnderTest) -> None:
    view = resize_view(surface(3), 96)
    marks = []

    def views() -> Any:
        for number in range(400):
            if number in (50, 399):
                marks.append(resident_mb())
            yield noisy(view, number)

    run.measure_ranges(encoder.model, encoder.preprocessing, views(), 96)
    assert marks[1] - marks[0] < 3, "one frame's activations are 0.6 MB"
