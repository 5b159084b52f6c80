"""CUDA kernels on the CPU: g++ and cuda_host.h compile unchanged `.cu` files, NumPy arrays are their memory."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import secrets
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import dapo_edge

HERE = Path(__file__).parent
SHIPPED = Path(dapo_edge.__file__).parent / "kernels"
CACHE = HERE.parent.parent / ".cache" / "host_kernels"
Shape = tuple[int, int, int]
Source = Path | str

# -ffp-contract: the same bits on every CPU. Debian's and Ubuntu's _FORTIFY_SOURCE forbids longjmp between fibers.
FLAGS = ("-std=c++17", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
SANITIZERS = {
    None: ("-O2",),
    "thread": ("-O1", "-fsanitize=thread", "-DDAPO_EDGE_THREADS"),
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DDAPO_EDGE_THREADS"),
}
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\('
)


@dataclass(frozen=True)
class Report:
    """What a kernel did in a process of its own."""

    returncode: int
    text: str  # of the sanitizer and of the emulator
    outputs: tuple[np.ndarray, ...] | None  # the buffers afterwards; None if the kernel didn't come to its end


def shipped_sources() -> tuple[Path, ...]:
    """The kernel files of the package."""
    return tuple(sorted(SHIPPED.glob("*.cu")))


def kernel_names(sources: Sequence[Source]) -> tuple[str, ...]:
    """All `extern "C" __global__` functions, in the order of the files."""
    names: list[str] = []
    for source in sources:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        names += _KERNEL.findall(re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL))
    return tuple(names)


class HostModule:
    """Kernels as a library in this process. A source is a file, or the text of one. Skips the test without g++."""

    def __init__(self, *sources: Source, defines: Sequence[str] = ()) -> None:
        self.kernels = kernel_names(sources)
        self._library = ctypes.CDLL(str(_compile(sources, defines, ("-O2", "-fPIC", "-shared"))))

    def parameter_sizes(self, name: str) -> tuple[int, ...]:
        """Bytes of each parameter of a kernel."""
        sizes = (ctypes.c_size_t * 64)()
        count = self._entry("emu_sizes", name)(sizes)
        return tuple(sizes[:count])

    def launch(
        self, name: str, grid: Shape, block: Shape, shared_bytes: int, args: Sequence[Any], order: int = 0
    ) -> None:
        """Run a kernel. An array is passed as its address; ctypes values and NumPy scalars (records, too) by value."""
        values = [_argument_bytes(argument) for argument in args]
        sizes = self.parameter_sizes(name)
        assert tuple(map(len, values)) == sizes, f"{name} takes parameters of {sizes} bytes"
        kept = [ctypes.create_string_buffer(value, len(value)) for value in values]
        addresses = (ctypes.c_void_p * (len(kept) or 1))(*map(ctypes.addressof, kept))
        self.launch_raw(name, grid, block, shared_bytes, ctypes.addressof(addresses), order)

    def launch_raw(
        self, name: str, grid: Shape, block: Shape, shared_bytes: int, parameters: int | None, order: int = 0
    ) -> None:
        """Run a kernel with the argument block of cuLaunchKernel: the address of a void*[] of addresses of values."""
        entry = self._entry("emu_launch", name)
        shapes = [(ctypes.c_uint * 3)(*shape) for shape in (grid, block)]
        entry(*shapes, ctypes.c_size_t(shared_bytes), ctypes.c_int(order), ctypes.c_void_p(parameters))

    def _entry(self, prefix: str, name: str) -> Any:
        assert name in self.kernels, f"no kernel '{name}', only {self.kernels}"
        return self._library[f"{prefix}_{name}"]


@functools.lru_cache(maxsize=1)
def shipped_module() -> HostModule:
    """All kernels of the package, in one library."""
    return HostModule(*shipped_sources())


def run_program(
    sources: Sequence[Source],
    name: str,
    grid: Shape,
    block: Shape,
    shared_bytes: int,
    args: Sequence[Any],
    *,
    sanitizer: Literal["thread", "address"] | None = "thread",
    buffers: Sequence[np.ndarray] = (),
    defines: Sequence[str] = (),
    order: int = 0,
) -> Report:
    """Run a kernel in a process of its own, each CUDA thread a real one under a sanitizer (None: fibers, no sanitizer).

    Every address in an argument that lies in an array of `args` or `buffers` is replaced by that process's own; the
    report's `outputs` are these arrays in this order. The arrays here stay as they are.
    """
    program = _compile(sources, defines, (*SANITIZERS[sanitizer], "-DEMU_PROGRAM", "-pthread"))
    arrays = [*(argument for argument in args if isinstance(argument, np.ndarray)), *buffers]
    numbers = [*grid, *block, shared_bytes, order, len(arrays)]
    parts = [struct.pack(f"={len(numbers)}Q", *numbers)]
    for array in arrays:
        parts += [struct.pack("=Q", array.nbytes), array.tobytes()]
    parts.append(struct.pack("=Q", len(args)))
    parts += [_movable(_argument_bytes(argument), arrays) for argument in args]
    stem = CACHE / f"run-{secrets.token_hex(8)}"
    paths = [stem.with_suffix(suffix) for suffix in (".in", ".out")]
    try:
        paths[0].write_bytes(b"".join(parts))
        result = _run_sanitized([str(program), name, *map(str, paths)])
        content = paths[1].read_bytes() if paths[1].is_file() else None
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    outputs = None if content is None else _split(content, arrays)
    return Report(result.returncode, result.stdout + result.stderr, outputs)


def _run_sanitized(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "detect_leaks=0:redzone=1024"}
    for prefix in ([], ["setarch", "-R"]):
        result = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False, env=environment)
        if "unexpected memory mapping" not in result.stderr:  # this system's addresses are too random for the sanitizer
            return result
    pytest.skip("the sanitizer can't run here: unexpected memory mapping, even with setarch -R")


def _argument_bytes(argument: Any) -> bytes:
    """What the kernel finds at the parameter's address."""
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous, "a kernel's array must be contiguous"
        return struct.pack("=Q", argument.ctypes.data)
    if isinstance(argument, np.generic):
        return argument.tobytes()
    if isinstance(argument, (ctypes._SimpleCData, ctypes.Structure, ctypes.Array)):
        return bytes(argument)
    raise TypeError(f"an array, a NumPy scalar or a ctypes value is needed, not {argument!r}")


def _movable(value: bytes, arrays: Sequence[np.ndarray]) -> bytes:
    """An argument for another process, with the list of the addresses in it."""
    found = []
    for place in range(0, len(value) - 7, 8):
        (word,) = struct.unpack_from("=Q", value, place)
        for index, array in enumerate(arrays):
            offset = word - array.ctypes.data
            if 0 <= offset < array.nbytes:
                found += [place, index, offset]
                break
    return struct.pack("=Q", len(value)) + value + struct.pack(f"={len(found) + 1}Q", len(found) // 3, *found)


def _split(content: bytes, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    outputs, start = [], 0
    for array in arrays:
        outputs.append(np.frombuffer(content, array.dtype, array.size, start).reshape(array.shape))
        start += array.nbytes
    return tuple(outputs)


def _compile(sources: Sequence[Source], defines: Sequence[str], flags: Sequence[str]) -> Path:
    """The library or program, from the cache if nothing that goes into it has changed."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("running CUDA kernels on the CPU needs g++ (apt install g++)")
    command = [compiler, *FLAGS, *flags, *(f"-D{define}" for define in defines)]
    names = kernel_names(sources)
    assert names, 'there is no extern "C" __global__ function'
    CACHE.mkdir(parents=True, exist_ok=True)
    includes = "".join(f'#include "{_file_of(source)}"\n' for source in sources)
    unit = f'#include "{HERE}/cuda_host.h"\n{includes}{_entries(names)}'
    inputs = [path for source in sources if isinstance(source, Path) for path in sorted(source.parent.glob("*.cu*"))]
    content = [path.read_bytes() for path in (*sorted(HERE.glob("cuda_host*.h")), *inputs)]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(b"\0".join((*content, unit.encode(), repr(command).encode(), version))).hexdigest()[:24]
    target = CACHE / digest
    if not target.is_file():
        _build(command, unit, target)
    return target


def _build(command: Sequence[str], unit: str, target: Path) -> None:
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
    build = [*command, "-x", "c++", "-", "-o", str(part)]
    result = subprocess.run(build, input=unit, capture_output=True, text=True, check=False)
    if result.returncode and re.search(r"cannot find .*(tsan|asan|ubsan)", result.stderr):
        pytest.skip("the sanitizer's library isn't installed beside g++")
    if result.returncode:
        raise RuntimeError(f"g++ refuses the kernels:\n{result.stderr[:4000]}")
    part.replace(target)


def _file_of(source: Source) -> Path:
    if isinstance(source, Path):
        return source.resolve()
    path = CACHE / f"{hashlib.sha256(source.encode()).hexdigest()[:24]}.cu"
    path.write_text(source, encoding="utf-8")
    return path


def _entries(names: Sequence[str]) -> str:
    """For each kernel what cuLaunchKernel needs, and a program that runs one of them."""
    entries = "".join(
        f"""
extern "C" void emu_launch_{name}(const unsigned* g, const unsigned* b, size_t bytes, int order, void** arguments) {{
    emu::launch(dim3(g[0], g[1], g[2]), dim3(b[0], b[1], b[2]), bytes, order, [&] {{ emu::call({name}, arguments); }});
}}
extern "C" int emu_sizes_{name}(size_t* sizes) {{ return emu::parameter_sizes({name}, sizes); }}
"""
        for name in names
    )
    choices = "".join(
        f'    if (!std::strcmp(words[1], "{name}")) return emu::run_files({name}, words[2], words[3]);\n'
        for name in names
    )
    program = f'#include "{HERE}/cuda_host_program.h"\nint main(int, char** words) {{\n{choices}    return 2;\n}}\n'
    return f"{entries}#ifdef EMU_PROGRAM\n{program}#endif\n"
