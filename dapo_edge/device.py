"""What machine this is: the device line that every measured number carries, and what `doctor` can say about it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dapo_edge.errors import BackendError

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


_DRIVER = "libcuda.so.1"
# Of the CUDA driver's enum CUdevice_attribute.
_MULTIPROCESSORS, _INTEGRATED, _SM_MAJOR, _SM_MINOR = 16, 18, 75, 76
_DRIVER_REMEDIES = {  # by the driver's error number
    100: "No GPU is visible: look at CUDA_VISIBLE_DEVICES; a container needs access to the GPU",
    803: "After an update of the driver, restart the machine; in a container, use the host's driver",
    804: "In a container, remove its CUDA compatibility package, or update the host's driver",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the CUDA driver describes it."""

    name: str
    sm: str  # compute capability, "8.7"
    memory_bytes: int
    driver_cuda: str  # the CUDA version that the driver brings, "12.6"
    integrated: bool  # shares its memory with the CPU, as on a Jetson
    multiprocessors: int


@dataclass(frozen=True)
class Device:
    """A fingerprint of this machine. None means: not there, or the machine does not tell."""

    cpu: str
    cores: int  # that this process may use
    memory_gb: float
    system: str
    python: str
    jetson: str | None
    l4t: str | None  # Jetson Linux, "36.4.3"
    cuda_devices: int
    gpus: tuple[Gpu, ...]
    packages: dict[str, str]  # installed runtimes and their versions

    def line(self) -> str:
        """One line for tables."""
        parts = [self.cpu, f"{self.cores} cores", f"{self.memory_gb:.0f} GB", *(gpu.name for gpu in self.gpus)]
        return ", ".join([*parts, self.system])


def this_device() -> Device:
    """Look at this machine. Never raises, never touches TensorRT."""
    release, found = _first_line("/etc/nv_tegra_release"), gpus()
    return Device(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        jetson=release,
        l4t=_l4t(release),
        cuda_devices=len(found),
        gpus=found,
        packages=versions(RUNTIMES),
    )


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of those Python packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


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
    """GPUs that the driver offers; 0 without a driver, or with one that refuses."""
    return len(gpus())


def gpus() -> tuple[Gpu, ...]:
    """GPUs that the driver offers; none without a driver, or with one that refuses. Never raises.

    Asked through the driver itself: TensorRT ends the whole process when there is none.
    """
    return _ask_the_driver().gpus


def driver_problem() -> str | None:
    """Why an installed CUDA driver offers no GPU, in its own words and with a remedy; else None. Never raises."""
    return _ask_the_driver().problem


@dataclass(frozen=True)
class _Answer:
    gpus: tuple[Gpu, ...]
    problem: str | None


def _ask_the_driver() -> _Answer:
    try:
        driver = load_driver()
    except OSError as error:
        is_missing = str(error).startswith(f"{_DRIVER}: cannot open shared object file: No such file")
        return _Answer((), None if is_missing else f"its library can't be loaded ({error})")
    try:
        return _Answer(_gpus_of(driver), None)
    except BackendError as error:
        return _Answer((), f"{error.cause}: {error.remedy}")
    except AttributeError as error:
        return _Answer((), f"it is too old, or none ({error})")


def load_driver() -> Any:
    """The CUDA driver's library, nothing called yet. Raises `OSError` where there is none."""
    return ctypes.CDLL(_DRIVER)


def driver_message(driver: Any, code: int) -> str:
    """The driver's own words for an error code."""
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode(errors='replace')} (error {code})"


def _gpus_of(driver: Any) -> tuple[Gpu, ...]:
    _check(driver, driver.cuInit(0))
    version, count = ctypes.c_int(), ctypes.c_int()
    _check(driver, driver.cuDriverGetVersion(ctypes.byref(version)))
    _check(driver, driver.cuDeviceGetCount(ctypes.byref(count)))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return tuple(_gpu(driver, index, cuda) for index in range(count.value))


def _gpu(driver: Any, index: int, cuda: str) -> Gpu:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    _check(driver, driver.cuDeviceGet(ctypes.byref(device), index))
    _check(driver, driver.cuDeviceGetName(name, len(name), device))
    _check(driver, driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device))

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _check(driver, driver.cuDeviceGetAttribute(ctypes.byref(value), number, device))
        return value.value

    return Gpu(
        name=name.value.decode(errors="replace").strip(),
        sm=f"{attribute(_SM_MAJOR)}.{attribute(_SM_MINOR)}",
        memory_bytes=memory.value,
        driver_cuda=cuda,
        integrated=attribute(_INTEGRATED) != 0,
        multiprocessors=attribute(_MULTIPROCESSORS),
    )


def _check(driver: Any, code: int) -> None:
    """Raise `BackendError` with the driver's own message for a code that is not 0."""
    if code == 0:
        return
    remedy = _DRIVER_REMEDIES.get(code, "Restart the machine, or install the driver again; a container needs the GPU")
    raise BackendError(driver_message(driver, code), remedy)


def _l4t(release: str | None) -> str | None:
    """The version in a line like "# R36 (release), REVISION: 4.3, GCID: ..."."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release or "")
    return f"{found[1]}.{found[2]}" if found else None


def _first_line(path: str) -> str | None:
    text = _read(path)
    return text.splitlines()[0].strip() if text else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
