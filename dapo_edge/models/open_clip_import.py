"""open_clip, imported also where torchvision is not the one that belongs to the installed torch."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch

from dapo_edge.extras import require


def import_open_clip() -> Any:
    """Import open_clip, also beside a torchvision whose compiled operators are missing.

    The registry's torchvision is built for CUDA and fails to import with a CPU torch, because its Python side describes
    operators that were never loaded. open_clip uses its transforms only, so declaring the names is enough.
    """
    require("torch")
    operators = (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor",
    )
    try:
        import torchvision  # type: ignore[import-untyped]  # noqa: F401
    except (ImportError, RuntimeError):
        _forget_modules("torchvision")
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in operators:
            with contextlib.suppress(RuntimeError):  # this one is there already
                library.define(operator)
        _KEPT_LIBRARIES.append(library)
    return require("open_clip")


_KEPT_LIBRARIES: list[Any] = []  # a torch library unregisters its operators when it is collected


def _forget_modules(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
