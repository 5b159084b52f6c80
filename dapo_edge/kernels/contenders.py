"""Which channels can matter where on a large map: what the others would add is known without upsampling them.

An upsampled channel is nearly linear between pixels that lie a fraction of a patch apart, and how nearly follows from
the tap tables. So a few pixels bound all others: most types win nowhere in most blocks of the map, and most blocks are
lower than a peak that is already known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dapo_edge.kernels.resample import Span, TapTable, spans

FloatArray = NDArray[np.float32]

_BLOCK_SIDE = 160  # pixels: small enough for few types to meet in a block, large enough to be worth its calls
_SAMPLES_PER_PATCH = 5
_SMALLEST_STEP = 8  # pixels between samples; closer ones cost more than they save
_SMALLEST_PATCH = 3 * _SMALLEST_STEP  # pixels of the map; with fewer samples on a patch the bounds are too wide
_ROUNDING = np.float32(1e-5)  # many times what float32 products of probabilities are off by


@dataclass(frozen=True, eq=False)
class Contenders:
    """What must be upsampled in which block of one image's map."""

    down: list[Span]
    right: list[Span]
    may_win: NDArray[np.bool_]  # [K+1, len(down), len(right)]: not below another channel on all of the block
    bound: FloatArray  # [K+1, len(down), len(right)]: no pixel of the block is higher
    reached: FloatArray  # [K+1]: some pixel of the map, inside of the mask, is as high


def is_worth_it(rows: TapTable, columns: TapTable) -> bool:
    """Whether patches are large enough on the map for `contenders` to save more than it costs."""
    return all(table.size_out >= _SMALLEST_PATCH * table.size_in for table in (rows, columns))


def contenders(
    probs: FloatArray,  # [K+1, h, w] of one image
    rows: TapTable,
    columns: TapTable,
    inside: NDArray[np.bool_] | None,  # [H, W]; None: all of it
) -> Contenders:
    """For maps that `is_worth_it`, with tables whose weights are not negative: all that `MapSpec` makes are.

    Between two sampled rows, a row of a table is their linear interpolation plus a rest that sums to 0. What the rest
    adds to a channel is at most half its absolute sum times the channel's range; rows and columns add up.
    """
    y, x = _sampled(rows), _sampled(columns)
    a_y: FloatArray = rows.dense()[y.places]
    a_x: FloatArray = columns.dense()[x.places]
    tall: FloatArray = a_y @ probs
    samples: FloatArray = tall @ a_x.T  # [K+1, n, m]
    width = probs.max(axis=(1, 2)) - probs.min(axis=(1, 2))  # [K+1]
    slack = (y.rest[:, None] + x.rest) * (width / 2)[:, None, None] + _ROUNDING  # [K+1, n-1, m-1]
    highest = _of_corners(np.maximum, samples)
    highest += slack
    lowest = _of_corners(np.minimum, samples)
    lowest -= slack
    may_win = highest >= lowest.max(axis=0)
    if inside is not None:
        samples *= inside[np.ix_(y.places, x.places)]
    return Contenders(
        down=y.blocks,
        right=x.blocks,
        may_win=_of_blocks(np.logical_or, may_win, y, x),
        bound=_of_blocks(np.maximum, highest, y, x),
        reached=samples.max(axis=(1, 2)),
    )


@dataclass(frozen=True, eq=False)
class _Sampled:
    """One axis of a map: some of its pixels, the cells between them, and blocks of cells."""

    places: NDArray[np.int64]  # [n] pixels, the first and the last one among them
    rest: FloatArray  # [n-1] largest absolute sum of what linear interpolation in a cell leaves of a table's row
    first_cells: NDArray[np.int64]  # where each block begins
    blocks: list[Span]


@lru_cache(maxsize=64)
def _sampled(table: TapTable) -> _Sampled:
    step, last = _step(table), table.size_out - 1
    places = np.append(np.arange(0, last, step), last)  # [n]
    dense = table.dense().astype(np.float64)
    rest = [_rest(dense[start : end + 1]) for start, end in pairwise(places)]
    first_cells = np.arange(0, len(rest), max(1, round(_BLOCK_SIDE / step)))
    blocks = spans(table, places[first_cells].tolist())
    return _Sampled(places, np.array(rest, np.float32), first_cells, blocks)


def _rest(weights: NDArray[np.float64]) -> float:
    """Of rows [n, patches] from one sample to the next."""
    share = np.linspace(0, 1, len(weights))[:, None]
    return float(np.abs(weights - (1 - share) * weights[0] - share * weights[-1]).sum(axis=1).max())


def _step(table: TapTable) -> int:
    """Pixels between samples."""
    return max(_SMALLEST_STEP, table.size_out // (_SAMPLES_PER_PATCH * table.size_in))


def _of_corners(choose: np.ufunc, samples: FloatArray) -> FloatArray:
    """`choose` over the four samples around each cell, `[K+1, n, m]` to `[K+1, n-1, m-1]`."""
    edges: FloatArray = choose(samples[:, 1:], samples[:, :-1])
    return choose(edges[:, :, 1:], edges[:, :, :-1])


def _of_blocks(choose: np.ufunc, cells: NDArray, y: _Sampled, x: _Sampled) -> NDArray:
    """`choose` over the cells of each block, `[K+1, n-1, m-1]` to `[K+1, blocks, blocks]`."""
    return choose.reduceat(choose.reduceat(cells, y.first_cells, axis=1), x.first_cells, axis=2)
