"""TensorRT on a GPU: the encoder as a plan compiled on this device, pre- and post-processing in own CUDA kernels."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from dapo_edge import targets
from dapo_edge.backends import trt_api
from dapo_edge.backends.base import MapBatch, MapSize, View, check_bank, map_pixels
from dapo_edge.backends.buffers import Buffers
from dapo_edge.backends.cuda import Cuda, Kernels, PinnedBuffer
from dapo_edge.backends.frame_path import STAGES, FramePath, MapResult
from dapo_edge.backends.view_input import Shared, ViewInput, ViewShape
from dapo_edge.errors import BackendError, PackageDamaged, RecipeError
from dapo_edge.kernels import launch, reference
from dapo_edge.kernels.compile import compile_kernels, source_digest
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.package import EnginePackage, Manifest
from dapo_edge.prompt_bank import PromptBank

INPUT, TOKENS, EMBEDDING = "image", "patch_tokens", "image_embedding"
GRAPH_VARIABLE = "DAPO_EDGE_CUDA_GRAPH"  # "off": plain launches, named in every result

log = logging.getLogger(__name__)
MAX_PATH_BYTES = 1 << 30  # of host and GPU, for the kinds of batches (sizes, formats) whose buffers and graphs are kept


class TensorRtBackend:
    """Runs a package on this machine's GPU, from one of its compiled targets."""

    name = "tensorrt"
    concurrency = 1  # one context, one stream
    takes_camera_bytes = True

    def __init__(
        self, package: EnginePackage, cuda: Cuda, cubin: bytes, plan: bytes, *, map_size: MapSize, precision: str
    ) -> None:
        """Load a plan and kernels onto an opened GPU, which then belongs to this backend."""
        manifest = package.manifest
        check_limits(manifest, package.bank())
        self._manifest, self._cuda, self._map_size = manifest, cuda, map_size
        self._paths: OrderedDict[tuple[object, ...], FramePath] = OrderedDict()
        self._closing = contextlib.ExitStack()
        self._gave_up = False
        self._with_graph = _graph_wanted()
        self.precision = precision
        try:
            trt = trt_api.load()
            self.device = f"{cuda.gpu.name}, TensorRT {trt.version}"
            if not self._with_graph:
                self.device += ", plain launches"
            with cuda.active():
                engine = self._closing.enter_context(trt_api.open_engine(trt, plan))
                _check_tensors(engine, manifest)
                kernels = cuda.load_kernels(cubin)
                self._shared = _shared(cuda, kernels, engine, manifest)
                self._host_bank = cuda.pinned(self._shared.bank.nbytes)
            self.set_bank(package.bank())
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls, package: EnginePackage, *, map_size: MapSize, precision: str | None = None, throughput: bool = False
    ) -> Self:
        """Load the target that fits this device: of `precision`, else of the package's own.

        Raises `PackageIncompatible` when none fits, `BackendError` without a GPU and `DependencyMissing` without
        pycuda or TensorRT.
        """
        cuda = Cuda.open()
        try:
            trt_api.load()
            found = targets.best(package, targets.fingerprint_here(), precision)
            cubin = _kernels(found, cuda)
            plan = targets.read_plan(found.folder, found.target)
            return cls(package, cuda, cubin, plan, map_size=map_size, precision=found.target.precision)
        except BaseException:
            cuda.close()
            raise

    def infer(self, views: Sequence[View], *, map_size: MapSize | None = None) -> MapBatch:
        """Inspect views of any size and pixel format. Views beyond the plan's batch size take several calls."""
        manifest, bank = self._manifest, self.bank
        views = _trimmed(views)
        size = map_pixels(map_size or self._map_size, manifest.image_size, views)
        with self._cuda.active():
            results = [self._path(chunk, size).run(chunk, len(bank.names)) for chunk in _chunks(views, manifest.batch)]
        embedding = np.concatenate([result.embedding for result in results])
        return MapBatch(
            anomaly=np.concatenate([result.anomaly for result in results]),
            types=np.concatenate([result.types for result in results]),
            patch_probs=np.concatenate([result.probs for result in results]).reshape(
                len(views), len(bank.names), *manifest.map.grid
            ),
            type_scores=np.concatenate([result.peaks[:, 1:] for result in results]),
            image_scores=self._scores(results, embedding, bank),
            bank=bank,
            stage_ms={stage: sum(result.stage_ms[stage] for result in results) for stage in STAGES},
        )

    def encode(self, views: Sequence[View]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Patch tokens [B, L, N, D] and image embeddings [B, D], the caller's own: what the accuracy gate compares."""
        with self._cuda.active():
            parts = [self._encode_chunk(chunk) for chunk in _chunks(_trimmed(views), self._manifest.batch)]
        return np.concatenate([tokens for tokens, _ in parts]), np.concatenate([row for _, row in parts])

    def preprocessed(self, views: Sequence[View]) -> NDArray[np.float32]:
        """What the encoder is given for a batch of views at most, [B, 3, S, S]: what the kernels' check compares."""
        manifest, shared = self._manifest, self._shared
        shape = (manifest.batch, 3, manifest.image_size, manifest.image_size)
        with self._cuda.active(), self._prepared(views, shared.images.nbytes) as host:
            self._cuda.download(host.array, shared.images.address)
            self._cuda.synchronise()
            images = host.array.view(np.float16 if shared.images_are_half else np.float32).reshape(shape)
            return images[: len(views)].astype(np.float32)

    def set_bank(self, bank: PromptBank) -> None:
        """Use another bank from the next call on. Graphs read it from where it always lies: none is captured again."""
        check_bank(bank, self._manifest.dimensions)
        check_limits(self._manifest, bank)
        content = launch.bank_bytes(bank.rows, self._manifest.map.temperature)
        with self._cuda.active():
            self._host_bank.array[: len(content)] = np.frombuffer(content, np.uint8)
            self._cuda.upload(self._shared.bank.address, self._host_bank.array)
            self._cuda.synchronise()
        self.bank = bank

    def close(self) -> None:
        """Free graphs, buffers, engine and GPU. Never raises."""
        with contextlib.suppress(BackendError), self._cuda.active():
            for path in self._paths.values():
                with contextlib.suppress(Exception):
                    path.close()
            with contextlib.suppress(Exception):
                self._closing.close()
        self._paths.clear()
        self._closing.close()  # TensorRT's objects must go before the context that they live in
        self._cuda.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _path(self, views: Sequence[View], map_size: tuple[int, int]) -> FramePath:
        """The buffers and the graph for such a batch; those that were not used for longest make room."""
        shapes = tuple(ViewShape.of(view) for view in views)
        key = (shapes, map_size)
        path = self._paths.get(key)
        if path is None:
            self._make_room()
            path = FramePath(self._shared, shapes, map_size, with_graph=self._with_graph)
            self._paths[key] = path
        self._paths.move_to_end(key)
        return path

    def _make_room(self) -> None:
        """Give up the buffers that were not used for longest, beyond the limit."""
        while sum(path.nbytes for path in self._paths.values()) > MAX_PATH_BYTES:
            if not self._gave_up:
                log.warning("frames of so many sizes that buffers and graphs are made again and again: each costs time")
            self._gave_up = True
            self._paths.popitem(last=False)[1].close()

    def _encode_chunk(self, views: Sequence[View]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        shared, manifest, count = self._shared, self._manifest, len(views)
        with self._prepared(views, shared.tokens.nbytes) as host_tokens:
            shared.engine.enqueue(self._cuda.stream_handle)
            self._cuda.download(host_tokens.array, shared.tokens.address)
            self._cuda.download(shared.host_embedding.array, shared.embedding.address)
            self._cuda.synchronise()
            tokens = host_tokens.array.view(np.float16).reshape(manifest.batch, *_token_shape(manifest))
            embedding = shared.host_embedding.array.view(np.float32).reshape(manifest.batch, manifest.dimensions)
            return tokens[:count].astype(np.float32), embedding[:count].copy()

    @contextlib.contextmanager
    def _prepared(self, views: Sequence[View], nbytes: int) -> Iterator[PinnedBuffer]:
        """The encoder's input holds the views; for what comes of them, `nbytes` of host memory for a while."""
        with contextlib.ExitStack() as held:
            buffers = Buffers(self._cuda)
            held.callback(buffers.close)
            host = buffers.pin(nbytes)
            view_input = ViewInput(self._shared, tuple(ViewShape.of(view) for view in views))
            held.callback(view_input.close)
            view_input.fill(views)
            view_input.upload()
            view_input.preprocess()
            yield host

    def _scores(
        self, results: Sequence[MapResult], embedding: NDArray[np.float32], bank: PromptBank
    ) -> NDArray[np.float32]:
        spec = self._manifest.map
        if spec.score == "image":
            return reference.image_score(embedding, bank.rows, spec.temperature)
        if spec.score == "max":
            return np.concatenate([result.highest for result in results])
        return np.concatenate([result.top for result in results if result.top is not None])


def _graph_wanted() -> bool:
    value = os.environ.get(GRAPH_VARIABLE, "on").lower()
    if value not in ("on", "off"):
        raise RecipeError(f"{GRAPH_VARIABLE} is '{value}'", "Set it to on or off, or leave it out")
    return value == "on"


def check_limits(manifest: Manifest, bank: PromptBank) -> None:
    """Refuse what the kernels can't hold. Raises `RecipeError`."""
    launch.check_limits(
        channels=len(bank.names),
        layers=len(manifest.feature_layers),
        dimensions=manifest.dimensions,
        patches=manifest.map.grid[0] * manifest.map.grid[1],
        batch=manifest.batch,
    )


def _kernels(found: targets.LoadableTarget, cuda: Cuda) -> bytes:
    """The target's kernels, or those of this dapo-edge's own source when it has changed since."""
    if found.target.kernels.source_sha256 == source_digest():
        return targets.read_file(found.folder, found.target, targets.KERNELS)
    return compile_kernels(cuda.sm, driver_cuda=cuda.driver_cuda).data


def _shared(cuda: Cuda, kernels: Kernels, engine: trt_api.Engine, manifest: Manifest) -> Shared:
    """Allocate what all paths use, and give the plan's tensors their places."""
    batch, size, dimensions = manifest.batch, manifest.image_size, manifest.dimensions
    half = engine.tensors[INPUT].dtype == "float16"
    probs_bytes = 4 * batch * launch.MAX_CHANNELS * _token_shape(manifest)[1]
    bank_bytes = len(launch.bank_bytes(np.zeros((1, dimensions), np.float32), 1.0))
    shared = Shared(
        cuda=cuda,
        kernels=kernels,
        engine=engine,
        manifest=manifest,
        images=cuda.allocate((2 if half else 4) * batch * 3 * size * size, "the encoder's input"),
        images_are_half=half,
        tokens=cuda.allocate(2 * batch * int(np.prod(_token_shape(manifest))), "patch tokens"),
        embedding=cuda.allocate(4 * batch * dimensions, "image embeddings"),
        probs=cuda.allocate(probs_bytes, "patch probabilities"),
        bank=cuda.allocate(bank_bytes, "the prompt bank"),
        host_probs=cuda.pinned(probs_bytes),
        host_embedding=cuda.pinned(4 * batch * dimensions),
    )
    for name, buffer in ((INPUT, shared.images), (TOKENS, shared.tokens), (EMBEDDING, shared.embedding)):
        engine.set_address(name, buffer.address)
    return shared


def _check_tensors(engine: trt_api.Engine, manifest: Manifest) -> None:
    batch, size = manifest.batch, manifest.image_size
    expected = {
        INPUT: ((batch, 3, size, size), ("float16", "float32")),
        TOKENS: ((batch, *_token_shape(manifest)), ("float16",)),
        EMBEDDING: ((batch, manifest.dimensions), ("float32",)),
    }
    found = engine.tensors
    if set(found) != set(expected) or any(
        found[name].shape != shape or found[name].dtype not in dtypes for name, (shape, dtypes) in expected.items()
    ):
        described = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in found.items())
        raise PackageDamaged(f"the plan's tensors are not this package's: {described}", trt_api.COMPILE)


def _token_shape(manifest: Manifest) -> tuple[int, int, int]:
    return len(manifest.feature_layers), manifest.map.grid[0] * manifest.map.grid[1], manifest.dimensions


def _trimmed(views: Sequence[View]) -> list[View]:
    """Views over no more bytes than they show: those are copied."""
    return [view.trimmed() if isinstance(view, PixelView) else view for view in views]


def _chunks(views: Sequence[View], batch: int) -> list[Sequence[View]]:
    return [views[start : start + batch] for start in range(0, len(views), batch)]
