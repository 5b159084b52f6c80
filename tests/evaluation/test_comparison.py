"""The comparison of surfaces-v1: nothing leaks between its stages, a stopped one goes on, a foreign file is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from dapo_edge.config import Stage, TuningPlan
from dapo_edge.data import protocol
from dapo_edge.errors import RecipeError
from dapo_edge.evaluation.comparison import TEST_SETS, VARIANTS, Comparison, claims, markdown
from dapo_edge.evaluation.figures import draw_ablation, draw_tuning, draw_world
from dapo_edge.models.clip import Clip, load_clip

TESTS = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 48, "layers": 4, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    path = tmp_path_factory.mktemp("config") / "comparison-tiny.json"
    path.write_text(json.dumps(config))
    return load_clip(str(path))


def comparison(clip: Clip, path: Path, epochs: int = 1) -> Comparison:
    plan = TuningPlan(images=12, batch=4, loss_px=12, validation=0.4, stages=(Stage(epochs=epochs),))
    return Comparison(clip, path, plan, TESTS)


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(range(protocol.CALIBRATION + 1), 2)))
def test_numbers_of_two_purposes_never_meet(a: int, b: int) -> None:
    most = protocol.PICTURES_PER_SEED
    starts = sorted(
        protocol.first_picture(purpose, seed, most) for purpose in (a, b) for seed in (0, 1, 999, 2**32 - 1)
    )
    highest_of_first = max(protocol.first_picture(min(a, b), seed, most) for seed in (0, 999, 2**20 - 1, 2**32 - 1))
    lowest_of_second = min(protocol.first_picture(max(a, b), seed, most) for seed in (0, 999, 2**20 - 1, 2**32 - 1))
    assert highest_of_first + most <= lowest_of_second
    assert starts[-1] + most <= protocol.FREE_FROM


def test_numbers_of_two_seeds_never_meet() -> None:
    for purpose in (protocol.TUNING, protocol.TEST):
        starts = [protocol.first_picture(purpose, seed, 1) for seed in range(300)]
        assert all(after - before >= protocol.PICTURES_PER_SEED for before, after in itertools.pairwise(starts))
    with pytest.raises(RecipeError, match="more than one seed has"):
        protocol.first_picture(protocol.TUNING, 0, protocol.PICTURES_PER_SEED + 1)


def test_test_sets_hold_what_the_protocol_says() -> None:
    split = protocol.surfaces_v1()
    sets = {name: make(split) for name, make in TEST_SETS.items()}
    tuned_on = set(split.tuned_materials)
    assert tuned_on.isdisjoint(sets["b"]["materials"])
    assert set(split.tuned_defects).isdisjoint(sets["c"]["defects"])
    assert {**sets["b"], "shifted": True} == sets["d"]
    assert set(split.pretraining_materials).isdisjoint(sets["e"]["materials"])


def test_d_shows_the_pictures_of_b_through_another_camera(tiny: Clip, tmp_path: Path) -> None:
    table = comparison(tiny, tmp_path / "x.json")
    (b, b_types), (d, d_types) = (table.pictures(name, range(TESTS)) for name in "bd")
    assert (b_types == d_types).all()
    assert not (b == d).all()


def test_a_comparison_goes_on_and_keeps_what_it_has(tiny: Clip, tmp_path: Path) -> None:
    path = tmp_path / "results" / "table.json"
    first = comparison(tiny, path)
    for name in ("two prompts", "handcrafted"):
        first.add(VARIANTS[name], 0, first.measure(VARIANTS[name], 0))
    before = json.loads(path.read_text())["results"]
    second = comparison(tiny, path)
    assert second.results == before
    assert not second.lacks(VARIANTS["two prompts"], 0)
    assert second.lacks(VARIANTS["two prompts"], 1)
    assert second.lacks(VARIANTS["dapo"], 0)
    second.add(VARIANTS["dapo"], 0, second.measure(VARIANTS["dapo"], 0))
    assert second.has_prompts(VARIANTS["dapo"], 0)
    assert not second.has_prompts(VARIANTS["dapo"], 1)
    maps = second.maps(VARIANTS["dapo"], 0, "c", (0, 3))
    assert maps.shape == (2, 48, 48)
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["handcrafted", "two prompts", "dapo"]
    assert results["two prompts"]["0"]["b"]["type_accuracy"] is None
    assert results["dapo"]["0"]["b"]["images"] == TESTS
    assert len(results["dapo"]["0"]["tuning"]) == 1
    assert "| two prompts |" in markdown(results)
    assert len(claims(results)) == 3
    draw_tuning(results, tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").stat().st_size > 5000
    draw_ablation(results, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").stat().st_size > 5000
    with pytest.raises(RecipeError, match="results of other settings"):
        comparison(tiny, path, epochs=2)
    assert json.loads(path.read_text())["results"] == results


def test_claims_compare_with_the_best_baseline() -> None:
    def runs(image: float, local: float) -> dict[str, dict[str, dict[str, float]]]:
        shift = {"image_auroc": image, "image_ap": image}
        return {"0": {"d": shift, "c": {"type_pixel_auroc": local, "type_pixel_f1_max": local}}}

    found = claims({"handcrafted": runs(0.6, 0.8), "adapters only": runs(0.7, 0.5), "dapo": runs(0.8, 0.9)})
    shift, novel, _ = found.values()
    assert (shift["best_baseline"], novel["best_baseline"]) == ("adapters only", "handcrafted")
    assert shift["margin"] == pytest.approx(10)
    assert novel["margin"] == pytest.approx(10)


def test_the_picture_of_the_world(tmp_path: Path) -> None:
    draw_world(tmp_path / "world.jpg", side=32)
    assert (tmp_path / "world.jpg").read_bytes()[:2] == b"\xff\xd8"
