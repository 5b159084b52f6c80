"""Stand-ins for the CUDA driver's library: one of Python objects, and one in C that checks the calls' ABI."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ORIN = {"name": b"Orin", "memory": 65_000_000_000, 75: 8, 76: 7, 18: 1, 16: 16}
H200 = {"name": b"NVIDIA H200", "memory": 150_000_000_000, 75: 9, 76: 0, 18: 0, 16: 132}
MESSAGES = {
    100: b"no CUDA-capable device is detected",
    803: b"system has unsupported display driver / cuda driver combination",
}

SOURCE = r"""
#include <stddef.h>
#include <stdio.h>
int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return index == 0 ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Orin %d", device); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = ((size_t)64 << 30) + device; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 18 ? 1 : attribute == 16 ? 16 : -1;
    return device == 40 ? 0 : 101;
}
int cuGetErrorString(int code, const char **text) { *text = "refused"; return code == 1 ? 0 : 1; }
"""


class FakeLibcuda:
    """Answers like a driver with these GPUs, or like one whose `fails` function returns an error."""

    def __init__(self, *gpus: dict[Any, Any], version: int = 12060, **fails: int) -> None:
        self.gpus, self.version, self.fails = gpus, version, fails

    def __getattr__(self, name: str) -> Any:
        answer = getattr(type(self), f"_{name}")
        return lambda *arguments: self.fails.get(name) or answer(self, *arguments) or 0

    def _cuInit(self, flags: int) -> None:
        pass

    def _cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = self.version

    def _cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = len(self.gpus)

    def _cuDeviceGet(self, device: Any, index: int) -> None:
        device._obj.value = index

    def _cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> None:
        name.value = self.gpus[device.value]["name"][: size - 1]

    def _cuDeviceTotalMem_v2(self, memory: Any, device: ctypes.c_int) -> None:
        memory._obj.value = self.gpus[device.value]["memory"]

    def _cuDeviceGetAttribute(self, value: Any, number: int, device: ctypes.c_int) -> None:
        value._obj.value = self.gpus[device.value][number]

    def _cuGetErrorString(self, code: int, text: Any) -> None:
        text._obj.value = MESSAGES.get(code)


def use(monkeypatch: pytest.MonkeyPatch, driver: Any) -> None:
    """Let `dapo_edge.device` find this driver, or none, or one whose library raises."""

    def load() -> Any:
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr("dapo_edge.device.load_driver", load)


NO_DRIVER = OSError("libcuda.so.1: cannot open shared object file: No such file or directory")


def compiled(folder: Path) -> ctypes.CDLL:
    """The stand-in in C; skips without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "fake.c").write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-o", folder / "fake.so", folder / "fake.c"], check=True)
    return ctypes.CDLL(str(folder / "fake.so"))
