"""Evaluating subjects on data sets: every image once, nothing hidden, and a stopped evaluation goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from painted import SIDE, Painter, paint, save, subject, write_folder
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from dapo_edge.data.dataset import FileSet, names_of
from dapo_edge.errors import BackendError, RecipeError
from dapo_edge.evaluation.document import METRICS, document, drift, flips
from dapo_edge.evaluation.evaluate import CategoryResult, DataSet, evaluate


def evaluated(
    root: Path, folder: Path | None = None, *, workers: int = 0, **changes: float
) -> dict[str, CategoryResult]:
    return evaluate([subject(**changes)], DataSet.read("folder", root), workers=workers, folder=folder)[0]  # type: ignore[arg-type]


def test_metrics_equal_scikit_learn_on_all_pixels(tmp_path: Path) -> None:
    data = DataSet.read("folder", write_folder(tmp_path, good=5, bad=4, strength=100))
    result = evaluate([subject()], data)[0]["nut"]
    found, engine = result.metrics, subject().backend
    samples = data.categories["nut"]
    pictures = FileSet(samples, names_of(samples))
    batches = [engine.infer([pictures[n].image]) for n in range(len(samples))]
    anomaly = np.concatenate([batch.anomaly.ravel() for batch in batches])
    mask = np.concatenate([pictures[n].mask.ravel() for n in range(len(samples))])
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(mask, anomaly), abs=1e-4)
    assert found["pixel_ap"] == pytest.approx(average_precision_score(mask, anomaly), abs=1e-4)
    scores = [float(batch.image_scores[0]) for batch in batches]
    assert found["image_auroc"] == roc_auc_score([not s.is_good for s in samples], scores)
    assert found["type_accuracy"] == 1
    assert [image.score for image in result.images] == pytest.approx(scores)
    assert {image.verdict for image in result.images if image.is_good} == {"ok"}


def test_processes_that_read_ahead_change_nothing(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ("bolt", "nut"))
    alone, together = evaluated(root), evaluated(root, workers=2)
    assert list(alone) == list(together) == ["bolt", "nut"]
    for name in alone:
        assert alone[name].images == together[name].images
        assert alone[name].metrics == together[name].metrics


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    root, folder = write_folder(tmp_path / "set", ("bolt", "nut", "pin")), tmp_path / "report"
    data, first = DataSet.read("folder", root), subject()

    class Stop(Exception):
        pass

    def stop(step: str, done: int, of: int) -> None:
        if done == 15:  # in the middle of the second category
            raise Stop

    with pytest.raises(Stop):
        evaluate([first], data, folder=folder, on_progress=stop)
    again = subject()
    result = evaluate([again], data, folder=folder)[0]
    assert again.backend.seen == 20, "the first category is kept, the second begins again"
    whole = evaluate([subject()], data)[0]
    for name, category in whole.items():
        assert result[name].images == category.images
        assert result[name].metrics == category.metrics
        assert result[name].curves == category.curves
        assert result[name].confusion == category.confusion
        assert result[name].restored == (name == "bolt")


def test_what_is_kept_belongs_to_one_subject_and_these_files(tmp_path: Path) -> None:
    root, folder = write_folder(tmp_path / "set"), tmp_path / "report"

    def seen(gain: float = 1.0) -> int:
        one = subject(gain)
        evaluate([one], DataSet.read("folder", root), folder=folder)
        return int(one.backend.seen)

    assert [seen(), seen(), seen(2.0), seen()] == [10, 0, 10, 0]
    save(root / "nut" / "good" / "0.png", paint(None, 999)[0])
    assert seen() == 10, "another file at the same place"
    spoilt = (root / "nut/rust/0.png").read_bytes()
    (root / "nut/rust/0.png").write_bytes(b"")
    assert [seen(), seen()] == [9, 0]
    (root / "nut/rust/0.png").write_bytes(spoilt)
    assert seen() == 10
    for place in (folder / "state").iterdir():
        place.write_bytes(place.read_bytes()[:500])
    assert seen() == 10, "what is damaged is made again"


def test_bad_images_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "nut/good/0.png").write_bytes((root / "nut/good/0.png").read_bytes()[:60])
    save(root / "nut/masks/rust/0.png", np.zeros((SIDE, SIDE), np.uint8))
    save(root / "nut/masks/rust/1.png", np.full((SIDE, SIDE // 2), 255, np.uint8))
    (root / "nut/masks/stain/1.png").unlink()
    (root / "nut/good/notes.txt").write_text("no image")
    for workers in (0, 1):
        result = evaluated(root, workers=workers)["nut"]
        reasons = {Path(image.image).parent.name + Path(image.image).name: image.error for image in result.failed}
        assert set(reasons) == {"good0.png", "rust0.png", "rust1.png", "stain1.png"}
        assert "can't be decoded" in reasons["good0.png"]
        assert "all black" in reasons["rust0.png"]
        assert "32x64" in reasons["rust1.png"]
        assert "does not exist" in reasons["stain1.png"]
        assert result.metrics["images"] == 6


def test_a_huge_image_is_refused_by_its_header(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    Image.new("1", (20_000, 20_000)).save(root / "nut/good/huge.png")
    (error,) = [image.error for image in evaluated(root)["nut"].failed]
    assert "20000x20000" in error
    assert "100000000 pixels" in error


def test_every_kind_of_png_is_the_same_picture(tmp_path: Path) -> None:
    """Palette, alpha, 16 bit, turned by EXIF, behind a link, with a long name that is not ASCII."""
    root, image = write_folder(tmp_path / "set"), Image.new("RGB", (SIDE, SIDE), (100, 100, 100))
    folder = root / "nut" / "good"
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("L").save(folder / "grey.png")
    Image.fromarray(np.full((SIDE, SIDE), 100 << 8, np.uint16)).save(folder / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif, quality=100)
    image.save(folder / f"{'ü' * 100}.png")
    (folder / "link.png").symlink_to(folder / "grey.png")
    found = {Path(image.image).stem: image for image in evaluated(root)["nut"].images}
    kinds = ("palette", "alpha", "grey", "wide", "turned", "ü" * 100, "link")
    assert all(found[kind].error is None for kind in kinds)
    scores = [found[kind].score for kind in kinds]
    assert max(scores) - min(scores) < 0.02


def test_types_without_a_word_and_images_without_a_mask(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    image, mask = paint("stain", 5)
    save(root / "nut/burr/0.png", image[..., ::-1])
    save(root / "nut/masks/burr/0.png", mask)
    save(root / "nut/chip/0.png", image[..., ::-1])
    result = evaluated(root)["nut"]
    assert result.unnamed == {"burr": 1}
    assert result.unmasked == 1
    assert (result.metrics["images"], result.metrics["defective_images"]) == (12, 8)
    assert result.regions == 7, "the burr's pixels count, the chip's are not known"
    assert np.sum(result.confusion) == 6


def test_a_mask_without_its_image_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ("bolt", "nut"))
    assert DataSet.read("folder", root).masks_without_image == ()
    (root / "nut/rust/1.png").unlink()
    lost = root / "nut/masks/rust/1.png"
    data = DataSet.read("folder", root)
    assert data.masks_without_image == (lost,)
    assert DataSet.read("folder", root, ["bolt"]).masks_without_image == ()
    with subject() as one:
        found = document([one], evaluate([one], data), data, "own", 1.0)
    assert found["dataset"]["masks_without_image"] == [str(lost)]
    assert found["categories"]["nut"]["images"] == 9


def test_undefined_is_null(tmp_path: Path) -> None:
    root = write_folder(tmp_path, good=0, bad=2)
    data = DataSet.read("folder", root)
    with subject() as one:
        found = document([one], evaluate([one], data), data, "own", 1.0)
    assert found["categories"]["nut"]["image_auroc"] is None
    assert found["mean"]["image_auroc"] is None
    assert found["mean"]["pixel_auroc"] > 0.9
    assert "NaN" not in json.dumps(found)
    good = DataSet.read("folder", write_folder(tmp_path / "good", good=2, bad=0))
    with subject() as one:
        found = document([one], evaluate([one], good), good, "own", 1.0)
    assert {found["mean"][name] for name in METRICS if name != "image_ece"} == {None}
    assert one.backend.closed


def test_two_subjects_are_compared_image_by_image(tmp_path: Path) -> None:
    data = DataSet.read("folder", write_folder(tmp_path, ("bolt", "nut"), strength=100))
    pair = [subject(), subject(0.3, name="weak")]
    results = evaluate(pair, data)
    found = document(pair, results, data, "own", 1.0)
    compare = found["compare"]
    verdicts = [[image.verdict for r in result.values() for image in r.images] for result in results]
    flipped = sum(a != b for a, b in zip(*verdicts, strict=True))
    assert flipped > 0
    assert len(compare["flips"]["images"]) == flipped
    assert compare["flips"]["share"] == flipped / 20
    first = compare["flips"]["images"][0]
    assert abs(first["scores"][0] - first["scores"][1]) == compare["flips"]["score_difference_max"]
    for name in METRICS:
        assert compare["drift"]["mean"][name] == pytest.approx(compare["mean"][name] - found["mean"][name], abs=1e-9)
    assert found["verdicts"]["good"] == {"ok": 8, "unsure": 0, "ng": 0}


def test_drift_is_over_what_both_define() -> None:
    def results(*values: float | None) -> dict[str, Any]:
        return {"categories": {str(n): dict.fromkeys(METRICS, value) for n, value in enumerate(values)}}

    found = drift(results(0.9, 0.1, None), results(0.8, None, None))
    assert found["mean"]["aupro"] == pytest.approx(-0.1)
    assert found["categories"]["1"]["aupro"] is None


def test_without_verdicts_there_are_no_flips(tmp_path: Path) -> None:
    data = DataSet.read("folder", write_folder(tmp_path, strength=100))
    for pair in ([subject(limit=None), subject(0.3)], [subject(), subject(0.3, limit=None)]):
        found = document(pair, evaluate(pair, data), data, "own", 1.0)
        assert found["compare"]["flips"]["share"] is None
        assert found["compare"]["flips"]["images"] == []
        assert found["compare"]["flips"]["score_difference_max"] > 0.05
    untrained = subject()
    untrained.trained = False
    found = document([untrained], evaluate([untrained], data), data, "own", 1.0)
    assert found["decides"] == []
    assert found["subject"]["trained"] is False
    assert found["categories"]["nut"]["verdicts"]["good"] == {"ok": 0, "unsure": 4, "ng": 0}
    assert found["verdicts"]["good"] == {"ok": 0, "unsure": 0, "ng": 0}


def test_verdicts_count_where_the_words_have_thresholds(tmp_path: Path) -> None:
    data, one = DataSet.read("folder", write_folder(tmp_path, ("bolt", "nut"))), subject()
    results = evaluate([one], data)[0]
    results["bolt"] = replace(results["bolt"], decides=False)
    found = document([one], [results], data, "own", 1.0)
    assert found["decides"] == ["nut"]
    assert sum(found["verdicts"]["good"].values()) == 4
    compared = flips(results, results)
    assert compared["share"] == 0
    results["nut"] = replace(results["nut"], decides=False)
    assert flips(results, results)["share"] is None


def test_regions_between_the_maps_pixels_are_counted(tmp_path: Path) -> None:
    root, side = write_folder(tmp_path, good=1, bad=1), 5 * SIDE
    mask = np.zeros((side, side), np.uint8)
    mask[50:90, 50:90] = mask[200, 203] = mask[201, 260] = 255
    mask[50:90, 92:120] = 255  # at the map's size one with its neighbour, and not lost
    save(root / "nut/rust/0.png", np.full((side, side, 3), 90, np.uint8))
    save(root / "nut/masks/rust/0.png", mask)
    assert evaluated(root)["nut"].regions_lost == 2


def test_uncalibrated_is_always_unsure(tmp_path: Path) -> None:
    result = evaluated(write_folder(tmp_path), limit=None)["nut"]  # type: ignore[arg-type]
    assert {image.verdict for image in result.images} == {"unsure"}


def test_values_that_are_no_numbers_stop_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    infer = Painter.infer

    def broken(self: Painter, views: object) -> object:
        batch = infer(self, views)  # type: ignore[arg-type]
        batch.anomaly[0, 3, 3] = np.nan
        return batch

    monkeypatch.setattr(Painter, "infer", broken)
    with pytest.raises(BackendError, match="not numbers"):
        evaluated(write_folder(tmp_path))


def test_nothing_to_test_is_said(tmp_path: Path) -> None:
    save(tmp_path / "nut/train/good/0.png", paint(None, 0)[0])
    (tmp_path / "nut/test").mkdir()
    with pytest.raises(RecipeError, match="holds no test images"):
        DataSet.read("mvtec_ad", tmp_path)
    with pytest.raises(RecipeError, match=r"no category 'nuts'.*There are: nut"):
        DataSet.read("mvtec_ad", tmp_path, ["nuts"])


def test_words_are_checked_before_anything_is_evaluated(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ("bolt",))
    save(root / "nut" / "good" / "0.png", paint(None, 0)[0])
    save(root / "nut" / "a<b" / "0.png", paint("rust", 0)[0])
    one = subject()
    with pytest.raises(RecipeError, match="'a<b' can't be a defect word"):
        evaluate([one], DataSet.read("folder", root), words="dataset")
    assert one.backend.seen == 0
