"""Sensors of made machines while something runs: what is told, what is added, and what is not there."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_machine import STATUS, FakeNvml, rails, rapl, write

from dapo_edge.bench import nvml, power
from dapo_edge.bench.sensors import Reading, Sensors
from dapo_edge.device import Gpu
from dapo_edge.errors import RecipeError

L4 = Gpu("NVIDIA L4", "8.9", 24 << 30, "12.6", False, 58)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "gpus", lambda: ())
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    found = FakeNvml(os.getpid())
    monkeypatch.setitem(sys.modules, "pynvml", found)  # type: ignore[arg-type]
    monkeypatch.setattr(nvml, "gpus", lambda: (L4,))
    monkeypatch.setattr(nvml, "_pci_bus_id", lambda number: b"0000:01:00.0")
    return found


def sensed(root: Path, seconds: float = 0.2, frames: int = 10) -> dict[str, Any]:
    """What a short run tells."""
    started_s = time.monotonic()
    with Sensors(0.02, root) as sensors:
        time.sleep(seconds)
        return sensors.summary(started_s, time.monotonic(), frames)


def read_again(sensors: Sensors) -> None:
    """Wait for two more readings: one may be under way."""
    before, limit_s = len(sensors.readings()), time.monotonic() + 10
    while len(sensors.readings()) < before + 2:
        assert time.monotonic() < limit_s
        time.sleep(0.005)


def test_a_machine_without_sensors_says_so_and_never_0(tmp_path: Path) -> None:
    found = sensed(tmp_path)
    assert found["power"]["unavailable"] == (
        "no sensor that can be read: no power monitor of a Jetson, no energy counters of the CPU, no NVIDIA GPU"
    )
    assert "cpuinfo" in found["clocks"]["cpu"]["unavailable"]
    assert found["clocks"]["gpu"] == {"unavailable": "no NVIDIA GPU"}
    assert found["temperature"] == {
        "unavailable": "thermal zones: this machine has no thermal zone; NVML: no NVIDIA GPU"
    }
    assert list(found["memory"]["host"]) == list(found["memory"]["device"]) == ["unavailable"]
    assert found["power_mode"] == {"unavailable": "this machine names no power mode"}
    assert found["warnings"] == []
    json.dumps(found, allow_nan=False)


def test_power_and_energy_of_a_module_with_an_input_rail(tmp_path: Path) -> None:
    rails(tmp_path, ("VDD_IN", 5000, 2000), ("VDD_CPU_GPU_CV", 5000, 900), ("VDD_SOC", 5000, 400))
    started_s = time.monotonic()
    with Sensors(0.02, tmp_path) as sensors:
        read_again(sensors)
        found = sensors.summary(started_s, started_s + 2.0, 10)["power"]
    assert found["sensor"] == "INA3221 VDD_IN"
    assert found["mean_w"] == found["max_w"] == pytest.approx(10.0)
    assert found["joules_per_frame"] == pytest.approx(10.0 * 2.0 / 10)
    assert found["left_out"] == []


def test_counters_that_only_root_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> int:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return int(path.read_text())

    monkeypatch.setattr(power, "number", refused)
    found = sensed(rapl(tmp_path))["power"]["unavailable"]
    assert "permission denied: readable by root only" in found


def test_cpu_and_gpu_are_added_and_named(tmp_path: Path, gpu: FakeNvml) -> None:
    found = sensed(rapl(tmp_path))
    assert found["power"]["sensor"] == "RAPL package-0 + NVML NVIDIA L4"
    assert found["power"]["mean_w"] == pytest.approx(40.0), "the counter stands still"
    assert found["clocks"]["gpu"]["mean_mhz"] == 1377
    assert found["temperature"] == {"max_c": 61.0, "sensor": "NVML NVIDIA L4"}
    assert found["memory"]["device"] == {"peak_mb": 600.0, "of": "this process"}
    assert gpu.bus == b"0000:01:00.0"
    assert not gpu.is_open, "given back"


def test_a_part_that_can_t_be_read_is_named(tmp_path: Path, gpu: FakeNvml) -> None:
    found = sensed(tmp_path)["power"]
    assert found["sensor"] == "NVML NVIDIA L4"
    assert found["left_out"] == ["RAPL: no energy counters of the CPU"]


def test_the_rails_of_a_module_have_its_gpu_in_them(tmp_path: Path, gpu: FakeNvml) -> None:
    write(rails(tmp_path, ("VDD_IN", 5000, 2000)), {"sys/class/devfreq/17000000.gpu/cur_freq": "612000000"})
    found = sensed(tmp_path)
    assert found["power"]["mean_w"] == pytest.approx(10.0)
    assert found["power"]["left_out"] == []
    assert found["clocks"]["gpu"]["sensor"] == "devfreq 17000000.gpu"
    assert found["clocks"]["gpu"]["max_mhz"] == 612


def test_processes_that_can_t_be_told_apart(tmp_path: Path, gpu: FakeNvml) -> None:
    gpu.pid = None
    assert sensed(tmp_path)["memory"]["device"] == {"peak_mb": 900.0, "of": "whole device"}


def test_a_gpu_that_slows_down_is_a_warning(tmp_path: Path, gpu: FakeNvml) -> None:
    gpu.reasons = gpu.nvmlClocksThrottleReasonSwPowerCap | gpu.nvmlClocksThrottleReasonHwThermalSlowdown | 1
    assert sensed(tmp_path)["warnings"] == [
        "the GPU was slowed down by its power limit during 100% of the run",
        "the GPU was slowed down by heat during 100% of the run",
    ]


def test_nvml_that_is_not_installed(tmp_path: Path, gpu: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = sensed(tmp_path)
    assert "pip install 'dapo-edge[gpu]'" in found["power"]["unavailable"]
    assert "'pynvml' can't be imported" in found["clocks"]["gpu"]["unavailable"]


def test_a_gpu_that_is_not_there(tmp_path: Path, gpu: FakeNvml) -> None:
    with Sensors(0.02, tmp_path, gpu=1) as sensors:
        read_again(sensors)
        found = sensors.summary(0.0, math.inf, 1)
    assert found["clocks"]["gpu"] == {"unavailable": "there is no GPU 1"}


@pytest.mark.parametrize("code", [0, 101])
def test_a_gpu_is_found_by_its_place_on_the_bus(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES and NVML number GPUs differently."""

    def get(device: Any, number: int) -> int:
        device._obj.value = 40 + number
        return 0

    def bus_id(text: Any, size: int, device: Any) -> int:
        text.value = f"0000:{device.value}:00.0".encode()
        return code

    driver = SimpleNamespace(cuDeviceGet=get, cuDeviceGetPCIBusId=bus_id)
    monkeypatch.setattr(nvml, "load_driver", lambda: driver)
    if code:
        with pytest.raises(LookupError, match="does not tell where GPU 1 is"):
            nvml._pci_bus_id(1)
    else:
        assert nvml._pci_bus_id(1) == b"0000:41:00.0"


def test_half_a_sum_is_none(tmp_path: Path, gpu: FakeNvml) -> None:
    started_s = time.monotonic()
    with Sensors(0.02, rapl(tmp_path)) as sensors:
        read_again(sensors)
        gpu.broken = True
        read_again(sensors)
        found = sensors.summary(started_s, time.monotonic(), 10)
    assert found["power"] == {"unavailable": "NVML NVIDIA L4: failed while it was read: GPU is lost"}
    assert found["clocks"]["gpu"]["mean_mhz"] == 1377, "the other sensors go on"


def test_a_sensor_that_breaks_down_does_not_end_the_run(tmp_path: Path) -> None:
    rails(tmp_path, ("VDD_IN", 5000, 2000))
    write(tmp_path, {"proc/self/status": STATUS.format(2048, 1024)})
    with Sensors(0.02, tmp_path) as sensors:
        read_again(sensors)
        (tmp_path / "sys/class/hwmon/hwmon0/in1_input").unlink()
        read_again(sensors)
        found = sensors.summary(0.0, math.inf, 10)
        assert sensors.readings()[0].power_w == pytest.approx(10.0)
        assert sensors.readings()[-1].power_w is None
    assert "failed while it was read: no such file or directory" in found["power"]["unavailable"]
    assert sensors.readings()[-1].host_mb == 1.0


def test_a_run_between_two_readings(tmp_path: Path) -> None:
    with Sensors(30.0, rails(tmp_path, ("VDD_IN", 5000, 2000))) as sensors:
        now_s = time.monotonic() + 1
        found = sensors.summary(now_s, now_s + 0.01, 1)
    assert found["power"] == {"unavailable": "no reading fell into so short a run"}


def test_no_frame_has_no_energy(tmp_path: Path) -> None:
    assert sensed(rails(tmp_path, ("VDD_IN", 5000, 2000)), frames=0)["power"]["joules_per_frame"] is None


def test_memory_that_was_held_for_a_moment_counts() -> None:
    started_s = time.monotonic()
    with Sensors(30.0) as sensors:  # no reading comes at the right moment
        block = bytearray(64 << 20)
        block[::4096] = b"x" * len(block[::4096])
        del block
        found = sensors.summary(started_s, time.monotonic(), 1)["memory"]["host"]
    if "unavailable" in found:
        pytest.skip(found["unavailable"])
    assert found["peak_mb"] >= found["before_mb"] + 50


def test_windows_of_a_timeline_get_the_readings_that_fell_into_them(tmp_path: Path) -> None:
    sensors = Sensors(root=tmp_path)
    sensors._readings = [
        Reading(1000 + at_s, watts, 2000.0, None, None, 400.0, None)
        for at_s, watts in ((-0.5, 99.0), (0.2, 10.0), (0.8, 20.0), (1.5, None), (3.2, 50.0))
    ]
    timeline: list[dict[str, Any]] = [{"at_s": at_s, "n": 3} for at_s in (0.5, 1.5, 2.5)]
    sensors.annotate(timeline, 1000.0)
    assert timeline[0] == {"at_s": 0.5, "n": 3, "power_w": 15.0, "clock_mhz": 2000.0, "host_mb": 400.0}
    assert "power_w" not in timeline[1]
    assert timeline[2] == {"at_s": 2.5, "n": 3}, "nothing was read, so nothing is told"
    sensors.annotate([], 0.0)


def test_the_thread_ends_with_the_block(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Sensors(30.0, tmp_path):
        assert any(thread.name == "bench-sensors" and thread.daemon for thread in threading.enumerate())
        raise KeyboardInterrupt
    assert not any(thread.name == "bench-sensors" for thread in threading.enumerate())


@pytest.mark.parametrize("period_s", [0.0, -1.0, math.nan, math.inf])
def test_a_period_that_is_none(period_s: float) -> None:
    with pytest.raises(RecipeError, match="can't be read every"):
        Sensors(period_s)
