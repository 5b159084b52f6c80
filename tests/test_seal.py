"""The device's key: made once, kept private, and never guessed."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_edge import seal
from dapo_edge.errors import OutputError

CONTENT = {"b": [1, 2.5, None], "a": "ä\ud800"}


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DAPO_EDGE_DEVICE_KEY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def test_the_seal_is_an_hmac_with_a_private_key(data_folder: Path) -> None:
    found = seal.seal(CONTENT)
    path = data_folder / "dapo-edge" / "device.key"
    assert seal.key_path() == path
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["device.key"]
    text = b'dapo-edge target 1\n{"a":"\\u00e4\\ud800","b":[1,2.5,null]}'
    assert found == hmac.new(path.read_bytes(), text, hashlib.sha256).hexdigest()
    assert seal.seal(dict(reversed(CONTENT.items()))) == found
    assert seal.broken(CONTENT, found) is None


@pytest.mark.parametrize("found", [None, 7, "", "0" * 64, "é", ["0" * 64]])
def test_broken_seals(found: object) -> None:
    right = seal.seal(CONTENT)
    assert "compiled on another device (or edited)" in (seal.broken(CONTENT, found) or "")
    assert "compiled on another device (or edited)" in (seal.broken({**CONTENT, "b": 1}, right) or "")
    assert "compiled on another device (or edited)" in (seal.broken(CONTENT, right.upper()) or "")


def test_a_device_without_a_key_gets_none_by_judging(data_folder: Path) -> None:
    assert "there is no device key here" in (seal.broken(CONTENT, "0" * 64) or "")
    assert not data_folder.exists()


def test_where_the_key_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert seal.key_path() == tmp_path / ".local" / "share" / "dapo-edge" / "device.key"
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", str(tmp_path / "shared.key"))
    seal.seal(CONTENT)
    assert (tmp_path / "shared.key").stat().st_size == 32
    assert not (tmp_path / ".local").exists()
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", "~/home.key")
    assert seal.key_path() == tmp_path / "home.key"
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", "~nobody-of-this-name/x.key")
    with pytest.raises(OutputError, match="no home folder is known"):
        seal.key_path()


def test_no_home_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "~nobody-of-this-name/data")
    with pytest.raises(OutputError, match="no home folder is known"):
        seal.seal(CONTENT)
    assert "no home folder is known" in (seal.broken(CONTENT, "") or "")


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o666])
def test_a_key_that_others_can_read_or_replace_is_refused(mode: int) -> None:
    found = seal.seal(CONTENT)
    seal.key_path().chmod(mode)
    with pytest.raises(OutputError, match=f"by others .mode {mode:o}.*chmod 600"):
        seal.seal(CONTENT)
    assert "chmod 600" in (seal.broken(CONTENT, found) or "")
    seal.key_path().chmod(0o640)  # a group of services may share it
    assert seal.broken(CONTENT, found) is None


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_length_is_refused(size: int) -> None:
    found = seal.seal(CONTENT)
    seal.key_path().write_bytes(bytes(size))
    with pytest.raises(OutputError, match=f"has {size} bytes instead of 32"):
        seal.seal(CONTENT)
    assert "compile again" in (seal.broken(CONTENT, found) or "")


def test_a_key_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", str(tmp_path / "file" / "device.key"))
    with pytest.raises(OutputError, match=r"can't be read.*Compile as the user who runs"):
        seal.seal(CONTENT)
    assert "can't be read" in (seal.broken(CONTENT, "") or "")


def test_a_key_that_cannot_be_made(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"Free some space.*DAPO_EDGE_DEVICE_KEY"):
        patch.setattr(os, "fsync", full)
        seal.seal(CONTENT)
    assert not list((data_folder / "dapo-edge").iterdir()), "half a key would be refused for ever"


def test_of_processes_that_make_the_key_at_once_the_first_wins(data_folder: Path) -> None:
    code = "import sys; from dapo_edge.seal import seal; sys.stdin.read(1); print(seal({}))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
    seals = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert seals == {seal.seal({})}
    assert [path.name for path in (data_folder / "dapo-edge").iterdir()] == ["device.key"]


def test_a_key_that_appears_while_another_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The race itself, without luck: the other process is faster by one step."""
    link, theirs = os.link, bytes(range(32))

    def slow(beside: Path, path: Path) -> None:
        path.write_bytes(theirs)
        path.chmod(0o600)
        link(beside, path)

    monkeypatch.setattr(os, "link", slow)
    assert seal.seal({}) == hmac.new(theirs, b"dapo-edge target 1\n{}", hashlib.sha256).hexdigest()
    assert seal.key_path().read_bytes() == theirs


def test_preparing_makes_the_key_that_seals(data_folder: Path) -> None:
    assert seal.key_here() == f"{seal.key_path()}, made by the first dapo-edge compile"
    assert not data_folder.exists(), "looking makes nothing"
    seal.prepare()
    key = seal.key_path().read_bytes()
    seal.prepare()
    seal.seal(CONTENT)
    assert seal.key_path().read_bytes() == key
    assert seal.key_here() == str(seal.key_path())
    seal.key_path().write_bytes(b"short")
    for use in (seal.prepare, seal.key_here):
        with pytest.raises(OutputError, match="has 5 bytes instead of 32"):
            use()


def test_a_place_where_no_key_can_be_made(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"none can be made in .*Name a file in DAPO_EDGE_DEVICE_KEY"):
        seal.key_here()


@pytest.mark.parametrize("kind", ["folder", "pipe", "/dev/null", "/dev/zero", "/proc/self/environ", "/proc/self/none"])
def test_what_is_no_file_is_no_key(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir(mode=0o777)
    os.mkfifo(tmp_path / "pipe", 0o666)
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", str(tmp_path / kind))
    for use in (seal.prepare, seal.key_here, lambda: seal.seal(CONTENT)):
        with pytest.raises(OutputError, match=r"is not a file\. Name a file in DAPO_EDGE_DEVICE_KEY\.$"):
            use()
    assert "is not a file" in (seal.broken(CONTENT, "") or "")


def test_the_command_that_mends_a_mode_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it's mine; key"
    monkeypatch.setenv("DAPO_EDGE_DEVICE_KEY", str(path))
    seal.prepare()
    path.chmod(0o666)
    with pytest.raises(OutputError) as caught:
        seal.prepare()
    assert f"chmod 600 {shlex.quote(str(path))}. " in caught.value.remedy


def test_content_that_is_nested_too_deeply_is_not_sealed_here() -> None:
    seal.prepare()
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert "nested more deeply" in (seal.broken({"a": nested}, "0" * 64) or "")
