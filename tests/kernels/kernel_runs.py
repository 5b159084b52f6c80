"""Runs the shipped CUDA kernels on the CPU with jobs made by `launch.py`, as the GPU backend does."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from host_kernels import Report, run_program, shipped_module, shipped_sources
from numpy.typing import NDArray

from dapo_edge.kernels import launch
from dapo_edge.kernels.launch import HISTOGRAM_BINS, PEAKS, Launch, MapJob, PatchJob, PreprocessJob, ViewJob
from dapo_edge.kernels.pixels import FORMATS, PixelView
from dapo_edge.kernels.resample import TapTable

MULTIPROCESSORS = 16
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@dataclass(frozen=True, eq=False)
class Run:
    """A kernel with all that it reads and writes."""

    launch: Launch
    job: ctypes.Structure
    buffers: tuple[np.ndarray, ...]  # outputs first

    def here(self, order: int = 0) -> tuple[np.ndarray, ...]:
        """Run in this process; outputs are written in place."""
        start = self.launch
        shipped_module().launch(start.kernel, start.grid, start.block, start.shared_bytes, [self.job], order)
        return self.buffers

    def sanitized(self, sanitizer: Any = "thread", **options: Any) -> Report:
        """Run in a process of its own, with a real thread per CUDA thread."""
        start = self.launch
        return run_program(
            shipped_sources(),
            start.kernel,
            start.grid,
            start.block,
            start.shared_bytes,
            [self.job],
            sanitizer=sanitizer,
            buffers=self.buffers,
            **options,
        )


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def patch_run(tokens: NDArray[np.float16], rows: NDArray[np.float32], temperature: float, together: int = 0) -> Run:
    """tokens [B, L, N, D] and a bank [K+1, D]; the first buffer is probs [B, K+1, N]."""
    batch, layers, patches, dimensions = tokens.shape
    bank = np.frombuffer(launch.bank_bytes(rows, temperature), np.uint8).copy()
    probs = np.full((batch, len(rows), patches), np.nan, np.float32)
    start = launch.patch_launch(
        layers, patches, batch, MULTIPROCESSORS if not together else 1 << 20 >> 20 * (together - 1)
    )
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


def preprocess_run(
    views: Sequence[PixelView], tables: Sequence[tuple[TapTable, TapTable]], size: int, dtype: Any = np.float32
) -> Run:
    """The first buffer is the images [B, 3, S, S]."""
    images = np.full((len(views), 3, size, size), np.nan, dtype)
    jobs = (ViewJob * len(views))()
    data = [np.ascontiguousarray(view.data) for view in views]
    for job, view, pixels, (rows, columns) in zip(jobs, views, data, tables, strict=True):
        pitch = pixels.shape[1]
        job.pixels, job.chroma = address(pixels), address(pixels) + pitch * view.height
        job.row_starts, job.row_weights = address(rows.starts), address(rows.weights)
        job.column_starts, job.column_weights = address(columns.starts), address(columns.weights)
        job.width, job.height, job.pitch = view.width, view.height, pitch
        job.left, job.top = view.window[:2]
        job.row_taps, job.column_taps, job.format = rows.taps, columns.taps, FORMATS.index(view.format)
    views_buffer = np.frombuffer(bytes(jobs), np.uint8).copy()
    whole = PreprocessJob(views=address(views_buffer), images=address(images), is_half=dtype == np.float16)
    for channel in range(3):
        whole.scale[channel], whole.bias[channel] = 1 / (255 * STD[channel]), -MEAN[channel] / STD[channel]
    start = launch.preprocess_launch(tables, size, whole)
    arrays = [
        array for rows, columns in tables for array in (rows.starts, rows.weights, columns.starts, columns.weights)
    ]
    return Run(start, whole, (images, views_buffer, *data, *arrays))
