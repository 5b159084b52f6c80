"""A video in pieces: a kill or a power cut costs the piece that is being written, and not the whole night."""

from __future__ import annotations

import time
from pathlib import Path

from dapo_edge.outputs.labels import Image
from dapo_edge.outputs.recorder import Recorder, remove_unfinished
from dapo_edge.outputs.shelf import Shelf, stamped, unused
from dapo_edge.structures import Frame


class Segments:
    """Videos one after the other, each complete under its name: `line-20261121T152403.123Z-000007.mp4` and so on.

    A segment is named after its first picture, and ended by the first one that comes `seconds` after it.
    """

    def __init__(self, path: Path, shelf: Shelf, *, fps: float, seconds: float) -> None:
        """`path` is `line.mp4`; the `shelf` is opened by whoever shares it out. Raises `OutputError` for no video."""
        self._first = Recorder(path, fps=fps)  # never written to: it knows what a path and a rate must be
        self._shelf = shelf
        self._fps, self._seconds = fps, seconds
        self._recorder: Recorder | None = None
        self._until_s = 0.0

    def open(self) -> Segments:
        """Make the folder and try to write there. Raises `OutputError`."""
        self._first.open()
        remove_unfinished(self._first.folder, f"{self._first.path.stem}-", "*")
        return self

    def write(self, image: Image, frame: Frame) -> Path:
        """Keep a picture, [H, W, 3] uint8 BGR. Returns where it will be. Raises `OutputError`."""
        if self._recorder is not None and time.monotonic() >= self._until_s:
            self.close()
        if self._recorder is None:
            first = self._first.path
            path = unused(first.with_name(f"{stamped(first.stem, frame)}.mp4"))
            self._recorder = Recorder(path, fps=self._fps)
            self._until_s = time.monotonic() + self._seconds
        return self._recorder.write(image)

    def close(self) -> None:
        """Complete the segment. Raises `OutputError`."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()
            self._shelf.add(recorder.path)
