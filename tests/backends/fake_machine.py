"""Fixtures of a machine with the fake GPU and a package that is compiled for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from banks import sharp_bank
from fake_cuda import FakeGpu

from dapo_edge.backends.tensorrt import TensorRtBackend
from dapo_edge.backends.tensorrt_compile import compile_package
from dapo_edge.package import EnginePackage
from dapo_edge.prompt_bank import PromptBank


@pytest.fixture
def fake_gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def tensorrt(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fake tensorrt of a machine with the fake GPU; kernels are compiled in name only."""
    fake_cuda.compile_in_name(monkeypatch)
    return fake_cuda.install(monkeypatch, fake_gpu)


@pytest.fixture(scope="module")
def compiled_path(package: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared package, compiled in fp32 and fp16 for the fake GPU; not to be changed."""
    path = Path(shutil.copytree(package.path, tmp_path_factory.mktemp("compiled") / "tiny.dapo"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_cuda.compile_in_name(monkeypatch)
        fake_cuda.install(monkeypatch, FakeGpu())
        for precision in ("fp32", "fp16"):
            compile_package(EnginePackage.open(path), precision=precision)
    return path


@pytest.fixture
def compiled(compiled_path: Path, tensorrt: Any) -> EnginePackage:
    return EnginePackage.open(compiled_path)


@pytest.fixture(scope="module")
def sharp(package: EnginePackage) -> PromptBank:
    return sharp_bank(package)


@pytest.fixture
def backend(compiled: EnginePackage, sharp: PromptBank) -> Iterator[TensorRtBackend]:
    with TensorRtBackend.open(compiled, map_size="model") as opened:
        opened.set_bank(sharp)
        yield opened
