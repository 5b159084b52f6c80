"""What encoders cost, what this machine can do at best, and how near the one comes to the other.

    python benchmarks/roofline.py [--out FILE] [--full-size]

Writes benchmarks/results/<device>/roofline.json and prints its tables. Operations and bytes are counted from the very
graphs that packages hold. `--full-size` also times ViT-L/14, minutes more. What other devices could do at best follows
from their ratings (ratings.yaml) and is marked as a prediction everywhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ceilings import Peak, copy_gb_per_s, gpu_ceilings, peaks
from common import HERE, end_with, released, result_file, results_folder, say, timed
from graph_work import Limit, Work, count, limit_of
from packages import bare_inference, int8_encoder, reference_package, vit_package
from pydantic import model_validator

from dapo_edge.backends.openvino import fast_float_type
from dapo_edge.bench.provenance import provenance
from dapo_edge.config import Recipe
from dapo_edge.engine import speed
from dapo_edge.engine.export import export_encoder
from dapo_edge.files import as_bytes, write_atomically
from dapo_edge.models.method import method_of
from dapo_edge.package import Preprocessing
from dapo_edge.sections import Section, parse_section, read_yaml

SCHEMA = "dapo-edge roofline 1"
RATINGS = HERE / "ratings.yaml"
MEASURED, PREDICTION = "measured", "prediction"
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 10.0, 5, 200
PREDICTED = ("fp16", "int8")


class Rating(Section):
    """One device, as its maker rates it."""

    name: str
    tera_per_s: dict[str, float]  # by precision, dense
    gb_per_s: float
    efficiency: str  # which of `Ratings.efficiency` is the nearest
    source: str


class Efficiency(Section):
    """Limit / measured time, as others published it for one device at batch 1."""

    of: str
    shares: dict[str, tuple[float, float]]  # by precision, from and to
    source: str


class Ratings(Section):
    """ratings.yaml."""

    devices: tuple[Rating, ...]
    efficiency: dict[str, Efficiency]

    @model_validator(mode="after")
    def _known(self) -> Ratings:
        unknown = sorted({device.efficiency for device in self.devices} - set(self.efficiency))
        if unknown:
            raise ValueError(f"no efficiency is called {', '.join(unknown)}")
        return self


@dataclass(frozen=True, eq=False)
class Configuration:
    """An encoder whose operations are counted, and which is timed in the precisions that there are."""

    name: str
    work: Work
    encoders: Mapping[str, bytes]  # ONNX by precision (fp32, fp16, int8); none: not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, default=results_folder() / "roofline.json")
    parser.add_argument("--full-size", action="store_true")
    options = parser.parse_args()
    ratings = read_ratings(RATINGS)
    ceilings = measured_ceilings()
    say("ceilings", ceilings)
    best = {precision: peak["tera_per_s"] for precision, peak in ceilings["best"].items()}
    configurations, predictions = {}, []
    for configuration in counted(options.full_size):
        configurations[configuration.name] = say(
            configuration.name, described(configuration, best, ceilings["copy_gb_per_s"])
        )
        predictions += predicted(configuration.name, configuration.work, ratings)
    flag = ["--full-size"] * options.full_size
    document = {
        "schema": SCHEMA,
        **provenance(["python", "benchmarks/roofline.py", *flag]),
        "ceilings": ceilings,
        "configurations": configurations,
        "predictions": predictions,
    }
    write_atomically(options.out, as_bytes(document))
    print(in_markdown(document))
    print(f"written: {options.out}", file=sys.stderr)


def counted(full_size: bool) -> Iterator[Configuration]:
    """One after the other, since one encoder of ViT-L fills gigabytes; they are timed only for `full_size`."""
    small, middle = reference_package(), vit_package()
    int8, _ = int8_encoder(small.encoder_bytes(), small.manifest.preprocessing, small.manifest.backbone)
    yield _configuration("surface-tiny at 144 px", small.encoder_bytes(), int8)
    yield _configuration("ViT-B/16 at 224 px", middle.encoder_bytes(), middle.encoder_bytes("int8"))
    for size in (336, 518):
        name = f"ViT-L/14 at {size} px"
        encoder, preprocessing, backbone = _exported(released().model_copy(update={"image_size": size}))
        if full_size:
            yield _configuration(name, encoder, int8_encoder(encoder, preprocessing, backbone)[0])
        else:
            yield Configuration(name, count(encoder), {})


def measured_ceilings() -> dict[str, Any]:
    """What this machine reached in each precision by each library, the best of them, and its copy."""
    found = peaks()
    return {
        "kind": MEASURED,
        "peaks": {precision: [asdict(peak) for peak in several] for precision, several in found.items()},
        "best": {precision: asdict(_best(several)) for precision, several in found.items()},
        "copy_gb_per_s": copy_gb_per_s(),
        "gpu": gpu_ceilings(),
    }


def described(configuration: Configuration, tera_per_s: dict[str, float], gb_per_s: float) -> dict[str, Any]:
    """Counts, and the measured times beside this machine's limits."""
    work, fast = configuration.work, fast_float_type() or "fp32"
    names = {"fp32": "fp32", "fp16": fast, "int8": "int8"}
    measured = {}
    for precision, times_ms in encoder_times(configuration.encoders).items():
        limit = limit_of(work, names[precision], tera_per_s, gb_per_s, fast)
        measured[names[precision]] = against(limit, times_ms)
    return {
        "gmac": work.total.macs / 1e9,
        "gflop": work.flops / 1e9,
        "gmac_of": {"linears": work.linears.macs / 1e9, "attention": work.attention.macs / 1e9}
        | {"patch embedding, adapters, projection": work.rest.macs / 1e9},
        "weights": work.total.weights,
        "weight_mb": {name: work.weight_bytes(name) / 1e6 for name in ("fp32", "fp16", "int8")},
        "activation_mb": {name: work.activation_bytes(name) / 1e6 for name in ("fp32", "fp16", "int8")},
        "measured": measured,
    }


def against(limit: Limit, times_ms: Sequence[float]) -> dict[str, Any]:
    """Measured times as shares of what a limit allows."""
    middle = statistics.median(times_ms)
    low, high = (float(value) for value in np.percentile(times_ms, (25, 75)))
    return {
        "kind": MEASURED,
        "n": len(times_ms),
        "median_ms": middle,
        "quartiles_ms": [low, high],
        "limit_ms": limit.ms,
        "binds": limit.binds,
        "share_of_limit": limit.ms / middle,
        "share_of_compute": limit.compute_ms / middle,
        "share_of_bandwidth": limit.weights_ms / middle,
    }


def encoder_times(encoders: Mapping[str, bytes]) -> dict[str, list[float]]:
    """Milliseconds of each encoder, by turns, on all cores."""
    calls = {precision: bare_inference(encoder, precision) for precision, encoder in encoders.items()}
    return by_turns(calls)


def by_turns(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each call, after one round that does not count."""
    sides = {name: timed(call) for name, call in calls.items()}
    return speed.by_turns(sides, SECONDS, LEAST_ROUNDS, MOST_ROUNDS)


def read_ratings(path: Path) -> Ratings:
    """Raises `RecipeError` for a file that is not of this form."""
    return parse_section(
        Ratings, read_yaml(path, "table of ratings"), str(path), schema="benchmarks/roofline.py, Ratings"
    )


def predicted(name: str, work: Work, ratings: Ratings) -> list[dict[str, Any]]:
    """Lower limits of one image on devices that were not measured, and what published efficiencies make of them."""
    rows = []
    for device in ratings.devices:
        known = ratings.efficiency[device.efficiency]
        for precision in PREDICTED:
            limit = limit_of(work, precision, device.tera_per_s, device.gb_per_s)
            shares = known.shares.get(precision)
            rows.append(
                {
                    "kind": PREDICTION,
                    "device": device.name,
                    "configuration": name,
                    "precision": precision,
                    "limit_ms": limit.ms,
                    "binds": limit.binds,
                    "expected_ms": [limit.ms / max(shares), limit.ms / min(shares)] if shares else None,
                    "expected_as_on": known.of if shares else None,
                }
            )
    return rows


def in_markdown(document: Mapping[str, Any]) -> str:
    """The tables of a document, to be read by people."""
    lines = ["| configuration | precision | measured, ms | limit, ms | share | binds |", "|---|---|--:|--:|--:|---|"]
    for name, entry in document["configurations"].items():
        for precision, row in entry["measured"].items():
            times = f"{_short(row['median_ms'])} | {_short(row['limit_ms'])} | {row['share_of_limit']:.0%}"
            lines.append(f"| {name}, {entry['gmac']:.3g} GMAC | {precision} | {times} | {row['binds']} |")
    lines += [
        "",
        "**Predictions, not measured**: the lower limit in ms; in brackets what published efficiencies make of it.",
    ]
    names = list(document["configurations"])
    lines += ["", f"| device | precision | {' | '.join(names)} |", f"|---|---|{'--:|' * len(names)}"]
    rows: dict[tuple[str, str], list[str]] = {}
    for row in document["predictions"]:
        ends = list(dict.fromkeys(map(_short, row["expected_ms"] or ())))
        expected = f" ({'-'.join(ends)})" if ends else ""
        rows.setdefault((row["device"], row["precision"]), []).append(_short(row["limit_ms"]) + expected)
    return "\n".join(lines + [f"| {' | '.join([*key, *cells])} |" for key, cells in rows.items()])


def _short(ms: float) -> str:
    """Two digits, or all before the point."""
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.2g}"


def _best(several: Sequence[Peak]) -> Peak:
    return max(several, key=lambda peak: peak.tera_per_s)


def _configuration(name: str, encoder: bytes, int8: bytes) -> Configuration:
    floats = {"fp32": encoder, "fp16": encoder} if fast_float_type() else {"fp32": encoder}
    return Configuration(name, count(encoder), {**floats, "int8": int8})


def _exported(recipe: Recipe) -> tuple[bytes, Preprocessing, str]:
    """Encoder, preprocessing and backbone, without the rest of a package: counts depend on shapes alone."""
    method = method_of(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "encoder.onnx"
        export_encoder(method, path)
        return path.read_bytes(), method.clip.preprocessing, method.clip.name


if __name__ == "__main__":
    end_with(main)
