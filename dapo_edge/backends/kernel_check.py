"""The CUDA kernels as they were compiled here, against their definition: what a seal vouches for is run first.

The stored views of the gate are small and have one format; a line's frames are neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dapo_edge.backends.base import View
from dapo_edge.backends.host import all_channels, make_maps
from dapo_edge.backends.tensorrt import TensorRtBackend
from dapo_edge.errors import GateError
from dapo_edge.kernels.pixels import FORMATS, PixelView, preprocess
from dapo_edge.package import EnginePackage

FRAME = (1280, 720)  # width and height, px; odd crops of it, too
MAX_LEVELS = 1.5  # of 255: one level off by rounding, and what FP16 adds
MAX_ANOMALY = 1 / 255
CLEAR_LEAD = 2e-3  # of the best channel over the second: closer ones may be told either way

_REMEDY = "No target was written. Report it with the output of dapo-edge doctor, and run with --backend openvino"


def check_kernels(backend: TensorRtBackend, package: EnginePackage) -> None:
    """Run frames of a camera's size, in every pixel format and a full batch. Raises `GateError`."""
    views = list(_views())
    batch = package.manifest.batch
    for start in range(0, len(views), batch):
        _check_preprocessing(backend, package, views[start : start + batch])
    full = [views[place % len(views)] for place in range(batch)]
    _check_maps(backend, package, full)


def _views() -> Iterator[PixelView]:
    width, height = FRAME
    rng = np.random.default_rng(0)
    for pixel_format in FORMATS:
        pitch = 3 * width if pixel_format in ("BGR8", "RGB8") else width
        rows = height + (height // 2 if pixel_format == "NV12" else 0)
        data = rng.integers(0, 256, (rows, pitch), np.uint8)
        yield PixelView(data, pixel_format, width, height)
        yield PixelView(data, pixel_format, width, height, (101, 51, 607, 409))


def _check_preprocessing(backend: TensorRtBackend, package: EnginePackage, views: Sequence[PixelView]) -> None:
    manifest = package.manifest
    mean, std = manifest.preprocessing.mean, manifest.preprocessing.std
    images = backend.preprocessed(views)
    for view, image in zip(views, images, strict=True):
        expected = preprocess(view.rgb(), manifest.image_size, mean, std)
        levels = float((np.abs(image - expected).max(axis=(1, 2)) * 255 * np.asarray(std)).max())
        if not levels <= MAX_LEVELS:
            raise GateError(
                f"the preprocess kernel is off by {levels:.1f} grey levels for {view.format} {view.shape[1]} x "
                f"{view.shape[0]} px, as it was compiled here",
                _REMEDY,
            )


def _check_maps(backend: TensorRtBackend, package: EnginePackage, views: Sequence[View]) -> None:
    """The maps of a full batch against those that NumPy makes of the same encoder's tokens."""
    spec = package.manifest.map
    tokens, embedding = backend.encode(views)
    found = backend.infer(views)
    size = (spec.image_size, spec.image_size)
    expected = make_maps(tokens, embedding, found.bank, spec, size)
    anomaly = float(np.abs(found.anomaly - expected.anomaly).max())
    wrong = 0
    for place in range(len(views)):
        channels = all_channels(expected.patch_probs[place : place + 1], spec, size)[0]  # [K+1, H, W]
        second, best = np.partition(channels, -2, axis=0)[-2:]
        wrong += int(((found.types[place] != expected.types[place]) & (best - second > CLEAR_LEAD)).sum())
    if not anomaly <= MAX_ANOMALY or wrong:
        raise GateError(
            f"the map kernels, as they were compiled here, are off by {anomaly:.3g} and name {wrong} pixels wrongly",
            _REMEDY,
        )
