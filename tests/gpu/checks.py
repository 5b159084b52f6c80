"""How far the kernels are from `reference.py`, `pixels.py` and Pillow, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from driver import Machine
from numpy.typing import NDArray
from works import BYTES_PER_PIXEL, MEAN, STD, Maps, MapWork, PatchWork, PreprocessWork

from dapo_edge.kernels import launch, pixels, reference
from dapo_edge.kernels.pixels import PixelFormat, PixelView
from dapo_edge.kernels.resample import TapTable

PROBABILITY = 2e-3
ANOMALY = 1 / 255
CLEAR_LEAD = 2e-3  # the best channel leads by more: then the type must be the same
GREY_MAX, GREY_MEAN = 2.0, 0.5  # grey levels, against Pillow; against pixels.py the same for the largest
TOP = 1 / 2048  # of the mean of the highest 1 %: one bin of the histogram


@dataclass(frozen=True)
class MapDifference:
    """Largest differences between a map and its reference."""

    anomaly: float  # of 1
    grey: float  # of 1, of the map in bytes
    wrong_types: int  # pixels with another type although one channel leads clearly
    peaks: float
    top: float
    miscounted: int  # pixels that the histogram has too many or too few

    def holds(self) -> bool:
        """Whether all of them keep the bounds; NaN doesn't."""
        within = (
            (self.anomaly, ANOMALY),
            (self.grey, ANOMALY),
            (self.wrong_types, 0),
            (self.peaks, 1e-4),
            (self.top, TOP),
            (self.miscounted, 0),
        )
        return all(found <= limit for found, limit in within)


def random_tokens(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float16]:
    """Patch tokens [B, L, N, D] of a length that isn't 1."""
    return (3 * np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(np.float16)


def random_bank(types: int, dimensions: int, seed: int = 1) -> NDArray[np.float32]:
    """Unit rows [K+1, D] float32 with FP16 values, which is what the kernel sees."""
    rows = reference.normalise(np.random.default_rng(seed).standard_normal((types + 1, dimensions), np.float32))
    return rows.astype(np.float16).astype(np.float32)


def random_probs(shape: tuple[int, int, int, int], seed: int = 2) -> NDArray[np.float32]:
    """Probabilities [B, K+1, h, w] with clear winners and close ones."""
    batch, channels, rows, columns = shape
    share = np.random.default_rng(seed).dirichlet(np.full(channels, 0.3), (batch, rows, columns))
    return np.ascontiguousarray(share.transpose(0, 3, 1, 2), np.float32)


def random_view(
    pixel_format: PixelFormat, size: tuple[int, int], seed: int = 3, crop: tuple[int, int, int, int] | None = None
) -> PixelView:
    """A camera's bytes, (width, height), with rows longer than the picture: steps and noise at every scale."""
    width, height = size
    rows = height + (-(-height // 2) if pixel_format == "NV12" else 0)
    pitch = width * int(BYTES_PER_PIXEL[pixel_format]) + width % 2 + 6
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (rows // 16 + 1, pitch // 16 + 1), np.uint8)
    data = coarse.repeat(16, axis=0).repeat(16, axis=1)[:rows, :pitch].astype(np.int16)
    data = np.clip(data + generator.integers(-20, 21, data.shape), 0, 255).astype(np.uint8)
    return PixelView(np.ascontiguousarray(data), pixel_format, width, height, crop)


def patch_difference(
    work: PatchWork, tokens: NDArray[np.float16], rows: NDArray[np.float32], temperature: float
) -> float:
    """Largest difference of a probability, after `work` was started. NaN where the kernel wrote nothing."""
    expected = reference.patch_probabilities(tokens.astype(np.float32), rows, temperature, (1, tokens.shape[2]))
    return float(np.abs(work.result() - expected[:, :, 0]).max())


def map_difference(maps: Maps, probs: NDArray[np.float32], tables: tuple[TapTable, TapTable]) -> MapDifference:
    """A batch of maps against the reference on the same probabilities [B, K+1, h, w]."""
    found = [_one_map(maps, image, probs[image : image + 1], tables) for image in range(len(probs))]
    return MapDifference(
        anomaly=_largest(one.anomaly for one in found),
        grey=_largest(one.grey for one in found),
        wrong_types=sum(one.wrong_types for one in found),
        peaks=_largest(one.peaks for one in found),
        top=_largest(one.top for one in found),
        miscounted=sum(one.miscounted for one in found),
    )


def _one_map(maps: Maps, image: int, probs: NDArray[np.float32], tables: tuple[TapTable, TapTable]) -> MapDifference:
    expected = reference.defect_map(probs, *tables)
    anomaly, types = expected.anomaly, expected.types
    channels = reference.upsample_maps(probs, *tables)[0]  # [K+1, H, W]
    second, best = np.partition(channels, -2, axis=0)[-2:]
    count = max(1, int(anomaly.size * 0.01))
    top = np.partition(anomaly.reshape(-1), -count)[-count:].mean()
    peaks = maps.peaks[image]
    return MapDifference(
        anomaly=float(np.abs(maps.anomaly[image].astype(np.float32) - anomaly[0]).max()),
        grey=float(np.abs(maps.grey[image] / 255 - anomaly[0]).max()),
        wrong_types=int(((maps.types[image] != types[0]) & (best - second > CLEAR_LEAD)).sum()),
        peaks=_largest(
            [*np.abs(peaks[: len(channels)] - channels.max(axis=(1, 2))), abs(float(peaks[-1]) - float(anomaly.max()))]
        ),
        top=abs(launch.top_mean(maps.histogram[image], anomaly.size) - float(top)),
        miscounted=abs(int(maps.histogram[image].sum()) - anomaly.size),
    )


def preprocess_difference(images: NDArray[Any], views: list[PixelView]) -> float:
    """Largest difference from `pixels.py` in grey levels of 255."""
    size, largest = images.shape[-1], []
    for image, view in zip(images, views, strict=True):
        expected = pixels.preprocess(view.rgb(), size, MEAN, STD)
        largest.append(np.abs(grey_levels(image) - grey_levels(expected)).max())
    return _largest(largest)


def pillow_difference(image: NDArray[Any], view: PixelView) -> tuple[float, float]:
    """Largest and mean difference from Pillow in grey levels of 255."""
    from PIL import Image

    size = image.shape[-1]
    picture = Image.fromarray(np.ascontiguousarray(view.rgb()))
    expected = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0), np.float32)
    difference = np.abs(grey_levels(image).transpose(1, 2, 0) - expected)
    return float(difference.max()), float(difference.mean())


def grey_levels(image: NDArray[Any]) -> NDArray[np.float32]:
    """An encoder's input [3, S, S] back in 0..255."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (MEAN, STD))
    return (image.astype(np.float32) * std + mean) * 255


def run_patch(
    machine: Machine, shape: tuple[int, int, int, int], types: int, temperature: float = 0.07
) -> tuple[PatchWork, float]:
    """Start `patch_probabilities` on random tokens [B, L, N, D]; the work and its difference."""
    tokens, rows = random_tokens(shape), random_bank(types, shape[3])
    work = PatchWork(machine, tokens, rows, temperature)
    work.start()
    return work, patch_difference(work, tokens, rows, temperature)


def run_map(
    machine: Machine, probs: NDArray[np.float32], tables: tuple[TapTable, TapTable]
) -> tuple[MapWork, MapDifference]:
    """Start `defect_map` on probabilities [B, K+1, h, w]; the work and its difference."""
    bank = np.frombuffer(launch.bank_bytes(np.zeros((probs.shape[1], 8), np.float32), 1.0), np.uint8)
    work = MapWork(machine, machine.place(probs), machine.place(bank), tables, len(probs))
    work.start()
    return work, map_difference(work.result(), probs, tables)


def run_preprocess(machine: Machine, views: list[PixelView], size: int, dtype: Any) -> tuple[NDArray[Any], float]:
    """Start `preprocess`; the images and their difference in grey levels."""
    work = PreprocessWork(machine, views, size, dtype)
    work.start()
    images = work.result()
    return images, preprocess_difference(images, views)


def _largest(values: Any) -> float:
    """NaN if there is one."""
    return float(np.max(list(values)))
