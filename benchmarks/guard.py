"""Tell whether this code became slower: ratios to fixed yardsticks against the committed ones, never absolute times.

    python benchmarks/guard.py              # compare; exit code 1 names what is slower than its noise band allows
    python benchmarks/guard.py --write      # measure several times, and write ratios and bands
    python benchmarks/guard.py --self-test  # a planted slowdown of 10 % must be caught, 10 runs without it must not be

Each metric is read in several fresh processes. What looks slower is measured again, and counts only if it is slower
every time. On a device without a committed file the ratios are printed, and that is all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import end_with, results_folder
from guard_metrics import METRICS, Reading, read, together

from dapo_edge.bench.provenance import provenance
from dapo_edge.device import this_device
from dapo_edge.errors import BackendError, DapoEdgeError, RecipeError
from dapo_edge.files import as_bytes, check_file, write_atomically

SCHEMA = "dapo-edge guard 1"
LEAST_BAND, TIMES_SPREAD = 0.05, 3.0
WIDEST_BAND = 0.09  # a slowdown of 10 % must stand out
RERUNS, TRIES, CLEAN_RUNS = 4, 3, 10
PLANTED = 0.10


@dataclass(frozen=True)
class Committed:
    """What a metric was when its file was written."""

    ratio: float
    band: float  # as a share of the ratio


@dataclass(frozen=True)
class Finding:
    """One metric, then and now."""

    name: str
    old: float
    new: float  # of several tries the lowest: what can be said for the code
    band: float
    tries: int

    @property
    def change(self) -> float:
        """As a share of the old ratio; more is slower."""
        return self.new / self.old - 1

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "same"."""
        if abs(self.change) <= self.band:
            return "same"
        return "slower" if self.change > 0 else "faster"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results_folder() / "guard.json", help="the committed file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--self-test", action="store_true")
    parser.add_argument("--plant", type=_share, default=0.0, help="slow our side down by this share, to be caught")
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    what.add_argument("--visit", action="append", choices=list(METRICS), help="read this metric once, in this process")
    options = parser.parse_args(arguments)
    if options.plant and (options.write or options.self_test):
        parser.error("--plant is for a single comparison")
    try:
        if options.visit:
            print(json.dumps(as_values(visited(options.visit, options.plant))))
            return 0
        if options.write or options.self_test:
            check_file(options.out)
        if options.write:
            return written(options.out)
        if options.self_test:
            return self_tested(options.out)
        return compared(options.out, options.plant, options.json)
    except DapoEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def compared(path: Path, plant: float, as_json: bool) -> int:
    """Measure, and hold against the committed file; 1 if anything is slower."""
    committed = committed_in(path)
    readings = measured(list(METRICS), plant)
    findings = against(committed or {}, readings, plant)
    document = {
        "schema": SCHEMA,
        "readings": as_values(readings),
        "findings": [{**asdict(finding), "verdict": finding.verdict} for finding in findings],
    }
    if as_json:
        print(json.dumps(document))
    elif committed is None:
        print(f"nothing is committed for this device ({path}): write it with --write")
        print("\n".join(f"{name}: {reading.ratio:.3f}" for name, reading in readings.items()))
    else:
        print("\n".join([*map(in_words, findings), *other_versions(path)]))
    return int(bool(_slower(findings)))


def measured(names: Sequence[str], plant: float) -> dict[str, Reading]:
    """Visit all metrics in turn, several times: what disturbs the machine for a while spoils one visit to each."""
    visits: dict[str, list[Reading]] = {name: [] for name in names}
    for number in range(max(METRICS[name].visits for name in names)):
        left = [name for name in names if number < METRICS[name].visits]
        for name, reading in visited_alone(left, plant).items():
            visits[name].append(reading)
    readings = {name: together(several) for name, several in visits.items()}
    for name, reading in readings.items():
        times = f"{reading.ours_ms:.2f} ms / {reading.yardstick_ms:.2f} ms"
        print(f"{name}: {times}, ratio {reading.ratio:.3f}, quartiles {reading.spread:.1%} apart", file=sys.stderr)
    return readings


def visited(names: Sequence[str], plant: float) -> dict[str, Reading]:
    """Read each metric once."""
    readings = {}
    for name in names:
        with METRICS[name].opened(plant) as metric:
            readings[name] = read(metric)
    return readings


def as_values(readings: Mapping[str, Reading]) -> dict[str, Any]:
    """As JSON values."""
    return {name: asdict(reading) for name, reading in readings.items()}


def visited_alone(names: Sequence[str], plant: float) -> dict[str, Reading]:
    """`visited` in a process of its own. Raises `BackendError` when it breaks off."""
    command = [sys.executable, str(Path(__file__).resolve()), "--plant", str(plant)]
    for name in names:
        command += ["--visit", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        return {name: Reading(**reading) for name, reading in json.loads(done.stdout).items()}
    except ValueError as error:
        raise BackendError(f"a visit broke off (exit code {done.returncode})", "See what it said above") from error


def against(committed: Mapping[str, Committed], readings: Mapping[str, Reading], plant: float) -> list[Finding]:
    """Each committed metric then and now. One that seems slower is measured up to `TRIES` times more."""
    findings = []
    for name, then in committed.items():
        finding = Finding(name, then.ratio, readings[name].ratio, then.band, 1)
        while finding.verdict == "slower" and finding.tries <= TRIES:
            again = measured([name], plant)[name].ratio
            finding = Finding(name, then.ratio, min(finding.new, again), then.band, finding.tries + 1)
        findings.append(finding)
    return findings


def in_words(finding: Finding) -> str:
    """One line: metric, old, new, band, and what to think of it."""
    hint = {
        "same": "as it was",
        "slower": f"SLOWER, measured {finding.tries} times",
        "faster": "faster: update with --write",
    }[finding.verdict]
    change = f"{finding.old:.3f} -> {finding.new:.3f} ({finding.change:+.1%}, band {finding.band:.1%})"
    return f"{finding.name}: {change}, {hint}"


def committed_in(path: Path) -> dict[str, Committed] | None:
    """What was written; None where there is no file. Raises `RecipeError` for a damaged one, or of other metrics."""
    document = _document(path)
    if document is None:
        return None
    try:
        found = {name: Committed(entry["ratio"], entry["band"]) for name, entry in document["metrics"].items()}
        sound = document["schema"] == SCHEMA and all(
            one.ratio > 0 and 0 < one.band < WIDEST_BAND for one in found.values()
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise _damaged(path)
    if set(found) != set(METRICS):
        raise RecipeError(
            f"'{path}' has other metrics than the guard: {', '.join(sorted(set(found) ^ set(METRICS)))}",
            "Write it again: python benchmarks/guard.py --write",
        )
    return found


def other_versions(path: Path) -> list[str]:
    """What else changed since the file was written: another OpenVINO may be the whole reason."""
    then, now = (_document(path) or {}).get("device", {}).get("packages", {}), this_device().packages
    changes = [
        f"{name} {then.get(name)} -> {now.get(name)}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    return [f"other versions than then: {', '.join(changes)}"] if changes else []


def written(path: Path) -> int:
    """Write ratios and bands. Raises `BackendError` for a metric too noisy to be guarded."""
    runs = [measured(list(METRICS), 0.0) for _ in range(RERUNS)]
    metrics = {name: _entry(name, [run[name].ratio for run in runs], runs[-1][name]) for name in METRICS}
    document = {
        "schema": SCHEMA,
        **provenance(["python", "benchmarks/guard.py", "--write"]),
        "metrics": metrics,
        "self_test": None,
    }
    write_atomically(path, as_bytes(document))
    print(f"written: {path}")
    return 0


def _entry(name: str, ratios: Sequence[float], last: Reading) -> dict[str, Any]:
    """A metric's part of the file."""
    middle = statistics.median(ratios)
    spread = statistics.stdev(ratios) / middle
    return {
        "what": METRICS[name].opened.__doc__,
        "ratio": middle,
        "band": band_of(name, spread),
        "reruns": list(ratios),
        "spread_between_reruns": spread,
        "spread_between_quartiles": last.spread,
        "ours_ms": last.ours_ms,
        "yardstick_ms": last.yardstick_ms,
    }


def band_of(name: str, spread: float) -> float:
    """How far a ratio may move: 5 %, or three times the standard deviation between reruns (`spread`, a share of it).

    Raises `BackendError` where 10 % would be lost in it.
    """
    band = max(LEAST_BAND, TIMES_SPREAD * spread)
    if band >= WIDEST_BAND:
        raise BackendError(
            f"'{name}' moves by {spread:.1%} (standard deviation) from run to run: {PLANTED:.0%} would be lost in it",
            "End what else runs on this machine, and write again",
        )
    return band


def self_tested(path: Path) -> int:
    """Plant a slowdown, then run as it is; write the outcome into the file. 1 if the guard did not do its duty.

    Raises `RecipeError` where there is no file.
    """
    committed, document = committed_in(path), _document(path)
    if committed is None or document is None:
        raise RecipeError(f"there is no '{path}' to test", "Write it first: python benchmarks/guard.py --write")
    started = time.monotonic()

    def run(plant: float) -> list[str]:
        return _slower(against(committed, measured(list(committed), plant), plant))

    caught = run(PLANTED)
    missed = [name for name in committed if name not in caught]
    flagged = [run(0.0) for _ in range(CLEAN_RUNS)]
    run_by = provenance(["python", "benchmarks/guard.py", "--self-test"])
    document["self_test"] = {
        "date": run_by["date"],
        "command": run_by["command"],
        "planted": PLANTED,
        "caught": caught,
        "missed": missed,
        "clean_runs": CLEAN_RUNS,
        "clean_runs_flagged": sum(bool(names) for names in flagged),
        "flagged": sorted({name for names in flagged for name in names}),
        "seconds_per_run": round((time.monotonic() - started) / (1 + CLEAN_RUNS), 1),
    }
    write_atomically(path, as_bytes(document))
    print(json.dumps(document["self_test"], indent=1))
    return int(bool(missed) or any(flagged))


def _slower(findings: Sequence[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.verdict == "slower"]


def _document(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> RecipeError:
    return RecipeError(f"'{path}' is not what the guard wrote", "Write it again: python benchmarks/guard.py --write")


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 1")
    return share


if __name__ == "__main__":
    end_with(main)
