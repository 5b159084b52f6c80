"""Optional packages, imported at the moment they are needed, with an error that says what to install."""

from __future__ import annotations

import contextlib
import importlib
import platform
from collections.abc import Iterator
from types import ModuleType

from dapo_edge.errors import DependencyMissing

EXTRA_OF_MODULE = {
    "cv2": "cpu",
    "openvino": "cpu",
    "genicam": "genicam",
    "harvesters": "genicam",
    "pypylon": "basler",
    "pynvml": "gpu",
    "jinja2": "report",  # and build, which contains it
    "matplotlib": "report",
    "onnx": "build",  # and gpu, where a device compiles
    "onnxruntime": "peers",
    "open_clip": "build",
    "torch": "build",
    "torchvision": "build",
}

# Bindings to the system's own libraries, which pip can't bring.
APT_PACKAGES = {
    "gi": "python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good",
}


def require(module: str, extra: str | None = None) -> ModuleType:
    """Import `module`, or raise `DependencyMissing` naming the extra that brings it: `extra`, else the usual one."""
    try:
        return importlib.import_module(module)
    except ImportError as error:  # not installed, or installed without a system library that it needs
        raise _missing(module.partition(".")[0], error, extra) from error


@contextlib.contextmanager
def named_extras() -> Iterator[None]:
    """Turn the failed import of an optional package into a `DependencyMissing` that names its extra."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF_MODULE:
            raise
        raise _missing(package, error) from error


def _missing(package: str, error: Exception, extra: str | None = None) -> DependencyMissing:
    cause = f"the Python package '{package}' can't be imported ({error})"
    if package in APT_PACKAGES:
        return DependencyMissing(cause, system_remedy(package))
    remedy = f"Install it: pip install 'dapo-edge[{extra or EXTRA_OF_MODULE[package]}]'"
    if package == "cv2" and platform.machine() == "aarch64":
        remedy = (
            "Use the board's own OpenCV (apt install python3-opencv, and a venv with --system-site-packages), "
            "or on an ARM server pip install opencv-python-headless"
        )
    return DependencyMissing(cause, remedy)


def system_remedy(package: str) -> str:
    """How to get a package that belongs to the system."""
    return f"Install it: apt install {APT_PACKAGES[package]}, and make the venv with --system-site-packages"
