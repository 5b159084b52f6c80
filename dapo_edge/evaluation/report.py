"""The report of an evaluation: one HTML file that needs nothing else, with tables, curves and telling images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.calibration.thresholds import clopper_pearson
from dapo_edge.data.loading import Loaded, Loader
from dapo_edge.errors import SourceError
from dapo_edge.evaluation.document import Results, mean_of
from dapo_edge.evaluation.evaluate import DataSet, ImageResult, Line, all_images
from dapo_edge.evaluation.plots import confusion_plot, curve_plot, score_plot
from dapo_edge.evaluation.subject import Subject
from dapo_edge.extras import require
from dapo_edge.files import write_atomically
from dapo_edge.outputs.overlay import draw
from dapo_edge.page import coloured, environment, jpeg
from dapo_edge.structures import NORMAL, Inspection

REPORT, DOCUMENT = "report.html", "eval.json"
EXAMPLES = 8  # of each kind

TILES = (
    ("image_auroc", "image AUROC"), ("image_ap", "image AP"), ("pixel_auroc", "pixel AUROC"), ("aupro", "AUPRO"),
    ("type_pixel_auroc", "pixel AUROC per type"), ("type_accuracy", "type accuracy"),
)  # fmt: skip
COLUMNS = (
    ("image_auroc", "image AUROC"), ("image_ap", "image AP"), ("image_f1_max", "image F1-max"),
    ("pixel_auroc", "pixel AUROC"), ("pixel_ap", "pixel AP"), ("pixel_f1_max", "pixel F1-max"), ("aupro", "AUPRO"),
    ("type_pixel_auroc", "type AUROC"), ("type_pixel_f1_max", "type F1-max"), ("type_accuracy", "type accuracy"),
    ("image_ece", "calibration error"),
)  # fmt: skip
LOWER_IS_BETTER = ("image_ece",)

Example = dict[str, Any]
UseWords = Callable[[str], object]  # takes a category


def write_report(
    path: Path,
    document: Mapping[str, Any],
    subjects: Sequence[Subject],
    results: Sequence[Results],
    data: DataSet,
    use_words: UseWords = lambda category: None,
) -> Path:
    """Write the HTML of an evaluation; the subjects, still open, make the pictures of its examples again.

    `use_words(category)` sets the words that a category was evaluated with. Raises `OutputError`, `DependencyMissing`.
    """
    compare = document.get("compare")
    template = environment(Path(__file__).parent, signed=signed).get_template("report.html.j2")
    html = template.render(
        title=f"{data.layout.name}: " + " against ".join(subject.recipe.name for subject in subjects),
        result=document,
        compare=compare,
        subjects=[document["subject"], *([compare["subject"]] if compare else [])],
        tiles=TILES,
        columns=COLUMNS,
        calibrated=document["decides"],
        verdicts=_verdict_rows(document["verdicts"]),
        figures=_figures(document, results),
        types=_type_rows(results[0]),
        unnamed=_unnamed(results[0]),
        unmasked=sum(result.unmasked for result in results[0].values()),
        regions_lost=sum(result.regions_lost for result in results[0].values()),
        examples=_examples(document, subjects, results, data, use_words),
    )
    return write_atomically(path, html.encode(errors="backslashreplace"))


def signed(share: float | None, metric: str) -> Any:
    """A difference in points, green where it is better and red where it is worse; nothing below the last digit."""
    if share is None:
        return ""
    points = round(100 * share, 2) + 0.0  # no minus before a zero
    better = (points > 0) != (metric in LOWER_IS_BETTER)
    tone = "" if abs(points) < 0.05 else ("up" if better else "down")
    return require("markupsafe").Markup(f'<span class="{tone}">({points:+.2f})</span>')


def _verdict_rows(verdicts: Mapping[str, Mapping[str, int]]) -> list[Example]:
    """`unsure` is not counted as wrong: a person looks."""
    rows = []
    for truth, wrong, what in (("good", "ng", "falsely rejected"), ("defective", "ok", "escaped")):
        counts = verdicts[truth]
        total = sum(counts.values())
        low, high = clopper_pearson(counts[wrong], total) if total else (None, None)
        share = counts[wrong] / total if total else None
        rows.append({"truth": truth, "counts": counts, "wrong": share, "what": what, "low": low, "high": high})
    return rows


def _figures(document: Mapping[str, Any], results: Sequence[Results]) -> list[str]:
    def lines(name: str) -> dict[str, Line]:
        return {category: result.curves[name] for category, result in results[0].items()}

    used = [image for _, image in all_images(results[0]) if image.score is not None]
    threshold = document["subject"]["thresholds"]["image"] if document["decides"] else None
    found = [
        curve_plot("Images: ROC", lines("image_roc"), "roc"),
        curve_plot("Images: precision and recall", lines("image_pr"), "pr"),
        curve_plot("Pixels: ROC", lines("pixel_roc"), "roc"),
        curve_plot("Pixels: precision and recall", lines("pixel_pr"), "pr"),
        score_plot(
            [image.score or 0.0 for image in used if image.is_good],
            [image.score or 0.0 for image in used if not image.is_good],
            threshold,
        ),
    ]
    words, confusion = _confusion(results[0])
    if confusion.any():
        found.append(confusion_plot(words, confusion))
    return found


def _confusion(results: Results) -> tuple[list[str], NDArray[np.int64]]:
    """Counts of all categories, by word: [true, given]."""
    words = list(dict.fromkeys(word for result in results.values() for word in result.words))
    total = np.zeros((len(words), len(words)), np.int64)
    for result in results.values():
        place = [words.index(word) for word in result.words]
        total[np.ix_(place, place)] += np.asarray(result.confusion, np.int64)
    return words, total


def _type_rows(results: Results) -> list[Example]:
    """One line per type that occurs; metrics are means over the categories in which it does."""
    words, confusion = _confusion(results)
    rows = []
    for place, word in enumerate(words):
        found = [result.types[word] for result in results.values() if word in result.types]
        if not found:
            continue
        regions, wrong = int(confusion[place].sum()), confusion[place].copy()
        wrong[place] = 0
        rows.append(
            {
                "name": word,
                "regions": regions,
                "right": confusion[place, place] / regions if regions else None,
                **{metric: mean_of(metrics[metric] for metrics in found) for metric in found[0]},
                "called": f"{words[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "",
            }
        )
    return rows


def _unnamed(results: Results) -> str:
    counts: dict[str, int] = {}
    for result in results.values():
        for name, count in result.unnamed.items():
            counts[name] = counts.get(name, 0) + count
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _examples(
    document: Mapping[str, Any],
    subjects: Sequence[Subject],
    results: Sequence[Results],
    data: DataSet,
    use_words: UseWords,
) -> list[tuple[str, str, list[Example]]]:
    """The images that say most about where a subject fails."""
    used = [(category, image) for category, image in all_images(results[0]) if image.score is not None]
    misses = sorted((e for e in used if not e[1].is_good), key=lambda e: e[1].score or 0.0)[:EXAMPLES]
    alarms = sorted((e for e in used if e[1].is_good), key=lambda e: -(e[1].score or 0.0))[:EXAMPLES]
    first = subjects[:1]
    found = [
        ("Defective images with the lowest scores", "The first to escape.", _pictured(first, misses, data, use_words)),
        ("Good images with the highest scores", "The first false alarms.", _pictured(first, alarms, data, use_words)),
    ]
    if len(subjects) > 1:
        known = {(category, image.image, image.defect): image for category, image in used}
        entries = document["compare"]["flips"]["images"][:EXAMPLES]
        places = [(entry["category"], entry["image"], entry["defect"]) for entry in entries]
        both = [(place[0], known[place]) for place in places]
        found.append(("Verdicts that differ", "Maps of A and of B.", _pictured(subjects, both, data, use_words)))
    return found


def _pictured(
    subjects: Sequence[Subject], images: Sequence[tuple[str, ImageResult]], data: DataSet, use_words: UseWords
) -> list[Example]:
    rows = []
    for category, image in images:
        use_words(category)
        of_image = [s for s in data.categories[category] if (str(s.image), s.defect) == (image.image, image.defect)]
        sample = of_image[0]
        loaded = next(Loader().load([sample], (NORMAL, image.defect) if not image.is_good else (NORMAL,)))
        if loaded.image is None:
            raise SourceError(f"'{image.image}' can't be read any more", "Evaluate again")
        inspections = [subject.inspection(loaded.image) for subject in subjects]
        verdicts = " / ".join(f"{i.verdict} {i.score:.3f}" for i in inspections)
        shown = f"{category}: {image.defect}, {verdicts}"
        rows.append({"title": shown, "path": image.image, "pictures": _panels(loaded, inspections)})
    return rows


def _panels(loaded: Loaded, inspections: Sequence[Inspection]) -> list[tuple[str, str]]:
    image = loaded.image
    assert image is not None
    panels = [("image", image)]
    if loaded.types is not None:
        panels.append(("truth", np.repeat((loaded.types > 0).astype(np.uint8)[..., None] * 255, 3, axis=2)))
    names = ("map",) if len(inspections) == 1 else tuple(f"map {letter}" for letter in "AB")
    panels += [(name, coloured(found.anomaly_map)) for name, found in zip(names, inspections, strict=True)]
    if len(inspections) == 1:
        panels.append(("overlay", draw(image, inspections[0], banner=False)))
    return [(name, jpeg(panel, image.shape)) for name, panel in panels]
