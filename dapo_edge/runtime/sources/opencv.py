"""What sources that read with OpenCV share: its settings that belong to the whole process, held for one opening."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FFMPEG_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
LOOK_UP_S = 0.1


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
    """The variable that FFmpeg's options are read from, for one opening after the other.

    More at a time would gain nothing: inside OpenCV they wait for a lock of the whole process, where nothing can call
    them back. What is opened here must be known to answer. A camera that falls silent right then holds up the
    openings behind it, for as long as its own limit; frames of open sources come all the same.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()

    @contextmanager
    def __call__(self, options: str | None, check_wanted: Callable[[], None] = lambda: None) -> Iterator[None]:
        """`check_wanted` is called now and then while this waits, and before it goes on; what it raises ends it."""
        while not self._turn.acquire(timeout=LOOK_UP_S):
            check_wanted()
        try:
            check_wanted()
            before = os.environ.get(FFMPEG_OPTIONS)
            _set_variable(before if options is None else options)
            try:
                yield
            finally:
                _set_variable(before)
        finally:
            self._turn.release()


def _set_variable(text: str | None) -> None:
    if text is None:
        os.environ.pop(FFMPEG_OPTIONS, None)
    else:
        os.environ[FFMPEG_OPTIONS] = text


quiet = _QuietLog()
ffmpeg_options = _FfmpegOptions()  # called with None: whatever the user's environment says
