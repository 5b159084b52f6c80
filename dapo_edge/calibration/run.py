"""Calibration from recipe to ranges: pick frames, run them through the encoder, warn when they won't do."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dapo_edge import __version__
from dapo_edge.backends.onnx_graph import IMAGE, read_plain
from dapo_edge.backends.onnx_linears import weights_digest
from dapo_edge.calibration.frames import OFFERED_PER_FRAME, Recording, Usable, advise, calibration_frames, check_enough
from dapo_edge.calibration.measure import Embedder, Measured, measure_ranges
from dapo_edge.calibration.ranges import ActivationRanges, CalibrationFrames
from dapo_edge.calibration.subset import Resized, diverse_subset
from dapo_edge.config import Calibration, Recipe
from dapo_edge.engine.export import export_encoder
from dapo_edge.errors import RecipeError
from dapo_edge.models.method import Method, method_class, method_of
from dapo_edge.package import Preprocessing

# Mean cosine between the image embeddings of two frames above which they count as pictures of one part. In surface-tiny
# one part with other noise, light and 2 px of play has 0.994 and more, good parts of one material at most 0.987.
ONE_PART_COSINE = 0.99

Progress = Callable[[str, int, int], None]  # step in words, done, of (0: nobody knows)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderUnderTest:
    """An exported encoder, with what it takes to run the line's frames through it."""

    model: bytes  # portable ONNX, FP32
    preprocessing: Preprocessing
    backbone: str  # in words

    @classmethod
    def of(cls, method: Method, model: bytes) -> EncoderUnderTest:
        """The exported encoder of a method."""
        return cls(model, method.clip.preprocessing, method.clip.name)


def calibrate(recipe: Recipe, on_progress: Progress = lambda step, done, of: None) -> ActivationRanges:
    """Measure the activation ranges of the recipe's encoder over the recipe's calibration frames.

    Raises `RecipeError` for frames that are missing or too few, `SourceError` for those that can't be opened,
    `GateError` for activations that are no numbers, and what loading the backbone raises.
    """
    method_class(recipe.method)
    recording = recording_of(recipe.calibration, recipe.seed)  # before minutes are spent on the backbone
    on_progress("loading the backbone", 0, 1)
    method = method_of(recipe)
    with tempfile.TemporaryDirectory(prefix="dapo-edge-") as folder:
        on_progress("exporting the encoder", 0, 1)
        path = Path(folder) / "encoder.onnx"
        export_encoder(method, path, recipe.batch)
        encoder = EncoderUnderTest.of(method, path.read_bytes())
    return ranges_over(recording, encoder, recipe.calibration.count, on_progress)


def recording_of(settings: Calibration, seed: int) -> Recording:
    """The frames that a recipe calibrates on. Raises `RecipeError`, or `SourceError` for what can't be opened."""
    if settings.frames is None:
        raise RecipeError(
            "the recipe names no calibration frames",
            "Set calibration.frames to a folder or video of the running line, or 'synthetic', also beside "
            "calibration.ranges: scales are compared by their maps; dapo-edge calibrate also takes --frames",
        )
    recording = calibration_frames(settings.frames, settings.count, seed, spare=OFFERED_PER_FRAME)
    if recording.length is not None:
        check_enough(recording.length, f"'{recording.source}' holds {recording.length} frames")
    return recording


def ranges_over(
    recording: Recording,
    encoder: EncoderUnderTest,
    count: int,
    on_progress: Progress = lambda step, done, of: None,
) -> ActivationRanges:
    """Measure an exported encoder over at most `count` frames of a recording; of more, a diverse subset is picked.

    Raises as `calibrate`.
    """
    graph = read_plain(encoder.model)
    batch, _, size, _ = graph.shapes[IMAGE]
    digest = weights_digest(graph)
    del graph  # as large as the encoder
    usable = Usable(size)
    views: Iterable[Resized] = usable.enough_of(recording)
    expected = recording.length or 0
    if recording.length is None or recording.length > count:
        offered = _counted(views, "picking frames", expected, on_progress)
        views = picked = _picked(offered, count, encoder)
        expected = len(picked)
    views = _counted(views, "measuring activations", expected, on_progress)
    measured = measure_ranges(encoder.model, encoder.preprocessing, views, size)
    advise(recording.source, measured.frames)
    _check_variety(recording.source, measured)
    return ActivationRanges(
        weights=digest,
        backbone=encoder.backbone,
        batch=batch,
        image_size=size,
        frames=CalibrationFrames(
            source=recording.source,
            offered=usable.offered,
            used=measured.frames,
            unreadable=usable.unreadable,
            constant=usable.constant,
            not_picked=usable.count - measured.frames,
            similarity=round(measured.similarity, 4),
        ),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions=_versions(),
        linears=measured.linears,
    )


def _versions() -> dict[str, str]:
    packages = ("openvino", "numpy", "pillow")
    return {"dapo-edge": __version__, **{package: importlib.metadata.version(package) for package in packages}}


def _picked(offered: Iterable[Resized], count: int, encoder: EncoderUnderTest) -> list[Resized]:
    """In a function of its own, so that this compiled encoder is gone before the next one is made."""
    embedder = Embedder(encoder.model, encoder.preprocessing)
    return diverse_subset(offered, count, embedder, embedder.batch)


def _counted(views: Iterable[Resized], step: str, of: int, on_progress: Progress) -> Iterator[Resized]:
    """The views, each of them reported when the next one is asked for: then its work is done."""
    on_progress(step, 0, of)
    for done, view in enumerate(views, start=1):
        yield view
        on_progress(step, done, of)


def _check_variety(source: str, measured: Measured) -> None:
    if measured.similarity > ONE_PART_COSINE:
        log.warning(
            "the %d frames of '%s' look like one and the same part (mean cosine %.3f): ranges fit that part only; "
            "record many parts, of every kind and position that the line shows",
            measured.frames,
            source,
            measured.similarity,
        )
