"""What machine this is: the device line that every measured number carries, and what `doctor` can say about it."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

RUNTIMES = (
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "openvino",
    "torch",
    "open_clip_torch",
    "onnx",
    "tensorrt",
    "pycuda",
)


@dataclass(frozen=True)
class Device:
    """A fingerprint of this machine. None means: not there, or the machine does not tell."""

    cpu: str
    cores: int  # that this process may use
    memory_gb: float
    system: str
    python: str
    jetson: str | None
    cuda_devices: int
    packages: dict[str, str]  # installed runtimes and their versions

    def line(self) -> str:
        """One line for tables."""
        return f"{self.cpu}, {self.cores} cores, {self.memory_gb:.0f} GB, {self.system}"


def this_device() -> Device:
    """Look at this machine. Never raises, never touches TensorRT."""
    packages = {}
    for package in RUNTIMES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Device(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        jetson=_first_line("/etc/nv_tegra_release"),
        cuda_devices=cuda_device_count(),
        packages=packages,
    )


def as_json(device: Device) -> dict[str, object]:
    """A device as JSON values, with its line."""
    return {"line": device.line(), **asdict(device)}


def cpu_name() -> str:
    """The CPU's own name."""
    text = _read("/proc/cpuinfo") or ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda_device_count() -> int:
    """GPUs that the driver offers; 0 without a driver.

    Asked through the driver itself: TensorRT ends the whole process when there is none.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _first_line(path: str) -> str | None:
    text = _read(path)
    return text.splitlines()[0].strip() if text else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
