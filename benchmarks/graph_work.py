"""What one image costs an encoder, counted from its graph, and the time below which no machine can do it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from dapo_edge.backends.onnx_graph import PlainGraph, read_plain
from dapo_edge.backends.onnx_linears import find_linears
from dapo_edge.errors import BackendError, RecipeError

Binds = Literal["compute", "bandwidth"]
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class Products:
    """Products of matrices of one kind, convolutions among them."""

    macs: int = 0  # multiplications with addition
    weights: int = 0  # elements
    read: int = 0  # elements of activations
    written: int = 0

    def __add__(self, other: Products) -> Products:
        return Products(
            self.macs + other.macs,
            self.weights + other.weights,
            self.read + other.read,
            self.written + other.written,
        )


@dataclass(frozen=True)
class Work:
    """An encoder's products by what a precision does to them."""

    linears: Products  # QKV, attention-out, FC1, FC2 of every block: what INT8 may touch
    attention: Products  # activations by activations
    rest: Products  # patch embedding, adapters, projection

    @property
    def total(self) -> Products:
        """All of them."""
        return self.linears + self.attention + self.rest

    @property
    def flops(self) -> int:
        """A multiplication with addition counts as two."""
        return 2 * self.total.macs

    def weight_bytes(self, precision: str, float_type: str = "fp16") -> int:
        """Of the products' weights; in "int8" those of `rest` are of `float_type`."""
        other = BYTES[float_type if precision == "int8" else precision]
        return self.linears.weights * BYTES[precision] + self.rest.weights * other

    def activation_bytes(self, precision: str, float_type: str = "fp16") -> int:
        """What products read and write, each once; all between two of them counts as fused into them.

        In "int8" the Linears read INT8, everything else is of `float_type`.
        """
        other = BYTES[float_type if precision == "int8" else precision]
        total = self.total
        return self.linears.read * BYTES[precision] + (total.read - self.linears.read + total.written) * other


@dataclass(frozen=True)
class Limit:
    """The roofline's lower limit of a time (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785)."""

    compute_ms: float
    weights_ms: float  # to read every weight once

    @property
    def ms(self) -> float:
        """Whichever is longer."""
        return max(self.compute_ms, self.weights_ms)

    @property
    def binds(self) -> Binds:
        """Which of both it is."""
        return "compute" if self.compute_ms >= self.weights_ms else "bandwidth"


def limit_of(
    work: Work, precision: str, tera_per_s: dict[str, float], gb_per_s: float, float_type: str = "fp16"
) -> Limit:
    """max(operations / peak, weight bytes / bandwidth) of one image; `tera_per_s` by precision, 10¹² operations.

    In "int8" the Linears run at the INT8 peak, everything else at that of `float_type`. Raises `RecipeError` for a
    precision without a peak.
    """
    needed = {precision, float_type} if precision == "int8" else {precision}
    missing = sorted(name for name in needed if not tera_per_s.get(name, 0) > 0)
    if missing or not gb_per_s > 0:
        raise RecipeError(
            f"a limit in {precision} needs a bandwidth and the peak in {' and '.join(missing or needed)}",
            "Measure or look them up",
        )
    other = float_type if precision == "int8" else precision
    linears, rest = work.linears.macs, work.attention.macs + work.rest.macs
    seconds = 2 * (linears / tera_per_s[precision] + rest / tera_per_s[other]) / 1e12
    return Limit(seconds * 1e3, work.weight_bytes(precision, float_type) / gb_per_s / 1e6)


def count(encoder: bytes) -> Work:
    """Count an exported encoder of fixed shapes (`encoder.onnx`). Raises `BackendError` for other files."""
    graph = read_plain(encoder)
    inside = {linear.node for linear in find_linears(graph)}
    linears = attention = rest = Products()
    for node in graph.nodes:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        products = _products(graph, node)
        if node.name in inside:
            linears += products
        elif products.weights:
            rest += products
        else:
            attention += products
    return Work(linears, attention, rest)


def _products(graph: PlainGraph, node: Any) -> Products:
    left, right = node.input[:2]
    if node.op_type == "Gemm" or left in graph.constants:
        raise BackendError(f"'{node.name}' is a product that can't be counted", "Export the encoder again")
    has_weight = right in graph.constants
    sides = tuple(graph.constants[right].dims) if has_weight else graph.shapes[right]
    depth = math.prod(sides[1:]) if node.op_type == "Conv" else sides[-2]
    written = math.prod(graph.shapes[node.output[0]])
    return Products(
        macs=written * depth,
        weights=math.prod(sides) if has_weight else 0,
        read=math.prod(graph.shapes[left]) + (0 if has_weight else math.prod(sides)),
        written=written,
    )
