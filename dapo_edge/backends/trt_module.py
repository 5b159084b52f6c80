"""The installed TensorRT: found, checked and described once per process, with the logger that keeps its words."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dapo_edge import device
from dapo_edge.backends.trt_report import TrtLog
from dapo_edge.errors import BackendError, DependencyMissing

OLDEST, NEWEST = (8, 6), 11  # 8.5 has no native LayerNormalization; the tests know no major above 11

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TensorRT:
    """The installed TensorRT. Made by `load`, once per process: TensorRT keeps the first logger that it sees."""

    module: Any  # the package itself
    major: int
    version: str
    log: TrtLog
    logger: Any  # the trt.ILogger that writes into `log`


_loaded: dict[ModuleType, TensorRT] = {}


def load() -> TensorRT:
    """Import TensorRT and decide on its version. The driver is asked first: without one TensorRT ends the process.

    Raises `BackendError` without a CUDA device or for a TensorRT older than 8.6, `DependencyMissing` without TensorRT.
    """
    if device.cuda_device_count() == 0:
        problem = device.driver_problem()
        raise BackendError(
            f"TensorRT can't run: the CUDA driver offers no GPU, {problem}"
            if problem
            else "TensorRT can't run: there is no CUDA driver here, or no GPU that it offers",
            "Run with --backend openvino, or see what this machine lacks: dapo-edge doctor",
        )
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: the package is there, a library that it opens is not
        raise DependencyMissing(
            f"the Python package 'tensorrt' can't be imported ({error})",
            "TensorRT belongs to the device: on a Jetson apt install python3-libnvinfer, and make the venv with "
            "--system-site-packages; on a PC or server with a GPU pip install tensorrt",
        ) from error
    if module not in _loaded:
        _loaded[module] = _describe(module)
    return _loaded[module]


def _describe(api: Any) -> TensorRT:
    version = str(api.__version__)
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST:
        raise BackendError(
            f"TensorRT {version} is too old, its ONNX parser knows no LayerNormalization",
            f"Install TensorRT {OLDEST[0]}.{OLDEST[1]} or newer (JetPack 6.0 or newer), or run with --backend openvino",
        )
    if major > NEWEST:
        log.warning("TensorRT %s is newer than every version this was tested with (8.6 to %d)", version, NEWEST)
    recorder = TrtLog()
    return TensorRT(api, major, version, recorder, _make_logger(api, recorder))


def failure(trt: TensorRT, what: str, remedy: str, workspace: int | None = None) -> BackendError:
    """The error for what TensorRT just refused, with its own words, or with the memory (bytes) that was too little."""
    memory = trt.log.memory(workspace)
    if memory is None:
        return BackendError(f"TensorRT {trt.version} {what} ({trt.log.cause()})", remedy)
    return BackendError(
        f"TensorRT {trt.version} {what}: the GPU has too little memory ({memory})",
        "Lower the workspace, or the package's batch or image size, or end other programs that use the GPU",
    )


def _make_logger(api: Any, recorder: TrtLog) -> Any:
    severity = api.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.INFO,
        severity.VERBOSE: logging.DEBUG,
    }

    class Logger(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            recorder.record(levels[severity], msg)

    return Logger()
