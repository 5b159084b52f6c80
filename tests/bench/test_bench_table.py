"""What people see of a benchmark on a terminal."""

from __future__ import annotations

from typing import Any

import documents
import pytest
from documents import document
from rich.console import Console

from dapo_edge.bench.table import bench_table


def shown(result: dict[str, Any], width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(bench_table(result))
    return captured.get()


def test_stages_and_speed() -> None:
    text = shown(document())
    assert text.startswith("pcb-line3: ViT-B-16, 224 px, int8\nopenvino on Some CPU, 2 cores")
    assert "stage, ms    mean    p50    p90    p95    p99    max" in text
    assert "frames 1920 x 1080 from synthetic://1920x1080@30 (16 different ones); map 1920 x 1080, 18" in text
    assert "warm-up 60 frames in 2.4 s, until times were steady" in text
    assert "27.4 frames/s: 400 frames in 14.6 s, one at a time" in text
    assert "power: not available (no sensor that can be read: no energy counters of the CPU)" in text
    assert "deadline" not in text


def test_the_stage_table_fits_a_terminal() -> None:
    lines = shown(document(), width=100).splitlines()
    (header,) = [line for line in lines if line.startswith("stage, ms")]
    assert "max" in header
    assert "…" not in header


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"deadline": documents.deadline()}, "p99 meets the deadline of 45 ms: 1 late or lost (0.25%)"),
        ({"deadline": documents.deadline(False)}, "p99 misses the deadline of 36 ms: 190 late or lost (47.50%)"),
        (
            {"deadline": {"ms": 50.0, "misses": 0, "share": 0.0, "met": True}},
            "p99 meets the deadline of 50 ms: no frame late",
        ),
        ({"mode": "rate", "rate": documents.rate()}, "asked 30.0, source gave 24.9 frames/s; 24.8 inspected"),
        ({"mode": "rate", "rate": documents.rate(dropped=0, failed=0)}, "400 captured = 397 inspected, none lost"),
        ({"mode": "rate", "rate": documents.rate(saturated=True)}, "the engine can't keep up"),
        ({"mode": "rate", "rate": documents.rate(cameras=2)}, "asked 60.0, source gave"),
        ({"mode": "rate", "rate": documents.rate(cameras=2)}, "2 cameras at 30 frames/s each"),
        ({"compare": documents.compare()}, "2.19 times as fast as pcb-line4 (openvino, fp32), 95 % sure between 2.15"),
        ({"compare": documents.compare()}, "by turns with the other package"),
        ({"sweeps": documents.sweeps()}, "frames per call  call p50, ms"),
        ({"sweeps": documents.sweeps(at_a_rate=False)}, "4              –            –             26.0"),
        ({"interrupted": True}, "interrupted: of a part of the run"),
        ({"warnings": ["the source ended after 9 frames"]}, "warning: the source ended after 9 frames"),
        (documents.sensed(), "power: 31.4 W, 44.0 W at most, 1.14 J per frame (RAPL package-0 + NVML NVIDIA L4)"),
        (documents.sensed(), "CPU clock: 3200 MHz (2100 to 3400); GPU clock: 1377 MHz"),
        (documents.sensed(), "temperature: 64 °C (x86_pkg_temp)"),
        (documents.sensed(), "power mode: CPU governor performance"),
    ],
)
def test_what_a_run_may_tell_besides(changes: dict[str, Any], text: str) -> None:
    assert text in shown(document(**changes), width=400)
    assert text not in shown(document(), width=400)


def test_rates_that_were_tried() -> None:
    changes = {"rate": documents.rate(), "find_rate": documents.found_rate(), "deadline": documents.deadline()}
    text = shown(document(mode="find-rate", **changes))
    assert "highest rate that meets the deadline: 21.4 frames/s (5 tried)" in text
    assert "   30.00    812.0    31  can't keep up    missed" in text


def test_a_half_sum_of_power_names_what_is_missing() -> None:
    sensed = documents.sensed()
    sensed["power"]["left_out"] = ["RAPL: permission denied: readable by root only"]
    assert "without RAPL: permission denied: readable by root only)" in shown(document(**sensed), width=400)


def test_names_are_no_markup() -> None:
    assert "[bold]x[/bold]" in shown(document(package=documents.package("[bold]x[/bold]")))
