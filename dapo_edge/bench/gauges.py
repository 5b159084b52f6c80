"""What a machine tells about itself while it works: clocks, temperature, memory. Each gauge says why it can't."""

from __future__ import annotations

import contextlib
import math
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path

_GPU_CLOCK = re.compile(r"gpu|ga10b|gv11b|gp10b")  # names of a Jetson's GPU among its clocks
_BELIEVED_C = (1, 150)  # zones without a sensor behind them say 0, -127 or -256


class Gauge(ABC):
    """One value, read again and again. `problem` says in words why it can't be read, and then it stays unread."""

    name: str = ""
    problem: str | None = None

    def __init__(self, root: Path) -> None:
        """`root` is where the system's files begin: / but in tests."""
        self._root = root
        try:
            self._find()
            self._read()
        except Exception as error:
            self.problem = in_words(error)

    def value(self) -> float | None:
        """The value now, or None. Never raises: a sensor that breaks down must not end a measurement."""
        if self.problem is None:
            try:
                return self._read()
            except Exception as error:
                self.problem = f"failed while it was read: {in_words(error)}"
        return None

    @abstractmethod
    def _find(self) -> None:
        """Look for the sensor and set `name`. Raises `LookupError` in words, or what the system raises."""

    @abstractmethod
    def _read(self) -> float | None:
        """None: there is no value yet."""


def in_words(error: Exception) -> str:
    """An error as the end of a sentence."""
    if isinstance(error, PermissionError):
        return f"permission denied ({error.filename})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror.lower()} ({error.filename})"
    return str(error) or type(error).__name__


def number(path: Path) -> int:
    """A file that holds one whole number. Raises `OSError`, `ValueError`."""
    return int(path.read_text())


def folders(parent: Path) -> list[Path]:
    """What lies in a folder, in order; nothing where there is no folder."""
    return sorted(parent.iterdir()) if parent.is_dir() else []


def text_of(path: Path) -> str | None:
    """A short file without white space around it; None where it can't be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


class CpuClock(Gauge):
    """MHz, mean over the cores that this process may use: others may sleep.

    From cpufreq, which is what the driver set; without it, as in many virtual machines, from /proc/cpuinfo.
    """

    name = "cpufreq"

    def _find(self) -> None:
        if not hasattr(os, "sched_getaffinity"):
            raise LookupError("this system tells no clock of its CPU")
        self._usable = os.sched_getaffinity(0)
        cores = self._root / "sys/devices/system/cpu"
        paths = [cores / f"cpu{core}/cpufreq/scaling_cur_freq" for core in sorted(self._usable)]
        self._paths = [path for path in paths if path.exists()]
        self.name = "cpufreq" if self._paths else "/proc/cpuinfo"

    def _read(self) -> float:
        clocks = [number(path) / 1e3 for path in self._paths] or self._of_cpuinfo()
        if not clocks:
            raise LookupError("this machine tells no clock of its CPU")
        return sum(clocks) / len(clocks)

    def _of_cpuinfo(self) -> list[float]:
        core, clocks = -1, []
        for line in (self._root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "processor":
                core = int(value)
            elif key == "cpu MHz" and core in self._usable:
                clocks.append(float(value))
        return clocks


class JetsonGpuClock(Gauge):
    """MHz of a Jetson's GPU, by the kernel's devfreq."""

    name = "devfreq"

    def _find(self) -> None:
        found = sorted(path for path in folders(self._root / "sys/class/devfreq") if _GPU_CLOCK.search(path.name))
        if not found:
            raise LookupError("no GPU whose clock can be read")
        self._path, self.name = found[0] / "cur_freq", f"devfreq {found[0].name}"

    def _read(self) -> float:
        return number(self._path) / 1e6


class HottestZone(Gauge):
    """Degrees Celsius of the hottest thermal zone. Zones that sleep, or have no sensor behind them, are left out."""

    name = "thermal zones"

    def _find(self) -> None:
        zones = (path for path in folders(self._root / "sys/class/thermal") if path.name.startswith("thermal_zone"))
        self._zones = [(text_of(zone / "type") or zone.name, zone / "temp") for zone in zones]
        if not self._zones:
            raise LookupError("this machine has no thermal zone")

    def _read(self) -> float:
        known = [(degrees, name) for name, path in self._zones if (degrees := _degrees(path)) is not None]
        if not known:
            raise LookupError("no thermal zone tells a temperature")
        degrees, self.name = max(known)
        return degrees


class HostMemory(Gauge):
    """MB (2^20 bytes) of physical memory that this process holds, and in `peak_mb` the most of it since `restart`.

    Source: proc(5): VmRSS and VmHWM in /proc/self/status, and /proc/self/clear_refs.
    """

    name = "this process"
    peak_mb = 0.0
    _mark_mb = _old_mark = 0.0

    def restart(self) -> float | None:
        """Forget the high-water mark, and say what is held now.

        Where the kernel does not let us, the old mark counts once it rises.
        """
        path = self._root / "proc/self/clear_refs"
        with contextlib.suppress(OSError):
            if path.exists():
                path.write_text("5")
        self.peak_mb, self._old_mark = 0.0, math.inf
        held = self.value()
        is_reset = held is not None and self._mark_mb <= held + 1
        self._old_mark = 0.0 if is_reset else self._mark_mb
        return held

    def _find(self) -> None:
        self._path = self._root / "proc/self/status"

    def _read(self) -> float:
        told = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", self._path.read_text(), re.M))
        if len(told) < 2:
            raise LookupError("this system does not tell what a process holds")
        held, self._mark_mb = int(told["VmRSS"]) / 1024, int(told["VmHWM"]) / 1024
        risen = self._mark_mb if self._mark_mb > self._old_mark else 0.0
        self.peak_mb = max(self.peak_mb, held, risen)
        return held


def power_mode(root: Path) -> str | None:
    """A Jetson's power mode, else the CPU's frequency governor; None where neither is told.

    Source: `nvpmodel`, which keeps its modes in /etc/nvpmodel.conf and the number of the present one in
    /var/lib/nvpmodel/status as "pmode:0002".
    """
    present = re.search(r"pmode:0*(\d+)", text_of(root / "var/lib/nvpmodel/status") or "")
    if present:
        modes = text_of(root / "etc/nvpmodel.conf") or ""
        named = re.search(rf"^<\s*POWER_MODEL\s+ID={present[1]}\s+NAME=(\S+)", modes, re.M)
        return f"{named[1]} (mode {present[1]})" if named else f"mode {present[1]}"
    governors = {text_of(path) for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")}
    told = sorted(governor for governor in governors if governor)
    return f"CPU governor {' and '.join(told)}" if told else None


def _degrees(path: Path) -> float | None:
    """Zones of parts that sleep refuse to be read (EAGAIN), and come back later."""
    try:
        degrees = number(path) / 1e3
    except (OSError, ValueError):
        return None
    return degrees if _BELIEVED_C[0] <= degrees <= _BELIEVED_C[1] else None
