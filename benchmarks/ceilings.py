"""What this machine can do at best: one large product of matrices in each precision, and a copy of memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dapo_edge.backends.openvino import HINT_OF, fast_float_type
from dapo_edge.device import usable_cores
from dapo_edge.extras import require

SIDE, GPU_SIDE = 4096, 8192  # of the square matrices
COPY_BYTES, GPU_COPY_BYTES = 256 << 20, 4 << 30
TRIES = 8
NO_GPU = "not measured yet: no GPU"


@dataclass(frozen=True)
class Peak:
    """The most that one library reached in one precision."""

    by: str
    tera_per_s: float  # 10¹² operations
    runs_as: str | None = None  # kernel, where the library tells


def peaks(side: int = SIDE) -> dict[str, list[Peak]]:
    """By precision (fp32, the CPU's fast float type, int8) what each library reaches with [side, side] matrices."""
    draw = np.random.default_rng(0)
    left, right = (draw.standard_normal((side, side)).astype(np.float32) for _ in range(2))
    a, b = torch.from_numpy(left), torch.from_numpy(right)
    found = {
        "fp32": [
            Peak("torch", _tera(lambda: torch.mm(a, b), side)),
            Peak("numpy", _tera(lambda: np.matmul(left, right), side)),
            _by_openvino(left, right, "fp32"),
        ]
    }
    fast = fast_float_type()
    if fast:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[fast]
        half_a, half_b = a.to(kind), b.to(kind)
        by_torch = Peak("torch", _tera(lambda: torch.mm(half_a, half_b), side))
        found[fast] = [by_torch, _by_openvino(left, right, fast)]
    whole_a, whole_b = ((x * 40).clamp(-127, 127).to(torch.int8) for x in (a, b))
    by_torch = Peak("torch", _tera(lambda: torch._int_mm(whole_a, whole_b), side))
    found["int8"] = [by_torch, _by_openvino(left, right, "int8")]
    return found


def copy_gb_per_s(size: int = COPY_BYTES, threads: int | None = None) -> float:
    """A copy of `size` bytes, shared by as many threads as there are cores: 10⁹ bytes read and written per second."""
    count = threads or usable_cores()
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    parts = list(zip(np.array_split(target, count), np.array_split(source, count), strict=True))

    def copy() -> None:
        workers = [threading.Thread(target=np.copyto, args=part) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return 2 * size / _least_s(copy) / 1e9


def gpu_ceilings(side: int = GPU_SIDE, size: int = GPU_COPY_BYTES) -> dict[str, Any] | str:
    """Peaks and copy bandwidth of the GPU that torch sees, or that there is none."""
    if not torch.cuda.is_available():
        return NO_GPU
    draw = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(side, side, device="cuda", generator=draw) for _ in range(2))
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy_s = _least_gpu_s(lambda: target.copy_(source))
    return {
        "gpu": torch.cuda.get_device_name(),
        "tera_per_s": {name: _gpu_tera(product, side) for name, product in gpu_products(a, b).items()},
        "copy_gb_per_s": 2 * size / copy_s / 1e9,
    }


def gpu_products(a: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[], Callable[[], object]]]:
    """By precision what makes its operands of float32 ones and returns their product; both may be refused."""

    def tf32() -> Callable[[], object]:
        torch.set_float32_matmul_precision("high")
        return lambda: torch.mm(a, b)

    def half(kind: torch.dtype) -> Callable[[], object]:
        x, y = a.to(kind), b.to(kind)
        return lambda: torch.mm(x, y)

    def int8() -> Callable[[], object]:
        x, y = ((side * 40).clamp(-127, 127).to(torch.int8) for side in (a, b))
        return lambda: torch._int_mm(x, y)

    def fp8() -> Callable[[], object]:
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()  # the second one by columns
        one = torch.ones((), device=a.device)
        return lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.float16)

    return {
        "fp16": lambda: half(torch.float16),
        "bf16": lambda: half(torch.bfloat16),
        "tf32": tf32,
        "int8": int8,
        "fp8": fp8,
    }


def _gpu_tera(made: Callable[[], Callable[[], object]], side: int) -> float | str:
    try:
        return 2 * side**3 / _least_gpu_s(made()) / 1e12
    except RuntimeError as error:
        return f"refused: {str(error).splitlines()[0][:120]}"


def _by_openvino(left: np.ndarray, right: np.ndarray, precision: str) -> Peak:
    """The node of the product alone: around it OpenVINO converts the types of what goes in and comes out."""
    ov = require("openvino")
    float_type = HINT_OF[(fast_float_type() or "fp32") if precision == "int8" else precision]
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": float_type, "PERF_COUNT": True}
    model = ov.Core().compile_model(_product_model(right, precision == "int8"), "CPU", properties)
    request = model.create_infer_request()
    best = None
    for _ in range(TRIES):
        request.infer([left], share_inputs=True, share_outputs=True)
        (node,) = (info for info in request.profiling_info if info.node_type.startswith(("FullyConnected", "MatMul")))
        if best is None or node.real_time < best.real_time:
            best = node
    assert best is not None
    return Peak("openvino", 2 * len(left) ** 3 / best.real_time.total_seconds() / 1e12, best.exec_type)


def _product_model(right: np.ndarray, int8: bool) -> Any:
    """[N, N] float32 times a constant; for `int8` what Q/DQ pairs in an ONNX file become."""
    ov = require("openvino")
    ops = require("openvino.opset13")
    image = ops.parameter(right.shape, ov.Type.f32)
    left, weight = image, ops.constant(np.ascontiguousarray(right.T))
    if int8:
        low, high = ops.constant(np.float32(-4)), ops.constant(np.float32(4 * 127 / 128))
        left = ops.fake_quantize(image, low, high, low, high, 256)
        steps = np.clip(np.rint(right.T * 32), -127, 127).astype(np.int8)
        scales = np.full((len(steps), 1), 1 / 32, np.float32)
        weight = ops.multiply(ops.convert(ops.constant(steps), "f32"), ops.constant(scales))
    return ov.Model([ops.matmul(left, weight, False, True)], [image])


def _tera(product: Callable[[], object], side: int) -> float:
    return 2 * side**3 / _least_s(product) / 1e12


def _least_s(work: Callable[[], object]) -> float:
    """The shortest of several times: a ceiling is what was reached once."""
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _least_gpu_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3 + TRIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)
