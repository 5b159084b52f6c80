"""Generated data sets on disk, in the exact layout of a public one, for tests and demonstrations without downloads.

Categories are the materials of the generated world. Equal arguments write equal bytes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.data.brushes import cv2
from dapo_edge.data.dataset import SplitName
from dapo_edge.data.flaws import DEFECTS
from dapo_edge.data.layouts import TABLE, layout_of
from dapo_edge.data.materials import MATERIALS
from dapo_edge.data.protocol import FREE_FROM
from dapo_edge.data.surfaces import check_world, make_surface, stream
from dapo_edge.errors import OutputError, RecipeError
from dapo_edge.structures import NORMAL, Picture

MAX_IMAGES, MAX_PICTURE_PX = 1_000_000, 1 << 24  # above, a picture takes gigabytes while it is drawn
MIN_IMAGES = 3  # of a category: good ones to train and to test, and a defective one
TRAIN_SHARE, GOOD_SHARE = 0.3, 0.2  # the rest of a category is defective
# Beyond the numbers that training and its tests use, so that a written set repeats none of their pictures.
SEEDS = (FREE_FROM, 2**62)
_TIMESTAMP = "20240101000000"  # stands in Real-IAD's file names

OnImage = Callable[[int, int], object]


@dataclass(frozen=True)
class Order:
    """One image to be drawn, and its numbers within the set."""

    material: str
    material_number: int  # from 1
    defect: str  # NORMAL for a good image
    split: SplitName
    number: int  # from 0, among the category's images of the same split and defect
    serial: int  # from 0, among the category's good or defective images

    @property
    def category(self) -> str:
        """The folder's name."""
        return _slug(self.material)

    @property
    def kind(self) -> str:
        """The defect as a folder's name."""
        return "good" if self.defect == NORMAL else _slug(self.defect)


@dataclass(frozen=True)
class Place:
    """Where an image and its mask go, below the root."""

    image: str
    mask: str  # written for defective images only


@dataclass(frozen=True)
class Summary:
    """What was written."""

    out: str
    layout: str
    seed: int
    size: tuple[int, int]  # width, height in pixels
    train: int  # images, all good
    test_good: int
    test_defective: int
    categories: Mapping[str, int]  # images of each
    types: Mapping[str, int]  # images of each defect type

    @property
    def images(self) -> int:
        """Number of images."""
        return self.train + self.test_good + self.test_defective

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"images": self.images, **asdict(self)}


def write_dataset(
    out: Path,
    layout: str,
    images: int,
    seed: int = 0,
    *,
    size: tuple[int, int] = (256, 256),
    on_image: OnImage = lambda done, of: None,
) -> Summary:
    """Write `images` generated images of `size` (width, height), with masks, into the new or empty folder `out`.

    They are spread evenly over the materials, or over as many as get three images. In every category some good images
    are for training, the others and the defective ones, of one type each, for testing; a plain folder has no
    training part. Raises `RecipeError` for arguments that can't be met, `OutputError` when `out` holds something or
    can't be written; then nothing is left behind.
    """
    writer = WRITERS[layout_of(layout).name]
    orders = _plan(images, writer.has_train)
    check_world(seed, size, tuple(MATERIALS), tuple(DEFECTS), 0, 1)
    if size[0] * size[1] > MAX_PICTURE_PX:
        raise RecipeError(f"images of {size[0]}x{size[1]} are too large", f"Use at most {MAX_PICTURE_PX} pixels")
    out = Path(os.path.realpath(out))
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"'{out}' exists and is not an empty folder", "Name a new folder; nothing is overwritten")
        out.parent.mkdir(parents=True, exist_ok=True)
        # Inside a folder that is there already: it may be somebody's current one, or a disk of its own.
        draft = (out if out.exists() else out.parent) / f".{secrets.token_hex(4)}.partial"
        draft.mkdir()
        try:
            _write_all(draft, orders, writer, seed, size, on_image)
            if out.exists():
                for entry in list(draft.iterdir()):
                    entry.rename(out / entry.name)
            else:
                draft.rename(out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise OutputError.refused(out, error) from error
    return _summary(out, layout, orders, seed, size)


def _plan(images: int, has_train: bool) -> list[Order]:
    """The images of a set, category by category."""
    if images < MIN_IMAGES:
        raise RecipeError(
            f"a data set of {images} images is too small", f"Use at least {MIN_IMAGES}: good ones and a defective one"
        )
    if images > MAX_IMAGES:
        raise RecipeError(f"a data set of {images} images is too large", f"Write at most {MAX_IMAGES} at a time")
    categories = min(len(MATERIALS), images // MIN_IMAGES)
    defects = tuple(DEFECTS)
    orders: list[Order] = []
    drawn = 0  # goes on from category to category, so that a small set has many types too
    for index, material in enumerate(list(MATERIALS)[:categories]):
        count = images // categories + (index < images % categories)
        train = max(1, int(TRAIN_SHARE * count)) if has_train else 0
        good = max(1, int(GOOD_SHARE * count)) if has_train else count // 2
        splits: list[tuple[SplitName, str]] = [("train", NORMAL) for _ in range(train)]
        splits += [("test", NORMAL) for _ in range(good)]
        for _ in range(count - train - good):
            splits.append(("test", defects[drawn % len(defects)]))
            drawn += 1
        orders += _numbered(material, index + 1, splits)
    return orders


def _numbered(material: str, material_number: int, images: Sequence[tuple[SplitName, str]]) -> Iterator[Order]:
    numbers: Counter[tuple[str, str]] = Counter()
    serials: Counter[bool] = Counter()
    for split, defect in images:
        is_good = defect == NORMAL
        yield Order(material, material_number, defect, split, numbers[split, defect], serials[is_good])
        numbers[split, defect] += 1
        serials[is_good] += 1


def _write_all(
    root: Path, orders: Sequence[Order], writer: Writer, seed: int, size: tuple[int, int], on_image: OnImage
) -> None:
    for index, order in enumerate(orders):
        picture = _draw(order, stream(seed, index), size)
        place = writer.place(order)
        _write_image(root / place.image, picture.image)
        if order.defect != NORMAL:
            _write_image(root / place.mask, picture.mask * np.uint8(255))
        on_image(index + 1, len(orders))
    for name, text in writer.index(orders).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def _draw(order: Order, rng: np.random.Generator, size: tuple[int, int]) -> Picture:
    """A good picture, or one on which the defect is visible."""
    defects = () if order.defect == NORMAL else (order.defect,)
    while True:
        good_share = 0 if defects else 1
        picture = make_surface(
            int(rng.integers(*SEEDS)), size, materials=(order.material,), defects=defects, good_share=good_share
        )
        if picture.defects == defects:
            return picture


def _write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """BGR or grey, in the format of the path's extension."""
    done, data = cv2().imencode(path.suffix.lower(), image)
    if not done:
        raise OutputError(f"'{path}' can't be encoded", "Use another image size")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())


def _summary(out: Path, layout: str, orders: Sequence[Order], seed: int, size: tuple[int, int]) -> Summary:
    train = sum(order.split == "train" for order in orders)
    types = Counter(order.defect for order in orders if order.defect != NORMAL)
    return Summary(
        out=str(out),
        layout=layout,
        seed=seed,
        size=size,
        train=train,
        test_good=len(orders) - train - types.total(),
        test_defective=types.total(),
        categories=dict(Counter(order.category for order in orders)),
        types={name: types[name] for name in DEFECTS if name in types},
    )


def _slug(name: str) -> str:
    return name.replace(" ", "_")


def _mvtec_place(order: Order) -> Place:
    return Place(
        f"{order.category}/{order.split}/{order.kind}/{order.number:03d}.png",
        f"{order.category}/ground_truth/{order.kind}/{order.number:03d}_mask.png",
    )


def _mad_place(order: Order) -> Place:
    """MAD-Sim: numbered categories, numbers without zeros."""
    category = f"{order.material_number:02d}{order.category}"
    return Place(
        f"{category}/{order.split}/{order.kind}/{order.number}.png",
        f"{category}/ground_truth/{order.kind}/{order.number}_mask.png",
    )


def _folder_place(order: Order) -> Place:
    name = f"{order.kind}/{order.number:03d}.png"
    return Place(f"{order.category}/{name}", f"{order.category}/masks/{name}")


def _csv_place(order: Order) -> Place:
    name = f"{order.category}/{order.split}_{order.kind}_{order.number:03d}.png"
    return Place(f"images/{name}", f"masks/{name}")


def _csv_index(orders: Sequence[Order]) -> dict[str, str]:
    """The table that names everything."""
    rows = [("image", "type", "mask", "category", "split")]
    for order in orders:
        place, is_good = _csv_place(order), order.defect == NORMAL
        kind, mask = ("", "") if is_good else (order.defect, place.mask)
        rows.append((place.image, kind, mask, order.category, order.split))
    return {TABLE: _csv_text(rows)}


def _visa_place(order: Order) -> Place:
    kind, number = ("Normal", f"{order.serial:04d}") if order.defect == NORMAL else ("Anomaly", f"{order.serial:03d}")
    return Place(
        f"{order.category}/Data/Images/{kind}/{number}.JPG", f"{order.category}/Data/Masks/{kind}/{number}.png"
    )


def _real_iad_place(order: Order) -> Place:
    """Below the category's folder of images; one camera."""
    code, folder = ("OK", "OK") if order.defect == NORMAL else (f"NG_{order.kind}", f"NG/{order.kind}")
    number = f"{order.serial + 1:04d}"
    name = f"realiad_1024/{order.category}/{folder}/S{number}/{order.category}_{number}_{code}_C1_{_TIMESTAMP}"
    return Place(f"{name}.jpg", f"{name}.png")


def _no_index(orders: Sequence[Order]) -> dict[str, str]:
    return {}


def _visa_index(orders: Sequence[Order]) -> dict[str, str]:
    """The official split, and each category's annotation."""
    splits, files = [], {}
    for category, members in groupby(orders, lambda order: order.category):
        labels = []
        for order in members:
            place, is_good = _visa_place(order), order.defect == NORMAL
            mask = "" if is_good else place.mask
            splits.append((category, order.split, NORMAL if is_good else "anomaly", place.image, mask))
            labels.append((place.image, order.defect, mask))
        files[f"{category}/image_anno.csv"] = _csv_text([("image", "label", "mask"), *labels])
    header = ("object", "split", "label", "image", "mask")
    return {"split_csv/1cls.csv": _csv_text([header, *splits]), **files}


def _csv_text(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _real_iad_index(orders: Sequence[Order]) -> dict[str, str]:
    """A JSON file per category."""
    files = {}
    for category, members in groupby(orders, lambda order: order.category):
        lists: dict[str, list[dict[str, str | None]]] = {"train": [], "test": []}
        for order in members:
            place, is_good = _real_iad_place(order), order.defect == NORMAL
            folder = f"realiad_1024/{category}/"
            lists[order.split].append(
                {
                    "category": category,
                    "anomaly_class": "OK" if is_good else order.kind,
                    "image_path": place.image.removeprefix(folder),
                    "mask_path": None if is_good else place.mask.removeprefix(folder),
                }
            )
        content = {"meta": {"prefix": f"{category}/", "normal_class": "OK"}, **lists}
        files[f"realiad_jsons/{category}.json"] = json.dumps(content, indent=1) + "\n"
    return files


@dataclass(frozen=True)
class Writer:
    """How images are laid out as one data set."""

    place: Callable[[Order], Place]
    index: Callable[[Sequence[Order]], dict[str, str]] = _no_index  # text files by their names below the root
    has_train: bool = True


WRITERS = {
    "mvtec_ad": Writer(_mvtec_place),
    "visa": Writer(_visa_place, _visa_index),
    "mpdd": Writer(_mvtec_place),
    "mad": Writer(_mad_place),
    "real_iad": Writer(_real_iad_place, _real_iad_index),
    "folder": Writer(_folder_place, has_train=False),
    "csv": Writer(_csv_place, _csv_index),
}
