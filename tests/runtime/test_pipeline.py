"""Every frame is accounted for, whatever happens to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dapo_edge.errors import BackendError, FrameError, SourceError
from dapo_edge.runtime.pipeline import Statistics, inspect_stream
from dapo_edge.runtime.sources import Properties, Source
from dapo_edge.structures import DefectMap, Frame, Inspection


class Scripted(Source):
    """Delivers what its script says: a frame, or an error to raise."""

    def __init__(self, script: Sequence[Any]) -> None:
        super().__init__("scripted://")
        self.script = list(script)

    def _open(self) -> Properties:
        return Properties(uri=self.uri)

    def _read(self, timeout_s: float | None) -> Frame | None:
        if not self.script:
            return None
        item = self.script.pop(0)
        if isinstance(item, BaseException):
            raise item
        return Frame(np.zeros((16, 16, 3), np.uint8), item, 0, self.uri)

    def _close(self) -> None:
        self.closed = True


class Engine:
    """Inspects frames, and fails at the indices that `faults` names."""

    def __init__(self, faults: dict[int, BaseException]) -> None:
        self.faults = faults

    def inspect(self, frame: Frame) -> Inspection:
        if frame.index in self.faults:
            raise self.faults[frame.index]
        flat = DefectMap(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.uint8), ("normal", "a"))
        return Inspection(0.1, "ok", flat, (), (16, 16))


def counts(statistics: Statistics) -> tuple[int, int, int, int]:
    assert statistics.captured == statistics.inspected + statistics.dropped + statistics.failed
    return statistics.captured, statistics.inspected, statistics.dropped, statistics.failed


def test_frames_that_fail_at_either_end_are_counted() -> None:
    statistics = Statistics()
    lost = FrameError("torn", "replace it").at(1, "scripted://1")
    source = Scripted([0, lost, 2, 3])
    engine: Any = Engine({3: FrameError("too small", "use a larger one")})
    outcomes = []
    for outcome in inspect_stream(engine, [source], statistics):
        outcomes.append(outcome)
        counts(statistics)
    assert counts(statistics) == (4, 2, 0, 2)
    assert [outcome.index for outcome in outcomes] == [0, 1, 2, 3]
    assert outcomes[1].source == "scripted://1"
    assert source.closed


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(BackendError("broke", "start again"), (3, 2, 0, 1)), (KeyboardInterrupt(), (3, 2, 1, 0))],
)
def test_the_frame_in_hand_is_counted_when_all_ends(fault: BaseException, expected: tuple[int, ...]) -> None:
    statistics = Statistics()
    source = Scripted(range(9))
    engine: Any = Engine({2: fault})
    with pytest.raises(type(fault)):
        list(inspect_stream(engine, [source], statistics))
    assert counts(statistics) == expected
    assert source.closed


def test_sources_that_break_are_named_at_the_end() -> None:
    statistics = Statistics()
    engine: Any = Engine({})
    broken = [Scripted([0, SourceError(f"camera {name} is gone", "plug it in")]) for name in ("A", "B")]
    seen = []
    with pytest.raises(SourceError, match="camera A is gone; camera B is gone"):
        for outcome in inspect_stream(engine, [*broken, Scripted(range(3))], statistics):
            seen.append(outcome.index)
    assert seen == [0, 0, 0, 1, 2]
    assert counts(statistics) == (5, 5, 0, 0)


def test_limit_and_stop_hold_between_frames() -> None:
    statistics = Statistics()
    engine: Any = Engine({})
    assert len(list(inspect_stream(engine, [Scripted(range(9)), Scripted(range(9))], statistics, limit=2))) == 4
    stop: list[int] = []
    seen = []
    for outcome in inspect_stream(
        engine, [Scripted(range(9)), Scripted(range(9))], statistics, stopped=lambda: bool(stop)
    ):
        seen.append(outcome.index)
        if outcome.index == 3:
            stop.append(1)
    assert seen == [0, 1, 2, 3]
    assert counts(statistics) == (8, 8, 0, 0)
