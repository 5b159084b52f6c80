"""Measure kernels, encoder and backend on this machine's GPU and write benchmarks/results/<device>/gpu.json.

    python benchmarks/gpu.py [--quick] [--out DIR] [--parts NAMES] [--package PKG | --encoder DIR]

Run it once with a Python that has torch: the kernels alone, and what people write in torch to compare with. Run it
again with one that has TensorRT and pycuda: the whole backend. Each run replaces its own parts of the file and keeps
the others; the file is written after every piece, and a part says whether it was finished. `--package` names a
compiled package for the second run; `--encoder` the folder of `gpu_encoder.py`, which stands for ViT-L where no weights
are. `--quick` leaves out what torch compiles unless `--parts` names it, and writes gpu-quick.json.

Everything is compared with `reference.py` before it is timed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the machine may have no install
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "gpu"))  # the kernels with their memory

import checks
import numpy as np
from driver import TorchMachine, Work
from gpu_measure import QUICK, Bench, Effort, Steps, Workload, cold_us, gpu_us, host_us, kernel_us, part, warm_up
from gpu_results import Results
from works import FrameWork, MapWork

from dapo_edge import device
from dapo_edge.errors import DapoEdgeError

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "torch", "compile", "tensorrt")


def main(
    arguments: Sequence[str] | None = None, machine: Bench | None = None, workload: Workload | None = None
) -> dict[str, Any]:
    """Measure what this Python can, write the file after each piece, and return what is in it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, command = _parse(arguments), " ".join(["python benchmarks/gpu.py", *arguments])
    machine = _machine(options, machine)
    measures = _measures(options, machine, workload or Workload())
    if not measures:
        raise SystemExit(
            "nothing can be measured: this Python has no torch that sees a GPU, and no --package or --encoder was named"
        )
    name = machine.gpu.name if machine else _gpu_name()
    folder = options.out or ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    results = Results(folder / ("gpu-quick.json" if options.quick else "gpu.json"), name)
    written: dict[str, Any] = {}
    for what, steps in measures.items():
        for measured in part(command, steps):
            written = results.put(what, measured)
        print(f"{what}, written to {results.path}: {json.dumps(written['parts'][what])}", file=sys.stderr)
    return written


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, help="folder of the result")
    parser.add_argument("--parts", type=_part_names, metavar=",".join(PARTS), help="only these (default: all that can)")
    precisions = ("fp32", "fp16", "int8")
    parser.add_argument("--precision", choices=precisions, default="fp16", help="of the package's target")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--package", type=Path, help="a package with a target for this GPU")
    which.add_argument("--encoder", type=Path, help="what gpu_encoder.py wrote; compiled first")
    options = parser.parse_args(arguments)
    if options.parts and ("tensorrt" in options.parts) != bool(options.package or options.encoder):
        parser.error("the part 'tensorrt' and one of --package and --encoder need each other")
    return options


def _part_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no part '{unknown[0]}': take from {', '.join(PARTS)}")
    return names


def _machine(options: argparse.Namespace, machine: Bench | None) -> Bench | None:
    """The kernels on torch's stream. None where torch sees no GPU, or when nothing that was asked for needs it."""
    if machine is not None or options.parts == ("tensorrt",):
        return machine
    try:
        return TorchMachine()
    except DapoEdgeError as error:
        if options.parts:
            raise
        print(f"neither kernels alone nor torch are measured: {error}", file=sys.stderr)
        return None


def _measures(options: argparse.Namespace, machine: Bench | None, workload: Workload) -> dict[str, Steps]:
    """What was asked for and can be measured, in the order of `PARTS`. Nothing runs before its first step is taken."""
    effort = QUICK if options.quick else Effort()
    wished = options.parts or [name for name in PARTS if not (options.quick and name == "compile")]
    measures: dict[str, Steps] = {}
    if machine is not None:
        measures = {
            "kernels": kernels(machine, workload, effort),
            "torch": _torch("torch_part", machine, workload, effort),
            "compile": _torch("compile_part", machine, workload, effort),
        }
    if options.package or options.encoder:
        measures["tensorrt"] = _tensorrt(options, workload, effort)
    return {name: steps for name, steps in measures.items() if name in wished}


def _torch(name: str, machine: Bench, workload: Workload, effort: Effort) -> Steps:
    import gpu_torch

    yield from getattr(gpu_torch, name)(machine, workload, effort)


def _tensorrt(options: argparse.Namespace, workload: Workload, effort: Effort) -> Steps:
    from gpu_tensorrt import tensorrt_part

    yield from tensorrt_part(options.package, options.encoder, options.precision, workload, effort)


def _gpu_name() -> str:
    found = device.gpus()
    if not found:
        raise SystemExit(f"no GPU here: {device.driver_problem() or 'there is no CUDA driver'}")
    return found[0].name


def kernels(machine: Bench, workload: Workload, effort: Effort) -> Steps:
    """The three kernels one by one and together as a graph, with bytes and share of the copy bandwidth."""
    copy_gbps = bandwidth(machine, effort)
    batches: dict[str, Any] = {}
    for batch in workload.batches:
        batches[str(batch)] = one_batch(machine, workload, effort, batch, copy_gbps)
        yield {
            "workload": _described(workload),
            "copy": {"bytes": effort.copy_bytes, "gb_per_s": copy_gbps},
            "l2_bytes": machine.l2_bytes(),
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

    def tokens_to_map() -> None:
        frame.patch.start()
        frame.maps.start()

    map_bytes = frame.maps.moved_bytes(workload.types + 1)
    works: dict[str, tuple[Work, int]] = {
        "preprocess": (frame.preprocess.start, frame.preprocess.moved_bytes),
        "patch_probabilities": (frame.patch.start, frame.patch.moved_bytes),
        "defect_map": (frame.maps.start, map_bytes),
        "tokens_to_map": (tokens_to_map, frame.patch.moved_bytes + map_bytes),
    }
    measured: dict[str, Any] = {"checked": checked}
    for name, (work, moved) in works.items():
        cold = cold_us(machine, machine.capture(work), effort)
        measured[name] = with_shares(kernel_us(machine, work, effort), cold, moved, copy_gbps)
    replay = machine.capture(frame.start)
    warm, cold = gpu_us(machine, replay, effort), cold_us(machine, replay, effort)
    measured["graph"] = with_shares(warm, cold, frame.moved_bytes, copy_gbps)
    measured["graph_host"] = host_us(machine, replay, effort)
    measured["plain_host"] = host_us(machine, frame.start, effort)
    return measured


def with_shares(warm: dict[str, Any], cold: dict[str, Any], moved: int, copy_gbps: float) -> dict[str, Any]:
    """Add the bytes that have to move, and the median rates as a share of a copy's: a warm one may be above 1."""
    measured: dict[str, Any] = {"bytes": moved}
    for cache, microseconds in (("warm", warm), ("cold", cold)):
        rate = moved / microseconds["median"] / 1e3
        measured[cache] = {"us": microseconds, "gb_per_s": rate, "share_of_copy": rate / copy_gbps}
    return measured


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


if __name__ == "__main__":
    try:
        main()
    except DapoEdgeError as error:
        sys.exit(f"error: {error}")
