"""One config file of the tiny CLIP for all tests of training, and one tokenizer for each name."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from easy import TWO_STAGES, fresh, plan_of, trainer_of, write_config

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
