"""Where the results of a run go.

A new kind is a section with its options, a class that is made from them and has the methods of `Sink`, and one line in
each of `SINKS` and `SinkOptions`. A run gives every sink a thread and a queue of its own: it may take its time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dapo_edge.outputs.events import camera_json, camera_text, frame_json, frame_text
from dapo_edge.outputs.lines import KEEP, MAX_MB, LineFile, Lines, Stdout
from dapo_edge.outputs.recorder import Recorder, stem_of
from dapo_edge.outputs.segments import Segments
from dapo_edge.outputs.shelf import Shelf
from dapo_edge.runtime.outcome import CameraEvent, Outcome, Sink
from dapo_edge.runtime.plan import Policy, SinkPlan
from dapo_edge.sections import Section
from dapo_edge.structures import Verdict
from dapo_edge.terminal import say

VERDICTS: tuple[Verdict, ...] = ("ng", "unsure", "ok")
FALLBACK_FPS = 25.0
SEGMENT_S = 60.0
NAME = r"^[A-Za-z0-9_]([A-Za-z0-9_. -]*[A-Za-z0-9_.-])?$"  # of cameras and sinks; becomes a part of file names
MAX_NAME = 64


@dataclass(frozen=True)
class RunFacts:
    """What a sink may want to know of the run that it works for."""

    sources: tuple[str, ...] = ()  # their names
    files: frozenset[str] = frozenset()  # those of them that are no cameras
    fps: float | None = None  # of the first source, where it is known
    stdout: Stdout = field(default_factory=Stdout)

    @property
    def several(self) -> bool:
        """Whether results must say which source they are of."""
        return len(self.sources) > 1

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

    draws = False

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

    draws = False

    def __init__(self, options: TextLinesOptions, run: RunFacts) -> None:
        self.name = options.name or options.kind
        self._run = run

    def open(self) -> None:
        """Nothing to do."""

    def write(self, outcome: Outcome) -> None:
        """One line for one frame."""
        is_known = self._run.several or outcome.camera not in self._run.files
        say(frame_text(outcome, by_name=bool(outcome.camera) and is_known))

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
    queue: int = Field(8, ge=1, le=100_000, description="results that may wait for it, each with its frame")
    only: tuple[Verdict, ...] = Field(VERDICTS, min_length=1, description="verdicts whose frames are kept")
    fps: float | None = Field(None, gt=0, le=1000, description="of a video; null = the first source's, or 25")
    segment_s: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description="a video is completed, and another one begun, after so many seconds; "
        "null = 60 where a camera is the source, and one video where a file is",
    )
    max_mb: float = Field(
        10_000, gt=0, description="when pictures or segments of cameras take more megabytes, the oldest are removed"
    )
    keep: int | None = Field(
        None,
        ge=1,
        description="when cameras have more pictures or segments, the oldest are removed; null = any number",
    )


class Pictures:
    """Overlays of the frames that got one of certain verdicts: a folder of pictures, or a video of each source.

    What comes from a camera has its moment in its name, so that no restart replaces it, and the oldest make room:
    `camera1-20261121T152403.123Z-000007.png`. What comes from a file is named after it, and the same run again gives
    the same files: `belt-000007.png`, or `camera1-belt-000007.png` where there are several sources. Of these, a
    `line.mp4` that was asked for becomes `line-camera1.mp4`, and a `part.png` `part-camera1-000007.png`.
    """

    draws = True

    def __init__(self, options: PicturesOptions, run: RunFacts) -> None:
        """Raises `OutputError` for a path that can be no picture and no video."""
        self.name = options.name or options.kind
        self._options, self._run = options, run
        self._only = frozenset(options.only)
        self._shared = Recorder(options.path, fps=self._fps)  # of pictures; a video is one source's
        self._shelf = Shelf(
            self._shared.folder, self._shared.stem, self._shared.extension, max_mb=options.max_mb, keep=options.keep
        )
        is_video = options.path.suffix.lower() == ".mp4"
        self._videos = {source: self._video(source) for source in run.sources} if is_video else {}

    def open(self) -> None:
        """Make the folder and try to write there. Raises `OutputError`."""
        for recorder in self._recorders:
            recorder.open()
        self._shelf.open()

    def write(self, outcome: Outcome) -> None:
        """Keep the overlay of a frame whose verdict is asked for. Raises `OutputError`."""
        from dapo_edge.outputs.overlay import draw

        frame, inspection, camera = outcome.frame, outcome.inspection, outcome.camera
        if frame is None or inspection is None or inspection.verdict not in self._only:
            return
        picture = draw(frame, inspection)
        if camera in self._videos:
            self._videos[camera].write(picture, frame)
        elif camera in self._run.files:
            self._shared.write(picture, frame, stem=self._stem(camera, stem_of(frame.source)))
        else:  # cameras may have equal addresses but for the host
            self._shelf.add(self._shared.write(picture, frame, stem=self._stem(camera, camera), timed=True))

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

    def _stem(self, camera: str, own: str) -> str:
        """How the name of a picture begins, which calls itself `own` where no name was given for all."""
        parts = (self._shared.stem, camera if self._run.several else None, None if self._shared.stem else own)
        return "-".join(dict.fromkeys(filter(None, parts)))

    @property
    def _fps(self) -> float:
        return self._options.fps or self._run.fps or FALLBACK_FPS

    @property
    def _recorders(self) -> list[Recorder | Segments]:
        return list(self._videos.values()) or [self._shared]

    def _video(self, source: str) -> Recorder | Segments:
        path, seconds = self._options.path, self._options.segment_s
        if self._run.several:
            path = path.with_name(f"{path.stem}-{source}{path.suffix}")
        if source in self._run.files and seconds is None:
            return Recorder(path, fps=self._fps)
        return Segments(path, self._shelf, fps=self._fps, seconds=seconds or SEGMENT_S)


SINKS: dict[str, Callable[[Any, RunFacts], Sink]] = {"jsonl": JsonLines, "lines": TextLines, "pictures": Pictures}
SinkOptions = Annotated[JsonLinesOptions | TextLinesOptions | PicturesOptions, Field(discriminator="kind")]


def sink_plans(sinks: Sequence[SinkOptions], run: RunFacts) -> tuple[SinkPlan, ...]:
    """The sinks of a run config, as the pipeline takes them. Raises `OutputError`."""
    return tuple(SinkPlan(SINKS[options.kind](options, run), options.policy, options.queue) for options in sinks)
