"""Compiled models, kept between starts: `<root>/dapo-edge/openvino/<key>.blob`, each with its own SHA-256 in front.

A compiled model is what really runs, so it is verified like the package: a damaged one is compiled again, never used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from functools import lru_cache
from pathlib import Path

MAX_BYTES = 8 << 30  # room for several full-size models; the least recently used go first
STALE_SECONDS = 3600

log = logging.getLogger(__name__)


def folder() -> Path | None:
    """Where compiled models lie: under DAPO_EDGE_CACHE, else the user's cache folder. None if it can't be written."""
    root = os.environ.get("DAPO_EDGE_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    place = Path(os.path.expanduser(root)) / "dapo-edge" / "openvino"  # noqa: PTH111 (it may know no home)
    try:
        if str(place).startswith("~"):
            raise FileNotFoundError(errno.ENOENT, "no home folder is known")
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
        reason = "not writable"
    except OSError as error:
        reason = error.strerror or str(error)
    _warn_once(f"no model cache in '{place}' ({reason}): every start compiles anew; set DAPO_EDGE_CACHE")
    return None


@lru_cache(maxsize=8)
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def key_of(*parts: object) -> str:
    """A name for what a compiled model depends on."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def load(key: str) -> bytes | None:
    """The compiled model of `key`; None when there is none, or it is damaged and was removed."""
    place = folder()
    path = place / f"{key}.blob" if place else None
    if path is None or not path.is_file():
        return None
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            os.utime(path)
            return content[32:]
        log.warning("the compiled model '%s' is damaged: compiled again", path)
        path.unlink()
    except OSError as error:
        log.warning("the compiled model '%s' can't be used (%s): compiled again", path, error.strerror)
    return None


def store(key: str, blob: bytes) -> None:
    """Keep a compiled model; a full disk is said, and costs only the next start's time."""
    place = folder()
    if place is None:
        return
    part = place / f".{key}.{os.getpid()}.part"
    try:
        part.write_bytes(hashlib.sha256(blob).digest() + blob)
        part.replace(place / f"{key}.blob")
    except OSError as error:
        log.warning("the compiled model can't be kept in '%s' (%s)", place, error.strerror)
    finally:
        part.unlink(missing_ok=True)
    _prune(place)


def _prune(place: Path) -> None:
    """Remove the least recently used models beyond the limit; another process may do so at the same time."""
    with contextlib.suppress(OSError):
        for part in place.glob(".*.part"):  # left by a process that was killed
            if part.stat().st_mtime < time.time() - STALE_SECONDS:
                part.unlink()
        total = 0
        for blob in sorted(place.glob("*.blob"), key=lambda path: path.stat().st_mtime, reverse=True):
            total += blob.stat().st_size
            if total > MAX_BYTES:
                blob.unlink()
