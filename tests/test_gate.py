"""The accuracy gate: what is measured, which limits hold for which precision, and that nothing slips through as NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dapo_edge import gate
from dapo_edge.backends.base import MapBatch
from dapo_edge.config import Gate
from dapo_edge.errors import GateError
from dapo_edge.gate import Drops
from dapo_edge.package import Threshold, Thresholds
from dapo_edge.prompt_bank import PromptBank

LIMIT = Threshold(value=0.5, false_reject_rate=0.0, confidence_95=(0.0, 0.1))
THRESHOLDS = Thresholds(image=LIMIT, pixel=LIMIT)


class Painted:
    """A backend whose map of a view is its first channel / 255, moved by `offset`; it counts what is asked of it."""

    name = device = "painted"
    precision = "fp32"

    def __init__(self, offset: float = 0.0) -> None:
        self.bank = PromptBank(("normal", "scratch", "dent"), np.eye(3, 8, dtype=np.float32))
        self.offset, self.encoded = np.float32(offset), 0

    def encode(self, views: Sequence[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.encoded += 1
        tokens = np.ones((1, 1, 4, 8), np.float32)
        tokens[..., 0] += 100 * self.offset
        return tokens, tokens[:, 0, 0]

    def infer(self, views: Sequence[Any], *, map_size: Any = None) -> MapBatch:
        anomaly = views[0][None, ..., 0].astype(np.float32) / 255 + self.offset
        types = (anomaly > 0.5).astype(np.uint8)
        probs = np.full((1, 3, 2, 2), 1 / 3, np.float32)
        scores = np.zeros((1, 2), np.float32)
        return MapBatch(anomaly, types, probs, scores, anomaly.max(axis=(1, 2)), self.bank, {"encode": 2.0})


def grey(value: int) -> NDArray[np.uint8]:
    return np.full((6, 8, 3), value, np.uint8)


def test_every_difference_is_measured_against_what_the_reference_said_once() -> None:
    reference, backends = Painted(), {"same": Painted(), "off": Painted(0.1)}
    views = [grey(value) for value in (0, 110, 200)]
    expected = gate.expectations(reference, views, len(views), THRESHOLDS)
    seen: list[tuple[int, list[str]]] = []
    drifts = gate.measure_drift(
        expected,
        backends,
        views,
        THRESHOLDS,
        lambda index, view, truth, batches: seen.append((index, sorted(batches))),
    )
    assert reference.encoded == 3
    assert [one.verdict for one in expected] == ["ok", "ok", "ng"]
    same, off = drifts["same"], drifts["off"]
    assert (same.map_difference_max, same.flips, same.type_agreement) == (0, 0, 1)
    assert same.token_cosine_min == pytest.approx(1)
    assert off.map_difference_max == pytest.approx(0.1, abs=1e-6)
    assert off.map_difference_mean == pytest.approx(0.1, abs=1e-6)
    assert off.score_difference_max == pytest.approx(0.1, abs=1e-6)
    assert off.flips == pytest.approx(1 / 3), "the middle frame now lies above the threshold"
    assert off.type_agreement == pytest.approx(2 / 3)
    assert off.token_cosine_min < 0.9
    assert (off.runs_as, off.encode_ms) == ("fp32", 2.0)
    assert seen == [(0, ["off", "same"]), (1, ["off", "same"]), (2, ["off", "same"])]


def test_tokens_of_many_frames_are_not_kept() -> None:
    reference, views = Painted(), [grey(value) for value in range(40)]
    expected = gate.expectations(reference, views, len(views), Thresholds())
    kept = [index for index, one in enumerate(expected) if one.tokens is not None]
    assert len(kept) == gate.TOKEN_FRAMES == reference.encoded
    assert kept[0] == 0
    assert kept[-1] >= 36, "they are spread over all of the frames"
    assert gate.measure_drift(expected, {"fp32": Painted()}, views, Thresholds())["fp32"].flips is None


def drift(**changes: Any) -> gate.Drift:
    fine = {"runs_as": "fp32", "token_cosine_min": 1.0, "embedding_cosine_min": 1.0, "type_agreement": 1.0}
    fine |= {"encode_ms": 1.0}
    zero = dict.fromkeys(("map_difference_max", "map_difference_mean", "score_difference_max", "flips"), 0.0)
    return gate.Drift(**{**zero, **fine, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flips": 0.01}, "verdict flips 1.00% > 0.50%"),
        ({"map_difference_max": 0.021}, "map difference 0.021 > 0.02"),
        ({"map_difference_max": np.nan}, "map difference nan > 0.02"),
        ({"map_difference_mean": 0.006}, "mean map difference 0.006 > 0.005"),
        ({"type_agreement": 0.97}, "equal types 97.00% < 98.00%"),
        ({"score_difference_max": 0.021}, "score difference 0.021 > 0.02"),
    ],
)
def test_limits_of_a_float_precision(changes: dict[str, float], words: str) -> None:
    assert gate.broken_limits(drift(), None, Gate()) == ()
    assert gate.broken_limits(drift(**changes), None, Gate()) == (words,)


@pytest.mark.parametrize(
    ("runs_as", "map_limit", "score_limit"),
    [("fp32", 0.02, 0.02), ("fp16", 0.02, 0.02), ("bf16", 0.1, 0.1), ("int8+bf16", 0.3, 0.2), ("int8", 0.3, 0.2)],
)
def test_single_pixels_may_move_as_far_as_the_arithmetic_rounds(
    runs_as: str, map_limit: float, score_limit: float
) -> None:
    at = drift(runs_as=runs_as, map_difference_max=map_limit, score_difference_max=score_limit)
    beyond = drift(runs_as=runs_as, map_difference_max=1.01 * map_limit, score_difference_max=1.01 * score_limit)
    assert gate.broken_limits(at, None, Gate()) == ()
    assert len(gate.broken_limits(beyond, None, Gate())) == 2
    assert len(gate.broken_limits(at, None, Gate(max_map_difference=0.01, max_score_difference=0.01))) == 2


def test_int8_must_do_to_the_same_frames_what_it_did_when_it_was_built() -> None:
    built = {"quantization": {"on_reference": {"map_difference_mean": 1e-3, "map_difference_max": 0.1}}}
    assert gate.broken_repeat(drift(map_difference_mean=2.9e-3, map_difference_max=0.24), built) == ()
    assert gate.broken_repeat(drift(map_difference_mean=3.1e-3, map_difference_max=0.26), built) == (
        "mean map difference 0.0031 > 0.003",
        "map difference 0.26 > 0.25",
    )
    assert gate.broken_repeat(drift(map_difference_mean=np.nan), built)
    for report in ({}, {"quantization": None}, {"quantization": {"on_reference": {"map_difference_mean": "x"}}}):
        assert gate.broken_repeat(drift(), report) != (), "a package that does not say it is not believed"


def test_an_auroc_of_few_frames_may_move_by_one_pair() -> None:
    assert gate.broken_limits(drift(), Drops(0.06, None, None, image_pairs=16), Gate()) == ()
    assert gate.broken_limits(drift(), Drops(0.07, None, None, image_pairs=16), Gate())
    assert gate.broken_limits(drift(), Drops(0.006, None, None, image_pairs=10_000), Gate())


def test_drops_count_where_they_are_defined() -> None:
    assert gate.broken_limits(drift(), Drops(0.004, -0.1, 0.009), Gate()) == ()
    assert gate.broken_limits(drift(), Drops(None, None, None), Gate()) == ()
    assert gate.broken_limits(drift(), Drops(0.006, 0.007, 0.02), Gate()) == (
        "image AUROC drops by 0.0060 > 0.005",
        "pixel AUROC drops by 0.0070 > 0.005",
        "AUPRO drops by 0.0200 > 0.01",
    )
    assert gate.broken_limits(drift(), Drops(np.nan, None, None), Gate())


def test_refusing_names_what_every_limit_and_the_remedy() -> None:
    gate.refuse("precision int8", (), "Do this")
    with pytest.raises(GateError, match=r"precision int8 failed the accuracy gate: one; two.*Do this") as caught:
        gate.refuse("precision int8", ("one", "two"), "Do this")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"token_cosine_min": 0.9999},
        {"embedding_cosine_min": 0.9999},
        {"map_difference_max": 2e-3},
        {"score_difference_max": 2e-3},
        {"type_agreement": 0.99},
        {"token_cosine_min": np.nan},
    ],
)
def test_fp32_limits_are_fixed(changes: dict[str, float]) -> None:
    gate.check_export(drift())
    with pytest.raises(GateError, match="exported FP32 encoder"):
        gate.check_export(drift(**changes))
