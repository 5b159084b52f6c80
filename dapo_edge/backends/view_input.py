"""A camera's bytes on their way into the encoder: pinned memory, upload, the preprocess kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dapo_edge.backends.base import View
from dapo_edge.backends.buffers import Buffers
from dapo_edge.backends.cuda import Cuda, DeviceBuffer, Kernels, PinnedBuffer
from dapo_edge.backends.trt_api import Engine
from dapo_edge.kernels import launch
from dapo_edge.kernels.pixels import PixelFormat, PixelView
from dapo_edge.kernels.resample import TapTable
from dapo_edge.package import Manifest

SCRAMBLED = 0xFFFFFFFF  # NaN as FP32 and FP16, 255 as bytes


@dataclass(frozen=True)
class ViewShape:
    """What the buffers for one view depend on. Where a crop lies in its picture may change from frame to frame."""

    format: PixelFormat
    width: int  # of the whole picture, px
    height: int
    rows: int  # of bytes
    pitch: int  # bytes per row
    across: int  # of what is looked at, px
    down: int

    @classmethod
    def of(cls, view: View) -> ViewShape:
        """Shape of a view; of an array only what it shows is copied, whatever it is a part of."""
        if isinstance(view, PixelView):
            rows, pitch = view.data.shape
            return cls(view.format, view.width, view.height, rows, pitch, *view.window[2:])
        height, width = view.shape[:2]
        return cls("BGR8", width, height, height, 3 * width, width, height)


@dataclass(frozen=True, eq=False)
class Shared:
    """What every path of one backend uses."""

    cuda: Cuda
    kernels: Kernels
    engine: Engine
    manifest: Manifest
    images: DeviceBuffer  # [B, 3, S, S], the engine's input
    images_are_half: bool
    tokens: DeviceBuffer  # [B, L, N, D] FP16
    embedding: DeviceBuffer  # [B, D] FP32
    probs: DeviceBuffer  # [B, K+1, N] FP32, room for every number of types
    bank: DeviceBuffer
    host_probs: PinnedBuffer
    host_embedding: PinnedBuffer

    @property
    def patches(self) -> int:
        """N."""
        return self.manifest.map.grid[0] * self.manifest.map.grid[1]


class ViewInput:
    """The buffers of the views of one batch, and the kernel that brings them into the encoder's input."""

    def __init__(self, shared: Shared, shapes: tuple[ViewShape, ...]) -> None:
        self._shared, self.shapes = shared, shapes
        self._buffers = Buffers(shared.cuda)
        self._zero_copy = shared.cuda.gpu.integrated  # one memory for both
        self._frames: list[DeviceBuffer] = []
        self._views: Any = None
        try:
            self._prepare_views()
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Memory that it holds, of host and GPU."""
        return self._buffers.nbytes

    def _prepare_views(self) -> None:
        shared, shapes = self._shared, self.shapes
        # Each frame's bytes, and last where the crops lie.
        views_bytes = ctypes.sizeof(launch.ViewJob) * len(shapes)
        for nbytes in (*(shape.rows * shape.pitch for shape in shapes), views_bytes):
            self._buffers.pin(nbytes)
        pinned = self._buffers.pinned
        if not self._zero_copy:
            self._frames += [self._buffers.allocate(staging.nbytes, "frames") for staging in pinned]
        self._places = [buffer.address for buffer in self._frames] or [staging.device_address for staging in pinned]
        tables = self._fill_tables()
        preprocessing = shared.manifest.preprocessing
        self._job = launch.PreprocessJob(
            views=self._places[-1], images=shared.images.address, is_half=shared.images_are_half
        )
        for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
            self._job.scale[channel], self._job.bias[channel] = 1 / (255 * std), -mean / std
        self._launch = launch.preprocess_launch(tables, shared.manifest.image_size, self._job)

    def _fill_tables(self) -> list[TapTable]:
        """Describe the views in pinned memory, upload their tap tables once; returns the tables of the columns."""
        on_device: dict[TapTable, tuple[int, int]] = {}
        constant = self._buffers.constant

        def uploaded(table: TapTable) -> tuple[int, int]:
            if table not in on_device:
                on_device[table] = (
                    constant(table.starts, "resampling tables"),
                    constant(table.weights, "resampling tables"),
                )
            return on_device[table]

        self._views = (launch.ViewJob * len(self.shapes)).from_buffer(self._buffers.pinned[-1].array.data)
        tables = []
        for place, shape in enumerate(self.shapes):
            window = (0, 0, shape.across, shape.down)
            size = self._shared.manifest.image_size
            view, rows, columns = launch.view_job((shape.width, shape.height), window, shape.pitch, shape.format, size)
            view.pixels = self._places[place]
            view.chroma = view.pixels + shape.pitch * shape.height
            view.row_starts, view.row_weights = uploaded(rows.table)
            view.column_starts, view.column_weights = uploaded(columns.table)
            self._views[place] = view
            tables.append(columns.table)
        return tables

    def fill(self, views: Sequence[View]) -> None:
        """Copy the views into pinned memory."""
        for place, (shape, view) in enumerate(zip(self.shapes, views, strict=True)):
            target = self._buffers.pinned[place].array[: shape.rows * shape.pitch]
            if isinstance(view, PixelView):
                target.reshape(shape.rows, shape.pitch)[...] = view.data
                self._views[place].left, self._views[place].top = view.window[:2]
            else:
                target.reshape(view.shape)[...] = view

    def upload(self) -> None:
        """Pinned memory to the GPU, in stream order."""
        for pinned, buffer in zip(self._buffers.pinned, self._frames, strict=False):  # there are none without a copy
            self._shared.cuda.upload(buffer.address, pinned.array)

    def scramble(self) -> None:
        """Overwrite what `upload` and `preprocess` write, in stream order."""
        for buffer in (*self._frames, self._shared.images):
            self._shared.cuda.clear(buffer, SCRAMBLED)

    def preprocess(self) -> None:
        """The GPU's pixels to the encoder's input, in stream order."""
        self._shared.kernels.start(self._launch, self._job)

    def close(self) -> None:
        """Free the buffers."""
        self._views = None
        self._buffers.close()
