"""The held-out frames of the accuracy gate, with what is really on them as far as anybody knows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dapo_edge.config import Gate
from dapo_edge.data.dataset import Sample, names_of
from dapo_edge.data.loading import Loaded, Loader
from dapo_edge.data.pictures import read_image
from dapo_edge.engine.frames import generated, images_below, spread
from dapo_edge.errors import RecipeError, SourceError
from dapo_edge.evaluation.evaluate import DataSet
from dapo_edge.structures import Picture, Truth

SHOWN = 3  # files that an error names

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class GateFrame:
    """One frame and its labels."""

    view: NDArray[np.uint8]  # [H, W, 3] BGR
    title: str  # its path, or what generated it
    defective: bool | None = None  # None: nobody knows
    truth: Truth | None = None  # [H, W]; None: nobody knows where it is defective


@dataclass(frozen=True)
class GateFrames:
    """A known number of frames, made or read one at a time: hundreds of camera frames do not fit into memory."""

    count: int
    labelled: bool  # whether every frame has at least a label for the whole image
    load: Callable[[int], GateFrame]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> GateFrame:
        """Frame `index` from 0 on; asking for the same one again costs nothing."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.load(index)

    def __iter__(self) -> Iterator[GateFrame]:
        return (self.load(index) for index in range(self.count))

    @property
    def views(self) -> Iterator[NDArray[np.uint8]]:
        """The pictures alone, in order; while one is looked at, `self[index]` is at hand with its labels."""
        return (frame.view for frame in self)


def gate_frames(gate: Gate, count: int, seed: int) -> GateFrames:
    """At most `count` frames of the recipe's origin, or exactly `count` generated ones from world number `seed` on.

    Of a data set, the frames are test images: half of them defective where there are enough, evenly spread over
    categories and types. Files that can't be used are named in the log and left out, so all are read once before the
    first frame is given. Raises `RecipeError` where nothing is there in the layout that was named, and `SourceError`
    for a folder without images, labels whose images are missing, and when fewer than half of the files can be used.
    """
    check_gate_frames(gate)
    draw = generated(gate.frames, good_only=False, seed=seed)
    if draw is not None:
        return _frames(range(count), True, lambda index: _of_picture(draw(index), f"{gate.frames}, picture {index}"))
    if gate.layout is not None:
        return _of_data_set(DataSet.read(gate.layout, Path(gate.frames)), count)

    def read(path: Path) -> GateFrame:
        return GateFrame(read_image(path), str(path))

    return _frames(_usable(spread(images_below(gate.frames), count), read, gate.frames), False, read)


def check_gate_frames(gate: Gate) -> None:
    """Raise what `gate_frames` would raise, as far as it shows before any picture is read."""
    is_generated = generated(gate.frames, good_only=False, seed=0) is not None
    if is_generated and gate.layout is not None:
        raise RecipeError(
            f"gate.layout is '{gate.layout}', but the frames '{gate.frames}' are generated",
            "Leave gate.layout out, or name the folder of a data set under gate.frames",
        )
    if gate.layout is not None:
        _check_images(DataSet.read(gate.layout, Path(gate.frames)))
    elif not is_generated:
        images_below(gate.frames)


def _frames(items: Sequence[T], labelled: bool, read: Callable[[T], GateFrame]) -> GateFrames:
    return GateFrames(len(items), labelled, lru_cache(maxsize=1)(lambda index: read(items[index])))


def _of_picture(picture: Picture, title: str) -> GateFrame:
    return GateFrame(picture.image, title, bool(picture.mask.any()), picture.truth)


def _of_data_set(data: DataSet, count: int) -> GateFrames:
    samples = _samples(data)
    names = names_of(samples)

    def read(sample: Sample) -> GateFrame:
        return _of_loaded(next(Loader().load([sample], names)), names)

    usable = _usable(_both_kinds(samples, count), read, str(data.root))
    if len({sample.is_good for sample in usable}) < 2:
        there = "good" if usable[0].is_good else "defective"
        log.warning(
            "the accuracy gate has only %s parts from '%s': AUROC needs both kinds and is not compared",
            there,
            data.root,
        )
    return _frames(usable, True, read)


def _of_loaded(loaded: Loaded, names: tuple[str, ...]) -> GateFrame:
    if loaded.image is None:
        assert loaded.error is not None
        raise loaded.error
    truth = None if loaded.types is None else Truth(loaded.types, names)
    return GateFrame(loaded.image, str(loaded.sample.image), not loaded.sample.is_good, truth)


def _samples(data: DataSet) -> list[Sample]:
    return [sample for category in data.categories.values() for sample in category]


def _check_images(data: DataSet) -> None:
    """Raise `SourceError` for labels that belong to no image: half a copy of a data set would judge something else."""
    missing = [sample.image for sample in _samples(data) if not _is_there(sample.image)]
    lost = ((missing, "images are listed and not there"), (data.masks_without_image, "masks belong to no image"))
    for paths, what in lost:
        if paths:
            shown = ", ".join(f"'{path}'" for path in paths[:SHOWN])
            raise SourceError(
                f"'{data.root}' has labels without images: {len(paths)} {what}, first {shown}",
                "Copy the images again, or delete their labels",
            )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return True  # reading it says what is wrong


def _both_kinds(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` samples, half of them good where there are enough of both, in a mixed order."""
    good = [sample for sample in samples if sample.is_good]
    bad = [sample for sample in samples if not sample.is_good]
    bad.sort(key=lambda sample: (sample.category, sample.defect))
    of_good = min(len(good), max(count // 2, count - len(bad)))
    chosen = spread(good, of_good) + spread(bad, count - of_good)
    # A few evenly spread ones stand for all in the package's reference data: they should not be of one kind.
    return [chosen[place] for place in np.random.default_rng(0).permutation(len(chosen))]


def _usable(items: Sequence[T], read: Callable[[T], GateFrame], origin: str) -> list[T]:
    """Those that can be read. Raises `SourceError` when these are fewer than half."""
    found, errors = [], []
    for item in items:
        try:
            read(item)
            found.append(item)
        except SourceError as error:
            errors.append(error)
            log.warning("left out of the accuracy gate: %s", error)
    if 2 * len(found) < len(items):
        shown = "; ".join(error.cause for error in errors[:SHOWN])
        raise SourceError(
            f"only {len(found)} of {len(items)} frames in '{origin}' can be used: {shown}",
            "Mend the files, or name others under gate.frames",
        )
    return found
