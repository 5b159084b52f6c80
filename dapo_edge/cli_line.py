"""One run on the command line: what is opened, printed and closed around a `Pipeline`, and what signals do to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dapo_edge.cli_start import EXIT_INTERRUPTED
from dapo_edge.errors import OutputError, RecipeError, SourceError, sources_error
from dapo_edge.terminal import say

if TYPE_CHECKING:
    from dapo_edge.outputs.sinks import RunFacts
    from dapo_edge.runtime.inspector import Inspector
    from dapo_edge.runtime.pipeline import Pipeline
    from dapo_edge.runtime.run_config import RunConfig
    from dapo_edge.runtime.tiling import Views

ABORT_S = 1.0  # for what a second Ctrl-C leaves to do
OVERTIME_S = 0.7  # after the drain time, to close what can be closed; with the last words, 4.5 s by default
LAST_WORDS_S = 0.3
MANY_VIEWS = 64  # of one frame; above it, what they cost is said
REPORTER, LAST_WORDS = "statistics", "last words"
LINE_THREADS = ("camera ", "inspect ", "sink ", REPORTER, LAST_WORDS)  # how the names of a run's threads begin


class LineRun:
    """A run config, run once."""

    def __init__(self, config: RunConfig, stats_every_s: float | None = None) -> None:
        from dapo_edge.outputs.lines import Stdout

        self._config = config
        self._stats_every_s = stats_every_s
        self._stdout = Stdout(self._stop)
        self._sizes: dict[str, tuple[int | None, int | None]] = {}  # of frames, px, by the names of files
        self._prints_json = any(sink.kind == "jsonl" and sink.path is None for sink in config.sinks)
        self._pipeline: Pipeline | None = None
        self._inspector: Inspector | None = None
        self._received: list[int] = []  # signals
        self._alarms: list[threading.Timer] = []
        self._summary = threading.Lock()  # never given back: whoever has it prints the summary
        self._summarised = threading.Event()

    def run(self) -> None:
        """Until the sources end, or a signal. Raises what broke, after the summary."""
        with self._handling_signals(), contextlib.ExitStack() as stack:
            try:
                self._prepare(stack)
            except (Exception, KeyboardInterrupt):  # an interrupt in the middle of an import is an import error
                if not self._received:
                    raise
            else:
                self._inspect()
        if signal.SIGINT in self._received:
            raise KeyboardInterrupt
        if self._stdout.broken:
            raise self._stdout.broken
        failed, captured = self._count("failed"), self._count("captured")
        if failed and not self._received:
            raise SourceError(
                f"{failed} of {captured} frames could not be used",
                "See the lines with an error; all other frames were inspected",
            )

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        """Open everything but the cameras, which may take their time."""
        from dapo_edge.outputs.sinks import sink_plans
        from dapo_edge.runtime.inspector import Inspector
        from dapo_edge.runtime.pipeline import Pipeline

        config, facts = self._config, self._look_at_files()
        sinks = sink_plans(config.sinks, facts)
        with contextlib.ExitStack() as opened:
            for plan in sinks:  # the run opens them, too; but a wrong path shows before the engine is loaded
                plan.sink.open()
                opened.callback(plan.sink.close)
            inspector = stack.enter_context(
                Inspector(
                    config.package,
                    backend=config.backend,
                    precision=config.precision,
                    map_size=config.map_size,
                    throughput=len(config.sources) > 1,
                )
            )
            inspector.thresholds = config.thresholds.over(inspector.thresholds)
            window_s = config.batch_window_ms / 1e3
            pipeline = Pipeline(inspector, config.cameras, sinks, batch_window_s=window_s, drain_s=config.drain_s)
            opened.pop_all()
        self._say_notes(inspector)
        self._inspector, self._pipeline = inspector, pipeline

    def _look_at_files(self) -> RunFacts:
        """Open and close every source that is no camera. Raises `SourceError` for all that can't be read."""
        from dapo_edge.outputs.sinks import RunFacts
        from dapo_edge.runtime.sources import open_source

        files, rates, broken = set(), [], []
        for plan in self._config.sources:
            source = open_source(plan.uri)
            rate = None
            if not source.reconnects:
                files.add(plan.name)
                try:
                    with source:
                        rate = source.properties.fps
                        self._sizes[plan.name] = (source.properties.width, source.properties.height)
                except SourceError as error:
                    broken.append(error)
            rates.append(min(filter(None, (rate, plan.fps)), default=None))
        if broken:
            raise sources_error(broken)
        names = tuple(source.name for source in self._config.sources)
        return RunFacts(names, frozenset(files), rates[0], self._stdout)

    def _inspect(self) -> None:
        assert self._pipeline is not None
        with self._reporting():
            try:
                if not self._received:
                    self._pipeline.run()
            except OutputError:
                # A broken stdout says better what is wrong, and who interrupts a run has the summary.
                if not isinstance(self._stdout.broken, OutputError) and signal.SIGINT not in self._received:
                    raise
            except BaseException:
                self._say_last_words(ABORT_S)  # the error must be told, whether anybody reads stdout or not
                raise
            finally:
                self._print_summary()

    def _count(self, name: str) -> int:
        return self._pipeline.as_json()[name] if self._pipeline else 0

    # What it prints.

    def _say_notes(self, inspector: Inspector) -> None:
        """What is to be known about regions and tiles before the first frame."""
        for camera in self._config.cameras:
            if camera.views is None:
                continue
            if camera.views.warning:
                say(f"note: {camera.name}: {camera.views.warning}")
            count = _views_per_frame(inspector, camera.views, self._sizes.get(camera.name, (None, None)))
            if count > MANY_VIEWS:
                calls = -(-count // inspector.max_batch)
                say(f"note: {camera.name}: {count} views per frame: about {calls} engine calls per frame")

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Print statistics now and then."""
        if self._stats_every_s is None:
            yield
            return
        ended = threading.Event()

        def report() -> None:
            while not ended.wait(self._stats_every_s):
                self._print_statistics("statistics", self._pipeline.as_json() if self._pipeline else {})

        reporter = threading.Thread(target=report, name=REPORTER, daemon=True)
        reporter.start()
        try:
            yield
        finally:
            ended.set()
            reporter.join(LAST_WORDS_S)  # it may be held up by whoever reads stdout

    def _print_summary(self) -> None:
        if not self._pipeline or not self._summary.acquire(blocking=False):
            return
        self._print_statistics("summary", self._final_statistics())
        self._summarised.set()

    def _final_statistics(self) -> dict[str, Any]:
        assert self._pipeline is not None and self._inspector is not None
        backend = self._inspector.backend
        engine = {"backend": backend.name, "precision": backend.precision, "device": backend.device}
        return {**self._pipeline.as_json(), **engine}

    def _print_statistics(self, title: str, statistics: Mapping[str, Any]) -> None:
        if not self._prints_json:
            _say_statistics(statistics)
        elif self._stdout.broken is None:
            with contextlib.suppress(OutputError):  # kept as `broken`
                self._stdout.append(json.dumps({title: statistics}, ensure_ascii=False))

    # What signals do.

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C stop the run, the second one at once, the third one without a word."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals: whoever owns it decides
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for alarm in self._alarms:
                alarm.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self._received.append(number)
        code = EXIT_INTERRUPTED if signal.SIGINT in self._received else 0
        interrupts = self._received.count(signal.SIGINT) if number == signal.SIGINT else 1
        if interrupts > 2:
            os._exit(code)
        elif interrupts == 2:
            if self._pipeline:
                self._pipeline.abort()
            self._exit_after(ABORT_S, code)
        else:
            self._exit_after(self._config.drain_s + OVERTIME_S, code)
            if self._pipeline is None:
                raise KeyboardInterrupt  # nothing is captured yet
            self._stop()

    def _stop(self) -> None:
        if self._pipeline:
            self._pipeline.stop()

    def _exit_after(self, seconds: float, code: int) -> None:
        """Exit then at the latest, whatever hangs."""
        alarm = threading.Timer(seconds, self._exit_now, (code,))
        alarm.daemon = True
        alarm.start()
        self._alarms.append(alarm)

    def _exit_now(self, code: int) -> None:
        self._say_last_words(LAST_WORDS_S)
        os._exit(code or self._code_of_sinks())

    def _say_last_words(self, seconds: float) -> None:
        """The summary: in half of the time to where it belongs, else to stderr, so that it is somewhere."""
        if not self._pipeline:
            return
        # In threads of their own: whoever reads stdout, or even stderr, may be what hangs.
        threading.Thread(target=self._print_summary, name=LAST_WORDS, daemon=True).start()
        if not self._summarised.wait(seconds / 2) and self._prints_json:
            statistics = self._final_statistics()
            last_words = threading.Thread(target=_say_statistics, args=(statistics,), name=LAST_WORDS, daemon=True)
            last_words.start()
            last_words.join(seconds / 2)

    def _code_of_sinks(self) -> int:
        """As `run` would have it: a stopped run still says that results were not written."""
        if not self._pipeline or signal.SIGINT in self._received:
            return 0
        broken = isinstance(self._stdout.broken, OutputError)
        failed = broken or any("error" in sink for sink in self._pipeline.as_json()["sinks"])
        return OutputError.exit_code if failed else 0


def _views_per_frame(inspector: Inspector, views: Views, size: tuple[int | None, int | None]) -> int:
    """As far as is known before the first frame: tiles can only be counted where the frame's size is known."""
    width, height = size
    if width is None or height is None:
        return len(views.regions)
    try:
        return len(inspector.plan(views, (width, height)).boxes)
    except RecipeError:
        return 0  # every frame will say so


def _say_statistics(statistics: Mapping[str, Any]) -> None:
    from dapo_edge.outputs.events import statistics_text

    say("\n".join(statistics_text(statistics)))


def leave(code: int, threads_before: Sequence[threading.Thread]) -> None:
    """Exit with `code`; at once if a camera or sink still hangs in a foreign library.

    Python's orderly exit would end its thread in the middle of that library, which may crash it.
    """
    hanging = [
        thread
        for thread in set(threading.enumerate()) - set(threads_before)
        if thread.daemon and thread.name.startswith(LINE_THREADS)
    ]
    if hanging:
        flusher = threading.Thread(target=_flush, daemon=True)
        flusher.start()
        flusher.join(LAST_WORDS_S)  # one of those that hang may hold stdout
        os._exit(code)
    sys.exit(code)


def _flush() -> None:
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
