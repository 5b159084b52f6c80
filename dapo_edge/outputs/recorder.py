"""Keeps pictures: numbered files in a folder, or one MP4 video."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import unquote

from dapo_edge.errors import OutputError
from dapo_edge.extras import require
from dapo_edge.outputs.labels import Image
from dapo_edge.outputs.sheet import checked, letterbox
from dapo_edge.outputs.shelf import stamped, unused
from dapo_edge.structures import Frame

STILL_EXTENSIONS = (".png", ".jpg", ".jpeg")
OTHER_IMAGE_EXTENSIONS = (".bmp", ".gif", ".tif", ".tiff", ".webp")
OTHER_VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".webm")
MAX_FPS = 1000.0
MAX_STEM = 32  # letters; of up to 4 bytes each, they leave room in the 255 bytes that file systems allow
REMEMBERED_NAMES = 10_000  # a line runs for years: what is remembered must not grow with it
SPARE_BYTES = 1 << 20  # for a video's index, which is written last


class Recorder:
    """`with Recorder(path) as recorder: recorder.write(image)`.

    `results/` takes numbered PNG files, `results/part.png` (or .jpg) numbered files of that name and kind, and
    `results/line.mp4` a video at a constant `fps`. Folders are made. A file appears under its name when it is complete:
    an interrupted program leaves no half picture, and at most a hidden `.part` file.
    """

    def __init__(self, path: str | Path, *, fps: float = 25.0) -> None:
        self.path = Path(path)
        extension = self.path.suffix.lower()
        if extension in OTHER_VIDEO_EXTENSIONS:
            raise OutputError(f"videos of kind '{extension}' can't be written", "Use a path that ends in .mp4")
        if extension in OTHER_IMAGE_EXTENSIONS:
            raise OutputError(f"pictures of kind '{extension}' can't be written", "Use .png, .jpg, or a folder")
        if not 0 < fps <= MAX_FPS:
            raise OutputError(f"a video can't have {fps} frames per second", f"Use more than 0 and up to {MAX_FPS:g}")
        self.folder, self.extension = self.path.parent, extension
        self.stem: str | None = self.path.stem  # of the files' names; None: each frame has its own
        self._keeper: _Keeper
        self._is_video = extension == ".mp4"
        if extension == ".mp4":
            # OpenCV crashes on a name that is not text.
            if str(self.path) != str(self.path).encode(errors="replace").decode():
                raise OutputError(f"the name {str(self.path)!a} is not text in UTF-8", "Use another name")
            self._keeper = _Video(self.path, fps)
        else:
            if not names_pictures(self.path):
                self.folder, self.stem, self.extension = self.path, None, ".png"
            self._keeper = _Stills(self.folder, self.stem, self.extension)

    def open(self) -> Recorder:
        """Make the folder and try to write there, so that a wrong path shows before the first frame."""
        try:
            if self._is_video and self.path.is_dir():
                raise OutputError(f"'{self.path}' is a folder, not a video", "Use another name")
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            if self._is_video:
                remove_unfinished(self.folder, self.path.stem)
            return self
        except (OSError, ValueError) as error:
            raise OutputError.refused(self.folder, error) from error

    def write(self, image: Image, frame: Frame | None = None, *, stem: str = "", timed: bool = False) -> Path:
        """Keep a picture, [H, W, 3] uint8 BGR, named after the frame if one is given. Returns where it is or will be.

        The name of a single picture begins with `stem`, else with that of the path, else with the source's; with
        `timed` it holds the moment of the frame, too: `stamped` says how. In a video, pictures of another size than
        the first are fitted into it between dark bars.
        """
        return self._keeper.write(checked(image), frame, stem, timed)

    def close(self) -> None:
        """Complete the video; nothing for single pictures."""
        self._keeper.close()

    def __enter__(self) -> Recorder:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def names_pictures(path: Path) -> bool:
    """Whether `path` is the name of numbered pictures, `results/part.png`, and not the folder that takes them."""
    return path.suffix.lower() in STILL_EXTENSIONS and not path.is_dir()


def save_picture(path: Path, image: Image) -> Path:
    """Write one PNG or JPEG, [H, W, 3] uint8 BGR, by the path's extension: beside its place, then renamed."""
    done, data = require("cv2").imencode(path.suffix, image)
    if not done:
        raise OutputError(f"a picture can't be encoded as {path.suffix}", "Use a path that ends in .png")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise OutputError.refused(path, error) from error
    finally:
        part.unlink(missing_ok=True)
    return path


class _Keeper(Protocol):
    def write(self, image: Image, frame: Frame | None, stem: str, timed: bool) -> Path: ...

    def close(self) -> None: ...


class _Stills:
    """Numbered files, each written beside its place and then renamed."""

    def __init__(self, folder: Path, stem: str | None, extension: str) -> None:
        self._folder = folder
        self._stem = stem
        self._extension = extension
        self._count = 0
        self._names: OrderedDict[str, None] = OrderedDict()  # the latest, oldest first

    def write(self, image: Image, frame: Frame | None, stem: str, timed: bool) -> Path:
        stem = stem or self._stem or (stem_of(frame.source) if frame else "frame")
        if timed and frame is not None:
            path = unused(self._folder / (stamped(stem, frame) + self._extension))
        else:
            path = self._folder / self._name(stem, frame)
        return save_picture(path, image)

    def _name(self, stem: str, frame: Frame | None) -> str:
        """A name not yet used by this recorder: two sources may deliver frames of equal name and index."""
        name = f"{stem}-{self._count if frame is None else frame.index:06d}"
        self._count += 1
        unique, number = name, 2
        while unique in self._names:
            unique, number = f"{name}-{number}", number + 1
        self._names[unique] = None
        if len(self._names) > REMEMBERED_NAMES:
            self._names.popitem(last=False)
        return unique + self._extension

    def close(self) -> None:
        pass


class _Video:
    """One MP4 file of the size of its first picture."""

    def __init__(self, path: Path, fps: float) -> None:
        self._path = path
        self._part = path.with_name(f".{path.stem}.{os.getpid()}.part.mp4")
        self._fps = fps
        self._writer: Any = None
        self._size = (0, 0)  # width, height in pixels
        self._count = 0

    def write(self, image: Image, frame: Frame | None, stem: str, timed: bool) -> Path:
        cv2 = require("cv2")
        if self._writer is None:
            # The encoder drops the last row or column of an odd size.
            self._size = (image.shape[1] + image.shape[1] % 2, image.shape[0] + image.shape[0] % 2)
            code = cv2.VideoWriter_fourcc(*"mp4v")  # the one MPEG-4 encoder that every OpenCV build brings
            self._writer = cv2.VideoWriter(str(self._part), code, self._fps, self._size)
            if not self._writer.isOpened():
                cause = f"the video '{self._path}' of {self._size[0]}x{self._size[1]} can't be started"
                raise OutputError(cause, "Use a smaller picture, or write single pictures: a path without .mp4")
        # OpenCV says nothing when a write fails, so room is checked before, and frames are counted at the end.
        if shutil.disk_usage(self._path.parent).free < image.nbytes + SPARE_BYTES:
            raise OutputError(f"no room is left on the disk of '{self._path}'", "Free some space, then start again")
        self._writer.write(letterbox(image, *self._size))
        self._count += 1
        return self._path

    def close(self) -> None:
        if self._writer is None:
            return
        cv2 = require("cv2")
        self._writer.release()
        self._writer = None
        count, self._count = self._count, 0
        try:
            written = _frames_in(cv2, self._part)
            if written < count:
                cause = f"the video '{self._path}' holds {written} of {count} frames"
                raise OutputError(cause, "Check that its disk has room, then start again")
            if count:
                self._part.replace(self._path)
        except OSError as error:
            raise OutputError.refused(self._path, error) from error
        finally:
            self._part.unlink(missing_ok=True)


def remove_unfinished(folder: Path, stem: str, pattern: str = "") -> None:
    """Remove what recordings of the video `stem` left behind when they were killed; `pattern` may follow the stem."""
    for part in folder.glob(f".{glob.escape(stem)}{pattern}.*.part.mp4"):
        owner = part.name.split(".")[-3]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
            part.unlink(missing_ok=True)


def _frames_in(cv2: Any, path: Path) -> int:
    """Frames that the file's index lists; 0 when there is none."""
    capture = cv2.VideoCapture(str(path))
    try:
        return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))) if capture.isOpened() else 0
    finally:
        capture.release()


def stem_of(source: str) -> str:
    """The readable end of a source's address, as a part of a file name."""
    scheme, _, rest = source.partition("://")
    path = unquote(rest.partition("?")[0] or scheme).rstrip("/")
    name = Path(path).name
    if scheme in ("image", "file"):
        name = Path(name).stem
    return re.sub(r"[^\w.-]+", "_", name).strip("._-")[:MAX_STEM] or "frame"
