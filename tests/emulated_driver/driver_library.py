"""Builds the emulated libcuda.so.1 for the pycuda of this environment, and runs scripts on it."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from host_kernels import CACHE, HERE, shipped_module

FOLDER = Path(__file__).parent
TESTS = FOLDER.parent
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Wno-deprecated-declarations",
    "-shared",
    "-fPIC",
    "-Wl,-soname,libcuda.so.1",
)
TOOLKITS = ("/usr/local/cuda", "/usr")
STUBS = """
extern "C" int emu_unsupported(const char*);
#define STUB(NAME) extern "C" int NAME() { return emu_unsupported(#NAME); }
"""
INSTALL = "build it against this machine's CUDA toolkit: pip install 'dapo-edge[gpu]' (no GPU or driver is needed)"


def run_scenario(name: str, package: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a function of `pycuda_scenarios.py` in a process of its own that finds the emulated driver first."""
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{driver_folder()}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": ":".join(map(str, (FOLDER, TESTS, TESTS / "backends", HERE, TESTS.parent))),
        "DAPO_EDGE_HOST_KERNELS": shipped_module()._library._name,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error", str(FOLDER / "pycuda_scenarios.py"), name, str(package or "")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)


@functools.lru_cache(maxsize=1)
def driver_folder() -> Path:
    """Where libcuda.so.1 is. Skips the test where it can't be built, or where pycuda can't be loaded with it."""
    extension = _pycuda_extension()
    compiler, header = shutil.which(os.environ.get("CXX", "g++")), _cuda_header()
    if compiler is None:
        pytest.skip("the emulated CUDA driver needs g++ (apt install g++)")
    sources = [FOLDER / "emulated_gpu.h", FOLDER / "libcuda.cpp"]
    wanted = _symbols(extension, "--undefined-only")
    content = [*(path.read_bytes() for path in sources), repr((FLAGS, header, sorted(wanted))).encode()]
    folder = CACHE / f"driver-{hashlib.sha256(b''.join(content)).hexdigest()[:16]}"
    if not (folder / "libcuda.so.1").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [compiler, *FLAGS, f"-I{header}", str(sources[1]), "-o"]
        _run([*command, str(folder / "without_stubs.so"), "-ldl"])
        missing = sorted(wanted - _symbols(folder / "without_stubs.so", "--defined-only"))
        (folder / "stubs.cpp").write_text(STUBS + "".join(f"STUB({name})\n" for name in missing))
        _run([*command, str(folder / "part"), str(folder / "stubs.cpp"), "-ldl"])
        (folder / "part").replace(folder / "libcuda.so.1")
    return folder


def _pycuda_extension() -> Path:
    found = find_spec("pycuda")  # imports nothing
    places = (found.submodule_search_locations or ()) if found else ()
    extensions = [path for place in places for path in Path(place).glob("_driver.*so")]
    if not extensions:
        pytest.skip(f"pycuda isn't installed here; {INSTALL}")
    return extensions[0]


def _cuda_header() -> Path:
    roots = (os.environ.get("CUDA_HOME"), *TOOLKITS)
    folders = [Path(root) / "include" for root in roots if root]
    found = next((folder for folder in folders if (folder / "cuda.h").is_file()), None)
    if found is None:
        pytest.skip(f"the emulated CUDA driver needs cuda.h in one of {', '.join(map(str, folders))}")
    return found


def _symbols(library: Path, which: str) -> set[str]:
    """The driver's functions that a library uses, or has."""
    text = _run(["nm", "-D", which, str(library)])
    return set(re.findall(r" (cu[A-Z]\w*)$", text, flags=re.MULTILINE))


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stderr[:4000]}")
    return result.stdout
