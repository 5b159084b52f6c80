"""Measure kernels, encoder and backend on this machine's GPU and write benchmarks/results/<device>/gpu.json.

    python benchmarks/gpu.py [--quick] [--out DIR] [--package PKG | --encoder DIR]

Run it once with a Python that has torch: the kernels alone, and what people write in torch to compare with. Run it
again with one that has TensorRT and pycuda: the whole backend. Each run replaces its own parts of the file and keeps
the others. `--package` names a compiled package for the second; `--encoder` the folder of `gpu_encoder.py`, which
stands for ViT-L where no weights are. `--quick` leaves out what torch compiles, and writes gpu-quick.json.

Everything is compared with `reference.py` before it is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the machine may have no install
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "gpu"))  # the kernels with their memory

import checks
import numpy as np
from driver import TorchMachine
from gpu_measure import QUICK, Bench, Effort, Workload, gpu_us, host_us, kernel_us, part, warm_up
from works import FrameWork, MapWork

from dapo_edge import device
from dapo_edge.errors import DapoEdgeError

ROOT = Path(__file__).parents[1]
SCHEMA = "dapo-edge gpu 1"


def main(
    arguments: Sequence[str] | None = None, machine: Bench | None = None, workload: Workload | None = None
) -> dict[str, Any]:
    """Measure what this Python can, write the file, and return what is in it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, command = _parse(arguments), " ".join(["python benchmarks/gpu.py", *arguments])
    effort, workload = QUICK if options.quick else Effort(), workload or Workload()
    machine = machine or _torch_machine()
    parts: dict[str, Any] = {}
    if machine is not None:
        bench = machine
        parts["kernels"] = _say("kernels", part(command, lambda: kernels(bench, workload, effort)))
        if find_spec("torch"):
            from gpu_torch import torch_part

            parts["torch"] = _say("torch", part(command, lambda: torch_part(bench, workload, effort)))
    if options.package or options.encoder:
        from gpu_tensorrt import tensorrt_part

        measure = partial(tensorrt_part, options.package, options.encoder, workload, effort)
        parts["tensorrt"] = _say("tensorrt", part(command, measure))
    if not parts:
        raise SystemExit(
            "nothing can be measured: this Python has no torch that sees a GPU, and no --package or --encoder was named"
        )
    name = machine.gpu.name if machine else device.gpus()[0].name
    folder = options.out or ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return write(folder / ("gpu-quick.json" if options.quick else "gpu.json"), name, parts)


def _torch_machine() -> Bench | None:
    try:
        return TorchMachine()
    except DapoEdgeError as error:
        print(f"neither kernels alone nor torch are measured: {error}", file=sys.stderr)
        return None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, help="folder of the result")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--package", type=Path, help="a package with a target for this GPU")
    which.add_argument("--encoder", type=Path, help="what gpu_encoder.py wrote; compiled first")
    return parser.parse_args(arguments)


def kernels(machine: Bench, workload: Workload, effort: Effort) -> dict[str, Any]:
    """The three kernels one by one and together as a graph, with bytes and share of the copy bandwidth."""
    copy_gbps = bandwidth(machine, effort)
    batches = {str(batch): one_batch(machine, workload, effort, batch, copy_gbps) for batch in workload.batches}
    return {
        "workload": _described(workload),
        "copy": {"bytes": effort.copy_bytes, "gb_per_s": copy_gbps},
        "batch": batches,
    }


def bandwidth(machine: Bench, effort: Effort) -> float:
    """Bytes read and written per second by a large copy inside the device's memory, in 1e9."""
    work = machine.copy_work(effort.copy_bytes)
    warm_up(machine, work, effort.warmup_s)
    return 2 * effort.copy_bytes / float(np.median(machine.sample_us(work, 20))) / 1e3


def one_batch(machine: Bench, workload: Workload, effort: Effort, batch: int, copy_gbps: float) -> dict[str, Any]:
    """All numbers of one batch size. Raises `SystemExit` before anything is timed when a kernel is wrong."""
    checked = check_kernels(machine, workload, batch)
    frame = frame_work(machine, workload, batch, with_extras=False)
    frame.start()
    works = {
        "preprocess": (frame.preprocess.start, frame.preprocess.moved_bytes),
        "patch_probabilities": (frame.patch.start, frame.patch.moved_bytes),
        "defect_map": (frame.maps.start, frame.maps.moved_bytes(workload.types + 1)),
    }
    measured: dict[str, Any] = {"checked": checked}
    for name, (work, moved) in works.items():
        measured[name] = with_share(kernel_us(machine, work, effort), moved, copy_gbps)
    replay = machine.capture(frame.start)
    measured["graph"] = with_share(gpu_us(machine, replay, effort), frame.moved_bytes, copy_gbps)
    measured["graph_host"] = host_us(machine, replay, effort)
    measured["plain_host"] = host_us(machine, frame.start, effort)
    return measured


def with_share(microseconds: dict[str, Any], moved: int, copy_gbps: float) -> dict[str, Any]:
    """Add the bytes that have to move, and the median rate as a share of a copy's."""
    rate = moved / microseconds["median"] / 1e3
    return {"us": microseconds, "bytes": moved, "gb_per_s": rate, "share_of_copy": rate / copy_gbps}


def frame_work(machine: Bench, workload: Workload, batch: int, *, with_extras: bool) -> FrameWork:
    """The kernels of `batch` different frames."""
    size = workload.encoder.image_size
    return FrameWork(
        machine,
        [checks.random_view("BGR8", workload.frame, seed=index) for index in range(batch)],
        size,
        checks.random_tokens(workload.tokens(batch)),
        checks.random_bank(workload.types, workload.encoder.dimensions),
        workload.temperature,
        workload.spec.tables((size, size)),
        with_extras=with_extras,
    )


def check_kernels(machine: Bench, workload: Workload, batch: int) -> dict[str, Any]:
    """Compare every kernel with its definition. Raises `SystemExit` when one is beyond its bound."""
    frame = frame_work(machine, workload, batch, with_extras=True)
    frame.start()
    size, tokens = workload.encoder.image_size, checks.random_tokens(workload.tokens(batch))
    rows, tables = checks.random_bank(workload.types, workload.encoder.dimensions), workload.spec.tables((size, size))
    probability = checks.patch_difference(frame.patch, tokens, rows, workload.temperature)
    probs = frame.patch.result().reshape(batch, workload.types + 1, *workload.spec.grid)
    found = checks.map_difference(frame.maps.result(), probs, tables)
    # One view is enough to compare: the frames of a batch differ in their pixels only.
    view = checks.random_view("BGR8", workload.frame, seed=0)
    levels = checks.preprocess_difference(frame.preprocess.result()[:1], [view])
    bare = MapWork(machine, frame.patch.probs, frame.patch.bank, tables, batch, with_grey=False, with_histogram=False)
    bare.start()
    same = np.array_equal(bare.result().anomaly, frame.maps.result().anomaly)
    if not (probability <= checks.PROBABILITY and found.holds() and levels <= checks.GREY_MAX and same):
        raise SystemExit(f"a kernel is wrong, nothing was timed: {probability=} {found=} {levels=} {same=}")
    return {
        "probability": probability,
        "anomaly": found.anomaly,
        "wrong_types": found.wrong_types,
        "grey_levels": levels,
    }


def write(path: Path, name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """Put the parts into the file, beside those of another run on the same GPU, and judge the limits again."""
    kept: dict[str, Any] = {}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if (before.get("schema"), before.get("gpu")) != (SCHEMA, name):
            raise SystemExit(f"'{path}' is of another GPU or format: move it away, or name another folder with --out")
        kept = before["parts"]
    parts = {**kept, **parts}
    result = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": name,
        "limits": limits(parts),
        "parts": parts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    print(f"written: {path}", file=sys.stderr)
    return json.loads(text)


def limits(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wished for beside what was measured; `holds` is None for what was not."""
    batch = parts.get("kernels", {}).get("batch", {})
    ours = _at(batch, "1", "graph", "us", "median")
    trt_us = _at(parts, "tensorrt", "vit_l", "encode_us")
    compiled = _at(parts, "torch", "encoder", "compile", "us", "median")
    host = _at(parts, "tensorrt", "graph_host", "median") or _at(batch, "1", "graph_host", "median")
    encoders = [us for us in (trt_us, compiled) if us]
    share = ours / min(encoders) if ours and encoders else None
    faster = compiled / trt_us if compiled and trt_us else None
    return [
        _limit("preprocess + map, batch 1, us", "<=", 100, ours),
        _limit("preprocess + map, share of the fastest encoder's time", "<=", 0.05, share),
        _limit("batch 16, share of a copy's bandwidth", ">=", 0.5, _at(batch, "16", "graph", "share_of_copy")),
        _limit("host time of a frame's graph launch, us", "<=", 20, host),
        _limit("ViT-L/14 at 518 px by TensorRT FP16, ms", "<=", 2.6, trt_us / 1e3 if trt_us else None),
        _limit("ViT-L/14 at 518 px, times faster than torch.compile FP16", ">=", 1.5, faster),
    ]


def _limit(what: str, relation: str, limit: float, measured: float | None) -> dict[str, Any]:
    holds = None if measured is None else measured <= limit if relation == "<=" else measured >= limit
    return {"what": what, "relation": relation, "limit": limit, "measured": measured, "holds": holds}


def _at(content: Any, *keys: str) -> float | None:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _described(workload: Workload) -> dict[str, Any]:
    _, layers, patches, dimensions = workload.tokens(1)
    size = workload.encoder.image_size
    return {
        "frame": list(workload.frame),
        "image_size": size,
        "map": [size, size],
        "layers": layers,
        "patches": patches,
        "dimensions": dimensions,
        "types": workload.types,
        "smoothing_px": workload.smoothing_px,
    }


def _say(what: str, value: dict[str, Any]) -> dict[str, Any]:
    print(f"{what}: {json.dumps(value)}", file=sys.stderr)
    return value


if __name__ == "__main__":
    try:
        main()
    except DapoEdgeError as error:
        sys.exit(f"error: {error}")
