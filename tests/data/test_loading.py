"""Processes that read images ahead: their errors come back, and they leave with their parent."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapo_edge.data.loading import Loader
from dapo_edge.data.synth import write_dataset
from dapo_edge.errors import DapoEdgeError, FrameError


def test_errors_come_back_from_other_processes() -> None:
    error = FrameError("the mask is missing", "Add it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with Loader(1) as loader, pytest.raises(DapoEdgeError, match="died"):
        list(loader.load([_Deadly()], ("normal",)))  # type: ignore[list-item]


def test_readers_leave_with_a_killed_parent(tmp_path: Path) -> None:
    root = Path(write_dataset(tmp_path / "set", "folder", 4, size=(32, 32)).out)
    code = (
        "import os, sys, multiprocessing\n"
        "from pathlib import Path\n"
        "from dapo_edge.data.dataset import names_of\n"
        "from dapo_edge.data.layouts import layout_of\n"
        "from dapo_edge.data.loading import Loader\n"
        "if __name__ == '__main__':\n"
        f"    samples = layout_of('folder').read(Path({str(root)!r}))\n"
        "    loader = Loader(2)\n"
        "    list(loader.load(samples, names_of(samples)))\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "killed.py").write_text(code)
    command = [sys.executable, str(tmp_path / "killed.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    children = [int(pid) for pid in done.stdout.split()]
    assert len(children) == 2, done.stderr
    deadline = time.monotonic() + 20
    while any(map(_is_running, children)):
        assert time.monotonic() < deadline, "readers are still there"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty: it ended, and nobody has asked how
    except OSError:
        return False


class _Deadly:
    """A sample that kills the process which reads it."""

    @property
    def is_good(self) -> bool:
        os._exit(1)
