"""What was compiled on this machine, kept between starts: `<root>/dapo-edge/<kind>/<key>.blob`.

A compiled thing is what really runs, so each file has its own SHA-256 in front and is verified like the package: a
damaged one is compiled again, never used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """The words that messages use for one kind."""

    cache: str  # the folder
    content: str  # one file
    again: str  # what becomes of a file that can't be used
    without: str  # what it costs to have no cache


_COMPILED = ("compiled again", "every start compiles anew")
KINDS = {
    "openvino": Kind("model cache", "compiled model", *_COMPILED),
    "kernels": Kind("kernel cache", "compiled kernel", *_COMPILED),
    "tensorrt": Kind("timing cache", "timing cache", "measured again", "every compile measures anew"),
}
MAX_BYTES = 8 << 30  # of one kind: room for several full-size models; the least recently used go first
STALE_SECONDS = 3600

log = logging.getLogger(__name__)


def folder(kind: str) -> Path | None:
    """Where a kind's files lie: under DAPO_EDGE_CACHE, else the user's cache folder. None if it can't be written."""
    words = KINDS[kind]
    root = os.environ.get("DAPO_EDGE_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    place = Path(os.path.expanduser(root)) / "dapo-edge" / kind  # noqa: PTH111 (it may know no home)
    try:
        if str(place).startswith("~"):
            raise FileNotFoundError(errno.ENOENT, "no home folder is known")
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
        reason = "not writable"
    except OSError as error:
        reason = error.strerror or str(error)
    _warn_once(f"no {words.cache} in '{place}' ({reason}): {words.without}; set DAPO_EDGE_CACHE")
    return None


@lru_cache(maxsize=8)
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def key_of(*parts: object) -> str:
    """A name for what a compiled thing depends on."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def load(kind: str, key: str) -> bytes | None:
    """What was stored under `key`; None when there is nothing, or it is damaged and was removed."""
    place = folder(kind)
    path = place / f"{key}.blob" if place else None
    if path is None or not path.is_file():
        return None
    words = KINDS[kind]
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            os.utime(path)
            return content[32:]
        log.warning("the %s '%s' is damaged: %s", words.content, path, words.again)
        path.unlink()
    except OSError as error:
        log.warning("the %s '%s' can't be used (%s): %s", words.content, path, error.strerror, words.again)
    return None


def store(kind: str, key: str, blob: bytes) -> None:
    """Keep what was compiled; a full disk is said, and costs only the next start's time."""
    place = folder(kind)
    if place is None:
        return
    part = place / f".{key}.{os.getpid()}.part"
    try:
        part.write_bytes(hashlib.sha256(blob).digest() + blob)
        part.replace(place / f"{key}.blob")
    except OSError as error:
        log.warning("the %s can't be kept in '%s' (%s)", KINDS[kind].content, place, error.strerror)
    finally:
        part.unlink(missing_ok=True)
    _prune(place)


def _prune(place: Path) -> None:
    """Remove the least recently used files beyond the limit; another process may do so at the same time."""
    with contextlib.suppress(OSError):
        for part in place.glob(".*.part"):  # left by a process that was killed
            if part.stat().st_mtime < time.time() - STALE_SECONDS:
                part.unlink()
        total = 0
        for blob in sorted(place.glob("*.blob"), key=lambda path: path.stat().st_mtime, reverse=True):
            total += blob.stat().st_size
            if total > MAX_BYTES:
                blob.unlink()
