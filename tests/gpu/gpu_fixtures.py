"""The fixtures of what runs only where a GPU is, a plugin of its test files.

No conftest.py: the tests' common one needs packages that a GPU machine's Python may lack, and others import it by its
name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dapo_edge import device
from dapo_edge.errors import DapoEdgeError


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["DAPO_EDGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["DAPO_EDGE_DEVICE_KEY"] = str(tmp_path_factory.mktemp("key") / "device.key")


@pytest.fixture(scope="session")
def gpu() -> device.Gpu:
    """The first GPU; skips without one."""
    found = device.gpus()
    if not found:
        pytest.skip(f"no GPU here: {device.driver_problem() or 'there is no CUDA driver'}")
    return found[0]


@pytest.fixture(scope="session")
def machine(gpu: device.Gpu) -> Iterator[object]:
    """The kernels on torch's stream; skips where torch or a CUDA compiler is missing."""
    from driver import TorchMachine

    try:
        opened = TorchMachine()
    except DapoEdgeError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()
