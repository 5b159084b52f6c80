"""`dapo-edge tune`: a recipe and pictures in, tuned prompts and curves out; and all that can be wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from easy import EIGHT, SIDE, lines_of
from PIL import Image

from dapo_edge.config import load_recipe, parse_recipe
from dapo_edge.data.protocol import TUNING, first_picture, surfaces_v1
from dapo_edge.data.synth import write_dataset
from dapo_edge.engine.build import build
from dapo_edge.errors import OutputError, RecipeError, SourceError
from dapo_edge.models import checkpoints
from dapo_edge.models.clip import load_clip
from dapo_edge.models.dapo import Dapo
from dapo_edge.training import tune as tune_module
from dapo_edge.training.trainer import BEST, LATEST, STATE, Run, Trainer
from dapo_edge.training.tune import CURVES, LOG, best_file, result_json, tune
from dapo_edge.training.views import World


def test_files_of_a_run(recipe_of: Any, files: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(recipe_of(EIGHT, data=str(files), epochs=3))
    run = tune(recipe, tmp_path / "new" / "run")
    folder = tmp_path / "new" / "run"
    assert {path.name for path in folder.iterdir()} == {BEST, LATEST, STATE, LOG, CURVES}

    lines = lines_of(folder / LOG)
    assert [int(line["epoch"]) for line in lines] == [1, 2, 3]
    for line, epoch in zip(lines, run.history, strict=True):
        assert float(line["map_loss"]) == epoch.map_loss > 0
        assert float(line["pixel_auroc"]) == epoch.validation.pixel_auroc
        assert int(line["images"]) == 4
        assert float(line["seconds"]) > 0
    picture = Image.open(folder / CURVES)
    assert picture.format == "PNG"
    assert picture.size == (1000, 400)
    assert np.asarray(picture.convert("RGB")).std() > 10, "something is drawn"

    result = result_json(run, folder)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["tuned"] == str(best_file(folder)) == str(folder / BEST)
    assert (result["epochs"], result["best"]["epoch"]) == (3, result["best_epoch"])


def test_tuned_prompts_can_be_built(recipe_of: Any, tmp_path: Path) -> None:
    fields = recipe_of(epochs=1)
    tune(parse_recipe(fields), tmp_path / "run")
    tuned = {**fields, "prompts": {"defects": ["hole", "rust"], "tuned": str(tmp_path / "run" / BEST)}}
    package = build(parse_recipe({**tuned, "gate": {"count": 1}}), tmp_path / "easy.dapo")
    method = Dapo(load_clip(fields["backbone"]["model"]), checkpoints.read(tmp_path / "run" / BEST))
    assert package.manifest.tuned
    assert package.bank().names == ("normal", "hole", "rust"), "a word that was never tuned on"
    expected = method.rows(["hole", "rust"], "object").detach().numpy()
    np.testing.assert_allclose(package.bank().rows, expected, atol=1e-6)


def test_all_images_of_files_are_seen_with_their_types(recipe_of: Any, files: Path, monkeypatch: Any) -> None:
    """Words stand in the recipe's order, not in the folders'."""
    turned = EIGHT[::-1]
    pictures = tune_module._file_set(parse_recipe(recipe_of(turned, data=str(files))).tuning, turned)
    assert pictures.names == ("normal", *turned)
    assert len(pictures) == 12
    for index, sample in enumerate(pictures.samples):
        found = {pictures.names[kind] for kind in np.unique(pictures[index].types)}
        assert found <= {"normal", sample.defect}
        assert sample.is_good or sample.defect in found


def test_the_training_part_of_a_data_set_is_left_out(recipe_of: Any, tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", "mvtec_ad", 12, size=(48, 48))
    plan = parse_recipe(recipe_of(EIGHT, data=str(tmp_path / "set"), layout="mvtec_ad")).tuning
    samples = tune_module._file_set(plan, EIGHT).samples
    assert len(samples) == 8
    assert {sample.split for sample in samples} == {"test"}


def test_categories_can_be_chosen(recipe_of: Any, files: Path) -> None:
    category = sorted(path.name for path in files.iterdir())[0]
    plan = parse_recipe(recipe_of(EIGHT, data=str(files), categories=[category])).tuning
    assert {sample.category for sample in tune_module._file_set(plan, EIGHT).samples} == {category}


def test_generated_pictures_follow_the_protocol(recipe_of: Any) -> None:
    split = surfaces_v1()
    plan = parse_recipe(recipe_of(images=50, seed=2)).tuning
    world = tune_module._generated(plan, ("hole", "stain"), 48)
    assert isinstance(world, World)
    assert (len(world), world.image_size, world.first) == (50, 48, first_picture(TUNING, 2, 50))
    assert world.materials == split.tuned_materials


def test_data_lies_relative_to_the_recipe(recipe_of: Any, files: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_of(EIGHT, data="pictures")))
    assert load_recipe(tmp_path / "r.yaml").tuning.data == str(tmp_path / "pictures")


def test_the_command(recipe_of: Any, cli: Any, tmp_path: Path) -> None:
    code, out, err = cli(recipe_of(epochs=1), "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["schema"] == "dapo-edge tune 1"
    assert Path(result["tuned"]).is_file()
    assert "tuning" in err
    code, out, err = cli(recipe_of(epochs=1))
    assert (code, out) == (0, "")
    assert "epoch 1 of 1, pixel AUROC 0." in err
    code, _, err = cli(recipe_of(epochs=2))
    refused(2, (code, "", err), "belongs to another run: stages differ", "--output")


def refused(code: int, result: tuple[int, str, str], *texts: str) -> None:
    assert result[0] == code, result[2]
    errors = [line for line in result[2].splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result[2]
    assert "unexpected" not in errors[0]
    for text in texts:
        assert text in errors[0]


@pytest.mark.parametrize(
    ("words", "tuning", "texts"),
    [
        (["hole", "hole"], {}, ["given twice: hole"]),
        (["hole", "hoole"], {}, ["the generated world has no defect 'hoole'", "'tuning.data'"]),
        ([{"hole": "very long defect " * 20}], {}, ["tokens, the text tower of easy-clip reads 32", "fewer words"]),
        (["hole"], {"layout": "visa"}, []),
        (["hole"], {"data": "nowhere", "layout": "mvtec"}, ["'tuning.layout' is 'mvtec'", "'mvtec_ad'"]),
        (["hole"], {"data": "nowhere"}, ["there is no folder", "nowhere"]),
        (["hole"], {"stages": [{"learn": ["adapter"]}]}, ["'tuning.stages.0.learn.0' is 'adapter'"]),
        (["hole"], {"stagess": []}, ["unknown key 'tuning.stagess' (did you mean 'stages'?)"]),
    ],
    ids=str,
)
def test_wrong_words_and_settings(
    recipe_of: Any, cli: Any, tmp_path: Path, words: Any, tuning: dict[str, Any], texts: list[str]
) -> None:
    if not texts:
        refused(2, cli({**recipe_of(words, **tuning), "method": "dappo"}), "unknown method 'dappo'")
    else:
        refused(2, cli(recipe_of(words, **tuning)), *texts)
    assert not (tmp_path / "run").exists()


def first(root: Path, pattern: str) -> Path:
    return sorted(root.glob(pattern))[0]


def no_images(root: Path) -> None:
    for path in root.rglob("*.png"):
        path.unlink()


def no_good(root: Path) -> None:
    first(root, "*/good/*.png").unlink()


def no_defective(root: Path) -> None:
    category = first(root, "*")
    for kind in category.iterdir():
        if kind.name != "good":
            shutil.rmtree(kind)


def mask_of_another_size(root: Path) -> None:
    for path in root.glob("*/masks/*/*.png"):
        Image.fromarray(np.full((56, 48), 255, np.uint8)).save(path)


def black_mask(root: Path) -> None:
    for path in root.glob("*/masks/*/*.png"):
        Image.fromarray(np.zeros((48, 56), np.uint8)).save(path)


def no_mask(root: Path) -> None:
    for path in root.glob("*/masks/*/*.png"):
        path.unlink()


def cut_image(root: Path) -> None:
    for path in root.glob("*/good/*.png"):
        path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "code", "texts"),
    [
        (no_images, 2, ["holds no images", "folder"]),
        (shutil.rmtree, 2, ["there is no folder"]),
        (no_good, 2, ["has defective images but no good ones", "leave the category out"]),
        (no_defective, 2, ["has good images but no defective ones", "leave the category out"]),
        (mask_of_another_size, 5, ["is 48x56, its image 56x48", "the same size"]),
        (black_mask, 5, ["is all black", "Mark the defect in white"]),
        (no_mask, 5, ["mask", "does not exist"]),
        (cut_image, 5, ["can't be decoded", "truncated"]),
    ],
)
def test_spoilt_pictures(
    recipe_of: Any, cli: Any, broken: Path, tmp_path: Path, spoil: Callable[[Path], None], code: int, texts: list[str]
) -> None:
    spoil(broken)
    refused(code, cli(recipe_of(EIGHT, data=str(broken))), *texts)
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_a_defect_that_the_recipe_does_not_name(recipe_of: Any, cli: Any, files: Path, tmp_path: Path) -> None:
    refused(2, cli(recipe_of(EIGHT[1:], data=str(files))), repr(EIGHT[0]), "'prompts.defects'")
    code, _, err = cli(recipe_of([*EIGHT, "a word that no picture shows"], data=str(files), epochs=1))
    assert code == 0, err


def test_a_validation_without_defects(recipe_of: Any, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pictures, of which the single one that is held out is good."""
    fields = recipe_of(images=8, validation=0.01)
    for seed in range(20):
        fields["tuning"]["seed"] = seed
        plan = parse_recipe(fields).tuning
        world = tune_module._generated(plan, ("hole", "stain"), SIDE)
        held_out = np.random.default_rng([seed, 0]).permutation(8)[0]
        if not world[int(held_out)].types.any():
            break
    refused(2, cli(fields), "the 1 validation pictures show no defect", "'tuning.validation'")


def test_a_folder_that_cannot_be_written(recipe_of: Any, cli: Any, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    refused(1, cli(recipe_of(epochs=1)), "can't be written")


def test_a_full_disk_at_the_log(recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Run = tune(parse_recipe(recipe_of(epochs=1)), tmp_path)
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    for name, write in ((LOG, tune_module.write_log), (CURVES, tune_module.draw_curves)):
        before = (tmp_path / name).read_bytes()
        (tmp_path / f".{name}.new").symlink_to("/dev/full")
        with pytest.raises(OutputError, match=r"No space left on device.*Free some space"):
            write(run, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


def test_nothing_is_learnt_where_nothing_could_be_kept(
    recipe_of: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("a step was made"))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        tune(parse_recipe(recipe_of()), tmp_path / "file" / "run")
    spoilt = Path(shutil.copytree(files, tmp_path / "spoilt"))
    black_mask(spoilt)
    with pytest.raises(SourceError, match=r"8 of 12 pictures can't be used: .*all black.*; and 3 more"):
        tune(parse_recipe(recipe_of(EIGHT, data=str(spoilt))), tmp_path / "run")
    with pytest.raises(RecipeError, match="no CUDA device"):
        tune(parse_recipe(recipe_of()), tmp_path / "run", device="cuda")
    good = Path(shutil.copytree(files, tmp_path / "few"))
    for path in [*good.glob("*/*/*.png")]:
        if path.parent.name not in ("good", EIGHT[0]):
            path.unlink()
    with pytest.raises(RecipeError):
        tune(parse_recipe(recipe_of(EIGHT, data=str(good))), tmp_path / "run")
    assert not (tmp_path / "run").exists()
