"""A build that takes minutes in C++: told about while it runs, and stopped by Ctrl-C. Knows TensorRT's log only."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from dapo_edge.backends.trt_report import TrtLog

POLL_S = 0.1

# (phase, done, total); total 0 means unknown: then `done` counts the seconds since the start.
OnProgress = Callable[[str, int, int], None]

T = TypeVar("T")

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """The build stopped because whoever waits for it was interrupted."""


class Progress:
    """What a build is at. Filled by TensorRT's threads, read by the thread that waits."""

    def __init__(self, trt_log: TrtLog) -> None:
        self.cancelled = threading.Event()
        self.monitored = False  # TensorRT reports its steps, and can be cancelled at each
        self._log = trt_log
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[int, int]] = {}  # unfinished ones: steps done, steps in all

    def start(self, phase: str, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[phase] = (0, steps)

    def step(self, phase: str, step: int) -> bool:
        """Step `step`, counted from 0, is done. Returns whether the build may go on."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase] = (step + 1, self._phases[phase][1])
        return not self.cancelled.is_set()

    def finish(self, phase: str) -> None:
        """A phase ends, with or without all its steps."""
        with self._lock:
            self._phases.pop(phase, None)

    def current(self) -> tuple[str, int, int]:
        """The longest unfinished phase: short ones come and go too fast to be read. See `OnProgress`."""
        with self._lock:
            if self._phases:
                phase, (done, steps) = max(self._phases.items(), key=lambda item: item[1][1])
                return phase, done, steps
        return self._log.phase, int(time.monotonic() - self._started), 0

    def stop_if_cancelled(self) -> None:
        """Raise `Cancelled` after an interruption."""
        if self.cancelled.is_set():
            raise Cancelled


def in_thread(work: Callable[[], T], progress: Progress, on_progress: OnProgress | None) -> T:
    """Do `work` in a thread of its own, because a C++ call on the main thread would keep Ctrl-C waiting.

    `on_progress` is called on the calling thread. What interrupts it (Ctrl-C, or an error of `on_progress`) cancels the
    work and is raised when the work has ended; a second Ctrl-C is raised at once.
    """
    results: list[T] = []
    failures: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    # A daemon, so that a second Ctrl-C ends the process.
    threading.Thread(target=run, name="tensorrt-build", daemon=True).start()
    interrupted = _wait(ended, progress, on_progress)
    if interrupted is not None:
        raise interrupted
    if failures:
        raise failures[0]
    return results[0]


def _wait(ended: threading.Event, progress: Progress, on_progress: OnProgress | None) -> BaseException | None:
    # Not Thread.join: up to Python 3.12, an interrupted join takes the thread for stopped while it still runs.
    interrupted: BaseException | None = None
    reported: tuple[str, int, int] | None = None
    while True:
        try:
            while not ended.wait(POLL_S):
                phase, done, total = progress.current()
                news = (phase if total else "", done, total)  # log lines come too fast: the seconds set the pace
                if on_progress is not None and interrupted is None and news != reported:
                    reported = news
                    on_progress(phase, done, total)
            return interrupted
        except BaseException as error:
            if interrupted is not None:
                raise
            interrupted = error
            progress.cancelled.set()
            if not progress.monitored:
                log.warning("this TensorRT can't cancel a build: stopping when it is done, or at the next Ctrl-C")
