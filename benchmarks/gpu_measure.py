"""What the GPU benchmark measures with: sizes, effort, series of numbers, the clocks that they were taken at.

Who imports this has tests/gpu on the path.
"""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from driver import Machine, Work

from dapo_edge.device import Gpu, as_json, this_device
from dapo_edge.kernels.map_spec import MapSpec

Steps = Iterator[dict[str, Any]]  # what a part measures, piece by piece

SMI_FIELDS = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
HOST_BATCH = 50  # launches before the queue is waited for: a full queue would block the next one


class Bench(Machine, Protocol):
    """A machine that can also be timed."""

    gpu: Gpu
    torch_device: str

    def capture(self, work: Work) -> Work:
        """Work as a CUDA graph."""
        ...

    def sample_us(self, work: Work, samples: int, between: Work | None = None) -> list[float]:
        """Microseconds on the GPU, call by call; `between` runs before each, untimed."""
        ...

    def copy_work(self, nbytes: int) -> Work:
        """A copy inside the device's memory."""
        ...

    def l2_bytes(self) -> int:
        """Size of the L2 cache."""
        ...

    def flush_work(self) -> Work:
        """What drives everything out of the L2 cache."""
        ...


@dataclass(frozen=True)
class EncoderShape:
    """An image encoder. The defaults are DAPO's: ViT-L/14 at 518 px, four tapped blocks, four visual prompt tokens."""

    image_size: int = 518
    patch: int = 14
    width: int = 1024
    heads: int = 16
    blocks: int = 24
    taps: tuple[int, ...] = (6, 12, 18, 24)
    dimensions: int = 768
    prompts: int = 4

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch


@dataclass(frozen=True)
class Workload:
    """What is measured. The defaults are the released DAPO on a full-HD camera."""

    frame: tuple[int, int] = (1920, 1080)  # width, height
    encoder: EncoderShape = EncoderShape()
    types: int = 20
    temperature: float = 0.07
    smoothing_px: float = 4.0
    batches: tuple[int, ...] = (1, 16)

    @property
    def spec(self) -> MapSpec:
        """How tokens become maps, at the encoder's size."""
        grid, size = (self.encoder.grid, self.encoder.grid), self.encoder.image_size
        return MapSpec(size, grid, self.temperature, True, self.smoothing_px, "image")

    def tokens(self, batch: int) -> tuple[int, int, int, int]:
        """[B, L, N, D]."""
        return batch, len(self.encoder.taps), self.encoder.grid**2, self.encoder.dimensions


@dataclass(frozen=True)
class Effort:
    """How long is measured."""

    samples: int = 1000
    inner: int = 20  # launches in one sample of a single kernel, which is too short for an event
    warmup_s: float = 1.0  # until the clocks are up
    copy_bytes: int = 2 << 30  # far beyond every L2 cache
    encoder_samples: int = 200
    frames: int = 2000  # through the whole backend


QUICK = Effort(samples=50, inner=5, warmup_s=0.1, copy_bytes=512 << 20, encoder_samples=5, frames=50)


def series(values: Sequence[float], warmup: str) -> dict[str, Any]:
    """n, mean and percentiles, and what ran before."""
    array = np.asarray(values, np.float64)
    median, p95, p99 = (float(value) for value in np.percentile(array, (50, 95, 99)))
    return {
        "n": len(array),
        "warmup": warmup,
        "mean": float(array.mean()),
        "min": float(array.min()),
        "median": median,
        "p95": p95,
        "p99": p99,
        "max": float(array.max()),
    }


def warm_up(machine: Machine, work: Work, seconds: float) -> str:
    """Run `work` for a while, three times at least; what was done, in words."""
    started, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - started < seconds:
        work()
        calls += 1
        if calls % HOST_BATCH == 0:
            machine.synchronise()
    machine.synchronise()
    return f"{calls} calls"


def gpu_us(machine: Bench, work: Work, effort: Effort, samples: int | None = None) -> dict[str, Any]:
    """Microseconds of the GPU per call, call by call: a small one finds its data in L2, where the last one left it."""
    warmup = warm_up(machine, work, effort.warmup_s)
    return series(machine.sample_us(work, samples or effort.samples), warmup)


def cold_us(machine: Bench, replay: Work, effort: Effort, samples: int | None = None) -> dict[str, Any]:
    """Microseconds of the GPU per replay of a CUDA graph that finds nothing of its own in L2, as after an encoder."""
    warmup = warm_up(machine, replay, effort.warmup_s)
    values = machine.sample_us(replay, samples or effort.samples, machine.flush_work())
    return series(values, f"{warmup}; L2 flushed before each sample")


def kernel_us(machine: Bench, work: Work, effort: Effort) -> dict[str, Any]:
    """Microseconds of the GPU per call from a warm L2; a sample is the mean over `effort.inner` calls in one graph."""

    def several() -> None:
        for _ in range(effort.inner):
            work()

    replay = machine.capture(several)
    warmup = warm_up(machine, replay, effort.warmup_s)
    values = [us / effort.inner for us in machine.sample_us(replay, effort.samples)]
    return {**series(values, warmup), "calls_per_sample": effort.inner}


def host_us(machine: Bench, launch: Work, effort: Effort) -> dict[str, Any]:
    """Microseconds of this thread per call, without waiting for the GPU, which is idle when the call begins."""
    warmup, values = warm_up(machine, launch, effort.warmup_s), []
    for _ in range(effort.samples):
        machine.synchronise()
        started = time.perf_counter()
        launch()
        values.append((time.perf_counter() - started) * 1e6)
    machine.synchronise()
    return series(values, warmup)


def part(command: str, steps: Steps) -> Steps:
    """The part so far after each step, with what every number needs: date, command, device, clocks before and after.

    `finished` is false in all but the last.
    """
    before, started, device = smi(), time.monotonic(), as_json(this_device())
    measured: dict[str, Any] = {}

    def so_far(finished: bool) -> dict[str, Any]:
        return {
            "finished": finished,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "python": platform.python_version(),
            "device": device,
            "nvidia_smi": {"before": before, "after": smi()},
            "seconds": round(time.monotonic() - started, 1),
            **measured,
        }

    for step in steps:
        measured.update(step)
        yield so_far(False)
    yield so_far(True)


def smi() -> dict[str, str] | None:
    """Driver, clocks, power and temperature of the first GPU; None where nvidia-smi isn't, or doesn't tell."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return None
    query = [path, "--id=0", f"--query-gpu={','.join(SMI_FIELDS.values())}", "--format=csv,noheader,nounits"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    values = [value.strip() for value in result.stdout.strip().split(",")]
    return dict(zip(SMI_FIELDS, values, strict=True)) if len(values) == len(SMI_FIELDS) else None
