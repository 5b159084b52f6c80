"""The public data sets as they lie on disk, and plain folders, read as lists of samples: paths and names, no pixels.

Every set has words of its own for the same defects. `defects/<layout>.yaml` binds them to the names of types, always by
name; a label that stands in no file keeps its own name.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dapo_edge.data.dataset import SEVERAL, Sample, SplitName
from dapo_edge.data.pictures import IMAGE_EXTENSIONS
from dapo_edge.errors import RecipeError, SourceError, did_you_mean
from dapo_edge.structures import NORMAL

GOOD, MASKS, TABLE = "good", "masks", "images.csv"
SPLITS: tuple[SplitName, ...] = ("train", "test")
LINE = " line"  # of a row in its file; no column is called so, because their names are stripped
TABLE_COLUMNS = {"image", "mask", "type", "category", "split"}
LIKELY_COLUMNS = {"label": "type", "class": "type", "defect": "type", "mask_path": "mask", "image_path": "image"}
REAL_IAD_IMAGES = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")  # the first one that is there
REAL_IAD_SPLITS = ("realiad_jsons", "realiad_jsons/realiad_jsons")
REAL_IAD_GOOD = "OK"

_VOCABULARIES = Path(__file__).parent / "defects"


@dataclass(frozen=True)
class Vocabulary:
    """A data set's words: raw label -> type, and product -> types."""

    labels: Mapping[str, str]
    products: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """The vocabulary in a YAML file; none where there is no file."""
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {"types": {}, "products": {}}
        labels = {raw: name for name, raws in content["types"].items() for raw in raws}
        return cls(labels, {product: tuple(types) for product, types in content["products"].items()})

    def type_of(self, label: str) -> str:
        """The type that a raw label or folder name stands for."""
        return self.labels.get(label, " ".join(label.replace("_", " ").split()))


Categories = Sequence[str] | None
Find = Callable[[Path, "Layout", Categories], Iterable[Sample]]


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk."""

    name: str
    find: Find
    expected: str  # below the root, for people
    mask_endings: tuple[str, ...] = ("_mask",)  # what a mask's name may add to its image's name
    may_be_file: bool = False  # whether the root may be the file that lists the images

    def read(self, root: str | Path, categories: Categories = None) -> list[Sample]:
        """All samples below `root`, or those of some categories, sorted by category, split and path.

        Raises `RecipeError` when something is not where this layout has it, or a category is unknown.
        """
        root = Path(root)
        if not (root.is_dir() or (self.may_be_file and root.is_file())):
            raise RecipeError(f"there is no folder '{root}'", f"Name the folder that holds {self.expected}")
        samples = sorted(
            self.find(root, self, categories), key=lambda sample: (sample.category, sample.split, sample.image)
        )
        if not samples:
            raise RecipeError(f"'{root}' holds no images in the layout {self.name}", f"Expected is {self.expected}")
        return samples

    def type_of(self, label: str) -> str:
        """The defect type that a raw label or folder name stands for."""
        return self._vocabulary.type_of(label)

    def types_of(self, product: str) -> tuple[str, ...]:
        """The defect types that are known for a product of this data set; none for a foreign product."""
        return self._vocabulary.products.get(product, ())

    def chosen(self, root: Path, there: Iterable[str], categories: Categories) -> list[str]:
        """The categories to read, out of those that are there."""
        found = sorted(there)
        if not found:
            raise RecipeError(f"'{root}' holds no category in the layout {self.name}", f"Expected is {self.expected}")
        for name in categories or ():
            if name not in found:
                hint = did_you_mean(name, found)
                raise RecipeError(f"'{root}' has no category '{name}'", f"{hint}There are: {', '.join(found)}")
        return [name for name in found if categories is None or name in categories]

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.read(_VOCABULARIES / f"{self.name}.yaml")


def _read_mvtec(
    root: Path, layout: Layout, categories: Categories, category_of: Callable[[str], str] = str
) -> Iterator[Sample]:
    """MVTec AD, and the sets that follow it: train and test, a folder per type, masks in ground_truth."""
    there = {category_of(path.name): path for path in _folders(root) if (path / "test").is_dir()}
    for category in layout.chosen(root, there, categories):
        for split in SPLITS:
            for kind in _folders(there[category] / split):
                masks = None if kind.name == GOOD else there[category] / "ground_truth" / kind.name
                yield from _samples_in(kind, masks, layout, category, split)


def _read_folder(root: Path, layout: Layout, categories: Categories) -> Iterator[Sample]:
    """Good images beside a folder per type. Nothing is for training: all samples are `test`."""
    # Any folder with folders inside: a category without good images is an error to be named, not one to be left out.
    there = {path.name: path for path in _folders(root) if any(_folders(path))}
    if (root / GOOD).is_dir():
        there = {root.resolve().name: root}
    for category in layout.chosen(root, there, categories):
        kinds = {kind.name for kind in _folders(there[category])}
        for masks in _folders(there[category] / MASKS) if MASKS in kinds else ():
            if masks.name not in kinds and _images(masks):
                raise SourceError(
                    f"'{masks}' holds labels without images: there is no folder '{there[category] / masks.name}'",
                    "Copy the images again, or delete their masks",
                )
        for kind in _folders(there[category]):
            if kind.name != MASKS:
                masks = there[category] / MASKS / kind.name
                yield from _samples_in(kind, masks if masks.is_dir() else None, layout, category, "test")


def _samples_in(kind: Path, masks: Path | None, layout: Layout, category: str, split: SplitName) -> Iterator[Sample]:
    defect = NORMAL if kind.name == GOOD else layout.type_of(kind.name)
    for image in _images(kind):
        mask = _mask_of(image, masks, layout.mask_endings) if masks else None
        yield Sample(image, mask, category, defect, split)


def _mask_of(image: Path, folder: Path, endings: Sequence[str]) -> Path:
    """Where the mask lies, or should lie: reading the sample says when it is not there."""
    places = [folder / f"{image.stem}{ending}.png" for ending in endings]
    return next((place for place in places if os.path.exists(place)), places[0])  # noqa: PTH110 (knows no errors)


def _read_visa(root: Path, layout: Layout, categories: Categories) -> Iterator[Sample]:
    """The official one-class split; the category's own annotation lists labels, which may be of more than one type."""
    split_file = root / "split_csv" / "1cls.csv"
    rows = _csv(split_file, "object", "split", "label", "image", "mask")
    for category in layout.chosen(root, {row["object"] for row in rows}, categories):
        annotations = root / category / "image_anno.csv"
        labels = {row["image"]: row["label"] for row in _csv(annotations, "image", "label")}
        for row in rows:
            if row["object"] == category:
                image, defect = _below(root, row["image"], split_file), NORMAL
                if row["label"] != NORMAL:
                    defect = _visa_type(layout, labels, row["image"], annotations)
                mask = _below(root, row["mask"], split_file) if row["mask"] else None
                yield Sample(image, mask, category, defect, _split(row, split_file))


def _visa_type(layout: Layout, labels: Mapping[str, str], image: str, path: Path) -> str:
    types = {layout.type_of(label.strip()) for label in labels.get(image, "").split(",")} - {"", NORMAL}
    if not types:
        raise RecipeError(
            f"'{path}' names no defect for '{image}'", "Restore it and split_csv/1cls.csv from the same release"
        )
    return types.pop() if len(types) == 1 else SEVERAL


def _read_real_iad(root: Path, layout: Layout, categories: Categories) -> Iterator[Sample]:
    """A JSON file per category. A defect that one of the five cameras can't see counts as good in its image."""
    splits = [root / name for name in REAL_IAD_SPLITS if any((root / name).glob("*.json"))]
    images = [root / name for name in REAL_IAD_IMAGES if (root / name).is_dir()]
    if not splits or not images:
        raise RecipeError(f"'{root}' is not in the layout {layout.name}", f"Expected is {layout.expected}")
    there = {path.stem: path for path in splits[0].glob("*.json")}
    for category in layout.chosen(root, there, categories):
        path = there[category]
        content = _json(path)
        for split in SPLITS:
            for entry in content.get(split) or []:
                yield _real_iad_sample(images[0] / category, entry, layout, category, split, path)


def _real_iad_sample(
    folder: Path, entry: Mapping[str, Any], layout: Layout, category: str, split: SplitName, path: Path
) -> Sample:
    try:
        code, image, mask = entry["anomaly_class"], entry["image_path"], entry.get("mask_path")
        defect = NORMAL if code == REAL_IAD_GOOD else layout.type_of(code)
        where = _below(folder, mask, path) if mask and defect != NORMAL else None
        return Sample(_below(folder, image, path), where, category, defect, split)
    except (KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"an entry of '{path}' has no image_path or anomaly_class", "Restore the file from the data set"
        ) from error


def _read_table(root: Path, layout: Layout, categories: Categories) -> Iterator[Sample]:
    """A table of one's own; paths are relative to its folder, or absolute. Only `image` is asked of every row."""
    path = root if root.is_file() else root / TABLE
    rows = _csv(path, "image")
    unknown = {name for name in rows[0] if isinstance(name, str)} - TABLE_COLUMNS - {LINE} if rows else set()
    absent = TABLE_COLUMNS - set(rows[0]) if rows else set()
    for name in sorted(unknown):
        # Other columns are somebody's own business; a misspelt one would be left out in silence.
        meant = LIKELY_COLUMNS.get(name, "")
        hint = f"Did you mean '{meant}'? " if meant in absent else did_you_mean(name, absent, cutoff=0.85)
        if hint:
            raise RecipeError(f"'{path}' has the unknown column '{name}'", f"{hint}Or give it quite another name")
    for row in rows:
        number = row[LINE]
        row.update({column: (cell or "").strip() for column, cell in row.items() if isinstance(column, str)})
        if not row["image"]:
            raise RecipeError(f"line {number} of '{path}' names no image", "Fill it in, or delete the line")
        if row.get("mask") and not row.get("type"):
            raise RecipeError(
                f"line {number} of '{path}' has a mask and no type",
                "Say what the image shows in the column type: 'good', or the defect, for example 'defect'",
            )
        row["category"] = row.get("category") or path.resolve().parent.name
        row["split"] = row.get("split") or "test"
    for category in layout.chosen(root, {row["category"] for row in rows}, categories):
        for row in rows:
            if row["category"] == category:
                label = row.get("type") or GOOD
                defect = NORMAL if label.lower() in (GOOD, NORMAL, "ok") else layout.type_of(label)
                mask = path.parent / row["mask"] if row.get("mask") and defect != NORMAL else None
                yield Sample(path.parent / row["image"], mask, category, defect, _split(row, path))


def _folders(path: Path) -> list[Path]:
    """Visible folders directly inside a folder; none where that is not there."""
    return [entry for entry in _entries(path) if entry.is_dir()] if path.is_dir() else []


def _images(path: Path) -> list[Path]:
    return [entry for entry in _entries(path) if entry.suffix.lower() in IMAGE_EXTENSIONS]


def _entries(path: Path) -> list[Path]:
    """What is visible in a folder, sorted."""
    try:
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise RecipeError(f"'{path}' can't be read ({error.strerror})", "Check its permissions") from error


def _without_number(name: str) -> str:
    """MAD numbers the folders of its simulated toys: 02Unicorn."""
    return re.sub(r"^\d{2}(?=[A-Za-z])", "", name)


def _below(folder: Path, name: str, listed_in: Path) -> Path:
    """A path that a downloaded file names, which must not lead out of the data set."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise RecipeError(f"'{listed_in}' names '{name}', which is outside of the data set", "Restore the file")
    return folder / relative


def _split(row: Mapping[str, str], path: Path) -> SplitName:
    for split in SPLITS:
        if row["split"] == split:
            return split
    raise RecipeError(f"'{path}' has the unknown split '{row['split']}'", f"Known are: {', '.join(SPLITS)}")


def _csv(path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file that has these columns. A cell that is not there is empty."""
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"'{path}' is not a file", "Give a table as CSV")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            if reader.fieldnames:
                reader.fieldnames = [name.strip().lower() for name in reader.fieldnames]
            rows = [{**row, LINE: str(reader.line_num)} for row in reader]
            missing = set(columns) - set(reader.fieldnames or ())
    except UnicodeError as error:
        raise RecipeError(f"'{path}' can't be read: it is not UTF-8", "Save it with that encoding") from error
    except (OSError, csv.Error) as error:
        raise _unreadable(path, error) from error
    if missing:
        raise RecipeError(
            f"'{path}' lacks the column {', '.join(sorted(missing))}",
            f"Its first line should name {','.join(columns)}, separated by commas",
        )
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict) or not any(isinstance(content.get(split), list) for split in SPLITS):
        raise RecipeError(f"'{path}' has neither a train nor a test list", "Restore the file from the data set")
    return content


def _unreadable(path: Path, error: Exception) -> RecipeError:
    if isinstance(error, FileNotFoundError):
        return RecipeError(f"'{path}' does not exist", "It belongs to the data set: restore it, or check the root")
    reason = getattr(error, "strerror", None) or error
    return RecipeError(f"'{path}' can't be read ({reason})", "Restore the file from the data set")


_MVTEC = (
    "<category>/train/good/*.png, <category>/test/<good or type>/*.png and <category>/ground_truth/<type>/*_mask.png"
)
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("mvtec_ad", _read_mvtec, _MVTEC),
        Layout("visa", _read_visa, "split_csv/1cls.csv, <category>/image_anno.csv and <category>/Data/"),
        Layout("mpdd", _read_mvtec, _MVTEC),
        Layout(
            "mad",
            partial(_read_mvtec, category_of=_without_number),
            f"{_MVTEC}: it is MAD-Sim or MAD-Real itself",
            ("_mask", ""),  # generated toys, photographed toys
        ),
        Layout("real_iad", _read_real_iad, "realiad_jsons/<category>.json and realiad_1024/<category>/"),
        Layout(
            "folder",
            _read_folder,
            "<category>/good/*.png, <category>/<type>/*.png and <category>/masks/<type>/*.png",
            ("",),
        ),
        Layout(
            "csv",
            _read_table,
            f"{TABLE}, or is such a file, with the column image, and mask, type, category, split if there are any",
            may_be_file=True,
        ),
    )
}


def layout_of(name: str) -> Layout:
    """The layout of that name, or `RecipeError`."""
    if name not in LAYOUTS:
        raise RecipeError(f"unknown layout '{name}'", f"{did_you_mean(name, LAYOUTS)}Known are: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
