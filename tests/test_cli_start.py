"""How `dapo-edge` answers signals before it has begun anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def importing(
    folder: Path, module: str, command: str, seconds: float, interrupts: Any = signal.SIG_DFL
) -> subprocess.Popen[str]:
    """`dapo-edge` in the middle of the import of a module, which says so and swallows all exceptions."""
    (folder / f"{module}.py").write_text(
        "import sys, time\n"
        "print('importing', file=sys.stderr, flush=True)\n"
        f"try:\n    time.sleep({seconds})\nexcept BaseException:\n    pass\n"
    )
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-m", "dapo_edge", command, "p.dapo", "synthetic://64x64"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths},
        # Who runs the tests in the background has it ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts),
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "importing\n"
    return process


@pytest.mark.parametrize(
    ("module", "command", "number", "code"),
    [
        ("click", "run", signal.SIGTERM, 0),
        ("click", "run", signal.SIGINT, 130),
        ("click", "show", signal.SIGTERM, 130),
        ("click", "show", signal.SIGINT, 130),
        ("pydantic", "run", signal.SIGTERM, 0),
        ("pydantic", "run", signal.SIGINT, 130),
    ],
)
def test_stopping_before_anything_has_begun(tmp_path: Path, module: str, command: str, number: int, code: int) -> None:
    process = importing(tmp_path, module, command, 30)
    process.send_signal(number)
    try:
        output, errors = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, output, errors) == (code, "", "" if code == 0 else "interrupted\n")


def test_a_signal_that_is_to_be_ignored_is(tmp_path: Path) -> None:
    """As a shell has it for Ctrl-C where a command runs in the background."""
    process = importing(tmp_path, "click", "show", 0.5, signal.SIG_IGN)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert "interrupted" not in errors
    assert process.returncode == 1, "it went on, to find out that this is not click"
