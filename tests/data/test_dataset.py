"""Labelled files become pictures, or an error that names the file and what to do."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dapo_edge.data.dataset import FileSet, Sample, check_samples, names_of, read_sample
from dapo_edge.data.pictures import read_mask
from dapo_edge.errors import RecipeError, SourceError
from dapo_edge.structures import NORMAL

NAMES = (NORMAL, "crack", "hole")
SIZE = (30, 20)  # width, height


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """A defective image with a red corner, and a mask of one block."""
    image = np.zeros((20, 30, 3), np.uint8)
    image[:5, :5] = (255, 0, 0)
    mask = np.zeros((20, 30), np.uint8)
    mask[3:7, 10:15] = 255
    return Sample(save(tmp_path / "a.png", image), save(tmp_path / "m.png", mask), "nut", "hole", "test")


def test_a_defective_sample_has_its_type_where_the_mask_is_set(sample: Sample) -> None:
    picture = read_sample(sample, NAMES)
    assert picture.image.dtype == picture.types.dtype == np.uint8
    assert picture.image[0, 0].tolist() == [0, 0, 255]  # BGR
    expected = np.zeros((20, 30), np.uint8)
    expected[3:7, 10:15] = 2
    assert np.array_equal(picture.types, expected)
    assert picture.names == NAMES
    assert picture.defects == ("hole",)


def test_a_good_sample_has_no_defect_whatever_mask_it_names(sample: Sample) -> None:
    assert not read_sample(replace(sample, defect=NORMAL), NAMES).mask.any()
    assert not read_sample(replace(sample, defect=NORMAL, mask=None), NAMES).mask.any()


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("numbers", lambda m: Image.fromarray(m.astype(np.uint8) * 3)),
        ("one bit", lambda m: Image.fromarray(m)),
        ("16 bits", lambda m: Image.fromarray(m.astype(np.uint16) * 100)),
        ("colour", lambda m: Image.fromarray(np.stack([m * 0, m * 200, m * 0], 2).astype(np.uint8))),
        ("opaque", lambda m: Image.fromarray(m.astype(np.uint8) * 255).convert("RGBA")),
    ],
)
def test_every_kind_of_mask_is_defective_where_it_is_not_zero(tmp_path: Path, name: str, mask: object) -> None:
    wanted = np.zeros((20, 30), bool)
    wanted[4:9, 2:20] = True
    mask(wanted).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png"), wanted), name


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize("which", ["image", "mask"])
@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (Path.unlink, "does not exist"),
        (damage, "can't be decoded"),
        (lambda path: path.write_text("no image"), "no known format"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    ],
)
def test_a_file_that_can_not_be_read_is_named(sample: Sample, which: str, harm: object, text: str) -> None:
    path = getattr(sample, which)
    harm(path)
    with pytest.raises(SourceError, match=text) as caught:
        read_sample(sample, NAMES)
    assert str(path) in str(caught.value)
    assert which in caught.value.cause
    assert caught.value.remedy


def test_an_image_beyond_all_measure_is_refused(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_edge.data.pictures.MAX_PIXELS", 599)
    with pytest.raises(SourceError, match="30x20, more than 599 pixels"):
        read_sample(sample, NAMES)


def test_a_defective_image_needs_a_mask_of_its_own_size_with_a_defect(sample: Sample, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a\.png' shows 'hole' but has no mask"):
        read_sample(replace(sample, mask=None), NAMES)
    other = save(tmp_path / "other.png", np.full((30, 20), 255, np.uint8))
    with pytest.raises(SourceError, match=r"other\.png' is 20x30, its image 30x20.*same size"):
        read_sample(replace(sample, mask=other), NAMES)
    black = save(tmp_path / "black.png", np.zeros((20, 30), np.uint8))
    with pytest.raises(SourceError, match=r"black\.png' is all black"):
        read_sample(replace(sample, mask=black), NAMES)


def test_a_set_is_a_sequence_of_pictures(sample: Sample) -> None:
    good = replace(sample, defect=NORMAL, mask=None)
    files = FileSet((good, sample), NAMES)
    assert len(files) == 2
    assert files.names == NAMES
    assert [picture.defects for picture in files] == [(), ("hole",)]
    assert names_of(files.samples) == (NORMAL, "hole")


def test_names_that_can_not_name_the_types_are_refused(sample: Sample) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'holes'"):
        FileSet((sample,), (NORMAL, "holes"))
    with pytest.raises(RecipeError, match="not among the names"):
        read_sample(sample, (NORMAL, "scratch"))
    for names, text in [(("hole",), "begin"), ((), "begin"), ((NORMAL, "hole", "hole"), "twice")]:
        with pytest.raises(RecipeError, match=text):
            FileSet((sample,), names)
    with pytest.raises(RecipeError, match="at most 255"):
        FileSet((), (NORMAL, *(str(number) for number in range(256))))


def test_a_set_needs_good_and_defective_images_in_every_category(sample: Sample) -> None:
    good = replace(sample, defect=NORMAL, mask=None)
    check_samples([sample, good])
    with pytest.raises(RecipeError, match="no images"):
        check_samples([])
    with pytest.raises(RecipeError, match="'bolt' has defective images but no good ones"):
        check_samples([sample, good, replace(sample, category="bolt")])
    with pytest.raises(RecipeError, match="'bolt' has good images but no defective ones"):
        check_samples([sample, good, replace(good, category="bolt")])
