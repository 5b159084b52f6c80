"""What the CUDA kernels are launched with: job structures, tables and block shapes. Pure arithmetic, no CUDA in here.

The structures mirror those of the `.cu` files field by field; every kernel takes one of them by value.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import RecipeError
from dapo_edge.kernels.pixels import FORMATS, PixelFormat
from dapo_edge.kernels.resample import ReducedTable, TapTable, pillow_bicubic

MAX_CHANNELS = 65  # K + 1
MAX_LAYERS = 8
MAX_DIMENSIONS = 1280
MAX_PATCHES = 4096
MAX_BATCH = 32

MAX_BANK_ROWS = 72
PEAKS = MAX_BANK_ROWS
HISTOGRAM_BINS = 2048
COLUMNS_PER_THREAD = 4

_WARP = 32
_MAX_THREADS = 256
_SHARED_LIMIT = 48 << 10  # bytes that every GPU gives without being asked
_SHARED_WISH = 24 << 10  # leaves room for several blocks at once
_PATCHES_PER_WARP = 16
_BANK_BYTES = MAX_BANK_ROWS * (128 + 32) * 2
_SHARE_BYTES = MAX_BANK_ROWS * 20 * 4
_TILE_COLUMNS, _STRIP, _THREAD_ROWS = 32, 16, 8
# Kernel by the columns of the grid that four pixels read, and the rows that one of its threads owns.
_MAP_KERNELS = ((4, "defect_map_4", 2), (6, "defect_map_6", 2), (8, "defect_map_8", 1))
_ANY_MAP_KERNEL = ("defect_map_any", 2)

Address = ctypes.c_uint64
Int = ctypes.c_int32


class BankHeader(ctypes.Structure):
    """`Bank`: stands before the rows."""

    _fields_ = (("channels", Int), ("scale", ctypes.c_float), ("reserved", Int * 2))


class PatchJob(ctypes.Structure):
    """Job of `patch_probabilities`."""

    _fields_ = (
        ("tokens", Address),
        ("bank", Address),
        ("probs", Address),
        ("patches", Int),
        ("eighths", Int),
        ("width", Int),
    )


class MapJob(ctypes.Structure):
    """Job of the `defect_map` kernels."""

    _fields_ = (
        ("probs", Address),
        ("bank", Address),
        ("row_starts", Address),
        ("row_weights", Address),
        ("group_starts", Address),
        ("group_weights", Address),
        ("anomaly_half", Address),
        ("anomaly_byte", Address),
        ("types", Address),
        ("peaks", Address),
        ("histogram", Address),
        ("grid_rows", Int),
        ("grid_columns", Int),
        ("height", Int),
        ("width", Int),
        ("pitch", Int),
        ("row_taps", Int),
        ("window", Int),
        ("groups", Int),
        ("lines", Int),
        ("span", Int),
        ("channels_at_once", Int),
    )


class ViewJob(ctypes.Structure):
    """`View`: one camera picture, the part of it that is looked at, and the tables of that part."""

    _fields_ = (
        ("pixels", Address),
        ("chroma", Address),
        ("row_starts", Address),
        ("row_weights", Address),
        ("column_starts", Address),
        ("column_weights", Address),
        ("width", Int),
        ("height", Int),
        ("pitch", Int),
        ("left", Int),
        ("top", Int),
        ("across", Int),
        ("down", Int),
        ("reduce_across", Int),
        ("reduce_down", Int),
        ("row_taps", Int),
        ("column_taps", Int),
        ("format", Int),
    )


class PreprocessJob(ctypes.Structure):
    """Job of `preprocess`."""

    _fields_ = (
        ("views", Address),
        ("images", Address),
        ("size", Int),
        ("is_half", Int),
        ("rows_per_thread", Int),
        ("segment", Int),
        ("scale", ctypes.c_float * 3),
        ("bias", ctypes.c_float * 3),
    )


@dataclass(frozen=True)
class Launch:
    """How a kernel is started."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


@dataclass(frozen=True, eq=False)
class MapTables:
    """Both axes of the map in the kernel's form: columns come in groups of four that read one window of the grid."""

    row_starts: NDArray[np.int32]  # [H]
    row_weights: NDArray[np.float32]  # [H, taps]
    group_starts: NDArray[np.int32]  # [pitch / 4]
    group_weights: NDArray[np.float32]  # [pitch / 4, window, 4], zero for columns beyond the map
    grid: tuple[int, int]  # patch rows, patch columns
    width: int  # of the map, px
    pitch: int  # width, rounded up to a multiple of four

    @property
    def height(self) -> int:
        """Rows of the map, px."""
        return len(self.row_starts)

    @property
    def window(self) -> int:
        """Columns of the grid that one group reads."""
        return self.group_weights.shape[1]


def check_limits(*, channels: int, layers: int, dimensions: int, patches: int, batch: int) -> None:
    """Refuse what the kernels' memory can't hold. Raises `RecipeError` naming the number and its limit."""
    limits = {
        "defect types": (channels - 1, MAX_CHANNELS - 1),
        "feature layers": (layers, MAX_LAYERS),
        "dimensions": (dimensions, MAX_DIMENSIONS),
        "patches": (patches, MAX_PATCHES),
        "views per batch": (batch, MAX_BATCH),
    }
    for what, (found, limit) in limits.items():
        if not 1 <= found <= limit:
            raise RecipeError(
                f"the CUDA kernels take 1 to {limit} {what}, not {found}", "Use less, or run with --backend openvino"
            )
    if dimensions % 8:
        raise RecipeError(
            f"the CUDA kernels read 8 dimensions at a time, {dimensions} is no multiple of that",
            "Run with --backend openvino",
        )


def bank_width(dimensions: int) -> int:
    """Columns of a bank row in device memory: the dimensions, rounded up to 32."""
    return _ceil(dimensions, 32) * 32


def bank_bytes(rows: NDArray[np.float32], temperature: float) -> bytes:
    """A prompt bank [K+1, D] as the kernels read it, always of the same size for equal D."""
    channels, dimensions = rows.shape
    padded = np.zeros((MAX_BANK_ROWS, bank_width(dimensions)), np.float16)
    padded[:channels, :dimensions] = rows
    return bytes(BankHeader(channels, 1 / temperature)) + padded.tobytes()


def patch_launch(layers: int, patches: int, batch: int, multiprocessors: int) -> Launch:
    """Two groups of 16 patches in a block share a load of the bank, unless one each keeps more of the GPU busy."""
    tiles = _ceil(patches, _PATCHES_PER_WARP)
    together = 2 if tiles * batch >= 2 * multiprocessors and 2 * layers * _WARP <= _MAX_THREADS else 1
    shared = max(_BANK_BYTES, together * _SHARE_BYTES)
    grid = (_ceil(tiles, together), batch, 1)
    return Launch("patch_probabilities", grid, (_WARP, layers, together), shared)


def map_tables(rows: TapTable, columns: TapTable) -> MapTables:
    """Bring two tap tables (h to H, w to W) into the kernel's form."""
    width = columns.size_out
    groups = _ceil(width, COLUMNS_PER_THREAD)
    pitch = groups * COLUMNS_PER_THREAD
    starts = np.pad(columns.starts, (0, pitch - width), mode="edge").reshape(groups, -1)  # [groups, 4]
    first = starts.min(axis=1)
    window = int((starts.max(axis=1) - first).max()) + columns.taps
    first = np.minimum(first, max(columns.size_in - window, 0))
    window = min(window, columns.size_in)
    weights = np.zeros((groups, window, COLUMNS_PER_THREAD), np.float32)
    group, place = np.divmod(np.arange(width), COLUMNS_PER_THREAD)
    offsets = (columns.starts - first[group])[:, None] + np.arange(columns.taps)  # [W, taps]
    weights[group[:, None], offsets, place[:, None]] = columns.weights
    if (np.diff(first) < 0).any() or (np.diff(rows.starts) < 0).any():
        raise ValueError("the windows of a tap table go backwards")
    return MapTables(
        row_starts=rows.starts,
        row_weights=rows.weights,
        group_starts=first.astype(np.int32),
        group_weights=_padded_window(weights),
        grid=(rows.size_in, columns.size_in),
        width=width,
        pitch=pitch,
    )


def map_launch(tables: MapTables, batch: int, job: MapJob, *, with_histogram: bool) -> Launch:
    """Choose blocks that waste few threads and fit into shared memory; writes sizes and shape into `job`."""
    kernel, thread_rows = _map_kernel(tables.window)
    groups, lines = _map_block(tables, thread_rows)
    span = _span(tables, groups)
    threads = _ceil(groups * lines, _WARP) * _WARP
    fixed = 4 * (PEAKS + (HISTOGRAM_BINS if with_histogram else 0) + thread_rows * COLUMNS_PER_THREAD * threads)
    channel_bytes = 4 * lines * thread_rows * span
    at_once = min(MAX_CHANNELS, max(1, (_SHARED_WISH - fixed) // channel_bytes))
    shared = fixed + at_once * channel_bytes
    job.grid_rows, job.grid_columns = tables.grid
    job.height, job.width, job.pitch = tables.height, tables.width, tables.pitch
    job.row_taps, job.window = tables.row_weights.shape[1], tables.window
    job.groups, job.lines, job.span, job.channels_at_once = groups, lines, span, at_once
    grid = (_ceil(len(tables.group_starts), groups), _ceil(tables.height, lines * thread_rows), batch)
    return Launch(kernel, grid, (threads, 1, 1), shared)


def view_job(
    shape: tuple[int, int], window: tuple[int, int, int, int], pitch: int, pixel_format: PixelFormat, size: int
) -> tuple[ViewJob, ReducedTable, ReducedTable]:
    """The part of a view's job that needs no address, and its tables of rows and columns.

    `shape` is the whole picture's (width, height), `window` the (left, top, width, height) that is looked at, `pitch`
    in bytes.
    """
    left, top, across, down = window
    rows, columns = pillow_bicubic(down, size), pillow_bicubic(across, size)
    job = ViewJob(width=shape[0], height=shape[1], pitch=pitch, left=left, top=top, across=across, down=down)
    job.reduce_across, job.reduce_down = columns.factor, rows.factor
    job.row_taps, job.column_taps = rows.table.taps, columns.table.taps
    job.format = FORMATS.index(pixel_format)
    return job, rows, columns


def preprocess_launch(columns: Sequence[TapTable], size: int, job: PreprocessJob) -> Launch:
    """For views with these tables of columns; writes size and tiles into `job`."""
    job.size = size
    job.rows_per_thread = 4 if size > 256 else 2  # a small output would otherwise leave much of the GPU idle
    job.segment = max(_reach(table) for table in columns)
    grid = (_ceil(size, _TILE_COLUMNS), _ceil(size, _THREAD_ROWS * job.rows_per_thread), len(columns))
    # The reduction leaves at most four source pixels for one of the output: the segment is never long.
    return Launch("preprocess", grid, (_WARP, _THREAD_ROWS, 1), 4 * _STRIP * (job.segment + _TILE_COLUMNS))


def top_mean(histogram: NDArray[np.uint32], pixels: int, fraction: float = 0.01) -> float:
    """Mean of the highest `fraction` of `pixels` values (one at least), from their histogram over [0, 1].

    Each value counts as the middle of its bin, so the mean is off by half a bin (1/4096) at most.
    """
    wanted = max(1, int(pixels * fraction))
    from_above = histogram[::-1].astype(np.int64)
    taken = np.clip(wanted - (np.cumsum(from_above) - from_above), 0, from_above)
    middles = (np.arange(len(histogram))[::-1] + 0.5) / len(histogram)
    return float((taken * middles).sum() / wanted)


def _ceil(value: int, step: int) -> int:
    return -(-value // step)


def _map_kernel(window: int) -> tuple[str, int]:
    return next(((name, rows) for columns, name, rows in _MAP_KERNELS if window == columns), _ANY_MAP_KERNEL)


def _padded_window(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Widen the window with zero weights to the next one that a kernel is made for."""
    window = weights.shape[1]
    wider = next((columns for columns, _, _ in _MAP_KERNELS if window <= columns), window)
    return np.pad(weights, ((0, 0), (0, wider - window), (0, 0)))


def _map_block(tables: MapTables, thread_rows: int) -> tuple[int, int]:
    """Groups and lines of one block, so that all blocks together cost least; `_block_cost` says what counts."""
    groups_needed, lines_needed = len(tables.group_starts), _ceil(tables.height, thread_rows)
    best, least = (1, 1), float("inf")
    for groups in range(1, min(groups_needed, _MAX_THREADS) + 1):
        span = _span(tables, groups)
        for lines in range(1, min(lines_needed, _MAX_THREADS // groups) + 1):
            if 4 * lines * thread_rows * span > _SHARED_WISH // 4 and (groups, lines) != (1, 1):
                continue  # too few channels would fit at once
            blocks = _ceil(groups_needed, groups) * _ceil(lines_needed, lines)
            cost = blocks * _block_cost(tables, thread_rows, groups * lines, lines, span)
            if cost < least:
                best, least = (groups, lines), cost
    return best


def _block_cost(tables: MapTables, thread_rows: int, threads: int, lines: int, span: int) -> float:
    """About how many instructions a block takes for one channel: its pixels, and the band of the grid below them."""
    pixels = _ceil(threads, _WARP) * _WARP * thread_rows * (5 * tables.window + 20)
    band = lines * thread_rows * _ceil(span, 4) * 4 * (25 + 2 * tables.row_weights.shape[1])
    # Blocks of a few warps have too little to do while they wait at a barrier.
    return (pixels + band) * (1.1 if threads <= 2 * _WARP else 1.0)


def _span(tables: MapTables, groups: int) -> int:
    starts = tables.group_starts
    firsts = starts[::groups]
    lasts = starts[np.minimum(np.arange(0, len(starts), groups) + groups, len(starts)) - 1]
    return int((lasts - firsts).max()) + tables.window


def _reach(columns: TapTable) -> int:
    """Source columns that a tile of the output reads, at most."""
    firsts = columns.starts[::_TILE_COLUMNS]
    ends = np.minimum(np.arange(0, columns.size_out, _TILE_COLUMNS) + _TILE_COLUMNS, columns.size_out)
    return int((columns.starts[ends - 1] - firsts).max()) + columns.taps
