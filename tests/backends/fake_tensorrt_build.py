"""The building half of the fake `tensorrt` (see fake_tensorrt.py): logger, parser, config, builder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import onnx

MAGIC = b"FAKEPLAN"
ELEMENT_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF"}
LAYER_TYPES = {"Cast": "CAST", "Softmax": "SOFTMAX", "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE"}
HALF = 10


@dataclass
class Control:
    """What a test wants to go wrong, and what it wants to see afterwards."""

    gpu: str = "Fake GPU, compute 8.7"
    parse_error: tuple[str, str] | None = None  # node, text
    builder_fails: bool = False
    build_fails: bool = False
    context_fails: bool = False
    enqueue_fails: bool = False
    build_log: list[tuple[str, str]] = field(default_factory=list)  # severity, text
    steps: int = 3
    step_s: float = 0.0
    fuses_attention: bool = True  # where it is FP16, from TensorRT 10 on
    inspector_text: str | None = None  # instead of a real report
    configs: list[Any] = field(default_factory=list)  # every IBuilderConfig that a build used
    networks: list[Any] = field(default_factory=list)  # every INetworkDefinition that a build used
    network_flags: list[int] = field(default_factory=list)


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    _api: Any
    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError("pure virtual")


class IProgressMonitor:
    _api: Any

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError("pure virtual")

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError("pure virtual")

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError("pure virtual")


class IHostMemory(bytes):
    _api: Any

    @property
    def nbytes(self) -> int:
        return len(self)


class ITimingCache:
    _api: Any

    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> IHostMemory:
        return self._api.IHostMemory(self._content)


class ITensor:
    _api: Any

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        kind = value.type.tensor_type
        self.name: str = value.name
        self.shape = tuple(side.dim_value if side.HasField("dim_value") else -1 for side in kind.shape.dim)
        self.dtype = self._api.DataType[ELEMENT_TYPES[kind.elem_type]]


class ILayer:
    """Of a weakly typed network: in a strongly typed one nobody may touch a layer's precision."""

    _api: Any
    __slots__ = ("_outputs", "_typed", "name", "precision", "type")

    def __init__(self, node: onnx.NodeProto, outputs: list[onnx.ValueInfoProto]) -> None:
        kinds = self._api.LayerType
        self.name, self.type = node.name, kinds[LAYER_TYPES.get(node.op_type, "ELEMENTWISE")]
        self.precision: IntEnum | None = None
        self._outputs = [self._api.ITensor(value) for value in outputs]
        self._typed: dict[int, IntEnum] = {}

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]

    def set_output_type(self, index: int, dtype: IntEnum) -> None:
        self._typed[index] = dtype


class INetworkDefinition:
    _api: Any

    def __init__(self, flags: int) -> None:
        self._flags, self._model = flags, onnx.ModelProto()
        self._layers: list[ILayer] = []

    @property
    def num_inputs(self) -> int:
        return len(self._model.graph.input)

    def get_input(self, index: int) -> ITensor:
        return self._api.ITensor(self._model.graph.input[index])

    @property
    def num_outputs(self) -> int:
        return len(self._model.graph.output)

    def get_output(self, index: int) -> ITensor:
        return self._api.ITensor(self._model.graph.output[index])

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]

    def _take(self, model: onnx.ModelProto) -> None:
        self._model = model
        if hasattr(self._api, "ILayer"):
            graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
            values = {value.name: value for value in (*graph.value_info, *graph.output)}
            self._layers = [self._api.ILayer(node, [values[name] for name in node.output]) for node in graph.node]

    def _has(self, flag: str) -> bool:
        flags = self._api.NetworkDefinitionCreationFlag
        return flag in flags.__members__ and bool(self._flags & 1 << flags[flag])

    def _strongly_typed(self) -> bool:
        return int(self._api.__version__.split(".")[0]) >= 11 or self._has("STRONGLY_TYPED")


class ParserError:
    _api: Any

    def __init__(self, node: str, text: str) -> None:
        self._node, self._text = node, text

    def node(self) -> int:
        return 7

    def desc(self) -> str:
        return self._text


class NamingParserError(ParserError):
    def node_name(self) -> str:
        return self._node


class OnnxParser:
    _api: Any

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        refusal = self._api.control.parse_error or self._refusal(model)
        if refusal:
            self._errors.append(self._api.ParserError(*refusal))
        return refusal is None

    def _refusal(self, content: bytes) -> tuple[str, str] | None:
        try:
            model = onnx.load_from_string(content)
            onnx.checker.check_model(model, full_check=True)  # with types: those of a strongly typed network must fit
        except Exception as error:  # protobuf and the checker raise classes of their own
            return "", f"Failed to parse the ONNX model: {error}"
        eight = self._api.__version__.startswith("8")
        if eight and not self._network._has("EXPLICIT_BATCH"):
            return "", "network flag EXPLICIT_BATCH is required"
        if eight and model.opset_import[0].version > 17:
            return model.graph.node[0].name, "opset is newer than 17"
        if refusal := _quantization_refusal(model.graph, eight):
            return refusal
        self._network._take(model)
        return None


def _quantization_refusal(graph: onnx.GraphProto, eight: bool) -> tuple[str, str] | None:
    """What the parsers demand of Q/DQ: symmetric steps; in 8.6, scales of float32 and no stored integers."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if len(node.input) != 3 or onnx.numpy_helper.to_array(constants[node.input[2]]).any():
                return node.name, "The zero point for the QuantizeLinear/DequantizeLinear operator must be all zeros."
            scale = onnx.numpy_helper.to_array(constants[node.input[1]])
            if not (scale > 0).all() or (eight and scale.dtype != "float32"):
                return node.name, "Scale coefficients must all be positive"
            if eight and node.input[0] in constants and constants[node.input[0]].data_type == onnx.TensorProto.INT8:
                return node.name, f"{node.input[0]}: invalid weights type of Int8"
    return None


class IBuilderConfig:
    _api: Any
    __slots__ = ("_cache", "_flags", "_limits", "_sources", "builder_optimization_level", "profiling_verbosity")

    def __init__(self) -> None:
        self._flags, self._limits = {"TF32"}, {}
        self._sources = sum(1 << source for source in self._api.TacticSource)
        self._cache: ITimingCache | None = None
        self.builder_optimization_level = 3
        self.profiling_verbosity = self._api.ProfilingVerbosity.LAYER_NAMES_ONLY

    def set_flag(self, flag: IntEnum) -> None:
        self._flags.add(self._api.BuilderFlag(flag).name)

    def clear_flag(self, flag: IntEnum) -> None:
        self._flags.discard(self._api.BuilderFlag(flag).name)

    def get_flag(self, flag: IntEnum) -> bool:
        return flag.name in self._flags

    def set_memory_pool_limit(self, pool: IntEnum, pool_size: int) -> None:
        self._limits[pool.name] = pool_size

    def get_memory_pool_limit(self, pool: IntEnum) -> int:
        return self._limits.get(pool.name, 2**40)

    def set_tactic_sources(self, sources: int) -> bool:
        self._sources = sources
        return True

    def get_tactic_sources(self) -> int:
        return self._sources

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return self._api.ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._content and not cache._content.startswith(stamp(self._api)) and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class MonitoredConfig(IBuilderConfig):
    __slots__ = ("progress_monitor",)

    def __init__(self) -> None:
        super().__init__()
        self.progress_monitor: IProgressMonitor | None = None


class Builder:
    _api: Any

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        if self._api.control.builder_fails:
            logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        self._api.control.network_flags.append(flags)
        return self._api.INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return self._api.IBuilderConfig()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        control = self._api.control
        control.configs.append(config)
        control.networks.append(network)
        for severity, text in control.build_log:
            self._logger.log(Severity[severity], text)
        complaint = _complaint(self._api, network, config)
        if complaint:
            self._logger.log(Severity.ERROR, complaint)
        if not self._steps(config) or complaint or control.build_fails:
            return None
        config._cache = self._api.ITimingCache(stamp(self._api) + b"timings")
        detailed = config.profiling_verbosity == self._api.ProfilingVerbosity.DETAILED
        header = {"gpu": control.gpu, "version": self._api.__version__, "detailed": detailed}
        model = network._model.SerializeToString(deterministic=True)
        return self._api.IHostMemory(MAGIC + json.dumps(header).encode() + b"\n" + model)

    def _steps(self, config: IBuilderConfig) -> bool:
        """Work through the phases; False when the monitor stops it."""
        monitor, control = getattr(config, "progress_monitor", None), self._api.control
        go_on = True
        if monitor:
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Timing graph nodes", "Building Engine", control.steps)
        for step in range(control.steps):
            self._logger.log(Severity.VERBOSE, f"Autotuning step {step}")
            time.sleep(control.step_s)
            go_on = not monitor or monitor.step_complete("Timing graph nodes", step)
            if not go_on:
                break
        if monitor:
            monitor.phase_finish("Timing graph nodes")
            monitor.phase_finish("Building Engine")
        peak = "[MemUsageStats] Peak memory usage of TRT CPU/GPU memory allocators: CPU 3 MiB, GPU 64 MiB"
        self._logger.log(Severity.INFO, peak)
        return go_on


def _complaint(api: Any, network: INetworkDefinition, config: IBuilderConfig) -> str | None:
    """What this version refuses to build."""
    graph = network._model.graph
    half = any(tensor.data_type == HALF for tensor in graph.initializer)
    half = half or any(value.type.tensor_type.elem_type == HALF for value in (*graph.input, *graph.output))
    quantized = any(node.op_type == "QuantizeLinear" for node in graph.node)
    if network._strongly_typed():
        if {"FP16", "INT8"} & config._flags:
            return "Error Code 3: API Usage Error (precision flags are not allowed in a strongly typed network)"
        return None
    if half and "FP16" not in config._flags:
        return "Error Code 4: Internal Error (network has FP16 tensors, but the FP16 flag is not set)"
    if quantized and "INT8" not in config._flags:
        return "Error Code 4: Internal Error (network has Q/DQ layers, but the INT8 flag is not set)"
    return None


def stamp(api: Any) -> bytes:
    return f"{api.__version__} {api.control.gpu}\n".encode()
