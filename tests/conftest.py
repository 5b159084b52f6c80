"""A tiny random CLIP and its engine package, made once per test run."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_edge.config import Recipe, parse_recipe
from dapo_edge.package import EnginePackage

TINY = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 5, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
}


# Tests that measure time, get signals, or hold a camera that there is once: they run while nothing else does.
ALONE = re.compile(
    r"runtime/test_(pipeline|delivery|camera|chaos|line_\w+|rtsp\w*|gst\w*|v4l2\w*|gige|genicam|basler|industrial|cameras|watched\w*)"
    r"|test_(cli_run\w*|cli_cameras|terminal|demo)|engine/test_speed|runtime/test_synthetic_source|bench/test_rate"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ALONE.search(item.path.as_posix()):
            item.add_marker("alone")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["DAPO_EDGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["DAPO_EDGE_DEVICE_KEY"] = str(tmp_path_factory.mktemp("key") / "device.key")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny-test-clip.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def tiny_fields(tiny_config: Path) -> dict[str, Any]:
    """A valid recipe as a mapping; image size 96 makes the position embedding be resized."""
    return {
        "name": "tiny",
        "backbone": {"model": str(tiny_config)},
        "image_size": 96,
        "feature_layers": [2, 4, 5],
        "options": {"groups": 2, "context_tokens": 3, "text_depth": 2},
        "prompts": {"defects": ["scratch", "missing part", {"glue": "dried glue strip"}]},
        "map": {"smoothing_px": 2},
        "thresholds": {"frames": "synthetic", "count": 8},
        "gate": {"count": 2},
    }


@pytest.fixture(scope="session")
def tiny_recipe(tiny_fields: dict[str, Any]) -> Recipe:
    return parse_recipe(tiny_fields)


@pytest.fixture(scope="session")
def package(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    """Shared: tests that damage a package take `package_copy`."""
    from dapo_edge.engine.build import build

    return build(tiny_recipe, tmp_path_factory.mktemp("engines") / "tiny.dapo")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    """The demo's package, calibrated on fewer frames."""
    from dapo_edge import assets
    from dapo_edge.config import load_recipe
    from dapo_edge.engine.build import build

    recipe = load_recipe(Path(assets.__file__).parent / "surface-tiny.yaml")
    quick = {
        "gate": recipe.gate.model_copy(update={"count": 2}),
        "thresholds": recipe.thresholds.model_copy(update={"count": 8}),
    }
    return build(recipe.model_copy(update=quick), tmp_path_factory.mktemp("demo") / "demo.dapo")


@pytest.fixture
def package_copy(package: EnginePackage, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package.path, tmp_path / "tiny.dapo"))


@pytest.fixture
def picture() -> np.ndarray:
    """A non-square BGR frame with structure at every scale."""
    from dapo_edge.data.surfaces import make_surface

    return make_surface(3, (150, 110), good_share=0).image
