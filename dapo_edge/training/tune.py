"""`dapo-edge tune`: a recipe and labelled pictures in, tuned prompts and learning curves out."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapo_edge.config import Recipe, TuningPlan
from dapo_edge.data import protocol
from dapo_edge.data.dataset import SEVERAL, FileSet, check_files, check_samples, names_of
from dapo_edge.data.flaws import DEFECTS
from dapo_edge.data.layouts import layout_of
from dapo_edge.data.protocol import surfaces_v1
from dapo_edge.engine.build import map_spec
from dapo_edge.errors import RecipeError, SourceError, did_you_mean
from dapo_edge.extras import require
from dapo_edge.files import check_writable, write_atomically
from dapo_edge.models.method import method_class, method_of
from dapo_edge.structures import NORMAL
from dapo_edge.training.trainer import BEST, Progress, Run, Trainer
from dapo_edge.training.views import Pictures, ViewStore, World

LOG, CURVES = "log.csv", "curves.png"
MOST_NAMED = 5  # files of one error line


def tune(
    recipe: Recipe,
    folder: Path,
    on_progress: Progress = lambda step, done, of: None,
    *,
    device: str = "cpu",
    stop_after: int | None = None,
) -> Run:
    """Tune the recipe's method into `folder`: best.safetensors, latest.safetensors, log.csv, curves.png, state.pt.

    Goes on where an earlier run in the folder ended; `stop_after` ends it after that many epochs in all, to be gone on
    with. Raises `RecipeError`, `SourceError`, `OutputError` and, for a loss that is no number, `DapoEdgeError`.
    """
    _check_start(recipe, folder, device)
    method_class(recipe.method)  # an unknown one shows before the pictures are looked at
    plan = recipe.tuning
    on_progress("looking at the pictures", 0, 1)
    names = tuple(defect.name for defect in recipe.prompts.defects)
    files = _file_set(plan, names) if plan.data != "synthetic" else None
    if files is None:
        _check_words(names)
    else:
        _read_all(files, on_progress)
    on_progress("loading the backbone", 0, 1)
    method = method_of(recipe).to(device)
    with require("torch").no_grad():
        method.rows([defect.phrase for defect in recipe.prompts.defects], recipe.prompts.object)  # do the words fit?

    check_writable(folder)

    def show(run: Run) -> None:
        write_log(run, folder / LOG)
        draw_curves(run, folder / CURVES)

    trainer = Trainer(
        method,
        ViewStore(_generated(plan, names, method.image_size) if files is None else files, method.image_size),
        [defect.phrase for defect in recipe.prompts.defects],
        recipe.prompts.object,
        plan,
        spec=map_spec(recipe, method),
        folder=folder,
        save=method.save,
        on_progress=on_progress,
        on_epoch=show,
    )
    run = trainer.tune(stop_after)
    if run.history:
        show(run)
    return run


def _check_start(recipe: Recipe, folder: Path, device: str) -> None:
    """What would otherwise show after hours, or cost what is there already."""
    require("matplotlib")
    start = recipe.prompts.tuned
    if start and start.resolve().parent == folder.resolve():
        raise RecipeError(
            f"'prompts.tuned' names '{start}', which this run would overwrite",
            "Start from a copy of it in another place, or tune into another folder (--output)",
        )
    if device == "cuda" and not require("torch").cuda.is_available():
        raise RecipeError("this machine's torch finds no CUDA device", "Tune with --device cpu")


def _read_all(files: FileSet, on_progress: Progress) -> None:
    """Raise one `SourceError` for all pictures that can't be used, before anything is learnt."""
    errors = []
    for index in range(len(files)):
        on_progress("looking at the pictures", index, len(files))
        try:
            files[index]
        except SourceError as error:
            errors.append(error)
    if errors:
        causes = "; ".join(error.cause for error in errors[:MOST_NAMED])
        more = f"; and {len(errors) - MOST_NAMED} more" if len(errors) > MOST_NAMED else ""
        raise SourceError(f"{len(errors)} of {len(files)} pictures can't be used: {causes}{more}", errors[0].remedy)


def best_file(folder: Path) -> Path:
    """What `prompts.tuned` of a recipe should name."""
    return folder / BEST


def write_log(run: Run, path: Path) -> None:
    """One CSV line per epoch: losses, quality and every validation metric."""
    lines = [epoch.as_json() for epoch in run.history]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(path, text.getvalue().encode())


def draw_curves(run: Run, path: Path) -> None:
    """Losses and validation metrics over the epochs, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, metrics = figure.subplots(1, 2)
    epochs = [epoch.epoch for epoch in run.history]
    for name in ("map_loss", "image_loss"):
        losses.plot(epochs, [getattr(epoch, name) for epoch in run.history], marker=".", label=name.replace("_", " "))
    for name in ("pixel_auroc", "aupro", "image_auroc", "type_pixel_auroc", "type_accuracy"):
        values = [getattr(epoch.validation, name) for epoch in run.history]
        metrics.plot(epochs, values, marker=".", label=name.replace("_", " "))
    metrics.axvline(run.best_epoch, color="grey", linestyle=":", label="kept")
    for axes, title in ((losses, "training loss"), (metrics, "validation")):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    write_atomically(path, picture.getvalue())


def _check_words(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in DEFECTS]
    if unknown:
        raise RecipeError(
            f"the generated world has no defect {', '.join(map(repr, unknown))}",
            f"Tune with your own pictures ('tuning.data'), or use: {', '.join(DEFECTS)}",
        )


def _generated(plan: TuningPlan, names: Sequence[str], image_size: int) -> Pictures:
    """The materials and numbers that surfaces-v1 tunes on, with the defects that the recipe names."""
    first = protocol.first_picture(protocol.TUNING, plan.seed, plan.images)
    return World(first, plan.images, image_size, surfaces_v1().tuned_materials, tuple(names), max_defects=2)


def _file_set(plan: TuningPlan, names: Sequence[str]) -> FileSet:
    """The labelled test pictures of a data set: DAPO learns from both good and defective ones (methods 1.2).

    A picture whose mask shows several types is left out: it does not say which pixels are of which.
    """
    found = layout_of(plan.layout).read(plan.data, plan.categories)
    samples = [s for s in found if s.split == "test" and s.defect != SEVERAL]
    check_samples(samples)
    check_files(samples)
    missing = [name for name in names_of(samples)[1:] if name not in names]
    if missing:
        hints = [did_you_mean(name, names, cutoff=0.6) for name in missing]
        raise RecipeError(
            f"'{plan.data}' shows {', '.join(map(repr, missing))}, which the recipe does not name",
            f"{next(filter(None, hints), '')}Name them in 'prompts.defects', or leave their pictures out",
        )
    return FileSet(tuple(samples), (NORMAL, *names))


def result_json(run: Run, folder: Path) -> dict[str, Any]:
    """What `tune --json` prints."""
    return {
        "schema": "dapo-edge tune 1",
        "tuned": str(best_file(folder)),
        "epochs": len(run.history),
        "best_epoch": run.best_epoch,
        "best": run.best.as_json(),
    }
