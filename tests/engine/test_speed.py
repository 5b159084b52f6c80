"""Which precision a build takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dapo_edge.engine.speed import MAX_ROUNDS, MIN_ROUNDS, encode_latencies, fastest


@pytest.mark.parametrize(
    ("latencies", "taken"),
    [
        ({"fp32": 80.0}, "fp32"),
        ({"fp32": 80.0, "fp16": 77.0}, "fp32"),
        ({"fp32": 80.0, "fp16": 76.0}, "fp16"),
        ({"fp32": 80.0, "fp16": 50.0, "int8": 48.0}, "fp16"),
        ({"fp32": 80.0, "fp16": 50.0, "int8": 47.0}, "int8"),
        ({"fp32": 80.0, "fp16": 120.0, "int8": 76.0}, "int8"),
        ({"fp32": 80.0, "int8": 90.0}, "fp32"),
    ],
)
def test_a_less_precise_one_must_be_worth_it(latencies: dict[str, float], taken: str) -> None:
    assert fastest(latencies) == taken


def test_backends_take_turns() -> None:
    calls: list[str] = []

    def backend(name: str, ms: float) -> Any:
        def infer(views: Any) -> Any:
            calls.append(name)
            return SimpleNamespace(stage_ms={"encode": ms + calls.count(name) % 3 - 1})

        return SimpleNamespace(infer=infer)

    view = np.zeros((4, 4, 3), np.uint8)
    latencies = encode_latencies({"a": backend("a", 10.0), "b": backend("b", 20.0)}, view)
    assert latencies == {"a": 10.0, "b": 20.0}
    assert calls[2:] == ["a", "b"] * MAX_ROUNDS
    assert MIN_ROUNDS >= 3
