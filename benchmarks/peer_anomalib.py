"""anomalib's WinCLIP, zero-shot, exported and run by anomalib's own OpenVINO inferencer, as its documentation shows.

Runs in an environment of its own (`make peers`), without dapo-edge. WinCLIP is another model than every other row's:
CLIP ViT-B/16-plus at 240 px with 2x2 and 3x3 windows, two classes, no defect types. Its published weights would be
downloaded from the net; here they are drawn with a seed instead, which changes no time.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from numpy.typing import NDArray
from peer_spec import Loaded, Spec

EXPORTED = Path("winclip") / "weights" / "openvino" / "model.xml"
NOTES = ("another model: WinCLIP ViT-B-16-plus-240, map 240x240, no types", "seeded weights instead of laion400m_e31")


def winclip(spec: Spec) -> Loaded:
    """From a BGR frame to an anomaly map [240, 240]; the reference is the same model in torch."""
    os.chdir(spec.cache)  # the inferencer makes a cache folder wherever it is
    import torch

    torch.set_num_threads(spec.threads)
    from anomalib.deploy import OpenVINOInferencer

    if not EXPORTED.exists():
        _model().to_openvino("winclip")
    inferencer = OpenVINOInferencer(EXPORTED, device="CPU")
    hint = inferencer.model.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def inspect(frame: NDArray[np.uint8]) -> tuple[Any, Any]:
        found = inferencer.predict(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        return np.asarray(found.anomaly_map, np.float32)[0], None

    runs_as = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}.get(hint, hint)
    versions = {name: metadata.version(name) for name in ("anomalib", "openvino", "torch", "open_clip_torch")}
    return Loaded(inspect, runs_as, versions, NOTES, _in_torch)


def _in_torch(frame: NDArray[np.uint8]) -> tuple[Any, Any]:
    import torch

    rgb = torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        return _model()(rgb).anomaly_map[0].numpy(), None


def _model() -> Any:
    """WinCLIP for a nameless object. Nothing is downloaded."""
    import open_clip
    import torch

    real = open_clip.create_model_and_transforms

    def seeded(name: str, pretrained: str | None = None, **options: Any) -> Any:
        torch.manual_seed(0)
        return real(name, pretrained=None, **options)

    with patch.object(open_clip, "create_model_and_transforms", seeded):
        from anomalib.models import WinClip

        model = WinClip(class_name="object")
    model.model.setup("object")
    return model.eval()
