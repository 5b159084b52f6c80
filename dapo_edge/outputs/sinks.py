"""Where the results of a run go.

A new kind is a section with its options, a class that is made from them and has the methods of `Sink`, and one line in
each of `SINKS` and `SinkOptions`. A run gives every sink a thread and a queue of its own: it may take its time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dapo_edge.outputs.events import camera_json, camera_text, frame_json, frame_text
from dapo_edge.outputs.lines import KEEP, MAX_MB, LineFile, Lines, Stdout
from dapo_edge.outputs.recorder import Recorder
from dapo_edge.runtime.outcome import CameraEvent, Outcome, Sink
from dapo_edge.runtime.plan import Policy, SinkPlan
from dapo_edge.sections import Section
from dapo_edge.structures import Verdict
from dapo_edge.terminal import say

VERDICTS: tuple[Verdict, ...] = ("ng", "unsure", "ok")
FALLBACK_FPS = 25.0
NAME = r"^[A-Za-z0-9_][A-Za-z0-9_. -]*$"  # of cameras and sinks; becomes a part of file names
MAX_NAME = 64


@dataclass(frozen=True)
class RunFacts:
    """What a sink may want to know of the run that it works for."""

    sources: tuple[str, ...] = ()  # their names
    files: frozenset[str] = frozenset()  # those of them that are no cameras
    fps: float | None = None  # of the first source, where it is known
    stdout: Stdout = field(default_factory=Stdout)

    def is_news(self, event: CameraEvent) -> bool:
        """Whether a change of state is worth a line. That a file begins and ends is not; that it breaks off is."""
        return bool(event.reason) or event.camera not in self.files


class _Options(Section):
    name: str = Field(
        "",
        pattern=NAME,
        max_length=MAX_NAME,
        description="in statistics, unique; default: its kind, then kind2, kind3, ...",
    )
    queue: int = Field(256, ge=1, le=100_000, description="results that may wait for it")
    policy: Policy | None = Field(
        None,
        description="wait = the line waits for it; newest = its oldest waiting result makes room, and is counted as "
        "lost; null = wait where all sources wait for the engine, else newest",
    )


class JsonLinesOptions(_Options):
    """Results as JSON lines."""

    kind: Literal["jsonl"] = Field(description="results as JSON, one line each")
    path: Path | None = Field(None, description="file to append to; null = stdout")
    max_mb: float = Field(
        MAX_MB, gt=0, description="a file that would grow beyond so many megabytes becomes <path>.1, and is begun anew"
    )
    keep: int = Field(KEEP, ge=0, le=10_000, description="such files to keep: <path>.1, <path>.2, ...")


class JsonLines:
    """Results and cameras as JSON, one line each."""

    def __init__(self, options: JsonLinesOptions, run: RunFacts) -> None:
        self.name = options.name or options.kind
        self._run = run
        path = options.path
        self._lines: Lines = run.stdout if path is None else LineFile(path, max_mb=options.max_mb, keep=options.keep)

    def open(self) -> None:
        """Open the file. Raises `OutputError`."""
        self._lines.open()

    def write(self, outcome: Outcome) -> None:
        """One line for one frame. Raises `OutputError`."""
        self._append(frame_json(outcome))

    def note(self, event: CameraEvent) -> None:
        """One line for a camera's change of state. Raises `OutputError`."""
        if self._run.is_news(event):
            self._append(camera_json(event))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _append(self, content: dict[str, Any]) -> None:
        self._lines.append(json.dumps(content, ensure_ascii=False))


class TextLinesOptions(_Options):
    """Results as text for people."""

    kind: Literal["lines"] = Field(description="results as text on stderr")


class TextLines:
    """Results and cameras for people, one line each on stderr."""

    def __init__(self, options: TextLinesOptions, run: RunFacts) -> None:
        self.name = options.name or options.kind
        self._run = run

    def open(self) -> None:
        """Nothing to do."""

    def write(self, outcome: Outcome) -> None:
        """One line for one frame."""
        say(frame_text(outcome))

    def note(self, event: CameraEvent) -> None:
        """One line for a camera's change of state."""
        if self._run.is_news(event):
            say(camera_text(event))

    def close(self) -> None:
        """Stderr stays open."""


class PicturesOptions(_Options):
    """Frames with what was found drawn in."""

    kind: Literal["pictures"] = Field(description="frames with what was found drawn in")
    path: Path = Field(description="a folder for PNG, part.png or part.jpg for numbered files, or line.mp4")
    only: tuple[Verdict, ...] = Field(VERDICTS, min_length=1, description="verdicts whose frames are kept")
    fps: float | None = Field(None, gt=0, le=1000, description="of a video; null = the first source's, or 25")


class Pictures:
    """Overlays of the frames that got one of certain verdicts: a folder of pictures, or a video of each source.

    A video of a run's only source has the name that was given; of several, `line.mp4` becomes `line-camera1.mp4` and
    so on. Pictures of all sources share the folder: `camera1-000007.png`, and after its own name what was a file.
    """

    def __init__(self, options: PicturesOptions, run: RunFacts) -> None:
        """Raises `OutputError` for a path that can be no picture and no video."""
        self.name = options.name or options.kind
        self._only = frozenset(options.only)
        self._files = run.files
        path, fps = options.path, options.fps or run.fps or FALLBACK_FPS
        self._shared: Recorder | None = None
        self._own: dict[str, Recorder] = {}
        if path.suffix.lower() == ".mp4" and len(run.sources) > 1:
            self._own = {
                source: Recorder(path.with_name(f"{path.stem}-{source}{path.suffix}"), fps=fps)
                for source in run.sources
            }
        else:
            self._shared = Recorder(path, fps=fps)

    def open(self) -> None:
        """Make the folder and try to write there. Raises `OutputError`."""
        for recorder in self._recorders:
            recorder.open()

    def write(self, outcome: Outcome) -> None:
        """Keep the overlay of a frame whose verdict is asked for. Raises `OutputError`."""
        from dapo_edge.outputs.overlay import draw

        frame, inspection = outcome.frame, outcome.inspection
        if frame is None or inspection is None or inspection.verdict not in self._only:
            return
        recorder = self._shared or self._own[outcome.camera]
        picture = draw(frame, inspection)
        # A picture made of a file is named after it. Cameras may have equal addresses but for the host.
        recorder.write(picture, frame if outcome.camera in self._files else replace(frame, source=outcome.camera))

    def note(self, event: CameraEvent) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        """Complete the videos, each of them. Raises the first `OutputError` after all were tried."""
        errors = []
        for recorder in self._recorders:
            try:
                recorder.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    @property
    def _recorders(self) -> list[Recorder]:
        return [self._shared] if self._shared else list(self._own.values())


SINKS: dict[str, Callable[[Any, RunFacts], Sink]] = {"jsonl": JsonLines, "lines": TextLines, "pictures": Pictures}
SinkOptions = Annotated[JsonLinesOptions | TextLinesOptions | PicturesOptions, Field(discriminator="kind")]


def sink_plans(sinks: Sequence[SinkOptions], run: RunFacts) -> tuple[SinkPlan, ...]:
    """The sinks of a run config, as the pipeline takes them. Raises `OutputError`."""
    return tuple(SinkPlan(SINKS[options.kind](options, run), options.policy, options.queue) for options in sinks)
