"""The kernels on a real GPU against their definitions, at the sizes of a line. They bring no TensorRT along."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import checks
import numpy as np
import pytest
from driver import TorchMachine
from works import FrameWork, MapWork, PatchWork

from dapo_edge.kernels import launch
from dapo_edge.kernels.pixels import FORMATS, PixelFormat
from dapo_edge.kernels.resample import TapTable, upsample

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.gpu

REPLAYS = 10_000


def tables(grid: tuple[int, int], size: tuple[int, int], sigma: float = 4.0) -> tuple[TapTable, TapTable]:
    """Patch rows and columns to a map (width, height); sigma at 518 px."""
    width, height = size
    return (
        upsample(grid[0], height, align_corners=True, sigma=sigma * height / 518),
        upsample(grid[1], width, align_corners=True, sigma=sigma * width / 518),
    )


def test_the_compiler_found_room_for_all_registers(machine: TorchMachine) -> None:
    usage = machine.cubin.usage
    assert {"patch_probabilities", "preprocess", "defect_map_4", "defect_map_6", "defect_map_8"} <= set(usage)
    assert all(kernel.spill_bytes == 0 for kernel in usage.values()), usage


@pytest.mark.parametrize(
    ("shape", "types"),
    [
        ((1, 4, 1369, 768), 20),
        ((16, 4, 1369, 768), 20),
        ((1, 8, 1369, 1280), 64),
        ((2, 3, 1000, 512), 1),
        ((1, 1, 1, 8), 5),
        ((32, 2, 197, 48), 7),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_patch_probabilities(
    machine: TorchMachine, shape: tuple[int, int, int, int], types: int, temperature: float
) -> None:
    work, difference = checks.run_patch(machine, shape, types, temperature)
    assert difference <= checks.PROBABILITY
    np.testing.assert_allclose(work.result().sum(axis=1), 1, atol=1e-4)


def test_tokens_without_a_number_spoil_their_own_patch_only(machine: TorchMachine) -> None:
    tokens, rows = checks.random_tokens((1, 4, 100, 768)), checks.random_bank(20, 768)
    tokens[0, 2, 41, 300] = np.nan
    tokens[0, 1, 7] = 0
    work = PatchWork(machine, tokens, rows, 0.07)
    work.start()
    broken = np.isnan(work.result()[0]).any(axis=0)
    assert np.flatnonzero(broken).tolist() == [41]


@pytest.mark.parametrize(
    ("batch", "grid", "size", "types", "sigma"),
    [
        (1, (37, 37), (518, 518), 20, 4.0),
        (16, (37, 37), (518, 518), 20, 4.0),
        (1, (37, 37), (1920, 1080), 20, 4.0),
        (1, (37, 37), (1920, 1080), 64, 4.0),
        (2, (37, 37), (517, 259), 64, 0.0),
        (3, (24, 24), (333, 71), 1, 12.0),
        (1, (64, 64), (31, 17), 3, 0.0),
        (2, (16, 16), (1, 1), 5, 4.0),
    ],
    ids=str,
)
def test_defect_map(
    machine: TorchMachine, batch: int, grid: tuple[int, int], size: tuple[int, int], types: int, sigma: float
) -> None:
    probs = checks.random_probs((batch, types + 1, *grid))
    _, difference = checks.run_map(machine, probs, tables(grid, size, sigma))
    assert difference.holds(), difference


def test_a_map_without_bytes_and_histogram_is_the_same(machine: TorchMachine) -> None:
    probs, both = checks.random_probs((2, 21, 37, 37)), tables((37, 37), (518, 518))
    full, _ = checks.run_map(machine, probs, both)
    bank = machine.place(np.frombuffer(launch.bank_bytes(np.zeros((21, 8), np.float32), 1.0), np.uint8))
    bare = MapWork(machine, machine.place(probs), bank, both, 2, with_grey=False, with_histogram=False)
    bare.start()
    assert np.array_equal(bare.result().anomaly, full.result().anomaly)
    assert np.array_equal(bare.result().types, full.result().types)
    assert not bare.result().grey.any()
    assert not bare.result().histogram.any()


@pytest.mark.parametrize(
    ("batch", "size"), [(1, (518, 518)), (16, (518, 518)), (1, (1920, 1080)), (3, (1920, 1080))], ids=str
)
def test_from_tokens_to_map(machine: TorchMachine, batch: int, size: tuple[int, int]) -> None:
    patch, difference = checks.run_patch(machine, (batch, 4, 1369, 768), 20)
    assert difference <= checks.PROBABILITY
    both = tables((37, 37), size)
    maps = MapWork(machine, patch.probs, patch.bank, both, batch)
    maps.start()
    probs = patch.result().reshape(batch, 21, 37, 37)
    assert checks.map_difference(maps.result(), probs, both).holds()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("pixel_format", FORMATS)
@pytest.mark.parametrize(
    ("size", "side", "crop"),
    [
        ((1920, 1080), 518, None),
        ((641, 479), 224, (3, 5, 600, 471)),
        ((97, 131), 336, None),
        ((4096, 3000), 224, (1, 2048, 4095, 952)),
    ],
    ids=str,
)
def test_preprocess(
    machine: TorchMachine,
    pixel_format: PixelFormat,
    size: tuple[int, int],
    side: int,
    crop: tuple[int, int, int, int] | None,
    dtype: type,
) -> None:
    view = checks.random_view(pixel_format, size, crop=crop)
    images, difference = checks.run_preprocess(machine, [view], side, dtype)
    assert difference <= checks.GREY_MAX
    pytest.importorskip("PIL", reason="Pillow is missing, only pixels.py was compared with")
    largest, mean = checks.pillow_difference(images[0], view)
    assert largest <= checks.GREY_MAX + 0.1  # FP16 adds a share of a grey level
    assert mean <= checks.GREY_MEAN


def test_a_batch_of_sixteen_frames_of_all_formats(machine: TorchMachine) -> None:
    sizes = [(1920, 1080), (640, 480), (333, 1001)]
    views = [checks.random_view(FORMATS[index % 5], sizes[index % 3], seed=index) for index in range(16)]
    _, difference = checks.run_preprocess(machine, views, 518, np.float16)
    assert difference <= checks.GREY_MAX


TOKENS, BOTH = (1, 4, 1369, 768), tables((37, 37), (518, 518))


def one_frame(machine: TorchMachine, types: int = 20) -> FrameWork:
    """The kernels of one frame, 1080p to a map of 518 x 518."""
    view, rows = checks.random_view("BGR8", (1920, 1080)), checks.random_bank(types, TOKENS[-1])
    return FrameWork(machine, [view], 518, checks.random_tokens(TOKENS), rows, 0.07, BOTH)


def test_a_graph_computes_what_plain_launches_do(machine: TorchMachine) -> None:
    frame = one_frame(machine)
    frame.start()
    plain = frame.results()
    replay = machine.capture(frame.start)
    for _ in range(3):
        machine.write(frame.patch.probs, np.full(frame.patch.probs.shape, np.nan, np.float32))
        replay()
        for before, after in zip(plain, frame.results(), strict=True):
            assert np.array_equal(before, after)


def test_other_words_between_two_replays_need_no_new_capture(machine: TorchMachine) -> None:
    frame = one_frame(machine)
    replay = machine.capture(frame.start)
    for types in (5, 64, 1, 20):
        rows = checks.random_bank(types, 768, seed=types)
        frame.patch.set_bank(rows)
        replay()
        assert checks.patch_difference(frame.patch, checks.random_tokens(TOKENS), rows, 0.07) <= checks.PROBABILITY
        probs = frame.patch.result().reshape(1, types + 1, 37, 37)
        assert checks.map_difference(frame.maps.result(), probs, BOTH).holds()


def test_ten_thousand_replays_keep_no_memory_and_the_same_answer(machine: TorchMachine) -> None:
    frame = one_frame(machine)
    replay = machine.capture(frame.start)
    for _ in range(100):
        replay()
    first, free = frame.results(), machine.free_bytes()
    for _ in range(REPLAYS):
        replay()
    machine.synchronise()
    assert machine.free_bytes() >= free - (1 << 20)
    for before, after in zip(first, frame.results(), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(machine: TorchMachine, tool: str) -> None:
    checker = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if checker is None:
        pytest.skip("compute-sanitizer isn't installed")
    script = Path(__file__).with_name("sanitize.py")
    command = [checker, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    text = found.stdout + found.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer refuses this device")
    assert found.returncode == 0, text[-4000:]
    assert "all kernels are right" in found.stdout
