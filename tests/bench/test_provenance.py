"""What numbers depend on is written down, without passwords, and without ever failing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from dapo_edge.bench import provenance as module
from dapo_edge.bench.provenance import git_state, provenance


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_it_names_software_machine_and_date() -> None:
    found = json.loads(json.dumps(provenance(["dapo-edge", "bench", "x.dapo"])))
    assert set(found) == {"version", "date", "command", "device", "software"}
    assert found["date"].endswith("+00:00")
    assert found["device"]["line"]
    assert found["software"].keys() >= {"python", "numpy", "git"}


def test_the_command_can_be_typed_again_and_shows_no_password() -> None:
    words = ["/opt/venv/bin/dapo-edge", "bench", "my line.dapo", "--source", "rtsp://me:secret@cam/1?token=abc"]
    command = provenance(words)["command"]
    assert command == "dapo-edge bench 'my line.dapo' --source 'rtsp://***@cam/1?token=***'"
    assert provenance(["dapo-edge", "--source=rtsp://me:secret@cam/1"])["command"] == (
        "dapo-edge '--source=rtsp://***@cam/1'"
    )
    assert provenance([])["command"] == ""


def test_a_checkout_is_clean_or_dirty(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None, "nothing is committed yet"
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = git_state(tmp_path)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "notes.txt").write_text("not in git\n")
    assert git_state(tmp_path) == clean
    (tmp_path / "code.py").write_text("2\n")
    assert git_state(tmp_path) == {**clean, "dirty": True}


def test_a_wheel_in_somebody_else_s_checkout_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    inside = tmp_path / "venv" / "site-packages"
    inside.mkdir(parents=True)
    assert git_state(inside) is None


@pytest.mark.parametrize("refusal", [OSError("no fork"), subprocess.TimeoutExpired("git", 10)])
def test_a_git_that_fails_is_none(refusal: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise refusal

    git(tmp_path, "init", "-q")
    monkeypatch.setattr(module.subprocess, "run", refused)
    assert git_state(tmp_path) is None


def test_a_machine_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None
