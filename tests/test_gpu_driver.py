"""The helpers of tests/gpu without a GPU: by a driver whose memory is the host's, and by kernels that g++ made."""

from __future__ import annotations

import ctypes
from typing import Any

import checks
import numpy as np
import pytest
import sanitize
import torch
from driver import DriverMachine, TorchMachine
from driver_fakes import H200, NO_DRIVER, FakeLibcuda, use
from host_kernels import shipped_module
from host_machine import HostMachine
from works import FrameWork, PatchWork, PreprocessWork

from dapo_edge.errors import BackendError, DependencyMissing
from dapo_edge.kernels.compile import Cubin
from dapo_edge.kernels.resample import upsample

CUBIN = Cubin(b"\x7fELF of a GPU that isn't there", "sm_90", "nvcc 12.6", "0" * 64, {}, ())


class FakeDriver(FakeLibcuda):
    """The driver's calls that `DriverMachine` makes, checked for the types that a C function would get."""

    def __init__(self) -> None:
        super().__init__({**H200, 38: 60 << 20})
        self.memory: dict[int, np.ndarray] = {}
        self.loaded = self.has_context = False
        self.names: list[str] = []

    def _cuDevicePrimaryCtxRetain(self, context: Any, handle: ctypes.c_int) -> None:
        assert handle.value == 0
        context._obj.value = 0x7F00_1234_5678

    def _cuCtxSetCurrent(self, context: ctypes.c_void_p) -> None:
        self.has_context = context.value == 0x7F00_1234_5678

    def _cuModuleLoadData(self, module: Any, image: ctypes.c_char_p) -> int:
        assert self.has_context
        assert image.value == CUBIN.data
        module._obj.value = 0x7F00_0000_0001
        self.loaded = True
        return 0

    def _cuModuleUnload(self, module: ctypes.c_void_p) -> None:
        self.loaded = False

    def _cuModuleGetFunction(self, function: Any, module: ctypes.c_void_p, name: bytes) -> int:
        assert module.value == 0x7F00_0000_0001
        if name.decode() not in shipped_module().kernels:
            return 500
        self.names.append(name.decode())
        function._obj.value = 0x7F00_0000_0100 + len(self.names) - 1
        return 0

    def _cuLaunchKernel(self, function: ctypes.c_void_p, *rest: Any) -> None:
        shape, stream, parameters, extra = [size.value for size in rest[:7]], *rest[7:]
        assert all(isinstance(size, ctypes.c_uint) for size in rest[:7])
        assert (stream.value or 0, extra) == (0, None)
        name = self.names[function.value - 0x7F00_0000_0100]
        shipped_module().launch_raw(name, shape[:3], shape[3:6], shape[6], ctypes.addressof(parameters))

    def _cuMemAlloc_v2(self, address: Any, nbytes: ctypes.c_size_t) -> None:
        content = np.full(nbytes.value, 0xCD, np.uint8)
        address._obj.value = content.ctypes.data
        self.memory[content.ctypes.data] = content

    def _cuMemFree_v2(self, address: ctypes.c_uint64) -> None:
        del self.memory[address.value]

    def _cuMemcpyHtoD_v2(self, target: ctypes.c_uint64, source: ctypes.c_void_p, nbytes: ctypes.c_size_t) -> None:
        assert self.memory[target.value].nbytes == nbytes.value
        ctypes.memmove(target.value, source.value, nbytes.value)

    def _cuMemcpyDtoH_v2(self, target: ctypes.c_void_p, source: ctypes.c_uint64, nbytes: ctypes.c_size_t) -> None:
        assert self.memory[source.value].nbytes == nbytes.value
        ctypes.memmove(target.value, source.value, nbytes.value)

    def _cuMemsetD8_v2(self, target: ctypes.c_uint64, value: ctypes.c_ubyte, nbytes: ctypes.c_size_t) -> None:
        self.memory[target.value][: nbytes.value] = value.value

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free._obj.value, total._obj.value = 3 << 30, 4 << 30

    def _cuStreamSynchronize(self, stream: ctypes.c_void_p) -> None:
        pass

    def _cuCtxSynchronize(self) -> None:
        pass


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    use(monkeypatch, fake)
    monkeypatch.setattr("driver.compile_kernels", lambda sm, driver_cuda: CUBIN)
    return fake


def test_what_compute_sanitizer_watches_runs_every_kernel(driver: FakeDriver) -> None:
    machine = DriverMachine()
    assert machine.multiprocessors == 132
    assert machine.free_bytes() == 3 << 30
    assert machine.l2_bytes() == 60 << 20
    assert sanitize.run_all(machine) == set(shipped_module().kernels)
    assert driver.memory
    machine.close()
    assert not driver.memory
    assert not driver.loaded


def test_the_driver_s_words_are_told(driver: FakeDriver) -> None:
    driver.fails["cuMemAlloc_v2"] = 100
    with pytest.raises(BackendError, match=r"cuMemAlloc_v2 failed \(no CUDA-capable device"):
        DriverMachine().place(np.zeros(3))


def test_a_buffer_takes_its_own_size_only(driver: FakeDriver) -> None:
    machine = DriverMachine()
    buffer = machine.place(np.arange(6, dtype=np.float32))
    machine.write(buffer, np.ones((2, 3), np.float32))
    assert machine.fetch(buffer).tolist() == [1] * 6
    with pytest.raises(ValueError, match="20 bytes don't belong into a buffer of 24"):
        machine.write(buffer, np.ones(5, np.float32))


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, NO_DRIVER)
    with pytest.raises(BackendError, match="no CUDA driver, or no GPU"):
        DriverMachine()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DependencyMissing, match="sees no GPU"):
        TorchMachine()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32, np.uint32, np.uint8])
def test_torch_keeps_arrays_of_every_type(dtype: type) -> None:
    machine = object.__new__(TorchMachine)  # its memory only, on the CPU
    machine._torch, machine.torch_device = torch, "cpu"
    array = np.frombuffer(np.arange(60, dtype=dtype).tobytes(), dtype).reshape(3, 4, 5)  # read-only
    buffer = machine.place(array)
    assert buffer.address == buffer.memory.data_ptr()
    np.testing.assert_array_equal(machine.fetch(buffer), array, strict=True)
    machine.write(buffer, array[::-1])
    np.testing.assert_array_equal(machine.fetch(buffer), array[::-1], strict=True)
    machine.clear(buffer)
    assert not machine.fetch(buffer).any()


class FakeEvent:
    """Counts calls instead of time."""

    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


def test_what_runs_between_samples_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = object.__new__(TorchMachine)
    machine._torch, machine.torch_device = torch, "cpu"
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    monkeypatch.setattr(machine, "synchronise", lambda: None)
    monkeypatch.setattr(machine, "l2_bytes", lambda: 100)
    done: list[str] = []

    def takes(milliseconds: int, name: str) -> None:
        FakeEvent.clock += milliseconds
        done.append(name)

    samples = machine.sample_us(lambda: takes(2, "work"), 3, lambda: takes(70, "flush"))
    assert samples == [2000] * 3
    assert done == ["flush", "work"] * 3
    assert machine.sample_us(lambda: takes(5, "work"), 2) == [5000] * 2
    assert machine.flush_work()().tolist() == [0] * 400, "four times the cache is written"


def test_a_wrong_result_is_seen() -> None:
    machine = HostMachine()
    work, difference = checks.run_patch(machine, (1, 2, 20, 16), 3)
    tokens, rows = checks.random_tokens((1, 2, 20, 16)), checks.random_bank(3, 16)
    assert difference <= checks.PROBABILITY
    work.probs.memory[5] += 0.01
    assert checks.patch_difference(work, tokens, rows, 0.07) > checks.PROBABILITY
    work.probs.memory[5] = np.nan
    assert not checks.patch_difference(work, tokens, rows, 0.07) <= checks.PROBABILITY


@pytest.mark.parametrize(
    ("field", "place", "value"),
    [
        ("anomaly", (0, 3, 4), 0.5),
        ("anomaly", (1, 0, 0), np.nan),
        ("grey", (1, 9, 9), 7),
        ("types", (0, 5, 5), 250),
        ("peaks", (1, 2), 0.0),
        ("peaks", (0, -1), 2.0),
        ("histogram", (0, 0), 400),
    ],
)
def test_a_wrong_map_is_seen(field: str, place: tuple[int, ...], value: float) -> None:
    tables = upsample(6, 20, align_corners=True, sigma=0.0), upsample(6, 22, align_corners=True, sigma=0.0)
    probs = checks.random_probs((2, 4, 6, 6))
    probs[0, :, :, :] = 0.01
    probs[0, 2] = 0.97  # one type leads everywhere
    work, difference = checks.run_map(HostMachine(), probs, tables)
    assert difference.holds()
    maps = work.result()
    getattr(maps, field)[place] = value
    assert not checks.map_difference(maps, probs, tables).holds()


def test_a_wrong_image_is_seen() -> None:
    views = [checks.random_view("NV12", (41, 37)), checks.random_view("BGR8", (64, 48), crop=(3, 1, 50, 40))]
    images, difference = checks.run_preprocess(HostMachine(), views, 24, np.float16)
    assert difference <= checks.GREY_MAX
    assert checks.pillow_difference(images[1], views[1])[1] <= checks.GREY_MEAN
    images[1, 2, 3, 4] += 0.1
    assert checks.preprocess_difference(images, views) > checks.GREY_MAX


def test_bytes_that_have_to_move() -> None:
    machine = HostMachine()
    tables = upsample(3, 10, align_corners=True, sigma=0.0), upsample(3, 9, align_corners=True, sigma=0.0)
    tokens, rows = checks.random_tokens((2, 4, 9, 16)), checks.random_bank(5, 16)
    view = checks.random_view("BGR8", (30, 20), crop=(0, 0, 10, 20))
    frame = FrameWork(machine, [view, view], 12, tokens, rows, 0.07, tables, with_extras=False)
    assert frame.preprocess.moved_bytes == 2 * (10 * 20 * 3 + 3 * 12 * 12 * 2)
    assert frame.patch.moved_bytes == 2 * 4 * 9 * 16 * 2 + 2 * 6 * 9 * 4
    assert frame.maps.moved_bytes(6) == 2 * 6 * 9 * 4 + 2 * 10 * 12 * (2 + 1)  # rows of 9 px are 12 long
    assert frame.moved_bytes == frame.preprocess.moved_bytes + frame.patch.moved_bytes + frame.maps.moved_bytes(6)
    nv12 = PreprocessWork(machine, [checks.random_view("NV12", (30, 20))], 12, np.float32)
    assert nv12.moved_bytes == 30 * 20 * 3 // 2 + 3 * 12 * 12 * 4


def test_other_words_in_the_same_place() -> None:
    tokens = checks.random_tokens((1, 2, 20, 16))
    work = PatchWork(HostMachine(), tokens, checks.random_bank(3, 16), 0.07)
    for types in (64, 1):
        rows = checks.random_bank(types, 16, seed=types)
        work.set_bank(rows)
        work.start()
        assert checks.patch_difference(work, tokens, rows, 0.07) <= checks.PROBABILITY
