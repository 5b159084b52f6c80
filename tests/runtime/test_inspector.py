"""Inspector, regions and verdicts; a fake backend shows how small the contract is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dapo_edge import Inspector
from dapo_edge.backends.base import MapBatch
from dapo_edge.errors import BackendError, FrameError, RecipeError
from dapo_edge.kernels import reference
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.package import EnginePackage, Threshold, Thresholds
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.runtime.decide import decide, find_regions


class FakeBackend:
    """Sees one defect of the second type in a fixed corner of the patch grid."""

    name, device, precision = "fake", "none", "fp32"
    concurrency, takes_camera_bytes = 1, False

    def __init__(self, package: EnginePackage) -> None:
        self.bank = package.bank()
        self.spec = package.manifest.map

    def infer(self, views: Sequence[Any], *, map_size: Any = None) -> MapBatch:
        probs = np.zeros((len(views), len(self.bank.names), *self.spec.grid), np.float32)
        probs[:, 0] = 1
        probs[:, :, 1:3, 4:6] = np.array([0.1, 0.2, 0.7, 0.0], np.float32)[None, :, None, None]
        maps = reference.defect_map(probs, *self.spec.tables((96, 96)))
        score = np.full(len(views), 0.8, np.float32)
        return MapBatch(maps.anomaly, maps.types, probs, maps.peaks[:, 1:], score, self.bank, {"encode": 1.0})

    def encode(self, views: Sequence[Any]) -> Any:
        raise AssertionError("the runtime never asks for tokens")

    def set_bank(self, bank: PromptBank) -> None:
        self.bank = bank

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def trained(package: EnginePackage) -> EnginePackage:
    """The same package, as if its weights were more than a seeded initialisation."""
    return replace(package, manifest=package.manifest.model_copy(update={"trained": True}))


def limits(image: float, pixel: float) -> Thresholds:
    image_limit, pixel_limit = (
        Threshold(value=value, false_reject_rate=0, confidence_95=(0, 0.1)) for value in (image, pixel)
    )
    return Thresholds(image=image_limit, pixel=pixel_limit, source="test", frames=10)


def test_a_region_is_found_named_and_placed(package: EnginePackage) -> None:
    with Inspector.on(trained(package), FakeBackend(package)) as inspector:
        inspector.thresholds = limits(0.5, 0.45)
        result = inspector.inspect(np.zeros((480, 960, 3), np.uint8))
    assert result.verdict == "ng"
    assert result.score == pytest.approx(0.8)
    assert result.types == ("normal", "scratch", "missing part", "glue")
    assert result.anomaly_map.shape == (96, 96)
    assert result.type_map.max() == 2
    assert set(result.type_scores) == {"scratch", "missing part", "glue"}
    assert max(result.type_scores, key=lambda name: result.type_scores[name]) == "missing part"
    assert 0.5 < result.type_scores["missing part"] <= 0.7
    (region,) = result.regions
    assert region.type == "missing part"
    assert 0.7 < region.score <= 0.91
    x, y, width, height = region.box
    # Patches 4 and 5 of 6 columns, 1 and 2 of 6 rows, in a frame of 960 x 480.
    assert 560 <= x <= 680
    assert x + width == 960
    assert 40 <= y <= 110
    assert 200 <= y + height <= 290
    assert 0 < region.area_px <= width * height
    assert result.frame_size == (960, 480)
    assert {"encode", "decide", "total"} <= result.ms.keys()


def test_the_real_engine_end_to_end(package: EnginePackage, picture: Any) -> None:
    with Inspector(package.path, map_size="frame") as inspector:
        result = inspector.inspect(picture)
        grey = inspector.inspect(picture[:, :, 0])
        same = inspector.inspect(np.repeat(picture[:, :, :1], 3, axis=2))
    assert result.anomaly_map.shape == picture.shape[:2]
    assert result.anomaly_map.dtype == np.float32
    assert result.type_map.dtype == np.uint8
    assert 0 <= result.anomaly_map.min() <= result.anomaly_map.max() <= 1
    np.testing.assert_array_equal(grey.anomaly_map, same.anomaly_map)
    assert result.ms["total"] >= result.ms["encode"] > 0


def test_neighbouring_regions_are_told_apart(package: EnginePackage) -> None:
    """Two regions whose boxes overlap: each takes only its own pixels into account."""
    spec = package.manifest.map
    names = package.bank().names
    probs = np.zeros((4, *spec.grid), np.float32)
    probs[0] = 1
    probs[:, 0, :5] = np.array([0.1, 0.9, 0, 0], np.float32)[:, None]  # an L of the first type ...
    probs[:, :5, 0] = np.array([0.1, 0.9, 0, 0], np.float32)[:, None]
    probs[:, 3:5, 3:5] = np.array([0.2, 0, 0, 0.8], np.float32)[:, None, None]  # ... around a blob of the third
    anomaly = reference.anomaly_map(probs[None], *spec.tables((120, 120)))
    regions = find_regions(anomaly[0], probs, names, spec, 0.5, (240, 120))
    assert [region.type for region in regions] == ["scratch", "glue"]
    around, blob = (region.box for region in regions)
    assert around[0] <= blob[0]
    assert around[0] + around[2] >= blob[0] + blob[2]
    assert regions[1].score == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("score", "highest", "verdict"),
    [(0.4, 0.3, "ok"), (0.6, 0.3, "unsure"), (0.4, 0.7, "unsure"), (0.6, 0.7, "ng"), (0.5, 0.45, "ok")],
)
def test_verdicts(score: float, highest: float, verdict: str) -> None:
    assert decide(score, highest, limits(0.5, 0.45)) == verdict


def test_an_uncalibrated_package_never_decides(package: EnginePackage) -> None:
    assert decide(1.0, 1.0, Thresholds()) == "unsure"
    with Inspector.on(trained(package), FakeBackend(package)) as inspector:
        inspector.thresholds = Thresholds()
        result = inspector.inspect(np.zeros((96, 96, 3), np.uint8))
    assert (result.verdict, result.regions) == ("unsure", ())


def test_seeded_weights_decide_nothing(package: EnginePackage) -> None:
    with Inspector.on(package, FakeBackend(package)) as inspector:
        inspector.thresholds = limits(0.5, 0.45)
        result = inspector.inspect(np.zeros((96, 96, 3), np.uint8))
    assert result.verdict == "unsure"
    assert len(result.regions) == 1, "what was seen is shown all the same"


def test_words_change_without_a_new_engine(package: EnginePackage) -> None:
    renamed = PromptBank(("normal", "Kratzer", "Fehlteil", "Kleber"), package.bank().rows)
    with Inspector.on(trained(package), FakeBackend(package)) as inspector:
        inspector.set_bank(renamed, limits(0.5, 0.45))
        assert inspector.inspect(np.zeros((96, 96, 3), np.uint8)).regions[0].type == "Fehlteil"


def test_thresholds_of_other_words_decide_nothing(package: EnginePackage, picture: Any) -> None:
    other = PromptBank(("normal", "a", "b", "c"), package.bank().rows[::-1].copy())
    with Inspector(package) as inspector:
        before = inspector.inspect(picture)
        assert before.verdict in ("ok", "ng", "unsure")
        assert before.pixel_threshold is not None
        inspector.set_bank(other)
        after = inspector.inspect(picture)
        assert (after.verdict, after.regions, after.pixel_threshold) == ("unsure", (), None)
        assert after.types == other.names
        inspector.set_bank(package.bank())
        assert inspector.inspect(picture).pixel_threshold == before.pixel_threshold


def test_a_bank_swapped_in_mid_call_never_mixes_names(package: EnginePackage) -> None:
    class Swapping(FakeBackend):
        def infer(self, views: Sequence[Any], *, map_size: Any = None) -> MapBatch:
            batch = super().infer(views, map_size=map_size)
            self.bank = PromptBank(("normal", "x"), self.bank.rows[:2])
            return batch

    with Inspector.on(trained(package), Swapping(package)) as inspector:
        inspector.thresholds = limits(0.5, 0.45)
        result = inspector.inspect(np.zeros((96, 96, 3), np.uint8))
    assert result.types == package.bank().names
    assert result.regions[0].type == "missing part"


def test_a_region_has_at_least_one_pixel_in_a_small_frame(package: EnginePackage) -> None:
    spec = package.manifest.map
    probs = np.zeros((4, *spec.grid), np.float32)
    probs[0] = 1
    anomaly = np.zeros((500, 500), np.float32)
    anomaly[499, 499] = 0.9
    (region,) = find_regions(anomaly, probs, package.bank().names, spec, 0.5, (64, 48))
    assert region.box == (63, 47, 1, 1)
    assert region.area_px == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((96, 96, 3), np.float32), "must be a uint8 array, not float32"),
        (np.zeros((96, 96, 3), np.uint16), "must be a uint8 array, not uint16"),
        ([[1, 2], [3, 4]], "must be a uint8 array, not list"),
        (None, "must be a uint8 array, not NoneType"),
        (np.zeros((96, 96, 2), np.uint8), r"not \[96, 96, 2\]"),
        (np.zeros((96,), np.uint8), r"not \[96\]"),
        (np.zeros((0, 0, 3), np.uint8), "0 x 0 px"),
        (np.zeros((1, 1, 3), np.uint8), "1 x 1 px"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "at most 100 million pixels"),
    ],
)
def test_impossible_frames(package: EnginePackage, image: Any, message: str) -> None:
    with Inspector.on(trained(package), FakeBackend(package)) as inspector, pytest.raises(FrameError, match=message):
        inspector.inspect(image)


def test_values_that_are_no_numbers_are_an_error_not_a_verdict(package: EnginePackage) -> None:
    class Overflowing(FakeBackend):
        def infer(self, views: Sequence[Any], *, map_size: Any = None) -> MapBatch:
            batch = super().infer(views, map_size=map_size)
            batch.anomaly[0, 3, 5] = np.nan
            return batch

    with (
        Inspector.on(trained(package), Overflowing(package)) as inspector,
        pytest.raises(BackendError, match=r"not numbers \(fake, fp32\)"),
    ):
        inspector.inspect(np.zeros((96, 96, 3), np.uint8))


def test_threads_that_share_an_inspector_get_their_own_results(package: EnginePackage) -> None:
    from concurrent.futures import ThreadPoolExecutor

    views = [np.random.default_rng(seed).integers(0, 256, (64, 96, 3), np.uint8) for seed in range(8)]
    with Inspector(package) as inspector:
        expected = [inspector.inspect(view).score for view in views]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda index: inspector.inspect(views[index % 8]).score, range(160)))
    assert got == [expected[index % 8] for index in range(160)]


@pytest.mark.parametrize("size", [(0, 0), (-1, 5), "frmae", "64x64", 5, (5, 5, 5), (1.0, 5), (10**6, 10**6), ()])
def test_impossible_map_sizes(package: EnginePackage, size: Any) -> None:
    with pytest.raises(RecipeError, match="is not a map size"):
        Inspector(package, map_size=size)


def test_arguments_of_the_wrong_kind(package: EnginePackage) -> None:
    nothing: Any = None
    with pytest.raises(RecipeError, match="a package is a path"):
        Inspector(nothing)
    with pytest.raises(RecipeError, match="unknown backend 'None'"):
        Inspector(package, backend=nothing)
    with Inspector(package) as inspector, pytest.raises(RecipeError, match="a prompt bank is needed"):
        inspector.set_bank(nothing)


def test_unknown_backend(package: EnginePackage) -> None:
    with pytest.raises(RecipeError, match="unknown backend 'tensorflow'"):
        Inspector(package.path, backend="tensorflow")


def test_a_camera_s_own_bytes_are_inspected(package: EnginePackage) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (120, 90), np.uint8)
    with Inspector(package) as inspector:
        raw = inspector.inspect(PixelView(grey, "GRAY8", 90, 120))
        same = inspector.inspect(grey)
        np.testing.assert_array_equal(raw.anomaly_map, same.anomaly_map)
        assert raw.frame_size == (90, 120)
        with pytest.raises(FrameError, match="a frame of 8 x 120 px can't be inspected"):
            inspector.inspect(PixelView(grey, "GRAY8", 90, 120, (0, 0, 8, 120)))
