"""The shipped kernels through `backends/cuda.py`: jobs made by `launch.py`, moved into the GPU's memory."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from kernel_runs import MEAN, STD, Run, map_run, patch_run, preprocess_run

from dapo_edge.backends.cuda import Cuda, Kernels
from dapo_edge.kernels import pixels, reference
from dapo_edge.kernels.launch import PreprocessJob, ViewJob
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.kernels.resample import upsample


def runs() -> list[tuple[Run, np.ndarray, float]]:
    """The three kernels: how to run them, what the first output must be, and how far it may be off."""
    rng = np.random.default_rng(1)
    tokens = rng.standard_normal((1, 2, 25, 48)).astype(np.float16)
    bank = reference.normalise(rng.standard_normal((4, 48)).astype(np.float32))
    probs = reference.patch_probabilities(tokens.astype(np.float32), bank, 0.07, (5, 5))
    axes = upsample(5, 60, align_corners=True, sigma=2.0), upsample(5, 44, align_corners=True, sigma=2.0)
    image = rng.integers(0, 256, (53, 61, 3), np.uint8)
    view = PixelView(image.reshape(53, -1), "BGR8", 61, 53)
    small = pixels.preprocess(view.rgb(), 32, MEAN, STD)[None]
    return [
        (patch_run(tokens, bank, 0.07), probs.reshape(1, 4, 25), 5e-4),
        (map_run(probs, *axes), reference.anomaly_map(probs, *axes), 5e-4),
        (preprocess_run([view], 32), small, 1e-5),
    ]


def on_device(cuda: Cuda, run: Run) -> tuple[Any, ctypes.Structure]:
    """Copy all that a kernel reads and writes to the device; its output and a job with the addresses there."""
    places: list[tuple[int, int, int]] = []

    def moved(job: Any) -> Any:
        for name, kind in job._fields_:
            if kind is ctypes.c_uint64:
                for start, nbytes, address in places:
                    if start <= getattr(job, name) < start + nbytes:
                        setattr(job, name, address + getattr(job, name) - start)
                        break
        return job

    output = None
    for array in (*run.buffers[2:], *run.buffers[1::-1]):  # the list of views after the pixels that it points to
        content = array
        if isinstance(run.job, PreprocessJob) and array is run.buffers[1]:
            content = np.frombuffer(bytes(moved(ViewJob.from_buffer_copy(array))), np.uint8)
        output = cuda.constant(content, "a test")
        places.append((array.ctypes.data, array.nbytes, output.address))
    return output, moved(type(run.job).from_buffer_copy(run.job))


def run_on(cuda: Cuda, kernels: Kernels, run: Run) -> np.ndarray:
    output, job = on_device(cuda, run)
    pinned = cuda.pinned(run.buffers[0].nbytes)
    kernels.start(run.launch, job)
    cuda.download(pinned.array, output.address)
    cuda.synchronise()
    return pinned.array.view(run.buffers[0].dtype).reshape(run.buffers[0].shape).copy()
