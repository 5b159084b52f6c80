"""Eager torch in the accuracy gate, which keeps what a device needs to repeat the gate without torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dapo_edge.backends.base import MapBatch, MapSize, View
from dapo_edge.backends.host import resize_view
from dapo_edge.backends.onnx_flavours import FP16_MAX
from dapo_edge.engine.range_probe import RangeProbe
from dapo_edge.errors import GateError
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models.eager import EagerBackend
from dapo_edge.models.method import Method
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.reference_data import ReferenceData

MAX_VIEWS = 4  # a ViT-L at 518 px makes 8 MB of tokens per view


class RecordingBackend(EagerBackend):
    """The reference of the gate: the activations of every view are measured, a few of what `encode` gets are kept."""

    def __init__(self, method: Method, bank: PromptBank, spec: MapSpec, probe: RangeProbe | None, frames: int) -> None:
        """`frames` of the views will be encoded, each by one call of `encode`."""
        super().__init__(method, bank, spec)
        kept = min(MAX_VIEWS, frames)
        self._wanted = {place * frames // kept for place in range(kept)}
        self._probe = probe
        self._seen = 0
        self._views: list[NDArray[np.uint8]] = []
        self._tokens: list[NDArray[np.float16]] = []
        self._embeddings: list[NDArray[np.float32]] = []

    def infer(self, views: Sequence[View], *, map_size: MapSize | None = None) -> MapBatch:
        """Inspect views of any size. Raises `GateError` for activations that are no numbers."""
        if self._probe:
            self._probe.observe(self.preprocess(views).numpy())
        return super().infer(views, map_size=map_size)

    @torch.inference_mode()
    def encode(self, views: Sequence[View]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Patch tokens [B, L, N, D] and image embeddings [B, D].

        Raises `GateError` for tokens that float16, the output type of every plan, can't hold.
        """
        tokens, embedding = super().encode(views)
        largest = float(np.abs(tokens).max())
        if not largest <= FP16_MAX:
            reach = "hold NaN or Inf" if not np.isfinite(largest) else f"reach {largest:.4g}"
            raise GateError(
                f"the patch tokens {reach}, but leave a compiled encoder as FP16, which ends at {FP16_MAX:.0f}",
                "Nothing was written. Check the weights of the backbone and of the tuned adapters",
            )
        if self._seen in self._wanted:
            self._views += [resize_view(view, self.method.image_size) for view in views]
            self._tokens.append(tokens.astype(np.float16))
            self._embeddings.append(embedding)
        self._seen += 1
        return tokens, embedding

    def recorded(self) -> ReferenceData:
        """What was kept so far, and the activation ranges of everything that was seen."""
        return ReferenceData(
            views=np.stack(self._views),
            tokens=np.concatenate(self._tokens),
            embeddings=np.concatenate(self._embeddings),
            ranges=self._probe.ranges if self._probe else {},
        )
