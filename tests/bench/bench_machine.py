"""Trees of system files as machines with sensors have them, and a stand-in for NVML."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

STATUS = "Name:\tpython\nVmHWM:\t  {} kB\nVmRSS:\t  {} kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def rails(root: Path, *named: tuple[str, int, int], monitor: int = 0) -> Path:
    """Each is a label, millivolts and milliamperes."""
    files = {"name": "ina3221\n", "in7_label": "sum of shunt voltages\n"}
    for number, (label, volts, amperes) in enumerate(named, start=1):
        files |= {f"in{number}_label": label, f"in{number}_input": str(volts), f"curr{number}_input": str(amperes)}
    return write(root, {f"sys/class/hwmon/hwmon{monitor}/{name}": text for name, text in files.items()})


def rapl(root: Path, zone: str = "intel-rapl:0", name: str = "package-0", energy_uj: int = 0) -> Path:
    files = {"name": name, "energy_uj": str(energy_uj), "max_energy_range_uj": "1000000000"}
    return write(root, {f"sys/class/powercap/{zone}/{key}": text for key, text in files.items()})


class FakeNvml(SimpleNamespace):
    """NVML of one L4 that draws 40 W."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self, pid: int | None = None) -> None:
        names = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
        super().__init__(**{f"nvmlClocksThrottleReason{name}": 4 << bit for bit, name in enumerate(names)})
        self.pid, self.reasons, self.is_open, self.broken = pid, 0, False, False
        self.bus = b""

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByPciBusId(self, bus: bytes) -> str:
        self.bus = bus
        return "handle"

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        if self.broken:
            raise self.NVMLError("GPU is lost")
        return 40_000

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        return 1377

    def nvmlDeviceGetTemperature(self, gpu: str, kind: int) -> int:
        return 61

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> SimpleNamespace:
        return SimpleNamespace(used=900 << 20)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=self.pid, usedGpuMemory=600 << 20)] if self.pid else []

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:
        return self.reasons
