"""What can't be measured is refused before anything is opened."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dapo_edge.bench.plan import BenchPlan
from dapo_edge.errors import RecipeError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate_fps": 0}, "a rate of 0 frames per second is impossible"),
        ({"rate_fps": -3.0}, "a rate of -3"),
        ({"rate_fps": math.nan}, "a rate of nan"),
        ({"rate_fps": math.inf}, "a rate of inf"),
        ({"deadline_ms": 0}, "a deadline of 0 milliseconds"),
        ({"seconds": -1}, "time to measure"),
        ({"frames": 0}, "0 frames can't be timed"),
        ({"warm_up": -1}, "warm-up of -1"),
        ({"find_rate": True}, "Add --deadline-ms"),
        ({"find_rate": True, "deadline_ms": 30, "rate_fps": 10}, "Leave out --rate or --find-rate"),
        ({"cameras": (1, 0)}, "0 cameras"),
        ({"cameras": (65,)}, "Use from 1 to 64"),
        ({"batches": (1, 1000)}, "1000 frames per call"),
    ],
    ids=str,
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        BenchPlan(**fields)
    assert message in str(error.value)


def test_the_default_is_one_frame_at_a_time() -> None:
    plan = BenchPlan()
    assert (plan.rate_fps, plan.deadline_ms, plan.find_rate, plan.warm_up) == (None, None, False, None)
