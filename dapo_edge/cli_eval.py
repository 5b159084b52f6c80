"""`dapo-edge eval`: how good a package or a recipe is on a data set, as a table, a JSON document and a report."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapo_edge.errors import RecipeError, SourceError
from dapo_edge.extras import require
from dapo_edge.files import as_bytes, check_writable, write_atomically
from dapo_edge.terminal import (
    LAYOUT_NAMES,
    PACKAGE_PATH,
    PRECISION,
    as_json,
    interruptible_progress,
    map_size_option,
    parse_map_size,
    print_json,
    print_rich,
    say,
)

if TYPE_CHECKING:
    from dapo_edge.evaluation.evaluate import DataSet
    from dapo_edge.evaluation.subject import Subject

MOST_WORKERS = 4


@click.command("eval")
@click.argument("subject", metavar="PACKAGE|RECIPE", type=PACKAGE_PATH)
@click.option("--dataset", required=True, type=click.Choice(LAYOUT_NAMES), help="Layout of the data set.")
@click.option("--root", required=True, type=PACKAGE_PATH, help="Its folder; for csv also the file itself.")
@click.option("--category", "categories", multiple=True, help="One of its categories; may be repeated. [all]")
@click.option("--compare", type=PACKAGE_PATH, help="A second package or recipe, on the same images.")
@click.option(
    "--words",
    type=click.Choice(["own", "dataset"]),
    default="own",
    show_default=True,
    help="Defect words: those of the package, or those of each category (needs the build extra).",
)
@click.option("--report", type=click.Path(path_type=Path), help="Folder for report.html, eval.json and what resumes.")
@click.option(
    "--backend", help="Engine for a package: openvino, tensorrt or eager. [openvino; a recipe is always eager]"
)
@click.option("--compare-backend", help="Engine for the second package. [openvino]")
@click.option("--precision", type=PRECISION, help="Override the package's precision.")
@click.option("--compare-precision", type=PRECISION, help="The same for the second one. [its own]")
@map_size_option
@click.option("--workers", type=click.IntRange(0, 64), help="Processes that read images. [cores - 1, at most 4]")
@as_json
def evaluate(
    subject: Path,
    dataset: str,
    root: Path,
    categories: tuple[str, ...],
    compare: Path | None,
    words: Any,
    report: Path | None,
    backend: str | None,
    compare_backend: str | None,
    precision: str | None,
    compare_precision: str | None,
    map_size: str | None,
    workers: int | None,
    json_output: bool,
) -> None:
    """Evaluate PACKAGE or RECIPE on the test images of a data set."""
    from dapo_edge.evaluation.document import document
    from dapo_edge.evaluation.evaluate import DataSet
    from dapo_edge.evaluation.evaluate import evaluate as measure
    from dapo_edge.evaluation.subject import Subject

    if not compare and (compare_backend or compare_precision):
        raise RecipeError("--compare-backend and --compare-precision need a second package", "Name it with --compare")
    if report:
        for package in ("jinja2", "matplotlib"):
            require(package)  # missing it after hours would cost the report
        check_writable(report)
    data, size = DataSet.read(dataset, root, categories), parse_map_size(map_size)
    if workers is None:
        workers = min(MOST_WORKERS, max(1, (os.cpu_count() or 2) - 1))
    started = time.monotonic()
    with ExitStack() as stack, interruptible_progress() as progress:
        subjects = [stack.enter_context(Subject.open(subject, backend=backend, precision=precision, map_size=size))]
        if compare:
            other = Subject.open(compare, backend=compare_backend, precision=compare_precision, map_size=size)
            subjects.append(stack.enter_context(other))
        results = measure(subjects, data, words=words, workers=workers, folder=report, on_progress=progress)
        found = document(subjects, results, data, words, time.monotonic() - started)
        if report:
            progress("writing the report", 0, 1)
            _write(report, found, subjects, results, data)
    _show(found, report, json_output)


def _write(folder: Path, found: dict[str, Any], subjects: list[Subject], results: Any, data: DataSet) -> None:
    from dapo_edge.evaluation.evaluate import words_of
    from dapo_edge.evaluation.report import DOCUMENT, REPORT, write_report

    write_atomically(folder / DOCUMENT, as_bytes(found))

    def use_words(category: str) -> None:
        for subject in subjects:
            subject.use_words(words_of(data, category, found["words"]))

    write_report(folder / REPORT, found, subjects, results, data, use_words)


def _show(found: dict[str, Any], report: Path | None, json_output: bool) -> None:
    if json_output:
        print_json(found)
    else:
        from dapo_edge.tables import eval_table

        print_rich(eval_table(found))
    if report:
        say(f"report: {report / 'report.html'}")
    orphans = found["dataset"]["masks_without_image"]
    if orphans:
        say(f"note: masks without an image: {len(orphans)}, the first is {orphans[0]}")
    failed = found["failed"]
    if failed:
        raise SourceError(
            f"{len(failed)} of {found['dataset']['images']} images can't be used, the first: {failed[0]['reason']}",
            "All others were evaluated; --json and the report name every one",
        )
