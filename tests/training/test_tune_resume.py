"""`dapo-edge tune` goes on: after a kill, an interrupt, damage and a move; and what is another run."""

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
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from easy import EIGHT, assert_same_runs

from dapo_edge.config import parse_recipe
from dapo_edge.errors import RecipeError
from dapo_edge.training.trainer import BEST, LATEST, STATE
from dapo_edge.training.tune import LOG, tune


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
    tune(parse_recipe(recipe_of(EIGHT, data=str(files), epochs=2)), tmp_path / "run", stop_after=1)
    (tmp_path / "link").symlink_to(files)
    run = tune(parse_recipe(recipe_of(EIGHT, data=str(tmp_path / "link"), epochs=2)), tmp_path / "run")
    assert (run.restored, len(run.history)) == (1, 2)
