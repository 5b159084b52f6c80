"""Small trees made by hand: each public data set's habits, and what is said when something is not where it belongs."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from dapo_edge.data import layouts
from dapo_edge.data.dataset import SEVERAL, Sample
from dapo_edge.data.layouts import LAYOUTS, layout_of
from dapo_edge.errors import RecipeError, SourceError
from dapo_edge.structures import NORMAL

WITH_WORDS = [name for name in LAYOUTS if name not in ("folder", "csv")]


def touch(root: Path, *names: str) -> None:
    """Empty files: a layout reads no pixels."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def seen(root: Path, samples: Sequence[Sample]) -> list[tuple[str, str | None, str, str, str]]:
    def below(path: Path | None) -> str | None:
        return path.relative_to(root).as_posix() if path else None

    return [(below(s.image), below(s.mask), s.category, s.defect, s.split) for s in samples]


def test_mvtec_ad_binds_raw_species_to_types_by_name(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "zipper/train/good/000.png",
        "zipper/test/good/000.png",
        "zipper/test/split_teeth/010.png",
        "zipper/test/split_teeth/002.png",
        "zipper/test/made_up_kind/000.png",
        "zipper/ground_truth/split_teeth/002_mask.png",
        "cable/test/cut_outer_insulation/000.png",
        "cable/test/cut_outer_insulation/.hidden.png",
        "cable/test/cut_outer_insulation/notes.txt",
        "license.txt",
        "papers/a.png",
    )
    masks = "zipper/ground_truth"
    assert seen(tmp_path, LAYOUTS["mvtec_ad"].read(tmp_path, ["zipper"])) == [
        ("zipper/test/good/000.png", None, "zipper", NORMAL, "test"),
        ("zipper/test/made_up_kind/000.png", f"{masks}/made_up_kind/000_mask.png", "zipper", "made up kind", "test"),
        ("zipper/test/split_teeth/002.png", f"{masks}/split_teeth/002_mask.png", "zipper", "misplaced", "test"),
        ("zipper/test/split_teeth/010.png", f"{masks}/split_teeth/010_mask.png", "zipper", "misplaced", "test"),
        ("zipper/train/good/000.png", None, "zipper", NORMAL, "train"),
    ]
    both = LAYOUTS["mvtec_ad"].read(tmp_path)
    assert [(sample.category, sample.defect) for sample in both[:2]] == [("cable", "cut"), ("zipper", NORMAL)]


def test_mpdd_has_words_of_its_own(tmp_path: Path) -> None:
    touch(tmp_path, "bracket_brown/test/bend_and_parts_mismatch/000.png", "bracket_brown/test/parts_mismatch/000.png")
    assert [sample.defect for sample in LAYOUTS["mpdd"].read(tmp_path)] == ["bent", "mismatch"]


def test_mad_numbers_its_simulated_toys(tmp_path: Path) -> None:
    touch(
        tmp_path, "02Unicorn/train/good/0.png", "02Unicorn/test/Burrs/7.png", "02Unicorn/ground_truth/Burrs/7_mask.png"
    )
    assert seen(tmp_path, LAYOUTS["mad"].read(tmp_path, ["Unicorn"])) == [
        ("02Unicorn/test/Burrs/7.png", "02Unicorn/ground_truth/Burrs/7_mask.png", "Unicorn", "burrs", "test"),
        ("02Unicorn/train/good/0.png", None, "Unicorn", NORMAL, "train"),
    ]
    touch(tmp_path / "other", "2d_codes/test/good/0.png")
    assert LAYOUTS["mvtec_ad"].read(tmp_path / "other")[0].category == "2d_codes"


def test_mad_real_masks_have_the_name_of_the_image(tmp_path: Path) -> None:
    touch(tmp_path, "Bear/test/Stains/IMG_1.jpg", "Bear/ground_truth/Stains/IMG_1.png")
    assert seen(tmp_path, LAYOUTS["mad"].read(tmp_path)) == [
        ("Bear/test/Stains/IMG_1.jpg", "Bear/ground_truth/Stains/IMG_1.png", "Bear", "stains", "test")
    ]


def write_csv(path: Path, *rows: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def visa(root: Path, label: str, image: str = "pcb4/Data/Images/Anomaly/000.JPG", split: str = "test") -> Path:
    good = "pcb4/Data/Images/Normal/0007.JPG"
    mask = "pcb4/Data/Masks/Anomaly/000.png"
    write_csv(
        root / "split_csv" / "1cls.csv",
        ("object", "split", "label", "image", "mask"),
        ("pcb4", "train", "normal", good, ""),
        ("pcb4", split, "anomaly", image, mask),
    )
    write_csv(root / "pcb4/image_anno.csv", ("image", "label", "mask"), (good, "normal", ""), (image, label, mask))
    return root


@pytest.mark.parametrize(
    ("label", "defect"),
    [
        ("melt,scratch", SEVERAL),
        ("same colour spot, chunk of wax missing", SEVERAL),
        ("scratch, small scratches", "scratch"),
        ("wrong place", "wrong place"),
        ("something new", "something new"),
        ("small scratches", "scratch"),
    ],
)
def test_visa_labels_that_mean_one_type_are_one(tmp_path: Path, label: str, defect: str) -> None:
    assert seen(tmp_path, LAYOUTS["visa"].read(visa(tmp_path, label), ["pcb4"])) == [
        ("pcb4/Data/Images/Anomaly/000.JPG", "pcb4/Data/Masks/Anomaly/000.png", "pcb4", defect, "test"),
        ("pcb4/Data/Images/Normal/0007.JPG", None, "pcb4", NORMAL, "train"),
    ]


def test_visa_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    read = LAYOUTS["visa"].read
    with pytest.raises(RecipeError, match=r"1cls\.csv' does not exist"):
        read(tmp_path)
    for label in ("", "normal"):
        with pytest.raises(RecipeError, match=r"image_anno\.csv' names no defect for 'pcb4/Data/Images/Anomaly/000"):
            read(visa(tmp_path, label))
    with pytest.raises(RecipeError, match="unknown split 'val'"):
        read(visa(tmp_path, "melt", split="val"))
    for outside in ("../secret.JPG", "/etc/secret.JPG"):
        with pytest.raises(RecipeError, match="outside of the data set"):
            read(visa(tmp_path, "melt", outside))
    (visa(tmp_path, "melt") / "pcb4/image_anno.csv").unlink()
    with pytest.raises(RecipeError, match=r"image_anno\.csv' does not exist"):
        read(tmp_path)
    write_csv(tmp_path / "split_csv/1cls.csv", ("object", "image"), ("pcb4", "a.JPG"))
    with pytest.raises(RecipeError, match="lacks the column label, mask, split"):
        read(tmp_path)
    (tmp_path / "split_csv/1cls.csv").write_bytes(b"object,\xff\xfe")
    with pytest.raises(RecipeError, match="can't be read"):
        read(tmp_path)


def real_iad(root: Path, test: object, folder: str = "realiad_jsons") -> Path:
    good = {"category": "pcb", "anomaly_class": "OK", "image_path": "OK/S0001/a.jpg", "mask_path": None}
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "pcb.json").write_text(json.dumps({"meta": {"prefix": "pcb/"}, "train": [good], "test": test}))
    (root / "realiad_512").mkdir(exist_ok=True)
    return root


@pytest.mark.parametrize("folder", ["realiad_jsons", "realiad_jsons/realiad_jsons"])
def test_real_iad_reads_codes_from_its_split_files(tmp_path: Path, folder: str) -> None:
    entries = [
        {"anomaly_class": "YW", "image_path": "NG/YW/S0002/b.jpg", "mask_path": "NG/YW/S0002/b.png"},
        {"anomaly_class": "OK", "image_path": "NG/YW/S0002/c.jpg", "mask_path": None},  # not visible from this side
        {"anomaly_class": "HS", "image_path": "NG/HS/S0003/d.jpg", "mask_path": None},
    ]
    assert seen(tmp_path, LAYOUTS["real_iad"].read(real_iad(tmp_path, entries, folder))) == [
        ("realiad_512/pcb/NG/HS/S0003/d.jpg", None, "pcb", "scratch", "test"),
        ("realiad_512/pcb/NG/YW/S0002/b.jpg", "realiad_512/pcb/NG/YW/S0002/b.png", "pcb", "foreign", "test"),
        ("realiad_512/pcb/NG/YW/S0002/c.jpg", None, "pcb", NORMAL, "test"),
        ("realiad_512/pcb/OK/S0001/a.jpg", None, "pcb", NORMAL, "train"),
    ]


def test_real_iad_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    read = LAYOUTS["real_iad"].read
    with pytest.raises(RecipeError, match=r"not in the layout real_iad.*realiad_jsons/<category>\.json"):
        read(tmp_path)
    for entry in (
        {"image_path": "a.jpg"},
        {"anomaly_class": "HS"},
        "text",
        {"anomaly_class": 3, "image_path": "a.jpg"},
    ):
        with pytest.raises(RecipeError, match=r"an entry of .*pcb\.json"):
            read(real_iad(tmp_path, [entry]))
    with pytest.raises(RecipeError, match="outside of the data set"):
        read(real_iad(tmp_path, [{"anomaly_class": "OK", "image_path": "../../secret.jpg"}]))
    for text, match in [("{", "can't be read"), ("[]", "neither a train nor a test"), ("{}", "neither a train")]:
        (tmp_path / "realiad_jsons/pcb.json").write_text(text)
        with pytest.raises(RecipeError, match=match):
            read(tmp_path)


FOLDER = ("good/1.png", "missing_piece/1.jpg", "missing_piece/2.jpg", "dent/1.png", "masks/missing_piece/1.png")


def test_a_folder_may_have_masks(tmp_path: Path) -> None:
    touch(tmp_path / "nuts", *FOLDER)
    assert seen(tmp_path, LAYOUTS["folder"].read(tmp_path)) == [
        ("nuts/dent/1.png", None, "nuts", "dent", "test"),
        ("nuts/good/1.png", None, "nuts", NORMAL, "test"),
        ("nuts/missing_piece/1.jpg", "nuts/masks/missing_piece/1.png", "nuts", "missing piece", "test"),
        # Its mask was forgotten: reading the sample says where it should be.
        ("nuts/missing_piece/2.jpg", "nuts/masks/missing_piece/2.png", "nuts", "missing piece", "test"),
    ]


def test_a_single_category_may_lie_at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "nuts", *FOLDER)
    below = LAYOUTS["folder"].read(tmp_path)
    assert LAYOUTS["folder"].read(tmp_path / "nuts") == below
    monkeypatch.chdir(tmp_path / "nuts")
    assert [sample.category for sample in LAYOUTS["folder"].read(".")] == ["nuts"] * 4


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_root_that_is_not_there_or_empty_is_refused(tmp_path: Path, name: str) -> None:
    named = r"no folder '.*nowhere'\. Name the folder that holds .*(<category>|images\.csv)"
    with pytest.raises(RecipeError, match=named):
        LAYOUTS[name].read(tmp_path / "nowhere")
    with pytest.raises(RecipeError) as caught:
        LAYOUTS[name].read(tmp_path)
    assert str(tmp_path) in caught.value.cause
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="lacks the column image" if name == "csv" else "no folder"):
        LAYOUTS[name].read(tmp_path / "file")


def test_a_category_without_images_and_an_unknown_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wood/test/good").mkdir(parents=True)
    with pytest.raises(RecipeError, match="holds no images in the layout mvtec_ad"):
        LAYOUTS["mvtec_ad"].read(tmp_path)
    with pytest.raises(RecipeError, match=r"no category 'woood'\. Did you mean 'wood'\? There are: wood"):
        LAYOUTS["mvtec_ad"].read(tmp_path, ["woood"])
    with pytest.raises(RecipeError, match=r"unknown layout 'mvtec'\. Did you mean 'mvtec_ad'"):
        layout_of("mvtec")


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "line 3" / "images.csv",
        (" Image", "Type", "mask", "category", "split", "time"),
        ("a.png", "", "", "nut", "", "Ann"),
        ("b.png", " Good", "unused.png", "nut", "train", "Ann"),
        ("sub/ü.png", "deep__scratch_", "masks/ü.png", "nut", "test", ""),
        (str(tmp_path / "elsewhere.png"), "hole", "", "", "", ""),
    )
    wanted = [
        ("elsewhere.png", None, "line 3", "hole", "test"),
        ("line 3/a.png", None, "nut", NORMAL, "test"),
        ("line 3/sub/ü.png", "line 3/masks/ü.png", "nut", "deep scratch", "test"),
        ("line 3/b.png", None, "nut", NORMAL, "train"),
    ]
    for root in (tmp_path / "line 3", tmp_path / "line 3" / "images.csv"):
        assert seen(tmp_path, LAYOUTS["csv"].read(root)) == wanted
    assert len(LAYOUTS["csv"].read(tmp_path / "line 3", ["nut"])) == 3


def test_a_table_with_holes_is_refused(tmp_path: Path) -> None:
    for rows, named in (
        ([("picture",), ("a.png",)], "lacks the column image"),
        ([("image", "type"), ("a.png", ""), ("", "hole")], r"line 3 of '.*images\.csv' names no image"),
        ([("image", "split"), ("a.png", "val")], "unknown split 'val'"),
        ([("image", "typ"), ("a.png", "hole")], "unknown column 'typ'. Did you mean 'type'"),
        ([("image", "label"), ("a.png", "hole")], "unknown column 'label'. Did you mean 'type'"),
        ([("image", "type"), (), (), ("a.png", "good"), ("", "hole")], r"line 5 of '.*images\.csv' names no image"),
        ([("image", "mask"), ("a.png", "m.png")], r"line 2 of '.*images\.csv' has a mask and no type"),
        ([("image",)], "holds no category"),
    ):
        write_csv(tmp_path / "images.csv", *rows)
        with pytest.raises(RecipeError, match=named):
            LAYOUTS["csv"].read(tmp_path)
    (tmp_path / "images.csv").unlink()
    with pytest.raises(RecipeError, match=r"images\.csv' does not exist"):
        LAYOUTS["csv"].read(tmp_path)


@pytest.mark.parametrize("name", WITH_WORDS)
def test_every_product_has_types_of_its_vocabulary_only(name: str) -> None:
    content = yaml.safe_load((Path(layouts.__file__).parent / "defects" / f"{name}.yaml").read_text())
    raw = [label for labels in content["types"].values() for label in labels]
    assert len(raw) == len(set(raw)), "a raw label stands for two types"
    used = {kind for kinds in content["products"].values() for kind in kinds}
    assert used <= set(content["types"])
    assert all(LAYOUTS[name].type_of(kind) in (kind, *content["types"]) for kind in used)


def test_the_vocabularies_are_complete() -> None:
    products = {
        name: len(layouts.Vocabulary.read(layouts._VOCABULARIES / f"{name}.yaml").products) for name in WITH_WORDS
    }
    assert products == {"mvtec_ad": 15, "visa": 12, "mpdd": 6, "mad": 20, "real_iad": 30}
    assert LAYOUTS["real_iad"].types_of("tape") == ("missing", "contamination", "damage")
    assert LAYOUTS["folder"].types_of("tape") == ()


def test_masks_of_a_type_whose_images_are_gone_are_noticed(tmp_path: Path) -> None:
    touch(tmp_path, "a/good/1.png", "a/masks/dent/1.png")
    with pytest.raises(SourceError, match=r"labels without images: there is no folder '.*a/dent'"):
        layout_of("folder").read(tmp_path)
    touch(tmp_path, "a/dent/1.png")
    (tmp_path / "a/masks/empty").mkdir()
    assert {sample.defect for sample in layout_of("folder").read(tmp_path)} == {NORMAL, "dent"}
