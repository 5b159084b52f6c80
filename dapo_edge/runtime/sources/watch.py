"""A watched folder: the pictures in it, then every new one as it appears.

A picture is read when it is complete: its size and time have not changed for `settle_s`, and, where the system tells,
no program has it open for writing. Looking into the folder again and again costs little and works on network drives,
which tell nobody about new files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs

from dapo_edge.data.pictures import IMAGE_EXTENSIONS, read_image
from dapo_edge.errors import FrameError, FrameTimeout, SourceError, SourceRefused
from dapo_edge.runtime.sources.base import Properties, Source
from dapo_edge.runtime.sources.stills import FolderSource, natural_key
from dapo_edge.runtime.sources.uri import SWITCH, check_path, number, options, path_of, split, uri_of
from dapo_edge.structures import Frame

LOOK_S = 0.05  # between two looks into the folder
LOOK_SHARE = 4  # a look that takes long, into a big folder, is followed by a pause of so many times its duration

OPTIONS = {
    "watch": SWITCH,
    "settle_s": number(0.02, 60, "seconds"),
    "delete": SWITCH,
}


def folder_source(uri: str) -> Source:
    """The source for `dir:///path`, watched or as it is."""
    address = split(uri)
    watched = address is not None and parse_qs(address.query).get("watch") == ["1"]
    return WatchedFolder(uri) if watched else FolderSource(uri)


@dataclass(frozen=True)
class _Version:
    """What tells a file from the one that had its name before. Seconds of the monotonic clock."""

    inode: int
    size: int
    modified_ns: int


@dataclass
class _Known:
    """A file that is in the folder now."""

    version: _Version
    since_s: float
    taken: bool = False  # read already, or about to be


class WatchedFolder(Source):
    """`dir:///path?watch=1&settle_s=0.2&delete=0`: never ends. A file that is written again is a new picture.

    With `delete=1` a picture is deleted when it has been read; one that can't be used stays. Only what is in the
    folder now is remembered: a folder that was lost and found again gives everything in it once more.
    """

    reconnects: ClassVar[bool] = True

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._folder = Path()
        self._settle_s = 0.2
        self._delete = False
        self._known: dict[str, _Known] = {}
        self._ready: deque[str] = deque()
        self._next_look_s = 0.0
        self._index = 0
        self._closed = threading.Event()

    def _parse(self) -> tuple[Path, dict[str, Any]]:
        asked = options(self.uri, self._address.query, OPTIONS)
        return path_of(self._address.body), asked

    def _open(self) -> Properties:
        self._folder, asked = self._parse()
        self._settle_s, self._delete = asked.get("settle_s", 0.2), asked.get("delete", False)
        check_path(self._folder, "folder")
        if not self._folder.is_dir():
            cause = f"'{self._folder}' is a file, not a folder"
            raise SourceRefused(cause, f"Open it as {uri_of('image', self._folder)}")
        if self._delete and not os.access(self._folder, os.W_OK):
            cause = f"pictures in '{self._folder}' can't be deleted (Permission denied)"
            raise SourceRefused(cause, "Allow writing to the folder, or leave out delete=1")
        self._known, self._next_look_s, self._index = {}, 0.0, 0
        self._ready.clear()
        self._closed.clear()
        self._look()
        return Properties(self.uri, live=True, triggered=True)

    def _read(self, timeout_s: float | None) -> Frame | None:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._closed.is_set():
            while self._ready:
                frame = self._take(self._ready.popleft())
                if frame is not None:
                    return frame
            now_s = time.monotonic()
            if deadline_s is not None and now_s >= deadline_s:
                raise FrameTimeout(f"no new picture in '{self._folder}' within {timeout_s:g} s", "Wait longer")
            wait_s = max(0.0, self._next_look_s - now_s)
            if deadline_s is not None:
                wait_s = min(wait_s, deadline_s - now_s)
            self._closed.wait(wait_s)
            if time.monotonic() >= self._next_look_s:
                self._look()
        return None

    def _look(self) -> None:
        """Find out which pictures are in the folder, and which of them have become complete."""
        began_s = time.monotonic()
        try:
            versions = dict(_versions(self._folder))
        except OSError as error:
            cause = f"the folder '{self._folder}' can't be read ({error.strerror})"
            raise SourceError(cause, "Check the path, its permissions and the drive") from error
        for name in self._known.keys() - versions.keys():
            del self._known[name]
        for name, version in versions.items():
            known = self._known.get(name)
            if known is None or known.version != version:
                self._known[name] = _Known(version, began_s)
        now_s = time.monotonic()
        complete = [name for name, known in self._known.items() if self._is_complete(name, known, began_s)]
        for name in sorted(complete, key=natural_key):
            self._known[name].taken = True
            self._ready.append(name)
        self._next_look_s = now_s + max(LOOK_S, LOOK_SHARE * (now_s - began_s))

    def _is_complete(self, name: str, known: _Known, now_s: float) -> bool:
        settled = not known.taken and now_s - known.since_s >= self._settle_s
        return settled and not is_being_written(self._folder / name)

    def _take(self, name: str) -> Frame | None:
        """The picture called `name`; None when it was taken away or changed since it was complete."""
        path, known = self._folder / name, self._known.get(name)
        if known is None or not known.taken or _version_of(path) != known.version:
            return None  # what was written again is found by the next look
        index, self._index = self._index, self._index + 1
        uri = uri_of("image", path)
        try:
            frame = Frame(read_image(path), index, time.time_ns(), uri)
        except FrameError as error:
            raise error.at(index, uri) from error.__cause__
        if self._delete:
            self._remove(path)
        return frame

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            cause = f"'{path}' can't be deleted ({error.strerror})"
            raise SourceError(cause, "Allow writing to the folder, or leave out delete=1") from error

    def _close(self) -> None:
        self._closed.set()


def _versions(folder: Path) -> list[tuple[str, _Version]]:
    """The pictures directly inside a folder, hidden files left out."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or Path(entry.name).suffix.lower() not in IMAGE_EXTENSIONS:
                continue
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                found.append((entry.name, _version(entry.stat())))
    return found


def _version_of(path: Path) -> _Version | None:
    try:
        return _version(path.stat())
    except OSError:
        return None


def _version(status: os.stat_result) -> _Version:
    return _Version(status.st_ino, status.st_size, status.st_mtime_ns)


def is_being_written(path: Path) -> bool:
    """Whether a program has the file open for writing, as far as the system tells: of our own files, on local disks.

    Linux refuses a read lease on such a file, see fcntl(2), F_SETLEASE.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # Whoever opens the file for writing in this very moment has us sent a signal. The usual one ends the process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
