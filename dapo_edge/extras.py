"""Optional packages, imported at the moment they are needed, with an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from dapo_edge.errors import DependencyMissing

EXTRA_OF_MODULE = {
    "cv2": "cpu",
    "openvino": "cpu",
    "onnx": "build",
    "open_clip": "build",
    "torch": "build",
}


def require(module: str) -> ModuleType:
    """Import `module`, or raise `DependencyMissing` naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = EXTRA_OF_MODULE[module.partition(".")[0]]
        raise DependencyMissing(
            f"the Python package '{module}' can't be imported ({error})",
            f"Install it: pip install 'dapo-edge[{extra}]'",
        ) from error
