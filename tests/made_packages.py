"""Engine packages with other numbers."""

from __future__ import annotations

from pathlib import Path

from dapo_edge.package import EnginePackage


def with_batch(package: EnginePackage, batch: int, folder: Path) -> EnginePackage:
    """The same package with an encoder of another batch size."""
    from dapo_edge.config import parse_recipe
    from dapo_edge.engine.build import build

    return build(parse_recipe({**package.manifest.recipe, "batch": batch}), folder / "batch.dapo")
