"""The kernels with all that they read and write, in the memory of any `Machine`, as the GPU backend starts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from driver import Buffer, Machine
from numpy.typing import NDArray

from dapo_edge.kernels import launch
from dapo_edge.kernels.launch import HISTOGRAM_BINS, MAX_CHANNELS, PEAKS, MapJob, PatchJob, PreprocessJob, ViewJob
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.kernels.resample import TapTable

BYTES_PER_PIXEL = {"BGR8": 3, "RGB8": 3, "GRAY8": 1, "BayerRG8": 1, "NV12": 1.5}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class Maps:
    """What `defect_map` wrote, without the columns that only fill up its rows."""

    anomaly: NDArray[np.float16]  # [B, H, W]
    grey: NDArray[np.uint8]  # [B, H, W], the anomaly in 255 steps
    types: NDArray[np.uint8]  # [B, H, W]
    peaks: NDArray[np.float32]  # [B, PEAKS], the last one is the anomaly's
    histogram: NDArray[np.uint32]  # [B, HISTOGRAM_BINS]


class PatchWork:
    """`patch_probabilities`: tokens [B, L, N, D] FP16 and a bank [K+1, D] to probs [B, K+1, N]."""

    def __init__(
        self, machine: Machine, tokens: NDArray[np.float16], rows: NDArray[np.float32], temperature: float
    ) -> None:
        batch, layers, patches, dimensions = tokens.shape
        self._machine, self._temperature, self._batch, self._patches = machine, temperature, batch, patches
        self.tokens = machine.place(tokens)
        self.bank = machine.place(np.frombuffer(launch.bank_bytes(rows, temperature), np.uint8))
        self.channels = len(rows)
        # Room for every number of types, because a captured graph outlives a bank.
        self.probs = machine.place(np.full(batch * MAX_CHANNELS * patches, np.nan, np.float32))
        self.launch = launch.patch_launch(layers, patches, batch, machine.multiprocessors)
        width = launch.bank_width(dimensions) // 8
        addresses = self.tokens.address, self.bank.address, self.probs.address
        self._job = PatchJob(*addresses, patches, dimensions // 8, width)

    def start(self) -> None:
        """Put it into the stream."""
        self._machine.start(self.launch, self._job)

    def set_bank(self, rows: NDArray[np.float32]) -> None:
        """Other words in the same place; jobs and graphs stay as they are."""
        self._machine.write(self.bank, np.frombuffer(launch.bank_bytes(rows, self._temperature), np.uint8))
        self.channels = len(rows)

    def result(self) -> NDArray[np.float32]:
        """[B, K+1, N], once the stream is through."""
        values = self._batch * self.channels * self._patches
        return self._machine.fetch(self.probs)[:values].reshape(self._batch, self.channels, self._patches)

    @property
    def moved_bytes(self) -> int:
        """Tokens once in, probabilities once out; the bank, which every block reads, is left out."""
        return self.tokens.nbytes + 4 * self._batch * self.channels * self._patches


class MapWork:
    """A `defect_map` kernel: probs [B, K+1, h, w] and tap tables to `Maps`. Peaks and histogram are cleared first."""

    def __init__(
        self,
        machine: Machine,
        probs: Buffer,
        bank: Buffer,
        tables: tuple[TapTable, TapTable],
        batch: int,
        *,
        with_grey: bool = True,
        with_histogram: bool = True,
    ) -> None:
        self._machine, self._batch = machine, batch
        self.tables = laid_out = launch.map_tables(*tables)
        shape = (batch, laid_out.height, laid_out.pitch)
        self._anomaly, self._grey = machine.place(np.zeros(shape, np.float16)), machine.place(np.zeros(shape, np.uint8))
        self._types = machine.place(np.full(shape, 255, np.uint8))
        self._peaks = machine.place(np.zeros((batch, PEAKS), np.float32))
        self._histogram = machine.place(np.zeros((batch, HISTOGRAM_BINS), np.uint32))
        axes = (laid_out.row_starts, laid_out.row_weights, laid_out.group_starts, laid_out.group_weights)
        self._read = (probs, bank, *map(machine.place, axes))
        self._job = MapJob(*(buffer.address for buffer in self._read))
        self._job.anomaly_half, self._job.types, self._job.peaks = (
            self._anomaly.address,
            self._types.address,
            self._peaks.address,
        )
        self._job.anomaly_byte = self._grey.address if with_grey else 0
        self._job.histogram = self._histogram.address if with_histogram else 0
        self._cleared = (self._peaks, self._histogram) if with_histogram else (self._peaks,)
        self.launch = launch.map_launch(laid_out, batch, self._job, with_histogram=with_histogram)

    def start(self) -> None:
        """Put it into the stream."""
        for buffer in self._cleared:
            self._machine.clear(buffer)
        self._machine.start(self.launch, self._job)

    def result(self) -> Maps:
        """Once the stream is through."""
        anomaly, grey, types = (self._machine.fetch(buffer)[..., : self.tables.width] for buffer in self._planes())
        peaks, histogram = self._machine.fetch(self._peaks), self._machine.fetch(self._histogram)
        return Maps(anomaly, grey, types, peaks, histogram)

    def moved_bytes(self, channels: int) -> int:
        """Probabilities once in, maps once out; the tables, which every block reads, are left out."""
        written = self._planes() if self._job.anomaly_byte else (self._anomaly, self._types)
        rows, columns = self.tables.grid
        return 4 * self._batch * channels * rows * columns + sum(buffer.nbytes for buffer in written)

    def _planes(self) -> tuple[Buffer, Buffer, Buffer]:
        return self._anomaly, self._grey, self._types


class PreprocessWork:
    """`preprocess`: views of any size and format to images [B, 3, S, S]."""

    def __init__(self, machine: Machine, views: Sequence[PixelView], size: int, dtype: Any = np.float16) -> None:
        self._machine, self._views = machine, views
        self.images = machine.place(np.full((len(views), 3, size, size), np.nan, dtype))
        placed: dict[int, Buffer] = {}

        def address(array: NDArray[Any]) -> int:
            return placed.setdefault(id(array), placed.get(id(array)) or machine.place(array)).address

        jobs = (ViewJob * len(views))()
        tables = []
        for place, view in enumerate(views):
            pitch = view.data.shape[1]
            job, rows, columns = launch.view_job((view.width, view.height), view.window, pitch, view.format, size)
            job.pixels = address(view.data)
            job.chroma = job.pixels + pitch * view.height
            job.row_starts, job.row_weights = address(rows.table.starts), address(rows.table.weights)
            job.column_starts, job.column_weights = address(columns.table.starts), address(columns.table.weights)
            jobs[place] = job
            tables.append(columns.table)
        self._placed = (*placed.values(), machine.place(np.frombuffer(bytes(jobs), np.uint8)))
        self._job = PreprocessJob(
            views=self._placed[-1].address, images=self.images.address, is_half=self.images.dtype == np.float16
        )
        for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
            self._job.scale[channel], self._job.bias[channel] = 1 / (255 * std), -mean / std
        self.launch = launch.preprocess_launch(tables, size, self._job)

    def start(self) -> None:
        """Put it into the stream."""
        self._machine.start(self.launch, self._job)

    def result(self) -> NDArray[Any]:
        """[B, 3, S, S], once the stream is through."""
        return self._machine.fetch(self.images)

    @property
    def moved_bytes(self) -> int:
        """Frames once in, as far as they are looked at, images once out. Equal frames of a batch count each."""
        read = sum(view.window[2] * view.window[3] * BYTES_PER_PIXEL[view.format] for view in self._views)
        return int(read) + self.images.nbytes


class FrameWork:
    """All kernels of one batch, as the backend puts them around the encoder; the tokens stay what they are."""

    def __init__(
        self,
        machine: Machine,
        views: Sequence[PixelView],
        size: int,  # side of the encoder's input, px
        tokens: NDArray[np.float16],  # [B, L, N, D]
        rows: NDArray[np.float32],  # [K+1, D]
        temperature: float,
        tables: tuple[TapTable, TapTable],
        *,
        with_extras: bool = True,  # bytes and histogram, which the backend leaves out or has only for one score rule
    ) -> None:
        self.preprocess = PreprocessWork(machine, views, size)
        self.patch = PatchWork(machine, tokens, rows, temperature)
        probs, bank = self.patch.probs, self.patch.bank
        self.maps = MapWork(
            machine, probs, bank, tables, len(tokens), with_grey=with_extras, with_histogram=with_extras
        )

    def start(self) -> None:
        """Put them into the stream."""
        self.preprocess.start()
        self.patch.start()
        self.maps.start()

    def results(self) -> list[NDArray[Any]]:
        """Everything that they wrote, once the stream is through."""
        maps = self.maps.result()
        planes: list[NDArray[Any]] = [maps.anomaly, maps.grey, maps.types, maps.peaks, maps.histogram]
        return [self.preprocess.result(), self.patch.result(), *planes]

    @property
    def moved_bytes(self) -> int:
        """Of all three."""
        return self.preprocess.moved_bytes + self.patch.moved_bytes + self.maps.moved_bytes(self.patch.channels)
