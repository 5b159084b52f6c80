"""Runs the shipped CUDA kernels on the CPU with jobs made by `launch.py`, as the GPU backend does."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from host_kernels import SHIPPED, Report, Source, run_program, shipped_module, shipped_sources
from numpy.typing import NDArray

from dapo_edge.kernels import launch
from dapo_edge.kernels.launch import HISTOGRAM_BINS, PEAKS, Launch, MapJob, PatchJob, PreprocessJob, ViewJob
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.kernels.resample import TapTable

MULTIPROCESSORS = 16
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)

# The views lie in device memory and hold addresses themselves; only addresses in arguments move to another process.
_VIEWS_AS_ARGUMENTS = """
extern "C" __global__ void preprocess_1(PreprocessJob job, const View only) {
    job.views = &only;
    preprocess(job);
}
extern "C" __global__ void preprocess_2(PreprocessJob job, const View first, const View second) {
    const View views[2] = {first, second};
    job.views = views;
    preprocess(job);
}
"""
# In the order of the files defect_map.cu, patch_probabilities.cu, preprocess.cu; the names say what each keeps apart.
BARRIERS = (
    "map: pixels before the next channels",
    "map: the band before its pixels",
    "map: peaks and histogram of the block before they leave it",
    "patch: products before the next part of the bank",
    "patch: the bank before its products",
    "patch: one layer before the next",
    "patch: the sum before it is written",
    "preprocess: pixels before columns",
    "preprocess: columns before rows",
)


@dataclass(frozen=True, eq=False)
class Run:
    """A kernel with all that it reads and writes."""

    launch: Launch
    job: ctypes.Structure
    buffers: tuple[np.ndarray, ...]  # outputs first
    views: tuple[ViewJob, ...] = ()

    def here(self, order: int = 0) -> tuple[np.ndarray, ...]:
        """Run in this process; outputs are written in place."""
        start = self.launch
        shipped_module().launch(start.kernel, start.grid, start.block, start.shared_bytes, [self.job], order)
        return self.buffers

    def sanitized(self, sanitizer: Any = "thread", sources: Sequence[Source] = (), **options: Any) -> Report:
        """Run in a process of its own, with a real thread per CUDA thread."""
        start = self.launch
        return run_program(
            sources or [*shipped_sources(), _VIEWS_AS_ARGUMENTS],
            f"{start.kernel}_{len(self.views)}" if self.views else start.kernel,
            start.grid,
            start.block,
            start.shared_bytes,
            [self.job, *self.views],
            sanitizer=sanitizer,
            buffers=self.buffers,
            **options,
        )


def sources_with_optional_barriers() -> list[str]:
    """The shipped kernels as one text, where the environment's OMIT_BARRIER names one of `BARRIERS` to leave out."""
    number = itertools.count()
    kernels = "".join(path.read_text(encoding="utf-8") for path in shipped_sources())
    kernels = re.sub(r"__syncthreads\(\);", lambda _: f"if (omitted() != {next(number)}) __syncthreads();", kernels)
    assert next(number) == len(BARRIERS), "name the kernels' barriers in BARRIERS"
    chosen = 'int omitted() { const char* text = std::getenv("OMIT_BARRIER"); return text ? std::atoi(text) : -1; }'
    text = (SHIPPED / "common.cuh").read_text(encoding="utf-8") + f"static {chosen}\n" + kernels
    return [re.sub(r"#pragma once|#include \"common.cuh\"", "", text) + _VIEWS_AS_ARGUMENTS]


def check_sanitized(run: Run, sanitizer: str) -> None:
    """Assert that a sanitizer finds nothing, and that the results are the same bits as here."""
    report = run.sanitized(sanitizer)
    assert (report.returncode, report.text) == (0, "")
    assert report.outputs is not None
    for there, here in zip(report.outputs, run.here(), strict=True):
        np.testing.assert_array_equal(there, here)


def check_barrier(run: Run, barrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that ThreadSanitizer finds the race which one barrier prevents, and nothing where all are there."""
    sources = sources_with_optional_barriers()
    monkeypatch.setenv("OMIT_BARRIER", "-1")
    complete = run.sanitized("thread", sources)
    assert (complete.returncode, complete.text) == (0, "")
    monkeypatch.setenv("OMIT_BARRIER", str(BARRIERS.index(barrier)))
    # A thread that wakes after another has ended is behind it even without the barrier: seldom, but all may be.
    reports = (run.sanitized("thread", sources, order=order) for order in range(6))
    report = next((report for report in reports if report.returncode), complete)
    assert report.returncode == 66
    assert "ThreadSanitizer: data race" in report.text
    kernel = "make_map" if barrier.startswith("map") else run.launch.kernel
    assert f" {kernel}" in report.text


def address(array: np.ndarray) -> int:
    assert array.flags.c_contiguous, "a kernel's array must be contiguous"
    return array.ctypes.data


def patch_run(tokens: NDArray[np.float16], rows: NDArray[np.float32], temperature: float, together: int = 0) -> Run:
    """tokens [B, L, N, D] and a bank [K+1, D]; buffers: probs [B, K+1, N], tokens, the bank's bytes.

    `together` asks for 1 or 2 groups of patches in a block; 0 leaves that to `launch.py`.
    """
    batch, layers, patches, dimensions = tokens.shape
    tokens = np.ascontiguousarray(tokens)
    bank = np.frombuffer(launch.bank_bytes(rows, temperature), np.uint8).copy()
    probs = np.full((batch, len(rows), patches), np.nan, np.float32)
    multiprocessors = {0: MULTIPROCESSORS, 1: 1 << 20, 2: 1}[together]
    start = launch.patch_launch(layers, patches, batch, multiprocessors)
    width = launch.bank_width(dimensions) // 8
    job = PatchJob(address(tokens), address(bank), address(probs), patches, dimensions // 8, width)
    return Run(start, job, (probs, tokens, bank))


def map_run(
    probs: NDArray[np.float32],  # [B, K+1, h, w]
    rows: TapTable,
    columns: TapTable,
    *,
    with_histogram: bool = True,
) -> Run:
    """Buffers: anomaly FP16, anomaly u8, types [B, H, pitch], peaks, histogram, then what is read."""
    batch, channels = probs.shape[:2]
    tables = launch.map_tables(rows, columns)
    shape = (batch, tables.height, tables.pitch)
    half, byte, types = np.zeros(shape, np.float16), np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)
    peaks, histogram = np.zeros((batch, PEAKS), np.float32), np.zeros((batch, HISTOGRAM_BINS), np.uint32)
    bank = np.frombuffer(launch.bank_bytes(np.zeros((channels, 8), np.float32), 1.0), np.uint8).copy()
    read = (
        np.ascontiguousarray(probs),
        bank,
        tables.row_starts,
        tables.row_weights,
        tables.group_starts,
        tables.group_weights,
    )
    job = MapJob(*map(address, read), *map(address, (half, byte, types, peaks)))
    job.histogram = address(histogram) if with_histogram else 0
    start = launch.map_launch(tables, batch, job, with_histogram=with_histogram)
    return Run(start, job, (half, byte, types, peaks, histogram, *read))


def preprocess_run(views: Sequence[PixelView], size: int, dtype: Any = np.float32) -> Run:
    """The first buffer is the images [B, 3, S, S]."""
    images = np.full((len(views), 3, size, size), np.nan, dtype)
    jobs = (ViewJob * len(views))()
    data = [np.ascontiguousarray(view.data) for view in views]
    tables: list[TapTable] = []
    for place, (view, pixels) in enumerate(zip(views, data, strict=True)):
        pitch = pixels.shape[1]
        job, rows, columns = launch.view_job((view.width, view.height), view.window, pitch, view.format, size)
        job.pixels, job.chroma = address(pixels), address(pixels) + pitch * view.height
        job.row_starts, job.row_weights = address(rows.table.starts), address(rows.table.weights)
        job.column_starts, job.column_weights = address(columns.table.starts), address(columns.table.weights)
        jobs[place] = job
        tables += rows.table, columns.table
    views_buffer = np.frombuffer(bytes(jobs), np.uint8).copy()
    whole = PreprocessJob(views=address(views_buffer), images=address(images), is_half=dtype == np.float16)
    for channel in range(3):
        whole.scale[channel], whole.bias[channel] = 1 / (255 * STD[channel]), -MEAN[channel] / STD[channel]
    start = launch.preprocess_launch(tables[1::2], size, whole)
    arrays = [array for table in tables for array in (table.starts, table.weights)]
    return Run(start, whole, (images, views_buffer, *data, *arrays), tuple(jobs))
