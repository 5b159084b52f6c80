"""A `tensorrt` for machines without a GPU: OpenVINO computes, device memory is host memory, a plan is the ONNX itself.

`make(8)`, `make(10)` and `make(11)` are TensorRT 8.6.1, 10.3.0 and 11.4.0: each has the names that dapo-edge needs and
its version really has (a test compares them with the real bindings), and refuses what that version refuses. What goes
wrong on demand is set in `module.control`. `install(make(10), monkeypatch)` puts one where `import tensorrt` finds it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt_build import (
    HALF,
    MAGIC,
    Builder,
    Control,
    IBuilderConfig,
    IHostMemory,
    ILayer,
    ILogger,
    INetworkDefinition,
    IProgressMonitor,
    ITensor,
    ITimingCache,
    MonitoredConfig,
    NamingParserError,
    OnnxParser,
    ParserError,
    Severity,
)
from numpy.typing import NDArray

VERSIONS = {8: "8.6.1", 10: "10.3.0", 11: "11.4.0"}

# When set, an enqueue hands over (stream handle, what to run) instead of running at once: a fake driver records it.
on_enqueue: Callable[[int, Callable[[], None]], None] | None = None

# The numbers differ between versions as they really do: who writes a number instead of a name is found out.
NETWORK_FLAGS = {8: {"EXPLICIT_BATCH": 0}, 10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 11: {"STRONGLY_TYPED": 0}}
PRECISION_FLAGS = {"FP16": 0, "INT8": 1, "OBEY_PRECISION_CONSTRAINTS": 10}
BUILDER_FLAGS = {8: {**PRECISION_FLAGS, "TF32": 7}, 10: {**PRECISION_FLAGS, "TF32": 6}, 11: {"TF32": 4}}
LAYERS = ("CAST", "CONSTANT", "DEQUANTIZE", "ELEMENTWISE", "QUANTIZE", "SOFTMAX")
CONVOLUTIONS = {"EDGE_MASK_CONVOLUTIONS": 3, "JIT_CONVOLUTIONS": 4}
LIBRARIES = {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2}
DTYPES = {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "BOOL": 4, "UINT8": 5}
NUMPY_OF = {"FLOAT": "f4", "HALF": "f2", "INT8": "i1", "INT32": "i4", "BOOL": "?", "UINT8": "u1", "INT64": "i8"}


class Runtime:
    _api: Any

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        content = bytes(serialized_engine)
        head, _, model = content.removeprefix(MAGIC).partition(b"\n")
        if not content.startswith(MAGIC):
            return self._refuse("Error Code 1: Serialization (Magic tag does not match)")
        header = json.loads(head)
        if header["version"] != self._api.__version__:
            return self._refuse("Error Code 1: Serialization (Version tag does not match)")
        if header["gpu"] != self._api.control.gpu:
            return self._refuse("The engine plan file is generated on an incompatible device, please rebuild.")
        return self._api.ICudaEngine(model, header["detailed"], self._logger)

    def _refuse(self, text: str) -> None:
        self._logger.log(Severity.ERROR, text)
        self._logger.log(Severity.ERROR, "Error Code 4: Internal Error (Engine deserialization failed.)")


class ICudaEngine:
    _api: Any

    def __init__(self, model: bytes, detailed: bool, logger: ILogger) -> None:
        self._content, self._detailed, self._logger = model, detailed, logger
        self._model = onnx.load_from_string(model)
        graph = self._model.graph
        self._inputs = {value.name for value in graph.input}
        self._tensors = {value.name: self._api.ITensor(value) for value in (*graph.input, *graph.output)}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> IntEnum:
        return self._api.TensorIOMode["INPUT" if name in self._inputs else "OUTPUT"]

    def get_tensor_dtype(self, name: str) -> IntEnum:
        return self._tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def create_execution_context(self) -> IExecutionContext | None:
        if self._api.control.context_fails:
            self._logger.log(Severity.ERROR, "Error Code 2: OutOfMemory (no further information)")
            return None
        return self._api.IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return self._api.EngineInspector(self)


def _memory(engine: ICudaEngine) -> int:
    return sum(int(np.prod(tensor.shape)) * 4 for tensor in engine._tensors.values())


class IExecutionContext:
    _api: Any

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._addresses = engine, {}
        self._run = _compile(engine._content)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            self._engine._logger.log(Severity.ERROR, f"Error Code 3: API Usage Error (unknown tensor {name})")
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        unset = [name for name in self._engine._tensors if not self._addresses.get(name)]
        if self._api.control.enqueue_fails or unset:
            self._engine._logger.log(Severity.ERROR, f"Error Code 3: API Usage Error (no address for {unset})")
            return False
        addresses = dict(self._addresses)  # a recorded launch keeps the addresses that it was recorded with
        if on_enqueue is None:
            self._work(addresses)
        else:
            on_enqueue(stream_handle, lambda: self._work(addresses))
        return True

    def _work(self, addresses: dict[str, int]) -> None:
        views = {name: _view(self._engine._tensors[name], address) for name, address in addresses.items()}
        results = self._run({name: views[name] for name in self._engine._inputs})
        for name, result in results.items():
            views[name][...] = result


class EngineInspector:
    _api: Any

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: IntEnum) -> str:
        if self._api.control.inspector_text is not None:
            return self._api.control.inspector_text
        layers: list[Any] = _layers(self._api, self._engine._model)
        if not self._engine._detailed:
            layers = [layer["Name"] for layer in layers]
        tensors = "I/O Tensors" if self._api.__version__.startswith("11") else "Bindings"
        return json.dumps({"Layers": layers, tensors: list(self._engine._tensors)})


def _layers(api: Any, model: onnx.ModelProto) -> list[dict[str, Any]]:
    """TensorRT 8 shows one opaque region, later ones every kernel: attention fused to one, or its softmax alone."""
    if api.__version__.startswith("8"):
        return [{"Name": "{ForeignNode[first...last]}", "LayerType": "Myelin", "TacticValue": "0x0"}]
    half = any(value.type.tensor_type.elem_type == HALF for value in model.graph.input)
    fused = half and api.control.fuses_attention
    layers = []
    for index, node in enumerate(model.graph.node):
        name = f"{node.name}_myl0_{index}"
        tactic = f"sm80_xmma_{node.op_type.lower()}"
        if node.op_type == "Softmax":
            name = f"_gemm_mha_v2_myl0_{index}" if fused else f"__myl_MulMaxSubExpSumDivMul_myl0_{index}"
            tactic = f"{name.partition('_myl0')[0]}_0x957a2fe2"
        metadata = f"[ONNX Layer: {node.name}]"
        layers.append({"Name": name, "LayerType": "kgen", "TacticName": tactic, "Metadata": metadata})
    return layers


def _compile(content: bytes) -> Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(core.read_model(content, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        results = compiled(inputs)
        return {port.any_name: results[port] for port in compiled.outputs}

    return run


def _view(tensor: ITensor, address: int) -> NDArray[Any]:
    dtype = np.dtype(NUMPY_OF[tensor.dtype.name])
    memory = (ctypes.c_ubyte * (int(np.prod(tensor.shape)) * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(tensor.shape)


def make(major: int) -> ModuleType:
    """A module `tensorrt` of this major version."""
    api: Any = ModuleType("tensorrt")
    api.__version__, api.control = VERSIONS[major], Control()
    enums = {
        "NetworkDefinitionCreationFlag": NETWORK_FLAGS[major],
        "BuilderFlag": BUILDER_FLAGS[major],
        "TacticSource": {**LIBRARIES, **CONVOLUTIONS} if major < 11 else CONVOLUTIONS,
        "DataType": DTYPES if major < 10 else {**DTYPES, "INT64": 8},
        "LayerType": {name: number for number, name in enumerate(LAYERS)},
        "MemoryPoolType": {"WORKSPACE": 0},
        "ProfilingVerbosity": {"LAYER_NAMES_ONLY": 0, "NONE": 1, "DETAILED": 2},
        "TensorIOMode": {"NONE": 0, "INPUT": 1, "OUTPUT": 2},
        "LayerInformationFormat": {"ONELINE": 0, "JSON": 1},
    }
    for name, members in enums.items():
        setattr(api, name, IntEnum(name, members))
    classes = {cls.__name__: cls for cls in (ILogger, IHostMemory, ITimingCache, ITensor, INetworkDefinition)}
    classes |= {cls.__name__: cls for cls in (OnnxParser, Builder, Runtime, IExecutionContext, EngineInspector)}
    classes["ParserError"] = ParserError if major < 10 else NamingParserError
    classes["IBuilderConfig"] = IBuilderConfig if major < 10 else MonitoredConfig
    if major < 10:
        classes["ILayer"] = ILayer
    else:
        classes["IProgressMonitor"] = IProgressMonitor
    for name, cls in classes.items():
        setattr(api, name, type(name, (cls,), {"_api": api, "__slots__": ()}))
    memory = {name: property(_memory) for name in ("device_memory_size", "device_memory_size_v2")}
    if major != 10:
        del memory["device_memory_size_v2" if major < 10 else "device_memory_size"]
    api.ICudaEngine = type("ICudaEngine", (ICudaEngine,), {"_api": api, "__slots__": (), **memory})
    return api


def install(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`import tensorrt` gives `module` from now on, and there is a GPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("dapo_edge.device.cuda_device_count", lambda: 1)
    return module


def surface(api: Any) -> list[str]:
    """The dotted names of a fake module that the real one must have, too."""
    names = []
    for name, member in vars(api).items():
        if not name.startswith("_") and name != "control":
            public = (part for part in dir(member) if not part.startswith("_") and part not in dir(int) + dir(bytes))
            names += [name, *(f"{name}.{part}" for part in public)]
    return names
