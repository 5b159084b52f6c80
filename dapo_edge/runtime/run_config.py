"""The config of a run, `line.yaml`: which cameras, how their frames are treated, and where results go.

Options of the command line win over the environment (DAPO_EDGE_RUN__SOURCES__0__FPS=10), which wins over the file.
Every mistake is listed at once, with the keys that lead to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, model_validator

from dapo_edge.backends.base import BACKENDS
from dapo_edge.errors import RecipeError, SourceError, did_you_mean
from dapo_edge.kernels.map_spec import MapSize, check_map_size
from dapo_edge.outputs.sinks import MAX_NAME, NAME, SinkOptions
from dapo_edge.package import Precision, Threshold, Thresholds
from dapo_edge.runtime.plan import CameraPlan, Policy
from dapo_edge.runtime.regions import RegionOfInterest
from dapo_edge.runtime.run_checks import (
    MOST_ITEMS,
    misplaced_outputs,
    misplaced_package,
    named,
    repeated_names,
    with_paths,
)
from dapo_edge.runtime.run_layers import changed, escaped, from_environment, from_settings, substituted
from dapo_edge.runtime.sources import SOURCES, open_source, redact
from dapo_edge.runtime.sources.uri import split
from dapo_edge.runtime.tiling import Views
from dapo_edge.sections import Section, parse_section, read_yaml

SCHEMA_COMMAND = "dapo-edge run --schema"


def _checked(what: Any, check: Any) -> Any:
    """`what` after `check(what)`, whose `RecipeError` becomes a mistake of this key."""
    try:
        check(what)
    except RecipeError as error:
        raise ValueError(error.cause) from error
    return what


def _known_source(uri: str) -> str:
    address = split(uri)
    if address is not None and address.scheme not in SOURCES:
        known = ", ".join(f"{name}://" for name in SOURCES)
        raise ValueError(f"unknown kind. {did_you_mean(address.scheme, SOURCES)}Known: {known}, or a path")
    if address is not None and address.scheme != "file":  # whether a file is there shows when the run begins
        try:
            open_source(uri).check()
        except SourceError as error:
            raise ValueError(str(error).rstrip(".")) from error
    return uri


def _known_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend. {did_you_mean(name, BACKENDS)}Known: {', '.join(sorted(BACKENDS))}")
    return name


class Limits(Section):
    """Limits that replace the package's own: for a line where somebody found better ones."""

    image: float | None = Field(None, ge=0, le=1, description="of the image score; null = the package's")
    pixel: float | None = Field(None, ge=0, le=1, description="of the anomaly of a pixel; null = the package's")

    def over(self, own: Thresholds) -> Thresholds:
        """The package's own thresholds with these in their place. How often they reject good parts is not known."""
        given = {
            name: Threshold(value=value, false_reject_rate=1.0, confidence_95=(0.0, 1.0))
            for name, value in (("image", self.image), ("pixel", self.pixel))
            if value is not None
        }
        return own.model_copy(update={**given, "source": "run config"}) if given else own


class Region(Section):
    """A part of the frame that is looked at: a rectangle or a polygon."""

    name: str | None = Field(None, min_length=1, max_length=64, description="for messages and the preview")
    box: Annotated[tuple[int, int, int, int], AfterValidator(lambda b: _checked(b, RegionOfInterest.of))] | None = (
        Field(None, description="[x, y, width, height] in pixels of the frame")
    )
    polygon: (
        Annotated[tuple[tuple[int, int], ...], AfterValidator(lambda p: _checked(p, RegionOfInterest.of))] | None
    ) = Field(None, description="[[x, y], [x, y], [x, y], ...] in pixels of the frame; it may not cross itself")

    @model_validator(mode="after")
    def _one_shape(self) -> Region:
        if (self.box is None) == (self.polygon is None):
            raise ValueError("give either 'box' or 'polygon'")
        return self


class Tiles(Section):
    """Pieces of a frame, or of its regions, that the engine looks at one by one."""

    size: int | tuple[int, int] = Field(description="side, or [width, height], in pixels of the frame")
    overlap: int = Field(0, ge=0, description="of neighbours, in pixels of the frame; there, maps are blended")

    @model_validator(mode="after")
    def _possible(self) -> Tiles:
        return _checked(self, lambda tiles: Views((), tiles.sides, tiles.overlap))

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height in pixels of the frame."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class SourceOptions(Section):
    """A camera, video or folder, and what becomes of its frames."""

    name: str = Field(
        "",
        pattern=NAME,
        max_length=MAX_NAME,
        description="in results and statistics, unique; default: camera1, camera2, ...",
    )
    uri: Annotated[str, AfterValidator(_known_source)] = Field(
        min_length=1,
        description="an address such as rtsp://camera/stream, or a path; write passwords as ${NAME}",
    )
    policy: Policy | None = Field(
        None,
        description="wait = the source is held back until there is room; newest = the oldest waiting frame makes room, "
        "and is counted as dropped; null = newest where frames come at their own pace, else wait",
    )
    max_age_ms: float | None = Field(
        None, gt=0, description="a frame that waited longer than this is dropped as stale; null = none is"
    )
    fps: float | None = Field(None, gt=0, le=1000, description="at most so many frames per second; null = all")
    frames: int | None = Field(
        None, ge=1, description="end after so many were taken for inspection; null = at the source's own end"
    )
    queue: int = Field(4, ge=1, le=1000, description="frames that may wait for the engine")
    silence_s: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description="how long the source may give nothing before it is closed and opened again; "
        "null = two intervals between frames, and 2 s at least",
    )
    triggered: bool | None = Field(
        None,
        description="whether frames come when something happens on the line, so that silence is no fault; "
        "null = as the source says",
    )
    regions: tuple[Region, ...] = Field((), description="what is looked at; none = the whole frame")
    tiles: Tiles | None = Field(None, description="cut what is looked at into tiles; null = look at it at once")

    @property
    def views(self) -> Views | None:
        """Regions and tiles; None for the whole frame at once."""
        if not self.regions and self.tiles is None:
            return None
        regions = tuple(RegionOfInterest.of(region.box or region.polygon, region.name or "") for region in self.regions)
        return Views(regions, *((None, 0) if self.tiles is None else (self.tiles.sides, self.tiles.overlap)))


class RunConfig(Section):
    """A line: an engine package, the cameras that it watches, and where results go."""

    package: Path = Field(description="the engine package (.dapo)")
    backend: Annotated[str, AfterValidator(_known_backend)] = Field(
        "openvino", description="what runs the package: openvino, or tensorrt after dapo-edge compile"
    )
    precision: Precision | None = Field(None, description="fp32, fp16 or int8; null = the package's own")
    map_size: Annotated[MapSize, AfterValidator(lambda size: _checked(size, check_map_size))] | None = Field(
        None, description="model, frame, or [width, height]; null = the package's own"
    )
    batch_window_ms: float = Field(
        5.0, ge=0, le=1000, description="how long the first frame of a batch waits for those of other cameras"
    )
    drain_s: float = Field(
        3.5, gt=0, le=3600, description="when the run is stopped, how long captured frames may take to come out"
    )
    thresholds: Limits = Field(Limits(), description="limits that replace the package's own")
    sources: tuple[SourceOptions, ...] = Field(
        min_length=1, max_length=MOST_ITEMS, description="cameras, videos, folders"
    )
    sinks: tuple[SinkOptions, ...] = Field(
        (),
        max_length=MOST_ITEMS,
        description="where results go; without this key: text on stderr, or JSON on stdout with --json",
    )

    @property
    def cameras(self) -> tuple[CameraPlan, ...]:
        """The sources as the pipeline takes them."""
        return tuple(
            CameraPlan(
                name=source.name,
                uri=source.uri,
                policy=source.policy,
                max_age_s=None if source.max_age_ms is None else source.max_age_ms / 1e3,
                fps=source.fps,
                frames=source.frames,
                queue=source.queue,
                views=source.views,
                silence_s=source.silence_s,
                triggered=source.triggered,
            )
            for source in self.sources
        )

    def as_yaml(self) -> str:
        """The config as a file, without passwords; what holds none means the same when it is read again."""
        data = with_paths(self.model_dump(mode="json", exclude_none=True), Path.cwd())
        for source in data["sources"]:
            source["uri"] = redact(source["uri"])
        return yaml.safe_dump(escaped(data), sort_keys=False, allow_unicode=True, width=120)


@dataclass(frozen=True)
class Overrides:
    """What the command line says. Paths are relative to the working directory, not to the config's."""

    package: Path | None = None
    sources: tuple[str, ...] = ()  # addresses that replace all sources
    every_source: Mapping[str, Any] = field(default_factory=dict)  # keys of each source
    keys: Mapping[str, Any] = field(default_factory=dict)  # other keys of the config
    settings: tuple[str, ...] = ()  # `sources.0.fps=10`; these come last
    json_lines: bool = False  # results also to stdout
    pictures: Path | None = None  # overlays also to here


def load_run_config(
    path: Path | None, overrides: Overrides = Overrides(), environment: Mapping[str, str] | None = None
) -> RunConfig:
    """The config of a file (None: without one), the environment and the command line. Raises one `RecipeError`."""
    environment = environment or {}
    data = read_yaml(path, "run config", f"See the valid keys: {SCHEMA_COMMAND}") if path else {}
    data, mistakes = substituted(_without_emptied(data), environment)
    variables = from_environment(environment)
    data, unplaced = changed(data, variables)
    data = with_paths(data, path.resolve().parent if path else Path.cwd())
    data = _overridden(data, overrides)
    settings, unread = from_settings(overrides.settings)
    data, unset = changed(data, settings)
    data = named(data)
    without_effect = unplaced | unset
    mistakes += [*unread, *(f"{origin}: {mistake}" for origin, mistake in without_effect.items())]
    mistakes += [*misplaced_package(data), *repeated_names(data), *misplaced_outputs(data)]
    made = (name for name in (*variables, *settings) if name not in without_effect)
    origin = ", ".join([str(path) if path else "options", *made])
    return parse_section(RunConfig, data, origin, schema=SCHEMA_COMMAND, also=mistakes)


def run_schema() -> str:
    """JSON schema of a run config, every key described."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def _without_emptied(data: dict[str, Any]) -> dict[str, Any]:
    """A key with nothing behind it, as of a section whose lines are commented out, is as good as none."""
    return {key: value for key, value in data.items() if value is not None}


def _overridden(data: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    data = {**data, **overrides.keys}
    if overrides.package is not None:
        data["package"] = str(overrides.package)
    if overrides.sources:
        data["sources"] = [{"uri": uri} for uri in overrides.sources]
    if overrides.every_source and isinstance(data.get("sources"), list):
        data["sources"] = [
            {**source, **overrides.every_source} if isinstance(source, dict) else source for source in data["sources"]
        ]
    sinks = data.get("sinks", [{"kind": "jsonl" if overrides.json_lines else "lines"}])
    if isinstance(sinks, list):
        if overrides.json_lines and not any(_is_stdout(sink) for sink in sinks):
            sinks = [*sinks, {"kind": "jsonl"}]
        if overrides.pictures is not None:
            sinks = [*sinks, {"kind": "pictures", "path": str(overrides.pictures)}]
    return {**data, "sinks": sinks}


def _is_stdout(sink: Any) -> bool:
    return isinstance(sink, dict) and sink.get("kind") == "jsonl" and sink.get("path") is None
