"""The way of one kind of batch through the GPU: upload, preprocess, encode, map, download, captured as one graph.

Buffers, tables and the graph belong to a number of views of certain sizes and formats and to one map size. They are
made once; a frame then costs a copy into pinned memory, one graph launch, and one wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.base import View
from dapo_edge.backends.cuda import Cuda, DeviceBuffer, Event, Graph, Kernels, PinnedBuffer
from dapo_edge.backends.trt_api import Engine
from dapo_edge.errors import BackendError
from dapo_edge.kernels import launch
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.kernels.pixels import PixelFormat, PixelView
from dapo_edge.kernels.resample import TapTable
from dapo_edge.package import Manifest

STAGES = ("upload", "preprocess", "encode", "map", "download")
REPLAY_TOLERANCE = 0.01  # of the anomaly map: a graph that computes something else is far beyond it


@dataclass(frozen=True)
class ViewShape:
    """What the buffers for one view depend on."""

    format: PixelFormat
    width: int  # of the whole picture, px
    height: int
    rows: int  # of bytes
    pitch: int  # bytes per row
    window: tuple[int, int, int, int]  # left, top, width, height of what is looked at

    @classmethod
    def of(cls, view: View) -> ViewShape:
        """Shape of a view; of an array only what it shows is copied, whatever it is a part of."""
        if isinstance(view, PixelView):
            rows, pitch = view.data.shape
            return cls(view.format, view.width, view.height, rows, pitch, view.window)
        height, width = view.shape[:2]
        return cls("BGR8", width, height, height, 3 * width, (0, 0, width, height))


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


@dataclass(frozen=True, eq=False)
class MapResult:
    """What came back for one batch; the arrays are the caller's own."""

    anomaly: NDArray[np.float32]  # [B, H, W]
    types: NDArray[np.uint8]  # [B, H, W]
    probs: NDArray[np.float32]  # [B, K+1, N]
    embedding: NDArray[np.float32]  # [B, D]
    peaks: NDArray[np.float32]  # [B, K+1], highest value of each channel
    highest: NDArray[np.float32]  # [B], highest anomaly
    top: NDArray[np.float32] | None  # [B], mean of the highest 1 %, where the score rule asks for it
    stage_ms: dict[str, float]


class ViewInput:
    """The buffers of the views of one batch, and the kernel that brings them into the encoder's input."""

    def __init__(self, shared: Shared, shapes: tuple[ViewShape, ...]) -> None:
        self._shared, self.shapes = shared, shapes
        cuda, manifest = shared.cuda, shared.manifest
        self._owned: list[DeviceBuffer] = []
        self._zero_copy = cuda.gpu.integrated  # one memory for both: a copy would only cost time
        self.staging: list[PinnedBuffer] = []
        self._pixels: list[int] = []
        try:
            self._prepare(manifest)
        except BaseException:
            self.close()
            raise

    def _prepare(self, manifest: Manifest) -> None:
        shapes, size, shared = self.shapes, manifest.image_size, self._shared
        for shape in shapes:
            pinned = shared.cuda.pinned(shape.rows * shape.pitch)
            self.staging.append(pinned)
            self._pixels.append(
                pinned.device_address if self._zero_copy else self._own(pinned.nbytes, "frames").address
            )
        on_device: dict[TapTable, tuple[int, int]] = {}

        def uploaded(table: TapTable) -> tuple[int, int]:
            if table not in on_device:
                on_device[table] = (self._constant(table.starts), self._constant(table.weights))
            return on_device[table]

        views = (launch.ViewJob * len(shapes))()
        tables = []
        for place, (shape, pixels) in enumerate(zip(shapes, self._pixels, strict=True)):
            view, rows, columns = launch.view_job(
                (shape.width, shape.height), shape.window, shape.pitch, shape.format, size
            )
            view.pixels, view.chroma = pixels, pixels + shape.pitch * shape.height
            view.row_starts, view.row_weights = uploaded(rows.table)
            view.column_starts, view.column_weights = uploaded(columns.table)
            views[place] = view
            tables.append(columns.table)
        self._job = launch.PreprocessJob(
            views=self._constant(np.frombuffer(bytes(views), np.uint8)),
            images=shared.images.address,
            is_half=shared.images_are_half,
        )
        for channel, (mean, std) in enumerate(
            zip(manifest.preprocessing.mean, manifest.preprocessing.std, strict=True)
        ):
            self._job.scale[channel], self._job.bias[channel] = 1 / (255 * std), -mean / std
        self._launch = launch.preprocess_launch(tables, size, self._job)

    def fill(self, views: Sequence[View]) -> None:
        """Copy the views into pinned memory."""
        for pinned, shape, view in zip(self.staging, self.shapes, views, strict=True):
            target = pinned.array[: shape.rows * shape.pitch]
            if isinstance(view, PixelView):
                target.reshape(shape.rows, shape.pitch)[...] = view.data
            else:
                target.reshape(view.shape)[...] = view

    def upload(self) -> None:
        """Pinned memory to the GPU, in stream order."""
        if not self._zero_copy:
            for pinned, address in zip(self.staging, self._pixels, strict=True):
                self._shared.cuda.upload(address, pinned.array)

    def preprocess(self) -> None:
        """The GPU's pixels to the encoder's input, in stream order."""
        self._shared.kernels.start(self._launch, self._job)

    def close(self) -> None:
        """Free the buffers."""
        for buffer in self._owned:
            self._shared.cuda.free(buffer)
        for pinned in self.staging:
            self._shared.cuda.unpin(pinned)
        self._owned.clear()
        self.staging.clear()

    def _own(self, nbytes: int, purpose: str) -> DeviceBuffer:
        buffer = self._shared.cuda.allocate(nbytes, purpose)
        self._owned.append(buffer)
        return buffer

    def _constant(self, array: NDArray[np.generic]) -> int:
        buffer = self._shared.cuda.constant(array, "resampling tables")
        self._owned.append(buffer)
        return buffer.address


class FramePath:
    """Views of fixed shapes to maps of a fixed size."""

    def __init__(
        self, shared: Shared, shapes: tuple[ViewShape, ...], map_size: tuple[int, int], *, with_graph: bool
    ) -> None:
        self._shared = shared
        self._batch = len(shapes)
        self._spec: MapSpec = shared.manifest.map
        self._graph: Graph | None = None
        self._with_graph = with_graph
        self._owned: list[DeviceBuffer] = []
        self._pinned: list[PinnedBuffer] = []
        self._events: list[Event] = []
        self.view_input = ViewInput(shared, shapes)
        try:
            self._events += [shared.cuda.event() for _ in range(len(STAGES) + 1)]
            self._prepare_map(map_size)
        except BaseException:  # too little memory, for instance: other paths go on
            self.close()
            raise

    def run(self, views: Sequence[View], channels: int) -> MapResult:
        """Inspect one batch. The first one runs plainly, then is captured and repeated, and both must agree."""
        cuda = self._shared.cuda
        self.view_input.fill(views)
        if self._graph is not None:
            self._graph.launch()
            return self._collect(channels)
        self._enqueue(in_graph=False)
        result = self._collect(channels)
        if self._with_graph:
            try:
                self._graph = cuda.capture(lambda: self._enqueue(in_graph=True))
            except BackendError as error:
                raise BackendError(
                    f"the GPU work can't be captured as a CUDA graph ({error.cause})",
                    "Update driver and TensorRT, or allow plain launches, which are slower: DAPO_EDGE_CUDA_GRAPH=off",
                ) from error
            self._graph.launch()
            replayed = self._collect(channels)
            # NaN, which the inspector reports, is equal to itself here.
            if not np.allclose(replayed.anomaly, result.anomaly, rtol=0, atol=REPLAY_TOLERANCE, equal_nan=True):
                raise BackendError(
                    "the captured CUDA graph gives another map than the same work launched plainly",
                    "Update driver and TensorRT, or allow plain launches, which are slower: DAPO_EDGE_CUDA_GRAPH=off",
                )
            return replayed
        return result

    def close(self) -> None:
        """Free graph, events and buffers."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        for event in self._events:
            self._shared.cuda.drop_event(event)
        for buffer in self._owned:
            self._shared.cuda.free(buffer)
        for pinned in self._pinned:
            self._shared.cuda.unpin(pinned)
        self._events.clear()
        self._owned.clear()
        self._pinned.clear()
        self.view_input.close()

    def _prepare_map(self, map_size: tuple[int, int]) -> None:
        shared, manifest, batch = self._shared, self._shared.manifest, self._batch
        self._tables = tables = launch.map_tables(*self._spec.tables(map_size))
        pixels = batch * tables.height * tables.pitch
        self._anomaly, self._host_anomaly = self._output(2 * pixels)
        self._types, self._host_types = self._output(pixels)
        self._peaks, self._host_peaks = self._output(4 * batch * launch.PEAKS)
        self._histogram: DeviceBuffer | None = None
        self._host_histogram: PinnedBuffer | None = None
        if self._spec.score == "top":
            self._histogram, self._host_histogram = self._output(4 * batch * launch.HISTOGRAM_BINS)
        layers, multiprocessors = len(manifest.feature_layers), shared.cuda.gpu.multiprocessors
        self._patch_launch = launch.patch_launch(layers, shared.patches, batch, multiprocessors)
        self._patch_job = launch.PatchJob(
            tokens=shared.tokens.address,
            bank=shared.bank.address,
            probs=shared.probs.address,
            patches=shared.patches,
            eighths=manifest.dimensions // 8,
            width=launch.bank_width(manifest.dimensions) // 8,
        )
        self._map_job = launch.MapJob(
            probs=shared.probs.address,
            bank=shared.bank.address,
            row_starts=self._constant(tables.row_starts),
            row_weights=self._constant(tables.row_weights),
            group_starts=self._constant(tables.group_starts),
            group_weights=self._constant(tables.group_weights),
            anomaly_half=self._anomaly.address,
            types=self._types.address,
            peaks=self._peaks.address,
            histogram=self._histogram.address if self._histogram else 0,
        )
        self._map_launch = launch.map_launch(tables, batch, self._map_job, with_histogram=self._histogram is not None)

    def _enqueue(self, *, in_graph: bool) -> None:
        """All of one batch, in stream order. Nothing in here may allocate or wait: a graph is captured from it."""
        shared, cuda, events = self._shared, self._shared.cuda, self._events
        events[0].record(in_graph=in_graph)
        self.view_input.upload()
        events[1].record(in_graph=in_graph)
        self.view_input.preprocess()
        events[2].record(in_graph=in_graph)
        shared.engine.enqueue(cuda.stream_handle)
        events[3].record(in_graph=in_graph)
        cuda.clear(self._peaks)
        if self._histogram is not None:
            cuda.clear(self._histogram)
        shared.kernels.start(self._patch_launch, self._patch_job)
        shared.kernels.start(self._map_launch, self._map_job)
        events[4].record(in_graph=in_graph)
        cuda.download(self._host_anomaly.array, self._anomaly.address)
        cuda.download(self._host_types.array, self._types.address)
        cuda.download(self._host_peaks.array, self._peaks.address)
        if self._histogram is not None and self._host_histogram is not None:
            cuda.download(self._host_histogram.array, self._histogram.address)
        cuda.download(shared.host_embedding.array, shared.embedding.address)
        events[5].record(in_graph=in_graph)

    def _collect(self, channels: int) -> MapResult:
        """Wait for the batch and copy its results out of the pinned buffers."""
        shared, tables, batch = self._shared, self._tables, self._batch
        values = batch * channels * shared.patches
        # Not part of the graph, because the number of types may change between two replays.
        shared.cuda.download(shared.host_probs.array[: 4 * values], shared.probs.address)
        shared.cuda.synchronise()
        map_shape = (batch, tables.height, tables.pitch)
        anomaly = _typed(self._host_anomaly, np.float16, map_shape)[..., : tables.width]
        types = _typed(self._host_types, np.uint8, map_shape)[..., : tables.width]
        peaks = _typed(self._host_peaks, np.float32, (batch, launch.PEAKS))
        top = None
        if self._host_histogram is not None:
            counts = _typed(self._host_histogram, np.uint32, (batch, launch.HISTOGRAM_BINS))
            pixels = tables.height * tables.width
            top = np.asarray([launch.top_mean(row, pixels) for row in counts], np.float32)
        embedding = _typed(shared.host_embedding, np.float32, (shared.manifest.batch, shared.manifest.dimensions))
        return MapResult(
            anomaly=anomaly.astype(np.float32),
            types=types.copy(),
            probs=_typed(shared.host_probs, np.float32, (batch, channels, shared.patches)).copy(),
            embedding=embedding[:batch].copy(),
            peaks=peaks[:, :channels].copy(),
            highest=peaks[:, -1].copy(),
            top=top,
            stage_ms=self._stage_ms(),
        )

    def _stage_ms(self) -> dict[str, float]:
        pairs = zip(STAGES, self._events, self._events[1:], strict=False)
        return {stage: after.ms_since(before) for stage, before, after in pairs}

    def _output(self, nbytes: int) -> tuple[DeviceBuffer, PinnedBuffer]:
        buffer = self._shared.cuda.allocate(nbytes, "maps")
        self._owned.append(buffer)
        pinned = self._shared.cuda.pinned(nbytes)
        self._pinned.append(pinned)
        return buffer, pinned

    def _constant(self, array: NDArray[np.generic]) -> int:
        buffer = self._shared.cuda.constant(array, "map tables")
        self._owned.append(buffer)
        return buffer.address


def _typed(pinned: PinnedBuffer, dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
    """A view into pinned memory."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return pinned.array[:count].view(dtype).reshape(shape)
