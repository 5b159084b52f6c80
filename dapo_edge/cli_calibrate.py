"""`dapo-edge calibrate`: the activation ranges that INT8 needs, measured on the line's own frames."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapo_edge.errors import OutputError, RecipeError
from dapo_edge.terminal import PACKAGE_PATH, as_json, interruptible_progress, print_json, print_rich, say

if TYPE_CHECKING:
    from rich.table import Table

    from dapo_edge.calibration.ranges import ActivationRanges
    from dapo_edge.config import Recipe

MOST_ROWS = 8
USUAL, REST = "percentile_99.99", ("entropy", "mse")  # the estimator that outliers are measured by, and two more


@click.command()
@click.argument("recipe", type=PACKAGE_PATH)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write [calibration/<name>.ranges.json].")
@click.option("--frames", metavar="SOURCE", help="Frames instead of the recipe's: folder, video, address or synthetic.")
@click.option("--count", type=click.IntRange(8, 10_000), help="Frames at most; of more, a diverse subset is picked.")
@as_json
def calibrate(recipe: Path, output: Path | None, frames: str | None, count: int | None, json_output: bool) -> None:
    """Measure how far the activations of RECIPE's encoder reach on the line's own frames, for INT8."""
    from dapo_edge.calibration.ranges import SUFFIX
    from dapo_edge.config import load_recipe
    from dapo_edge.files import check_writable

    loaded = _with_options(load_recipe(recipe), frames, count)
    path = output or Path("calibration") / f"{loaded.name}{SUFFIX}"
    _check_replaceable(path)
    check_writable(path.parent)
    ranges = _measured(loaded)
    ranges.write(path)
    if json_output:
        print_json(_document(ranges, path))
    else:
        print_rich(_widest(ranges))
    seen = ranges.frames
    say(
        f"{path}: {len(ranges.linears)} Linears over {seen.used} frames ({seen.offered} looked at, "
        f"{seen.unreadable} unreadable, {seen.constant} without contrast)"
    )
    say(f"for the recipe: {_recipe_line(loaded, recipe, path)}")


def _check_replaceable(path: Path) -> None:
    """Refuse a place where something lies that is no ranges file, be it a damaged one. Raises `OutputError`."""
    from dapo_edge.calibration.ranges import SUFFIX, ActivationRanges

    if not path.name:
        raise OutputError(f"'{path}' is no name of a file", "Name a file with -o, or leave -o out")
    if not os.path.lexists(path) or (path.is_file() and path.name.endswith(SUFFIX)):
        return
    if path.is_file():
        with contextlib.suppress(RecipeError):
            ActivationRanges.read(path)
            return
    raise OutputError(f"'{path}' exists and holds no activation ranges", "Name another place with -o, or move it away")


def _with_options(recipe: Recipe, frames: str | None, count: int | None) -> Recipe:
    """The recipe with what the command line says instead."""
    given = {"frames": frames, "count": count}
    changes = {key: value for key, value in given.items() if value is not None}
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=changes)})


def _measured(recipe: Recipe) -> ActivationRanges:
    from dapo_edge.calibration.run import calibrate as calibrate_recipe

    with interruptible_progress() as progress:
        return calibrate_recipe(recipe, progress)


def _document(ranges: ActivationRanges, path: Path) -> dict[str, Any]:
    """What `--json` prints: the file without channels and histograms."""
    fields = ranges.model_dump(mode="json", exclude={"linears"})
    linears = {name: dict(linear.estimates) for name, linear in ranges.linears.items()}
    return {"schema": "dapo-edge calibrate 1", "file": str(path), **fields, "linears": linears}


def _widest(ranges: ActivationRanges) -> Table:
    """The Linears whose outliers reach farthest beyond nearly all of their values."""
    from rich.table import Table

    spread = {name: linear.max / linear.estimates[USUAL] for name, linear in ranges.linears.items()}
    table = Table("widest outliers", "max", "99.99 %", "times", *REST, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in sorted(spread, key=lambda name: -spread[name])[:MOST_ROWS]:
        shown = (ranges.linears[name].estimates[key] for key in ("max", USUAL, *REST))
        largest, usual, *rest = (f"{value:.3g}" for value in shown)
        table.add_row(name, largest, usual, f"{spread[name]:.2f}", *rest)
    return table


def _recipe_line(recipe: Recipe, origin: Path, path: Path) -> str:
    """The whole calibration section in one line, as it takes the place of the recipe's own; without defaults.

    Its paths are relative to the recipe's folder.
    """
    import yaml

    from dapo_edge.config import SYNTHETIC

    folder = origin.resolve().parent
    section = recipe.calibration.model_dump(mode="json", exclude_defaults=True)
    if section["frames"] != SYNTHETIC and Path(section["frames"]).exists():
        section["frames"] = os.path.relpath(Path(section["frames"]).resolve(), folder)
    section["ranges"] = os.path.relpath(path.resolve(), folder)
    text = yaml.safe_dump(section, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return f"calibration: {text.strip()}"
