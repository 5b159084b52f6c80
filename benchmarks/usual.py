"""The pipeline that people write around an encoder: Pillow's bicubic, every channel interpolated, cv2's Gaussian."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dapo_edge.package import Manifest
from dapo_edge.prompt_bank import PromptBank

Maps = tuple[NDArray[np.float32], NDArray[np.uint8]]  # anomaly map [S, S], type map [S, S]


class Usual:
    """Everything but the encoder, for one package's numbers and one bank."""

    def __init__(self, manifest: Manifest, bank: PromptBank) -> None:
        self._spec = manifest.map
        self._size = (manifest.image_size, manifest.image_size)
        pixels = manifest.preprocessing
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (pixels.mean, pixels.std))
        self._rows = torch.from_numpy(bank.rows)

    def around(self, encode: Callable[[Tensor], Tensor]) -> Callable[[NDArray[np.uint8]], Maps]:
        """A BGR frame [H, W, 3] to its maps; `encode` takes [1, 3, S, S] and gives patch tokens [1, L, N, D]."""

        @torch.inference_mode()
        def run(frame: NDArray[np.uint8]) -> Maps:
            return self.maps(encode(self.image(frame)).float())

        return run

    def image(self, frame: NDArray[np.uint8]) -> Tensor:
        """A BGR frame to normalised RGB [1, 3, S, S] float32."""
        rgb = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).resize(self._size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 255
        return ((pixels - self._mean) / self._std)[None]

    def maps(self, tokens: Tensor) -> Maps:
        """Patch tokens [1, L, N, D] float32 to anomaly and type map."""
        spec = self._spec
        logits = F.normalize(tokens, dim=-1) @ self._rows.T / spec.temperature
        probabilities = logits.softmax(-1).mean(1).transpose(1, 2).unflatten(2, spec.grid)
        upsampled = F.interpolate(probabilities, size=self._size, mode="bilinear", align_corners=spec.align_corners)
        maps = upsampled[0].numpy()
        if spec.smoothing_px:
            maps = np.stack([_smoothed(channel, spec.smoothing_px) for channel in maps])
        return 1 - maps[0], maps.argmax(axis=0).astype(np.uint8)


def _smoothed(channel: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(channel, (0, 0), sigma, borderType=cv2.BORDER_REFLECT))
