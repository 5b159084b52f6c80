"""The workshop's commands: make data, tune prompts, build packages, and the demo that does it all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from dapo_edge.errors import RecipeError
from dapo_edge.terminal import (
    LAYOUT_NAMES,
    PACKAGE_PATH,
    as_json,
    interruptible_progress,
    print_json,
    print_rich,
    print_text,
    progress_bar,
    say,
)


@click.command()
@click.argument("recipe", required=False, type=PACKAGE_PATH)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Package to write [engines/<name>.dapo].")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "auto"]),
    help="Override the recipe's; auto takes the fastest here that passes the accuracy gate.",
)
@click.option("--schema", is_flag=True, help="Print the recipe's JSON schema and end.")
@click.option("--print-demo-recipe", is_flag=True, help="Print the demo recipe and end.")
@as_json
def build(
    recipe: Path | None,
    output: Path | None,
    precision: str | None,
    schema: bool,
    print_demo_recipe: bool,
    json_output: bool,
) -> None:
    """Compile RECIPE (YAML) into an engine package."""
    from dapo_edge.config import load_recipe, recipe_schema
    from dapo_edge.package import REPORT_PAGE

    if schema:
        print_text(recipe_schema())
        return
    if print_demo_recipe:
        print_text(_demo_recipe_path().read_text(encoding="utf-8").rstrip())
        return
    if recipe is None:
        raise RecipeError("no recipe given", "Name a YAML file; start from: dapo-edge build --print-demo-recipe")
    loaded = load_recipe(recipe)
    package = _build_with_progress(loaded.model_copy(update={"precision": precision or loaded.precision}), output)
    report = package.report()
    if json_output:
        print_json({"package": str(package.path), "digest": package.digest, "report": report})
    else:
        from dapo_edge.tables import precision_table

        print_rich(precision_table(report))
    say(f"built {package.path} ({package.manifest.precision}); the whole report: {package.path / REPORT_PAGE}")


@click.command()
@click.argument("recipe", type=PACKAGE_PATH)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the run [tuned/<name>].")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@as_json
def tune(recipe: Path, output: Path | None, device: str, json_output: bool) -> None:
    """Tune the prompts of RECIPE on labelled pictures; goes on where an earlier run was stopped."""
    from dapo_edge.config import load_recipe
    from dapo_edge.training.tune import best_file, result_json
    from dapo_edge.training.tune import tune as tune_recipe

    loaded = load_recipe(recipe)
    folder = output or Path("tuned") / loaded.name
    with interruptible_progress() as progress:
        run = tune_recipe(loaded, folder, progress, device=device)
    if json_output:
        print_json(result_json(run, folder))
        return
    best = run.best.validation
    done = "finished before" if run.restored == len(run.history) else "tuned"
    say(
        f"{done} {best_file(folder)}: epoch {run.best_epoch} of {len(run.history)}, "
        f"pixel AUROC {best.pixel_auroc:.3f}, "
        f"image AUROC {best.image_auroc:.3f}, type accuracy {best.type_accuracy:.3f} on the validation pictures"
    )


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--layout",
    required=True,
    type=click.Choice(LAYOUT_NAMES),
    help="The data set whose folders to imitate.",
)
@click.option("--images", default=100, show_default=True, help="Images in all, over all categories.")
@click.option("--seed", default=0, show_default=True, help="Another seed, other images.")
@click.option("--size", default="256x256", show_default=True, help="WIDTHxHEIGHT of every image, in pixels.")
@as_json
def synth(out: Path, layout: str, images: int, seed: int, size: str, json_output: bool) -> None:
    """Write a generated data set with defects and masks into the new folder OUT."""
    from dapo_edge.data.synth import write_dataset

    sides = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size.lower())
    if not sides:
        raise RecipeError(f"the size '{size}' is not WIDTHxHEIGHT", "Use for example --size 320x240")
    with progress_bar() as progress:
        summary = write_dataset(
            out,
            layout,
            images,
            seed,
            size=(int(sides[1]), int(sides[2])),
            on_image=lambda done, of: progress("drawing images", done, of),
        )
    if json_output:
        print_json(summary.as_json())
        return
    print_text(
        f"{summary.out}: {summary.images} images in {len(summary.categories)} categories, {summary.train} to train, "
        f"{summary.test_good} good and {summary.test_defective} defective to test"
    )
    for name, count in summary.types.items():
        print_text(f"{count:6}  {name}")


@click.command()
@click.option("--engines", default="engines", show_default=True, type=click.Path(path_type=Path))
@click.option("--frames", default=200, show_default=True, type=click.IntRange(min=1))
@as_json
def demo(engines: Path, frames: int, json_output: bool) -> None:
    """Build the demo package, inspect a generated belt, leave a video and a contact sheet."""
    from dapo_edge.config import load_recipe
    from dapo_edge.demo import inspect_belt

    package = _build_with_progress(load_recipe(_demo_recipe_path()), engines / "surface-tiny.dapo")
    with progress_bar() as progress:
        result = inspect_belt(
            package, engines / "surface-tiny-demo", frames, lambda done, of: progress("inspecting the belt", done, of)
        )
    if json_output:
        print_json(result)
        return
    from dapo_edge.tables import demo_table

    print_rich(demo_table(result))


def _demo_recipe_path() -> Path:
    return Path(__file__).parent / "assets" / "surface-tiny.yaml"


def _build_with_progress(recipe: Any, output: Path | None) -> Any:
    from dapo_edge.engine.build import build as build_package

    with interruptible_progress() as progress:
        package = build_package(recipe, output, progress)
    if not package.manifest.tuned:
        say("note: the prompts are not tuned, so the maps follow the backbone alone ('prompts.tuned' in the recipe)")
    if not package.manifest.trained:
        say("note: the backbone has seeded weights, so the maps mean nothing yet, and every verdict is 'unsure'")
    return package
