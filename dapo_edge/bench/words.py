"""The bench document in sentences, which the table for people and the HTML page share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]  # of `dapo-edge bench --json`, or a part of it
UNKNOWN = "–"


@dataclass(frozen=True)
class Rows:
    """A small table, ready to be shown: numbers stand on the right."""

    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


Columns = Mapping[str, Callable[[Document], str]]


def _number(key: str, form: str) -> Callable[[Document], str]:
    return lambda row: UNKNOWN if row[key] is None else format(row[key], form)


def _yes(key: str, yes: str, no: str) -> Callable[[Document], str]:
    return lambda row: UNKNOWN if row[key] is None else (yes if row[key] else no)


PROBES: Columns = {
    "frames/s": _number("fps", ".2f"),
    "p99, ms": _number("p99_ms", ".1f"),
    "late": _number("misses", "d"),
    "engine": _yes("saturated", "can't keep up", "keeps up"),
    "deadline": _yes("met", "met", "missed"),
}
BATCHES: Columns = {
    "frames per call": _number("frames_per_call", "d"),
    "call p50, ms": lambda row: f"{row['call_ms']['p50']:.1f}",
    "call p99, ms": lambda row: f"{row['call_ms']['p99']:.1f}",
    "ms per frame": _number("ms_per_frame", ".2f"),
    "frames/s": _number("fps", ".1f"),
}
CAMERAS: Columns = {
    "cameras": _number("cameras", "d"),
    "asked of each": _number("fps_per_camera", ".1f"),
    "source gave": _number("offered_fps", ".1f"),
    "frames/s of all": _number("achieved_fps", ".1f"),
    "p50, ms": _number("p50_ms", ".1f"),
    "p99, ms": _number("p99_ms", ".1f"),
    "late": _number("misses", "d"),
    "engine": _yes("saturated", "can't keep up", "keeps up"),
}


def rows(columns: Columns, documents: Sequence[Document]) -> Rows:
    """Probes or a sweep as a table."""
    cells = tuple(tuple(say(document) for say in columns.values()) for document in documents)
    return Rows(tuple(columns), cells)


def title(result: Document) -> str:
    """What was measured."""
    package = result["package"]
    return f"{package['name']}: {package['backbone']}, {package['image_size']} px, {result['precision']}"


def setting(result: Document) -> list[str]:
    """Where, on which frames, and after what warm-up."""
    source, warm, package = result["source"], result["warm_up"], result["package"]
    origin = "live" if source["live"] else f"{source['distinct_frames']} different ones"
    steady = {None: "as asked", True: "until times were steady", False: "times not steady even then"}[warm["steady"]]
    return [
        f"{result['backend']} on {result['device']['line']}, {result['date']}",
        f"frames {source['width']} x {source['height']} from {source['uri']} ({origin}); "
        f"map {_map_size(package['map_size'])}, {package['defects']} defect types; "
        f"warm-up {warm['frames']} frames in {warm['seconds']:.1f} s, {steady}",
    ]


def speed(result: Document) -> str:
    """Frames per second, and what that is of."""
    if result["mode"] == "latency":
        how = "one at a time" if result["compare"] is None else "by turns with the other package"
    else:
        rate = result["rate"]
        how = f"{rate['cameras']} {'cameras' if rate['cameras'] > 1 else 'camera'} at {rate['asked_fps']:g} frames/s"
        how += " each" if rate["cameras"] > 1 else ""
    count = f"{result['frames']} frames in {result['seconds']:.1f} s"
    if result["compare"] is not None:
        return f"{count}, {how}"
    return f"{result['fps']:.1f} frames/s: {count}, {how}"


def deadline(result: Document) -> str | None:
    """Whether p99 met the deadline, and how many frames did not."""
    found = result["deadline"]
    if found is None:
        return None
    verdict = "meets" if found["met"] else "misses"
    late = f"{found['misses']} late or lost ({found['share']:.2%})" if found["misses"] else "no frame late"
    return f"p99 {verdict} the deadline of {found['ms']:g} ms: {late}"


def rate(result: Document) -> str | None:
    """What was asked of the source, what it gave, and what became of it; frames per second of all cameras together."""
    found = result["rate"]
    if found is None:
        return None
    lost = found["dropped"] + found["failed"]
    asked = f"asked {found['asked_fps'] * found['cameras']:.1f}, source gave {found['offered_fps']:.1f} frames/s"
    done = f"{found['achieved_fps']:.1f} inspected per second"
    sums = f"{found['captured']} captured = {found['inspected']} inspected"
    sums += f" + {found['dropped']} dropped + {found['failed']} failed" if lost else ", none lost"
    saturated = "; the engine can't keep up" if found["saturated"] else ""
    return f"{asked}; {done}; {sums}{saturated}"


def found_rate(result: Document) -> str | None:
    """The highest rate that meets the deadline."""
    found = result["find_rate"]
    if found is None:
        return None
    if not found["fps"]:
        return f"no rate met the deadline among the {len(found['probes'])} that were tried"
    return f"highest rate that meets the deadline: {found['fps']:.1f} frames/s ({len(found['probes'])} tried)"


def comparison(result: Document) -> str | None:
    """How many times as fast as the other package, and whether both say the same."""
    found = result["compare"]
    if found is None:
        return None
    times = found["times_faster"]
    package = f"{found['package']['name']} ({found['backend']}, {found['precision']})"
    verdicts = f"{found['verdicts_differ']} of {found['pairs']} verdicts differ"
    return (
        f"{times['median']:.2f} times as fast as {package}, 95 % sure between {times['low']:.2f} and "
        f"{times['high']:.2f}; {verdicts}, scores by {found['score_difference_max']:.2g} at most"
    )


def machine(result: Document) -> dict[str, str]:
    """Power, clocks, temperature, memory and power mode, by their names; what is not known with its reason."""
    mode, memory = result["power_mode"], result["memory"]
    return {
        "power": _told(result["power"], _watts),
        "CPU clock": _told(result["clocks"]["cpu"], _clock),
        "GPU clock": _told(result["clocks"]["gpu"], _clock),
        "temperature": _told(result["temperature"], lambda found: f"{found['max_c']:.0f} °C ({found['sensor']})"),
        "host memory": _told(
            memory["host"], lambda found: f"{found['peak_mb']:.0f} MB at most, {found['before_mb']:.0f} MB before"
        ),
        "device memory": _told(memory["device"], lambda found: f"{found['peak_mb']:.0f} MB at most"),
        "power mode": mode if isinstance(mode, str) else _told(mode, str),
    }


def commit(result: Document) -> str:
    """Where the software came from."""
    git = result["software"].get("git")
    if git is None:
        return "an installed package"
    return f"commit {git['commit'][:12]}{', with changes' if git['dirty'] else ''}"


def _told(found: Document, say: Any) -> str:
    return f"not available ({found['unavailable']})" if "unavailable" in found else str(say(found))


def _watts(found: Document) -> str:
    joules = found["joules_per_frame"]
    per_frame = "" if joules is None else f", {joules:.3g} J per frame"
    left_out = f"; without {'; '.join(found['left_out'])}" if found.get("left_out") else ""
    return f"{found['mean_w']:.1f} W, {found['max_w']:.1f} W at most{per_frame} ({found['sensor']}{left_out})"


def _clock(found: Document) -> str:
    return f"{found['mean_mhz']:.0f} MHz ({found['min_mhz']:.0f} to {found['max_mhz']:.0f})"


def _map_size(size: Any) -> str:
    return size if isinstance(size, str) else f"{size[0]} x {size[1]}"
