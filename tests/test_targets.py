"""Compiled targets: written whole or not at all, loaded only where they were compiled."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from driver_fakes import H200, NO_DRIVER, FakeLibcuda, use
from made_targets import FILES, HERE, compile_target, edit, fields, reseal

from dapo_edge import seal
from dapo_edge.errors import OutputError, PackageDamaged, PackageError, PackageIncompatible
from dapo_edge.package import EnginePackage, FileEntry, Manifest
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


def verdict(folder: Path, package: EnginePackage, here: Fingerprint | None = HERE) -> tuple[str, str]:
    judgement = judge(folder, package, here)
    assert judgement.id == folder.name
    return judgement.verdict, judgement.reason


def other(**changes: str) -> Fingerprint:
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


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / TARGET).unlink(), "target.json' is missing"),
        (lambda folder: (folder / TARGET).write_bytes(b'{"format": 1'), "target.json' can't be read (JSONDecodeError"),
        (lambda folder: (folder / TARGET).write_bytes(b"[]"), "target.json' can't be read"),
        (lambda folder: (folder / TARGET).write_bytes(b"[" * 100_000), "target.json' can't be read (RecursionError"),
        (lambda folder: (folder / TARGET).write_bytes(b'"\xff"'), "target.json' can't be read (UnicodeDecodeError"),
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


@pytest.mark.parametrize(
    ("changes", "found", "text"),
    [
        ({"format": 2}, "compile again", "target format 2, this dapo-edge reads 1"),
        ({"format": None}, "compile again", "target format None"),
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


def test_best_takes_the_packages_own_precision_first(opened: EnginePackage) -> None:
    assert opened.manifest.precision == "fp32"
    for precision in ("int8", "fp16"):
        compile_target(opened, precision=precision)
    assert best(opened, HERE).target.precision == "fp16", "the most exact one"
    compile_target(opened, precision="fp32")
    assert best(opened, HERE).target.precision == "fp32"
    chosen = best(opened, HERE, "int8")
    assert (chosen.target.precision, chosen.folder.name) == ("int8", "nvidia-h200-sm90-trt10.3.0-int8")
    manifest = Manifest(**{**opened.manifest.model_dump(), "precision": "fp16"})
    assert best(EnginePackage(opened.path, manifest), HERE).target.precision == "fp16"


def test_best_says_of_every_target_why_not(opened: EnginePackage) -> None:
    compile_target(opened, fingerprint=other(tensorrt="8.6.1"))
    damaged = compile_target(opened, precision="fp32")
    (damaged / PLAN).write_bytes(bytes(4000))
    with pytest.raises(PackageIncompatible) as caught:
        best(opened, HERE)
    assert caught.value.remedy == f"dapo-edge compile {opened.path}"
    assert "fp32: " in caught.value.cause
    assert "its SHA-256 differs; nvidia-h200-sm90-trt8.6.1-fp16: compiled by TensorRT 8.6.1" in caught.value.cause
    assert "\n" not in str(caught.value)
    compile_target(opened)
    with pytest.raises(PackageIncompatible, match=r"its precision is fp16, not int8.*compile .* --precision int8"):
        best(opened, HERE, "int8")
    assert best(opened, HERE).target.precision == "fp16"


def test_best_without_targets_or_gpu(opened: EnginePackage) -> None:
    with pytest.raises(PackageIncompatible, match=r"is not compiled yet\. dapo-edge compile"):
        best(opened, HERE)
    with pytest.raises(PackageIncompatible, match=r"no CUDA driver on this machine\. Run it on the CPU.*compile"):
        best(opened, None)


def test_judge_all_is_sorted_and_skips_what_is_being_compiled(opened: EnginePackage) -> None:
    assert judge_all(opened, HERE) == ()
    for precision in ("int8", "fp16"):
        compile_target(opened, precision=precision)
    (opened.path / "targets" / "empty").mkdir()
    (opened.path / "targets" / "note.txt").touch()
    with TargetWriter(opened.path, "x"):
        found = judge_all(opened, HERE)
    assert [(judgement.id, judgement.verdict) for judgement in found] == [
        ("empty", "refuse"),
        ("nvidia-h200-sm90-trt10.3.0-fp16", "load"),
        ("nvidia-h200-sm90-trt10.3.0-int8", "load"),
    ]


def test_targets_that_cannot_be_listed(opened: EnginePackage) -> None:
    (opened.path / "targets").touch()
    with pytest.raises(PackageError, match="targets' can't be read"):
        judge_all(opened, HERE)


def test_a_plan_that_changes_after_it_was_judged(opened: EnginePackage) -> None:
    chosen = (compile_target(opened), best(opened, HERE).target)
    (chosen[0] / PLAN).write_bytes(b"evil" * 1000)
    with pytest.raises(PackageDamaged, match=r"encoder\.plan' is not the file that was compiled\. dapo-edge compile"):
        read_plan(*chosen)
    (chosen[0] / PLAN).unlink()
    with pytest.raises(PackageDamaged, match="can't be read"):
        read_plan(*chosen)


@pytest.mark.parametrize(
    "interruption", [KeyboardInterrupt(), ZeroDivisionError(), OSError(errno.ENOSPC, "No space left on device")]
)
@pytest.mark.parametrize("place", ["dapo_edge.folders._sync", "dapo_edge.folders._exchange"])
def test_an_interrupted_commit_leaves_the_previous_target(
    opened: EnginePackage, place: str, interruption: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compile_target(opened)

    def interrupted(*paths: Path) -> bool:
        raise interruption

    with monkeypatch.context() as patch, pytest.raises((type(interruption), OutputError)) as caught:
        patch.setattr(place, interrupted)
        compile_target(opened, batch=2)
    if caught.type is OutputError:
        assert "Free some space" in str(caught.value)
    target = judge(folder, opened, HERE).target
    assert target is not None
    assert target.batch == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_first_target_that_fails_leaves_nothing(opened: EnginePackage) -> None:
    before = sorted(opened.path.rglob("*"))
    with pytest.raises(ZeroDivisionError), TargetWriter(opened.path, "x") as writer:
        writer.write(PLAN, b"plan")
        raise ZeroDivisionError
    assert sorted(opened.path.rglob("*")) == before


@pytest.mark.parametrize("exchangeable", [True, False])
def test_replacing_a_target(opened: EnginePackage, exchangeable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchangeable:
        monkeypatch.setattr("dapo_edge.folders._exchange", lambda one, two: False)
    compile_target(opened)
    folder = compile_target(opened, batch=2)
    assert best(opened, HERE).target.batch == 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_leftovers_of_a_killed_process_are_removed(opened: EnginePackage) -> None:
    code = (
        "import os, signal, sys; from dapo_edge.targets import TargetWriter\n"
        "with TargetWriter(sys.argv[1], 'older-name') as writer:\n"
        "    writer.write('encoder.plan', b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(opened.path)], check=False, timeout=60)
    assert killed.returncode == -9
    targets = opened.path / "targets"
    assert len(list(targets.iterdir())) == 2
    with TargetWriter(opened.path, "x") as alive:
        assert {path.name for path in targets.iterdir()} == {alive.folder.name, f"{alive.folder.name}.lock"}
        with TargetWriter(opened.path, "y"):
            assert alive.folder.is_dir(), "another process is still at work on it"
    assert not targets.exists()


def test_a_package_that_is_replaced_meanwhile(opened: EnginePackage) -> None:
    with pytest.raises(OutputError, match="was replaced while this target was compiled"):  # noqa: SIM117
        with TargetWriter(opened.path, "x") as writer:
            writer.write(PLAN, b"plan")
            shutil.rmtree(opened.path / "targets")
            writer.write(KERNELS, b"cubin")
    with pytest.raises(OutputError, match=r"was replaced.*dapo-edge compile"), TargetWriter(opened.path, "x") as writer:
        shutil.rmtree(opened.path / "targets")
        writer.commit(fields(opened))


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../../x", "X", "a\nb", "x" * 201])
def test_names_that_no_target_has(opened: EnginePackage, name: str) -> None:
    with (
        pytest.raises(OutputError, match=r"not the name of a target|not an engine package"),
        TargetWriter(opened.path, name),
    ):
        pass
    assert not (opened.path / "targets").exists()


def test_only_packages_have_targets(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not an engine package"), TargetWriter(tmp_path, "x"):
        pass
    assert not (tmp_path / "targets").exists()


@pytest.mark.parametrize("gate", [{"x": object()}, {"x": float("nan")}])
def test_what_is_no_json_is_not_written(opened: EnginePackage, gate: Any) -> None:
    files = {name: FileEntry(sha256="0" * 64, size=0) for name in (PLAN, KERNELS)}
    with pytest.raises(ValueError, match="gate"):
        Target(format=1, files=files, **fields(opened, gate=gate))
