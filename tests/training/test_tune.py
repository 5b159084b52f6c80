"""`dapo-edge tune`: a recipe and pictures in, tuned prompts and curves out; and all that can be wrong with them."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from easy import OPTIONS, SIDE, assert_same_bits
from PIL import Image

from dapo_edge.cli import main
from dapo_edge.config import load_recipe, parse_recipe
from dapo_edge.data.flaws import DEFECTS
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

WORDS = list(DEFECTS)[:8]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four categories of one good and two defective images, eight types in all."""
    out = tmp_path_factory.mktemp("data") / "set"
    summary = write_dataset(out, "folder", 12, size=(56, 48))
    assert list(summary.types) == WORDS
    return out


@pytest.fixture
def broken(files: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(files, tmp_path / "set"))


@pytest.fixture
def recipe_of(easy_config: Path) -> Callable[..., dict[str, Any]]:
    def make(words: Any = ("hole", "stain"), epochs: int = 2, **tuning: Any) -> dict[str, Any]:
        plan = {"images": 12, "validation": 0.34, "batch": 4, "loss_px": 16, "stages": [{"epochs": epochs}], **tuning}
        return {
            "name": "easy",
            "backbone": {"model": str(easy_config)},
            "options": {name: value for name, value in OPTIONS.model_dump().items() if name != "temperature"},
            "prompts": {"defects": list(words)},
            "map": {"smoothing_px": 2},
            "tuning": plan,
        }

    return make


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The command line in this process: exit code, stdout, stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(fields: dict[str, Any], *arguments: object) -> tuple[int, str, str]:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(fields))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["tune", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "run"), *map(str, arguments)])
        return (int(str(end.value.code)), *capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def assert_same_runs(one: Path, other: Path) -> None:
    for name in (BEST, LATEST):
        a, b = checkpoints.read(one / name), checkpoints.read(other / name)
        assert a.tuning == b.tuning
        assert_same_bits(
            *({field: getattr(file.tensors, field).numpy() for field in checkpoints.FREE_AXES} for file in (a, b))
        )
    assert lines_of(one / LOG, but="seconds") == lines_of(other / LOG, but="seconds")


def lines_of(path: Path, but: str = "") -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{key: value for key, value in line.items() if key != but} for line in csv.DictReader(file)]


def test_files_of_a_run(recipe_of: Any, files: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(recipe_of(WORDS, data=str(files), epochs=3))
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
    turned = WORDS[::-1]
    pictures = tune_module._file_set(parse_recipe(recipe_of(turned, data=str(files))).tuning, turned)
    assert pictures.names == ("normal", *turned)
    assert len(pictures) == 12
    for index, sample in enumerate(pictures.samples):
        found = {pictures.names[kind] for kind in np.unique(pictures[index].types)}
        assert found <= {"normal", sample.defect}
        assert sample.is_good or sample.defect in found


def test_the_training_part_of_a_data_set_is_left_out(recipe_of: Any, tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", "mvtec_ad", 12, size=(48, 48))
    plan = parse_recipe(recipe_of(WORDS, data=str(tmp_path / "set"), layout="mvtec_ad")).tuning
    samples = tune_module._file_set(plan, WORDS).samples
    assert len(samples) == 8
    assert {sample.split for sample in samples} == {"test"}


def test_categories_can_be_chosen(recipe_of: Any, files: Path) -> None:
    category = sorted(path.name for path in files.iterdir())[0]
    plan = parse_recipe(recipe_of(WORDS, data=str(files), categories=[category])).tuning
    assert {sample.category for sample in tune_module._file_set(plan, WORDS).samples} == {category}


def test_generated_pictures_follow_the_protocol(recipe_of: Any) -> None:
    split = surfaces_v1()
    plan = parse_recipe(recipe_of(images=50, seed=2)).tuning
    world = tune_module._generated(plan, ("hole", "stain"), 48)
    assert isinstance(world, World)
    assert (len(world), world.image_size, world.first) == (50, 48, first_picture(TUNING, 2, 50))
    assert world.materials == split.tuned_materials


def test_data_lies_relative_to_the_recipe(recipe_of: Any, files: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_of(WORDS, data="pictures")))
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
    refused(code, cli(recipe_of(WORDS, data=str(broken))), *texts)
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_a_defect_that_the_recipe_does_not_name(recipe_of: Any, cli: Any, files: Path, tmp_path: Path) -> None:
    refused(2, cli(recipe_of(WORDS[1:], data=str(files))), repr(WORDS[0]), "'prompts.defects'")
    code, _, err = cli(recipe_of([*WORDS, "a word that no picture shows"], data=str(files), epochs=1))
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


def test_killed_at_a_random_moment_and_run_again(recipe_of: Any, tmp_path: Path) -> None:
    """SIGKILL, somewhere in the second epoch or in writing what the first or second one gave."""
    stages = [{"learn": ["context", "adapters"], "epochs": 1}, {"epochs": 5}]
    fields = recipe_of(images=24, stages=stages, validation=0.5)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(fields))
    tune_it = [sys.executable, "-m", "dapo_edge", "tune", str(tmp_path / "r.yaml"), "--json", "-o"]
    command = [*tune_it, str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number may round in another order
    first = subprocess.run([*tune_it, str(tmp_path / "whole")], capture_output=True, text=True, env=environment)
    whole = json.loads(first.stdout)
    with (tmp_path / "whole" / LOG).open(newline="") as file:
        seconds = [float(line["seconds"]) for line in csv.DictReader(file)]

    moment = random.SystemRandom().uniform(0, 1.2) * seconds[1]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    while not (tmp_path / "killed" / STATE).exists():  # of the first epoch
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    time.sleep(moment)
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, f"it was through after {moment} s"
    learnt = torch.load(tmp_path / "killed" / STATE, weights_only=True)
    assert 1 <= len(json.loads(learnt["history"])) < 6, f"it was through after {moment} s"

    again = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert (result["epochs"], result["best_epoch"]) == (6, whole["best_epoch"]), f"killed after {moment} s"
    assert_same_runs(tmp_path / "killed", tmp_path / "whole")


def test_an_interrupted_command_goes_on(recipe_of: Any, tmp_path: Path) -> None:
    recipe = parse_recipe(recipe_of(epochs=3))
    tune(recipe, tmp_path / "whole")

    def stop(step: str, done: int, of: int) -> None:
        if step == "tuning" and done > of / 2:  # in the second epoch of three
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(recipe, tmp_path / "stopped", stop)
    tune(recipe, tmp_path / "stopped")
    assert_same_runs(tmp_path / "stopped", tmp_path / "whole")


def test_another_tuned_file_to_start_from_is_another_run(recipe_of: Any, tmp_path: Path) -> None:
    fields = recipe_of(epochs=1)
    tune(parse_recipe(fields), tmp_path / "a")
    fields["prompts"]["tuned"] = str(tmp_path / "a" / BEST)
    tune(parse_recipe(fields), tmp_path / "b")
    before = (tmp_path / "a" / BEST).read_bytes()
    with pytest.raises(RecipeError, match="would overwrite"):
        tune(parse_recipe(fields), tmp_path / "a")
    fields["prompts"]["tuned"] = str(shutil.copy(tmp_path / "a" / BEST, tmp_path / "copy.safetensors"))
    with pytest.raises(RecipeError, match="another run: starting weights differ"):
        tune(parse_recipe(fields), tmp_path / "a")
    fields["prompts"].pop("tuned")
    fields["prompts"]["readout"] = "release"
    with pytest.raises(RecipeError, match="another run: readout differ"):
        tune(parse_recipe(fields), tmp_path / "a")
    assert (tmp_path / "a" / BEST).read_bytes() == before


def test_a_finished_run_is_mended_and_said_to_be_finished(recipe_of: Any, cli: Any, tmp_path: Path) -> None:
    fields = recipe_of(epochs=1)
    assert cli(fields)[0] == 0
    before = {name: (tmp_path / "run" / name).read_bytes() for name in (BEST, LATEST)}
    (tmp_path / "run" / BEST).write_bytes(b"xx")
    (tmp_path / "run" / LATEST).unlink()
    code, _, err = cli(fields)
    assert code == 0
    assert "finished before" in err
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}


def test_the_same_pictures_by_another_path_are_the_same_run(recipe_of: Any, files: Path, tmp_path: Path) -> None:
    tune(parse_recipe(recipe_of(WORDS, data=str(files), epochs=2)), tmp_path / "run", stop_after=1)
    (tmp_path / "link").symlink_to(files)
    run = tune(parse_recipe(recipe_of(WORDS, data=str(tmp_path / "link"), epochs=2)), tmp_path / "run")
    assert (run.restored, len(run.history)) == (1, 2)


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
        tune(parse_recipe(recipe_of(WORDS, data=str(spoilt))), tmp_path / "run")
    with pytest.raises(RecipeError, match="no CUDA device"):
        tune(parse_recipe(recipe_of()), tmp_path / "run", device="cuda")
    good = Path(shutil.copytree(files, tmp_path / "few"))
    for path in [*good.glob("*/*/*.png")]:
        if path.parent.name not in ("good", WORDS[0]):
            path.unlink()
    with pytest.raises(RecipeError):
        tune(parse_recipe(recipe_of(WORDS, data=str(good))), tmp_path / "run")
    assert not (tmp_path / "run").exists()
