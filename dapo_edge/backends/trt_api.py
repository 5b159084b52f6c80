"""TensorRT 8.6 to 11 through one code path: build a plan, open it, run it. Only this file and trt_module.py touch it.

Written for the names that all these versions share; the few that came or went are chosen by `TensorRT.major` or by
`hasattr`. A TensorRT object is named after its class (builder, network, layer, parser, config, cache, runtime, engine,
context, inspector), because a test checks every name used here against the real bindings of each version.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from dapo_edge.backends.trt_module import TensorRT, failure, load
from dapo_edge.backends.trt_progress import OnProgress, Progress, in_thread
from dapo_edge.backends.trt_report import Layer, parse_layers
from dapo_edge.errors import BackendError, RecipeError

__all__ = ["BuildOptions", "BuiltPlan", "Engine", "Tensor", "TensorRT", "build_plan", "load", "open_engine"]

PRECISIONS = ("fp32", "fp16", "int8")
LEVELS = range(6)
COMPILE = "Compile it on this device: dapo-edge compile PKG"
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """How to build a plan. Raises `RecipeError` for a value that TensorRT does not know."""

    precision: str  # fp32 (without TF32), fp16 (an ONNX typed float16), int8 (an ONNX with Q/DQ)
    workspace_bytes: int | None = None  # scratch memory that one layer may use; None: the whole device
    optimization_level: int = 3  # 0 builds fastest, 5 looks for the fastest plan longest
    fp32_nodes: tuple[str, ...] = ()  # ONNX nodes that must compute in float32 where others may not

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise RecipeError(f"unknown precision '{self.precision}'", f"Use one of: {', '.join(PRECISIONS)}")
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise RecipeError(f"a workspace of {self.workspace_bytes} bytes holds nothing", "Use more, or leave it out")
        if self.optimization_level not in LEVELS:
            raise RecipeError(f"unknown optimization level {self.optimization_level}", "Use a level from 0 to 5")


@dataclass(frozen=True)
class BuiltPlan:
    """A plan and what is known about its making."""

    plan: bytes
    timing_cache: bytes
    layers: tuple[Layer, ...]  # empty when the plan does not tell
    seconds: float
    peak_device_bytes: int | None  # the most GPU memory that TensorRT held meanwhile, if it said so


@dataclass(frozen=True)
class Tensor:
    """An input or output of a plan. `dtype` is NumPy's name for the type: float16, float32, uint8, ..."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_input: bool


def build_plan(
    trt: TensorRT,
    onnx_bytes: bytes,
    options: BuildOptions,
    timing_cache: bytes | None = None,
    on_progress: OnProgress | None = None,
) -> BuiltPlan:
    """Build a plan from an ONNX model with static shapes. Minutes; `on_progress` is called on this thread.

    Ctrl-C cancels the build at its next step (TensorRT 8.6 can't: there the build ends first; a second Ctrl-C does not
    wait). A timing cache of another device or version is ignored with a warning.
    Raises `BackendError` with TensorRT's own words for a model that it can't parse or build, and for too little memory.
    """
    trt.log.clear()
    progress = Progress(trt.log)
    plan, cache, seconds = in_thread(
        lambda: _build(trt, onnx_bytes, options, timing_cache or b"", progress), progress, on_progress
    )
    peak = trt.log.peak_device_bytes
    return BuiltPlan(plan, cache, _layers_of(trt, plan), seconds, peak)


def _layers_of(trt: TensorRT, plan: bytes) -> tuple[Layer, ...]:
    try:
        with _opened(trt, plan, with_context=False) as opened:
            return opened.layers()
    except BackendError as error:  # whoever runs the plan meets this again; minutes of building are not thrown away
        log.warning("the new plan's layers stay unknown: %s", error)
        return ()


def _build(
    trt: TensorRT, onnx_bytes: bytes, options: BuildOptions, timing_cache: bytes, progress: Progress
) -> tuple[bytes, bytes, float]:
    api = trt.module
    try:
        builder = api.Builder(trt.logger)
    except TypeError as error:  # how the bindings say that the C++ function returned nothing
        raise failure(trt, "can't start", "Check the driver and other programs on the GPU: dapo-edge doctor") from error
    if trt.major < 10:
        flags = 1 << int(api.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    elif trt.major == 10:
        flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    else:
        flags = 0  # every network is strongly typed
    network = builder.create_network(flags)
    # The network's weights lie in the parser: it must live until the plan is built.
    parser = api.OnnxParser(network, trt.logger)
    _parse(trt, parser, onnx_bytes)
    _refuse_dynamic(network)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    _type_weakly(trt, network, config, options)
    _use_timing_cache(config, timing_cache)
    if hasattr(config, "progress_monitor"):
        monitor = _make_monitor(api, progress)  # must live as long as the build
        config.progress_monitor = monitor
        progress.monitored = True
    progress.stop_if_cancelled()
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    progress.stop_if_cancelled()
    if plan is None:
        remedy = "Update TensorRT, or build the package again with another precision"
        raise failure(trt, "can't build a plan from the encoder", remedy, options.workspace_bytes)
    seconds = time.perf_counter() - started
    cache = config.get_timing_cache()
    return bytes(plan), bytes(cache.serialize()), seconds


def _parse(trt: TensorRT, parser: Any, onnx_bytes: bytes) -> None:
    if parser.parse(onnx_bytes):
        return
    errors = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = error.node_name() if hasattr(error, "node_name") else f"number {error.node()}"
        errors.append(f"node {node or '?'}: {error.desc()}")
    raise BackendError(
        f"TensorRT {trt.version} can't parse the encoder ({'; '.join(errors[:3]) or trt.log.cause()})",
        "Build the package again with this version of dapo-edge, or update TensorRT",
    )


def _refuse_dynamic(network: Any) -> None:
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if any(side < 0 for side in tensor.shape):
            raise BackendError(
                f"the encoder's input '{tensor.name}' has the dynamic shape {tuple(tensor.shape)}",
                "Build the package with dapo-edge build, which writes static shapes",
            )


def _configure(trt: TensorRT, config: Any, options: BuildOptions) -> None:
    api = trt.module
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    if options.precision == "fp32":
        config.clear_flag(api.BuilderFlag.TF32)  # its 10 bits of mantissa are not what fp32 promises


def _type_weakly(trt: TensorRT, network: Any, config: Any, options: BuildOptions) -> None:
    """Before 10 the ONNX types are mere hints: flags allow the lower precisions, and layers are pinned to float32."""
    if trt.major >= 10:
        return
    api = trt.module
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    if options.precision != "fp32" or any(tensor.dtype == api.DataType.HALF for tensor in outputs):
        config.set_flag(api.BuilderFlag.FP16)
    if options.precision == "int8":
        config.set_flag(api.BuilderFlag.INT8)
    _pin_to_fp32(trt, network, config, options)
    # The others look for cuBLAS and cuDNN, which TensorRT 8.6 does without in transformers.
    jit, edge = api.TacticSource.JIT_CONVOLUTIONS, api.TacticSource.EDGE_MASK_CONVOLUTIONS
    config.set_tactic_sources(1 << int(jit) | 1 << int(edge))


def _pin_to_fp32(trt: TensorRT, network: Any, config: Any, options: BuildOptions) -> None:
    if trt.major >= 10 or (options.precision != "fp32" and not options.fp32_nodes):
        return
    api = trt.module
    config.set_flag(api.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    floats = (api.DataType.FLOAT, api.DataType.HALF)
    free = (api.LayerType.CAST, api.LayerType.CONSTANT, api.LayerType.QUANTIZE, api.LayerType.DEQUANTIZE)
    nodes = frozenset(options.fp32_nodes)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        # The parser names a node's second layer "node_1": pinning a namesake beside it costs little.
        wanted = options.precision == "fp32" or layer.name in nodes or re.sub(r"_\d+$", "", layer.name) in nodes
        outputs = range(layer.num_outputs)
        if wanted and layer.type not in free and all(layer.get_output(i).dtype in floats for i in outputs):
            layer.precision = api.DataType.FLOAT
            for i in outputs:
                layer.set_output_type(i, api.DataType.FLOAT)


def _use_timing_cache(config: Any, content: bytes) -> None:
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        log.warning("the timing cache is of another device or TensorRT: this build measures everything anew")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)


class Engine:
    """A plan that is ready to run. Whoever opens it closes it; tensors keep their addresses until set anew."""

    def __init__(self, trt: TensorRT, runtime: Any, engine: Any, context: Any) -> None:
        self._trt = trt
        self._runtime = runtime
        self._engine = engine
        self._context = context
        self.tensors = {tensor.name: tensor for tensor in _tensors(trt, engine)}

    @property
    def device_memory_bytes(self) -> int:
        """GPU memory for activations, beside the weights."""
        engine = self._engine
        return int(
            engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
        )

    def set_address(self, name: str, address: int) -> None:
        """Give tensor `name` its device memory. It must stay valid until the next `set_address` or `close`."""
        context = self._open_context()
        if not context.set_tensor_address(name, address):
            raise failure(self._trt, f"refuses memory for the tensor '{name}'", COMPILE)

    def enqueue(self, stream_handle: int) -> None:
        """Run on a CUDA stream (its handle as an integer, not the default stream); returns before the work is done."""
        context = self._open_context()
        if not context.execute_async_v3(stream_handle):
            raise failure(self._trt, "failed to run the plan", "Check the GPU's memory and health: dapo-edge doctor")

    def layers(self) -> tuple[Layer, ...]:
        """What the plan's layers are, as far as it tells."""
        api = self._trt.module
        inspector = self._engine.create_engine_inspector()
        return parse_layers(inspector.get_engine_information(api.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Give everything back, in the order that TensorRT wants."""
        self._context = None
        self._engine = None
        self._runtime = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open_context(self) -> Any:
        if self._context is None:
            raise BackendError("this engine is closed", "Open it again")
        return self._context


def open_engine(trt: TensorRT, plan: bytes) -> Engine:
    """Make a plan ready to run. A plan is executable code: the caller has checked where it comes from.

    Raises `BackendError` with TensorRT's own words when it refuses the plan or has too little memory.
    """
    return _opened(trt, plan, with_context=True)


def _opened(trt: TensorRT, plan: bytes, *, with_context: bool) -> Engine:
    trt.log.clear()
    api = trt.module
    runtime = api.Runtime(trt.logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise failure(trt, "refuses the plan", COMPILE)
    context = engine.create_execution_context() if with_context else None
    if with_context and context is None:
        raise failure(trt, "can't make the plan ready to run", COMPILE)
    return Engine(trt, runtime, engine, context)


def _tensors(trt: TensorRT, engine: Any) -> list[Tensor]:
    api = trt.module
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name).name
        if dtype not in DTYPES:
            raise BackendError(f"the plan's tensor '{name}' has the type {dtype}, which has no NumPy twin", COMPILE)
        is_input = engine.get_tensor_mode(name) == api.TensorIOMode.INPUT
        tensors.append(Tensor(name, tuple(engine.get_tensor_shape(name)), DTYPES[dtype], is_input))
    return tensors


def _make_monitor(api: Any, progress: Progress) -> Any:
    """The trt.IProgressMonitor that fills `progress`; None before TensorRT 10, which has no such thing."""
    if hasattr(api, "IProgressMonitor"):

        class Monitor(api.IProgressMonitor):
            def __init__(self) -> None:
                api.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                progress.start(phase_name, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                return progress.step(phase_name, step)

            def phase_finish(self, phase_name: str) -> None:
                progress.finish(phase_name)

        return Monitor()
    return None
