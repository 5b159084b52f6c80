"""dapo-edge: defect maps from industrial cameras, per pixel and per defect type, on a CPU or a GPU.

Everything public is listed here; names are resolved at first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dapo_edge.config import load_recipe
    from dapo_edge.engine.build import build
    from dapo_edge.errors import DapoEdgeError
    from dapo_edge.kernels.pixels import PixelView
    from dapo_edge.outputs.overlay import draw
    from dapo_edge.package import EnginePackage
    from dapo_edge.prompt_bank import PromptBank
    from dapo_edge.runtime.inspector import Inspector
    from dapo_edge.runtime.sources import open_source
    from dapo_edge.structures import DefectMap, Frame, Inspection, Region

__version__ = "0.1.0"

_MODULE_OF = {
    "DapoEdgeError": "dapo_edge.errors",
    "DefectMap": "dapo_edge.structures",
    "EnginePackage": "dapo_edge.package",
    "Frame": "dapo_edge.structures",
    "Inspection": "dapo_edge.structures",
    "Inspector": "dapo_edge.runtime.inspector",
    "PixelView": "dapo_edge.kernels.pixels",
    "PromptBank": "dapo_edge.prompt_bank",
    "Region": "dapo_edge.structures",
    "build": "dapo_edge.engine.build",
    "draw": "dapo_edge.outputs.overlay",
    "load_recipe": "dapo_edge.config",
    "open_source": "dapo_edge.runtime.sources",
}

__all__ = [
    "DapoEdgeError",
    "DefectMap",
    "EnginePackage",
    "Frame",
    "Inspection",
    "Inspector",
    "PixelView",
    "PromptBank",
    "Region",
    "build",
    "draw",
    "load_recipe",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dapo_edge' has no attribute {name!r}")
    from dapo_edge.extras import named_extras

    with named_extras():
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
