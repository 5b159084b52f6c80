"""Measures the inputs of an encoder's Linears, frame by frame, in FP32, behind exactly the runtime's preprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.base import View
from dapo_edge.backends.host import resize_view
from dapo_edge.backends.onnx_graph import EMBEDDING, IMAGE, read_plain
from dapo_edge.backends.onnx_linears import Linear, find_linears
from dapo_edge.backends.openvino import HINT_OF, fast_float_type, with_preprocessing
from dapo_edge.calibration.histograms import StreamingHistogram
from dapo_edge.calibration.ranges import HISTOGRAM_BINS, HISTOGRAM_OCTAVES, LinearRange, rounded_channels
from dapo_edge.calibration.subset import Resized, in_groups
from dapo_edge.errors import BackendError, GateError
from dapo_edge.extras import require
from dapo_edge.package import Preprocessing

MOST_COUNTED = 2_000_000  # values of one tensor and frame that enter its histogram; of more, every n-th token
_WEIGHTS = "Check the weights of the backbone and of the tuned prompts"


@dataclass(frozen=True)
class Measured:
    """Ranges by Linear over some frames, and how much the frames resemble each other."""

    linears: dict[str, LinearRange]  # in the order of execution
    frames: int
    similarity: float  # mean cosine between the image embeddings of two frames; 1 for a single frame


class TappedEncoder:
    """The portable encoder in OpenVINO, from uint8 views; the inputs of its Linears come out beside the embedding."""

    def __init__(self, encoder: bytes, preprocessing: Preprocessing, hint: str, *, taps: bool) -> None:
        graph = read_plain(encoder)
        self.linears: tuple[Linear, ...] = find_linears(graph) if taps else ()
        self.channels = [graph.shapes[linear.input][-1] for linear in self.linears]
        self.dimensions = graph.shapes[EMBEDDING][-1]
        self.batch, _, size, _ = graph.shapes[IMAGE]  # views per call
        self._input: NDArray[np.uint8] = np.zeros((self.batch, size, size, 3), np.uint8)
        ov = require("openvino")
        core = ov.Core()
        try:
            model = core.read_model(encoder, b"")
            model.add_outputs([linear.input for linear in self.linears])
            prepared = with_preprocessing(model, preprocessing)
            properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
            self._request = core.compile_model(prepared, "CPU", properties).create_infer_request()
        except RuntimeError as error:
            reason = "".join(str(error).strip().splitlines()[-1:])
            raise BackendError(
                f"OpenVINO {ov.__version__} can't run the encoder for calibration ({reason[:200]})",
                "Install the OpenVINO of constraints.txt",
            ) from error
        outputs: list[Any] = list(prepared.outputs)
        self._embedding = next(place for place, port in enumerate(outputs) if EMBEDDING in port.get_names())
        self._taps = len(outputs) - len(self.linears)  # added ones come last

    def run(self, views: Sequence[Resized]) -> NDArray[np.float32]:
        """Image embeddings [B, D] of at most `batch` views, the caller's own; a smaller batch repeats its last one."""
        for place in range(self.batch):
            self._input[place] = views[min(place, len(views) - 1)]
        self._request.infer([self._input], share_inputs=True, share_outputs=True)
        embeddings: NDArray[np.float32] = self._request.get_output_tensor(self._embedding).data[: len(views)].copy()
        return embeddings

    def tap(self, place: int) -> NDArray[np.float32]:
        """What went into a Linear in the last run [batch, ..., in], repeated views too; valid until the next run."""
        tensor: NDArray[np.float32] = self._request.get_output_tensor(self._taps + place).data
        return tensor


class Embedder:
    """Image embeddings in the CPU's fastest float type: enough to tell which frames differ."""

    def __init__(self, encoder: bytes, preprocessing: Preprocessing) -> None:
        self._encoder = TappedEncoder(encoder, preprocessing, HINT_OF[fast_float_type() or "fp32"], taps=False)
        self.batch = self._encoder.batch

    def __call__(self, views: Sequence[Resized]) -> NDArray[np.float32]:
        """Embeddings [B, D] of at most `batch` views. Raises `GateError` for one that is no number."""
        return _checked(self._encoder.run(views))


class _LinearInput:
    """What is kept of one Linear's input: two numbers per bin and channel, however many frames there are."""

    def __init__(self, linear: Linear, channels: int) -> None:
        self._linear = linear
        self._histogram = StreamingHistogram()
        self._channels: NDArray[np.float32] = np.zeros(channels, np.float32)

    def add(self, tensor: NDArray[np.float32], frame: int) -> None:
        """Take the input [..., in] on a frame into account. Raises `GateError` when it holds NaN or Inf."""
        magnitudes = np.abs(tensor.reshape(-1, tensor.shape[-1]))
        largest = magnitudes.max(axis=0)
        if not np.isfinite(largest).all():
            raise GateError(
                f"the input of {self._linear.name} (tensor '{self._linear.input}') holds "
                f"{'NaN' if np.isnan(largest).any() else 'Inf'} on calibration frame {frame + 1}",
                _WEIGHTS,
            )
        np.maximum(self._channels, largest, out=self._channels)
        step = -(-magnitudes.size // MOST_COUNTED)
        self._histogram.add(magnitudes[frame % step :: step], float(largest.max()))

    def range(self) -> LinearRange:
        """What a file keeps of it. Raises `GateError` for an input that was always 0."""
        try:
            estimates = self._histogram.estimates()
        except ValueError as error:
            raise GateError(
                f"the input of {self._linear.name} (tensor '{self._linear.input}') is 0 on every calibration frame",
                _WEIGHTS,
            ) from error
        return LinearRange(
            estimates={name: float(f"{value:.6g}") for name, value in estimates.items()},
            channels=None if self._linear.role == "fc2" else rounded_channels(self._channels),
            histogram=tuple(map(int, self._histogram.logarithmic(HISTOGRAM_BINS, HISTOGRAM_OCTAVES))),
        )


def measure_ranges(
    encoder: bytes,
    preprocessing: Preprocessing,
    views: Iterable[View],
    image_size: int,
) -> Measured:
    """Ranges of the Linear inputs over `views` of any size, at least one; memory does not depend on their number.

    `encoder` is the portable FP32 ONNX of that image size. Raises `GateError` naming the first Linear whose input is no
    number, and `BackendError` for an encoder of another build.
    """
    runner = TappedEncoder(encoder, preprocessing, HINT_OF["fp32"], taps=True)
    inputs = [_LinearInput(*pair) for pair in zip(runner.linears, runner.channels, strict=True)]
    frames, direction = 0, np.zeros(runner.dimensions)
    for group in in_groups((resize_view(view, image_size) for view in views), runner.batch):
        embeddings = runner.run(group)
        for place, linear_input in enumerate(inputs):
            tensor = runner.tap(place)
            for index in range(len(group)):
                linear_input.add(tensor[index], frames + index)
        direction += (_checked(embeddings) / np.linalg.norm(embeddings, axis=1, keepdims=True)).sum(axis=0)
        frames += len(group)
    found = {linear.name: kept.range() for linear, kept in zip(runner.linears, inputs, strict=True)}
    return Measured(found, frames, _mean_cosine(direction, frames))


def _checked(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    if not (np.isfinite(embeddings).all() and embeddings.any(axis=1).all()):
        raise GateError("the encoder's image embedding of a calibration frame is 0 or no number", _WEIGHTS)
    return embeddings


def _mean_cosine(direction: NDArray[np.float64], frames: int) -> float:
    """Mean over all pairs, from the sum of the unit vectors: |Σu|² holds each pair twice, and each vector once."""
    if frames < 2:
        return 1.0
    return float(np.clip((direction @ direction - frames) / (frames * (frames - 1)), -1, 1))
