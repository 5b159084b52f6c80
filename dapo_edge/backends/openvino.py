"""OpenVINO on the CPU: the embedded default. The host resizes, the compiled model does the rest of preprocessing."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from dapo_edge import cache as compiled_cache
from dapo_edge.backends.base import MapBatch, MapSize, View, check_bank, map_pixels
from dapo_edge.backends.host import make_maps, resize_view
from dapo_edge.device import cpu_name, usable_cores
from dapo_edge.errors import BackendError, PackageDamaged, RecipeError
from dapo_edge.extras import require
from dapo_edge.package import PRECISIONS, EnginePackage, Manifest, Preprocessing, Thresholds
from dapo_edge.prompt_bank import PromptBank

# What OpenVINO calls a float type, by the names used here; the first that a CPU computes natively is its fast type.
FAST_TYPES = {"BF16": "bf16", "FP16": "fp16"}
KIND = "openvino"  # in the cache
HINT_OF = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


log = logging.getLogger(__name__)


class OpenVinoBackend:
    """Runs a package's portable encoder on this machine's CPU."""

    name = "openvino"
    takes_camera_bytes = False

    def __init__(self, package: EnginePackage, model: Any, map_size: MapSize, wanted: str) -> None:
        self._package = package
        self._map_size = map_size
        # One more than run at once: while they encode, the next frame is resized and the last one's map is made.
        self.concurrency = int(model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) + 1
        self._idle: queue.LifoQueue[_Request] = queue.LifoQueue()
        for _ in range(self.concurrency):
            self._idle.put(_Request(model.create_infer_request(), package.manifest))
        self._closed = False
        self.bank = package.bank()
        self.device = str(model.get_property("EXECUTION_DEVICES")[0])
        runs_as = _precision_of(model)
        self.precision = f"int8+{runs_as}" if wanted == "int8" else runs_as

    @classmethod
    def open(
        cls,
        package: EnginePackage,
        *,
        map_size: MapSize,
        precision: str | None = None,
        throughput: bool = False,
        cache: bool = True,
    ) -> Self:
        """Compile the encoder, or take it from the model cache. `precision` overrides the package's: fp32, fp16, int8.

        All cores work on one call after the other, or for `throughput` on as many at once as OpenVINO finds best. What
        is not INT8 in an INT8 encoder computes in the CPU's fastest float type, be it fp32. Raises `BackendError` for
        fp16 on a CPU that computes no float type faster than fp32, `RecipeError` for int8 of a package without it, and
        `GateError` for a precision that failed the build's gate, or whose INT8 is another one on this CPU.
        """
        ov = require("openvino")
        wanted = precision or package.manifest.precision
        if wanted not in PRECISIONS:
            raise RecipeError(
                f"unknown precision '{wanted}'", "Use fp32, fp16 for the CPU's fastest float type, or int8"
            )
        _check_judged(package, wanted)
        core = ov.Core()
        hint, float_type = "THROUGHPUT" if throughput else "LATENCY", HINT_OF[_float_type(core, wanted)]
        properties = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": float_type}
        key = compiled_cache.key_of(
            package.encoder_sha256(wanted),
            package.manifest.preprocessing,
            _shapes_of(package.manifest),
            properties,
            ov.__version__,
            cpu_name(),
            usable_cores(),
        )
        model = _cached(core, key, properties) if cache else None
        if model is None:
            model = _compiled(core, package, wanted, properties)
            if cache:
                if wanted == "int8":
                    _check_int8(cls(package, model, "model", wanted), package)
                compiled_cache.store(KIND, key, model.export_model().getvalue())
        return cls(package, model, map_size, wanted)

    def infer(self, views: Sequence[View], *, map_size: MapSize | None = None) -> MapBatch:
        """Inspect views of any size. Views beyond the package's batch size go through in several calls."""
        manifest = self._package.manifest
        bank = self.bank  # one call sees one bank, even when another thread sets a new one meanwhile
        size = map_pixels(map_size or self._map_size, manifest.image_size, views)
        started = time.perf_counter()
        resized = [resize_view(view, manifest.image_size) for view in views]
        prepared = time.perf_counter()
        with self._request() as request:  # its output buffers are read until the maps are made
            tokens, embedding = request.encode(resized)
            encoded = time.perf_counter()
            maps = make_maps(tokens, embedding, bank, manifest.map, size)
        finished = time.perf_counter()
        stages = {
            "preprocess": (prepared - started) * 1e3,
            "encode": (encoded - prepared) * 1e3,
            "map": (finished - encoded) * 1e3,
        }
        return maps.batch(bank, stages)

    def encode(self, views: Sequence[View]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Patch tokens [B, L, N, D] and image embeddings [B, D], the caller's own: what the accuracy gate compares."""
        resized = [resize_view(view, self._package.manifest.image_size) for view in views]
        with self._request() as request:
            tokens, embedding = request.encode(resized)
            return tokens.copy(), embedding.copy()

    def set_bank(self, bank: PromptBank) -> None:
        """Use another bank from the next call on."""
        check_bank(bank, self._package.manifest.dimensions)
        self.bank = bank

    def close(self) -> None:
        """Drop the compiled model."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _request(self) -> Iterator[_Request]:
        """One of the requests, for this thread alone."""
        if self._closed:
            raise BackendError("this backend is closed", "Open it again")
        request = self._idle.get()
        try:
            yield request
        finally:
            self._idle.put(request)


class _Request:
    """One inference at a time, with its own input; its outputs are written over by the next call."""

    def __init__(self, request: Any, manifest: Manifest) -> None:
        self._request = request
        self._input: NDArray[np.uint8] = np.zeros(
            (manifest.batch, manifest.image_size, manifest.image_size, 3), np.uint8
        )

    def encode(self, resized: Sequence[View]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Patch tokens and image embeddings of views that have the encoder's size, in as many calls as they need."""
        batch = len(self._input)
        if len(resized) <= batch:
            return self._encode_chunk(resized)
        parts = []
        for start in range(0, len(resized), batch):
            tokens, embedding = self._encode_chunk(resized[start : start + batch])
            parts.append((tokens.copy(), embedding.copy()))  # the next chunk is written over these buffers
        return np.concatenate([tokens for tokens, _ in parts]), np.concatenate([row for _, row in parts])

    def _encode_chunk(self, resized: Sequence[View]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        for row, view in zip(self._input, resized, strict=False):
            row[...] = view
        try:
            _first_alone(lambda: self._request.infer([self._input], share_inputs=True, share_outputs=True))
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO failed while running the encoder ({_first_line(error)})", "Check memory, then start again"
            ) from error
        tokens, embedding = (self._request.get_output_tensor(index).data for index in (0, 1))
        return tokens[: len(resized)], embedding[: len(resized)]


_FIRST = threading.Lock()
_first_is_done = False


def _first_alone(infer: Callable[[], object]) -> None:
    """Run an inference, the process' first one alone: OpenVINO's bindings deadlock where two threads begin together.

    One thread then holds the GIL and waits for a static variable's guard, the other holds the guard and waits for the
    GIL.
    """
    global _first_is_done
    if _first_is_done:
        infer()
        return
    with _FIRST:
        infer()
        _first_is_done = True


def _cached(core: Any, key: str, properties: dict[str, str]) -> Any | None:
    blob = compiled_cache.load(KIND, key)
    if blob is None:
        return None
    try:
        return core.import_model(blob, "CPU", properties)
    except RuntimeError as error:
        log.warning("OpenVINO refuses a model from the cache (%s): compiled again", _first_line(error))
        return None


def _compiled(core: Any, package: EnginePackage, precision: str, properties: dict[str, str]) -> Any:
    model = _checked_model(core, package, precision)
    try:
        return core.compile_model(model, "CPU", properties)
    except RuntimeError as error:
        raise BackendError(
            f"OpenVINO {require('openvino').__version__} can't compile '{package.encoder_path(precision)}' "
            f"({_first_line(error)})",
            "Update OpenVINO, or build the package again with this machine's versions",
        ) from error


def _checked_model(core: Any, package: EnginePackage, precision: str) -> Any:
    path = package.encoder_path(precision)
    rebuild = "Build the package again: dapo-edge build RECIPE"
    try:
        # From the very bytes that were verified: a rebuild may replace the file at any moment.
        model = core.read_model(package.encoder_bytes(precision), b"")
        shapes = [[int(side) for side in port.shape] for port in (*model.inputs, *model.outputs)]
    except RuntimeError as error:
        raise PackageDamaged(f"'{path}' is not an encoder ({_first_line(error)})", rebuild) from error
    expected = _shapes_of(package.manifest)
    if shapes != expected:
        raise PackageDamaged(f"the encoder '{path}' has shapes {shapes}, its manifest {expected}", rebuild)
    return with_preprocessing(model, package.manifest.preprocessing)


def with_preprocessing(model: Any, preprocessing: Preprocessing) -> Any:
    """Put layout, colour order and normalisation into an OpenVINO model: its input becomes uint8 BGR [B, S, S, 3]."""
    ov = require("openvino")
    steps = ov.preprocess.PrePostProcessor(model)
    layout = ov.preprocess.ColorFormat
    image = steps.input()
    image.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC")).set_color_format(layout.BGR)
    image.model().set_layout(ov.Layout("NCHW"))
    image.preprocess().convert_element_type(ov.Type.f32).convert_color(layout.RGB)
    image.preprocess().mean([255 * value for value in preprocessing.mean])
    image.preprocess().scale([255 * value for value in preprocessing.std])
    return steps.build()


def _check_int8(backend: OpenVinoBackend, package: EnginePackage) -> None:
    """Judge this CPU's INT8 by the package's reference, once per machine: its sums may saturate where others' do not.

    Without VNNI instructions products are added in 16 bits. Raises `GateError`.
    """
    from dapo_edge import gate
    from dapo_edge.backends.recorded import drift_on_reference

    data = package.reference()
    assert data is not None, "no manifest holds INT8 without it"
    drift = drift_on_reference(package, data, backend, Thresholds())  # too few frames to count flips
    gate.refuse(
        f"INT8 on this CPU ({cpu_name()})",
        gate.broken_repeat(drift, package.report()),
        "Run with --precision fp32 here",
    )


def _check_judged(package: EnginePackage, precision: str) -> None:
    """Refuse what the accuracy gate refused at build time, warn of what it did not look at. Raises `GateError`."""
    from dapo_edge import gate

    judged = package.report().get("precisions", {})
    if precision in judged:
        gate.refuse(
            f"precision {precision} of '{package.path}', when it was built,",
            judged[precision].get("failed", ()),
            f"Run with --precision {package.manifest.precision}",
        )
    elif judged:
        log.warning("the accuracy gate of '%s' did not look at precision %s", package.path, precision)


def _shapes_of(manifest: Manifest) -> list[list[int]]:
    """Input, patch tokens and image embedding, as the manifest says."""
    patches = manifest.map.grid[0] * manifest.map.grid[1]
    return [
        [manifest.batch, 3, manifest.image_size, manifest.image_size],
        [manifest.batch, len(manifest.feature_layers), patches, manifest.dimensions],
        [manifest.batch, manifest.dimensions],
    ]


def fast_float_type() -> str | None:
    """The float type that this CPU computes faster than fp32, e.g. bf16; None without one."""
    return _fast_type(require("openvino").Core())


def _fast_type(core: Any) -> str | None:
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return next((name for capability, name in FAST_TYPES.items() if capability in capabilities), None)


def _float_type(core: Any, precision: str) -> str:
    """What the float operators of a precision compute in."""
    fast = None if precision == "fp32" else _fast_type(core)
    if precision == "fp16" and fast is None:
        raise BackendError(
            "this CPU computes no float type faster than fp32, so precision fp16 can't be had here",
            "Run with --precision fp32, or build the package with precision: fp32",
        )
    return fast or "fp32"


def _precision_of(model: Any) -> str:
    hint = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return next((name for name, ov_name in HINT_OF.items() if ov_name == hint), hint)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
