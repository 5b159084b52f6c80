"""Folders that appear at their place complete or not at all: an engine package, a compiled target in it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from typing_extensions import Self

from dapo_edge.errors import OutputError


class FolderWriter:
    """Writes a folder beside its destination and moves it into place at the end, or leaves no trace."""

    work = "building"  # what is being done, for the name of the folder in which it is done

    def __init__(self, destination: Path) -> None:
        self.destination = destination

    def __enter__(self) -> Self:
        with self._writing(self.destination), contextlib.ExitStack() as undo:
            self._check()
            for folder in reversed([self.destination.parent, *self.destination.parent.parents]):
                if not folder.exists():
                    undo.callback(_remove_if_empty, folder)
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._mend_what_was_killed()
            # The lock lies beside the folder and lives as long as this process, in whatever container that runs.
            self._lock_path = self.destination.with_name(f"{self._prefix}{secrets.token_hex(4)}.lock")
            undo.callback(self._lock_path.unlink, missing_ok=True)
            self._lock = self._lock_path.open("w")
            undo.callback(self._lock.close)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.folder = self._lock_path.with_suffix("")
            self.folder.mkdir()
            undo.pop_all()  # from here on it is for __exit__
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()

    def write(self, name: str, data: bytes) -> None:
        """Add one file."""
        path = self.folder / name
        with self._writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def _writing(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """What turns a refusal to write to `path` into an `OutputError`."""
        return writing_to(path)

    def _check(self) -> None:
        """Refuse a destination that must not be replaced. Raises `OutputError`."""

    def _finish(self, name: str, data: bytes) -> None:
        """Write the last file, wait until everything is on the disk, and move the folder into place."""
        with self._writing(self.destination):
            (self.folder / name).write_bytes(data)
            for path in [*self._written(), self.folder]:
                _sync(path)
            self._move_into_place()

    def _written(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def _move_into_place(self) -> None:
        if not self.destination.exists():
            self.folder.rename(self.destination)
        elif not _exchange(self.folder, self.destination):
            previous = self.destination.with_name(f".{self.destination.name}.previous")
            self.destination.rename(previous)
            try:
                self.folder.rename(self.destination)
            except BaseException:
                previous.rename(self.destination)
                raise
            shutil.rmtree(previous, ignore_errors=True)
        with contextlib.suppress(OSError):  # a folder that may be written but not read: the new one is in place
            _sync(self.destination.parent)

    @property
    def _prefix(self) -> str:
        return f".{self.destination.name}.{self.work}-"

    @property
    def _locks(self) -> str:
        """Which locks beside the destination may be those of killed processes, as a glob."""
        return f"{glob.escape(self._prefix)}*.lock"

    def _mend_what_was_killed(self) -> None:
        """Put back a folder that was moved aside, and remove those that no process works on any more."""
        previous = self.destination.with_name(f".{self.destination.name}.previous")
        if previous.is_dir():
            if self.destination.exists():
                shutil.rmtree(previous, ignore_errors=True)
            else:
                previous.rename(self.destination)
        for path in self.destination.parent.glob(self._locks):
            with contextlib.suppress(OSError), path.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink()


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into an `OutputError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError.refused(path, error) from error


class NotAFile(OSError):
    """There is a folder, a pipe or a device where a file should be."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.EINVAL, "not a file", str(path))


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading: a pipe would wait for ever, a device might do anything. Raises `OSError`."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotAFile(path)
    # Not blocking, and looked at again: another process may have put something else there by now.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NotAFile(path)
    return file


def sha256_of(file: BinaryIO) -> str:
    """Of what is left to read of an open file, in small pieces: some hold gigabytes."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux renameat2), so that there is never a moment without one."""
    exchange, here = 2, -100
    function = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return function is not None and function(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _sync(path: Path) -> None:
    """Wait until the data is on the disk: a power cut after the rename must not leave empty files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
