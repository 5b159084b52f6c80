"""The gate's frames: the same pictures as ever, with the truth about them, one at a time."""

from __future__ import annotations

import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dapo_edge.config import Gate
from dapo_edge.data.dataset import read_sample
from dapo_edge.data.layouts import layout_of
from dapo_edge.data.pictures import read_image
from dapo_edge.data.surfaces import make_surface
from dapo_edge.data.synth import write_dataset
from dapo_edge.engine.frames import build_frames, spread
from dapo_edge.engine.gate_frames import GateFrames, check_gate_frames, gate_frames
from dapo_edge.errors import RecipeError, SourceError

BELT = "synthetic://160x96@5?seed=0"


def frames_of(origin: Any, count: int = 8, layout: str | None = None, seed: int = 40) -> GateFrames:
    return gate_frames(Gate.model_validate({"frames": str(origin), "layout": layout}), count, seed)


def save(path: Path, level: int = 100, size: tuple[int, int] = (48, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)
    return path


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 categories, 4 good and 5 defective test images each."""
    root = tmp_path_factory.mktemp("set") / "parts"
    for category in ("bolt", "nut", "pin"):
        for number in range(4):
            save(root / category / "good" / f"{number}.png", 60 + number)
        for kind, count in (("rust", 3), ("dent", 2)):
            for number in range(count):
                save(root / category / kind / f"{number}.png", 90 + number)
                mask = np.zeros((32, 48), np.uint8)
                mask[4:9, 6:10] = 255
                path = root / category / "masks" / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(path)
    return root


@pytest.fixture
def own_set(data_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_set, tmp_path / "parts"))


@pytest.mark.parametrize("origin", ["synthetic", BELT])
def test_generated_frames_are_the_builds_own_with_their_truth(origin: str) -> None:
    frames, before = frames_of(origin, 6), build_frames(origin, 6, good_only=False, seed=40)
    assert (len(frames), frames.labelled) == (6, True)
    for frame, view in zip(frames, before, strict=True):
        np.testing.assert_array_equal(frame.view, view)
        assert frame.truth is not None
        assert frame.truth.types.shape == view.shape[:2]
        assert frame.defective == frame.truth.mask.any()
    assert {frame.defective for frame in frames} == {True, False}
    assert len({frame.title for frame in frames}) == 6


def test_synthetic_truth_is_that_of_the_picture() -> None:
    frame = frames_of("synthetic", 2)[1]
    picture = make_surface(41, (640, 480), good_share=0.5, framing="part")
    np.testing.assert_array_equal(frame.view, picture.image)
    assert frame.truth is not None
    np.testing.assert_array_equal(frame.truth.types, picture.types)
    assert frame.truth.names == picture.names


def test_a_plain_folder_is_spread_and_has_no_labels(tmp_path: Path) -> None:
    for number in range(10):
        save(tmp_path / f"{number}.png", 10 * number)
    frames = frames_of(tmp_path, 4)
    assert (len(frames), frames.labelled) == (4, False)
    assert [Path(frame.title).stem for frame in frames] == ["0", "2", "5", "7"]
    assert [int(frame.view[0, 0, 0]) for frame in frames] == [0, 20, 50, 70]
    assert {(frame.defective, frame.truth) for frame in frames} == {(None, None)}
    assert [frame.title for frame in frames_of(tmp_path, 99)] == [str(tmp_path / f"{n}.png") for n in range(10)]


def test_a_data_set_is_halved_and_mixed(data_set: Path) -> None:
    frames = frames_of(data_set, 12, "folder")
    assert (len(frames), frames.labelled) == (12, True)
    titles = [Path(frame.title).relative_to(data_set) for frame in frames]
    assert sum(bool(frame.defective) for frame in frames) == 6
    assert {path.parts[0] for path in titles} == {"bolt", "nut", "pin"}
    assert {path.parts[1] for path in titles} == {"good", "rust", "dent"}
    assert {frame.defective for frame in spread(list(frames), 4)} == {True, False}, "also where few stand for all"
    for frame, path in zip(frames, titles, strict=True):
        assert frame.truth is not None
        assert frame.defective == (path.parts[1] != "good") == frame.truth.mask.any()
        np.testing.assert_array_equal(frame.view, read_image(frame.title))
        if frame.defective:
            assert frame.truth.names[frame.truth.types[5, 7]] == path.parts[1]
            assert frame.truth.mask.sum() == 5 * 4


@pytest.mark.parametrize(
    ("count", "good", "bad"), [(1, 0, 1), (2, 1, 1), (7, 3, 4), (26, 12, 14), (27, 12, 15), (99, 12, 15)]
)
def test_both_kinds_as_far_as_they_are_there(data_set: Path, count: int, good: int, bad: int) -> None:
    frames = frames_of(data_set, count, "folder")
    kinds = [frame.defective for frame in frames]
    assert (len(frames), kinds.count(False), kinds.count(True)) == (good + bad, good, bad)
    assert len({frame.title for frame in frames}) == good + bad


@pytest.mark.parametrize("layout", ["mvtec_ad", "visa", "csv"])
def test_only_test_images_with_their_masks(tmp_path: Path, layout: str) -> None:
    write_dataset(tmp_path / "set", layout, 24, size=(64, 48))
    samples = layout_of(layout).read(tmp_path / "set")
    test = {str(sample.image): sample for sample in samples if sample.split == "test"}
    frames = frames_of(tmp_path / "set", 100, layout)
    assert {frame.title for frame in frames} == set(test)
    for frame in frames:
        sample = test[frame.title]
        assert frame.truth is not None
        np.testing.assert_array_equal(frame.truth.types, read_sample(sample, frame.truth.names).types)
        assert frame.defective == (not sample.is_good)


def test_a_defective_image_without_a_mask_has_a_label_only(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "nut" / "good" / f"{number}.png")
        save(tmp_path / "nut" / "rust" / f"{number}.png")
    frames = frames_of(tmp_path, 6, "folder")
    assert [(frame.defective, frame.truth is None) for frame in frames if frame.defective] == [(True, True)] * 3
    assert all(frame.truth is not None for frame in frames if not frame.defective)


def test_one_frame_is_held_at_a_time(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / f"{number}.png", number)
    frames = frames_of(tmp_path, 6)
    seen: list[weakref.ref[Any]] = []
    for frame in frames:
        seen.append(weakref.ref(frame))
        assert sum(one() is not None for one in seen) <= 2
    for index, view in enumerate(frames.views):
        assert frames[index].view is view, "the labels of the view at hand cost no second reading"
    with pytest.raises(IndexError):
        frames[6]
    with pytest.raises(IndexError):
        frames[-1]


# Bad input.


def test_unreadable_files_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        save(tmp_path / f"{number}.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        frames = frames_of(tmp_path)
    assert [Path(frame.title).name for frame in frames] == ["0.png", "3.png"]
    assert len(frames) == 2
    assert "1.png" in caplog.messages[0]
    assert "2.png' is in no known format" in caplog.messages[1]
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"only 1 of 4 frames in .*0\.png' is empty.*gate\.frames"):
        frames_of(tmp_path)


def test_a_single_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(SourceError, match="only 0 of 1 frames"):
        frames_of(tmp_path)


def test_a_mask_of_another_size_leaves_its_image_out(own_set: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(own_set / "nut" / "masks" / "rust" / "1.png", 255, (10, 10))
    with caplog.at_level(logging.WARNING):
        frames = frames_of(own_set, 99, "folder")
    assert len(frames) == 26
    assert "the mask" in caplog.text
    assert "10x10" in caplog.text


def test_masks_without_images(own_set: Path) -> None:
    for number in range(2):
        (own_set / "nut" / "rust" / f"{number}.png").unlink()
    lost = rf"labels without images: 2 masks belong to no image, first '{own_set}/nut/masks/rust/0\.png', .*Copy"
    with pytest.raises(SourceError, match=lost):
        frames_of(own_set, 4, "folder")


def test_listed_images_that_are_not_there(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", "csv", 24, size=(64, 48))
    samples = layout_of("csv").read(tmp_path / "set")
    for sample in [one for one in samples if one.split == "test"][:5]:
        sample.image.unlink()
    with pytest.raises(SourceError, match=r"labels without images: 5 images are listed and not there, first .*Copy"):
        frames_of(tmp_path / "set", 4, "csv")


def test_a_set_of_one_kind_says_what_is_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        save(tmp_path / "good" / f"{number}.png")
    with caplog.at_level(logging.WARNING):
        assert [frame.defective for frame in frames_of(tmp_path, 3, "folder")] == [False] * 3
    assert "only good parts" in caplog.text


@pytest.mark.parametrize("origin", ["synthetic", BELT])
def test_generated_frames_have_no_layout(origin: str) -> None:
    with pytest.raises(RecipeError, match=r"gate\.layout is 'folder', but the frames .* are generated"):
        frames_of(origin, 4, "folder")


def test_what_shows_before_any_picture_is_read(
    own_set: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a picture was read")

    monkeypatch.setattr("dapo_edge.engine.gate_frames.read_image", never)
    monkeypatch.setattr("dapo_edge.data.loading.read_sample", never)
    for frames, layout in (("synthetic", None), (own_set, "folder"), (own_set / "nut" / "good", None)):
        check_gate_frames(Gate.model_validate({"frames": str(frames), "layout": layout}))
    assert not caplog.messages
    (own_set / "nut" / "rust" / "1.png").unlink()
    for frames, layout, error in (
        ("synthetic", "folder", RecipeError),
        ("synthetic://9x9", None, SourceError),
        (own_set, "folder", SourceError),
        (own_set, "mvtec_ad", RecipeError),
        (own_set, None, SourceError),
        (own_set / "none", None, RecipeError),
    ):
        with pytest.raises(error):
            check_gate_frames(Gate.model_validate({"frames": str(frames), "layout": layout}))


def test_folders_that_hold_nothing(tmp_path: Path, data_set: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        frames_of(tmp_path / "none")
    with pytest.raises(SourceError, match="holds no image"):
        frames_of(tmp_path)
    with pytest.raises(RecipeError, match="there is no folder"):
        frames_of(tmp_path / "none", 4, "mvtec_ad")
    with pytest.raises(RecipeError, match="in the layout mvtec_ad"):
        frames_of(data_set, 4, "mvtec_ad")
    with pytest.raises(SourceError, match="holds no image"):
        frames_of(data_set)
    with pytest.raises(SourceError, match="synthetic"):
        frames_of("synthetic://9x9")
