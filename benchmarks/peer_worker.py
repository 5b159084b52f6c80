"""One contender in a process of its own: JSON lines in, JSON lines out, and asleep in between.

    python benchmarks/peer_worker.py SPEC

`{"do": "check", "out": FILE}` writes the maps of every raw frame; `{"do": "run", "warm": 2, "frames": 10}` times
raw frames and JPEGs by turns. The end of the input is the end of the process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

import cv2
import numpy as np
from numpy.typing import NDArray
from peer_spec import Loaded, Spec


class Contender:
    """What a loaded contender does when it is asked."""

    def __init__(self, loaded: Loaded, frames: str) -> None:
        self.loaded = loaded
        with np.load(frames) as file:
            self._raw: NDArray[np.uint8] = file["raw"]
            self._jpegs = [file[f"jpeg{index}"] for index in range(len(self._raw))]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request. Raises `ValueError` for what nobody can do."""
        if request.get("do") == "check":
            return self.check(request["out"])
        if request.get("do") == "run":
            return self.run(request["warm"], request["frames"])
        raise ValueError(f"nobody knows what this means: {request}")

    def check(self, out: str) -> dict[str, Any]:
        """Write "anomaly" and "types" of every raw frame, and "reference" where the contender has its own."""
        found = [self.loaded.inspect(frame) for frame in self._raw]
        arrays: dict[str, Any] = {"anomaly": np.stack([anomaly for anomaly, _ in found])}
        if found[0][1] is not None:
            arrays["types"] = np.stack([types for _, types in found])
        if self.loaded.reference is not None:
            arrays["reference"] = np.stack([self.loaded.reference(self._raw[0])[0]])
        np.savez(out, **arrays)
        return {"ms": self._raw_ms(0)}

    def run(self, warm: int, frames: int) -> dict[str, Any]:
        """Milliseconds from a frame, or a JPEG's bytes, to the maps. Warm frames are not among them."""
        for index in range(warm):
            self._raw_ms(index)
        pairs = [(self._raw_ms(index), self._jpeg_ms(index)) for index in range(frames)]
        return {"raw": [raw for raw, _ in pairs], "jpeg": [jpeg for _, jpeg in pairs]}

    def _raw_ms(self, index: int) -> float:
        frame = self._raw[index % len(self._raw)]
        started = time.perf_counter()
        self.loaded.inspect(frame)
        return (time.perf_counter() - started) * 1e3

    def _jpeg_ms(self, index: int) -> float:
        data = self._jpegs[index % len(self._jpegs)]
        started = time.perf_counter()
        self.loaded.inspect(cv2.imdecode(data, cv2.IMREAD_COLOR))
        return (time.perf_counter() - started) * 1e3


def serve(spec: Spec, requests: TextIO, replies: TextIO) -> int:
    """Load, say so, and answer until the input ends; the exit status. What goes wrong is the last reply."""

    def reply(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=replies, flush=True)

    try:
        cv2.setNumThreads(spec.threads)
        module, _, function = spec.loader.partition(":")
        loaded: Loaded = getattr(importlib.import_module(module), function)(spec)
        contender = Contender(loaded, spec.frames)
        reply({"runs_as": loaded.runs_as, "versions": loaded.versions, "notes": list(loaded.notes)})
        for line in requests:
            reply(contender.answer(json.loads(line)))
    except Exception as error:  # whatever a library throws is the row's reason
        reply({"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]})
        return 1
    return 0


@contextlib.contextmanager
def _own_output() -> Iterator[TextIO]:
    """Standard output for replies alone: what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        yield replies


if __name__ == "__main__":
    with _own_output() as output:
        sys.exit(serve(Spec.from_text(sys.argv[1]), sys.stdin, output))
