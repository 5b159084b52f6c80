"""Tables, block shapes and limits of the CUDA kernels: plain arithmetic, checked against what the kernels assume."""

from __future__ import annotations

import ctypes
from math import prod

import numpy as np
import pytest
from host_kernels import SHIPPED, HostModule, shipped_module
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dapo_edge.errors import RecipeError
from dapo_edge.kernels import launch, reference, resample
from dapo_edge.kernels.launch import Launch, MapJob, MapTables, PreprocessJob
from dapo_edge.kernels.resample import TapTable, pillow_bicubic, upsample

SHARED_LIMIT = 48 << 10
THREAD_LIMIT = 256
FITTING = {"channels": 21, "layers": 4, "dimensions": 768, "patches": 1369, "batch": 8}


def map_launch(size: tuple[int, int], grid: tuple[int, int], sigma: float) -> tuple[Launch, MapTables, MapJob]:
    """`size` is width, height."""
    rows, columns = (
        upsample(patches, pixels, align_corners=True, sigma=sigma)
        for patches, pixels in zip(grid, size[::-1], strict=True)
    )
    job, tables = MapJob(), launch.map_tables(rows, columns)
    return launch.map_launch(tables, 1, job, with_histogram=True), tables, job


@pytest.mark.parametrize(
    ("name", "job"),
    [
        ("patch_probabilities", launch.PatchJob),
        *((f"defect_map_{window}", launch.MapJob) for window in (4, 6, 8, "any")),
        ("preprocess", launch.PreprocessJob),
    ],
)
def test_jobs_are_as_large_as_the_kernels_structures(name: str, job: type[ctypes.Structure]) -> None:
    assert shipped_module().parameter_sizes(name) == (ctypes.sizeof(job),)


def test_structures_in_memory_are_as_large_as_the_kernels() -> None:
    probe = 'extern "C" __global__ void probe(const View view, const Bank bank) { (void)view, (void)bank; }'
    sizes = HostModule(SHIPPED / "preprocess.cu", probe).parameter_sizes("probe")
    assert sizes == (ctypes.sizeof(launch.ViewJob), ctypes.sizeof(launch.BankHeader))


def test_the_kernels_limits_are_taken() -> None:
    launch.check_limits(**FITTING)
    launch.check_limits(channels=65, layers=8, dimensions=1280, patches=4096, batch=32)
    launch.check_limits(channels=2, layers=1, dimensions=8, patches=1, batch=1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("channels", 66, "the CUDA kernels take 1 to 64 defect types, not 65. .*--backend openvino"),
        ("channels", 1, "1 to 64 defect types, not 0"),
        ("layers", 9, "1 to 8 feature layers, not 9"),
        ("layers", 0, "1 to 8 feature layers, not 0"),
        ("dimensions", 1288, "1 to 1280 dimensions, not 1288"),
        ("dimensions", 0, "1 to 1280 dimensions, not 0"),
        ("dimensions", 52, "read 8 dimensions at a time, 52 is no multiple of that. Run with --backend openvino"),
        ("patches", 4097, "1 to 4096 patches, not 4097"),
        ("batch", 33, "1 to 32 views per batch, not 33"),
    ],
)
def test_what_the_kernels_cannot_hold_is_refused(field: str, value: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        launch.check_limits(**{**FITTING, field: value})


@pytest.mark.parametrize("dimensions", [8, 32, 48, 1280])
def test_a_bank_has_the_same_size_for_every_number_of_types(dimensions: int) -> None:
    rng = np.random.default_rng(0)
    width = launch.bank_width(dimensions)
    assert width % 32 == 0
    assert dimensions <= width < dimensions + 32
    for types in (1, 20, 64):
        rows = reference.normalise(rng.standard_normal((types + 1, dimensions)).astype(np.float32))
        data = launch.bank_bytes(rows, 0.07)
        assert len(data) == ctypes.sizeof(launch.BankHeader) + 2 * launch.MAX_BANK_ROWS * width
        header = launch.BankHeader.from_buffer_copy(data)
        assert header.channels == types + 1
        assert header.scale == pytest.approx(1 / 0.07)
        halves = np.frombuffer(data, np.float16, offset=ctypes.sizeof(header)).reshape(launch.MAX_BANK_ROWS, width)
        np.testing.assert_array_equal(halves[: types + 1, :dimensions], rows.astype(np.float16))
        assert not halves[types + 1 :].any()
        assert not halves[:, dimensions:].any()


@pytest.mark.parametrize("layers", range(1, launch.MAX_LAYERS + 1))
@pytest.mark.parametrize(("patches", "batch"), [(1, 1), (49, 2), (1369, 1), (4096, 32)])
@pytest.mark.parametrize("multiprocessors", [8, 132])
def test_patch_blocks(layers: int, patches: int, batch: int, multiprocessors: int) -> None:
    start = launch.patch_launch(layers, patches, batch, multiprocessors)
    assert start.kernel == "patch_probabilities"
    assert start.block[:2] == (32, layers)
    assert prod(start.block) <= THREAD_LIMIT
    assert start.grid[0] * start.block[2] * 16 >= patches > (start.grid[0] - 1) * start.block[2] * 16
    assert start.grid[1:] == (batch, 1)
    if start.block[2] == 2:  # never at the price of idle multiprocessors
        assert start.grid[0] * batch >= multiprocessors
    assert start.shared_bytes == 72 * 160 * 2


sides = st.integers(1, 700)
grids = st.tuples(st.integers(1, 64), st.integers(1, 64)) | st.tuples(st.just(1), st.integers(1, 4096))


@settings(max_examples=60, deadline=None)
@given(grid=grids, size=st.tuples(sides, sides), sigma=st.floats(0, 20), align_corners=st.booleans())
def test_map_tables_are_the_tap_tables(
    grid: tuple[int, int], size: tuple[int, int], sigma: float, align_corners: bool
) -> None:
    rows, columns = (
        upsample(patches, pixels, align_corners=align_corners, sigma=sigma)
        for patches, pixels in zip(grid, size, strict=True)
    )
    tables = launch.map_tables(rows, columns)
    assert (tables.height, tables.width, tables.grid) == (*size, grid)
    assert tables.pitch % 4 == 0
    assert tables.width <= tables.pitch < tables.width + 4
    assert len(tables.group_starts) == tables.pitch // 4
    assert tables.window in (4, 6, 8) or tables.window > 8
    np.testing.assert_array_equal(dense_of(tables), columns.dense())
    assert (np.diff(tables.group_starts) >= 0).all()
    check_map_launch(tables)


def dense_of(tables: MapTables) -> NDArray[np.float32]:
    """What the kernel makes of the columns' table, `[W, w]`."""
    groups, window, _ = tables.group_weights.shape
    dense = np.zeros((tables.pitch, tables.grid[1] + window), np.float32)
    for group in range(groups):
        start = tables.group_starts[group]
        dense[4 * group : 4 * group + 4, start : start + window] += tables.group_weights[group].T
    assert not dense[tables.width :].any()
    assert not dense[:, tables.grid[1] :].any()
    return dense[: tables.width, : tables.grid[1]]


def check_map_launch(tables: MapTables) -> None:
    for with_histogram in (False, True):
        job = MapJob()
        start = launch.map_launch(tables, 3, job, with_histogram=with_histogram)
        rows = 1 if start.kernel == "defect_map_8" else 2
        threads = start.block[0]
        assert threads % 32 == 0
        assert job.groups * job.lines <= threads <= THREAD_LIMIT
        assert start.grid[0] * job.groups >= len(tables.group_starts) > (start.grid[0] - 1) * job.groups
        assert start.grid[1] * job.lines * rows >= tables.height > (start.grid[1] - 1) * job.lines * rows
        bins = launch.HISTOGRAM_BINS if with_histogram else 0
        band = job.channels_at_once * job.lines * rows * job.span
        assert start.shared_bytes == 4 * (launch.PEAKS + bins + 4 * rows * threads + band) <= SHARED_LIMIT
        assert 1 <= job.channels_at_once <= launch.MAX_CHANNELS
        firsts = tables.group_starts[:: job.groups]
        lasts = tables.group_starts[np.r_[job.groups - 1 : len(tables.group_starts) : job.groups, -1]][: len(firsts)]
        assert (lasts - firsts + tables.window <= job.span).all()


@pytest.mark.parametrize("size", [(518, 518), (1920, 1080), (224, 224)])
@pytest.mark.parametrize("patches", [14, 16, 24, 37])
@pytest.mark.parametrize("smoothing", [0, 4])
def test_few_threads_have_no_pixel(size: tuple[int, int], patches: int, smoothing: float) -> None:
    start, tables, _ = map_launch(size, (patches, patches), smoothing * size[1] / 518)
    rows = 1 if start.kernel == "defect_map_8" else 2
    needed = len(tables.group_starts) * -(-tables.height // rows)
    assert needed / (prod(start.grid) * prod(start.block)) > 0.8


def test_a_table_that_goes_back_is_refused() -> None:
    back = TapTable(np.array([0, 2, 1, 0, 2, 0, 0, 0, 0], np.int32), np.full((9, 1), 1, np.float32), size_in=3)
    forth = upsample(3, 9, align_corners=True, sigma=0.0)
    for rows, columns in ((back, forth), (forth, TapTable(back.starts[::-1].repeat(4), back.weights.repeat(4, 0), 3))):
        with pytest.raises(ValueError, match="go backwards"):
            launch.map_tables(rows, columns)


@settings(max_examples=150, deadline=None)
@given(size_in=st.integers(1, 5000), size_out=st.integers(1, 1100))
def test_windows_of_pictures_never_go_back(size_in: int, size_out: int) -> None:
    """The preprocess kernel reads a tile from its first window's start to its last window's end."""
    assert (np.diff(pillow_bicubic(size_in, size_out).table.starts) >= 0).all()


@pytest.mark.parametrize(("size_in", "size_out"), [(7, 37), (54, 994), (203, 667), (807, 971)])
def test_windows_with_weights_of_zero_do_not_start_late(size_in: int, size_out: int) -> None:
    assert (np.diff(pillow_bicubic(size_in, size_out).table.starts) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    views=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=1, max_size=3),
    size=st.integers(16, 700),
)
def test_preprocess_blocks_fit(views: list[tuple[int, int]], size: int) -> None:
    tables = [pillow_bicubic(width, size).table for _, width in views]
    job = PreprocessJob()
    start = launch.preprocess_launch(tables, size, job)
    assert start.block == (32, 8, 1)
    assert job.size == size
    assert start.shared_bytes == 4 * 16 * (job.segment + 32) <= SHARED_LIMIT // 2
    assert start.grid == (-(-size // 32), -(-size // (8 * job.rows_per_thread)), len(views))
    for table in tables:
        for first in range(0, size, 32):
            last = min(first + 32, size) - 1
            assert table.starts[last] + table.taps - table.starts[first] <= job.segment


@pytest.mark.parametrize("pixels", [1, 60, 100, 4000, 268_324])
def test_the_mean_of_the_top_is_the_references(pixels: int) -> None:
    values = np.random.default_rng(pixels).beta(0.3, 3, pixels).astype(np.float32)
    counts = np.histogram(values, launch.HISTOGRAM_BINS, (0, 1))[0].astype(np.uint32)
    nothing = np.zeros((0, 0), np.float32)
    exact = reference.image_scores("top", nothing, nothing, 1.0, values[None, None])[0]
    assert abs(launch.top_mean(counts, pixels) - exact) <= 1 / (2 * launch.HISTOGRAM_BINS) + 1e-6


def test_the_mean_of_the_top_by_hand() -> None:
    counts = np.zeros(launch.HISTOGRAM_BINS, np.uint32)
    counts[[0, 1024, 2047]] = 197, 1, 2
    middle, highest = 1024.5 / 2048, 2047.5 / 2048
    assert launch.top_mean(counts, 200) == pytest.approx(highest)
    assert launch.top_mean(counts, 200, 0.015) == pytest.approx((2 * highest + middle) / 3)
    assert launch.top_mean(counts, 50) == pytest.approx(highest)  # one pixel at least
    assert launch.top_mean(counts, 200, 1.0) == pytest.approx((2 * highest + middle + 197 * 0.5 / 2048) / 200)


def test_identity_tables() -> None:
    """A map as large as the grid: each pixel reads its own patch."""
    tables = launch.map_tables(resample.gaussian(5, 0), resample.gaussian(7, 0))
    np.testing.assert_array_equal(dense_of(tables), np.eye(7, dtype=np.float32))
