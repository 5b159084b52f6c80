"""The cache of what was compiled: whole or not at all, one folder per kind, and never a reason to stop."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dapo_edge import cache


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAPO_EDGE_CACHE", str(tmp_path))
    return tmp_path


def test_kinds_are_apart(root: Path) -> None:
    for kind in cache.KINDS:
        cache.store(kind, "same", kind.encode())
    assert [cache.load(kind, "same") for kind in cache.KINDS] == [kind.encode() for kind in cache.KINDS]
    assert (root / "dapo-edge" / "kernels" / "same.blob").is_file()
    assert cache.load("kernels", "other") is None
    with pytest.raises(KeyError):
        cache.load("../elsewhere", "same")


def test_a_key_depends_on_every_part() -> None:
    assert cache.key_of("a", 1) == cache.key_of("a", "1")
    assert len({cache.key_of("a", 1), cache.key_of("a", 2), cache.key_of("b", 1), cache.key_of("a")}) == 4


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_removed_and_said(root: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    cache.store("kernels", "key", bytes(1000))
    (path,) = root.rglob("*.blob")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x" if damage is None else damage)
    assert cache.load("kernels", "key") is None
    assert not path.exists()
    assert "the compiled kernel " in caplog.text
    assert "is damaged: compiled again" in caplog.text


def test_it_forgets_what_was_not_used_for_long(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 250)
    for age, key in enumerate(("old", "older", "oldest")):
        cache.store("openvino", key, bytes(68))
        (path,) = root.rglob(f"{key}.blob")
        os.utime(path, (1e9 - age, 1e9 - age))
    cache.store("tensorrt", "plan", bytes(200))  # counts for its own kind only
    cache.store("openvino", "new", bytes(68))
    assert sorted(path.stem for path in root.rglob("*.blob")) == ["new", "old", "plan"]


def test_no_home_makes_no_folder_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAPO_EDGE_CACHE", "~nosuchuser/cache")
    assert cache.folder("openvino") is None
    assert cache.load("openvino", "key") is None
    cache.store("openvino", "key", b"lost, and that is fine")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DAPO_EDGE_CACHE", str(tmp_path / "file"))
    cache.store("tensorrt", "key", b"blob")
    assert "no timing cache in" in caplog.text
    assert "every compile measures anew; set DAPO_EDGE_CACHE" in caplog.text
    cache.store("kernels", "key", b"blob")
    assert "no kernel cache in" in caplog.text
    assert "every start compiles anew" in caplog.text


def test_a_damaged_timing_cache_is_no_plan(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.store("tensorrt", "key", bytes(1000))
    (path,) = root.rglob("*.blob")
    path.write_bytes(b"short")
    assert cache.load("tensorrt", "key") is None
    assert f"the timing cache '{path}' is damaged: measured again" in caplog.text
