"""What the real pycuda is asked to do on the emulated driver. Run by test_real_pycuda.py, one process per scenario."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_runs import on_device, run_on, runs

from dapo_edge.backends.cuda import Cuda
from dapo_edge.errors import BackendError
from dapo_edge.kernels.launch import Launch, PatchJob, PreprocessJob

CUBIN = b"\x7fELF of a GPU that isn't there"
emulator = ctypes.CDLL("libcuda.so.1")


@contextlib.contextmanager
def opened() -> Iterator[Cuda]:
    """The GPU, in use by this thread; afterwards nothing may be left of it."""
    with Cuda.open() as cuda, cuda.active():
        yield cuda
    assert_gone()


def assert_gone() -> None:
    gc.collect()
    assert emulator.emu_objects() == 0
    assert emulator.emu_stack_depth() == 0
    assert emulator.cuDevicePrimaryCtxRelease_v2(0) == 201  # it isn't retained any more


def in_a_thread(work: Callable[[], Any]) -> Any:
    """Result of `work`, run by a thread that ends before this returns; its error is raised here."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def describes_the_gpu() -> None:
    with opened() as cuda:
        assert (cuda.gpu.name, cuda.sm, cuda.gpu.multiprocessors) == ("Emulated GPU", "sm_90", 16)
        assert cuda.stream_handle > 2**32
        assert cuda.driver_cuda >= (11, 0)


def copies_and_clears() -> None:
    content = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    with opened() as cuda:
        buffer = cuda.constant(content, "a test")
        pinned, other = cuda.pinned(4096), cuda.pinned(4096)
        assert not pinned.array.any()
        assert pinned.device_address == pinned.array.ctypes.data
        cuda.download(pinned.array, buffer.address)
        assert not pinned.array.any(), "a copy runs in stream order"
        cuda.synchronise()
        np.testing.assert_array_equal(pinned.array, content)
        other.array[:] = content[::-1]
        cuda.upload(buffer.address, other.array)
        cuda.download(pinned.array[1024:2048], buffer.address + 1024)
        cuda.clear(buffer)
        cuda.download(other.array, buffer.address)
        cuda.synchronise()
        np.testing.assert_array_equal(pinned.array[1024:2048], content[::-1][1024:2048])
        assert not other.array.any()
        cuda.free(buffer)
        cuda.unpin(pinned)


def runs_kernels() -> None:
    with opened() as cuda:
        kernels = cuda.load_kernels(CUBIN)
        for run, expected, tolerance in runs():
            result = run_on(cuda, kernels, run).astype(np.float32)
            assert np.abs(result - expected).max() < tolerance


def replays_graphs() -> None:
    (run, expected, tolerance), *_ = runs()
    with opened() as cuda:
        kernels = cuda.load_kernels(CUBIN)
        events = [cuda.event(), cuda.event()]
        output, job = on_device(cuda, run)
        pinned = cuda.pinned(run.buffers[0].nbytes)

        def work(*, in_graph: bool) -> None:
            events[0].record(in_graph=in_graph)
            cuda.clear(output)
            kernels.start(run.launch, job)
            cuda.download(pinned.array, output.address)
            events[1].record(in_graph=in_graph)

        with pytest.raises(BackendError, match="invalid resource handle"):
            events[1].ms_since(events[0])
        work(in_graph=False)
        with pytest.raises(BackendError, match="device not ready"):
            events[1].ms_since(events[0])
        cuda.synchronise()
        assert events[1].ms_since(events[0]) > 0
        graph = cuda.capture(lambda: work(in_graph=True))
        for _ in range(3):
            pinned.array[:] = 0
            graph.launch()
            assert not pinned.array.any()
            cuda.synchronise()
            result = pinned.array.view(np.float32).reshape(expected.shape)
            assert np.abs(result - expected).max() < tolerance
            assert events[1].ms_since(events[0]) > 0
        graph.close()
        graph.close()
        cuda.drop_event(events[0])


def refuses_what_a_capture_forbids() -> None:
    with opened() as cuda:
        for forbidden in (lambda: cuda.allocate(16, "a test"), cuda.synchronise, lambda: cuda.pinned(16)):
            with pytest.raises(Exception, match="operation not permitted when stream is capturing"):
                cuda.capture(forbidden)
        event = cuda.event()
        event.record(in_graph=False)
        cuda.synchronise()
        with pytest.raises(BackendError, match="begin a graph"):
            cuda.capture(lambda: cuda.capture(lambda: None))
        cuda.capture(lambda: cuda.clear(cuda._allocations[0]) if cuda._allocations else None).close()


def works_in_other_threads() -> None:
    content = np.arange(256, dtype=np.uint8)
    cuda = in_a_thread(Cuda.open)

    def fill() -> Any:
        with cuda.active():
            kernels = cuda.load_kernels(CUBIN)
            run, expected, tolerance = runs()[0]
            assert np.abs(run_on(cuda, kernels, run) - expected).max() < tolerance
            return cuda.constant(content, "a test"), cuda.pinned(256), cuda.event()

    buffer, pinned, event = in_a_thread(fill)
    with cuda.active(), cuda.active():  # twice on one thread is allowed
        cuda.download(pinned.array, buffer.address)
        event.record(in_graph=False)
        cuda.synchronise()
    np.testing.assert_array_equal(pinned.array, content)

    def give_back() -> None:
        with cuda.active():
            cuda.free(buffer)

    in_a_thread(give_back)
    in_a_thread(cuda.close)
    assert_gone()


def closes_twice() -> None:
    cuda = Cuda.open()
    with cuda.active():
        buffer = cuda.constant(np.arange(9), "a test")
        cuda.pinned(100)
        cuda.event()
        graph = cuda.capture(lambda: cuda.clear(buffer))
        kernels = cuda.load_kernels(CUBIN)
        run_on(cuda, kernels, runs()[0][0])
    cuda.close()
    assert_gone()  # with stream and kernels, which are still referred to
    cuda.close()
    with pytest.raises(BackendError, match="closed"), cuda.active():
        pass
    with opened() as again:
        again.constant(np.arange(9), "a test")
        again.close()
    assert None not in (kernels, graph)


def is_closed_in_use() -> None:
    """By another thread, which must not; pycuda ends the process when a thread ends with a context on its stack."""
    cuda = Cuda.open()

    def hold() -> None:
        with cuda.active():
            in_a_thread(cuda.close)

    in_a_thread(hold)
    assert_gone()


def shares_the_context() -> None:
    """Two at once, opened and closed in turn, as the compiler and the backend may be."""
    first, second = Cuda.open(), Cuda.open()
    with first.active():
        buffer = first.constant(np.arange(16, dtype=np.uint8), "a test")
        with second.active():
            pinned = second.pinned(16)
            second.download(pinned.array, buffer.address)
            second.synchronise()
            assert pinned.array[15] == 15
        second.close()
        first.clear(buffer)
        first.synchronise()
    first.close()
    assert_gone()


def leaves_what_was_current() -> None:
    """Another library of the process, say torch, has the primary context current on this thread."""
    context, current = ctypes.c_void_p(), ctypes.c_void_p()
    assert emulator.cuInit(0) == 0
    assert emulator.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert emulator.cuCtxPushCurrent_v2(context) == 0
    with Cuda.open() as cuda, cuda.active():
        cuda.constant(np.arange(16), "a test")
        cuda.load_kernels(CUBIN)
    assert emulator.emu_objects() == 0, "all has to be given back even if the context lives on"
    assert emulator.emu_stack_depth() == 1
    assert emulator.cuCtxPopCurrent_v2(ctypes.byref(current)) == 0
    assert current.value == context.value
    assert emulator.cuDevicePrimaryCtxRelease_v2(0) == 0
    assert_gone()


def is_forgotten() -> None:
    """Nobody closes it: neither messages of pycuda nor leftovers."""
    cuda = Cuda.open()
    with cuda.active():
        cuda.constant(np.arange(9), "a test")
        cuda.pinned(100)
        cuda.load_kernels(CUBIN)
    globals()["kept_to_the_end"] = cuda
    other = Cuda.open()
    with other.active():
        other.event()
    del other
    gc.collect()


def reports_errors() -> None:
    with opened() as cuda:
        emulator.emu_memory_left(ctypes.c_size_t(5 << 20))
        with pytest.raises(BackendError, match=r"no 6\.0 MB left for a test \(5\.0 of 1024 MB"):
            cuda.allocate(6 << 20, "a test")
        with pytest.raises(BackendError, match=r"no 6\.0 MB of page-locked memory"):
            cuda.pinned(6 << 20)
        with pytest.raises(BackendError, match="device kernel image is invalid") as info:
            cuda.load_kernels(b"no cubin")
        assert str(info.value.cause).endswith("invalid)")
        kernels = cuda.load_kernels(CUBIN)
        with pytest.raises(BackendError, match="named symbol not found"), cuda.active():
            kernels.start(Launch("nobody", (1, 1, 1), (1, 1, 1), 0), PatchJob())
        with pytest.raises(BackendError, match="cuFuncSetBlockShape failed: invalid argument"), cuda.active():
            kernels.start(Launch("preprocess", (1, 1, 1), (1025, 1, 1), 0), PreprocessJob())
        with pytest.raises(BackendError, match="cuLaunchKernel failed: invalid argument"), cuda.active():
            kernels.start(Launch("preprocess", (1, 1, 1), (32, 1, 1), 49153), PreprocessJob())


def loses_the_context(breaks_stack: bool = False) -> None:
    emulator.emu_fail_kernel(b"patch_probabilities", 719)
    emulator.emu_break_stack(breaks_stack)
    cuda = Cuda.open()
    with cuda.active():
        kernels, event = cuda.load_kernels(CUBIN), cuda.event()
        output, job = on_device(cuda, runs()[0][0])
        graph = cuda.capture(lambda: cuda.clear(output))

    def work() -> None:
        with cuda.active():
            graph.launch()
            kernels.start(runs()[0][0].launch, job)
            event.record(in_graph=False)
            cuda.synchronise()

    for attempt in (lambda: in_a_thread(work), work, lambda: in_a_thread(work)):
        with pytest.raises(BackendError, match="unspecified launch failure") as info:
            attempt()
        assert "start the process again" in info.value.remedy
    in_a_thread(cuda.close)
    cuda.close()
    with pytest.raises(BackendError):
        work()


def loses_the_context_with_its_stack() -> None:
    """The driver may answer every call with the error of earlier work, also those about the current context."""
    loses_the_context(breaks_stack=True)


def cannot_be_opened() -> None:
    emulator.emu_lose(700)
    with pytest.raises(BackendError, match="cuStreamCreate failed: an illegal memory access"):
        Cuda.open()
    assert_gone()


def cannot_be_entered() -> None:
    """The context was lost by somebody else's work, and the driver doesn't even make it current any more."""
    emulator.emu_break_stack(1)
    cuda = Cuda.open()
    emulator.emu_lose(700)
    with pytest.raises(BackendError, match="illegal memory access"), cuda.active():
        pass
    cuda.close()


def inspects_frames(package: Path) -> None:
    """The whole backend; TensorRT is played by OpenVINO, whose work the driver runs as a function of the host."""
    import fake_tensorrt

    from dapo_edge.backends import onnx_flavours, trt_api
    from dapo_edge.backends.openvino import OpenVinoBackend
    from dapo_edge.backends.tensorrt import TensorRtBackend
    from dapo_edge.data.surfaces import make_surface
    from dapo_edge.package import EnginePackage

    kept: list[Any] = []

    def on_enqueue(stream: int, work: Callable[[], None]) -> None:
        kept.append(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: work()))
        assert emulator.cuLaunchHostFunc(ctypes.c_void_p(stream), kept[-1], None) == 0

    with pytest.MonkeyPatch.context() as patch:
        fake_tensorrt.install(fake_tensorrt.make(10), patch)
        patch.setattr(fake_tensorrt, "on_enqueue", on_enqueue)
        opened_package = EnginePackage.open(package)
        model = onnx_flavours.fp32_flavour(opened_package.encoder_bytes()).model
        plan = trt_api.build_plan(trt_api.load(), model, trt_api.BuildOptions("fp32")).plan
        views = [make_surface(3, size, good_share=0).image for size in ((160, 120), (90, 100), (160, 120))]
        for integrated in (0, 1):
            emulator.emu_integrated(integrated)
            cuda = Cuda.open()
            arguments = {"map_size": (70, 50), "precision": "fp32"}
            with TensorRtBackend(opened_package, cuda, CUBIN, plan, **arguments) as backend:
                host = OpenVinoBackend.open(opened_package, map_size=(70, 50))
                for view in (*views, *views):
                    expected, found = host.infer([view]), in_a_thread(lambda view=view: backend.infer([view]))
                    assert np.abs(found.anomaly - expected.anomaly).max() < 0.01
                    assert np.abs(found.patch_probs - expected.patch_probs).max() < 0.01
                    assert (found.types == expected.types).mean() > 0.98
                    assert all(value > 0 for stage, value in found.stage_ms.items() if stage != "upload")
            assert_gone()


if __name__ == "__main__":
    scenario = globals()[sys.argv[1]]
    scenario(Path(sys.argv[2])) if sys.argv[2] else scenario()
    print("done")
