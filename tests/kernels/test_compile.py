"""Compiling the kernels for every GPU that a compiler here knows, what they take, and which compiler is chosen."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import pytest
from host_kernels import kernel_names, shipped_sources

from dapo_edge.errors import BackendError, DependencyMissing
from dapo_edge.kernels import compile as compiling
from dapo_edge.kernels.compile import Compiler, Usage, compile_kernels, find_compiler, find_compilers, parse_usage

MAX_REGISTERS, BLACKWELL_REGISTERS = 64, 80  # four blocks of 256 threads on one multiprocessor, or three
TARGETS = [f"sm_{number}" for number in (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)]
KINDS = ["nvcc", "nvrtc"]

SMALL = """
#include "common.cuh"
extern "C" __global__ void plain(float* values, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) values[i] *= FACTOR;
}
"""
GREEDY = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* values, int count) {
    float kept[200];
#pragma unroll
    for (int i = 0; i < 200; i++) kept[i] = values[i * count + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 200; i++) values[i * count + threadIdx.x] = kept[i] * kept[199 - i];
}
extern "C" __global__ void sharing(float* values) {
    __shared__ float copy[100];
    copy[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    values[threadIdx.x] = copy[99 - threadIdx.x];
}
"""


@pytest.fixture(scope="session")
def compilers() -> tuple[Compiler, ...]:
    return find_compilers()


def of_kind(compilers: tuple[Compiler, ...], kind: str, sm: str = "sm_87") -> Compiler:
    for compiler in compilers:
        if compiler.kind == kind and sm in compiler.targets:
            return compiler
    raise pytest.skip.Exception(f"there is no {kind} here that knows {sm}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A source folder with two kernel files and a header."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "common.cuh").write_text("#pragma once\nconstexpr float FACTOR = 2.0f;\n")
    (folder / "small.cu").write_text(SMALL)
    (folder / "greedy.cu").write_text(GREEDY)
    return folder


def check_shipped(compiler: Compiler, sm: str) -> None:
    cubin = compile_kernels(sm, compiler, use_cache=False)
    assert cubin.data[:4] == b"\x7fELF"
    assert set(cubin.usage) == set(kernel_names(shipped_sources()))
    for name, usage in cubin.usage.items():
        assert (usage.spill_bytes, usage.stack_bytes) == (0, 0), f"{name} spills: {usage}"
        limit = MAX_REGISTERS if int(cubin.sm.removeprefix("sm_")) < 100 else BLACKWELL_REGISTERS
        assert usage.registers <= limit, f"{name}: {usage}"
    assert cubin.warnings == ()


@pytest.mark.parametrize("sm", TARGETS)
def test_the_shipped_kernels_compile_for_every_gpu_without_spills(compilers: tuple[Compiler, ...], sm: str) -> None:
    check_shipped(of_kind(compilers, "nvcc", sm), sm)


def test_the_shipped_kernels_compile_for_orin_as_on_jetpack_6(compilers: tuple[Compiler, ...]) -> None:
    found = [compiler for compiler in compilers if compiler.kind == "nvrtc" and compiler.version == (12, 6)]
    if not found:
        pytest.skip("there is no NVRTC 12.6 here: pip install 'nvidia-cuda-nvrtc-cu12==12.6.*'")
    check_shipped(found[0], "sm_87")


def registers_in_elf(cubin: bytes) -> dict[str, int]:
    """What the GPU's loader reads: the upper byte of a kernel section's info field."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", cubin, start + size * index) for index in range(count)]
    found = {}
    for header in headers:
        at = headers[names][4] + header[0]
        name = cubin[at : cubin.index(b"\0", at)].decode()
        if name.startswith(".text."):
            found[name[6:]] = header[7] >> 24
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_usage_is_what_the_cubin_says(compilers: tuple[Compiler, ...], folder: Path, kind: str) -> None:
    compiler = of_kind(compilers, kind)
    cubin = compile_kernels("sm_87", compiler, use_cache=False, folder=folder)
    assert (cubin.sm, cubin.toolkit) == ("sm_87", compiler.name)
    assert {name: usage.registers for name, usage in cubin.usage.items()} == registers_in_elf(cubin.data)
    assert set(cubin.usage) == {"plain", "spilling", "sharing"}
    assert cubin.usage["spilling"].spill_bytes > 500, "200 floats don't fit into 64 registers"
    assert cubin.usage["spilling"].stack_bytes > 500
    assert cubin.usage["sharing"] == dataclasses.replace(
        cubin.usage["sharing"], spill_bytes=0, stack_bytes=0, shared_bytes=400
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_in_a_source_is_quoted(compilers: tuple[Compiler, ...], folder: Path, kind: str) -> None:
    (folder / "small.cu").write_text(SMALL.replace("FACTOR", "FACTR"))
    with pytest.raises(BackendError, match=rf"{kind}.* for sm_87 \(small\.cu\(5\): error: .*FACTR") as caught:
        compile_kernels("sm_87", of_kind(compilers, kind), folder=folder)
    assert "all_kernels" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_compiled_is_kept(
    compilers: tuple[Compiler, ...],
    folder: Path,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DAPO_EDGE_CACHE", str(tmp_path / "cache"))
    compiler = of_kind(compilers, kind)
    first = compile_kernels("sm_87", compiler, folder=folder)
    gone = dataclasses.replace(compiler, path=str(tmp_path / "gone"))
    assert compile_kernels("sm_87", gone, folder=folder) == first
    with pytest.raises(OSError, match="gone"):
        compile_kernels("sm_87", gone, folder=folder, use_cache=False)
    with pytest.raises(OSError, match="gone"):
        compile_kernels("sm_86", gone, folder=folder)
    with pytest.raises(OSError, match="gone"):
        compile_kernels("sm_87", dataclasses.replace(gone, version=(99, 0)), folder=folder)
    (blob,) = (tmp_path / "cache").rglob("*.blob")
    blob.write_bytes(blob.read_bytes()[:-1])
    assert compile_kernels("sm_87", compiler, folder=folder).usage == first.usage
    assert "the compiled kernel" in caplog.text
    header = folder / "common.cuh"
    header.write_text(header.read_text().replace("2.0f", "3.0f"))
    assert compile_kernels("sm_87", compiler, folder=folder).source_sha256 != first.source_sha256


def test_what_was_compiled_needs_no_compiler_any_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DAPO_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "find_compilers", lambda: (NVCC_124,))
    monkeypatch.setattr(compiling, "_build_nvcc", lambda *_: (b"cubin", "small.cu(5): warning #177: not used"))
    first = compile_kernels("sm_87", driver_cuda=(12, 6), folder=folder)
    assert (first.toolkit, first.warnings) == ("nvcc 12.4", ("small.cu(5): warning #177: not used",))
    assert caplog.messages == ["nvcc 12.4, for sm_87: small.cu(5): warning #177: not used"]
    monkeypatch.setattr(compiling, "find_compilers", lambda: ())
    for driver in ((12, 6), (12, 2), (12, 9)):  # one major version
        assert compile_kernels("sm_87", driver_cuda=driver, folder=folder) == first
    assert len(caplog.messages) == 1, "said once, when it was compiled"
    for sm, driver in (("sm_87", (13, 0)), ("sm_86", (12, 6)), ("sm_87", None)):
        with pytest.raises(DependencyMissing):
            compile_kernels(sm, driver_cuda=driver, folder=folder)
    with pytest.raises(DependencyMissing):
        compile_kernels("sm_87", driver_cuda=(12, 6), folder=folder, use_cache=False)
    (folder / "small.cu").write_text(SMALL.replace("*=", "+="))
    with pytest.raises(DependencyMissing):
        compile_kernels("sm_87", driver_cuda=(12, 6), folder=folder)


def test_a_folder_without_sources(compilers: tuple[Compiler, ...], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no CUDA sources in .*Install dapo-edge again"):
        compile_kernels("sm_87", Compiler("nvcc", (12, 6), "nvcc", ("sm_87",)), folder=tmp_path)


def test_usage_of_a_kernel_counts_the_functions_that_it_calls() -> None:
    text = """ptxas info    : 0 bytes gmem
        ptxas info    : Compiling entry function 'one' for 'sm_87'
        ptxas info    : Function properties for one
            16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
        ptxas info    : Function properties for _Z6helperf
            32 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
        ptxas info    : Used 38 registers, 400 bytes smem, 48 bytes cumulative stack size, 364 bytes cmem[0]
        ptxas info    : Compiling entry function 'two' for 'sm_87'
        ptxas info    : Function properties for two
        ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
        ptxas info    : Used 8 registers, used 1 barriers, 364 bytes cmem[0]"""
    assert parse_usage(text) == {"one": Usage(38, 20, 48, 400), "two": Usage(8, 0, 0, 0)}
    assert parse_usage("") == {}


NVCC_13 = Compiler("nvcc", (13, 0), "/a/nvcc", ("sm_87", "sm_110"))
NVRTC_13 = Compiler("nvrtc", (13, 0), "/a/13", ("sm_87", "sm_110"))
NVRTC_126 = Compiler("nvrtc", (12, 6), "/a/12", ("sm_72", "sm_87"))
NVCC_124 = Compiler("nvcc", (12, 4), "/b/nvcc", ("sm_72", "sm_87"))


@pytest.mark.parametrize(
    ("found", "sm", "driver", "chosen"),
    [
        ((NVCC_124, NVRTC_13), None, None, NVCC_124),
        ((NVCC_13, NVRTC_13, NVRTC_126), "sm_87", (13, 0), NVCC_13),
        ((NVCC_13, NVRTC_126), "sm_87", (12, 6), NVRTC_126),
        ((NVCC_13, NVRTC_126), "sm_87", (12, 9), NVRTC_126),
        ((NVCC_124, NVRTC_126), "sm_87", (12, 8), NVRTC_126),
        ((NVCC_13, NVRTC_126), "sm_72", (13, 0), NVRTC_126),
        ((NVCC_124, NVRTC_13), "sm_110", (13, 2), NVRTC_13),
        ((NVCC_13, NVRTC_126), "sm_87", (12, 4), NVRTC_126),
        ((NVRTC_126, NVCC_124), "sm_87", (12, 2), NVCC_124),
        ((NVRTC_126, NVCC_124), "sm_87", (12, 4), NVCC_124),
    ],
)
def test_the_compiler_fits_gpu_and_driver(
    monkeypatch: pytest.MonkeyPatch, found: Any, sm: Any, driver: Any, chosen: Compiler
) -> None:
    monkeypatch.setattr(compiling, "find_compilers", lambda: found)
    assert find_compiler(sm, driver) is chosen


@pytest.mark.parametrize(
    ("found", "sm", "driver", "error", "message"),
    [
        ((), None, None, DependencyMissing, r"neither nvcc nor NVRTC.*CUDA_HOME, or pip install NVRTC"),
        ((), "sm_87", (12, 6), DependencyMissing, r"pip install 'nvidia-cuda-nvrtc-cu12==12\.6\.\*'"),
        ((NVCC_13,), "sm_87", (12, 6), BackendError, r"CUDA 12\.6, .*newer major .*: nvcc 13\.0 .*-cu12==12\.6"),
        ((NVCC_124,), "sm_110", (13, 0), BackendError, r"knows sm_110: nvcc 12\.4.*'nvidia-cuda-nvrtc==13\.0\.\*'"),
        ((NVCC_124,), "../x", None, BackendError, r"knows \.\./x"),
    ],
)
def test_no_fitting_compiler_is_said(
    monkeypatch: pytest.MonkeyPatch, found: Any, sm: Any, driver: Any, error: Any, message: str
) -> None:
    monkeypatch.setattr(compiling, "find_compilers", lambda: found)
    with pytest.raises(error, match=message):
        compile_kernels(sm or "sm_87", driver_cuda=driver, use_cache=False)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: a toolkit at cuda/, an empty PATH, no wheels."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(compiling, "TOOLKIT", str(tmp_path / "usual"))
    monkeypatch.setattr(compiling, "find_spec", lambda _: None)
    monkeypatch.setattr(compiling, "_LOADED_BY_NAME", ())
    return tmp_path


def fake_nvcc(version: str) -> str:
    return (
        f'case $1 in --version) echo "Cuda compilation tools, release {version}, V{version}.85";; '
        "--list-gpu-code) printf 'sm_72\\nsm_87\\n';; *) echo 'sh: gcc: not found' >&2; exit 1;; esac"
    )


def test_compilers_are_found_in_their_order(bare: Path) -> None:
    assert find_compilers() == ()
    usual = script(bare / "usual" / "bin" / "nvcc", fake_nvcc("12.9"))
    home = script(bare / "cuda" / "bin" / "nvcc", fake_nvcc("12.6"))
    (bare / "bin").mkdir()
    (bare / "bin" / "nvcc").symlink_to(usual)
    found = find_compilers()
    assert [(compiler.version, compiler.targets) for compiler in found] == [
        ((12, 6), ("sm_72", "sm_87")),
        ((12, 9), ("sm_72", "sm_87")),
    ]
    assert found[0].path == str(home)
    assert found[1].path == str(bare / "bin" / "nvcc"), "the same file is named once"


def test_a_broken_compiler_is_said_and_passed_over(bare: Path, caplog: pytest.LogCaptureFixture) -> None:
    script(bare / "cuda" / "bin" / "nvcc", "exit 3")
    script(bare / "usual" / "bin" / "nvcc", "echo hello")
    library = script(bare / "cuda" / "lib64" / "libnvrtc.so.12", "not a library")
    assert find_compilers() == ()
    for expected in (f"'{bare}/cuda/bin/nvcc' can't be used", "doesn't say its version", f"'{library}' can't be used"):
        assert expected in caplog.text


def test_nvcc_without_a_host_compiler(bare: Path, folder: Path) -> None:
    script(bare / "cuda" / "bin" / "nvcc", fake_nvcc("12.6"))
    with pytest.raises(BackendError, match=r"sh: gcc: not found.*nvcc needs a C\+\+ compiler beside it"):
        compile_kernels("sm_87", folder=folder)
