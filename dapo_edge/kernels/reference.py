"""From patch tokens to defect map in NumPy: the definition the CUDA kernels are tested against, and the CPU's own path.

The softmax comes before the upsampling, so all that follows is linear. The mean over layers is taken on the small patch
grid, and resizing and smoothing are two matrices of `resample`. Their rows sum to 1, so the anomaly map needs only the
normal channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from dapo_edge.kernels.contenders import contenders, is_worth_it
from dapo_edge.kernels.map_spec import ScoreRule
from dapo_edge.kernels.resample import TapTable, parts

FloatArray = NDArray[np.float32]
TypeArray = NDArray[np.uint8]

SCORE_RULES = get_args(ScoreRule)

_EPSILON = np.float32(1e-12)  # the smallest length a vector is divided by: a zero vector stays zero
_TOP_FRACTION = 0.01
_BLOCK_BYTES = 1 << 18  # of one upsampled channel in a map of all of them: what stays in the cache
_PART_ROWS, _PART_COLUMNS = 128, 512  # few enough of a map's pixels to need only a few of many tiles


def normalise(x: FloatArray, axis: int = -1) -> FloatArray:
    """Vectors of length 1 along `axis`, same shape, float32; zero vectors stay zero."""
    return x / np.maximum(np.linalg.norm(x, axis=axis, keepdims=True), _EPSILON)


def patch_probabilities(
    tokens: FloatArray,  # [B, L, N, D]
    bank: FloatArray,  # [K+1, D], unit rows
    temperature: float,
    grid: tuple[int, int],  # h, w with h · w = N
) -> FloatArray:
    """Probability of each bank row on each patch, `[B, K+1, h, w]` float32 in [0, 1], sum 1 over the channels.

    Source: DAPO (https://arxiv.org/abs/2512.09446): softmax over K+1 of unit tokens · bank / temperature in each layer;
    then the mean over layers, where the released code takes the sum. Raises `ValueError` if h · w is not N.
    """
    batch, layers, patches, width = tokens.shape
    if grid[0] * grid[1] != patches:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} doesn't hold {patches} patches")
    flat = tokens.reshape(-1, width)  # [B·L·N, D]
    # Channels first: the softmax then runs over whole rows, and dividing the small product by the tokens' lengths saves
    # a normalised copy of the tokens.
    logits = np.ascontiguousarray((flat @ bank.T).T)  # [K+1, B·L·N]; BLAS takes longer over `bank @ flat.T`
    length = np.sqrt(np.einsum("nd,nd->n", flat, flat))
    logits /= np.float32(temperature) * np.maximum(length, _EPSILON)
    share = _softmax(logits, axis=0).reshape(-1, batch, layers, patches)
    mean = share.mean(axis=2)  # [K+1, B, N]
    return np.ascontiguousarray(mean.swapaxes(0, 1)).reshape(batch, -1, *grid)


def upsample_maps(probs: FloatArray, rows: TapTable, columns: TapTable) -> FloatArray:
    """`A_y · P · A_xᵀ` for each channel: `[B, C, h, w]` → `[B, C, H, W]`, float32.

    `rows` maps h to H, `columns` maps w to W. Exact for resizing and Gaussian smoothing: both are linear and separable.
    Raises `ValueError` if a table doesn't fit the grid.
    """
    return _upsample(probs, rows.dense(), columns.dense())


def anomaly_map(probs: FloatArray, rows: TapTable, columns: TapTable) -> FloatArray:
    """`1 - A_y · P_0 · A_xᵀ`, `[B, K+1, h, w]` → `[B, H, W]` float32 in [0, 1].

    Equal to the sum of the defect channels, because softmax and the rows of both tables sum to 1.
    """
    return _complement(upsample_maps(probs[:, 0], rows, columns))


def type_map(probs: FloatArray, rows: TapTable, columns: TapTable) -> TypeArray:
    """Most probable channel of each pixel, `[B, K+1, h, w]` → `[B, H, W]` uint8; ties go to the lowest index.

    Raises `ValueError` for more than 256 channels.
    """
    return defect_map(probs, rows, columns).types


@dataclass(frozen=True, eq=False)
class Maps:
    """What is made of one upsampling of all channels."""

    anomaly: FloatArray  # [B, H, W] in [0, 1]
    types: TypeArray  # [B, H, W]
    peaks: FloatArray  # [B, K+1] highest value of each channel


def defect_map(
    probs: FloatArray,  # [B, K+1, h, w]
    rows: TapTable,
    columns: TapTable,
    inside: NDArray[np.bool_] | None = None,  # [H, W]; None: all of it
) -> Maps:
    """`anomaly_map` and `type_map` of the same `probs`, and how high each channel reaches.

    What is not `inside` is normal: anomaly 0, type 0, and no peak. On large maps only those channels are upsampled that
    can win or reach a peak in a part of it, which changes no result. Raises `ValueError` for more than 256 channels.
    """
    batch, channels = probs.shape[:2]
    if channels > 256:
        raise ValueError(f"a type map holds 256 channels at most, not {channels}")
    anomaly = np.empty((batch, rows.size_out, columns.size_out), np.float32)
    types = np.zeros(anomaly.shape, np.uint8)
    peaks = np.zeros((batch, channels), np.float32)
    of_one_image = _contested if is_worth_it(rows, columns) else _every_channel
    for image in range(batch):
        peaks[image] = of_one_image(probs[image], rows, columns, inside, anomaly[image], types[image])
    if inside is not None:
        anomaly *= inside
        types *= inside
        peaks[:, 0] = 1 - anomaly.min(axis=(1, 2))
    return Maps(anomaly, types, np.minimum(peaks, 1, out=peaks))


def image_score(
    embedding: FloatArray,  # [B, D]
    bank: FloatArray,  # [K+1, D], unit rows
    temperature: float,
) -> FloatArray:
    """How defective the whole image is, `[B]` float32 in [0, 1]: `softmax([z · t_good, z · t_A] / temperature)[1]`.

    Source: DAPO (https://arxiv.org/abs/2512.09446): `z` is the unit image embedding, `t_good` the bank's first row and
    `t_A` the unit mean of the others.
    """
    pair = np.stack([bank[0], normalise(bank[1:].mean(axis=0))])  # [2, D]
    return _softmax(normalise(embedding) @ pair.T / np.float32(temperature), axis=1)[:, 1]


def image_scores(
    rule: str,
    embedding: FloatArray,  # [B, D]
    bank: FloatArray,  # [K+1, D], unit rows
    temperature: float,
    anomaly: FloatArray,  # [B, H, W] in [0, 1]
) -> FloatArray:
    """Image score by one of `SCORE_RULES`, `[B]` float32 in [0, 1].

    `image` is `image_score`; `max` is the highest pixel of the anomaly map; `top` is the mean of its highest 1 % (one
    pixel at least), which a single odd patch moves less. Raises `ValueError` for an unknown rule.
    """
    if rule == "image":
        return image_score(embedding, bank, temperature)
    pixels = anomaly.reshape(len(anomaly), -1)  # [B, H·W]
    if rule == "max":
        return pixels.max(axis=1)
    if rule == "top":
        return _top_means(pixels)
    raise ValueError(f"unknown score rule '{rule}': use one of {', '.join(SCORE_RULES)}")


def top_mean(pixels: FloatArray) -> float:
    """The score rule `top` of any number of anomalies, at least one: the mean of the highest 1 %, in [0, 1]."""
    return float(_top_means(pixels.reshape(1, -1))[0])


def _top_means(pixels: FloatArray) -> FloatArray:
    """`[B, N]` to `[B]`."""
    count = max(1, int(pixels.shape[1] * _TOP_FRACTION))
    return np.partition(pixels, -count, axis=1)[:, -count:].mean(axis=1)


def region_probabilities(
    mask: NDArray[np.bool_],  # a window of the map
    probs: FloatArray,  # [K+1, h, w] of one image
    rows: TapTable,
    columns: TapTable,
    origin: tuple[int, int] = (0, 0),  # row and column of the map where the window starts
) -> FloatArray:
    """Mean over the masked pixels of each upsampled channel, `[K+1]` float32 in [0, 1], sum 1.

    No channel is upsampled: `sum(mask · (A_y P A_xᵀ)) = <A_yᵀ · mask · A_x, P>`. Raises `ValueError` for an empty mask.
    """
    area = np.count_nonzero(mask)
    if area == 0:
        raise ValueError("the region's mask is empty")
    (top, left), (height, width) = origin, mask.shape
    a_y, a_x = rows.dense()[top : top + height], columns.dense()[left : left + width]
    weights: FloatArray = a_y.T @ mask.astype(np.float32) @ a_x  # [h, w]
    return np.tensordot(probs, weights, axes=2) / np.float32(area)


def _softmax(logits: FloatArray, axis: int) -> FloatArray:
    """Softmax written over its input."""
    logits -= logits.max(axis=axis, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=axis, keepdims=True)
    return logits


def _upsample(probs: FloatArray, a_y: FloatArray, a_x: FloatArray) -> FloatArray:
    tall: FloatArray = a_y @ probs  # [..., H, w]
    return _widened(tall, a_x)


def _widened(tall: FloatArray, a_x: FloatArray) -> FloatArray:
    """`tall @ a_xᵀ`, as one large product instead of one per channel."""
    wide: FloatArray = tall.reshape(-1, tall.shape[-1]) @ a_x.T
    return wide.reshape(*tall.shape[:-1], -1)


def _complement(normal: FloatArray) -> FloatArray:
    """`1 - normal`, written over its input; the clip takes off what rounding leaves outside [0, 1]."""
    np.subtract(1, normal, out=normal)
    return np.clip(normal, 0, 1, out=normal)


def _every_channel(
    probs: FloatArray,  # [K+1, h, w]
    rows: TapTable,
    columns: TapTable,
    inside: NDArray[np.bool_] | None,
    anomaly: FloatArray,  # [H, W], written
    types: TypeArray,  # [H, W], written
) -> FloatArray:
    """One image's maps as if nothing were masked, and the masked peaks [K+1].

    Channel by channel in a buffer that stays in the cache: all of them at once would go to memory and back.
    """
    a_y, a_x = rows.dense(), columns.dense()
    peaks = np.zeros(len(probs), np.float32)
    across = min(_PART_COLUMNS, columns.size_out)
    for down, right in product(parts(rows, max(1, _BLOCK_BYTES // (4 * across))), parts(columns, across)):
        block = (down.made, right.made)
        tall: FloatArray = a_y[down.made, down.read] @ probs[:, down.read, right.read]  # [K+1, step, w]
        weights = a_x[right.made, right.read].T
        share = np.empty((tall.shape[1], weights.shape[1]), np.float32)
        best, winner = np.empty_like(share), np.empty(share.shape, np.uint8)
        for channel, patches in enumerate(tall):
            np.matmul(patches, weights, out=share)
            if channel == 0:
                anomaly[block] = best[...] = share
                types[block] = 0
            else:
                _challenge(best, types[block], share, channel, winner)
            peaks[channel] = max(peaks[channel], _highest(share, inside, block))
    _complement(anomaly)
    return peaks


def _contested(
    probs: FloatArray,  # [K+1, h, w]
    rows: TapTable,
    columns: TapTable,
    inside: NDArray[np.bool_] | None,
    anomaly: FloatArray,  # [H, W], written
    types: TypeArray,  # [H, W], written
) -> FloatArray:
    """What `_every_channel` makes, from those channels that can win or reach a new peak in a block."""
    lowest = _write_anomaly(probs[0], rows, columns, anomaly)
    a_y, a_x = rows.dense(), columns.dense()
    need = contenders(probs, rows, columns, inside)
    peaks = need.reached.copy()
    peaks[0] = 1 - lowest
    need.bound[0] = 0  # so nobody looks for a higher one
    alone = need.may_win.sum(axis=0) == 1
    winner = need.may_win.argmax(axis=0)
    for i, down in enumerate(need.down):
        tall: FloatArray = a_y[down.made, down.read] @ probs[:, down.read]  # [K+1, step, w]
        for j, right in enumerate(need.right):
            block = (down.made, right.made)
            higher = need.bound[:, i, j] > peaks
            if alone[i, j]:
                types[block] = winner[i, j]
                chosen = np.flatnonzero(higher)
            else:
                chosen = np.flatnonzero(higher | need.may_win[:, i, j])
            if not len(chosen):
                continue
            share = _widened(tall[chosen, :, right.read], a_x[right.made, right.read])  # [chosen, step, across]
            if not alone[i, j]:
                _running_argmax(share, chosen, types[block])
            for channel, values in zip(chosen, share, strict=True):
                if higher[channel]:
                    peaks[channel] = max(peaks[channel], _highest(values, inside, block))
    return peaks


def _highest(share: FloatArray, inside: NDArray[np.bool_] | None, block: tuple[slice, slice]) -> np.float32:
    """Of one channel in a block of the map, where it is `inside`."""
    highest: np.float32 = share.max() if inside is None else share.max(where=inside[block], initial=0)
    return highest


def _write_anomaly(normal: FloatArray, rows: TapTable, columns: TapTable, anomaly: FloatArray) -> np.float32:
    """`anomaly_map` of a normal channel [h, w] into [H, W], and its lowest value.

    In parts, each from the few patches with weight there. Rows of tables sum to 1, so what is left of 1 can be taken
    before the products, on the small grid.
    """
    a_y, a_x = rows.dense(), columns.dense()
    right, defective = parts(columns, _PART_COLUMNS), 1 - normal
    lowest = np.float32(1)
    for down in parts(rows, _PART_ROWS):
        tall = a_y[down.made, down.read] @ defective[down.read]  # [step, w]
        part = anomaly[down.made]
        for across in right:
            np.matmul(tall[:, across.read], a_x[across.made, across.read].T, out=part[:, across.made])
        np.clip(part, 0, 1, out=part)
        lowest = min(lowest, part.min())
    return lowest


def _running_argmax(share: FloatArray, chosen: NDArray[np.intp], types: TypeArray) -> None:
    """`chosen[np.argmax(share, axis=0)]` into `types`: whole rows at a time instead of pixel by pixel."""
    best, winner = share[0].copy(), np.empty(types.shape, np.uint8)
    types[...] = chosen[0]
    for channel, values in zip(chosen[1:], share[1:], strict=True):
        _challenge(best, types, values, int(channel), winner)


def _challenge(best: FloatArray, types: TypeArray, values: FloatArray, channel: int, winner: TypeArray) -> None:
    """Let a channel win where it is above all earlier ones, of which `best` holds the highest value.

    `winner` is memory to work in, so that it stays in the cache.
    """
    # The later winner has the higher index, so a maximum replaces the earlier one; unlike a masked write, every step
    # here works on many pixels per instruction.
    np.greater(values, best, out=winner.view(np.bool_))
    np.multiply(winner, np.uint8(channel), out=winner)
    np.maximum(types, winner, out=types)
    np.maximum(best, values, out=best)
