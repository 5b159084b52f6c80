"""Gauges on made trees of system files: what is told, what is added up, and why something is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_machine import STATUS, rails, rapl, write

from dapo_edge.bench import power
from dapo_edge.bench.gauges import CpuClock, HostMemory, HottestZone, JetsonGpuClock, power_mode
from dapo_edge.bench.power import JetsonRails, Rapl


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The time that counters are read at."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(power.time, "monotonic", lambda: now.s)
    yield now
    monkeypatch.undo()


def test_rails_that_add_up_to_a_module_are_on_two_monitors(tmp_path: Path) -> None:
    rails(tmp_path, ("VDD_GPU_SOC", 20_000, 500), ("VDD_CPU_CV", 20_000, 250), ("VIN_SYS_5V0", 5000, 1000))
    rails(tmp_path, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 200), monitor=1)
    gauge = JetsonRails(tmp_path)
    assert gauge.name == "INA3221 VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    assert gauge.value() == pytest.approx(10 + 5 + 5)


def test_rails_that_nobody_knows_are_not_added_up(tmp_path: Path) -> None:
    gauge = JetsonRails(rails(tmp_path, ("VDD_NEW", 5000, 200)))
    assert gauge.value() is None
    assert "VDD_NEW" in (gauge.problem or "")


def test_other_monitors_are_no_rails(tmp_path: Path) -> None:
    write(tmp_path, {"sys/class/hwmon/hwmon0/name": "nvme", "sys/class/hwmon/hwmon0/in1_label": "VDD_IN"})
    assert JetsonRails(tmp_path).problem == "no power monitor of a Jetson"


def test_energy_counters_are_read_as_power_and_wrap_around(tmp_path: Path, clock: SimpleNamespace) -> None:
    gauge = Rapl(rapl(tmp_path, energy_uj=999_000_000))
    assert gauge.value() is None, "nothing has passed yet"
    clock.s, _ = 100.5, rapl(tmp_path, energy_uj=4_000_000)
    assert gauge.value() == pytest.approx(10.0), "1 J to the end of the range and 4 J after it, in half a second"
    clock.s, _ = 102.5, rapl(tmp_path, energy_uj=10_000_000)
    assert gauge.value() == pytest.approx(3.0)


def test_only_packages_are_counted(tmp_path: Path, clock: SimpleNamespace) -> None:
    zones = {
        "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    for zone, name in zones.items():
        rapl(tmp_path, zone, name)
    gauge = Rapl(tmp_path)
    for zone, name in zones.items():
        rapl(tmp_path, zone, name, energy_uj=7_000_000)
    clock.s += 1
    assert gauge.name == "RAPL package-0 + package-1"
    assert gauge.value() == pytest.approx(14.0)


@pytest.mark.parametrize("text", ["", "many", "12 W"])
def test_a_counter_that_holds_no_number(tmp_path: Path, text: str) -> None:
    write(rapl(tmp_path), {"sys/class/powercap/intel-rapl:0/energy_uj": text})
    gauge = Rapl(tmp_path)
    assert gauge.value() is None
    assert "invalid literal" in (gauge.problem or "")


def test_only_cores_that_this_process_may_use_have_a_clock(tmp_path: Path) -> None:
    cores = "sys/devices/system/cpu"
    for core, khz in enumerate((2_000_000, 400_000, 3_000_000)):
        write(tmp_path, {f"{cores}/cpu{core}/cpufreq/scaling_cur_freq": f"{khz}\n"})
    gauge = CpuClock(tmp_path)
    assert (gauge.name, gauge.value()) == ("cpufreq", 2500.0)


def test_a_clock_without_cpufreq(tmp_path: Path) -> None:
    cores = "".join(f"processor\t: {core}\ncpu MHz\t\t: {mhz}\n\n" for core, mhz in enumerate((2596.1, 800.0, 2600.1)))
    gauge = CpuClock(write(tmp_path, {"proc/cpuinfo": cores}))
    assert (gauge.name, gauge.value()) == ("/proc/cpuinfo", pytest.approx(2598.1))
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 62.50\n")
    assert CpuClock(tmp_path).problem == "this machine tells no clock of its CPU"


def test_a_devfreq_without_a_gpu(tmp_path: Path) -> None:
    write(tmp_path, {"sys/class/devfreq/mmc0/cur_freq": "200000000"})
    assert JetsonGpuClock(tmp_path).problem == "no GPU whose clock can be read"


def test_the_hottest_zone_of_those_that_have_a_sensor(tmp_path: Path) -> None:
    zones = {"cpu-thermal": "51250", "gpu-thermal": "", "cv0-thermal": "-256000", "tj-thermal": "54500", "acpitz": "0"}
    for number, (kind, temp) in enumerate(zones.items()):
        zone = f"sys/class/thermal/thermal_zone{number}"
        write(tmp_path, {f"{zone}/type": kind, f"{zone}/temp": temp})
    gauge = HottestZone(tmp_path)
    assert (gauge.value(), gauge.name) == (54.5, "tj-thermal")
    for number in range(len(zones)):
        (tmp_path / f"sys/class/thermal/thermal_zone{number}/temp").write_text("-256000")
    assert gauge.value() is None
    assert HottestZone(tmp_path).problem == "no thermal zone tells a temperature"


def test_a_high_water_mark_that_can_t_be_reset_is_of_earlier(tmp_path: Path) -> None:
    memory = HostMemory(write(tmp_path, {"proc/self/status": STATUS.format(900 * 1024, 300 * 1024)}))
    assert memory.restart() == 300
    write(tmp_path, {"proc/self/status": STATUS.format(900 * 1024, 350 * 1024)})
    assert (memory.value(), memory.peak_mb) == (350, 350), "900 MB were held before the run"
    write(tmp_path, {"proc/self/status": STATUS.format(950 * 1024, 350 * 1024)})
    assert (memory.value(), memory.peak_mb) == (350, 950), "the mark rose during the run"
    assert not (tmp_path / "proc/self/clear_refs").exists()


@pytest.mark.parametrize(
    ("files", "mode"),
    [
        ({}, None),
        ({"var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n"}, "mode 2"),
        (
            {
                "var/lib/nvpmodel/status": "pmode:0000\n",
                "etc/nvpmodel.conf": "# modes\n< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=15W >\n",
            },
            "MAXN (mode 0)",
        ),
        ({f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor": "powersave\n" for core in range(2)},
         "CPU governor powersave"),
    ],
)  # fmt: skip
def test_power_modes(tmp_path: Path, files: dict[str, str], mode: str | None) -> None:
    assert power_mode(write(tmp_path, files)) == mode
