"""What sources that read with OpenCV share: its settings that belong to the whole process, held for one opening."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FFMPEG_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"


class _QuietLog:
    """OpenCV's log level, silent while anybody opens something: the exception says it better."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._level: Any = None

    @contextmanager
    def __call__(self, cv2: Any) -> Iterator[None]:
        logging = cv2.utils.logging
        with self._lock:
            if not self._users:
                self._level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    logging.setLogLevel(self._level)


class _FfmpegOptions:
    """The variable that FFmpeg's options are read from, while a capture opens.

    Openings with equal options go side by side, so that a camera which does not answer delays no other one; different
    ones take turns.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()  # whoever wants to open something, first come, first served
        self._users = 0
        self._options: str | None = None
        self._before: str | None = None

    @contextmanager
    def __call__(self, options: str | None) -> Iterator[None]:
        self._enter(options)
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if not self._users:
                    _set_variable(self._before)
                self._changed.notify_all()

    def _enter(self, options: str | None) -> None:
        turn = object()
        with self._changed:
            self._queue.append(turn)
            try:
                self._changed.wait_for(lambda: self._queue[0] is turn and (not self._users or self._options == options))
            finally:
                self._queue.remove(turn)
                self._changed.notify_all()
            if not self._users:
                self._options, self._before = options, os.environ.get(FFMPEG_OPTIONS)
                if options is not None:
                    _set_variable(options)
            self._users += 1


def _set_variable(text: str | None) -> None:
    if text is None:
        os.environ.pop(FFMPEG_OPTIONS, None)
    else:
        os.environ[FFMPEG_OPTIONS] = text


quiet = _QuietLog()
ffmpeg_options = _FfmpegOptions()  # called with None: whatever the user's environment says
