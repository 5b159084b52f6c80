"""The names that the backend uses, and those of the fake, against the real TensorRT bindings of five versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fake_tensorrt
import pytest
import trt_bindings
from fake_tensorrt import make

from dapo_edge.backends import trt_api, trt_module

SOURCE = "\n".join(Path(module.__file__).read_text(encoding="utf-8") for module in (trt_module, trt_api))
SOURCE = SOURCE.replace("from __future__ import annotations", "")
MAJORS = (8, 10, 11)


def real(version: str) -> str:
    try:
        trt_bindings.environment(version)
    except trt_bindings.Unavailable as error:
        pytest.skip(f"the bindings of TensorRT {version} can't be had here: {error}")
    return version


@pytest.mark.parametrize("version", trt_bindings.REQUIREMENTS)
def test_every_name_in_the_source_exists(version: str) -> None:
    found = trt_bindings.uses(SOURCE)
    names = {".".join(use.steps) for use in found}
    assert len(found) > 60
    assert {"context.execute_async_v3", "api.ILogger.log", "engine.get_tensor_dtype.().name"} <= names
    assert trt_bindings.missing(real(version), found) == []


def test_no_name_hides_behind_a_condition_that_never_holds() -> None:
    found = trt_bindings.uses(SOURCE)
    left = [set(trt_bindings.unreachable(real(version), found)) for version in trt_bindings.REQUIREMENTS]
    assert set.intersection(*left) == set()
    assert any("IProgressMonitor" in place for place in left[0]), "8.6 has none"
    assert any("FP16" in place for place in left[-1]), "11 has no precision flags"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("    config.max_workspace_size = 1", r"line \d+: config\.max_workspace_size"),
        ("    api.BuilderFlag.FP17", r"line \d+: api\.BuilderFlag\.FP17"),
        ("    if trt.major >= 10:\n        config.set_flag(api.BuilderFlag.INT8)", r"line \d+: api\.BuilderFlag\.INT8"),
        ("    flag = api.BuilderFlag\n    config.set_flag(flag.BF17)", r"line \d+: api\.BuilderFlag\.BF17"),
        ("    config.get_timing_cache().deserialise()", r"config\.get_timing_cache\(\)\.deserialise"),
        ("    other = api.Runtime(trt.logger)", r"is a Runtime, which no variable called 'other' may be"),
        ("    self._context.execute_async_v2(0, 0)", r"line \d+: context\.execute_async_v2"),
        ("    trt.module.Buildr(trt.logger)", r"line \d+: api\.Buildr"),
        ("    class M(api.ILogger):\n        def logg(self): ...", r"line \d+: api\.ILogger\.logg"),
    ],
)
def test_a_wrong_name_is_found(line: str, complaint: str) -> None:
    found = trt_bindings.uses(f"{SOURCE}\n\ndef invented(trt, api, config, self):\n{line}\n")
    (text,) = trt_bindings.missing(real("11.4.0"), found)
    assert re.search(complaint, text)


@pytest.mark.parametrize(("major", "version"), [(8, "8.6.1"), (10, "10.3.0"), (11, "11.4.0")])
def test_the_fake_has_nothing_that_the_real_one_lacks(major: int, version: str) -> None:
    names = fake_tensorrt.surface(make(major))
    assert {"Builder.create_network", "ILogger.Severity", "ICudaEngine.get_tensor_shape"} <= set(names)
    assert trt_bindings.missing_names(real(version), names) == []
    assert trt_bindings.missing_names(version, ["Builder.build_engine_now"]) == ["Builder.build_engine_now"]


def test_the_fakes_differ_as_the_versions_do() -> None:
    eight, ten, eleven = (set(fake_tensorrt.surface(make(major))) for major in MAJORS)
    assert {"IProgressMonitor", "IBuilderConfig.progress_monitor", "ParserError.node_name"} <= ten - eight
    assert {"BuilderFlag.FP16", "BuilderFlag.INT8", "ICudaEngine.device_memory_size"} <= ten - eleven
    assert "NetworkDefinitionCreationFlag.STRONGLY_TYPED" in ten - eight
    assert "NetworkDefinitionCreationFlag.EXPLICIT_BATCH" in ten - eleven


CONDUCT = """
import tensorrt_bindings as api
from dapo_edge.backends import trt_api, trt_module
from dapo_edge.backends.trt_progress import Progress
from dapo_edge.errors import BackendError

trt = trt_module._describe(api)
for level in ("ERROR", "WARNING", "INFO", "VERBOSE"):
    trt.logger.log(getattr(api.ILogger.Severity, level), f"line of {level}")
assert (trt.log.cause(), trt.log.phase) == ("line of ERROR", "line of VERBOSE")

progress = Progress(trt.log)
monitor = trt_api._make_monitor(api, progress)
assert (monitor is None) == (trt.major < 10)
if monitor is not None:
    assert isinstance(monitor, api.IProgressMonitor)
    monitor.phase_start("timing", None, 3)
    assert monitor.step_complete("timing", 0) is True
    assert progress.current() == ("timing", 1, 3)
    progress.cancelled.set()
    assert monitor.step_complete("timing", 1) is False

try:  # the stub library has no builder
    trt_api.build_plan(trt, b"", trt_api.BuildOptions("fp16"))
except BackendError as error:
    print(error)
"""


@pytest.mark.parametrize("version", trt_bindings.REQUIREMENTS)
def test_the_real_base_classes_take_our_logger_and_monitor(version: str) -> None:
    variables = trt_bindings.environment(real(version))
    root = str(Path(trt_api.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CONDUCT],
        env={**variables, "PYTHONPATH": f"{variables['PYTHONPATH']}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(rf"TensorRT {re.escape(version)}\S* can't start", done.stdout)


def test_without_pip_or_compiler_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_bindings, "FOLDER", tmp_path)
    monkeypatch.setattr(trt_bindings, "_failed", {})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(trt_bindings.Unavailable, match=r"pip can't download tensorrt-bindings==8\.6\.1"):
        trt_bindings.environment("8.6.1")
    monkeypatch.setattr(trt_bindings, "_failed", {})
    monkeypatch.setattr(trt_bindings, "_download", lambda *_: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(trt_bindings.Unavailable, match="no C compiler"):
        trt_bindings.environment("8.6.1")
    assert not list(tmp_path.iterdir()), "nothing half made stays"
