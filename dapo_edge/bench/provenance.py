"""What a benchmark's numbers depend on: version, date, command, machine, software."""

from __future__ import annotations

import datetime
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dapo_edge
from dapo_edge.device import as_json, this_device, versions
from dapo_edge.runtime.sources.uri import redact

PACKAGES = (
    "numpy",
    "openvino",
    "tensorrt",
    "pycuda",
    "opencv-python-headless",
    "opencv-python",
    "pillow",
    "nvidia-ml-py",
)
GIT_LIMIT_S = 10  # a checkout on a network drive that hangs must not hold a benchmark up


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """The keys version, date (UTC), command (without credentials), device and software of a bench document.

    Never raises: what can't be found out is left out, or None.
    """
    return {
        "version": dapo_edge.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": _in_a_shell(command),
        "device": as_json(this_device()),
        "software": {"python": platform.python_version(), **versions(PACKAGES), "git": git_state(_checkout())},
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a checkout whose top is `folder`, and whether files in git differ from it; None elsewhere."""
    if not (folder / ".git").exists():  # a wheel inside somebody else's checkout is not of that commit
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _in_a_shell(command: Sequence[str]) -> str:
    """As it would be typed: the program without its folder, which says nothing elsewhere."""
    words = [redact(word) for word in command]
    return shlex.join([Path(words[0]).name, *words[1:]]) if words else ""


def _checkout() -> Path:
    return Path(dapo_edge.__file__).resolve().parent.parent


def _git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=GIT_LIMIT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
