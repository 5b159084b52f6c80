"""`backends/cuda.py` with the real pycuda, on a machine without a GPU: its driver is emulated, see libcuda.cpp.

pycuda is built from source everywhere, on a machine without a driver, too: link it to any libcuda.so, e.g. the one in
the toolkit's lib64/stubs.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from driver_library import TESTS, run_scenario

from dapo_edge.errors import PackageError
from dapo_edge.package import EnginePackage

SCENARIOS = (
    "describes_the_gpu",
    "copies_and_clears",
    "runs_kernels",
    "replays_graphs",
    "refuses_what_a_capture_forbids",
    "works_in_other_threads",
    "closes_twice",
    "is_closed_in_use",
    "shares_the_context",
    "leaves_what_was_current",
    "is_forgotten",
    "reports_errors",
    "cannot_be_opened",
    "loses_the_context",
    "loses_the_context_with_its_stack",
)
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", SCENARIOS)
def test_pycuda(name: str) -> None:
    result = run_scenario(name)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_a_context_that_cannot_be_entered_ends_no_process() -> None:
    result = run_scenario("cannot_be_entered")
    assert (result.returncode, result.stdout) == (0, "done\n")
    assert result.stderr.count("PyCUDA WARNING") == 1, "what can't be avoided"


def test_the_whole_backend(request: pytest.FixtureRequest) -> None:
    result = run_scenario("inspects_frames", _package(request))
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def _package(request: pytest.FixtureRequest) -> Path:
    if find_spec("torch"):
        return request.getfixturevalue("package").path
    made = TESTS.parent / "engines" / "surface-tiny.dapo"
    try:
        return EnginePackage.open(made).path
    except PackageError as error:
        pytest.skip(f"a package is built with torch, or left by make demo ({error.cause})")
