"""The emulator of CUDA's threads: its arithmetic against NumPy, and that it finds the mistakes it is there to find."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_kernels import HostModule, Report, kernel_names, run_program

SOURCE = (Path(__file__).parent / "emulated.cu").resolve()


@pytest.fixture(scope="module")
def kernels() -> HostModule:
    return HostModule(SOURCE)


def run(name: str, threads: int, shared: int, args: Sequence[Any], **options: Any) -> Report:
    return run_program([SOURCE], name, (1, 1, 1), (threads, 1, 1), shared, args, **options)


def line_of(mark: str) -> int:
    """The line of the source that ends with the comment `// mark`."""
    (line,) = [number for number, text in enumerate(SOURCE.read_text().splitlines(), 1) if text.endswith(f"// {mark}")]
    return line


@pytest.mark.parametrize("threads", [32, 96, 256])
def test_a_softmax_of_cosines_equals_float64_in_any_order(kernels: HostModule, threads: int) -> None:
    rng = np.random.default_rng(0)
    rows, dimensions, classes = 20, 96, 37
    features = rng.standard_normal((rows, dimensions)).astype(np.float16)
    bank = rng.standard_normal((classes, dimensions)).astype(np.float16)
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    expected = np.exp(3 * unit @ bank.T.astype(np.float64))
    expected /= expected.sum(1, keepdims=True)
    results = []
    for order in (0, 1, 7):
        probabilities = np.full((rows, classes), -1, np.float32)
        arguments = [features, bank, probabilities, np.int32(dimensions), np.int32(classes), np.float32(3)]
        kernels.launch("softmax_of_cosines", (rows, 1, 1), (threads, 1, 1), 4 * classes, arguments, order)
        results.append(probabilities)
    assert np.abs(results[0] - expected).max() <= 1e-6
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_launches_from_two_threads_have_blocks_of_their_own(kernels: HostModule) -> None:
    features = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float16)

    def work(_: int) -> bytes:
        result = np.zeros((50, 50), np.float32)
        arguments = [features, features, result, np.int32(64), np.int32(50), np.float32(1)]
        kernels.launch("softmax_of_cosines", (50, 1, 1), (64, 1, 1), 200, arguments)
        return result.tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(12)))) == 1


def test_every_half_becomes_the_float_it_is(kernels: HostModule) -> None:
    halves = np.arange(65536, dtype=np.uint16)
    floats, back = np.zeros(65536, np.float32), np.zeros(65536, np.uint16)
    kernels.launch("halves", (128, 1, 1), (256, 1, 1), 0, [halves, floats, back])
    expected = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(floats, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(back[number], halves[number])
    assert np.isnan(back[~number].view(np.float16)).all()


def test_floats_round_to_the_nearest_half_with_ties_to_even(kernels: HostModule) -> None:
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (finite[1:] + finite[:-1]) / 2  # exact: a half has 13 bits less
    middles = np.append(middles, np.float32([65519.9, 65520, 1e30]))
    edges = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))])
    bits = np.random.default_rng(2).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45], np.float32)
    values = np.concatenate([edges, -edges, special, bits])
    values = np.resize(values, -(-len(values) // 256) * 256)
    result = np.zeros(len(values), np.uint16)
    kernels.launch("round_to_half", (len(values) // 256, 1, 1), (256, 1, 1), 0, [values, result])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(result[number], expected.view(np.uint16)[number])  # bits: zeros have signs
    assert np.isnan(result[~number].view(np.float16)).all()


def test_the_matrix_product_of_a_warp_has_the_fragments_of_ptx(kernels: HostModule) -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    d = rng.standard_normal((16, 8)).astype(np.float32)
    fragments_a, fragments_b = np.zeros((32, 4, 2), np.float16), np.zeros((32, 2, 2), np.float16)
    fragments_d = np.zeros((32, 4), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i, (row, column) in enumerate([(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]):
            fragments_a[lane, i] = a[row, column : column + 2]
        for i, row in enumerate([2 * t, 2 * t + 8]):
            fragments_b[lane, i] = b[row : row + 2, g]
        fragments_d[lane] = [*d[g, 2 * t : 2 * t + 2], *d[g + 8, 2 * t : 2 * t + 2]]
    kernels.launch("matrix_product", (1, 1, 1), (32, 1, 1), 0, [fragments_a, fragments_b, fragments_d])
    result = np.zeros((16, 8), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        result[g, 2 * t : 2 * t + 2], result[g + 8, 2 * t : 2 * t + 2] = fragments_d[lane, :2], fragments_d[lane, 2:]
    np.testing.assert_allclose(result, d + a.astype(np.float64) @ b.astype(np.float64), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("order", [0, 1, 5])
def test_warp_operations(kernels: HostModule, order: int) -> None:
    values = np.random.default_rng(4).integers(0, 2**32, 80, np.uint32)  # two and a half warps
    result = np.zeros((7, 80), np.uint32)
    wide = np.zeros(80, np.float64)
    kernels.launch("warp_operations", (1, 1, 1), (80, 1, 1), 0, [values, result, wide], order)
    lane, warp = np.arange(80) % 32, np.arange(80) // 32 * 32
    alive = np.minimum(80 - warp, 32)
    np.testing.assert_array_equal(result[0], values[warp + (lane ^ 5)])
    np.testing.assert_array_equal(result[1], np.where(lane % 8 < 5, values[np.minimum(np.arange(80) + 3, 79)], values))
    np.testing.assert_array_equal(result[2], np.where(lane >= 2, values[np.arange(80) - 2], values))
    np.testing.assert_array_equal(result[3], values[warp + lane // 16 * 16 + 3])
    votes = [sum((int(values[w + i]) & 1) << i for i in range(n)) for w, n in zip(warp, alive, strict=True)]
    np.testing.assert_array_equal(result[4], votes)
    np.testing.assert_array_equal(result[5], [values[w : w + n].max() for w, n in zip(warp, alive, strict=True)])
    np.testing.assert_array_equal(result[6], values[np.arange(80) ^ 1])  # odd and even pairs, each with its own mask
    np.testing.assert_array_equal(wide, values[warp + (lane ^ 1)] / 3)


def test_atomics_lose_nothing(kernels: HostModule) -> None:
    values = np.random.default_rng(5).integers(-1000, 1000, 640, np.int32)
    histogram, total, floats = np.zeros(16, np.uint32), np.zeros(1, np.uint64), np.zeros(1, np.float32)
    extremes = np.array([-5000, 5000], np.int32)
    kernels.launch("atomics", (5, 1, 1), (128, 1, 1), 0, [values, histogram, total, floats, extremes])
    np.testing.assert_array_equal(histogram, np.bincount(values & 15, minlength=16))
    assert total[0] == (values.astype(np.int64) & 0xFFFF).sum()
    assert floats[0] == values.sum()
    assert extremes.tolist() == [values.max(), values.min()]


def test_integers_bytes_and_rounding(kernels: HostModule) -> None:
    rng = np.random.default_rng(6)
    words = rng.integers(0, 2**32, (3, 256), np.uint32)
    special = np.array([0.5, 1.5, 2.5, -0.5, -2.5, 3e9, -3e9, np.nan, np.inf, 1e-9], np.float32)
    floats = np.resize(np.concatenate([special, rng.uniform(-100, 100, 50).astype(np.float32)]), 256)
    permuted, rounded, clamped = np.zeros(256, np.uint32), np.zeros((2, 256), np.int32), np.zeros((2, 256), np.float32)
    kernels.launch("numbers", (1, 1, 1), (256, 1, 1), 0, [words, floats, permuted, rounded, clamped])
    both = words[:2].T.copy().view(np.uint8)  # the eight bytes of each pair
    picks = np.stack([words[2] >> 4 * i & 7 for i in range(4)], 1)
    np.testing.assert_array_equal(permuted, np.take_along_axis(both, picks, 1).copy().view(np.uint32)[:, 0])
    whole = np.nan_to_num(np.rint(floats.astype(np.float64)), nan=0, posinf=2**31, neginf=-(2**31))
    np.testing.assert_array_equal(rounded[0], np.clip(whole, -(2**31), 2**31 - 1))
    np.testing.assert_array_equal(rounded[1], np.maximum(np.arange(256) - 128, -3))
    np.testing.assert_array_equal(clamped[0], np.clip(np.nan_to_num(floats, nan=0), 0, 1))
    np.testing.assert_allclose(clamped[1], 1 / np.sqrt(np.arange(1, 257)), rtol=1e-7)


def test_blocks_and_grids_have_three_dimensions(kernels: HostModule) -> None:
    result = np.full((4, 3, 2, 4, 3, 2), -1, np.int32)  # as blockIdx.z, .y, .x, threadIdx.z, .y, .x
    for order in (0, 9):
        kernels.launch("places", (2, 3, 4), (2, 3, 4), 0, [result], order)
        np.testing.assert_array_equal(result.ravel(), np.arange(result.size))
        result[...] = -1


class Job(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("count", ctypes.c_int), ("factor", ctypes.c_float))


def test_a_struct_by_value_carries_addresses_also_into_another_process(kernels: HostModule) -> None:
    values = np.arange(10, dtype=np.float32)
    job = Job(values.ctypes.data + 8, 8, 2.0)
    report = run("scaled", 32, 0, [job], sanitizer=None, buffers=[values])
    expected = np.array([0, 1, 4, 6, 8, 10, 12, 14, 16, 18], np.float32)
    assert report.returncode == 0, report.text
    assert report.outputs is not None
    np.testing.assert_array_equal(report.outputs[0], expected)
    np.testing.assert_array_equal(values, np.arange(10))
    kernels.launch("scaled", (1, 1, 1), (32, 1, 1), 0, [job])
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("waits_for_each_other", "deadlock: of 64 live threads 48 wait at __syncthreads ("),
        ("meets_elsewhere", "threads meet at different __syncthreads: "),
        ("outside_its_mask", "lane 3 takes part in a warp operation of mask 00000007"),
        ("two_masks", "lanes meet with masks "),
        ("writes_too_far", "a write beyond the 252 bytes of dynamic shared memory"),
    ],
)
@pytest.mark.parametrize("sanitizer", [None, "address"])
def test_mistakes_stop_with_a_message(name: str, message: str, sanitizer: Any) -> None:
    grid, shared = (3, 1, 1), 252  # one float less than threads
    report = run_program([SOURCE], name, grid, (64, 1, 1), shared, [np.zeros(64, np.float32)], sanitizer=sanitizer)
    assert report.returncode != 0
    assert report.outputs is None
    if name == "writes_too_far" and sanitizer:
        assert "heap-buffer-overflow" in report.text
        assert f"emulated.cu:{line_of('too far')}" in report.text
    else:
        assert f"cuda_host: block (0, 0, 0): {message}" in report.text


def test_a_kernel_that_is_right_gives_the_same_under_every_engine(kernels: HostModule) -> None:
    rng = np.random.default_rng(7)
    features, bank = (rng.standard_normal((2, 32)).astype(np.float16) for _ in range(2))
    result = np.zeros((2, 2), np.float32)
    arguments = [features, bank, result, np.int32(32), np.int32(2), np.float32(1)]
    outputs = []
    for sanitizer in (None, "thread", "address"):
        report = run_program([SOURCE], "softmax_of_cosines", (2, 1, 1), (64, 1, 1), 8, arguments, sanitizer=sanitizer)
        assert report.returncode == 0, report.text
        assert report.text == ""
        assert report.outputs is not None
        outputs.append(report.outputs[2])
    kernels.launch("softmax_of_cosines", (2, 1, 1), (64, 1, 1), 8, arguments)
    for output in outputs:
        np.testing.assert_array_equal(output, result)


@pytest.mark.parametrize(("name", "define"), [("reversed", "NO_BARRIER"), ("neighbours", "NO_WARP_BARRIER")])
def test_a_missing_barrier_is_a_race_with_its_lines(name: str, define: str) -> None:
    values = np.arange(64, dtype=np.float32)
    right = run(name, 64, 256, [values])
    assert (right.returncode, right.text) == (0, "")
    wrong = run(name, 64, 256, [values], defines=["NO_BARRIER", "NO_WARP_BARRIER"])
    assert wrong.returncode == 66
    assert "ThreadSanitizer: data race" in wrong.text
    for mark in (f"{name} writes", f"{name} reads"):
        assert f"emulated.cu:{line_of(mark)}" in wrong.text, f"{define} wasn't found at its lines"


@pytest.mark.parametrize(
    ("name", "finding"), [("reads_too_far", "heap-buffer-overflow"), ("misaligned", "misaligned address")]
)
def test_accesses_outside_memory_are_found(name: str, finding: str) -> None:
    report = run(name, 32, 0, [np.zeros(32, np.float32)], sanitizer="address")
    assert report.returncode != 0
    assert finding in report.text
    assert f"emulated.cu:{line_of(name)}" in report.text


def test_arguments_are_checked(kernels: HostModule) -> None:
    values, result = np.zeros(256, np.float32), np.zeros(256, np.uint16)
    assert kernels.parameter_sizes("scaled") == (ctypes.sizeof(Job),)
    for wrong in ([values], [values, result, result], [values, np.float32(1)]):
        with pytest.raises(AssertionError, match="round_to_half takes parameters of"):
            kernels.launch("round_to_half", (1, 1, 1), (256, 1, 1), 0, wrong)
    with pytest.raises(AssertionError, match="must be contiguous"):
        kernels.launch("round_to_half", (1, 1, 1), (128, 1, 1), 0, [values[::2], result])
    with pytest.raises(TypeError, match="a ctypes value is needed, not 3"):
        kernels.launch("round_to_half", (1, 1, 1), (128, 1, 1), 0, [values, 3])
    with pytest.raises(AssertionError, match="no kernel 'absent'"):
        kernels.launch("absent", (1, 1, 1), (1, 1, 1), 0, [])
    with pytest.raises(RuntimeError, match=r"g\+\+ refuses the kernels:(.|\n)*nonsense"):
        HostModule('extern "C" __global__ void broken() { nonsense; }')


def test_kernels_are_found_as_they_are_written() -> None:
    source = """
    // extern "C" __global__ void in_a_comment(int a)
    extern "C" __global__ void __launch_bounds__(ceil_div(300, 32), 4) bounded(
        const float* __restrict__ a,  // with a comment
        int b) {}
    extern "C" __global__ void
    plain() {}
    __global__ void without_c(int a) {}
    """
    assert kernel_names([source]) == ("bounded", "plain")
    assert HostModule(source).parameter_sizes("bounded") == (8, 4)
