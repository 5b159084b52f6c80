"""What TensorRT says about its own work, read without TensorRT: log lines and the engine inspector's JSON."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KEPT_ERRORS = 20
SHOWN_ERRORS = 3
SHOWN_CHARACTERS = 400
MIB = 2**20

# TensorRT spells it "insuficient" in some releases. "Error Code 2" alone is no sign: it is an internal error, too.
OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|insuff?icient memory|memory is insufficient|could not be allocated|bad_alloc"
    r"|cudaErrorMemoryAllocation|cuda ?error:? 2\b",
    re.IGNORECASE,
)
ASKED_BYTES = re.compile(r"requested size of (\d+)|GPU memory \((\d+) bytes\)")
ASKED_AND_FREE = re.compile(r"Tactic Device request: (\d+)MB Available: (\d+)MB")
PEAK = re.compile(r"Peak memory usage of TRT CPU/GPU memory allocators: CPU \d+ MiB, GPU (\d+) MiB")

# The names of TensorRT's fused attention kernels: _gemm_mha_v2_0x957a…, _gemv_mha_v1, fmha_v2_flash_attention_…
FUSED_KERNEL = re.compile(r"gem[mv]_mha|fmha|mha_v\d|fused_?mha|flash_attention", re.IGNORECASE)
# A generated kernel lists the operations that it computes: __myl_MulMaxSubExpSum_myl0_3 begins a softmax.
SOFTMAX_KERNEL = re.compile(r"Max\w{0,9}?Sub\w{0,9}?Exp\w{0,9}?Sum")
SOFTMAX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*softmax[^\]]*)\]", re.IGNORECASE)

log = logging.getLogger(__name__)


class TrtLog:
    """Keeps what TensorRT logs, and passes warnings and errors on to `logging`. Any thread may record."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget everything: the next operation begins."""
        with self._lock:
            self._errors: deque[str] = deque(maxlen=KEPT_ERRORS)
            self._out_of_memory: str | None = None
            self._asked = self._free = 0
            self.phase = ""  # the last line that is no warning
            self.peak_device_bytes: int | None = None

    def record(self, level: int, text: str) -> None:
        """Take one line with its `logging` level."""
        text = text.strip()
        if level >= logging.WARNING:
            with self._lock:
                self._keep(level, text)
            log.log(level, "TensorRT: %s", text)
            return
        if text:
            self.phase = text
        if level >= logging.INFO and (peak := PEAK.search(text)):
            self.peak_device_bytes = int(peak[1]) * MIB

    def _keep(self, level: int, text: str) -> None:
        if level >= logging.ERROR and text not in self._errors:
            self._errors.append(text)
        if OUT_OF_MEMORY.search(text):
            self._out_of_memory = text
        for match in ASKED_BYTES.finditer(text):
            self._asked = max(self._asked, int(match[1] or match[2]))
        for match in ASKED_AND_FREE.finditer(text):
            self._asked = max(self._asked, int(match[1]) * MIB)
            self._free = int(match[2]) * MIB

    def cause(self) -> str:
        """TensorRT's own words for what went wrong since `clear`."""
        with self._lock:
            lines = list(self._errors)[-SHOWN_ERRORS:]
        return "; ".join(lines)[:SHOWN_CHARACTERS] or "it gave no reason"

    def memory(self, allowed: int | None = None) -> str | None:
        """How much GPU memory was asked for and allowed (bytes), when memory ran out since `clear`; else None."""
        with self._lock:
            if self._out_of_memory is None:
                return None
            facts = [f"largest request {size(self._asked)}"] if self._asked else []
            facts += [f"{size(self._free)} were free"] if self._free else []
            facts += [f"workspace allowed {size(allowed)}"] if allowed else []
            return ", ".join([*facts, self._out_of_memory[:SHOWN_CHARACTERS]])


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / MIB:.0f} MiB"


@dataclass(frozen=True)
class Layer:
    """One layer of a plan, as the engine inspector lists it. What it does not tell is empty."""

    name: str
    kind: str = ""
    tactic: str = ""
    metadata: str = ""  # the ONNX nodes that this layer computes: "[ONNX Layer: /a/MatMul][ONNX Layer: /a/Softmax]"


@dataclass(frozen=True)
class Attention:
    """How many attention blocks run as one fused kernel. `known` is false when the plan does not tell for all."""

    fused: int
    of: int
    known: bool


def parse_layers(document: str) -> tuple[Layer, ...]:
    """The layers in an engine inspector's JSON, whose entries are objects, or names when the plan keeps only those.

    A document that is no JSON, as some releases write for some plans, has no layers: a report must not stop a compile.
    """
    try:
        entries = json.loads(document, strict=False)["Layers"]
        return tuple(_layer(entry) for entry in entries)
    except (ValueError, KeyError, TypeError) as error:
        log.warning("the engine inspector's report can't be read (%s): this plan's layers stay unknown", error)
        return ()


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):
        return Layer(entry)
    if not isinstance(entry, dict):
        raise TypeError(f"a layer is neither a name nor an object: {entry!r:.80}")
    return Layer(*(str(entry.get(key, "")) for key in ("Name", "LayerType", "TacticName", "Metadata")))


def attention_fused(layers: Sequence[Layer], blocks: int) -> Attention:
    """How many of `blocks` attention blocks run as one fused kernel.

    The rule, which rather counts too few: a layer whose kernel carries the name of a fused attention is one fused
    block; every softmax that is a layer or a generated kernel of its own is one unfused block. Names made of ONNX
    paths (they hold a '/') prove nothing about the kernel. `known` means that both together account for all blocks:
    TensorRT 8.6 hides whole transformers in one opaque "ForeignNode" layer.
    """
    fused = [layer for layer in layers if _is_fused(layer)]
    inside = {node for layer in fused for node in SOFTMAX_NODE.findall(layer.metadata)}
    alone: set[str] = set()  # a softmax may be split into two kernels, which name the same node
    for index, layer in enumerate(layers):
        if not _is_fused(layer):
            nodes = set(SOFTMAX_NODE.findall(layer.metadata))
            alone |= nodes - inside
            if not nodes and _is_softmax(layer):
                alone.add(f"layer {index}")  # names repeat from region to region
    return Attention(
        fused=max(0, min(len(fused), blocks - len(alone))),
        of=blocks,
        known=len(fused) + len(alone) >= blocks,
    )


def _is_fused(layer: Layer) -> bool:
    return any(FUSED_KERNEL.search(name) for name in (layer.name, layer.tactic) if "/" not in name)


def _is_softmax(layer: Layer) -> bool:
    if "softmax" in layer.kind.lower() or SOFTMAX_KERNEL.search(layer.name) or SOFTMAX_KERNEL.search(layer.tactic):
        return True
    # Without a kind only the name is left; the ends of an opaque region's name say nothing about its inside.
    return not layer.kind and not layer.name.startswith("{ForeignNode") and "softmax" in layer.name.lower()
