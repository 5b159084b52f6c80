"""Where lines of text go: a file that never fills the disk, or stdout, whose reader may go away."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from dapo_edge.errors import OutputError
from dapo_edge.terminal import ReaderGone, check_stdout, print_text

MAX_MB = 100.0
KEEP = 9
STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")


class Lines(Protocol):
    """Takes one line after the other."""

    def open(self) -> None:
        """Get ready. Raises `OutputError`."""
        ...

    def append(self, line: str) -> None:
        """Write one line, without its line end, so that whoever reads sees it whole or not at all."""
        ...

    def close(self) -> None:
        """Write no more."""
        ...


class LineFile:
    """Appends to a file, one write per line.

    A file that would grow beyond `max_mb` (millions of bytes) becomes `<name>.1`, what was `<name>.1` becomes
    `<name>.2`, and so on; of these, `keep` stay. A line that a kill or a full disk cut off is ended, so that the next
    one stands alone. When somebody moves or removes the file, a new one is begun.
    """

    def __init__(self, path: Path, *, max_mb: float = MAX_MB, keep: int = KEEP) -> None:
        self.path = path
        self._max_bytes = int(max_mb * 1e6)
        self._keep = keep
        self._file: io.FileIO | None = None

    def open(self) -> None:
        """Make the folder and the file. Raises `OutputError`."""
        try:
            if str(self.path).startswith(STREAMS):  # where stdout goes into a file, its rotation would move the name
                raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._reopen()
        except (OSError, ValueError) as error:
            self.close()
            if getattr(error, "errno", None) in (errno.ESPIPE, errno.ENXIO):
                remedy = "Name a file; for lines to stdout, leave the path out"
                raise OutputError(f"'{self.path}' is a stream, which is no file to append to", remedy) from error
            raise OutputError.refused(self.path, error) from error

    def append(self, line: str) -> None:
        """Write one line. Raises `OutputError`; the file then is as it was before."""
        data = line.encode(errors="backslashreplace") + b"\n"
        try:
            file = self._current()
            size = os.fstat(file.fileno()).st_size
            if size and size + len(data) > self._max_bytes:
                file, size = self._rotated(), 0
            if file.write(data) < len(data):  # the disk is full
                os.ftruncate(file.fileno(), size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OutputError.refused(self.path, error) from error

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _current(self) -> io.FileIO:
        """The open file, which is still the one of this name."""
        file = self._file
        if file is not None:
            try:
                if os.path.samestat(self.path.stat(), os.fstat(file.fileno())):
                    return file
            except FileNotFoundError:
                pass
        return self._reopen()

    def _reopen(self) -> io.FileIO:
        self.close()
        file = self.path.open("ab+", buffering=0)  # unbuffered, so that a write says how much it took
        self._file = file
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        return file

    def _rotated(self) -> io.FileIO:
        """A new, empty file; the one so far is the first of those that are kept."""
        kept = [self.path, *(self.path.with_name(f"{self.path.name}.{number}") for number in range(1, self._keep + 1))]
        for newer, older in zip(kept[-2::-1], kept[:0:-1], strict=True):
            if newer.exists():
                newer.replace(older)
        if self._keep == 0:
            self.path.unlink()
        return self._reopen()


class Stdout:
    """Lines to stdout. The first failure is kept in `broken` and told to `on_broken`; no line is tried after it.

    That the reader goes away is his good right (`| head`): what comes after it is let go without an error.
    """

    def __init__(self, on_broken: Callable[[], object] = lambda: None) -> None:
        self.on_broken = on_broken
        self.broken: OutputError | ReaderGone | None = None

    def open(self) -> None:
        """Raises `OutputError` when stdout is closed; whether anybody reads shows with the first line."""
        check_stdout()

    def append(self, line: str) -> None:
        """Write one line. Raises `OutputError` for it and all after it when stdout can't be written."""
        if self.broken is None:
            try:
                print_text(line)
                return
            except (OutputError, ReaderGone) as error:
                self.broken = error
                self.on_broken()
        if isinstance(self.broken, OutputError):
            raise self.broken

    def close(self) -> None:
        """Stdout stays open."""
