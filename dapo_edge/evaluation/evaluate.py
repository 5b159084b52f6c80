"""How good packages and recipes are on a data set: every test image once, category by category, in constant memory.

A category's result is kept as soon as it is complete, so a stopped evaluation goes on. Nothing here imports torch: a
package is evaluated on the device that runs it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dapo_edge import __version__
from dapo_edge.config import MAX_DEFECT_TYPES, check_words
from dapo_edge.data.dataset import SEVERAL, FileSet, Sample, masks_without_image, names_of, regions_lost, types_at
from dapo_edge.data.layouts import Layout, layout_of
from dapo_edge.data.loading import Loaded, Loader
from dapo_edge.device import this_device
from dapo_edge.errors import RecipeError
from dapo_edge.evaluation.histograms import Curve, FloatArray, thinned
from dapo_edge.evaluation.metrics import Evaluation
from dapo_edge.evaluation.subject import Subject
from dapo_edge.files import as_bytes, write_atomically
from dapo_edge.structures import NORMAL

Words = Literal["own", "dataset"]
Progress = Callable[[str, int, int], None]
STATE = "state"  # folder of finished categories


@dataclass(frozen=True)
class ImageResult:
    """What was found on one image."""

    image: str
    defect: str  # NORMAL for a good one
    score: float | None = None  # None where `error` says why the image can't be used
    highest: float | None = None  # pixel of the anomaly map
    verdict: str | None = None
    error: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether its label says so."""
        return self.defect == NORMAL


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn."""

    x: list[float]
    y: list[float]
    area: float | None  # AUROC, or average precision; None and no points where it is undefined


@dataclass(frozen=True)
class CategoryResult:
    """One category, by one subject. Small: what was counted pixel by pixel is gone."""

    words: tuple[str, ...]  # defect types that the map has channels for
    metrics: dict[str, float | int | None]  # as `metrics.Summary`
    types: dict[str, dict[str, float | None]]  # pixel metrics of every type that occurs
    confusion: list[list[int]]  # [true word][given word], regions
    curves: dict[str, Line]  # image_roc, image_pr, pixel_roc, pixel_pr
    images: list[ImageResult]
    unnamed: dict[str, int]  # images by defect that there is no word for
    unmasked: int  # defective images without a mask: they count in image metrics only
    regions: int  # true ones, at the map's size
    regions_lost: int  # true ones that fell between the map's pixels
    decides: bool  # whether its verdicts can be anything but `unsure`
    seconds: float
    date: str
    device: str
    restored: bool = False  # from an earlier, stopped evaluation

    @property
    def failed(self) -> list[ImageResult]:
        """Images that could not be used."""
        return [result for result in self.images if result.error]

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> CategoryResult:
        """What `asdict` made of it."""
        content["words"] = tuple(content["words"])
        content["images"] = [ImageResult(**image) for image in content["images"]]
        content["curves"] = {name: Line(**line) for name, line in content["curves"].items()}
        return cls(**content)


@dataclass(eq=False)
class _Count:
    """A category while it is being evaluated."""

    evaluation: Evaluation
    decides: bool
    channels: NDArray[np.uint8]  # of the subject, by the data set's index of a type
    images: list[ImageResult] = field(default_factory=list)
    unnamed: dict[str, int] = field(default_factory=dict)
    unmasked: int = 0
    regions_lost: int = 0
    seconds: float = 0.0

    def result(self) -> CategoryResult:
        """All of it, counted."""
        evaluation = self.evaluation
        image, pixel = evaluation.images.curve(), evaluation.pixels.curve()
        return CategoryResult(
            words=evaluation.types.names[1:],
            metrics=evaluation.summary().as_json(),
            types={
                name: {
                    "pixel_auroc": number(curve.auroc()),
                    "pixel_ap": number(curve.average_precision()),
                    "pixel_f1_max": number(curve.f1_max()),
                }
                for name, curve in evaluation.types.curves().items()
            },
            confusion=evaluation.types.confusion.tolist(),
            curves={"image_roc": _roc(image), "image_pr": _pr(image), "pixel_roc": _roc(pixel), "pixel_pr": _pr(pixel)},
            images=self.images,
            unnamed=self.unnamed,
            unmasked=self.unmasked,
            regions=evaluation.pixels.regions,
            regions_lost=self.regions_lost,
            decides=self.decides,
            seconds=self.seconds,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            device=this_device().line(),
        )


def number(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return None if math.isnan(value) else value


def _roc(curve: Curve) -> Line:
    return _line(*curve.rates(), curve.auroc()) if curve.defined else Line([], [], None)


def _pr(curve: Curve) -> Line:
    return _line(*curve.precision_recall(), curve.average_precision()) if curve.defined else Line([], [], None)


def _line(x: FloatArray, y: FloatArray, area: float) -> Line:
    x, y = thinned(x, y)
    return Line(x.tolist(), y.tolist(), area)


@dataclass(frozen=True)
class DataSet:
    """The test images of a data set by category."""

    layout: Layout
    root: Path
    categories: Mapping[str, tuple[Sample, ...]]
    masks_without_image: tuple[Path, ...] = ()

    @classmethod
    def read(cls, layout: str, root: Path, categories: Sequence[str] = ()) -> DataSet:
        """Only lists files. Raises `RecipeError` where nothing is there to be tested."""
        kind = layout_of(layout)
        found = kind.read(root, list(categories) or None)
        samples = [sample for sample in found if sample.split == "test"]
        if not samples:
            raise RecipeError(f"'{root}' holds no test images", "Check its split: only test images are evaluated")
        by_category = {name: tuple(group) for name, group in groupby(samples, lambda sample: sample.category)}
        return cls(kind, root, by_category, () if kind.may_be_file else tuple(masks_without_image(found)))

    def words(self, category: str) -> tuple[str, ...]:
        """The defect types of a category: those of its vocabulary, and what else its images show."""
        found = [name for name in names_of(self.categories[category])[1:] if name != SEVERAL]
        return tuple(dict.fromkeys((*self.layout.types_of(category), *found)))


def evaluate(
    subjects: Sequence[Subject],
    data: DataSet,
    *,
    words: Words = "own",
    workers: int = 0,
    folder: Path | None = None,
    on_progress: Progress = lambda step, done, of: None,
) -> list[dict[str, CategoryResult]]:
    """Results by category, for each subject; all subjects see each image in turn, decoded once.

    With `words="dataset"` every category is compared with its own defect types instead of the subject's. Finished
    categories are kept in `folder`. Raises `BackendError`, `RecipeError`, `OutputError`.
    """
    results: list[dict[str, CategoryResult]] = [{} for _ in subjects]
    total, done = sum(map(len, data.categories.values())), 0
    chosen = {category: words_of(data, category, words) for category in data.categories}
    with Loader(workers) as loader:
        for category, samples in data.categories.items():
            for subject in subjects:
                subject.use_words(chosen[category])
            progress = partial(_advance, on_progress, f"evaluating {category}"[:28], done, total)
            for mine, result in zip(results, _category(subjects, samples, loader, folder, progress), strict=True):
                mine[category] = result
            done += len(samples)
    return results


def words_of(data: DataSet, category: str, words: Words) -> tuple[str, ...] | None:
    """What a category is compared with; None means the subject's own words. Raises `RecipeError` for none."""
    if words == "own":
        return None
    found = data.words(category)
    if not found:
        raise RecipeError(
            f"no defect type is known for the category '{category}'", "Leave it out, or use the package's own words"
        )
    if len(found) > MAX_DEFECT_TYPES:
        raise RecipeError(f"'{category}' has {len(found)} defect types", f"Use at most {MAX_DEFECT_TYPES}")
    for word in found:
        check_words(word)
    return found


def _advance(on_progress: Progress, step: str, before: int, total: int, count: int) -> None:
    on_progress(step, before + count, total)


def _category(
    subjects: Sequence[Subject],
    samples: Sequence[Sample],
    loader: Loader,
    folder: Path | None,
    on_image: Callable[[int], None],
) -> list[CategoryResult]:
    """One category: kept results where there are any, the others made and kept."""
    places = [_place(folder, subject, samples) for subject in subjects]
    results = {n: _restored(place) for n, place in enumerate(places)}
    missing = [number for number, result in results.items() if result is None]
    if missing:
        fresh = _evaluated([subjects[number] for number in missing], samples, loader, on_image)
        for number, result in zip(missing, fresh, strict=True):
            results[number] = result
            _keep(places[number], result)
    return [result for result in results.values() if result is not None]


def _evaluated(
    subjects: Sequence[Subject], samples: Sequence[Sample], loader: Loader, on_image: Callable[[int], None]
) -> list[CategoryResult]:
    names = (NORMAL, *names_of(samples)[1:])
    counts = [_Count(Evaluation(s.names), s.decides, _channels_of(names, s.names)) for s in subjects]
    for done, loaded in enumerate(loader.load(samples, names)):
        on_image(done)
        for subject, count in zip(subjects, counts, strict=True):
            started = time.perf_counter()
            count.images.append(_add(subject, count, loaded))
            count.seconds += time.perf_counter() - started
    on_image(len(samples))
    return [count.result() for count in counts]


def _channels_of(names: Sequence[str], words: Sequence[str]) -> NDArray[np.uint8]:
    """The channel among `words` of each of the data set's names; 0 where there is none, which no image uses."""
    return np.array([words.index(name) if name in words else 0 for name in names], np.uint8)


def _add(subject: Subject, count: _Count, loaded: Loaded) -> ImageResult:
    sample = loaded.sample
    if loaded.image is None:
        return ImageResult(str(sample.image), sample.defect, error=str(loaded.error))
    batch = subject.infer(loaded.image)
    anomaly, score = batch.anomaly[0], float(batch.image_scores[0])
    if loaded.types is None:
        count.unmasked += 1
        count.evaluation.add_untyped(anomaly, score, None)
    else:
        truth = types_at(loaded.types, (anomaly.shape[1], anomaly.shape[0]))
        count.regions_lost += regions_lost(loaded.types, truth)
        if sample.is_good or sample.defect in subject.names:
            count.evaluation.add(subject.channels(batch), score, count.channels[truth])
        else:
            count.unnamed[sample.defect] = count.unnamed.get(sample.defect, 0) + 1
            count.evaluation.add_untyped(anomaly, score, truth > 0)
    return ImageResult(str(sample.image), sample.defect, score, float(anomaly.max()), subject.verdict(batch))


def _place(folder: Path | None, subject: Subject, samples: Sequence[Sample]) -> Path | None:
    """Where a category's result is kept; another subject, other files or another version have another place."""
    if folder is None:
        return None
    listed = [str(sample.image) for sample in samples]
    pictures = FileSet(tuple(samples), names_of(samples)).identity
    parts = (subject.identity, pictures, listed, __version__)
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return folder / STATE / f"{re.sub('[^A-Za-z0-9_-]', '_', samples[0].category)[:80]}-{key}.json"


def _keep(place: Path | None, result: CategoryResult) -> None:
    if place is not None:
        write_atomically(place, as_bytes(asdict(result)))


def _restored(place: Path | None) -> CategoryResult | None:
    """A kept result; one that is damaged is made again."""
    if place is None or not place.exists():
        return None
    try:
        return CategoryResult.of_json({**json.loads(place.read_bytes()), "restored": True})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def all_images(results: Mapping[str, CategoryResult]) -> Iterator[tuple[str, ImageResult]]:
    """(category, image) of all categories."""
    for category, result in results.items():
        for image in result.images:
            yield category, image
