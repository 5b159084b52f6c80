"""Where `dapo-edge` begins: signals are answered in words before anything is imported that takes time."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit with the documented code."""
    on_signals(_leave)
    from dapo_edge.cli import main as command_line

    command_line()


def is_run(arguments: Sequence[str]) -> bool:
    """Whether these arguments are those of `dapo-edge run`."""
    return list(arguments[:1]) == ["run"]


def on_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    """Let `handler` answer SIGTERM and Ctrl-C, but for what whoever started this program has it ignore."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing is begun yet that would have to be ended; and an exception might be swallowed by an import."""
    if number == signal.SIGTERM and is_run(sys.argv[1:]):
        os._exit(0)  # nothing was captured, so every captured frame has its result
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)
