"""Measure our package against what people would use instead, and write benchmarks/results/<device>/peers.json.

    python benchmarks/peers.py [--configs b16-224,l14-336,l14-518,reference] [--only CONTENDERS] [--rounds 7]
                               [--budget-s 2] [--packages DIR] [--anomalib-python PATH] [--out FILE]

Every contender is a process of its own, with the same weights, words and pictures; from a 1080p frame, raw and as a
JPEG, to anomaly and type map at the model's size. What it computes is compared with torch in FP32 before it is timed.
Then all are loaded, and take turns: each round gives everyone a short burst, and begins with another one, so that a
machine that slows down slows all. Those whose turn it is not sleep. Where memory is short, they run in groups; torch in
FP32 and our INT8 are in each. `make peers` installs ONNX Runtime, and anomalib in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import FRAME_SIZE, HERE, end_with, result_file, results_folder
from numpy.typing import NDArray
from peer_contenders import (
    CONFIGURATIONS,
    CONTENDERS,
    OURS,
    REFERENCE,
    Contender,
    contenders_for,
    package_of,
    write_inputs,
)
from peer_process import Process, available_mb
from peer_results import (
    MISSING,
    NO_GPU,
    TIMED,
    WRONG,
    Difference,
    bound_of,
    claims,
    difference,
    merged,
    table,
    with_times,
)
from peer_spec import Spec

from dapo_edge import device
from dapo_edge.bench.bystanders import Bystanders
from dapo_edge.bench.run import MOST_OTHERS
from dapo_edge.errors import BackendError, DapoEdgeError, RecipeError, did_you_mean
from dapo_edge.files import as_bytes, write_atomically
from dapo_edge.package import ENCODER, EnginePackage

CACHE = HERE.parent / ".cache" / "peers"
PEERS_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
WARM, LEAST_FRAMES, MOST_FRAMES = 2, 3, 40
# Of an FP32 encoder's size, while a contender loads: its file, its weights, and the runtime's own copy of them.
LOADING, BESIDES_MB = 3.5, 800


@dataclass(frozen=True)
class Options:
    """How much is measured, and with what."""

    rounds: int
    budget_s: float  # of one contender's turn
    anomalib_python: Path | None
    only: tuple[str, ...] = ()

    def command(self, configuration: str) -> str:
        """What measures the same on another machine: no path of this one."""
        only = f" --only {','.join(self.only)}" if self.only else ""
        how_long = f"--rounds {self.rounds} --budget-s {self.budget_s:g}"
        return f"python benchmarks/peers.py --configs {configuration}{only} {how_long}"


class Stage:
    """One configuration: who is on it, what they computed, how long they took."""

    def __init__(self, package: EnginePackage, folder: Path, options: Options) -> None:
        """`folder` holds what `write_inputs` wrote, and takes maps."""
        self.package, self.folder, self.options = package, folder, options
        self.rows: dict[str, dict[str, Any]] = {}
        self.rounds: list[dict[str, dict[str, list[float]]]] = []
        self._frame_ms: dict[str, float] = {}
        self._waited_s, self._waiting_cpu_s = 0.0, 0.0

    @property
    def waiting_cpu_share(self) -> float:
        """Of one core: what all those that had to wait took together. A thread pool that spins would show."""
        return self._waiting_cpu_s / self._waited_s if self._waited_s else 0.0

    def measure(self, names: Sequence[str]) -> None:
        """Run contenders of one device, as many at once as there is memory for."""
        always = [name for name in (REFERENCE, OURS[CONTENDERS[names[-1]].device]) if name in {REFERENCE, *names}]
        others = [name for name in names if name not in always]
        while True:
            with contextlib.ExitStack() as stack:
                loaded = self._loaded(stack, always)
                first = True
                while others and (first or self._has_memory()):
                    loaded |= self._loaded(stack, [others.pop(0)])
                    first = False
                self._take_turns(loaded)
            if not others:
                return

    def _loaded(self, stack: contextlib.ExitStack, names: Sequence[str]) -> dict[str, Process]:
        """Those that could be loaded and compute what they should; the row says why another one is not here."""
        found = {}
        for name in names:
            if self.rows.get(name, {}).get("status", TIMED) != TIMED:
                continue
            print(f"loading {CONTENDERS[name].title}", file=sys.stderr)
            try:
                process = stack.enter_context(self._process(name))
                if name not in self.rows:
                    self._check(name, process)
            except DapoEdgeError as error:
                self.rows[name] = {"status": MISSING, "reason": _without_folders(error.cause)}
            else:
                found[name] = process
            if self.rows[name]["status"] != TIMED:
                print(f"  {self.rows[name]}", file=sys.stderr)
                found.pop(name, None)
        return found

    def _process(self, name: str) -> Process:
        contender = CONTENDERS[name]
        python: Path | str | None = self.options.anomalib_python if contender.of_anomalib else sys.executable
        if python is None:
            raise RecipeError("anomalib is not installed here", "Run make peers, or name --anomalib-python")
        CACHE.mkdir(parents=True, exist_ok=True)
        spec = Spec(
            loader=contender.loader,
            precision=contender.precision,
            package=str(self.package.path.resolve()),
            bank=str(self.folder / "bank.safetensors"),
            frames=str(self.folder / "frames.npz"),
            cache=str(CACHE),
            threads=device.usable_cores(),
        )
        return Process(str(python), spec, CACHE / f"{name}.log")

    def _check(self, name: str, process: Process) -> None:
        """Compare its maps with those of torch in FP32, and enter its row."""
        contender, maps = CONTENDERS[name], self.folder / f"{name}.npz"
        self._frame_ms[name] = process.ask(do="check", out=str(maps))["ms"]
        apart = self._difference(contender, dict(np.load(maps)))
        status = TIMED if apart.within(bound_of(process.about["runs_as"])) else WRONG
        self.rows[name] = {"status": status, **process.about, "difference": asdict(apart)}

    def _difference(self, contender: Contender, found: dict[str, NDArray[Any]]) -> Difference:
        if contender.of_anomalib:
            # Seeded words give it a nearly flat map, which its export rounds to BF16: the unit is a probability.
            return difference({"anomaly": found["anomaly"][:1]}, {"anomaly": found["reference"]}, span=1.0)
        # torch's border on a GPU does not repeat the edge, so what is smoothed across it differs.
        border = int(4 * self.package.manifest.map.smoothing_px + 0.5) if contender.device == "cuda" else 0
        expected = self.folder / f"{REFERENCE}.npz"
        if not expected.exists():
            raise BackendError("there is nothing to compare with: torch in FP32 failed", "Mend that first")
        return difference(found, dict(np.load(expected)), border=border)

    def _has_memory(self) -> bool:
        encoder_mb = self.package.manifest.files[ENCODER].size / 2**20
        return available_mb() >= LOADING * encoder_mb + BESIDES_MB

    def _take_turns(self, loaded: dict[str, Process]) -> None:
        names = list(loaded)
        for number in range(self.options.rounds):
            turn = number % max(1, len(names))
            times = {}
            for name in names[turn:] + names[:turn]:
                try:
                    times[name] = self._burst(name, loaded)
                except DapoEdgeError as error:
                    reason = f"failed while it was timed: {_without_folders(error.cause)}"
                    self.rows[name] = {"status": MISSING, "reason": reason}
                    names.remove(name)
            self.rounds.append(times)
            print(f"round {number + 1} of {self.options.rounds}: {len(times)} contenders", file=sys.stderr)

    def _burst(self, name: str, loaded: dict[str, Process]) -> dict[str, list[float]]:
        frames = round(self.options.budget_s * 1e3 / (2 * self._frame_ms[name]))  # each raw and as a JPEG
        others = [process for other, process in loaded.items() if other != name and self._is_timed(other)]
        before_s, started = sum(process.cpu_s for process in others), time.monotonic()
        found = loaded[name].ask(do="run", warm=WARM, frames=min(MOST_FRAMES, max(LEAST_FRAMES, frames)))
        self._waited_s += time.monotonic() - started
        self._waiting_cpu_s += sum(process.cpu_s for process in others) - before_s
        return found

    def _is_timed(self, name: str) -> bool:
        return self.rows[name]["status"] == TIMED


def _without_folders(text: str) -> str:
    """Paths say nothing on another machine."""
    return re.sub(r"(?<![\w/])(/[^/\s'\":]+)+/", "", text)


def measured(name: str, folders: tuple[Path, ...], options: Options) -> dict[str, Any]:
    """Everything about one configuration, as JSON values."""
    configuration = CONFIGURATIONS[name]
    package = package_of(configuration, folders)
    bystanders = Bystanders()
    with tempfile.TemporaryDirectory() as scratch:
        write_inputs(package, Path(scratch))
        stage = Stage(package, Path(scratch), options)
        rows = contenders_for(configuration, options.only)
        for kind, is_here in (("cpu", True), ("cuda", bool(device.gpus()))):
            names = [name for name in rows if CONTENDERS[name].device == kind]
            if names and is_here:
                stage.measure(names)
            stage.rows |= {} if is_here else {name: {"status": NO_GPU} for name in names}
    others = bystanders.summary()
    if others.get("share", 0) > MOST_OTHERS:
        print(f"WARNING: other programs took {others['share']:.0%} of the processors: measure again", file=sys.stderr)
    found = with_times({name: stage.rows[name] for name in rows}, stage.rounds)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": options.command(name),
        "frame": list(FRAME_SIZE),
        "map": package.manifest.image_size,
        "defect_types": len(package.bank().names) - 1,
        "package": {"name": package.manifest.name, "digest": package.digest},
        "rounds": options.rounds,
        "budget_s": options.budget_s,
        "waiting_cpu_share": stage.waiting_cpu_share,
        "others": others,
        "contenders": found,
        "claims": claims(found, configuration.asked),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parsed = _parse(arguments)
    out = parsed.out or results_folder() / "peers.json"
    this_device = device.as_json(device.this_device())
    merged(out, this_device, {})  # another machine's file is refused before hours are spent
    options = Options(parsed.rounds, parsed.budget_s, parsed.anomalib_python, parsed.only)
    folders = (*((parsed.packages.resolve(),) if parsed.packages else ()), CACHE)
    result: dict[str, Any] = {}
    for name in parsed.configs:
        one = measured(name, folders, options)
        result = merged(out, this_device, {name: one})
        write_atomically(out, as_bytes(result))
        print(f"written: {out}", file=sys.stderr)
    print(table(result))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file)
    parser.add_argument("--configs", type=_names_of(CONFIGURATIONS), default=tuple(CONFIGURATIONS))
    parser.add_argument("--only", type=_names_of(CONTENDERS), default=(), help="and what they are compared with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget-s", type=float, default=2.0, help="of one contender's turn")
    parser.add_argument("--packages", type=Path, help="folder of ready packages: b16.dapo, l336.dapo ...")
    default = PEERS_PYTHON if PEERS_PYTHON.exists() else None
    parser.add_argument("--anomalib-python", type=Path, default=default, help="of an environment that has anomalib")
    parsed = parser.parse_args(arguments)
    if parsed.rounds < 1 or not 0 < parsed.budget_s < float("inf"):
        parser.error("at least one round, and a budget above 0 s")
    python = parsed.anomalib_python
    if python is not None and not (python.is_file() and os.access(python, os.X_OK)):
        parser.error(f"there is no Python '{python}'")
    if parsed.packages is not None and not parsed.packages.is_dir():
        parser.error(f"there is no folder '{parsed.packages}'")
    return parsed


def _names_of(valid: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated names."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(name.strip() for name in text.split(","))
        unknown = [name for name in found if name not in valid]
        if unknown:
            near = did_you_mean(unknown[0], valid)
            raise argparse.ArgumentTypeError(f"there is no '{unknown[0]}'. {near}Take from {', '.join(valid)}")
        return found

    return names


if __name__ == "__main__":
    end_with(main)
