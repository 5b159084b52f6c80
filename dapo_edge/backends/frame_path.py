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
from dapo_edge.backends.buffers import Buffers
from dapo_edge.backends.cuda import DeviceBuffer, Event, Graph, PinnedBuffer
from dapo_edge.backends.view_input import SCRAMBLED, Shared, ViewInput, ViewShape
from dapo_edge.errors import BackendError
from dapo_edge.kernels import launch
from dapo_edge.kernels.map_spec import MapSpec

STAGES = ("upload", "preprocess", "encode", "map", "download")
REPLAY_TOLERANCE = 0.01  # of any value in [0, 1]: a graph that computes something else is far beyond it
_ALLOW_PLAIN = "Update driver and TensorRT, or allow plain launches, which are slower: DAPO_EDGE_CUDA_GRAPH=off"


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
        self._buffers = Buffers(shared.cuda)
        self._outputs: list[DeviceBuffer] = []  # those that the work writes
        self._events: list[Event] = []
        self.view_input = ViewInput(shared, shapes)
        try:
            self._events += [shared.cuda.event() for _ in range(len(STAGES) + 1)]
            self._prepare_map(map_size)
        except BaseException:  # too little memory, for instance: other paths go on
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Memory that it holds, of host and GPU."""
        return self.view_input.nbytes + self._buffers.nbytes

    def run(self, views: Sequence[View], channels: int) -> MapResult:
        """Inspect one batch. The first one runs plainly, then is captured and repeated, and both must agree."""
        self.view_input.fill(views)
        if self._graph is not None:
            self._graph.launch()
            return self._collect(channels)
        self._enqueue(in_graph=False)
        result = self._collect(channels)
        return self._captured(result, channels) if self._with_graph else result

    def _captured(self, plain: MapResult, channels: int) -> MapResult:
        """Capture the work and keep the graph if it repeats what was launched plainly, out of scrambled buffers."""
        cuda = self._shared.cuda
        try:
            graph = cuda.capture(lambda: self._enqueue(in_graph=True))
        except BackendError as error:
            raise BackendError(
                f"the GPU work can't be captured as a CUDA graph ({error.cause})", _ALLOW_PLAIN
            ) from error
        try:
            self._scramble()
            graph.launch()
            replayed = self._collect(channels)
            if not _agree(plain, replayed):
                what = "the captured CUDA graph gives another map than the same work launched plainly"
                raise BackendError(what, _ALLOW_PLAIN)
        except BaseException:
            graph.close()
            raise
        self._graph = graph
        return replayed

    def _scramble(self) -> None:
        """Overwrite everything that the work writes: a graph that left a part out would repeat what was there."""
        shared = self._shared
        self.view_input.scramble()
        for buffer in (shared.tokens, shared.embedding, shared.probs, *self._outputs):
            shared.cuda.clear(buffer, SCRAMBLED)
        for pinned in (*self._buffers.pinned, shared.host_embedding, shared.host_probs):
            pinned.array[:] = 0xFF

    def close(self) -> None:
        """Free graph, events and buffers."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        for event in self._events:
            self._shared.cuda.drop_event(event)
        self._events.clear()
        self._buffers.close()
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
        constant = self._buffers.constant
        self._map_job = launch.MapJob(
            probs=shared.probs.address,
            bank=shared.bank.address,
            row_starts=constant(tables.row_starts, "map tables"),
            row_weights=constant(tables.row_weights, "map tables"),
            group_starts=constant(tables.group_starts, "map tables"),
            group_weights=constant(tables.group_weights, "map tables"),
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
            peaks=np.minimum(peaks[:, :channels], 1),
            highest=peaks[:, -1].copy(),
            top=top,
            stage_ms=self._stage_ms(),
        )

    def _stage_ms(self) -> dict[str, float]:
        pairs = zip(STAGES, self._events, self._events[1:], strict=False)
        return {stage: after.ms_since(before) for stage, before, after in pairs}

    def _output(self, nbytes: int) -> tuple[DeviceBuffer, PinnedBuffer]:
        buffer = self._buffers.allocate(nbytes, "maps")
        self._outputs.append(buffer)
        return buffer, self._buffers.pin(nbytes)


def _typed(pinned: PinnedBuffer, dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
    """A view into pinned memory."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return pinned.array[:count].view(dtype).reshape(shape)


def _agree(one: MapResult, other: MapResult) -> bool:
    """Whether two runs over the same views gave the same; NaN, which the inspector reports, is equal to itself."""
    scale = max(1e-6, float(np.abs(np.nan_to_num(one.embedding)).max()))
    pairs = (
        (one.anomaly, other.anomaly),
        (one.probs, other.probs),
        (one.peaks, other.peaks),
        (one.highest, other.highest),
        (one.embedding / scale, other.embedding / scale),
        *(() if one.top is None or other.top is None else ((one.top, other.top),)),
    )
    close = all(np.allclose(a, b, rtol=0, atol=REPLAY_TOLERANCE, equal_nan=True) for a, b in pairs)
    return close and float((one.types == other.types).mean()) > 1 - REPLAY_TOLERANCE
