"""Sensors read while a benchmark runs: power, clocks, temperature, memory; what a machine does not tell is said so."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from typing_extensions import Self

from dapo_edge.bench.gauges import CpuClock, Gauge, HostMemory, HottestZone, JetsonGpuClock, power_mode
from dapo_edge.bench.nvml import Nvml
from dapo_edge.bench.power import JetsonRails, Rapl, TotalPower
from dapo_edge.errors import RecipeError

TOO_SHORT = "no reading fell into so short a run"


@dataclass(frozen=True)
class Reading:
    """All sensors at one moment. None means: not there, or not readable."""

    at_s: float  # by time.monotonic
    power_w: float | None
    cpu_mhz: float | None
    gpu_mhz: float | None
    temperature_c: float | None  # of the hottest
    host_mb: float | None
    device_mb: float | None
    hottest: str | None = None  # which one
    slowed_by: tuple[str, ...] = ()  # why the GPU is slower than it could be


class Sensors:
    """A thread that reads every sensor of this machine each `period_s` seconds, between `with` and its end.

    `root` is where the system's files begin, `gpu` the CUDA driver's number of the GPU (None: the first). A sensor
    that is missing, or fails on the way, is reported as unavailable with its reason; it never ends a run.
    """

    def __init__(self, period_s: float = 0.2, root: Path = Path("/"), gpu: int | None = None) -> None:
        if not 0 < period_s < float("inf"):
            raise RecipeError(f"sensors can't be read every {period_s:g} s", "Use a number of seconds above 0")
        self._period_s, self._root, self._gpu = period_s, root, gpu
        self._readings: list[Reading] = []
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self._nvml = Nvml(self._gpu)
        self._power = TotalPower(JetsonRails(self._root), Rapl(self._root), self._nvml.power)
        self._cpu_clock, jetson_clock = CpuClock(self._root), JetsonGpuClock(self._root)
        self._gpu_clock: Gauge = jetson_clock if jetson_clock.problem is None else self._nvml.clock
        self._heat: tuple[Gauge, ...] = (HottestZone(self._root), self._nvml.temperature)
        self._memory = HostMemory(self._root)
        self._before_mb = self._memory.restart()
        self._thread = threading.Thread(target=self._sample, name="bench-sensors", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._nvml.close()

    def readings(self) -> tuple[Reading, ...]:
        """All so far, in order."""
        return tuple(self._readings)

    def summary(self, started_s: float, ended_s: float, frames: int) -> dict[str, Any]:
        """What was read from `started_s` to `ended_s`, by time.monotonic, while `frames` frames were inspected.

        The keys power, clocks, temperature, memory, power_mode of the bench document, and warnings. Memory's peak is
        that since the sensors were started.
        """
        within = [reading for reading in self.readings() if started_s <= reading.at_s <= ended_s]
        return {
            "power": self._power_summary(within, started_s, ended_s, frames),
            "clocks": {
                "cpu": _clock(self._cpu_clock, [reading.cpu_mhz for reading in within]),
                "gpu": _clock(self._gpu_clock, [reading.gpu_mhz for reading in within]),
            },
            "temperature": self._temperature(within),
            "memory": {"host": self._host_memory(), "device": self._device_memory(within)},
            "power_mode": power_mode(self._root) or {"unavailable": "this machine names no power mode"},
            "warnings": _slowdowns(within),
        }

    def annotate(self, timeline: Sequence[dict[str, Any]], started_s: float) -> None:
        """Add means of the readings to the points of a timeline, whose windows are equal and begin at `started_s`.

        power_w, clock_mhz (of the GPU where it tells one), temperature_c and host_mb, each where there is a reading.
        """
        readings = self.readings()
        half = timeline[0]["at_s"] if timeline else 0.0
        for point in timeline:
            middle = started_s + point["at_s"]
            within = [reading for reading in readings if middle - half <= reading.at_s < middle + half]
            columns = {
                "power_w": _known(reading.power_w for reading in within),
                "clock_mhz": _known(reading.gpu_mhz or reading.cpu_mhz for reading in within),
                "temperature_c": _known(reading.temperature_c for reading in within),
                "host_mb": _known(reading.host_mb for reading in within),
            }
            point.update({key: float(np.mean(values)) for key, values in columns.items() if values})

    def _sample(self) -> None:
        while True:
            self._readings.append(self._read())
            if self._stop.wait(self._period_s):
                return

    def _read(self) -> Reading:
        degrees = [(found, gauge.name) for gauge in self._heat if (found := gauge.value()) is not None]
        hottest = max(degrees, default=(None, None))
        return Reading(
            at_s=time.monotonic(),
            power_w=self._power.value(),
            cpu_mhz=self._cpu_clock.value(),
            gpu_mhz=self._gpu_clock.value(),
            temperature_c=hottest[0],
            host_mb=self._memory.value(),
            device_mb=self._nvml.memory.value(),
            hottest=hottest[1],
            slowed_by=self._nvml.slowdowns(),
        )

    def _power_summary(
        self, within: Sequence[Reading], started_s: float, ended_s: float, frames: int
    ) -> dict[str, Any]:
        known = [(reading.power_w, reading.at_s) for reading in within if reading.power_w is not None]
        if self._power.problem or not known:
            return {"unavailable": self._power.problem or TOO_SHORT}
        watts, at_s = np.transpose(known)
        mean_w = float(np.average(watts, weights=np.diff(at_s, prepend=started_s) + 1e-9))
        return {
            "sensor": self._power.name,
            "left_out": self._power.left_out,
            "mean_w": mean_w,
            "max_w": float(watts.max()),
            "joules_per_frame": mean_w * (ended_s - started_s) / frames if frames else None,
        }

    def _temperature(self, within: Sequence[Reading]) -> dict[str, Any]:
        known = [(reading.temperature_c, reading.hottest) for reading in within if reading.temperature_c is not None]
        if not known:
            reasons = "; ".join(f"{gauge.name}: {gauge.problem}" for gauge in self._heat if gauge.problem)
            return {"unavailable": reasons or TOO_SHORT}
        degrees, sensor = max(known)
        return {"max_c": degrees, "sensor": sensor}

    def _host_memory(self) -> dict[str, Any]:
        self._memory.value()  # the mark as it is now
        if self._memory.problem is not None:
            return {"unavailable": self._memory.problem}
        return {"before_mb": self._before_mb, "peak_mb": self._memory.peak_mb}

    def _device_memory(self, within: Sequence[Reading]) -> dict[str, Any]:
        gauge, known = self._nvml.memory, _known(reading.device_mb for reading in within)
        if gauge.problem is not None or not known:
            return {"unavailable": gauge.problem or TOO_SHORT}
        return {"peak_mb": max(known), "of": gauge.name}


def _clock(gauge: Gauge, told: Iterable[float | None]) -> dict[str, Any]:
    known = _known(told)
    if gauge.problem is not None or not known:
        return {"unavailable": gauge.problem or TOO_SHORT}
    return {"sensor": gauge.name, "mean_mhz": float(np.mean(known)), "min_mhz": min(known), "max_mhz": max(known)}


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _slowdowns(within: Sequence[Reading]) -> list[str]:
    reasons = Counter(reason for reading in within for reason in reading.slowed_by)
    return [
        f"the GPU was slowed down by {reason} during {count / len(within):.0%} of the run"
        for reason, count in reasons.most_common()
    ]
