"""Frames of several cameras in one engine call, each by its own views, and banks that change meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from field_backend import FieldBackend, with_spec
from numpy.typing import NDArray

from dapo_edge import Frame, Inspector
from dapo_edge.backends.base import MapBatch
from dapo_edge.errors import BackendError, FrameError, RecipeError
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.package import EnginePackage, Threshold, Thresholds
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.runtime import batching
from dapo_edge.runtime.regions import RegionOfInterest
from dapo_edge.runtime.slots import Slots
from dapo_edge.runtime.tiling import Views

TILES = Views(tile=(60, 50), overlap=15)
LID = Views((RegionOfInterest.of((20, 10, 50, 40), "lid"),))


def limits(pixel: float) -> Thresholds:
    image, pixel_limit = (Threshold(value=value, false_reject_rate=0, confidence_95=(0, 0.1)) for value in (0.5, pixel))
    return Thresholds(image=image, pixel=pixel_limit, source="test", frames=10)


def random_frame(seed: int, size: tuple[int, int] = (110, 90)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


@pytest.mark.parametrize("map_size", ["model", "frame", (64, 48)])
def test_a_batch_gives_what_single_frames_give(package: EnginePackage, map_size: Any) -> None:
    """Frames of different sizes, whole, cut up and in part, as arrays, frames and a camera's own bytes."""
    grey = random_frame(9)[..., 0]
    images: list[Any] = [
        random_frame(0),
        Frame(random_frame(1, (140, 70)), 0, 0, "synthetic://"),
        random_frame(2),
        PixelView(grey, "GRAY8", 110, 90),
        Frame(PixelView(grey, "GRAY8", 110, 90), 0, 0, "synthetic://"),
    ]
    views = [None, TILES, LID, TILES, Views()]
    with Inspector(package, map_size=map_size) as inspector:
        together = inspector.inspect_batch(images, views)
        alone = [inspector.inspect(image, wanted) for image, wanted in zip(images, views, strict=True)]
        assert inspector.inspect_batch([]) == []
    for got, expected in zip(together, alone, strict=True):
        assert not isinstance(got, FrameError)
        # A matrix product of more rows adds up in another order.
        np.testing.assert_allclose(got.anomaly_map, expected.anomaly_map, atol=1e-5)
        assert (got.type_map == expected.type_map).mean() > 0.999
        assert got.score == pytest.approx(expected.score, abs=1e-5)
        assert got.type_scores == pytest.approx(expected.type_scores, abs=1e-5)
        assert (got.verdict, got.frame_size) == (expected.verdict, expected.frame_size)


def test_a_bad_frame_is_an_error_in_its_place(package: EnginePackage) -> None:
    bad: Any = np.zeros((90, 110, 3), np.float32)
    too_small = random_frame(1, (60, 45))
    with Inspector(package) as inspector:
        results = inspector.inspect_batch([random_frame(0), bad, too_small, random_frame(2)], [None, None, LID, LID])
        assert [type(result).__name__ for result in results] == ["Inspection", "FrameError", "FrameError", "Inspection"]
        assert "must be a uint8 array" in str(results[1])
        assert "'lid' reaches to (70, 50), outside of the frame of 60 x 45 px" in str(results[2])
        (only,) = inspector.inspect_batch([bad])
        assert isinstance(only, FrameError)
        with pytest.raises(RecipeError, match="2 images, but 1 views"):
            inspector.inspect_batch([random_frame(0)] * 2, [None])


def test_as_few_calls_as_there_is_memory_for(package: EnginePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = np.zeros((900, 1000, 3), np.uint8)
    made = with_spec(package)
    backend = FieldBackend(made, frame)
    with Inspector.on(made, backend, map_size="model") as inspector:
        views = Views(tile=(400, 300), overlap=100)  # 3 x 4 tiles
        expected = inspector.inspect(frame, views)
        inspector.inspect_batch([frame, frame, frame], [views, None, views])
        assert backend.calls == [12, 25]
        backend.calls.clear()
        monkeypatch.setattr(
            batching,
            "CALL_BYTES",
            5
            * batching.CALL_BYTES
            // batching.views_per_call(package.manifest.model_copy(update={"map": made.manifest.map}), "model", frame),
        )
        several = inspector.inspect(frame, views)
        assert len(backend.calls) > 1
        assert sum(backend.calls) == 12
        assert max(backend.calls) <= 5
        np.testing.assert_array_equal(several.anomaly_map, expected.anomaly_map)
        assert several.ms["encode"] == pytest.approx(120)


def test_tiles_of_any_size_share_a_call_and_whole_frames_another(package: EnginePackage) -> None:
    frame = np.zeros((300, 420, 3), np.uint8)
    made = with_spec(package)
    backend = FieldBackend(made, frame)
    two = Views((RegionOfInterest.of((0, 0, 200, 100)), RegionOfInterest.of((9, 99, 64, 64))), (100, 100), 20)
    with Inspector.on(made, backend, map_size="frame") as inspector:
        inspector.inspect_batch([frame, frame], [two, None])
    assert sorted(backend.calls) == [1, 4]


def test_whole_batches_of_the_encoder_share_a_call(package: EnginePackage) -> None:
    view = np.zeros((3000, 4000, 3), np.uint8)
    manifest = package.manifest.model_copy(update={"batch": 4})
    assert batching.views_per_call(manifest, "frame", view) == 4
    assert batching.views_per_call(manifest.model_copy(update={"batch": 3}), "frame", view) == 3
    assert batching.views_per_call(manifest.model_copy(update={"batch": 16}), "frame", view) == 16
    assert batching.views_per_call(manifest, "model", view) > 64
    assert batching.views_per_call(manifest, (8000, 8000), view) == 4


def test_stages_are_shared_by_views(package: EnginePackage) -> None:
    frame = np.zeros((90, 110, 3), np.uint8)
    made = with_spec(package)
    with Inspector.on(made, FieldBackend(made, frame), map_size="model") as inspector:
        cut, whole = inspector.inspect_batch([frame, frame], [TILES, None])
    assert not isinstance(cut, FrameError)
    assert not isinstance(whole, FrameError)
    assert cut.ms["encode"] == pytest.approx(90)  # 3 x 3 tiles of 10 ms
    assert whole.ms["encode"] == pytest.approx(10)
    assert cut.ms["stitch"] > 0
    assert "stitch" not in whole.ms
    assert list(cut.ms)[-1] == "total"
    assert whole.ms["total"] >= cut.ms["total"] > 0


def test_defects_across_tiles_and_regions_are_one_and_in_pixels_of_the_frame(package: EnginePackage) -> None:
    """A bar over four tiles, its right half of another type's region of interest."""
    frame = np.zeros((1200, 2000, 3), np.uint8)
    made = with_spec(package)

    def bar(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        return 0.02 + 0.9 * ((x > 300) & (x < 1500) & (y > 520) & (y < 640))

    left, right = RegionOfInterest.of((0, 0, 1000, 1200)), RegionOfInterest.of((900, 0, 1100, 1200))
    for views in (Views(tile=(600, 500), overlap=120), Views((left, right), (600, 500), 120)):
        with Inspector.on(made, FieldBackend(made, frame, bar), map_size="model") as inspector:
            inspector.thresholds = limits(0.4)
            result = inspector.inspect(frame, views)
        (region,) = result.regions
        assert region.type == "scratch"
        np.testing.assert_allclose(region.box, (300, 520, 1200, 120), atol=30)
        assert region.area_px == pytest.approx(1200 * 120, rel=0.25)
        assert result.verdict == "ng"


def test_damaged_values_of_one_tile_are_an_error(package: EnginePackage) -> None:
    class Overflowing(FieldBackend):
        def infer(self, views: Sequence[Any], *, map_size: Any = None) -> MapBatch:
            batch = super().infer(views, map_size=map_size)
            batch.patch_probs[len(views) - 1, 1, 3, 5] = np.nan
            return batch

    frame = np.zeros((90, 110, 3), np.uint8)
    made = with_spec(package)
    regions = (RegionOfInterest.of((0, 0, 40, 40)), RegionOfInterest.of((30, 30, 60, 50)))
    for views in (TILES, Views(regions), Views(regions[::-1])):
        with (
            Inspector.on(made, Overflowing(made, frame)) as inspector,
            pytest.raises(BackendError, match=r"not numbers \(field, fp32\)"),
        ):
            inspector.inspect(frame, views)


class Watched(FieldBackend):
    """Fails if more than `concurrency` calls run at once, or a bank changes during one."""

    concurrency = 3

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self.lock = threading.Lock()
        self.running = self.most = 0
        self.faults: list[str] = []

    def infer(self, views: Sequence[Any], *, map_size: Any = None) -> MapBatch:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        bank = self.bank
        time.sleep(0.002)
        batch = super().infer(views, map_size=map_size)
        with self.lock:
            self.running -= 1
        if self.bank is not bank:
            self.faults.append("the bank changed in mid-call")
        return batch

    def set_bank(self, bank: PromptBank) -> None:
        if self.running:
            self.faults.append(f"{self.running} calls were running")
        time.sleep(0.001)
        super().set_bank(bank)


def test_bank_and_thresholds_change_together_between_calls(package: EnginePackage) -> None:
    """Each bank has a pixel threshold of its own; every result must show a pair that belongs together."""
    frame = np.zeros((90, 110, 3), np.uint8)
    made = with_spec(package)
    backend = Watched(made, frame)
    rows = package.bank().rows
    banks = [PromptBank(("normal", f"a{n}", f"b{n}", f"c{n}"), rows) for n in range(4)]
    with Inspector.on(made, backend) as inspector:
        inspector.set_bank(banks[0], limits(0.8))

        def swap() -> None:
            for n in range(60):
                inspector.set_bank(banks[n % 4], limits(0.8 + n % 4 / 100))

        def look(count: int) -> list[tuple[str, float | None]]:
            results = [inspector.inspect(frame, TILES) for _ in range(count)]
            return [(result.types[1], result.pixel_threshold) for result in results]

        with ThreadPoolExecutor(7) as pool:
            swapping = pool.submit(swap)
            seen = [pair for looking in [pool.submit(look, 40) for _ in range(6)] for pair in looking.result()]
            swapping.result()
    assert backend.faults == []
    assert backend.most == 3, "calls run side by side"
    assert set(seen) <= {(f"a{n}", 0.8 + n / 100) for n in range(4)}
    assert len(set(seen)) > 1
    assert backend.closed


def test_whoever_wants_all_slots_is_not_starved() -> None:
    """Four threads that never leave a slot free for long, and one that needs all of them, 50 times."""
    slots, stop, alone = Slots(2), threading.Event(), []

    def busy() -> None:
        while not stop.is_set():
            with slots.one():
                time.sleep(0.001)

    threads = [threading.Thread(target=busy) for _ in range(4)]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    try:
        for _ in range(50):
            with slots.all():
                alone.append(True)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(alone) == 50
    assert time.perf_counter() - started < 10


def test_slots_come_back_after_an_error() -> None:
    slots = Slots(2)
    for taking in (slots.one, slots.all):
        with pytest.raises(RuntimeError, match="inside"), taking():
            raise RuntimeError("inside")
    with slots.all():
        pass
    with slots.one(), slots.one():
        pass
