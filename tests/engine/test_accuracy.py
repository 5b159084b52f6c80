"""Accuracy in the gate: the same numbers as an evaluation gives, for eager and every precision, in constant memory."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from dapo_edge.config import Gate
from dapo_edge.data.dataset import types_at
from dapo_edge.engine.accuracy import Accuracy, AccuracyMeter, GateAccuracy, drops, mask_at
from dapo_edge.engine.gate_frames import GateFrame, gate_frames
from dapo_edge.errors import BackendError
from dapo_edge.evaluation.metrics import Evaluation
from dapo_edge.gate import Drift, Drops, broken_limits
from dapo_edge.structures import Truth

NAMES = ("normal", "rust", "dent")
SIDE = 32


def made(number: int, labelled: bool = True, masked: bool = True) -> GateFrame:
    """A picture of 64 x 48; every second one has a defect."""
    types = np.zeros((48, 64), np.uint8)
    if number % 2:
        types[8:24, 10 + number : 30 + number] = 1 + number % 4 // 2
    view = np.zeros((48, 64, 3), np.uint8)
    if not labelled:
        return GateFrame(view, str(number))
    return GateFrame(view, str(number), bool(number % 2), Truth(types, NAMES) if masked or not number % 2 else None)


def seen(frame: GateFrame, noise: float) -> NDArray[np.float32]:
    """An anomaly map [SIDE, SIDE] that shows the defects, and `noise`."""
    rng = np.random.default_rng(int(frame.title))
    mask = mask_at(frame, (SIDE, SIDE))
    base = 0.5 * mask if mask is not None else np.zeros((SIDE, SIDE))
    return np.clip(base + noise * rng.random((SIDE, SIDE)), 0, 1).astype(np.float32)


def batch(anomaly: NDArray[np.float32]) -> Any:
    return SimpleNamespace(anomaly=anomaly[None], image_scores=np.array([anomaly.max()], np.float32))


def expected(anomaly: NDArray[np.float32]) -> Any:
    return SimpleNamespace(anomaly=anomaly, score=float(anomaly.max()))


def gate_of(frames: list[GateFrame], noise: dict[str, float], reference: float = 0.1) -> GateAccuracy:
    found = GateAccuracy()
    for frame in frames:
        found.add(
            frame, expected(seen(frame, reference)), {name: batch(seen(frame, much)) for name, much in noise.items()}
        )
    return found


def test_it_equals_the_evaluation_and_scikit_learn() -> None:
    frames = [made(number) for number in range(12)]
    found = gate_of(frames, {"int8": 0.7})
    for accuracy, noise in ((found.reference, 0.1), (found.precisions["int8"], 0.7)):
        whole, labels, scores, pixels, truth = Evaluation(NAMES), [], [], [], []
        for frame in frames:
            assert frame.truth is not None
            anomaly, types = seen(frame, noise), types_at(frame.truth.types, (SIDE, SIDE))
            whole.add(np.stack([1 - anomaly, anomaly, np.zeros_like(anomaly)]), float(anomaly.max()), types)
            labels.append(frame.defective)
            scores.append(anomaly.max())
            pixels.append(anomaly)
            truth.append(types > 0)
        summary = whole.summary()
        assert accuracy.image_auroc == pytest.approx(summary.image_auroc)
        assert accuracy.pixel_auroc == pytest.approx(summary.pixel_auroc, abs=1e-5)
        assert accuracy.aupro == pytest.approx(summary.aupro, abs=1e-5)
        assert accuracy.image_auroc == pytest.approx(roc_auc_score(labels, scores))
        assert accuracy.pixel_auroc == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(pixels)), abs=1e-4)


def test_a_worse_precision_drops() -> None:
    found = gate_of([made(number) for number in range(12)], {"fp32": 0.1, "int8": 0.9})
    same, worse = (drops(found.reference, found.precisions[name]) for name in ("fp32", "int8"))
    assert (same.image_auroc, same.pixel_auroc, same.aupro) == (0, 0, 0)
    assert worse.pixel_auroc is not None
    assert worse.aupro is not None
    assert worse.pixel_auroc > 0.01
    assert worse.aupro > 0.01
    better = drops(found.precisions["int8"], found.reference)
    assert better.pixel_auroc == -worse.pixel_auroc


@pytest.mark.parametrize("remainder", [0, 1])
def test_one_kind_of_frames_leaves_image_auroc_open(remainder: int) -> None:
    found = gate_of([made(number) for number in range(12) if number % 2 == remainder], {"int8": 0.7})
    drop = drops(found.reference, found.precisions["int8"])
    assert drop.image_auroc is None
    assert (drop.pixel_auroc is None) == (drop.aupro is None) == (remainder == 0), "defective frames have good pixels"


def test_frames_without_labels_or_masks() -> None:
    unlabelled = gate_of([made(number, labelled=False) for number in range(4)], {"int8": 0.7})
    assert unlabelled.precisions == {}
    assert unlabelled.reference == Accuracy(None, None, None)
    unmasked = gate_of([made(number, masked=False) for number in range(8)], {"int8": 0.7}).precisions["int8"]
    assert unmasked.image_auroc is not None
    assert (unmasked.pixel_auroc, unmasked.aupro) == (None, None), "all known pixels are good"


def test_drops_of_what_is_undefined() -> None:
    known, unknown = Accuracy(0.9, 0.8, 0.7), Accuracy(None, 0.75, None)
    assert drops(known, unknown) == Drops(None, pytest.approx(0.05), None)
    assert drops(unknown, known) == Drops(None, pytest.approx(-0.05), None)


def test_maps_that_are_no_numbers_fail_by_their_drift_and_not_here() -> None:
    frames = [made(number) for number in range(6)]
    found = GateAccuracy()
    for frame in frames:
        broken = batch(seen(frame, 0.1))
        if frame.title == "3":
            broken.anomaly[0, 0, 0] = np.nan
        if frame.title == "4":
            broken.image_scores[0] = np.nan
        found.add(frame, expected(seen(frame, 0.1)), {"int8": broken})
    meter = AccuracyMeter()
    for frame in frames:
        if frame.title not in "34":
            mask, anomaly = mask_at(frame, (SIDE, SIDE)), seen(frame, 0.1)
            meter.add(anomaly, float(anomaly.max()), bool(frame.defective), mask)
    assert found.precisions["int8"] == meter.accuracy()
    drift = Drift("int8", 1.0, 1.0, np.nan, np.nan, 1.0, np.nan, 0.0, 1.0)
    assert "map difference nan" in " ".join(broken_limits(drift, None, Gate()))


def test_values_beyond_a_probability_are_refused() -> None:
    with pytest.raises(BackendError, match=r"must lie in \[0, 1\]"):
        AccuracyMeter().add(np.full((4, 4), 1.5, np.float32), 0.5, True, np.ones((4, 4), bool))


def test_masks_come_to_the_maps_size() -> None:
    frame = made(1)
    mask = mask_at(frame, (24, 32))
    assert mask is not None
    assert mask.shape == (24, 32)
    assert mask.sum() == 8 * 10
    speck = np.zeros((48, 64), np.uint8)
    speck[1, 1] = 1
    found = mask_at(GateFrame(frame.view, "speck", True, Truth(speck, NAMES)), (6, 8))
    assert found is not None
    assert found.sum() == 1, "a defect smaller than the map's pixels is still one"
    assert mask_at(made(1, masked=False), (24, 32)) is None


def test_memory_does_not_grow_with_the_frames() -> None:
    frames = gate_frames(Gate(), 2, 5)
    found = GateAccuracy()

    def feed(rounds: int) -> int:
        for _ in range(rounds):
            for frame in (frames[0], frames[1]):
                anomaly = seen(GateFrame(frame.view, "1", frame.defective, frame.truth), 0.2)
                found.add(frame, expected(anomaly), {"int8": batch(anomaly)})
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = feed(3)
        assert feed(30) - before < 200_000  # a single map and mask of these frames have 300,000 bytes
    finally:
        tracemalloc.stop()
