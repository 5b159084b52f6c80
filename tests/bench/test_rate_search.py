"""The highest rate that meets a deadline."""

from __future__ import annotations

from typing import Any

import pytest
from rate_fakes import Engine, feed

from dapo_edge.bench.rate import RateRun
from dapo_edge.bench.samples import Samples
from dapo_edge.bench.search import FoundRate, Probe, find_rate
from dapo_edge.errors import DeadlineError, FrameError, RecipeError
from dapo_edge.structures import Frame


def find(engine: Engine, deadline_ms: float, **options: Any) -> FoundRate:
    return find_rate(engine, feed(), deadline_ms=deadline_ms, **{"seconds": 0.5, **options})  # type: ignore[arg-type]


def test_an_engine_of_5_ms_takes_nearly_200_frames_a_second() -> None:
    told: list[Probe] = []
    found = find(Engine(0.005), 20, seconds=0.2, tell=told.append)
    assert found.fps is not None
    assert 120 <= found.fps <= 200
    assert found.run.fps == found.fps
    assert not found.run.interrupted
    assert len(found.run.samples) == max(100, round(found.fps))
    assert found.probes == tuple(told)
    assert found.probes[-1].met
    assert found.probes[-1].p99_ms <= 20
    assert any(probe.saturated for probe in found.probes)
    assert not any(probe.met for probe in found.probes if probe.fps > 205)


def test_the_deadline_must_leave_time_for_a_frame_that_never_waits() -> None:
    with pytest.raises(
        DeadlineError, match=r"deadline of 4 ms is below .* \(median [5-9]\.\d ms, [5-9]\.\d ms of it in the enc"
    ) as caught:
        find(Engine(0.005), 4)
    assert caught.value.exit_code == 6


def test_a_deadline_that_too_many_frames_miss_at_any_rate() -> None:
    def fault(frame: Frame) -> FrameError | None:
        return FrameError("it is torn", "Look at the cable") if frame.index % 20 == 3 else None

    with pytest.raises(DeadlineError, match=r"missed by more than 1 % of the frames even at"):
        find(Engine(0.002, fault=fault), 100, seconds=0.1)


class Scripted:
    """Stands in for `at_rate`: rates up to `limit` meet the deadline, but for calls that a test spoils."""

    def __init__(self, limit: float, spoiled: frozenset[int] = frozenset(), interrupted_at: int | None = None) -> None:
        self.limit, self.spoiled, self.interrupted_at = limit, spoiled, interrupted_at
        self.calls: list[tuple[float, int]] = []

    def __call__(self, inspector: Any, feed: Any, *, fps: float, frames: int, progress: Any) -> RateRun:
        number = len(self.calls)
        self.calls.append((fps, frames))
        samples = Samples()
        slow = fps > self.limit or number in self.spoiled
        for index in range(10):
            samples.add({"total": 100.0 if slow else 5.0}, float(index))
        stop = number == self.interrupted_at
        return RateRun(fps, 1, samples, 0.0, 1.0, 10, 0, 0, fps, fps, fps > self.limit, False, stop)


@pytest.fixture
def scripted_rates(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(*arguments: Any, **options: Any) -> Scripted:
        script = Scripted(*arguments, **options)
        monkeypatch.setattr("dapo_edge.bench.search.at_rate", script)
        monkeypatch.setattr("dapo_edge.bench.search._unloaded_s", lambda *arguments: 0.01)
        return script

    return use


def test_the_rate_is_found_to_3_percent(scripted_rates: Any) -> None:
    for limit in (13.0, 60.0, 173.0, 1999.0):
        script = scripted_rates(limit)
        found = find(Engine(0.0), 20, seconds=4)
        assert found.fps is not None
        assert limit / 1.03 <= found.fps <= limit
        fps, frames = script.calls[-1]
        assert fps == found.fps
        assert frames == max(100, min(max(1000, round(5 * fps)), round(20 * fps)))


def test_a_single_hiccup_changes_nothing(scripted_rates: Any) -> None:
    scripted_rates(173.0)
    calm = find(Engine(0.0), 20)
    scripted_rates(173.0, spoiled=frozenset({0, 4}))
    shaken = find(Engine(0.0), 20)
    assert shaken.fps == calm.fps
    assert len(shaken.probes) == len(calm.probes) + 2
    assert [(probe.fps, probe.met) for probe in shaken.probes[:2]] == [(50, False), (50, True)]


def test_a_rate_that_does_not_last_is_lowered(scripted_rates: Any) -> None:
    calm = scripted_rates(173.0)
    high = find(Engine(0.0), 20).fps
    last = len(calm.calls) - 1
    scripted_rates(173.0, spoiled=frozenset({last, last + 1}))
    found = find(Engine(0.0), 20)
    assert high is not None
    assert found.fps == pytest.approx(high / 1.03**2)
    scripted_rates(173.0, spoiled=frozenset(range(last, last + 100)))
    with pytest.raises(DeadlineError, match="missed by more than 1 %"):
        find(Engine(0.0), 20)


def test_an_interrupted_search_keeps_its_best(scripted_rates: Any) -> None:
    scripted_rates(173.0, interrupted_at=4)
    found = find(Engine(0.0), 20)
    assert found.fps == found.run.fps == 141.4213562373095  # 100 was met, 200 was not, the mean of both was
    assert found.run.interrupted
    assert len(found.probes) == 4
    scripted_rates(173.0, interrupted_at=0)
    nothing = find(Engine(0.0), 20)
    assert nothing.fps is None
    assert nothing.run.interrupted
    assert nothing.probes == ()


def test_an_interruption_before_any_rate_is_raised() -> None:
    def at_once(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find(Engine(0.001), 20, progress=at_once)


def test_what_can_t_be_searched() -> None:
    with pytest.raises(RecipeError, match="deadline of 0 milliseconds"):
        find(Engine(0.0), 0)
    with pytest.raises(RecipeError, match="gives frames at its own pace"):
        find_rate(Engine(0.0), feed("camera://belt", live=True), deadline_ms=20)  # type: ignore[arg-type]
