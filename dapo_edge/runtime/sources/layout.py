"""Where the pixels of a camera are in memory, and how they become ours: copied once, without what pads the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.kernels.pixels import PixelFormat, PixelView
from dapo_edge.runtime.buffers import BufferPool

CHANNELS: dict[PixelFormat, int] = {"BGR8": 3, "RGB8": 3, "GRAY8": 1, "BayerRG8": 1, "NV12": 1}


@dataclass(frozen=True)
class Plane:
    """Rows that lie one after the other."""

    offset: int  # bytes from the beginning of the buffer
    stride: int  # bytes from one row to the next
    rows: int
    row_bytes: int


@dataclass(frozen=True)
class Layout:
    """How the frames of a camera lie in a buffer of it."""

    format: PixelFormat
    width: int
    height: int
    planes: tuple[Plane, ...]

    @classmethod
    def of(cls, pixels: PixelFormat, width: int, height: int, offsets: Sequence[int], strides: Sequence[int]) -> Layout:
        """The layout of one of the formats of `PixelView`, whose chroma, of NV12, is the second plane."""
        row_bytes = width * CHANNELS[pixels]
        planes = [Plane(offsets[0], strides[0], height, row_bytes)]
        if pixels == "NV12":
            planes.append(Plane(offsets[1], strides[1], -(-height // 2), row_bytes + row_bytes % 2))
        return cls(pixels, width, height, tuple(planes))

    def taken(
        self,
        data: NDArray[np.uint8],  # [N], a whole buffer
        pool: BufferPool,
        placed: tuple[Sequence[int], Sequence[int]] | None = None,  # offsets and strides, where this buffer has its own
    ) -> NDArray[np.uint8] | PixelView | None:
        """The pixels of one frame in memory of `pool`, as `Frame.pixels` has them; None if the buffer is too short."""
        rows, row_bytes = sum(plane.rows for plane in self.planes), max(plane.row_bytes for plane in self.planes)
        target, row = pool.take((rows, row_bytes)), 0
        for number, plane in enumerate(self.planes):
            offset, stride = (placed[0][number], placed[1][number]) if placed else (plane.offset, plane.stride)
            if offset + stride * (plane.rows - 1) + plane.row_bytes > data.size:
                return None
            shape, steps = (plane.rows, plane.row_bytes), (stride, 1)
            target[row : row + plane.rows, : plane.row_bytes] = np.lib.stride_tricks.as_strided(
                data[offset:], shape, steps, writeable=False
            )
            row += plane.rows
        if self.format == "BGR8":
            return target.reshape(self.height, self.width, 3)
        return PixelView(target, self.format, self.width, self.height)
