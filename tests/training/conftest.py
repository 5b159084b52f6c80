"""One config file of the tiny CLIP for all tests of training, and one tokenizer for each name."""

from __future__ import annotations

import functools
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from easy import EIGHT, OPTIONS, TWO_STAGES, fresh, plan_of, trainer_of, write_config

from dapo_edge.cli import main
from dapo_edge.data.synth import write_dataset
from dapo_edge.models import clip
from dapo_edge.models.dapo import Dapo
from dapo_edge.training.trainer import Run


@pytest.fixture(scope="session")
def easy_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("easy"))


@pytest.fixture(scope="package", autouse=True)
def _one_tokenizer() -> Iterator[None]:
    """Making it takes most of the time of loading a tiny CLIP, and it holds no state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "_tokenizer", functools.cache(clip._tokenizer))
        yield


@pytest.fixture(scope="session")
def uninterrupted(easy_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Dapo, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    method = fresh(easy_config)
    return trainer_of(method, plan_of(*TWO_STAGES), folder).tune(), method, folder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four categories of one good and two defective images, eight types in all."""
    out = tmp_path_factory.mktemp("data") / "set"
    summary = write_dataset(out, "folder", 12, size=(56, 48))
    assert list(summary.types) == EIGHT
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
