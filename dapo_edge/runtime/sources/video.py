"""Frames of a video file, decoded by OpenCV.

A damaged stretch gives one `FrameError` per lost frame, so that indices and times stay right after it. A file that ends
well before the length in its header gives one `SourceError` at the break: the rest is missing, which is not the end.
FFmpeg's own remarks on stderr stay, because its level can only be set for the whole process, which the command line
does: OPENCV_FFMPEG_LOGLEVEL=-8.
"""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import FrameError, SourceError
from dapo_edge.extras import require
from dapo_edge.runtime.buffers import BufferPool
from dapo_edge.runtime.sources.base import Properties, Source
from dapo_edge.runtime.sources.opencv import ffmpeg_options, quiet
from dapo_edge.runtime.sources.uri import check_path, is_text, options, path_of, uri_of
from dapo_edge.structures import MAX_PIXELS, MIN_SIDE_PX, Frame

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
LOOKAHEAD = 100  # frames that may be lost in a row before the rest counts as missing
FALLBACK_FPS = 25.0  # for timestamps of a file that tells neither positions nor a rate


def missing_is_normal(length: int) -> int:
    """Frames by which a file may fall short: many containers only announce duration times frame rate."""
    return max(5, length // 50)


class VideoSource(Source):
    """`file:///path/video.mp4`. Timestamps are the moment of opening plus the frame's position in the file."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._capture: Any = None
        self._lock = threading.Lock()  # OpenCV crashes when a capture is released while another thread reads
        self._pool = BufferPool()
        self._shape: tuple[int, ...] = ()  # of the picture before
        self._start_ns = 0
        self._index = 0
        self._lost = 0  # frames to report as failed before `_after_gap`
        self._after_gap: NDArray[np.uint8] | None = None

    def _parse(self) -> Path:
        options(self.uri, self._address.query, {})
        return path_of(self._address.body)

    def _open(self) -> Properties:
        path = self._parse()
        check_path(path, "video")
        if not path.is_file():
            raise SourceError(f"'{path}' is not a video file", f"A folder of images is opened as {uri_of('dir', path)}")
        if not os.access(path, os.R_OK):
            raise SourceError(f"the video '{path}' can't be read (Permission denied)", "Check its permissions")
        if path.stat().st_size == 0:
            raise SourceError(f"the video '{path}' is empty (0 bytes)", "Write the file again")
        if not is_text(path):
            raise SourceError(f"the name of the video {str(path)!a} is not text in UTF-8", "Rename it")
        cv2 = require("cv2")
        with quiet(cv2), ffmpeg_options(None):
            self._capture = cv2.VideoCapture(str(path.absolute()))
        if not self._capture.isOpened():
            cause = f"the video '{path}' can't be opened: it is damaged, cut off, or of a kind this OpenCV can't decode"
            raise SourceError(cause, "Try to play it with another program; H.264 in .mp4 and MJPG in .avi work")
        self._start_ns, self._index, self._lost, self._after_gap = time.time_ns(), 0, 0, None
        self._shape = ()
        return self._announced(cv2)

    def _announced(self, cv2: Any) -> Properties:
        """What the file's header says."""
        width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if min(width, height) < MIN_SIDE_PX or width * height > MAX_PIXELS:
            cause = f"the video '{self.uri}' is {width}x{height}"
            raise SourceError(cause, f"Use at least {MIN_SIDE_PX} pixels on each side and at most {MAX_PIXELS} in all")
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        length = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return Properties(
            uri=self.uri,
            width=width,
            height=height,
            fps=fps if math.isfinite(fps) and fps > 0 else None,
            length=length if length > 0 else None,
        )

    def _read(self, timeout_s: float | None) -> Frame | None:
        with self._lock:
            return None if self._capture is None else self._read_open()

    def _read_open(self) -> Frame | None:
        if self._lost:
            return self._fail_one()
        image, self._after_gap = self._after_gap, None
        if image is None:
            image = self._decoded()
            if image is None:
                return self._gap()
        index, self._index = self._index, self._index + 1
        return Frame(image, index, self._start_ns + self._position_ns(index), self.uri)

    def _gap(self) -> Frame | None:
        """Find out whether a failed read is the end, a damaged stretch, or the file's breaking off."""
        length = self.properties.length
        if length is None or self._index >= length:
            return None
        for lost in range(1, LOOKAHEAD + 1):
            image = self._decoded()
            if image is not None:
                self._lost, self._after_gap = lost, image
                return self._fail_one()
        if length - self._index <= missing_is_normal(length):
            return None
        cause = f"the video '{self.uri}' breaks off after {self._index} of {length} frames"
        raise SourceError(cause, "The frames up to there are fine; record or copy the file again for the rest")

    def _decoded(self) -> NDArray[np.uint8] | None:
        """The next picture, [H, W, 3] BGR, if there is one."""
        done, image = self._capture.read(self._pool.take(self._shape) if self._shape else None)
        if not done:
            return None
        self._shape = image.shape
        return image

    def _fail_one(self) -> Frame | None:
        index, self._index, self._lost = self._index, self._index + 1, self._lost - 1
        error = FrameError(f"frame {index} of the video '{self.uri}' is damaged", "Record or copy the file again")
        raise error.at(index, self.uri)

    def _position_ns(self, index: int) -> int:
        """The time of the frame just decoded within the file, in nanoseconds."""
        position_ms = float(self._capture.get(require("cv2").CAP_PROP_POS_MSEC))
        if math.isfinite(position_ms) and (position_ms > 0 or index == 0):
            return max(0, int(position_ms * 1e6))
        return int(index * 1e9 / (self.properties.fps or FALLBACK_FPS))

    def _close(self) -> None:
        with self._lock:
            if self._capture is not None:
                self._capture.release()
                self._capture = None
