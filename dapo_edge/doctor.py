"""What this machine can do, and whether a package runs here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_edge.device import Device, as_json, this_device
from dapo_edge.errors import DapoEdgeError
from dapo_edge.extras import require


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    fine: bool
    finding: str


@dataclass(frozen=True)
class Diagnosis:
    """The machine, the checks, and the first error that stops the package (or the machine) from inspecting."""

    device: Device
    checks: tuple[Check, ...]
    problem: DapoEdgeError | None

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "schema": "dapo-edge doctor 1",
            "device": as_json(self.device),
            "checks": [{"what": check.what, "ok": check.fine, "finding": check.finding} for check in self.checks],
            "ready": self.problem is None,
        }


def diagnose(package: Path | None = None) -> Diagnosis:
    """Look at this machine and, if named, at a package: its files, its backend, one inspected frame."""
    device = this_device()
    problems: list[DapoEdgeError] = []
    checks = [
        _module("OpenVINO (CPU engine)", "openvino", problems),
        _module("OpenCV (video, regions, overlays)", "cv2", problems),
        _optional("torch (building packages)", "torch" in device.packages, "pip install 'dapo-edge[build]'"),
        Check(
            "CUDA driver", True, f"{device.cuda_devices} GPU(s)" if device.cuda_devices else "no GPU; the CPU is used"
        ),
    ]
    if package is not None and not problems:
        checks.append(_package(package, problems))
    return Diagnosis(device, tuple(checks), problems[0] if problems else None)


def _module(what: str, module: str, problems: list[DapoEdgeError]) -> Check:
    try:
        version = str(getattr(require(module), "__version__", "present")).partition("-")[0]
    except DapoEdgeError as error:
        problems.append(error)
        return Check(what, False, str(error))
    return Check(what, True, version)


def _optional(what: str, present: bool, remedy: str) -> Check:
    return Check(what, True, "present" if present else f"not installed; only needed to build: {remedy}")


def _package(path: Path, problems: list[DapoEdgeError]) -> Check:
    import numpy as np

    from dapo_edge.runtime.inspector import Inspector

    what = f"package {path}"
    try:
        with Inspector(path) as inspector:
            ms = inspector.inspect(np.zeros((480, 640, 3), np.uint8)).ms["total"]
            backend = inspector.backend
            return Check(what, True, f"loads and runs: {backend.name} {backend.precision}, first frame {ms:.0f} ms")
    except DapoEdgeError as error:
        problems.append(error)
        return Check(what, False, str(error))
