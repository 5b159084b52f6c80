"""`dapo-edge cameras list|probe`: which cameras are there, under which URI, and what one really delivers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dapo_edge.errors import SourceError
from dapo_edge.terminal import FiniteFloat, as_json, print_json, print_rich, say

if TYPE_CHECKING:
    from rich.console import Group

    from dapo_edge.runtime.cameras import Listing, Probe

COLUMNS = ("min", "p50", "p90", "p99", "max")


@click.group()
def cameras() -> None:
    """Find cameras, and measure what one of them delivers."""


@cameras.command("list")
@click.option(
    "--cti",
    "producers",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A GenTL producer to look into; may be repeated. [those in GENICAM_GENTL64_PATH]",
)
@as_json
def list_(producers: tuple[Path, ...], json_output: bool) -> None:
    """List the cameras that this machine reaches, with the URI to open each. RTSP cameras can't be found."""
    from dapo_edge.runtime.cameras import list_cameras

    listings = list_cameras(producers)
    if json_output:
        print_json({"schema": "dapo-edge cameras list 1", "kinds": [_listing_json(listing) for listing in listings]})
    else:
        print_rich(_listing_table(listings))


@cameras.command()
@click.argument("uri")
@click.option("--seconds", type=FiniteFloat(0.1, 3600), default=5.0, show_default=True, help="How long to watch.")
@click.option("--frames", type=click.IntRange(min=1), help="Stop after so many frames.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the last frame as .png or .jpg.")
@as_json
def probe(uri: str, seconds: float, frames: int | None, save: Path | None, json_output: bool) -> None:
    """Open URI and measure its frame rate, gaps and latency."""
    from dapo_edge.outputs.recorder import names_pictures, save_picture
    from dapo_edge.runtime.cameras import probe as watch

    if save and not names_pictures(save):
        raise click.UsageError(f"'{save}' is no name of a picture. Use a path that ends in .png or .jpg.")
    found = watch(uri, seconds, frames)
    if json_output:
        print_json(found.as_json())
    else:
        print_rich(_probe_table(found))
    if save and found.last:
        save_picture(save, found.last.image)
        say(f"saved {save}")
    if found.error:
        raise found.error
    if not found.frames:
        cause = f"'{found.properties.uri}' gave no frame that can be used within {found.watched_s:.1f} s"
        reason = (
            f"The last one that came: {found.last_failure}" if found.last_failure else "Check its trigger and cable"
        )
        raise SourceError(cause, reason)


def _listing_json(listing: Listing) -> dict[str, object]:
    return {
        "kind": listing.kind,
        "cameras": [dict(vars(camera)) for camera in listing.cameras],
        "problem": listing.problem or None,
    }


def _listing_table(listings: tuple[Listing, ...]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("kind", "camera", "serial", "URI", box=None, pad_edge=False)
    table.columns[3].overflow = "fold"
    without = []
    for listing in listings:
        for camera in listing.cameras:
            model = f"{camera.model} [{camera.note}]" if camera.note else camera.model
            table.add_row(listing.kind, *map(Text, (model, camera.serial, camera.uri)))  # plain text: no markup
        if not listing.cameras:
            without.append(Text(f"{listing.kind}: {listing.problem or 'none found'}", "dim"))
    return Group(table, *without) if table.rows else Group(*without)


def _probe_table(found: Probe) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = Table(show_header=False, box=None, pad_edge=False)
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    for name, value in _probe_lines(found):
        rows.add_row(name, Text(value))
    times = Table("ms", *COLUMNS, box=None, pad_edge=False)
    for column in times.columns[1:]:
        column.justify = "right"
    for name, values in (("interval", found.interval_ms), ("latency", found.latency_ms)):
        if values:
            times.add_row(name, *(f"{values[column]:.1f}" for column in COLUMNS))
    return Group(rows, times) if times.rows else Group(rows)


def _probe_lines(found: Probe) -> list[tuple[str, str]]:
    known, last = found.properties, found.last
    kind = "frames come by a trigger" if known.triggered else "live" if known.live else "frames come when they are read"
    announced = f"{known.fps:.4g} frames/s announced, " if known.fps else ""
    lines = [
        ("source", f"{known.uri} ({kind})"),
        ("opened", f"in {found.opened_s:.2f} s, first frame {_after(found.first_frame_s)}"),
        ("frames", f"{found.frames} in {found.watched_s:.1f} s, {found.failed} failed, {found.lost} lost"),
        ("rate", announced + (f"{found.fps:.1f} measured" if found.fps else "not measured")),
    ]
    if last:
        height, width = last.image.shape[:2]
        lines.insert(1, ("picture", f"{width} x {height} {found.pixel_format}"))
    if found.interval_ms:
        lines.append(("largest gap", f"{found.interval_ms['max']:.1f} ms"))
    if not found.latency_ms:
        lines.append(("latency", "not available: the camera's clock is not set to time of day"))
    if found.last_failure:
        lines.append(("last failure", str(found.last_failure)))
    return lines


def _after(seconds: float | None) -> str:
    return "never came" if seconds is None else f"after {seconds:.2f} s"
