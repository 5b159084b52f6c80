"""Writing compiled targets: whole or not at all, into the one place that they have."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_targets import HERE, compile_target, fields

from dapo_edge.errors import OutputError
from dapo_edge.package import EnginePackage, FileEntry
from dapo_edge.targets import KERNELS, PLAN, Target, TargetWriter, best, judge


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", str(tmp_path / "keys" / "device.key"))


@pytest.fixture
def opened(package: EnginePackage, tmp_path: Path) -> EnginePackage:
    return EnginePackage.open(shutil.copytree(package.path, tmp_path / "tiny.dapo"))


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


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EROFS, "Copy the package to a place where you may write, and compile it there."),
        (errno.EACCES, "Copy the package to a place where you may write, and compile it there."),
        (errno.ENOSPC, "Free some space, or copy the package"),
    ],
)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("others", [True, False])
def test_a_package_that_cannot_be_written(
    opened: EnginePackage, code: int, remedy: str, step: int, others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if others:
        compile_target(opened)
    before = sorted(opened.path.rglob("*"))
    mkdir, calls = Path.mkdir, []

    def refused(path: Path, *arguments: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) == step:  # the folder of targets, then that of the new one
            raise OSError(code, os.strerror(code))
        mkdir(path, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(OutputError) as caught:
        patch.setattr(Path, "mkdir", refused)
        with TargetWriter(opened.path, "x"):
            pass
    assert remedy in str(caught.value)
    assert "another place" not in str(caught.value)
    assert len(calls) == step
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
