"""What the CUDA driver is asked, and what becomes of its answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from driver_fakes import H200, NO_DRIVER, ORIN, FakeLibcuda, compiled, use

from dapo_edge import device
from dapo_edge.device import Gpu, as_json, cuda_device_count, driver_problem, gpus, this_device


def test_gpus_are_described_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeLibcuda(ORIN, H200, version=13000))
    assert gpus() == (
        Gpu("Orin", "8.7", 65_000_000_000, "13.0", True, 16),
        Gpu("NVIDIA H200", "9.0", 150_000_000_000, "13.0", False, 132),
    )
    assert cuda_device_count() == 2
    assert driver_problem() is None
    found = this_device()
    assert "NVIDIA H200" in found.line()
    document = json.loads(json.dumps(as_json(found)))
    assert [(gpu["name"], gpu["sm"]) for gpu in document["gpus"]] == [("Orin", "8.7"), ("NVIDIA H200", "9.0")]
    assert document["cuda_devices"] == 2


def test_the_calls_fit_a_library_in_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, compiled(tmp_path))
    assert gpus() == (Gpu("Orin 40", "8.7", (64 << 30) + 40, "12.6", True, 16),)


def test_no_driver_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, NO_DRIVER)
    assert (gpus(), cuda_device_count(), driver_problem()) == ((), 0, None)
    monkeypatch.undo()
    monkeypatch.setattr(device, "_DRIVER", "libno-such-driver.so.1")  # the loader's own words for it
    assert (gpus(), driver_problem()) == ((), None)


@pytest.mark.parametrize(
    ("driver", "text"),
    [
        (FakeLibcuda(ORIN, cuInit=803), "unsupported display driver / cuda driver combination (error 803): After an"),
        (FakeLibcuda(cuInit=100), "no CUDA-capable device is detected (error 100): No GPU is visible"),
        (FakeLibcuda(ORIN, cuInit=9999), "unknown error (error 9999): Restart the machine"),
        (FakeLibcuda(ORIN, cuDeviceTotalMem_v2=803), "(error 803)"),
        (OSError("libnvrm_gpu.so: cannot open shared object file: No such file or directory"), "libnvrm_gpu.so"),
        (object(), "too old, or none"),
    ],
)
def test_a_driver_that_refuses_says_why(driver: object, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, driver)
    assert (gpus(), cuda_device_count()) == ((), 0)
    assert text in (driver_problem() or "")


def test_a_file_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")
    monkeypatch.setattr(device, "_DRIVER", str(tmp_path / "libcuda.so.1"))
    assert gpus() == ()
    assert "can't be loaded" in (driver_problem() or "")


def test_the_driver_is_asked_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing it would raise
    use(monkeypatch, FakeLibcuda(ORIN))
    assert this_device().cuda_devices == 1


@pytest.mark.parametrize(
    ("release", "l4t"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "36.4.3"),
        ("# R38 (release), REVISION: 2.0, GCID: 1", "38.2.0"),
        ("something else", None),
        (None, None),
    ],
)
def test_jetson_linux(release: str | None, l4t: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_first_line", lambda path: release)
    assert this_device().l4t == l4t
    assert this_device().jetson == release
