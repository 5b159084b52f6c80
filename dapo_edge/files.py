"""Writing files so that an interrupted or refused write leaves what was there before."""

from __future__ import annotations

from pathlib import Path

from dapo_edge.errors import OutputError


def write_atomically(path: Path, content: bytes) -> Path:
    """Write beside `path`, then rename; makes its folder. Raises `OutputError` when the system refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.new")
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        raise OutputError.refused(path, error) from error
    return path
