"""Compiled targets: written whole or not at all, loaded only where they were compiled."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from driver_fakes import H200, NO_DRIVER, FakeLibcuda, use
from made_targets import FILES, HERE, compile_target, edit, reseal, with_files

from dapo_edge import seal, targets
from dapo_edge.errors import OutputError, PackageDamaged, PackageError, PackageIncompatible
from dapo_edge.package import REFERENCE, EnginePackage, Manifest
from dapo_edge.targets import (
    KERNELS,
    PLAN,
    TARGET,
    TIMING,
    Fingerprint,
    Judgement,
    Target,
    TargetWriter,
    best,
    fingerprint_here,
    judge,
    judge_all,
    read_file,
    read_plan,
    target_id,
)


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", str(tmp_path / "keys" / "device.key"))
    use(monkeypatch, NO_DRIVER)
    return tmp_path / "keys" / "device.key"


@pytest.fixture
def opened(package: EnginePackage, tmp_path: Path) -> EnginePackage:
    return EnginePackage.open(shutil.copytree(package.path, tmp_path / "tiny.dapo"))


@pytest.fixture
def quantised(opened: EnginePackage) -> EnginePackage:
    return with_files(opened, int8="8" * 64, quantization="9" * 64)


def verdict(folder: Path, package: EnginePackage, here: Fingerprint | None = HERE) -> tuple[str, str]:
    judgement = judge(folder, package, here)
    assert judgement.id == folder.name
    return judgement.verdict, judgement.reason


def other(**changes: Any) -> Fingerprint:
    return Fingerprint(**{**HERE.model_dump(), **changes})


def test_round_trip(opened: EnginePackage) -> None:
    digest = opened.digest
    folder = compile_target(opened)
    assert folder == opened.path / "targets" / "nvidia-h200-sm90-trt10.3.0-fp16"
    found = judge(folder, opened, HERE)
    target = found.target
    assert found == Judgement(folder.name, "load", "fp16, batch 1, TensorRT 10.3.0", target)
    assert isinstance(target, Target)
    assert target.fingerprint == HERE
    assert target.gate == {"token_cosine_min": 0.99991, "flips": 0}
    assert set(target.files) == set(FILES)
    assert read_plan(folder, target) == FILES[PLAN]
    assert read_file(folder, target, TIMING) == FILES[TIMING]
    with pytest.raises(PackageDamaged, match="has no other"):
        read_file(folder, target, "other")
    assert {path.name for path in folder.iterdir()} == {*FILES, TARGET}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert EnginePackage.open(opened.path).digest == digest, "a target changes nothing in the package"


@pytest.mark.parametrize(
    ("fingerprint", "precision", "expected"),
    [
        (HERE, "fp16", "nvidia-h200-sm90-trt10.3.0-fp16"),
        (other(gpu="Orin", sm="8.7", tensorrt="8.6.2"), "int8", "orin-sm87-trt8.6.2-int8"),
        (other(gpu="../Ünï (TM)/x", tensorrt="10.3+dev"), "fp32", "n-tm-x-sm90-trt10.3-dev-fp32"),
        (other(gpu="../.."), "fp32", "unknown-sm90-trt10.3.0-fp32"),
    ],
)
def test_names_of_targets(fingerprint: Fingerprint, precision: str, expected: str) -> None:
    assert target_id(fingerprint, precision) == expected


@pytest.mark.parametrize(
    ("then", "verdict_", "text"),
    [
        (other(driver_cuda="12.4"), "load", "the driver was changed since, from CUDA 12.4 to 12.6"),
        (other(tensorrt="8.6.1"), "compile again", "a plan of TensorRT 8 can't run with 10"),
        (other(tensorrt="10.13.3"), "compile again", "compiled by TensorRT 10.13.3, here is 10.3.0: a plan runs with"),
        (other(gpu="Orin", sm="8.7"), "compile again", "compiled for Orin (sm 8.7), here is NVIDIA H200 (sm 9.0)"),
        (other(sm="9.1"), "compile again", "NVIDIA H200 (sm 9.1)"),
        (other(multiprocessors=114), "compile again", "NVIDIA H200 with 114 multiprocessors, here it has 132: another"),
        (other(system="Linux aarch64"), "compile again", "compiled on Linux aarch64, here is Linux x86_64"),
    ],
)
def test_what_was_compiled_for_something_else(
    opened: EnginePackage, then: Fingerprint, verdict_: str, text: str
) -> None:
    found, reason = verdict(compile_target(opened, fingerprint=then), opened)
    assert found == verdict_
    assert text in reason


def test_another_build_of_the_package(opened: EnginePackage) -> None:
    folder = compile_target(opened, encoder_sha256="1" * 64)
    assert verdict(folder, opened) == ("compile again", "made from another build of this package")


def test_machines_that_run_no_target(opened: EnginePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compile_target(opened)
    assert fingerprint_here() is None
    assert verdict(folder, opened, None) == ("refuse", "no CUDA driver on this machine")
    use(monkeypatch, FakeLibcuda(cuInit=803))
    assert "the CUDA driver refuses: system has unsupported" in verdict(folder, opened, None)[1]
    use(monkeypatch, FakeLibcuda(H200))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert fingerprint_here() is None
    assert verdict(folder, opened, None) == ("refuse", "no TensorRT on this machine")


def test_the_fingerprint_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = ModuleType("tensorrt")
    tensorrt.__version__ = "10.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    assert fingerprint_here() is None, "without a driver TensorRT is not even looked for"
    use(monkeypatch, FakeLibcuda(H200))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert fingerprint_here() == HERE


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / TARGET).unlink(), "target.json' is missing"),
        (lambda folder: (folder / TARGET).write_bytes(b'{"format": 1'), "target.json' can't be read (JSONDecodeError"),
        (lambda folder: (folder / TARGET).write_bytes(b"[]"), "target.json' can't be read"),
        (lambda folder: (folder / TARGET).write_bytes(b"[" * 100_000), "target.json' can't be read (RecursionError"),
        (lambda folder: (folder / TARGET).write_bytes(b'"\xff"'), "target.json' can't be read (UnicodeDecodeError"),
        (lambda folder: (folder / TARGET).write_bytes(b" " * (4 << 20) + b"{}"), "larger than 4 MB"),
        (lambda folder: become_pipe(folder / TARGET), "target.json' can't be read (NotAFile"),
        (lambda folder: become_pipe(folder / PLAN), "encoder.plan' can't be read (not a file)"),
        (lambda folder: become_folder(folder / KERNELS), "kernels.cubin' can't be read (not a file)"),
        (lambda folder: (folder / PLAN).unlink(), "encoder.plan' is missing"),
        (lambda folder: (folder / PLAN).write_bytes(b"plan"), "encoder.plan' has 4 bytes instead of 4000"),
        (lambda folder: (folder / KERNELS).write_bytes(b"CUBIN"), "kernels.cubin' is not the file that was compiled"),
        (lambda folder: (folder / TIMING).write_bytes(b"TIMING"), "timing.cache' is not the file that was compiled"),
    ],
)
def test_damaged_files(opened: EnginePackage, damage: Any, text: str) -> None:
    folder = compile_target(opened)
    damage(folder)
    found, reason = verdict(folder, opened)
    assert found == "refuse"
    assert text in reason


@pytest.mark.parametrize(
    "changes",
    [{"seconds": 1.0}, {"batch": 2}, {"seal": None}, {"seal": "é" * 64}, {"seal": "0" * 64}, {"more": "\ud800"}],
)
def test_an_edited_target_is_refused(opened: EnginePackage, changes: dict[str, Any]) -> None:
    folder = compile_target(opened)
    edit(folder, **changes)
    found, reason = verdict(folder, opened)
    assert found == "refuse"
    assert "compiled on another device (or edited)" in reason
    assert judge(folder, opened, HERE).target is None, "nothing of it may be believed"


def test_a_foreign_plan_with_the_right_hash_is_refused(opened: EnginePackage, key: Path) -> None:
    folder = compile_target(opened)
    (folder / PLAN).write_bytes(b"evil")
    entry = {"sha256": hashlib.sha256(b"evil").hexdigest(), "size": 4}
    edit(folder, files={**json.loads((folder / TARGET).read_text())["files"], PLAN: entry})
    assert "compiled on another device (or edited)" in verdict(folder, opened)[1]
    reseal(folder)
    assert verdict(folder, opened)[0] == "load", "the seal was all that was wrong with it"


def test_a_target_of_another_device_is_refused(opened: EnginePackage, key: Path, tmp_path: Path) -> None:
    folder = compile_target(opened)
    key.rename(tmp_path / "shared.key")
    found, reason = verdict(folder, opened)
    assert (found, "there is no device key here" in reason) == ("refuse", True)
    assert not key.exists(), "judging makes no key"
    seal.seal({})  # this device compiles something, and so has a key of its own
    assert "compiled on another device (or edited)" in verdict(folder, opened)[1]


def test_devices_that_share_a_key_load_each_others_targets(
    opened: EnginePackage, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compile_target(opened)
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", str(shutil.copy2(key, tmp_path / "shared.key")))
    key.unlink()
    assert verdict(folder, opened)[0] == "load"


def deep(levels: int) -> Any:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


def test_no_depth_of_nesting_raises(opened: EnginePackage) -> None:
    """Reading, sealing and checking each have a depth of their own at which they give up."""
    folder = compile_target(opened)
    reasons = set()
    for depth in (*range(100, 900, 100), *range(900, 1000)):
        (folder / TARGET).write_text(f'{{"format": 1, "seal": "x", "a": {"[" * depth}{"]" * depth}}}')
        found, reason = verdict(folder, opened)
        assert found == "refuse"
        reasons.add(reason.partition(" (")[0].replace(str(folder), ""))
    assert "compiled on another device" in reasons
    assert reasons & {"'/target.json' can't be read", "not compiled here: it is nested more deeply than any target"}


@pytest.mark.parametrize(
    ("changes", "found", "text"),
    [
        ({"format": 2}, "compile again", "target format 2, this dapo-edge reads 1"),
        ({"format": None}, "compile again", "target format None"),
        ({"format": [[]]}, "compile again", "target format of no kind"),
        ({"gate": {"x": deep(300)}}, "refuse", "gate"),
        ({"precision": "fp8"}, "refuse", "precision: Input should be 'fp32', 'fp16' or 'int8'"),
        ({"more": 1}, "refuse", "more: Extra inputs are not permitted"),
        ({"files": {}}, "refuse", "encoder.plan, kernels.cubin does not belong to the target"),
        ({"files": {"../x": {"sha256": "", "size": 0}}}, "refuse", "'../x' is not the name of a file"),
        ({"files": {TARGET: {"sha256": "", "size": 0}}}, "refuse", "'target.json' is not the name of a file"),
    ],
)
def test_sealed_but_not_understood(opened: EnginePackage, changes: dict[str, Any], found: str, text: str) -> None:
    folder = compile_target(opened)
    reseal(folder, **changes)
    judgement = judge(folder, opened, HERE)
    assert judgement.verdict == found
    assert text in judgement.reason


def test_best_takes_the_packages_own_precision_first(quantised: EnginePackage) -> None:
    assert quantised.manifest.precision == "fp32"
    for precision in ("int8", "fp16"):
        compile_target(quantised, precision=precision)
    assert best(quantised, HERE).target.precision == "fp16", "the most exact one"
    compile_target(quantised, precision="fp32")
    assert best(quantised, HERE).target.precision == "fp32"
    chosen = best(quantised, HERE, "int8")
    assert (chosen.target.precision, chosen.folder.name) == ("int8", "nvidia-h200-sm90-trt10.3.0-int8")
    manifest = Manifest(**{**quantised.manifest.model_dump(), "precision": "fp16"})
    assert best(EnginePackage(quantised.path, manifest), HERE).target.precision == "fp16"


def test_best_tells_when_another_precision_runs_than_the_packages_own(
    opened: EnginePackage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    compile_target(opened, precision="fp16")
    best(opened, HERE)
    assert caplog.text == "", "nobody compiled another"
    own = compile_target(opened, precision="fp32")
    for damage, reason in (
        (lambda: (own / PLAN).write_bytes(bytes(4000)), "its SHA-256 differs"),
        (lambda: reseal(own, encoder_sha256="1" * 64), "made from another build of this package"),
        (lambda: edit(own, seconds=1.0), "compiled on another device (or edited)"),
        (lambda: (own / TARGET).unlink(), "is missing"),
    ):
        damage()
        caplog.clear()
        assert best(opened, HERE).target.precision == "fp16"
        [record] = caplog.records
        assert record.getMessage().startswith(f"no fp32 target can be loaded ({own.name}: ")
        assert reason in record.getMessage()
        assert "nvidia-h200-sm90-trt10.3.0-fp16 runs in fp16 instead: dapo-edge compile" in record.getMessage()
        caplog.clear()
        best(opened, HERE, "fp16")
        assert caplog.text == "", "it was asked for"
    compile_target(opened, precision="fp32")
    compile_target(opened, precision="fp32", fingerprint=other(tensorrt="10.2.0"))
    best(opened, HERE)
    assert caplog.text == "", "the older one of the same precision is not missed"


def test_a_package_without_reference_must_be_built_again(opened: EnginePackage) -> None:
    files = {name: entry for name, entry in opened.manifest.files.items() if name != REFERENCE}
    assert len(files) == len(opened.manifest.files) - 1
    old = EnginePackage(opened.path, Manifest(**{**opened.manifest.model_dump(), "files": files}))
    for precision in (None, "fp16"):
        with pytest.raises(PackageIncompatible, match=r"is not compiled yet\. Build the package again") as caught:
            best(old, HERE, precision)
        assert "dapo-edge compile" not in caught.value.remedy
        assert "--precision" not in caught.value.remedy
    assert targets.how_to_compile(opened) == f"dapo-edge compile {opened.path}"


def test_commands_can_be_pasted(package: EnginePackage, tmp_path: Path) -> None:
    named = EnginePackage.open(shutil.copytree(package.path, tmp_path / "it's a; package"))
    assert shlex.split(targets.how_to_compile(named)) == ["dapo-edge", "compile", str(named.path)]


def test_best_says_of_every_target_why_not(quantised: EnginePackage) -> None:
    compile_target(quantised, fingerprint=other(tensorrt="8.6.1"))
    damaged = compile_target(quantised, precision="fp32")
    (damaged / PLAN).write_bytes(bytes(4000))
    with pytest.raises(PackageIncompatible) as caught:
        best(quantised, HERE)
    assert caught.value.remedy == f"dapo-edge compile {quantised.path}"
    assert "fp32: " in caught.value.cause
    assert "its SHA-256 differs; nvidia-h200-sm90-trt8.6.1-fp16: compiled by TensorRT 8.6.1" in caught.value.cause
    assert "\n" not in str(caught.value)
    compile_target(quantised)
    with pytest.raises(PackageIncompatible, match=r"its precision is fp16, not int8.*compile .* --precision int8"):
        best(quantised, HERE, "int8")
    assert best(quantised, HERE).target.precision == "fp16"


def test_best_without_targets_or_gpu(opened: EnginePackage) -> None:
    with pytest.raises(PackageIncompatible, match=r"is not compiled yet\. dapo-edge compile"):
        best(opened, HERE)
    with pytest.raises(PackageIncompatible, match=r"no CUDA driver on this machine\. Run it on the CPU.*compile"):
        best(opened, None)


def test_judge_all_is_sorted_and_skips_what_is_being_compiled(quantised: EnginePackage) -> None:
    assert judge_all(quantised, HERE) == ()
    for precision in ("int8", "fp16"):
        compile_target(quantised, precision=precision)
    (quantised.path / "targets" / "empty").mkdir()
    (quantised.path / "targets" / "note.txt").touch()
    with TargetWriter(quantised.path, "x"):
        found = judge_all(quantised, HERE)
    assert [(judgement.id, judgement.verdict) for judgement in found] == [
        ("empty", "refuse"),
        ("nvidia-h200-sm90-trt10.3.0-fp16", "load"),
        ("nvidia-h200-sm90-trt10.3.0-int8", "load"),
    ]


def test_targets_that_cannot_be_listed(opened: EnginePackage) -> None:
    (opened.path / "targets").touch()
    with pytest.raises(PackageError, match=r"targets' can't be read.*Move it away"):
        judge_all(opened, HERE)
    with pytest.raises(OutputError, match=r"targets' is not a folder\. Move it away"), TargetWriter(opened.path, "x"):
        pass
    (opened.path / "targets").unlink()
    (opened.path / "targets").symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"targets' is not a folder"), TargetWriter(opened.path, "x"):
        pass


def test_a_plan_that_changes_after_it_was_judged(opened: EnginePackage) -> None:
    chosen = (compile_target(opened), best(opened, HERE).target)
    (chosen[0] / PLAN).write_bytes(b"evil" * 1000)
    with pytest.raises(PackageDamaged, match=r"encoder\.plan' is not the file that was compiled\. dapo-edge compile"):
        read_plan(*chosen)
    become_pipe(chosen[0] / PLAN)
    with pytest.raises(PackageDamaged, match="can't be read"):
        read_plan(*chosen)
    (chosen[0] / PLAN).unlink()
    with pytest.raises(PackageDamaged, match="can't be read"):
        read_plan(*chosen)
