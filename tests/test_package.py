"""The package format: round trip, every kind of damage refused, and no half-written package."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_edge.errors import OutputError, PackageDamaged, PackageError, PackageIncompatible
from dapo_edge.package import (
    ENCODER,
    ENCODER_INT8,
    MANIFEST,
    PROMPTS,
    REFERENCE,
    REPORT,
    REPORT_PAGE,
    THRESHOLDS,
    EnginePackage,
    PackageWriter,
    _digest,
)
from dapo_edge.prompt_bank import PromptBank


def rewrite(path: Path, **changes: Any) -> None:
    """Edit a manifest and sign it anew, as a newer or a foreign tool would have written it."""
    content = {**json.loads((path / MANIFEST).read_text()), **changes}
    (path / MANIFEST).write_text(json.dumps({**content, "digest": _digest(content)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int8"}, "its precision is int8, but encoder.int8.onnx does not belong to it"),
        (
            {"files": ENCODER_INT8},
            "encoder.int8.onnx, quantization.safetensors and reference.safetensors belong together",
        ),
        ({"precision": "int4"}, "precision"),
    ],
)
def test_int8_is_there_as_a_whole_or_not_at_all(package_copy: Path, changes: dict[str, Any], message: str) -> None:
    if "files" in changes:
        (package_copy / ENCODER_INT8).write_bytes(b"")
        empty = {"sha256": hashlib.sha256(b"").hexdigest(), "size": 0}
        changes = {"files": {**json.loads((package_copy / MANIFEST).read_text())["files"], ENCODER_INT8: empty}}
    rewrite(package_copy, **changes)
    with pytest.raises(PackageDamaged, match=message):
        EnginePackage.open(package_copy)


def test_round_trip(package: EnginePackage) -> None:
    opened = EnginePackage.open(package.path)
    assert opened.manifest == package.manifest
    assert set(opened.manifest.files) == {ENCODER, PROMPTS, REFERENCE, REPORT, REPORT_PAGE, THRESHOLDS}
    assert opened.bank().names == ("normal", "scratch", "missing part", "glue")
    assert opened.thresholds().frames == 8
    assert opened.report()["precisions"]["fp32"]["token_cosine_min"] > 0.9999
    assert len(opened.digest) == 64


@pytest.mark.parametrize("name", [ENCODER, PROMPTS, REFERENCE, REPORT, THRESHOLDS])
def test_missing_truncated_and_edited_files(package_copy: Path, name: str) -> None:
    whole = (package_copy / name).read_bytes()
    (package_copy / name).write_bytes(whole[:-1])
    with pytest.raises(PackageDamaged, match=f"{name}' has {len(whole) - 1} bytes instead of {len(whole)}"):
        EnginePackage.open(package_copy)
    (package_copy / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(PackageDamaged, match=r"SHA-256 differs.*build it again"):
        EnginePackage.open(package_copy)
    (package_copy / name).unlink()
    with pytest.raises(PackageDamaged, match=f"{name}' is missing"):
        EnginePackage.open(package_copy)


def test_damaged_manifest(package_copy: Path) -> None:
    text = (package_copy / MANIFEST).read_text()
    (package_copy / MANIFEST).write_text(text.replace('"image_size": 96', '"image_size": 64'))
    with pytest.raises(PackageDamaged, match="edited or truncated"):
        EnginePackage.open(package_copy)
    (package_copy / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(PackageDamaged, match="can't be read"):
        EnginePackage.open(package_copy)
    (package_copy / MANIFEST).write_text("[]")
    with pytest.raises(PackageDamaged, match="can't be read"):
        EnginePackage.open(package_copy)


def test_newer_format(package_copy: Path) -> None:
    rewrite(package_copy, format=2)
    with pytest.raises(PackageIncompatible, match=r"format 2, this dapo-edge reads up to 1\. Update"):
        EnginePackage.open(package_copy)


def test_manifest_cannot_reach_outside(package_copy: Path) -> None:
    files = json.loads((package_copy / MANIFEST).read_text())["files"]
    rewrite(package_copy, files={**files, "../../etc/passwd": files[ENCODER]})
    with pytest.raises(PackageDamaged, match="not the name of a file in the package"):
        EnginePackage.open(package_copy)
    rewrite(package_copy, files={name: entry for name, entry in files.items() if name != ENCODER})
    with pytest.raises(PackageDamaged, match=f"{ENCODER} does not belong"):
        EnginePackage.open(package_copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": True},
        {"format": 0},
        {"batch": 0},
        {"image_size": 0},
        {"map_size": [0, 0]},
        {"map_size": "big"},
    ],
)
def test_impossible_manifests(package_copy: Path, changes: dict[str, Any]) -> None:
    rewrite(package_copy, **changes)
    with pytest.raises(PackageDamaged):
        EnginePackage.open(package_copy)


@pytest.mark.parametrize("changes", [{"image_size": 112}, {"batch": 2}, {"dimensions": 47}, {"feature_layers": [1]}])
def test_a_manifest_of_another_encoder(package_copy: Path, changes: dict[str, Any]) -> None:
    from dapo_edge import Inspector

    rewrite(package_copy, **changes)
    with pytest.raises(PackageDamaged, match=r"its manifest|its encoder"):
        Inspector(package_copy)


def test_an_encoder_that_is_none(package: EnginePackage, tmp_path: Path) -> None:
    from dapo_edge import Inspector

    with PackageWriter(tmp_path / "x.dapo") as writer:
        for name in package.manifest.files:
            writer.write(name, b"no encoder" if name == ENCODER else (package.path / name).read_bytes())
        writer.commit(package.manifest.model_dump(exclude={"format", "files"}))
    with pytest.raises(PackageDamaged, match="is not an encoder"):
        Inspector(tmp_path / "x.dapo")


@pytest.mark.parametrize("content", [b"[]", b"nope", b'{"pixel": {"value": NaN}}', b'{"imag": 1}'])
def test_thresholds_that_are_none(package_copy: Path, content: bytes) -> None:
    opened = EnginePackage.open(package_copy)
    (package_copy / THRESHOLDS).write_bytes(content)
    with pytest.raises(PackageDamaged):
        opened.thresholds()


def test_opening_while_the_package_is_replaced(package: EnginePackage, package_copy: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def replace(name: str) -> None:
        with PackageWriter(package_copy) as writer:
            copied_into(writer, package, name=name)

    def opened(_: int) -> str:
        return EnginePackage.open(package_copy).manifest.name

    with ThreadPoolExecutor(2) as pool:
        replaced = pool.submit(lambda: [replace(f"v{index}") for index in range(5)])
        names = [opened(index) for index in range(60)]
        replaced.result()
    assert set(names) <= {"tiny", *(f"v{index}" for index in range(5))}


def test_no_package_inside_a_package(package_copy: Path) -> None:
    with pytest.raises(OutputError, match="inside another package"), PackageWriter(package_copy / "x.dapo"):
        pass


def test_what_is_not_a_package(package: EnginePackage, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"there is no engine package.*tiny\.dapo"):
        EnginePackage.open(package.path.parent / "other.dapo")
    with pytest.raises(PackageError, match=r"it has no manifest\.json"):
        EnginePackage.open(tmp_path)
    (tmp_path / "x.dapo").write_bytes(b"zip")
    with pytest.raises(PackageError, match="is a file, an engine package is a folder"):
        EnginePackage.open(tmp_path / "x.dapo")


def copied_into(writer: PackageWriter, package: EnginePackage, **changes: Any) -> EnginePackage:
    for name in package.manifest.files:
        writer.write(name, (package.path / name).read_bytes())
    fields = package.manifest.model_dump(exclude={"format", "files"})
    return writer.commit({**fields, **changes})


def test_replacing_a_package_is_one_step(package: EnginePackage, package_copy: Path) -> None:
    with PackageWriter(package_copy) as writer:
        copied_into(writer, package, name="second")
    assert EnginePackage.open(package_copy).manifest.name == "second"
    assert [path.name for path in package_copy.parent.iterdir()] == [package_copy.name]


def test_replacing_where_folders_cannot_be_exchanged(
    package: EnginePackage, package_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_edge.folders._exchange", lambda one, other: False)
    with PackageWriter(package_copy) as writer:
        copied_into(writer, package, name="second")
    assert EnginePackage.open(package_copy).manifest.name == "second"
    assert [path.name for path in package_copy.parent.iterdir()] == [package_copy.name]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_write_leaves_the_previous_package(
    package: EnginePackage, package_copy: Path, interruption: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Path, data: bytes) -> int:
        raise interruption

    with pytest.raises((KeyboardInterrupt, OutputError)) as caught, PackageWriter(package_copy) as writer:
        monkeypatch.setattr(Path, "write_bytes", interrupted)
        copied_into(writer, package, name="second")
    monkeypatch.undo()
    if caught.type is OutputError:
        assert "No space left on device" in str(caught.value)
        assert "Free some space" in str(caught.value)
    assert EnginePackage.open(package_copy).manifest.name == "tiny"
    assert [path.name for path in package_copy.parent.iterdir()] == [package_copy.name]


def test_a_folder_that_is_no_package_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    with pytest.raises(OutputError, match="is not an engine package"), PackageWriter(tmp_path / "photos"):
        pass
    assert (tmp_path / "photos" / "one.png").exists()


def test_unwritable_destination(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"), PackageWriter(tmp_path / "file" / "x.dapo"):
        pass


def test_leftovers_of_a_killed_build_are_removed(package: EnginePackage, package_copy: Path) -> None:
    prefix = f".{package_copy.name}.building-"
    dead = package_copy.parent / f"{prefix}x"
    dead.mkdir()
    Path(f"{dead}.lock").touch()
    with PackageWriter(package_copy) as alive, PackageWriter(package_copy):
        assert alive.folder.is_dir(), "another build is still at work"
        assert not dead.exists()
    assert [path.name for path in package_copy.parent.iterdir()] == [package_copy.name]


def test_a_package_moved_aside_by_a_killed_build_comes_back(package_copy: Path) -> None:
    package_copy.rename(package_copy.with_name(f".{package_copy.name}.previous"))
    with PackageWriter(package_copy):
        pass
    assert EnginePackage.open(package_copy).manifest.name == "tiny"


def test_files_in_folders_belong_to_the_package(package: EnginePackage, tmp_path: Path) -> None:
    with PackageWriter(tmp_path / "x.dapo") as writer:
        writer.write("targets/a/target.json", b"{}")
        copied_into(writer, package)
    (tmp_path / "x.dapo" / "targets/a/target.json").write_bytes(b"[]")
    with pytest.raises(PackageDamaged, match=r"targets/a/target\.json' is not the file of the build"):
        EnginePackage.open(tmp_path / "x.dapo")


def test_paths_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="can't be read"):
        EnginePackage.open(tmp_path / ("x" * 300))
    with pytest.raises(OutputError, match="can't be written"), PackageWriter(tmp_path / ("x" * 300)):
        pass


def test_a_package_that_vanishes(package_copy: Path) -> None:
    opened = EnginePackage.open(package_copy)
    (package_copy / THRESHOLDS).unlink()
    with pytest.raises(PackageDamaged, match="can't be read any more"):
        opened.thresholds()


def test_bank_round_trip_and_damage(tmp_path: Path) -> None:
    rows = np.eye(3, 4, dtype=np.float32)
    bank = PromptBank(("normal", "Kratzer", "汚れ"), rows, ("flawless", "scratch", "stain"), {"method": "dapo"})
    (tmp_path / "bank").write_bytes(bank.to_bytes())
    read = PromptBank.read(tmp_path / "bank")
    assert (read.names, read.phrases, dict(read.origin)) == (bank.names, bank.phrases, {"method": "dapo"})
    np.testing.assert_array_equal(read.rows, rows)
    (tmp_path / "bank").write_bytes(bank.to_bytes()[:-1])
    with pytest.raises(PackageDamaged, match="can't be read"):
        PromptBank.read(tmp_path / "bank")
    from safetensors.numpy import save_file

    save_file({"rows": rows}, tmp_path / "foreign")
    with pytest.raises(PackageIncompatible, match="not a prompt bank"):
        PromptBank.read(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        (("normal", "a"), np.ones((2, 3), np.float32), "length 1"),
        (("normal", "a"), np.full((2, 3), np.nan, np.float32), "length 1"),
        (("good", "a"), np.eye(2, dtype=np.float32), "the first 'normal'"),
        (("normal", "a"), np.eye(3, dtype=np.float32), "distinct names"),
        (("normal",), np.eye(1, dtype=np.float32), "K >= 1"),
        (("normal", "a"), np.eye(2), "float32"),
    ],
)
def test_impossible_banks(names: tuple[str, ...], rows: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptBank(names, rows)
