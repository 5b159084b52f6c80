"""The terminal side of the command line: streams, signals, progress. Data goes to stdout, people's text to stderr."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from dapo_edge.errors import OutputError

PRECISION = click.Choice(["fp32", "fp16", "int8"])
PACKAGE_PATH = click.Path(path_type=Path, readable=False)  # opening it says better what is wrong
LAYOUT_NAMES = ("mvtec_ad", "visa", "mpdd", "mad", "real_iad", "folder", "csv")
map_size_option = click.option(
    "--map-size", help="model, frame, or WIDTHxHEIGHT; thresholds were made at the package's own size."
)
as_json = click.option("--json", "json_output", is_flag=True, help="Print JSON to stdout.")
FILE_COLUMNS = 200  # of a table that goes into a file


class ReaderGone(Exception):
    """Whoever read stdout has closed it."""


class FiniteFloat(click.FloatRange):
    """A number of an option in its range, and neither nan nor inf, which click takes for numbers."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        """The number, or click's usage error."""
        number = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, context)
        return number


class _ClosedStdout(io.TextIOBase):
    """The stdout of a program that was started without one."""

    def __init__(self) -> None:
        os.open(os.devnull, os.O_WRONLY)  # for good, so that no other file is opened under the number of stdout

    def write(self, text: str) -> int:
        raise OutputError("stdout is closed", "Start again without '>&-', or send stdout to a file or to /dev/null")


def check_stdout() -> None:
    """Raises `OutputError` when stdout is closed, before anything is done for it."""
    if isinstance(sys.stdout, _ClosedStdout):
        sys.stdout.write("")


def print_json(content: Any, indent: int | None = 2) -> None:
    """One JSON document to stdout."""
    print_text(json.dumps(content, indent=indent, ensure_ascii=False))


def print_rich(renderable: Any) -> None:
    """A table as text: as wide as the terminal, and not folded where there is none."""
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else FILE_COLUMNS
    page = io.StringIO()
    Console(file=page, width=width, force_terminal=is_terminal).print(renderable)
    print_text("\n".join(line.rstrip() for line in page.getvalue().splitlines()))


def print_text(text: str) -> None:
    """Lines to stdout. Raises `OutputError` when they can't be written, `ReaderGone` when nobody reads."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        # What stdout still holds can't be written; without this Python would try once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from error
        raise OutputError.refused("stdout", error) from error


def fail(text: str, arguments: Sequence[str]) -> None:
    """One line that says what went wrong, without the passwords that stood in the arguments."""
    from dapo_edge.runtime.sources.uri import redact, redact_message

    for argument in arguments:
        if "://" in argument:
            for form in (argument, str(Path(argument))):  # a URI taken for a path loses a slash
                text = text.replace(form, redact(argument))
    say(f"error: {redact_message(text)}")


def say(text: str) -> None:
    """A line for people."""
    with contextlib.suppress(OSError):  # a closed stderr must not stop the line
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class _Warnings(logging.Handler):
    """What the library logs, for people: one line on stderr, without passwords and without a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        from dapo_edge.runtime.sources.uri import redact_message

        try:
            text = " ".join(record.getMessage().split())
        except Exception:  # a wrong format in a log call must not stop the line
            self.handleError(record)
        else:
            say(f"{record.levelname.lower()}: {redact_message(text)}")


@contextlib.contextmanager
def warnings_to_stderr() -> Iterator[None]:
    """Say what dapo-edge logs at level WARNING and above."""
    log, handler = logging.getLogger("dapo_edge"), _Warnings(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def prepare_streams() -> None:
    """UTF-8 whatever the locale says, and names that are no text as escapes.

    A closed stderr swallows what it gets; a closed stdout refuses it by `OutputError`.
    """
    if sys.stdout is None:
        sys.stdout = _ClosedStdout()
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (stays open as long as the process)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def stop_on_signals(then: Callable[[], object]) -> Iterator[list[int]]:
    """Collect SIGTERM and the first Ctrl-C in a list, and call `then`; a second Ctrl-C stops at once."""
    received: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        again = signal.SIGINT in received
        received.append(number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        then()

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may handle signals: whoever owns it decides
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt() -> None:
    """For `stop_on_signals`, where the work in hand can't be finished."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar on a terminal; plain lines, one per step, where stderr is a file.

    It is called with a step in words, how much is done, and of how much (0: nobody knows). What follows ": " in the
    step is a detail that may change while the step lasts.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _one_line_per_step()
        return
    columns = (
        TextColumn("{task.description:28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def update(step: str, done: int, of: int) -> None:
            name = step.partition(": ")[0]
            if name not in tasks:
                for task in tasks.values():
                    bar.update(task, completed=bar.tasks[task].total)
                tasks[name] = bar.add_task(step, total=of or None)
            bar.update(tasks[name], description=step[:60], completed=done, total=of or None)

        yield update
        for task in tasks.values():
            bar.update(task, completed=bar.tasks[task].total)


@contextlib.contextmanager
def interruptible_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A `progress_bar` for work that SIGTERM and Ctrl-C break off: both always come out as `KeyboardInterrupt`."""
    with progress_bar() as progress, stop_on_signals(interrupt) as received:

        def step(name: str, done: int, of: int) -> None:
            if received:  # raised where foreign code swallowed it
                raise KeyboardInterrupt
            progress(name, done, of)

        try:
            yield step
        except Exception:
            if received:  # an interrupt in the middle of an import comes out as an import error
                raise KeyboardInterrupt from None
            raise


def _one_line_per_step() -> Callable[[str, int, int], None]:
    seen: list[str] = []

    def line(step: str, done: int, of: int) -> None:
        name = step.partition(": ")[0]
        if not seen or seen[-1] != name:
            seen.append(name)
            say(name)

    return line


def parse_map_size(text: str | None) -> Any:
    """What `--map-size` means, or None where it was not given. Raises `RecipeError`."""
    if text is None:
        return None
    from dapo_edge.kernels.map_spec import check_map_size

    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text.lower())
    size = (int(match[1]), int(match[2])) if match else text
    check_map_size(size)
    return size
