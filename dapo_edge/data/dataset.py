"""Labelled image files: where an image and its mask lie, and the picture that they make.

A data set is a list of samples, which are paths only; pixels are read one picture at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dapo_edge.data.pictures import IMAGE_EXTENSIONS, picture_size, read_image, read_mask
from dapo_edge.errors import RecipeError, SourceError, did_you_mean
from dapo_edge.extras import require
from dapo_edge.structures import NORMAL, Picture, Truth

MAX_NAMES = 256  # a type is one byte of a truth
SplitName = Literal["train", "test"]
SEVERAL = "several types"  # the defect of an image whose one mask shows more than one type: no bank has a word for it


@dataclass(frozen=True)
class Sample:
    """One labelled image of a data set, not read yet."""

    image: Path
    mask: Path | None  # None for a good image, and for a defective one without a mask
    category: str
    defect: str  # NORMAL for a good image, SEVERAL where one mask shows more than one type
    split: SplitName

    @property
    def is_good(self) -> bool:
        """Whether nothing on the image is defective."""
        return self.defect == NORMAL


@dataclass(frozen=True)
class FileSet:
    """Samples as a sequence of pictures, which are read when asked for. All have the same `names`."""

    samples: tuple[Sample, ...]
    names: tuple[str, ...]  # row 0 is NORMAL, then the defect types

    def __post_init__(self) -> None:
        check_names(self.names)
        for sample in self.samples:
            _index_of(sample, self.names)

    @property
    def identity(self) -> str:
        """A hash over every file's name, type, size and time of change: other pictures, another identity."""
        digest = hashlib.sha256(repr(self.names).encode())
        for sample in self.samples:
            for path in filter(None, (sample.image, sample.mask)):
                try:
                    status = path.stat()
                    known = (status.st_size, status.st_mtime_ns, os.access(path, os.R_OK))
                except (OSError, ValueError):
                    known = None  # reading it says why
                digest.update(repr((path.name, sample.category, sample.defect, known)).encode())
        return digest.hexdigest()

    @property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """Category and defect of every picture."""
        return tuple((sample.category, sample.defect) for sample in self.samples)

    def title(self, index: int) -> str:
        """The path of a picture."""
        return str(self.samples[index].image)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Picture:
        return read_sample(self.samples[index], self.names)


def names_of(samples: Iterable[Sample]) -> tuple[str, ...]:
    """NORMAL, then every defect type that occurs, in alphabetical order."""
    return (NORMAL, *sorted({sample.defect for sample in samples if not sample.is_good}))


def read_sample(sample: Sample, names: Sequence[str]) -> Picture:
    """The picture of a sample; the pixels of its mask that are above 0 have its defect's index in `names`.

    Raises `SourceError` when a file can't be read, or when the mask is missing, all black or of another size, and
    `RecipeError` when the sample's defect is not among the names.
    """
    check_names(names)
    index = _index_of(sample, names)
    image = read_image(sample.image)
    types = np.zeros(image.shape[:2], np.uint8)
    if not sample.is_good:
        types[_defective(sample, types.shape)] = index
    return Picture(image, Truth(types, tuple(names)))


def masks_without_image(samples: Iterable[Sample]) -> list[Path]:
    """Pictures that lie among the masks of some samples and belong to none: their images got lost."""
    known: set[Path] = set()
    folders: set[Path] = set()
    for sample in samples:
        known.update(filter(None, (sample.image, sample.mask)))
        if sample.mask and sample.mask.parent != sample.image.parent:
            folders.add(sample.mask.parent)
    found = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    return sorted(
        path
        for path in found
        if path not in known and path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
    )


def types_at(types: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """True types [H, W] at (width, height), from the nearest pixel. A type all of whose specks fall between the sampled
    pixels keeps those that it touches; specks beside a larger region of their type may get lost (`regions_lost`)."""
    cv2, (width, height) = require("cv2"), size
    found: NDArray[np.uint8] = cv2.resize(types, size, interpolation=cv2.INTER_NEAREST_EXACT)
    for kind in set(np.unique(types).tolist()) - set(np.unique(found).tolist()):
        rows, columns = np.nonzero(types == kind)
        found[rows * height // types.shape[0], columns * width // types.shape[1]] = kind
    return found


def regions_lost(types: NDArray[np.uint8], found: NDArray[np.uint8]) -> int:
    """How many 8-connected regions of true types have no pixel in `found`, which `types_at` made of them."""
    if not types.any():
        return 0
    (height, width), (h, w) = types.shape, found.shape
    count, labels = require("cv2").connectedComponents((types > 0).view(np.uint8), connectivity=8)
    rows = ((np.arange(h) + 0.5) * height / h).astype(np.intp)
    columns = ((np.arange(w) + 0.5) * width / w).astype(np.intp)
    missing = set(range(1, count)) - set(np.unique(labels[np.ix_(rows, columns)]).tolist())

    def is_rescued(label: int) -> bool:
        y, x = np.nonzero(labels == label)
        return bool(found[y * h // height, x * w // width].any())

    return sum(not is_rescued(label) for label in missing)


def check_samples(samples: Sequence[Sample]) -> None:
    """Raise `RecipeError` unless there are images, and good and defective ones in every category."""
    if not samples:
        raise RecipeError("the data set holds no images", "Check its folder, its layout and the categories asked for")
    kinds: dict[str, set[bool]] = {}
    for sample in samples:
        kinds.setdefault(sample.category, set()).add(sample.is_good)
    for category, found in kinds.items():
        if len(found) < 2:
            missing, there = ("defective", "good") if True in found else ("good", "defective")
            raise RecipeError(
                f"the category '{category}' has {there} images but no {missing} ones",
                "Both are needed to tell them apart: add some, or leave the category out",
            )


def check_files(samples: Iterable[Sample]) -> None:
    """Raise `SourceError` for a file that is not there, a defective image without a mask, or a mask of another size.

    Looks at headers only, so that hours of work do not end at a file that could have been named at once.
    """
    for sample in samples:
        size = picture_size(sample.image)
        if not sample.is_good:
            if sample.mask is None:
                raise _no_mask(sample)
            _check_there(sample)
            found = picture_size(sample.mask, "mask")
            if found != size:
                raise _other_size(sample.mask, found, size)


def check_names(names: Sequence[str]) -> None:
    """Raise `RecipeError` unless these can name the types of a truth."""
    if not names or names[0] != NORMAL:
        raise RecipeError(f"the names {', '.join(names) or '(none)'} don't begin with '{NORMAL}'", "Put it first")
    if len(set(names)) < len(names):
        raise RecipeError(f"a name is twice in {', '.join(names)}", "Name every type once")
    if len(names) > MAX_NAMES:
        raise RecipeError(f"there are {len(names) - 1} defect types", f"Use at most {MAX_NAMES - 1}")


def _index_of(sample: Sample, names: Sequence[str]) -> int:
    if sample.defect not in names:
        hint = did_you_mean(sample.defect, names[1:], cutoff=0.6)
        raise RecipeError(
            f"'{sample.image}' shows '{sample.defect}', which is not among the names",
            f"{hint}Named are: {', '.join(names)}",
        )
    return names.index(sample.defect)


def _defective(sample: Sample, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask of a defective sample, [H, W] bool with at least one pixel set."""
    if sample.mask is None:
        raise _no_mask(sample)
    _check_there(sample)
    mask = read_mask(sample.mask)
    if mask.shape != shape:
        raise _other_size(sample.mask, mask.shape[::-1], shape[::-1])
    if not mask.any():
        raise SourceError(
            f"the mask '{sample.mask}' is all black, but '{sample.image}' counts as '{sample.defect}'",
            "Mark the defect in white, or move the image to the good ones",
        )
    return mask


def _check_there(sample: Sample) -> None:
    try:
        is_there = sample.mask is None or sample.mask.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"the mask '{sample.mask}' can't be read ({reason})", "Check the path") from error
    if not is_there:
        raise SourceError(
            f"the mask '{sample.mask}' of '{sample.image}' does not exist",
            "Save it there, as PNG whose defective pixels are white, or leave the image out",
        )


def _no_mask(sample: Sample) -> SourceError:
    return SourceError(
        f"the image '{sample.image}' shows '{sample.defect}' but has no mask",
        "Add a mask of the image's size whose defective pixels are white, or leave the image out",
    )


def _other_size(mask: Path, found: tuple[int, ...], wanted: tuple[int, ...]) -> SourceError:
    """Sizes are (width, height)."""
    return SourceError(
        f"the mask '{mask}' is {found[0]}x{found[1]}, its image {wanted[0]}x{wanted[1]}",
        "Save both in the same size; masks are not resized, that would move edges",
    )
