"""Room for the newest pictures of a line that runs for years, under names that no later run uses again."""

from __future__ import annotations

import heapq
import os
import re
from collections import deque
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from dapo_edge.errors import OutputError
from dapo_edge.structures import Frame

LOOK_AHEAD = 1000  # names that are remembered; the folder is looked through again when they are used up

_File = tuple[str, str, int]  # time, name, bytes: sorted as they came


def stamped(stem: str, frame: Frame) -> str:
    """`belt-20261121T152403.123Z-000007`: a name with the moment (UTC) and the index of a frame; sorts by time."""
    seconds, ms = divmod(frame.timestamp_ns // 1_000_000, 1000)
    moment = datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y%m%dT%H%M%S")
    return f"{stem}-{moment}.{ms:03d}Z-{frame.index:06d}"


def unused(path: Path) -> Path:
    """`path`, or `<stem>-2<extension>` and so on: a clock may stand still, or be set back."""
    free, number = path, 2
    while free.exists():
        free, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return free


class Shelf:
    """The files of a folder that have `stamped` names: when there are too many, the oldest are removed.

    Whatever else lies in the folder is left alone and does not count. The newest file stays, however large it is.
    """

    def __init__(self, folder: Path, stem: str | None, extension: str, *, max_mb: float, keep: int | None) -> None:
        """Files called `<stem>-...<extension>`; None: whatever the stem. At most `keep`, and `max_mb` million bytes."""
        self._folder = folder
        self._pattern = re.compile(
            rf"{'.+' if stem is None else re.escape(stem) + '(?:-.+)?'}"
            rf"-(\d{{8}}T\d{{6}}\.\d{{3}}Z)-\d{{6,}}(?:-\d+)?{re.escape(extension)}"
        )
        self._max_bytes, self._keep = int(max_mb * 1e6), keep
        self._count = self._bytes = 0
        self._oldest: deque[_File] = deque()

    def open(self) -> None:
        """See what there is. Raises `OutputError`."""
        try:
            self._look()
        except OSError as error:
            raise OutputError.refused(self._folder, error) from error

    def add(self, path: Path) -> None:
        """Count a file that was written, and make room. Raises `OutputError`."""
        try:
            self._bytes += path.stat().st_size
            self._count += 1
            while self._count > 1 and self._is_full:
                self._remove_oldest()
        except FileNotFoundError:
            return  # somebody has it already
        except OSError as error:
            raise OutputError.refused(self._folder, error) from error

    @property
    def _is_full(self) -> bool:
        return self._bytes > self._max_bytes or (self._keep is not None and self._count > self._keep)

    def _remove_oldest(self) -> None:
        if not self._oldest:
            self._look()
            return
        _, name, size = self._oldest[0]
        (self._folder / name).unlink(missing_ok=True)
        self._oldest.popleft()
        self._count -= 1
        self._bytes -= size

    def _look(self) -> None:
        """Count all, but remember only the oldest: there may be a million."""
        self._count = self._bytes = 0
        self._oldest = deque(heapq.nsmallest(LOOK_AHEAD, self._counted()))

    def _counted(self) -> Iterator[_File]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                match = self._pattern.fullmatch(entry.name)
                if match is None or not entry.is_file(follow_symlinks=False):
                    continue
                try:
                    size = entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:  # somebody else tidies up, too
                    continue
                self._count += 1
                self._bytes += size
                yield match[1], entry.name, size
