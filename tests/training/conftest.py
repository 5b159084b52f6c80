"""One config file of the tiny CLIP for all tests of training, and one tokenizer for each name."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from easy import write_config

from dapo_edge.models import clip


@pytest.fixture(scope="session")
def easy_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("easy"))


@pytest.fixture(scope="package", autouse=True)
def _one_tokenizer() -> Iterator[None]:
    """Making it takes most of the time of loading a tiny CLIP, and it holds no state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "_tokenizer", functools.cache(clip._tokenizer))
        yield
