"""Pictures from files: a single image, or all images of a folder in natural order."""

from __future__ import annotations

import re
import time
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from dapo_edge.data.pictures import IMAGE_EXTENSIONS, read_image
from dapo_edge.errors import FrameError, SourceError
from dapo_edge.runtime.sources.base import Properties, Source
from dapo_edge.runtime.sources.uri import SWITCH, Option, check_path, options, path_of, uri_of
from dapo_edge.structures import Frame


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorting key that puts `part2` before `part10`."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


class StillSource(Source):
    """Image files, read one after the other. A frame's `source` is the URI of its own file, which opens it again."""

    known_options: ClassVar[dict[str, Option]] = {}

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._paths: list[Path] = []
        self._next = 0

    def _parse(self) -> Path:
        options(self.uri, self._address.query, self.known_options)
        return path_of(self._address.body)

    def _open(self) -> Properties:
        self._paths = self._find(self._parse())
        self._next = 0
        return Properties(uri=self.uri, length=len(self._paths))

    @abstractmethod
    def _find(self, path: Path) -> list[Path]:
        """The files to read, in order."""

    def _read(self, timeout_s: float | None) -> Frame | None:
        if self._next >= len(self._paths):
            return None
        index, self._next = self._next, self._next + 1
        path = self._paths[index]
        uri = uri_of("image", path)
        try:
            return Frame(read_image(path), index, time.time_ns(), uri)
        except FrameError as error:
            raise error.at(index, uri) from error.__cause__

    def _close(self) -> None:
        self._paths = []


class ImageSource(StillSource):
    """`image:///path/picture.png`: one frame."""

    def _find(self, path: Path) -> list[Path]:
        check_path(path, "image")
        if path.is_dir():
            raise SourceError(f"'{path}' is a folder, not an image", f"Open it as {uri_of('dir', path)}")
        return [path]


class FolderSource(StillSource):
    """`dir:///path`: the images directly inside a folder, as they are when it is opened. Hidden files are left out."""

    known_options: ClassVar[dict[str, Option]] = {"watch": SWITCH}  # 1 is another class: `WatchedFolder`

    def _find(self, path: Path) -> list[Path]:
        return images_in(path)


def images_in(path: Path) -> list[Path]:
    """The images directly inside a folder, in natural order. Raises `SourceError` when there is none."""
    check_path(path, "folder")
    try:
        names = [entry.name for entry in path.iterdir()]
    except NotADirectoryError as error:
        raise SourceError(f"'{path}' is a file, not a folder", f"Open it as {uri_of('image', path)}") from error
    except OSError as error:
        cause = f"the folder '{path}' can't be read ({error.strerror})"
        raise SourceError(cause, "Check its permissions") from error
    images = [n for n in names if Path(n).suffix.lower() in IMAGE_EXTENSIONS and not n.startswith(".")]
    if not images:
        cause = f"the folder '{path}' holds no image" + (f" among its {len(names)} entries" if names else "")
        raise SourceError(cause, f"Put images directly into it; known extensions: {' '.join(IMAGE_EXTENSIONS)}")
    return [path / name for name in sorted(images, key=natural_key)]
