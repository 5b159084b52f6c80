"""The contenders of an NVIDIA GPU. The torch ones compute everything there, by what `gpu_peers.py` has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from peer_models import inspecting, method_module, onnxruntime_session, opened, versions
from peer_spec import Loaded, Spec

from dapo_edge import Inspector
from dapo_edge.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor

# gpu_peers.py stands on the GPU tests' driver.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "gpu"))

GRAPH_WARM = 3  # runs before a capture: torch's libraries allocate at their first ones

Step = Callable[["Tensor"], tuple["Tensor", "Tensor"]]  # frames [1, H, W, 3] u8 → anomaly and type maps [1, S, S]


def eager(spec: Spec) -> Loaded:
    """torch in FP16, launch by launch."""
    return _torch(spec, lambda model: model)


def compiled(spec: Spec) -> Loaded:
    """torch.compile in FP16, which makes CUDA graphs by itself in this mode."""
    import torch

    return _torch(spec, lambda model: torch.compile(model, mode="max-autotune"))


def graph(spec: Spec) -> Loaded:
    """Eager FP16 from uploaded frame to maps, captured once and replayed as a CUDA graph."""
    loaded, step = _torch_step(spec, lambda model: model)
    captured: dict[tuple[int, ...], Any] = {}

    def inspect(frame: NDArray[np.uint8]) -> tuple[Any, Any]:
        if frame.shape not in captured:
            captured[frame.shape] = _captured(step, frame)
        frames, replay, maps = captured[frame.shape]
        frames.copy_(_as_batch(frame))
        replay()
        return _on_host(maps)

    return Loaded(inspect, loaded.runs_as, loaded.versions)


def onnxruntime(spec: Spec) -> Loaded:
    """ONNX Runtime on CUDA, with the usual pipeline around it on the host."""
    import torch

    torch.set_num_threads(spec.threads)
    package, _ = opened(spec)
    return onnxruntime_session(spec, package.encoder_path(), "CUDAExecutionProvider")


def ours(spec: Spec) -> Loaded:
    """Our package through TensorRT; it needs a target for this GPU: dapo-edge compile PKG."""
    package, bank = opened(spec)
    engine = Inspector(package, backend="tensorrt", precision=spec.precision, map_size="model")
    return inspecting(engine, bank, "tensorrt")


def _torch(spec: Spec, ready: Callable[[Any], Any]) -> Loaded:
    return _torch_step(spec, ready)[0]


def _torch_step(spec: Spec, ready: Callable[[Any], Any]) -> tuple[Loaded, Step]:
    import torch
    from gpu_peers import usual_postprocess, usual_preprocess

    package, bank = opened(spec)
    place = _place()
    half = torch.float16 if place == "cuda" else torch.float32  # a CPU lacks FP16 kernels in many operators
    model = ready(method_module(package).to(place, half))
    pixels, maps = package.manifest.preprocessing, package.manifest.map
    mean, std = (torch.tensor(values, dtype=half, device=place) for values in (pixels.mean, pixels.std))
    rows, size = torch.from_numpy(bank.rows).to(place, half), package.manifest.image_size

    @torch.inference_mode()
    def step(frames: Tensor) -> tuple[Tensor, Tensor]:
        tokens, _ = model(usual_preprocess(frames, size, mean, std))
        return usual_postprocess(tokens, rows, maps.temperature, maps.grid, (size, size), maps.smoothing_px)

    def inspect(frame: NDArray[np.uint8]) -> tuple[Any, Any]:
        return _on_host(step(_as_batch(frame).to(place)))

    return Loaded(inspect, "fp16" if place == "cuda" else "fp32", versions("torch")), step


def _captured(step: Step, frame: NDArray[np.uint8]) -> tuple[Tensor, Callable[[], None], tuple[Tensor, Tensor]]:
    """The graph's input, what replays it, and its outputs."""
    import torch

    frames = _as_batch(frame).to("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARM):
            step(frames)
    torch.cuda.current_stream().wait_stream(side)
    cuda_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cuda_graph):
        maps = step(frames)
    return frames, cuda_graph.replay, maps


def _as_batch(frame: NDArray[np.uint8]) -> Tensor:
    import torch

    return torch.from_numpy(frame)[None]


def _on_host(maps: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    anomaly, types = maps
    return anomaly[0].float().cpu().numpy(), types[0].cpu().numpy()


def _place() -> str:
    import torch

    if not torch.cuda.is_available():
        raise BackendError("this torch sees no GPU", "Run it by a Python whose torch has CUDA")
    return "cuda"
