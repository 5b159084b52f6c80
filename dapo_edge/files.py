"""Writing files so that an interrupted or refused write leaves what was there before."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from dapo_edge.errors import OutputError


def write_atomically(path: Path, content: bytes) -> Path:
    """Write beside `path`, then rename; makes its folder. Raises `OutputError` when the system refuses."""
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


def as_bytes(content: Any) -> bytes:
    """A JSON document; names that are no text, as file names may be, stand in it as escapes."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def check_writable(folder: Path) -> None:
    """Make a folder and try to write into it. Raises `OutputError` now instead of after hours of work."""
    probe = folder / ".probe"
    write_atomically(probe, b"")
    probe.unlink(missing_ok=True)
