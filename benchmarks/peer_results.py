"""What the peers' rounds say: who computes the same, who is how much faster, what of issue 8 holds; file and table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peer_contenders import CONFIGURATIONS, CONTENDERS, INT8_OF_ORT, OURS

from dapo_edge.errors import BackendError, RecipeError

SCHEMA = "dapo-edge peers 1"
INPUTS = ("raw", "jpeg")
TIMED, WRONG, MISSING, NO_GPU = "timed", "wrong", "missing", "not measured yet: no GPU"

Round = Mapping[str, Mapping[str, Sequence[float]]]  # milliseconds by contender and input


@dataclass(frozen=True)
class Bound:
    """How far a contender's maps may be from those of torch in FP32."""

    max_difference: float  # of any pixel of the anomaly maps, as a share of what they span
    mean_difference: float  # in the same unit
    type_agreement: float  # share of pixels with the same type, at least


@dataclass(frozen=True)
class Difference:
    """How far a contender's maps are from those of torch in FP32. `type_agreement` is None for maps without types."""

    max_difference: float
    mean_difference: float
    type_agreement: float | None
    span: float  # highest minus lowest value of the reference's maps: the unit of both differences

    def within(self, bound: Bound) -> bool:
        """NaN is beyond every bound."""
        types = self.type_agreement is None or self.type_agreement >= bound.type_agreement
        return self.max_difference <= bound.max_difference and self.mean_difference <= bound.mean_difference and types


# FP32 differs by the resize alone: ours reduces by boxes first, which moves some pixels by a grey level. BF16 and
# INT8 add noise to the tokens. Each bound is two to four times what was seen on ViT-B/16, ViT-L/14 and surface-tiny.
# Mistakes are further off than all of them by the mean: red and blue swapped at least 0.033 (with at
# most 0.46 of the types), a lost feature layer 0.023 (0.88), a picture shifted by one pixel 0.018 (0.91).
BOUNDS = {
    "fp32": Bound(0.025, 0.0035, 0.99),
    "half": Bound(0.03, 0.0045, 0.985),
    "int8": Bound(0.065, 0.0125, 0.965),
}


def bound_of(runs_as: str) -> Bound:
    """The bound of a precision as contenders name it: fp32, bf16, fp16, int8+bf16 ...

    Raises `BackendError` for one that has none.
    """
    kind = "int8" if runs_as.startswith("int8") else runs_as
    bound = BOUNDS.get({"bf16": "half", "fp16": "half"}.get(kind, kind))
    if bound is None:
        raise BackendError(f"it runs as {runs_as}, for which there is no bound", "Add one to peer_results.py")
    return bound


def difference(
    found: Mapping[str, NDArray[Any]],
    expected: Mapping[str, NDArray[Any]],
    *,
    border: int = 0,
    span: float | None = None,
) -> Difference:
    """Compare "anomaly" [n, S, S] and, where both have them, "types", without `border` pixels at each edge.

    `span`: the unit, by default what the expected maps span. Raises `BackendError` for flat maps and another size.
    """
    if found["anomaly"].shape != expected["anomaly"].shape:
        sizes = f"{found['anomaly'].shape} can't be compared with {expected['anomaly'].shape}"
        raise BackendError(f"its maps {sizes}", "Mend its loader")
    span = float(np.ptp(expected["anomaly"])) if span is None else span
    if not span > 0:
        raise BackendError("the reference's maps are flat, and flat maps agree with anything", "Take another bank")
    side = slice(border, -border or None)
    inside = (slice(None), side, side)
    apart = np.abs(found["anomaly"][inside].astype(np.float64) - expected["anomaly"][inside]) / span
    agreement = None
    if "types" in found and "types" in expected:
        agreement = float((found["types"][inside] == expected["types"][inside]).mean())
    return Difference(float(apart.max()), float(apart.mean()), agreement, span)


def times(rounds: Sequence[Round], name: str, source: str) -> dict[str, float] | None:
    """Milliseconds of one contender over all rounds, and how far the rounds' medians are apart."""
    series = [list(one[name][source]) for one in rounds if name in one]
    if not series:
        return None
    every = np.concatenate(series)
    medians = [statistics.median(values) for values in series]
    return {
        "n": len(every),
        "rounds": len(series),
        "median": float(np.median(every)),
        "p95": float(np.percentile(every, 95)),
        "lowest_round": min(medians),
        "highest_round": max(medians),
    }


def times_faster(rounds: Sequence[Round], ours: str, name: str, source: str) -> dict[str, float] | None:
    """How many times faster `ours` is than `name`: the median of the rounds' ratios, and the extremes."""
    ratios = [
        statistics.median(one[name][source]) / statistics.median(one[ours][source])
        for one in rounds
        if name in one and ours in one
    ]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)} if ratios else None


def with_times(rows: dict[str, dict[str, Any]], rounds: Sequence[Round]) -> dict[str, dict[str, Any]]:
    """Rows, and of those that were timed the milliseconds and how many times faster ours is."""
    for name, row in rows.items():
        if row["status"] == TIMED:
            ours = OURS[CONTENDERS[name].device]
            row["ms"] = {source: times(rounds, name, source) for source in INPUTS}
            row["ours_times_faster"] = {source: times_faster(rounds, ours, name, source) for source in INPUTS}
    return rows


def strongest(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str | None:
    """Of those that were timed beside ours, the one that ours is the least faster than, from a raw frame."""
    beside = [name for name in names if rows.get(name, {}).get("ours_times_faster", {}).get("raw")]
    return min(beside, key=lambda name: rows[name]["ours_times_faster"]["raw"]["median"], default=None)


def claims(rows: Mapping[str, Mapping[str, Any]], asked: Mapping[str, float]) -> list[dict[str, Any]]:
    """What issue 8 asks of our INT8 on a CPU, from a raw frame: the ratio, and whether it holds (None: not known).

    `asked` says how many times faster; what it does not name is measured all the same. "not_timed" are those that
    might have been stronger: while there are any, nothing holds. Whose maps are wrong is no rival.
    """
    peers = [name for name, row in CONTENDERS.items() if row.is_peer and row.device == "cpu"]
    found = []
    for what, rivals in {"eager-fp32": ("eager-fp32",), "ort-int8": INT8_OF_ORT, "best": tuple(peers)}.items():
        name = strongest(rows, rivals)
        ratio = rows[name]["ours_times_faster"]["raw"] if name else None
        not_timed = [rival for rival in rivals if rows.get(rival, {}).get("status") not in (TIMED, WRONG)]
        found.append(
            {
                "over": what,
                "contender": name,
                "not_timed": not_timed,
                "asked": asked.get(what),
                "times_faster": ratio,
                "holds": _holds(ratio, asked.get(what), not_timed),
            }
        )
    return found


def _holds(ratio: Mapping[str, float] | None, least: float | None, not_timed: Sequence[str]) -> bool | None:
    if ratio is None or least is None:
        return None
    if ratio["median"] < least:
        return False
    return None if not_timed else True


def merged(path: Path, device: dict[str, Any], configurations: Mapping[str, Any]) -> dict[str, Any]:
    """The file's content with these configurations in the place of earlier ones.

    Raises `RecipeError` when the file is of another machine or format.
    """
    before: dict[str, Any] = {}
    if path.exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            same = (content["schema"], content["device"]["line"]) == (SCHEMA, device["line"])
            before = dict(content["configurations"])
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise RecipeError(f"'{path}' holds results of another machine or format", "Name another file with --out")
    every = {**before, **configurations}
    ordered = {name: every[name] for name in CONFIGURATIONS if name in every}
    bounds = {name: asdict(bound) for name, bound in BOUNDS.items()}
    return {"schema": SCHEMA, "device": device, "bounds": bounds, "configurations": ordered}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: one table per configuration, and what was asked of it below."""
    parts = []
    for name, measured in result["configurations"].items():
        lines = [
            f"**{CONFIGURATIONS[name].title}**, {measured['defect_types']} defect types, {measured['date'][:10]}",
            "",
            "| contender | runs as | raw frame, ms | p95 | median of a round | JPEG, ms | dapo-edge is faster "
            "| map difference: largest, mean | same type |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|",
            *(_line(contender, row) for contender, row in measured["contenders"].items()),
            "",
            *(_claim(claim) for claim in measured["claims"] if claim["times_faster"]),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(name: str, row: Mapping[str, Any]) -> str:
    title, found = CONTENDERS[name].title, row.get("difference")
    maps = ["-", "-"]
    if found:
        agreement = found["type_agreement"]
        maps = [
            f"{100 * found['max_difference']:.2f} %, {100 * found['mean_difference']:.3f} %",
            "-" if agreement is None else f"{100 * agreement:.1f} %",
        ]
    runs_as = row.get("runs_as", "-")
    if row["status"] != TIMED:
        said = row["status"] + (f": {row['reason']}" if row.get("reason") else "")
        return " | ".join([f"| {title}", runs_as, said.replace("|", "/"), "-", "-", "-", "-", *maps]) + " |"
    raw, jpeg, faster = row["ms"]["raw"], row["ms"]["jpeg"], row["ours_times_faster"]["raw"]
    cells = [
        f"{raw['median']:.1f}",
        f"{raw['p95']:.1f}",
        f"{raw['lowest_round']:.1f} to {raw['highest_round']:.1f}",
        f"{jpeg['median']:.1f}",
        "-" if faster is None else f"{faster['median']:.2f}x ({faster['min']:.2f} to {faster['max']:.2f})",
    ]
    return " | ".join([f"| {title}", runs_as, *cells, *maps]) + " |"


def _claim(claim: Mapping[str, Any]) -> str:
    ratio = claim["times_faster"]
    verdict = {None: "", True: " Holds.", False: " **Does not hold.**"}[claim["holds"]]
    asked = f" (asked: {claim['asked']:g}x)" if claim["asked"] else ""
    who = {"best": "the best peer, ", "ort-int8": "the faster INT8 of ONNX Runtime, "}.get(claim["over"], "")
    title, without = CONTENDERS[claim["contender"]].title, ""
    if claim["not_timed"]:
        who = "the best peer that was timed, " if claim["over"] == "best" else ""
        without = f" Not timed: {'; '.join(CONTENDERS[name].title for name in claim['not_timed'])}."
    return f"- dapo-edge INT8 over {who}{title}: {ratio['median']:.2f}x{asked}.{verdict}{without}"
