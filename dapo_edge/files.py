"""Writing files so that an interrupted or refused write leaves what was there before."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from dapo_edge.errors import OutputError


def write_atomically(path: Path, content: bytes) -> Path:
    """Write beside `path`, then rename; makes its folder.

    Raises `OutputError` when the system refuses, and as `check_replaceable` does.
    """
    check_replaceable(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # on a full disk, half a file would only keep it full
                beside.unlink()
            raise
    except OSError as error:
        raise OutputError.refused(path, error) from error
    return path


def check_replaceable(path: Path) -> None:
    """Raises `OutputError` for a name that can't be, and for what is no plain file: a file would take its place."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError.refused(path, error) from error
    if not stat.S_ISREG(mode):
        raise OutputError(f"'{path}' can't be written (it is no plain file)", "Name another file")


def check_file(path: Path) -> None:
    """Refuse now what `write_atomically` would refuse after hours of work: raises `OutputError`."""
    check_replaceable(path)
    check_writable(path.parent)


def as_bytes(content: Any) -> bytes:
    """A JSON document; names that are no text, as file names may be, stand in it as escapes."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def check_writable(folder: Path) -> None:
    """Try to write into a folder, and leave nothing behind, not even the folder where it was not there before.

    Raises `OutputError` now instead of after hours of work.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".dapo-edge-"):
            pass
    except OSError as error:
        raise OutputError.refused(folder, error) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # not made, or in use by now
                path.rmdir()
