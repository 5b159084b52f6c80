"""How good packages and recipes are on a data set: every test image once, category by category, in constant memory.

A category's result is kept as soon as it is complete, so a stopped evaluation goes on. Nothing here imports torch: a
package is evaluated on the device that runs it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from dapo_edge import __version__
from dapo_edge.data.dataset import SEVERAL, FileSet, Sample, masks_without_image, names_of, types_at
from dapo_edge.data.layouts import Layout, layout_of
from dapo_edge.data.loading import Loaded, Loader
from dapo_edge.errors import RecipeError
from dapo_edge.evaluation.metrics import Evaluation
from dapo_edge.evaluation.subject import Subject
from dapo_edge.files import write_atomically
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


@dataclass(eq=False)
class CategoryResult:
    """One category, by one subject."""

    evaluation: Evaluation
    images: list[ImageResult] = field(default_factory=list)
    unnamed: dict[str, int] = field(default_factory=dict)  # images by defect that the bank has no word for
    unmasked: int = 0  # defective images without a mask: they count in image metrics only
    seconds: float = 0.0

    @property
    def failed(self) -> list[ImageResult]:
        """Images that could not be used."""
        return [result for result in self.images if result.error]


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
        return cls(kind, root, by_category, tuple(masks_without_image(found)))

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
    with Loader(workers) as loader:
        for category, samples in data.categories.items():
            for subject in subjects:
                subject.use_words(_words_of(data, category) if words == "dataset" else None)
            progress = partial(_advance, on_progress, f"evaluating {category}"[:28], done, total)
            for mine, result in zip(results, _category(subjects, samples, loader, folder, progress), strict=True):
                mine[category] = result
            done += len(samples)
    return results


def _advance(on_progress: Progress, step: str, before: int, total: int, count: int) -> None:
    on_progress(step, before + count, total)


def _words_of(data: DataSet, category: str) -> tuple[str, ...]:
    words = data.words(category)
    if not words:
        raise RecipeError(
            f"no defect type is known for the category '{category}'", "Leave it out, or use the package's own words"
        )
    return words


def _category(
    subjects: Sequence[Subject],
    samples: Sequence[Sample],
    loader: Loader,
    folder: Path | None,
    on_image: Callable[[int], None],
) -> list[CategoryResult]:
    """One category: kept results where there are any, the others made and kept."""
    places = [_place(folder, subject, samples) for subject in subjects]
    results = {n: _restored(place, subjects[n]) for n, place in enumerate(places)}
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
    results = [CategoryResult(Evaluation(subject.names)) for subject in subjects]
    names = (NORMAL, *names_of(samples)[1:])
    for number, loaded in enumerate(loader.load(samples, names)):
        on_image(number)
        for subject, result in zip(subjects, results, strict=True):
            started = time.perf_counter()
            result.images.append(_count(subject, result, loaded, names))
            result.seconds += time.perf_counter() - started
    on_image(len(samples))
    return results


def _count(subject: Subject, result: CategoryResult, loaded: Loaded, names: Sequence[str]) -> ImageResult:
    sample = loaded.sample
    if loaded.image is None:
        return ImageResult(str(sample.image), sample.defect, error=str(loaded.error))
    batch = subject.infer(loaded.image)
    anomaly, score = batch.anomaly[0], float(batch.image_scores[0])
    truth = None
    if loaded.types is not None:
        truth = types_at(loaded.types, (anomaly.shape[1], anomaly.shape[0]))
    if truth is None:
        result.unmasked += 1
        result.evaluation.add_untyped(anomaly, score, None)
    elif sample.is_good or sample.defect in subject.names:
        own = np.array([subject.names.index(name) if name in subject.names else 0 for name in names], np.uint8)
        result.evaluation.add(subject.channels(batch), score, own[truth])
    else:
        result.unnamed[sample.defect] = result.unnamed.get(sample.defect, 0) + 1
        result.evaluation.add_untyped(anomaly, score, truth > 0)
    return ImageResult(str(sample.image), sample.defect, score, float(anomaly.max()), subject.verdict(batch))


def _place(folder: Path | None, subject: Subject, samples: Sequence[Sample]) -> Path | None:
    """Where a category's result is kept; another subject, other files or another version have another place."""
    if folder is None:
        return None
    listed = [str(sample.image) for sample in samples]
    pictures = FileSet(tuple(samples), names_of(samples)).identity
    parts = (subject.identity, pictures, listed, __version__)
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return folder / STATE / f"{re.sub('[^A-Za-z0-9_-]', '_', samples[0].category)[:80]}-{key}.npz"


def _keep(place: Path | None, result: CategoryResult) -> None:
    if place is None:
        return
    rest = {
        "images": [asdict(image) for image in result.images],
        "unnamed": result.unnamed,
        "unmasked": result.unmasked,
        "seconds": result.seconds,
    }
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(rest).encode(), np.uint8)
    np.savez_compressed(buffer, rest=text, **result.evaluation.state())  # type: ignore[arg-type]
    write_atomically(place, buffer.getvalue())


def _restored(place: Path | None, subject: Subject) -> CategoryResult | None:
    """A kept result; one that is damaged is made again."""
    if place is None or not place.exists():
        return None
    try:
        with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as arrays:
            rest = json.loads(arrays["rest"].tobytes())
            evaluation = Evaluation.of_state(subject.names, arrays)
        images = [ImageResult(**image) for image in rest.pop("images")]
        return CategoryResult(evaluation, images, **rest)
    except MemoryError:
        raise
    except Exception:  # a damaged archive fails in any way it likes
        return None


def all_images(results: Mapping[str, CategoryResult]) -> Iterator[tuple[str, ImageResult]]:
    """(category, image) of all categories."""
    for category, result in results.items():
        for image in result.images:
            yield category, image
