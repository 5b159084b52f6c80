"""Compiles the shipped CUDA sources on the device, with its own nvcc or NVRTC, and keeps the result.

A cubin fits one GPU architecture, and drivers of its compiler's CUDA major version or a later one. So the package ships
source, every device compiles once, and the cache remembers by source, architecture and driver.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dapo_edge import cache
from dapo_edge.errors import BackendError, DependencyMissing

SOURCES = Path(__file__).parent
CACHE_KIND = "kernels"
CACHE_FORMAT = 1
TOOLKIT = "/usr/local/cuda"
LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2")
_LOADED_BY_NAME = LIBRARIES  # wherever the loader finds them

log = logging.getLogger(__name__)

CudaVersion = tuple[int, int]


@dataclass(frozen=True)
class Compiler:
    """One CUDA compiler of this machine."""

    kind: Literal["nvcc", "nvrtc"]
    version: CudaVersion
    path: str  # of the executable or the library
    targets: tuple[str, ...]  # "sm_87", ...

    @property
    def name(self) -> str:
        """For messages and for the cache: kind and version."""
        return f"{self.kind} {_dotted(self.version)}"


@dataclass(frozen=True)
class Usage:
    """What one kernel takes, as the assembler reported it."""

    registers: int  # per thread
    spill_bytes: int  # stores and loads of registers that found no place
    stack_bytes: int  # local memory per thread
    shared_bytes: int  # static shared memory per block


@dataclass(frozen=True)
class Cubin:
    """All kernels, compiled for one GPU architecture."""

    data: bytes
    sm: str
    toolkit: str
    source_sha256: str
    usage: dict[str, Usage]
    warnings: tuple[str, ...]


def find_compilers() -> tuple[Compiler, ...]:
    """Every CUDA compiler here: nvcc of CUDA_HOME, PATH and the toolkit's usual place, then NVRTC, newest first."""
    found: dict[str, Compiler] = {}
    for path in _nvcc_paths():
        compiler = _probe_nvcc(path)
        if compiler:
            found.setdefault(os.path.realpath(path), compiler)
    libraries = [compiler for compiler in map(_probe_nvrtc, _nvrtc_paths()) if compiler]
    for compiler in sorted(libraries, key=lambda compiler: compiler.version, reverse=True):
        found.setdefault(os.path.realpath(compiler.path), compiler)
    return tuple(found.values())


def find_compiler(sm: str | None = None, driver_cuda: CudaVersion | None = None) -> Compiler:
    """The compiler to use: nvcc, else NVRTC; where the driver's CUDA version is given, the newest up to that.

    Where all are newer, the oldest of the driver's major version: within one, an older driver loads newer machine code.
    `sm` leaves only compilers that know this architecture. Raises `DependencyMissing` where there is no compiler at
    all, `BackendError` where none fits.
    """
    compilers = find_compilers()
    if not compilers:
        raise DependencyMissing(
            "there is no CUDA compiler here, neither nvcc nor NVRTC",
            f"Install the toolkit's nvcc and set CUDA_HOME, or {_install_hint(driver_cuda)}",
        )
    known = [compiler for compiler in compilers if sm is None or sm in compiler.targets]
    if not known:
        raise BackendError(
            f"no CUDA compiler here knows {sm}: {_list(compilers)}",
            f"Install a CUDA toolkit that knows this GPU, or {_install_hint(driver_cuda)}",
        )
    if driver_cuda is None:
        return known[0]
    fitting = [compiler for compiler in known if compiler.version <= driver_cuda]
    if fitting:
        return max(fitting, key=lambda compiler: compiler.version)  # the first of equals: nvcc
    same_major = [compiler for compiler in known if compiler.version[0] == driver_cuda[0]]
    if same_major:
        return min(same_major, key=lambda compiler: compiler.version)
    raise BackendError(
        f"the driver, of CUDA {_dotted(driver_cuda)}, loads nothing of a newer major version, and the compilers here "
        f"are newer: {_list(known)}",
        f"Update the driver, or {_install_hint(driver_cuda)}",
    )


def compile_kernels(
    sm: str,
    compiler: Compiler | None = None,
    use_cache: bool = True,
    *,
    driver_cuda: CudaVersion | None = None,
    folder: Path = SOURCES,
) -> Cubin:
    """Compile all `.cu` files of `folder` into one cubin for `sm` ("sm_87"), or take it from the cache.

    Without `compiler`, one is looked for only where the cache has nothing that the driver can load. Raises
    `BackendError` with the compiler's first error line, and what `find_compiler` raises.
    """
    if compiler is None and driver_cuda is None:
        compiler = find_compiler(sm)
    sources = _read_sources(folder)
    digest = _digest(sources)
    # Whatever compiler made it, all drivers of one major version load it.
    loader = compiler.name if compiler else f"driver {driver_cuda[0] if driver_cuda else ''}"
    key = cache.key_of(CACHE_FORMAT, digest, sm, loader)
    blob = cache.load(CACHE_KIND, key) if use_cache else None
    if blob is not None:
        return _unpack(blob)
    compiler = compiler or find_compiler(sm, driver_cuda)
    build = _build_nvcc if compiler.kind == "nvcc" else _build_nvrtc
    data, text = build(compiler, sm, sources)
    warnings = tuple(" ".join(line.split()) for line in text.splitlines() if "warning" in line)
    for warning in warnings:
        log.warning("%s, for %s: %s", compiler.name, sm, warning)
    cubin = Cubin(data, sm, compiler.name, digest, parse_usage(text), warnings)
    if use_cache:
        cache.store(CACHE_KIND, key, _pack(cubin))
    return cubin


def source_digest(folder: Path = SOURCES) -> str:
    """SHA-256 of the CUDA sources: what a cubin of this dapo-edge was made from."""
    return _digest(_read_sources(folder))


def parse_usage(text: str) -> dict[str, Usage]:
    """What `ptxas -v` reports per kernel; functions that a kernel calls count for the kernel."""
    usage: dict[str, Usage] = {}
    for part in re.split(r"(?=Compiling entry function ')", text)[1:]:
        name = re.match(r"Compiling entry function '([^']+)'", part)
        stacks = [int(count) for count in re.findall(r"(\d+) bytes (?:stack frame|cumulative stack size)", part)]
        spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", part)]
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if name and registers and stacks and spills:
            static = int(shared[1]) if shared else 0
            usage[name[1]] = Usage(int(registers[1]), sum(spills), max(stacks), static)
    return usage


def _nvcc_paths() -> Iterator[str]:
    home = os.environ.get("CUDA_HOME")
    folders = (f"{home}/bin" if home else "", os.environ.get("PATH", os.defpath), f"{TOOLKIT}/bin")
    for search in folders:
        path = shutil.which("nvcc", path=search) if search else None
        if path:
            yield path


def _probe_nvcc(path: str) -> Compiler | None:
    try:
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        targets = subprocess.run([path, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("the compiler '%s' can't be used (%s)", path, error)
        return None
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        log.warning("the compiler '%s' doesn't say its version", path)
        return None
    return Compiler("nvcc", (int(release[1]), int(release[2])), path, tuple(re.findall(r"sm_\w+", targets)))


def _nvrtc_paths() -> Iterator[str]:
    yield from _LOADED_BY_NAME
    home = os.environ.get("CUDA_HOME")
    places = [f"{root}/lib64" for root in (home, TOOLKIT) if root]
    packages = find_spec("nvidia")  # what the wheels share; finding it imports nothing
    for root in (packages.submodule_search_locations or ()) if packages else ():
        places += sorted(map(str, Path(root).glob("*/lib")))
    for place in places:
        yield from (path for path in (f"{place}/{name}" for name in LIBRARIES) if Path(path).is_file())


def _probe_nvrtc(path: str) -> Compiler | None:
    try:
        library = ctypes.CDLL(path)
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        _check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        targets = (ctypes.c_int * count.value)()
        _check(library, library.nvrtcGetSupportedArchs(targets))
    except (OSError, AttributeError, BackendError) as error:
        if os.path.isabs(path):  # noqa: PTH117 (a mere name is a guess, and may well lead nowhere)
            log.warning("the compiler '%s' can't be used (%s)", path, error)
        return None
    return Compiler("nvrtc", (major.value, minor.value), path, tuple(f"sm_{target}" for target in targets))


def _check(library: ctypes.CDLL, result: int) -> None:
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        reason = library.nvrtcGetErrorString(result).decode()
        raise BackendError(f"NVRTC failed ({reason})", "Install NVRTC again, or a CUDA toolkit with nvcc")


def _read_sources(folder: Path) -> dict[str, bytes]:
    sources = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".cu", ".cuh")}
    if not any(name.endswith(".cu") for name in sources):
        raise BackendError(f"there are no CUDA sources in '{folder}'", "Install dapo-edge again")
    return sources


def _digest(sources: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sources.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _unit(sources: dict[str, bytes]) -> str:
    return "".join(f'#include "{name}"\n' for name in sources if name.endswith(".cu"))


def _build_nvcc(compiler: Compiler, sm: str, sources: dict[str, bytes]) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source, content in sources.items():  # the very bytes that were hashed
            (folder / source).write_bytes(content)
        (folder / "all_kernels.cu").write_text(_unit(sources))
        command = [compiler.path, "-std=c++17", f"-arch={sm}", "-cubin", "-Xptxas", "-v", "-o", "out.cubin"]
        result = subprocess.run([*command, "all_kernels.cu"], cwd=folder, capture_output=True, text=True, check=False)
        text = result.stdout + result.stderr
        if result.returncode:
            raise _refused(compiler, sm, text)
        return (folder / "out.cubin").read_bytes(), text


def _build_nvrtc(compiler: Compiler, sm: str, sources: dict[str, bytes]) -> tuple[bytes, str]:
    library = ctypes.CDLL(compiler.path)
    names = (ctypes.c_char_p * len(sources))(*(name.encode() for name in sources))
    contents = (ctypes.c_char_p * len(sources))(*sources.values())
    options = [f"--gpu-architecture={sm}".encode(), b"--std=c++17", b"--ptxas-options=-v"]
    program = ctypes.c_void_p()
    unit = _unit(sources).encode()
    created = library.nvrtcCreateProgram(ctypes.byref(program), unit, b"all_kernels.cu", len(sources), contents, names)
    _check(library, created)
    try:
        values = (ctypes.c_char_p * len(options))(*options)
        result = library.nvrtcCompileProgram(program, len(options), values)
        text = _fetch(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if result:
            raise _refused(compiler, sm, text)
        return _fetch(library, program, "CUBIN"), text
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, content))
    return content.raw


def _refused(compiler: Compiler, sm: str, text: str) -> BackendError:
    lines = [line for line in text.splitlines() if line.strip()]
    first = next((line for line in lines if re.search(r"\b(error|fatal|not found)\b", line)), lines[0] if lines else "")
    return BackendError(
        f"{compiler.name} ('{compiler.path}') can't compile the kernels for {sm} ({first.strip()[:300]})",
        "Install dapo-edge again, or use another CUDA toolkit; nvcc needs a C++ compiler beside it",
    )


def _pack(cubin: Cubin) -> bytes:
    fields = asdict(cubin)
    data = fields.pop("data")
    return json.dumps(fields).encode() + b"\n" + data


def _unpack(blob: bytes) -> Cubin:
    header, _, data = blob.partition(b"\n")
    fields = json.loads(header)
    fields["usage"] = {name: Usage(**usage) for name, usage in fields["usage"].items()}
    fields["warnings"] = tuple(fields["warnings"])
    return Cubin(data=data, **fields)


def _install_hint(driver_cuda: CudaVersion | None) -> str:
    if driver_cuda is None:
        return "pip install NVRTC: nvidia-cuda-nvrtc-cu12 for CUDA 12, nvidia-cuda-nvrtc for CUDA 13"
    package = f"nvidia-cuda-nvrtc{'' if driver_cuda >= (13, 0) else f'-cu{driver_cuda[0]}'}"
    return f"pip install '{package}=={_dotted(driver_cuda)}.*'"


def _dotted(version: CudaVersion) -> str:
    return f"{version[0]}.{version[1]}"


def _list(compilers: tuple[Compiler, ...] | list[Compiler]) -> str:
    return ", ".join(f"{compiler.name} ('{compiler.path}')" for compiler in compilers)
