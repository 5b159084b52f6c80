"""What an NVIDIA GPU tells about itself through NVML: power, clock, temperature, memory, and why it slows down."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dapo_edge.bench.gauges import Gauge, in_words
from dapo_edge.device import gpus, load_driver
from dapo_edge.extras import require

Ask = Callable[[Any, Any], float]  # the library and its handle of the GPU to a value
# By NVML's names of the reasons why a clock is below what it could be.
SLOWDOWNS = {
    "SwPowerCap": "its power limit",
    "SwThermalSlowdown": "heat",
    "HwThermalSlowdown": "heat",
    "HwPowerBrakeSlowdown": "the power supply",
    "HwSlowdown": "heat or the power supply",
}


class Nvml:
    """NVML, opened on one GPU of the CUDA driver's; `problem` says why it can't be. Source: NVIDIA's NVML API guide."""

    def __init__(self, gpu: int | None = None) -> None:
        """`gpu` is the CUDA driver's number; None means the first."""
        self.name, self._handle = "NVML", None
        self._library: Any = None
        self.problem: str | None = None
        try:
            self._open(gpu or 0)
        except Exception as error:
            self.problem = in_words(error)
        self.power = _NvmlGauge(self, lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3)
        self.clock = _NvmlGauge(self, lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM))
        self.temperature = _NvmlGauge(
            self, lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)
        )
        self.memory = _DeviceMemory(self, _of_device)

    def ask(self, question: Callable[[Any, Any], Any]) -> Any:
        """Raises `LookupError` where NVML is not open, else NVML's own errors."""
        if self.problem is not None:
            raise LookupError(self.problem)
        return question(self._library, self._handle)

    def slowdowns(self) -> tuple[str, ...]:
        """Why the GPU is slower than it could be right now; nothing where it is not, or does not tell. Never raises."""
        try:
            mask = self.ask(lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))
            bits = {name: getattr(self._library, f"nvmlClocksThrottleReason{name}") for name in SLOWDOWNS}
        except Exception:
            return ()
        return tuple(dict.fromkeys(SLOWDOWNS[name] for name, bit in bits.items() if mask & bit))

    def close(self) -> None:
        """Give the library back."""
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library, self.problem = None, "closed"

    def _open(self, gpu: int) -> None:
        found = gpus()
        if gpu >= len(found):
            raise LookupError(f"there is no GPU {gpu}" if found else "no NVIDIA GPU")
        library = require("pynvml")
        library.nvmlInit()
        self._library = library  # from here on it is to be given back
        self._handle = library.nvmlDeviceGetHandleByPciBusId(_pci_bus_id(gpu))
        self.name = f"NVML {found[gpu].name}"


class _NvmlGauge(Gauge):
    def __init__(self, nvml: Nvml, ask: Ask) -> None:
        self._nvml, self._ask = nvml, ask
        super().__init__(Path())

    def _find(self) -> None:
        self.name = self._nvml.name

    def _read(self) -> float:
        return float(self._nvml.ask(self._ask))


class _DeviceMemory(_NvmlGauge):
    """MB (2^20 bytes) that this process holds on the GPU; all that is in use where processes can't be told apart,

    as in most containers, which number them anew. `name` says which.
    """

    def _find(self) -> None:
        self.name = "whole device"
        try:
            self._nvml.ask(_of_this_process)
        except Exception:
            return
        self.name, self._ask = "this process", _of_this_process


def _of_device(nvml: Any, gpu: Any) -> float:
    return nvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**20


def _of_this_process(nvml: Any, gpu: Any) -> float:
    used = {process.pid: process.usedGpuMemory for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)}
    return used[os.getpid()] / 2**20


def _pci_bus_id(gpu: int) -> bytes:
    """CUDA and NVML number GPUs differently, and CUDA_VISIBLE_DEVICES hides some: the bus tells which is meant."""
    driver, device, text = load_driver(), ctypes.c_int(), ctypes.create_string_buffer(32)
    if driver.cuDeviceGet(ctypes.byref(device), gpu) or driver.cuDeviceGetPCIBusId(text, len(text), device):
        raise LookupError(f"the driver does not tell where GPU {gpu} is")
    return text.value
