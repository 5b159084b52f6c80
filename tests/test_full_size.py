"""The released DAPO configuration at full size, seeded weights: builds, runs, equals eager. Two minutes and 7 GB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banks import contrasting_bank

from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.config import parse_recipe
from dapo_edge.data.surfaces import make_surface
from dapo_edge.engine.build import build
from dapo_edge.models.eager import EagerBackend

TRAINING_WORDS = [
    "bent",
    "broken",
    "discoloration",
    "compound",
    "contamination",
    "crack",
    "cut",
    "fabric",
    "faulty imprint",
    "gluing",
    "hole",
    "missing",
    "puncture",
    "rough",
    "scratch",
    "compressed",
    "threading",
    "liquid",
    "misaligned",
    "wear",
]


@pytest.mark.slow
def test_released_configuration(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "name": "dapo-vitl14-518",
        "backbone": {"model": "ViT-L-14-336-quickgelu"},
        "image_size": 518,
        "feature_layers": [6, 12, 18, 24],
        "prompts": {"defects": TRAINING_WORDS, "readout": "release"},
        "map": {"smoothing_px": 0},
        "gate": {"count": 1},
    }
    package = build(parse_recipe(fields), tmp_path / "x.dapo")
    manifest = package.manifest
    assert (manifest.map.grid, manifest.dimensions, len(package.bank().names)) == ((37, 37), 768, 21)
    view = make_surface(5, (1280, 960), good_share=0).image
    with OpenVinoBackend.open(package, map_size="model") as compiled:
        tokens, _ = compiled.encode([view])
        compiled.set_bank(contrasting_bank(package.bank().names, tokens))
        got = compiled.infer([view])
        bank = compiled.bank
    with EagerBackend.open(package, map_size="model") as eager:
        eager.set_bank(bank)
        reference, _ = eager.encode([view])
        expected = eager.infer([view])
    cosine = (tokens * reference).sum(-1) / np.linalg.norm(tokens, axis=-1) / np.linalg.norm(reference, axis=-1)
    difference = np.abs(got.anomaly - expected.anomaly).max()
    agreement = (got.types == expected.types).mean()
    print(f"\ntoken cosine >= {cosine.min():.7f}, map difference <= {difference:.2e}, types equal {agreement:.5%}")
    assert expected.anomaly.std() > 0.02
    assert cosine.min() >= 0.99999
    assert difference <= 1e-3
    assert agreement >= 0.999
