"""The contenders of a CPU: torch, ONNX Runtime, OpenVINO as its documentation shows it, and our package.

All but ours run inside the pipeline of `usual.py`. Heavy imports are in the functions: each process needs its own only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer_spec import Loaded, Spec

from dapo_edge import Inspector, __version__
from dapo_edge.extras import require
from dapo_edge.package import EnginePackage
from dapo_edge.prompt_bank import PromptBank

if TYPE_CHECKING:
    from torch import Tensor, nn

QUICK_LOOK = 5  # encodings that decide which of two ways to BF16 a torch contender takes
# Of torch around an encoder with threads of its own. As many as cores again, and both pools spin against each other
# on the same cores: people would see it and mend it, and our figures must not live from it.
THREADS_AROUND = 1
AROUND = f"torch around the encoder has {THREADS_AROUND} thread: it would be in the way of the encoder's own"


def versions(*names: str) -> dict[str, str]:
    """Installed versions by the names of their distributions."""
    return {name: metadata.version(name) for name in names}


def opened(spec: Spec) -> tuple[EnginePackage, PromptBank]:
    """The package and the bank that every contender looks for."""
    return EnginePackage.open(spec.package), PromptBank.read(spec.bank)


def method_module(package: EnginePackage) -> nn.Module:
    """The package's method in torch, with the very weights of its encoder. float32, nothing learns."""
    import torch

    from dapo_edge.config import packaged_recipe
    from dapo_edge.models.method import method_of

    method = method_of(packaged_recipe(package.manifest.recipe))
    assert isinstance(method, torch.nn.Module)
    return method.requires_grad_(False)


def eager(spec: Spec) -> Loaded:
    """torch as it is."""
    return _torch(spec, lambda model: model, ())


def compiled(spec: Spec) -> Loaded:
    """torch.compile with frozen weights, which torch's documentation advises for inference on CPUs."""
    import torch
    from torch._inductor import config

    config.freezing = True
    return _torch(spec, torch.compile, ("torch.compile, default mode, weights frozen (TORCHINDUCTOR_FREEZING)",))


def _torch(spec: Spec, ready: Callable[[nn.Module], Any], notes: tuple[str, ...]) -> Loaded:
    import torch
    from usual import Usual

    torch.set_num_threads(spec.threads)
    package, bank = opened(spec)
    model = method_module(package)
    encode: Callable[[Tensor], Tensor]
    if spec.precision == "bf16":
        encode, note = _faster_bf16(package, model, ready)
        notes = (*notes, note)
    else:
        run = ready(model)

        def encode(image: Tensor) -> Tensor:
            return run(image)[0]

    return Loaded(Usual(package.manifest, bank).around(encode), spec.precision, versions("torch"), notes)


def _faster_bf16(
    package: EnginePackage, model: nn.Module, ready: Callable[[nn.Module], Any]
) -> tuple[Callable[[Tensor], Tensor], str]:
    """Autocast or a converted model: people would take whichever is faster on their machine, in eager mode."""
    import torch

    size = package.manifest.image_size
    image = torch.zeros(1, 3, size, size)

    def autocast(run: Any) -> Callable[[Tensor], Tensor]:
        def encode(image: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(image)[0]

        return encode

    def converted(run: Any) -> Callable[[Tensor], Tensor]:
        return lambda image: run(image.bfloat16())[0]

    autocast_ms = _quick_ms(autocast(model), image)
    model.bfloat16()  # in place: two copies of a ViT-L would be too many
    converted_ms = _quick_ms(converted(model), image)
    note = f"eager encoder by autocast {autocast_ms:.0f} ms, by model.bfloat16() {converted_ms:.0f} ms: the faster"
    if converted_ms <= autocast_ms:
        return converted(ready(model)), note
    del model
    return autocast(ready(method_module(package))), note


def _quick_ms(encode: Callable[[Tensor], Tensor], image: Tensor) -> float:
    import torch

    timings = []
    with torch.inference_mode():
        for _ in range(1 + QUICK_LOOK):
            started = time.perf_counter()
            encode(image)
            timings.append((time.perf_counter() - started) * 1e3)
    return statistics.median(timings[1:])


def onnxruntime(spec: Spec) -> Loaded:
    """Our exported encoder: float, or INT8 with our Q/DQ (precision "int8-qdq") or ORT's own ("int8-dynamic")."""
    import torch

    torch.set_num_threads(THREADS_AROUND)
    package, _ = opened(spec)
    if spec.precision == "int8-dynamic":
        path = _dynamically_quantized(package, Path(spec.cache))
    else:
        path = package.encoder_path("int8" if spec.precision == "int8-qdq" else "fp32")
    return onnxruntime_session(spec, path, "CPUExecutionProvider", (AROUND,))


def onnxruntime_session(spec: Spec, path: Path, provider: str, notes: tuple[str, ...] = ()) -> Loaded:
    """All graph optimisations, one thread per core. Raises `DependencyMissing` where the provider is not there."""
    ort = require("onnxruntime")
    import torch
    from usual import Usual

    from dapo_edge.errors import DependencyMissing

    package, bank = opened(spec)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = spec.threads
    # A provider that does not load is left out by ONNX Runtime with a warning: both lists have to be looked at.
    session = None
    if provider in ort.get_available_providers():
        session = ort.InferenceSession(str(path), options, providers=[provider])
    if session is None or session.get_providers()[0] != provider:
        raise DependencyMissing(f"this ONNX Runtime has no {provider}", "Install a build that has it")
    name = session.get_inputs()[0].name

    def encode(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["patch_tokens"], {name: image.numpy()})[0])

    about = {"onnxruntime": ort.__version__}
    return Loaded(Usual(package.manifest, bank).around(encode), spec.precision.partition("-")[0], about, notes)


def _dynamically_quantized(package: EnginePackage, cache: Path) -> Path:
    """What ONNX Runtime's documentation tells people to do for a transformer: preprocess, then quantize_dynamic."""
    require("onnxruntime")
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = cache / f"{package.encoder_sha256()[:16]}.dynamic.onnx"
    if not path.exists():
        prepared, beside = path.with_suffix(".prepared"), path.with_suffix(".part")
        quant_pre_process(str(package.encoder_path()), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(prepared, beside)
        prepared.unlink()
        beside.replace(path)
    return path


def openvino(spec: Spec) -> Loaded:
    """`core.compile_model` with the latency hint and nothing else: the float type is OpenVINO's own choice."""
    import openvino as ov
    import torch
    from usual import Usual

    from dapo_edge.backends.openvino import HINT_OF

    torch.set_num_threads(THREADS_AROUND)
    package, bank = opened(spec)
    model = ov.Core().compile_model(str(package.encoder_path()), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    hint = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    runs_as = next((name for name, ov_name in HINT_OF.items() if ov_name == hint), hint)

    def encode(image: Tensor) -> Tensor:
        return torch.from_numpy(model(image.numpy())["patch_tokens"])

    return Loaded(Usual(package.manifest, bank).around(encode), runs_as, versions("openvino"), (AROUND,))


def ours(spec: Spec) -> Loaded:
    """Our package on its CPU backend. Raises what opening it raises: no INT8 inside, no fast float type here ..."""
    from dapo_edge.backends.openvino import OpenVinoBackend

    package, bank = opened(spec)
    # Without the cache nobody asks whether a gate has seen the precision: it is here for its speed.
    backend = OpenVinoBackend.open(package, map_size="model", precision=spec.precision, cache=False)
    return inspecting(Inspector.on(package, backend, map_size="model"), bank, "openvino")


def inspecting(engine: Inspector, bank: PromptBank, runtime: str) -> Loaded:
    """Our runtime, with the bank that all contenders have."""
    engine.set_bank(bank)

    def inspect(frame: Any) -> tuple[Any, Any]:
        found = engine.inspect(frame)
        return found.anomaly_map, found.type_map

    about = {"dapo-edge": __version__, **versions(runtime)}
    return Loaded(inspect, engine.backend.precision, about)
