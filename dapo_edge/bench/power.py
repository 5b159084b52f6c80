"""What power a machine draws while it works: a Jetson's rails, a CPU's energy counters, a GPU's own sensor."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_edge.bench.gauges import Gauge, folders, number, text_of

_PACKAGE_DOMAIN = re.compile(r"intel-rapl:\d+")  # AMD's counters have the same name
SHORTEST_S = 0.02  # between two readings of a counter that the CPU updates about every millisecond
# Which rails of a module make up its whole power; the first set that a board has counts.
TOTALS = (
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # AGX Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)


class JetsonRails(Gauge):
    """Watts of a whole Jetson module, by its INA3221 power monitors: the input rail, or the rails that add up to it.

    in<n>_input is millivolts and curr<n>_input milliamperes of the rail in<n>_label. Sources: the Linux kernel's
    Documentation/hwmon/ina3221.rst; rails by board: NVIDIA's Jetson Linux Developer Guide, "Platform Power and
    Performance", and energymon's JetsonPowerRails.md. AGX Orin's VDDQ_VDD2_1V8AO, about 1 W, is taken to be a part of
    VIN_SYS_5V0 and left out; jtop adds it.
    """

    name = "Jetson rails"

    def _find(self) -> None:
        rails: dict[str, tuple[Path, Path]] = {}
        for monitor in folders(self._root / "sys/class/hwmon"):
            if text_of(monitor / "name") != "ina3221":
                continue
            for label in sorted(monitor.glob("in*_label")):
                channel = label.name.removeprefix("in").removesuffix("_label")
                rails[text_of(label) or ""] = (monitor / f"in{channel}_input", monitor / f"curr{channel}_input")
        if not rails:
            raise LookupError("no power monitor of a Jetson")
        total = next((names for names in TOTALS if rails.keys() >= set(names)), None)
        if total is None:
            raise LookupError(f"nobody knows which of the rails {', '.join(sorted(rails))} add up to the module")
        self.name, self._rails = f"INA3221 {' + '.join(total)}", [rails[name] for name in total]

    def _read(self) -> float:
        return sum(number(volts) * number(amperes) for volts, amperes in self._rails) / 1e6


@dataclass
class _Counter:
    path: Path
    range_uj: int  # it starts again at 0 beyond this
    last_uj: int

    def joules(self) -> float:
        """Since the last call."""
        now_uj = number(self.path)
        passed = now_uj - self.last_uj
        self.last_uj = now_uj
        return (passed if passed >= 0 else passed + self.range_uj) / 1e6


class Rapl(Gauge):
    """Watts of the CPU packages since the reading before, by their energy counters; None for the first.

    Only the packages: cores and graphics are inside them, and "psys" is what they are in.
    Source: the Linux kernel's Documentation/power/powercap/powercap.rst.
    """

    name = "RAPL"

    def _find(self) -> None:
        zones = [zone for zone in folders(self._root / "sys/class/powercap") if _PACKAGE_DOMAIN.fullmatch(zone.name)]
        named = {zone: text_of(zone / "name") or "" for zone in zones}
        packages = {zone: name for zone, name in named.items() if name.startswith("package")}
        if not packages:
            raise LookupError("no energy counters of the CPU")
        try:
            self._counters = [
                _Counter(zone / "energy_uj", number(zone / "max_energy_range_uj"), number(zone / "energy_uj"))
                for zone in packages
            ]
        except PermissionError as error:
            raise LookupError("permission denied: readable by root only") from error
        self._at_s = time.monotonic()
        self.name = f"RAPL {' + '.join(packages.values())}"

    def _read(self) -> float | None:
        now_s = time.monotonic()
        passed = now_s - self._at_s
        if passed < SHORTEST_S:
            return None
        self._at_s = now_s
        return sum(counter.joules() for counter in self._counters) / passed


class TotalPower:
    """Watts of all that can be told apart: a Jetson's module alone, since its GPU is in it; else CPU and GPU.

    One that breaks down takes the sum with it: half a sum would look like a saving.
    """

    def __init__(self, module: Gauge, *parts: Gauge) -> None:
        every = (module, *parts)
        self._used = (module,) if module.problem is None else tuple(part for part in parts if part.problem is None)
        missing = [f"{gauge.name}: {gauge.problem}" for gauge in every if gauge.problem is not None]
        self.left_out = [] if module.problem is None else missing[1:]
        self._none = f"no sensor that can be read: {', '.join(str(gauge.problem) for gauge in every)}"

    @property
    def name(self) -> str:
        """The sensors that are added."""
        return " + ".join(gauge.name for gauge in self._used)

    @property
    def problem(self) -> str | None:
        """Why there is no sum."""
        failed = [f"{gauge.name}: {gauge.problem}" for gauge in self._used if gauge.problem is not None]
        return ("; ".join(failed) or None) if self._used else self._none

    def value(self) -> float | None:
        """The sum now; None where a part of it is not known."""
        return total([gauge.value() for gauge in self._used])


def total(parts: Sequence[float | None]) -> float | None:
    """The sum of what is known altogether."""
    known = [part for part in parts if part is not None]
    return sum(known) if parts and len(known) == len(parts) else None
