"""Every layout that is written is read back with every type, mask and split, and nothing is ever overwritten."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")

from dapo_edge.cli import commands
from dapo_edge.data import synth
from dapo_edge.data.dataset import FileSet, check_samples, names_of
from dapo_edge.data.flaws import DEFECTS
from dapo_edge.data.layouts import LAYOUTS
from dapo_edge.data.materials import MATERIALS
from dapo_edge.data.pictures import read_mask
from dapo_edge.data.synth import WRITERS, write_dataset
from dapo_edge.errors import OutputError, RecipeError
from dapo_edge.structures import NORMAL

SIZE = (48, 36)


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[synth.Order, np.ndarray, np.ndarray]]:
    """Each image that is drawn: its order, pixels [H, W, 3] and mask [H, W]."""
    kept = []
    draw = synth._draw

    def keeping(order, rng, size):
        picture = draw(order, rng, size)
        kept.append((order, picture.image, picture.mask))
        return picture

    monkeypatch.setattr(synth, "_draw", keeping)
    return kept


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read_back(layout: str, tmp_path: Path, drawn: list) -> None:
    count = 4 * len(MATERIALS) + 7
    summary = write_dataset(tmp_path / "set", layout, count, 5, size=SIZE)
    samples = LAYOUTS[layout].read(tmp_path / "set")
    check_samples(samples)
    pictures = list(FileSet(tuple(samples), names_of(samples)))
    assert len(samples) == len(drawn) == summary.images == count

    def kinds(split: str, category: str, defect: str, mask: np.ndarray) -> tuple[str, str, str, bytes]:
        return split, category, defect, mask.tobytes()

    found = Counter(kinds(s.split, s.category, s.defect, p.mask) for s, p in zip(samples, pictures, strict=True))
    assert found == Counter(kinds(order.split, order.category, order.defect, mask) for order, _, mask in drawn)
    for sample, picture in zip(samples, pictures, strict=True):
        assert picture.image.shape == (36, 48, 3)
        assert picture.defects == (() if sample.is_good else (sample.defect,))
    lossless = layout not in ("visa", "real_iad")
    if lossless:
        assert Counter(picture.image.tobytes() for picture in pictures) == Counter(i.tobytes() for _, i, _ in drawn)
    assert {sample.image.suffix for sample in samples} == {
        {"visa": ".JPG", "real_iad": ".jpg"}.get(layout, ".png"),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_data_set_has_another_word_for_a_generated_type(layout: str) -> None:
    assert [LAYOUTS[layout].type_of(name.replace(" ", "_")) for name in DEFECTS] == list(DEFECTS)
    assert [LAYOUTS[layout].type_of(name) for name in DEFECTS] == list(DEFECTS)


def test_masks_are_black_and_white(tmp_path: Path) -> None:
    from PIL import Image

    write_dataset(tmp_path / "set", "mvtec_ad", 6, size=SIZE)
    masks = sorted((tmp_path / "set").rglob("*_mask.png"))
    assert len(masks) == 2
    for mask in masks:
        assert set(np.unique(np.asarray(Image.open(mask)))) == {0, 255}
        assert read_mask(mask).shape == (36, 48)


@pytest.mark.parametrize("layout", ["visa", "mad"])
def test_equal_arguments_write_equal_bytes(layout: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_dataset(tmp_path / name, layout, 9, seed, size=SIZE)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert tree(tmp_path / "a").keys() == tree(tmp_path / "c").keys()
    assert tree(tmp_path / "a") != tree(tmp_path / "c")


@pytest.mark.parametrize(("images", "categories"), [(3, 1), (5, 1), (6, 2), (3000, len(MATERIALS))])
@pytest.mark.parametrize("has_train", [True, False])
def test_images_are_spread_evenly_and_every_category_can_be_tested(
    images: int, categories: int, has_train: bool
) -> None:
    orders = synth._plan(images, has_train)
    assert len(orders) == images
    counts = Counter(order.category for order in orders)
    assert len(counts) == categories
    assert max(counts.values()) - min(counts.values()) <= 1
    for category in counts:
        tested = [order.defect for order in orders if order.category == category and order.split == "test"]
        assert NORMAL in tested
        assert len(set(tested)) >= 2
        assert any(order.split == "train" for order in orders if order.category == category) == has_train
    types = Counter(order.defect for order in orders if order.defect != NORMAL)
    assert max(types.values()) - min(types.values()) <= 1
    assert len(types) == min(len(DEFECTS), types.total())


def test_progress_and_summary_tell_what_was_written(tmp_path: Path) -> None:
    seen = []
    summary = write_dataset(tmp_path / "set", "folder", 4, size=SIZE, on_image=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (summary.train, summary.test_good, summary.test_defective) == (0, 2, 2)
    assert summary.types == dict.fromkeys(list(DEFECTS)[:2], 1)
    assert summary.as_json()["categories"] == {next(iter(MATERIALS)).replace(" ", "_"): 4}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"layout": "mvtec"}, "unknown layout 'mvtec'. Did you mean 'mvtec_ad'"),
        ({"images": 0}, "a data set of 0 images is too small. Use at least 3"),
        ({"images": -4}, "too small"),
        ({"images": 2}, "too small"),
        ({"seed": -1}, "the seed is -1"),
        ({"size": (8, 200)}, "8 x 200 pixels is too small"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(tmp_path: Path, arguments: dict, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        write_dataset(tmp_path / "new/set", **{"layout": "mvtec_ad", "images": 3, "seed": 0, "size": SIZE, **arguments})
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    before = tree(tmp_path)
    for name in ("full", "file"):
        with pytest.raises(OutputError, match="exists and is not an empty folder"):
            write_dataset(tmp_path / name, "folder", 3, size=SIZE)
    with pytest.raises(OutputError, match="can't be written"):
        write_dataset(tmp_path / "file/set", "folder", 3, size=SIZE)
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    write_dataset(tmp_path / "empty", "folder", 3, size=SIZE)
    assert tree(tmp_path / "empty")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def stop(done: int, of: int) -> None:
        if done == 2:
            raise error

    with pytest.raises(OutputError if error is OSError else error):
        write_dataset(tmp_path / "set", "visa", 3, size=SIZE, on_image=stop)
    assert not list(tmp_path.iterdir())


def test_every_layout_can_be_read_and_written_and_chosen() -> None:
    assert list(LAYOUTS) == list(WRITERS)
    layout = next(option for option in commands.commands["synth"].params if option.name == "layout")
    assert list(layout.type.choices) == list(LAYOUTS)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dapo_edge", "synth", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_command_prints_a_summary(tmp_path: Path) -> None:
    result = run(tmp_path / "set", "--layout", "mpdd", "--images", 6, "--size", "48x36", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["images"], summary["size"], summary["train"]) == (6, [48, 36], 2)
    assert len(LAYOUTS["mpdd"].read(tmp_path / "set")) == 6
    again = run(tmp_path / "set", "--layout", "mpdd", "--images", 6)
    assert again.returncode == 1
    assert "is not an empty folder" in again.stderr
    small = run(tmp_path / "other", "--layout", "mpdd", "--images", 6, "--size", "48")
    assert small.returncode == 2
    assert "'48' is not WIDTHxHEIGHT" in small.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_the_current_folder_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    write_dataset(Path(), "folder", 3, size=(32, 32))
    assert tmp_path.stat().st_ino == inode
    assert [path.name for path in Path.cwd().iterdir()] != []
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("images", "size"), [(10**12, (32, 32)), (3, (20_000, 20_000))])
def test_what_would_fill_the_machine_is_refused_at_once(tmp_path: Path, images: int, size: tuple[int, int]) -> None:
    with pytest.raises(RecipeError, match="too large"):
        write_dataset(tmp_path / "set", "folder", images, size=size)
