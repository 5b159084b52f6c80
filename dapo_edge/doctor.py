"""What this machine can do, and whether a package runs here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dapo_edge import seal
from dapo_edge.device import Device, Gpu, as_json, driver_problem, this_device
from dapo_edge.errors import DapoEdgeError
from dapo_edge.extras import require
from dapo_edge.fingerprint import fingerprint_here, tensorrt_version
from dapo_edge.package import EnginePackage
from dapo_edge.targets import Judgement, how_to_compile, judge_all


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    fine: bool
    finding: str


@dataclass(frozen=True)
class Diagnosis:
    """The machine, the checks, the package's targets, and the first error that stops it from inspecting."""

    device: Device
    checks: tuple[Check, ...]
    targets: tuple[Judgement, ...]
    problem: DapoEdgeError | None

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "schema": "dapo-edge doctor 1",
            "device": as_json(self.device),
            "checks": [{"what": check.what, "ok": check.fine, "finding": check.finding} for check in self.checks],
            "targets": [
                {"id": target.id, "verdict": target.verdict, "reason": target.reason} for target in self.targets
            ],
            "ready": self.problem is None,
        }


def diagnose(package: Path | None = None) -> Diagnosis:
    """Look at this machine and, if named, at a package: its files, its backend, one inspected frame, its targets."""
    device = this_device()
    problems: list[DapoEdgeError] = []
    on_the_cpu: list[DapoEdgeError] = []  # no problem where a GPU inspects
    checks = [
        _module("OpenVINO (CPU engine)", "openvino", on_the_cpu),
        _module("OpenCV (video, regions, overlays)", "cv2", problems),
        _optional("torch (building packages)", "torch" in device.packages, "pip install 'dapo-edge[build]'"),
        _driver(device.gpus),
        *_gpu_parts(device),
    ]
    targets: tuple[Judgement, ...] = ()
    opened = None if package is None else _opened(package, checks, problems)
    on_the_gpu: list[DapoEdgeError] = []
    inspects = False
    if opened is not None:
        if not problems + on_the_cpu:
            checks.append(_inspection(opened, "openvino", on_the_cpu))
        targets = _targets(opened, device, checks)
        if not problems and any(target.verdict == "load" for target in targets):
            checks.append(_inspection(opened, "tensorrt", on_the_gpu))
            inspects = not on_the_gpu
    problems += [] if inspects else on_the_cpu
    return Diagnosis(device, tuple(checks), targets, problems[0] if problems else None)


def _module(what: str, module: str, problems: list[DapoEdgeError]) -> Check:
    try:
        version = str(getattr(require(module), "__version__", "present")).partition("-")[0]
    except DapoEdgeError as error:
        problems.append(error)
        return Check(what, False, str(error))
    return Check(what, True, version)


def _optional(what: str, present: bool, remedy: str) -> Check:
    return Check(what, True, "present" if present else f"not installed; only needed to build: {remedy}")


def _driver(gpus: tuple[Gpu, ...]) -> Check:
    what = "CUDA driver"
    if gpus:
        names = ", ".join(f"{gpu.name} (sm {gpu.sm}, {gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in gpus)
        return Check(what, True, f"CUDA {gpus[0].driver_cuda}, {len(gpus)} GPU(s): {names}")
    problem = driver_problem()
    if problem:
        return Check(what, False, f"it refuses, so the CPU is used: {problem}")
    return Check(what, True, "no GPU; the CPU is used")


def _gpu_parts(device: Device) -> list[Check]:
    """What inspecting on a GPU needs besides its driver; nothing of it is looked for, or imported, without a GPU."""
    names = ("TensorRT", "pycuda (GPU memory, launches)", "CUDA kernels compiler")
    if not device.gpus:
        return [Check(name, True, "not needed without a GPU") for name in names]
    version = tensorrt_version()
    system = "apt install python3-libnvinfer, and a venv with --system-site-packages"
    tensorrt = f"not installed: {system}" if device.jetson else f"not installed: pip install tensorrt, or {system}"
    has_pycuda = find_spec("pycuda") is not None
    return [
        Check(names[0], version is not None, version or tensorrt),
        Check(names[1], has_pycuda, "present" if has_pycuda else "not installed: pip install 'dapo-edge[gpu]'"),
        _compiler(names[2], device.gpus[0]),
        _key(),
    ]


def _compiler(what: str, gpu: Gpu) -> Check:
    from dapo_edge.kernels.compile import find_compiler

    major, minor = (int(part) for part in gpu.driver_cuda.split("."))
    try:
        compiler = find_compiler(f"sm_{gpu.sm.replace('.', '')}", (major, minor))
    except DapoEdgeError as error:
        return Check(what, False, str(error))
    return Check(what, True, f"{compiler.name}, {compiler.path}")


def _key() -> Check:
    what = "device key"
    try:
        return Check(what, True, seal.key_here())
    except DapoEdgeError as error:
        return Check(what, False, str(error))


def _opened(path: Path, checks: list[Check], problems: list[DapoEdgeError]) -> EnginePackage | None:
    try:
        return EnginePackage.open(path)
    except DapoEdgeError as error:
        problems.append(error)
        checks.append(Check(f"package {path}", False, str(error)))
        return None


def _inspection(package: EnginePackage, backend: str, problems: list[DapoEdgeError]) -> Check:
    import numpy as np

    from dapo_edge.runtime.inspector import Inspector

    what = f"package {package.path}{' on the GPU' if backend == 'tensorrt' else ''}"
    try:
        with Inspector(package, backend=backend) as inspector:
            ms = inspector.inspect(np.zeros((480, 640, 3), np.uint8)).ms["total"]
            precision = inspector.backend.precision
            return Check(what, True, f"loads and runs: {backend} {precision}, first frame {ms:.0f} ms")
    except DapoEdgeError as error:
        problems.append(error)
        return Check(what, False, str(error))


def _targets(package: EnginePackage, device: Device, checks: list[Check]) -> tuple[Judgement, ...]:
    """Judge the package's targets. None of them is needed as long as the CPU can inspect."""
    try:
        targets = judge_all(package, fingerprint_here())
    except DapoEdgeError as error:
        checks.append(Check("targets", False, str(error)))
        return ()
    for target in targets:
        checks.append(Check(f"target {target.id}", target.verdict == "load", f"{target.verdict}: {target.reason}"))
    if device.gpus and not any(target.verdict == "load" for target in targets):
        checks.append(Check("targets", not targets, f"none for this GPU yet: {how_to_compile(package)}"))
    return targets
