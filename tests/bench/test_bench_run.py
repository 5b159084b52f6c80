"""A benchmark from Python: what is refused in time, what energy belongs to, what an interrupted sweep leaves."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_machine import rails

from dapo_edge.bench import BenchPlan, bench
from dapo_edge.bench import run as bench_run
from dapo_edge.bench.sensors import Sensors
from dapo_edge.errors import RecipeError
from dapo_edge.package import EnginePackage
from dapo_edge.runtime.inspector import Inspector


@pytest.fixture(scope="module")
def inspector(package: EnginePackage) -> Iterator[Inspector]:
    with Inspector(package) as opened:
        yield opened


def small(**options: Any) -> BenchPlan:
    return BenchPlan(**{"source": "synthetic://96x64", "frames": 4, "warm_up": 0, **options})


def test_a_sweep_that_a_live_camera_can_t_have_is_refused_before_anything_is_timed(inspector: Inspector) -> None:
    steps: list[str] = []
    plan = small(source="synthetic://96x64@30?realtime=1", cameras=(1, 2))
    with pytest.raises(RecipeError, match="a sweep over cameras is impossible"):
        bench(inspector, plan, progress=lambda step, done, of: steps.append(step))
    assert steps == []


def test_energy_is_told_only_where_one_package_spent_it(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench_run, "Sensors", functools.partial(Sensors, 0.005, rails(tmp_path, ("VDD_IN", 5000, 2000)))
    )
    alone = bench(inspector, small(seconds=0.2))["power"]
    assert alone["joules_per_frame"] > 0
    both = bench(inspector, small(seconds=0.2), compare=inspector)["power"]
    assert both["mean_w"] == pytest.approx(10)
    assert both["joules_per_frame"] is None


def test_too_few_pairs_have_no_interval(inspector: Inspector) -> None:
    def warnings(frames: int) -> str:
        return " ".join(bench(inspector, small(frames=frames), compare=inspector)["warnings"])

    assert "5 pairs of frames are too few" in warnings(5)
    assert "pairs" not in warnings(6)


def test_an_interruption_in_a_sweep_is_one(inspector: Inspector) -> None:
    steps: list[str] = []

    def progress(step: str, done: int, of: int) -> None:
        steps.append(step)
        if steps.count("timing calls of many frames") > 25:  # in the second of them
            raise KeyboardInterrupt

    found = bench(inspector, small(batches=(1, 2), cameras=(1, 2)), progress=progress)
    assert found["interrupted"]
    assert found["frames"] == 4
    assert [row["frames_per_call"] for row in found["sweeps"]["batches"]] == [1]
    assert found["sweeps"]["cameras"] == []
    assert "timing many cameras" not in steps
    assert any("during the sweeps" in warning for warning in found["warnings"])
