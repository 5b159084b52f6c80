"""`dapo-edge run`: cameras, videos and folders through an engine package, until they end or somebody stops it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapo_edge.errors import FrameError, FrameTimeout, OutputError, RecipeError, SourceError
from dapo_edge.folders import writing_to
from dapo_edge.terminal import (
    PACKAGE_PATH,
    PRECISION,
    FiniteFloat,
    as_json,
    interrupt,
    map_size_option,
    parse_map_size,
    print_json,
    print_text,
    say,
    stop_on_signals,
)

if TYPE_CHECKING:
    from dapo_edge.runtime.run_config import Overrides, RunConfig
    from dapo_edge.runtime.sources import Source
    from dapo_edge.structures import Frame

PREVIEW_S = 15.0  # a camera opens and sends its first frame within it


@click.command()
@click.argument("package", required=False, type=PACKAGE_PATH)
@click.argument("sources", nargs=-1)
@click.option("--config", type=click.Path(path_type=Path), help="Run config (YAML); PACKAGE and SOURCES replace its.")
@click.option("--frames", type=click.IntRange(min=1), help="Inspect at most this many frames of each source.")
@click.option("--out", type=click.Path(path_type=Path), help="Save overlays: a folder for PNG, or a file .mp4.")
@click.option("--policy", type=click.Choice(["wait", "newest"]), help="When the engine is slower than the sources.")
@click.option("--max-age-ms", type=FiniteFloat(), help="Drop frames that waited longer.")
@click.option("--fps", type=FiniteFloat(), help="Inspect at most so many frames per second of each source.")
@click.option("--region", "regions", multiple=True, metavar="X,Y,W,H", help="Look at this part only; repeatable.")
@click.option("--tiles", metavar="SIZE[:OVERLAP]", help="Look at tiles of this size in pixels: 640, 640x480:64.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key: sources.0.queue=2; repeatable.")
@map_size_option
@click.option("--backend", help="Engine that runs the package: openvino (default), or tensorrt.")
@click.option("--precision", type=PRECISION, help="Override the package's precision.")
@click.option("--stats-every", type=FiniteFloat(0.1, 86_400), metavar="SECONDS", help="Say how the run is doing.")
@click.option("--preview", type=click.Path(path_type=Path), help="Draw regions and tiles into a picture, and end.")
@click.option("--print-config", is_flag=True, help="Print the config that would run, without passwords, and end.")
@click.option("--schema", is_flag=True, help="Print the run config's JSON schema and end.")
@as_json
def run(
    package: Path | None,
    sources: tuple[str, ...],
    config: Path | None,
    stats_every: float | None,
    preview: Path | None,
    print_config: bool,
    schema: bool,
    json_output: bool,
    **options: Any,
) -> None:
    """Inspect every frame of SOURCES with PACKAGE.

    SOURCES are cameras (rtsp://, v4l2://, ...), videos, folders, pictures and synthetic://640x480@30. Options win over
    variables such as DAPO_EDGE_RUN__SOURCES__0__FPS, which win over the run config.
    """
    from dapo_edge.runtime.run_config import load_run_config, run_schema

    if schema:
        print_text(run_schema())
        return
    if config is None and not (package and sources):
        raise click.UsageError("Missing argument 'PACKAGE' or 'SOURCES...', or option '--config'.")
    _check_sources(sources, options["out"])
    loaded = load_run_config(config, _overrides(package, sources, json_output, options), os.environ)
    if print_config:
        print_text(loaded.as_yaml().rstrip())
    elif preview:
        with stop_on_signals(interrupt):
            _print_previews(loaded, preview, json_output)
    else:
        from dapo_edge.cli_line import LineRun

        LineRun(loaded, stats_every).run()


def _check_sources(sources: Sequence[str], out: Path | None) -> None:
    """Refuse what can't be read, and to write where is read: overlays would replace what they are made of."""
    from dapo_edge.runtime.run_checks import is_address, replaces
    from dapo_edge.runtime.sources import open_source, redact

    if out and is_address(out):
        raise OutputError(f"'{out}' is not a path", "Name a folder, or a file that ends in .mp4")
    for source in sources:
        open_source(source)  # which only looks at the address
        if out and replaces(out, source):
            cause = f"'{out}' is where the source '{redact(source)}' lies"
            raise OutputError(cause, "Save overlays to another folder")


def _overrides(package: Path | None, sources: tuple[str, ...], json_output: bool, options: dict[str, Any]) -> Overrides:
    """The options as changes of the config; what was not given changes nothing."""
    from dapo_edge.runtime.run_config import Overrides
    from dapo_edge.runtime.sources.uri import is_text, uri_of

    of_sources = {
        "frames": options["frames"],
        "policy": options["policy"],
        "max_age_ms": options["max_age_ms"],
        "fps": options["fps"],
        "regions": [{"box": _numbers(text, ",", 4, "--region")} for text in options["regions"]] or None,
        "tiles": None if options["tiles"] is None else _tiles(options["tiles"]),
    }
    size = parse_map_size(options["map_size"])
    keys = {"backend": options["backend"], "precision": options["precision"], "map_size": size}
    return Overrides(
        package=package,
        sources=tuple(
            source if is_text(Path(source)) else uri_of("file", Path(source))  # a config holds only text
            for source in sources
        ),
        every_source={key: value for key, value in of_sources.items() if value is not None},
        keys={key: value for key, value in keys.items() if value is not None},
        settings=options["settings"],
        json_lines=json_output,
        pictures=options["out"],
    )


def _tiles(text: str) -> dict[str, Any]:
    size, colon, overlap = text.partition(":")
    sides = _numbers(size, "x", 2 if "x" in size else 1, "--tiles")
    tiles: dict[str, Any] = {"size": sides if len(sides) == 2 else sides[0]}
    return {**tiles, "overlap": _numbers(overlap, ":", 1, "--tiles")[0]} if colon else tiles


def _numbers(text: str, separator: str, count: int, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(separator)]
    if len(parts) != count or not all(part.isdecimal() and len(part) <= 6 for part in parts):
        example = {"--region": "100,50,640,480", "--tiles": "640, 640x480 or 640:64"}[option]
        raise RecipeError(f"'{text}' is no value of {option}", f"Write whole numbers of pixels: {example}")
    return [int(part) for part in parts]


def _print_previews(config: RunConfig, path: Path, json_output: bool) -> None:
    """One frame of each source with its regions and tiles drawn in; nothing is inspected."""
    from dapo_edge.outputs.recorder import names_pictures, save_picture
    from dapo_edge.package import EnginePackage
    from dapo_edge.runtime.preview import draw_views
    from dapo_edge.runtime.sources import open_source
    from dapo_edge.runtime.tiling import Views, plan

    if not names_pictures(path):
        raise OutputError(f"'{path}' is not the name of a picture", "Use one that ends in .png or .jpg")
    _protect_sources(config, path)
    manifest = EnginePackage.open(config.package).manifest
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for source in config.sources:
        with open_source(source.uri) as opened:
            image = _first_frame(opened).image
        try:
            size = (image.shape[1], image.shape[0])
            layout = plan(source.views or Views(), size, manifest.map, config.map_size or manifest.map_size)
        except RecipeError as error:
            raise RecipeError(f"{source.name}: {error.cause}", error.remedy) from error
        is_only = len(config.sources) == 1
        target = path if is_only else path.with_name(f"{path.stem}-{source.name}{path.suffix}")
        written.append({"camera": source.name, "picture": str(save_picture(target, draw_views(image, layout)))})
        say(f"{source.name}: {target}")  # at once: a later source may fail
    if json_output:
        print_json({"preview": written})


def _protect_sources(config: RunConfig, path: Path) -> None:
    from dapo_edge.runtime.run_checks import path_of_source

    target = Path(os.path.realpath(path))
    for source in config.sources:
        if path_of_source(source.uri) in (target, target.parent):
            cause = f"'{path}' is where the source '{source.name}' lies"
            raise OutputError(cause, "Write the preview to another folder")


def _first_frame(source: Source) -> Frame:
    """The first frame that can be used."""
    until_s = time.monotonic() + PREVIEW_S
    while time.monotonic() < until_s:
        try:
            frame = source.read(1.0)
        except (FrameTimeout, FrameError):
            continue
        if frame is None:
            break
        return frame
    raise SourceError(f"'{source.uri}' gave no frame", "Look whether it has any, or whether it waits for a trigger")
