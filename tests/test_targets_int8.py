"""Compiled targets of INT8: they belong to the quantization that they were made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_targets import HERE, compile_target, with_files

from dapo_edge.errors import PackageIncompatible
from dapo_edge.package import EnginePackage
from dapo_edge.targets import best, judge


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", str(tmp_path / "keys" / "device.key"))


@pytest.fixture
def opened(package: EnginePackage, tmp_path: Path) -> EnginePackage:
    return EnginePackage.open(shutil.copytree(package.path, tmp_path / "tiny.dapo"))


@pytest.fixture
def quantised(opened: EnginePackage) -> EnginePackage:
    return with_files(opened, int8="8" * 64, quantization="9" * 64)


def verdict(folder: Path, package: EnginePackage) -> tuple[str, str]:
    judgement = judge(folder, package, HERE)
    return judgement.verdict, judgement.reason


def test_an_int8_target_belongs_to_its_quantization(opened: EnginePackage, quantised: EnginePackage) -> None:
    folder = compile_target(quantised, precision="int8")
    assert verdict(folder, quantised)[0] == "load"
    again = ("compile again", "made from another build of this package")
    assert verdict(folder, with_files(quantised, int8="7" * 64)) == again, "calibrated anew"
    assert verdict(folder, opened) == again, "built again without INT8"
    other_folder = compile_target(quantised, precision="fp16")
    assert verdict(other_folder, with_files(quantised, int8="7" * 64))[0] == "load", "its encoder is what it was"
    assert verdict(other_folder, with_files(quantised, encoder="7" * 64)) == again


def test_a_package_without_int8_is_not_to_be_compiled_in_it(opened: EnginePackage, quantised: EnginePackage) -> None:
    with pytest.raises(
        PackageIncompatible, match=r"not compiled yet.*Build the package with precision: int8"
    ) as caught:
        best(opened, HERE, "int8")
    assert "dapo-edge compile" not in caught.value.remedy
    with pytest.raises(PackageIncompatible, match=r"dapo-edge compile .* --precision int8"):
        best(quantised, HERE, "int8")
