"""The description of an INT8 encoder: what it may say, and that it survives the way through a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dapo_edge.errors import PackageDamaged, PackageIncompatible
from dapo_edge.quantization import Quantization

RANGES = {"block1.qkv": 3.5, "block1.out": 1, "block2.fc2": 0.25}
VECTOR = np.array([0.5, 1, 2], np.float32)
WHY = {"block1.fc1": "asked for in the recipe", "block1.fc2": "größter Schaden"}


@pytest.fixture
def described() -> Quantization:
    return Quantization(RANGES, {"block1.qkv": VECTOR}, WHY, "0" * 32, {"estimator": "max", "migration": 0.5})


def written(folder: Path, content: Any, arrays: dict[str, Any] | None = None) -> Path:
    path = folder / "quantization.safetensors"
    text = content if isinstance(content, str) else json.dumps(content)
    save_file(arrays or {}, str(path), metadata={"quantization": text})
    return path


def words(**changes: Any) -> dict[str, Any]:
    plain = {"format": "dapo-edge quantization 1", "ranges": RANGES, "kept": WHY, "weights": "0" * 32, "settings": {}}
    return {**plain, **changes}


def test_round_trip(described: Quantization, tmp_path: Path) -> None:
    path = tmp_path / "quantization.safetensors"
    path.write_bytes(described.to_bytes())
    found = Quantization.from_bytes(path.read_bytes(), str(path))
    assert (found.ranges, found.kept, found.weights) == (RANGES, WHY, "0" * 32)
    assert found.settings == {"estimator": "max", "migration": 0.5}
    assert list(found.migrations) == ["block1.qkv"]
    np.testing.assert_array_equal(found.migrations["block1.qkv"], VECTOR)
    assert found.to_bytes() == described.to_bytes(), "equal descriptions are equal files"
    assert list(found.ranges) == list(RANGES), "in the order of execution"


def test_without_some_linears(described: Quantization) -> None:
    fewer = described.without({"block1.qkv": "hurts the maps"})
    assert set(fewer.ranges) == {"block1.out", "block2.fc2"}
    assert fewer.migrations == {}
    assert fewer.kept == {**WHY, "block1.qkv": "hurts the maps"}
    assert (fewer.weights, fewer.settings) == (described.weights, described.settings)
    assert set(described.ranges) == set(RANGES), "the first one is what it was"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranges": {"block1.qkv": 0.0}}, "ranges must be numbers above 0"),
        ({"ranges": {"block1.qkv": -1.0}}, "ranges must be numbers above 0"),
        ({"ranges": {"block1.qkv": math.inf}}, "ranges must be numbers above 0"),
        ({"ranges": {"block1.qkv": math.nan}}, "ranges must be numbers above 0"),
        ({"ranges": {"block1.qkv": "3"}}, "ranges must be numbers above 0"),
        ({"ranges": {"block1.qkv": True}}, "ranges must be numbers above 0"),
        ({"kept": {"block1.out": "why"}}, "'block1.out' is quantised and kept"),
        ({"migrations": {"block2.fc1": VECTOR}}, "'block2.fc1' is quantised and kept, or migrated and not quantised"),
        ({"migrations": {"block1.qkv": VECTOR.astype(np.float64)}}, "migration of 'block1.qkv' must be float32"),
        ({"migrations": {"block1.qkv": VECTOR[None]}}, "one per channel"),
        ({"migrations": {"block1.qkv": VECTOR - 0.5}}, "above 0"),
        ({"migrations": {"block1.qkv": VECTOR * np.float32(np.nan)}}, "above 0"),
        ({"migrations": {"block1.qkv": VECTOR * np.float32(np.inf)}}, "above 0"),
    ],
)
def test_descriptions_that_contradict_themselves(
    described: Quantization, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fields = {"ranges": RANGES, "migrations": {}, "kept": {}, "weights": ""}
    with pytest.raises(ValueError, match=message):
        Quantization(**{**fields, **changes})
    in_words = {name: value for name, value in changes.items() if name != "migrations"}
    path = written(tmp_path, words(**{"kept": {}, **in_words}), changes.get("migrations", {}))
    with pytest.raises(PackageDamaged, match=rf"contradicts itself \(.*{message}.*dapo-edge build"):
        Quantization.from_bytes(path.read_bytes(), str(path))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (words(format="dapo-edge quantization 2"), PackageIncompatible, "format 'dapo-edge quantization 2'"),
        ({}, PackageIncompatible, "format 'unknown'"),
        ([1], PackageIncompatible, "format 'unknown'"),
        ("{", PackageDamaged, "can't be read"),
        ("[" * 100_000, PackageDamaged, "can't be read"),
        (words(ranges=[1]), PackageDamaged, "contradicts itself"),
        (words(kept=None), PackageDamaged, "contradicts itself"),
        ({"format": "dapo-edge quantization 1"}, PackageDamaged, "contradicts itself"),
    ],
)
def test_files_that_are_none(content: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        Quantization.from_bytes(written(tmp_path, content).read_bytes(), "it")


def test_files_that_are_damaged(described: Quantization, tmp_path: Path) -> None:
    path = tmp_path / "quantization.safetensors"
    for content in (b"", b"no safetensors", described.to_bytes()[:-4]):
        path.write_bytes(content)
        with pytest.raises(PackageDamaged, match=r"can't be read.*dapo-edge build"):
            Quantization.from_bytes(path.read_bytes(), str(path))
