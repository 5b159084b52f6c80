"""What a frame costs beyond the encoder, over image size, defect types, map size, cameras and tiles, and why.

    python benchmarks/scaling.py [--out FILE] [--only "image size,tiles"]

Writes benchmarks/results/<device>/scaling.json and scaling.png, and prints its table. Each point is timed by turns
with its own encoder alone. Beside what was measured stands what the bytes explain that it touches (touched_bytes.py):
a fixed time and one bandwidth for each curve.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from common import FRAME_SIZE, bank_around, belt_frame, end_with, result_file, results_folder, say, vit_b16
from numpy.typing import NDArray
from packages import (
    bare_encoder,
    cached,
    compiled,
    fixed_input,
    opened,
    reference_package,
    tokens_of,
    vit_package,
)
from scaling_page import draw, in_markdown
from touched_bytes import (
    Cut,
    Fit,
    all_channel_pixels,
    contending_pixels,
    fitted,
    map_bytes,
    preprocess_bytes,
    probability_bytes,
)

from dapo_edge import Inspector, build
from dapo_edge.bench.feed import open_feed
from dapo_edge.bench.provenance import provenance
from dapo_edge.bench.rate import at_rate, flat_out
from dapo_edge.errors import RecipeError, did_you_mean
from dapo_edge.extras import require
from dapo_edge.files import as_bytes, write_atomically
from dapo_edge.runtime.tiling import Views
from dapo_edge.structures import Inspection

SCHEMA = "dapo-edge scaling 1"
WARM, LEAST, MOST, SECONDS = 2, 8, 200, 2.5
IMAGE_SIZES = (224, 288, 336, 384, 448, 512)
DEFECT_TYPES = (1, 2, 4, 8, 16, 32, 64)
MAP_SIZES = ((640, 480), (1280, 720), (1920, 1080), (4000, 3000))
TYPES = 20
CAMERAS = (1, 2, 3, 4, 6, 8)
CAMERA_ROUNDS, CAMERA_SECONDS, LOAD, LOAD_SECONDS = 2, 2.0, 0.7, 5.0
LARGE = (4000, 3000)
TILES = {1: (4000, 3000), 2: (2000, 3000), 4: (2000, 1500), 6: (1334, 1500), 12: (1000, 1000), 24: (667, 750)}


@dataclass(frozen=True)
class Spread:
    """Of a series of milliseconds."""

    median: float
    low: float  # quartiles
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(*(float(value) for value in np.percentile(values, (50, 25, 75))))


@dataclass(frozen=True)
class Point:
    """One frame of one kind."""

    x: float
    label: str
    bytes: int  # touched outside of the encoder
    bytes_of_all_channels: int  # if no channel could be left out of the type map
    encoder_ms: Spread  # alone
    total_ms: Spread
    outside_ms: Spread  # of the total, what is not the encoder
    n: int
    more: dict[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file)
    parser.add_argument("--only", default=",".join(DIMENSIONS), help="comma-separated names of curves; needs --out")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.only.split(",")]
    for name in names:
        if name not in DIMENSIONS:
            hint = did_you_mean(name, DIMENSIONS)
            raise RecipeError(f"there is no curve '{name}'", f"{hint}There are {', '.join(DIMENSIONS)}")
    if options.out is None and names != list(DIMENSIONS):
        parser.error("--only needs --out: the committed file holds all curves")
    out = options.out or results_folder() / "scaling.json"
    curves = {name: say(name, curve_of(name, list(DIMENSIONS[name]()))) for name in names}
    flags = [] if names == list(DIMENSIONS) else ["--only", options.only]
    document = {"schema": SCHEMA, **provenance(["python", "benchmarks/scaling.py", *flags]), "curves": curves}
    write_atomically(out, as_bytes(document))
    draw(document, out.with_suffix(".png"))
    print(in_markdown(document))
    print(f"written: {out}", file=sys.stderr)


def curve_of(name: str, points: Sequence[Point]) -> dict[str, Any]:
    """Points, what bytes say of each, and in words how far that goes."""
    rows = [asdict(point) for point in points]
    what = {"what": DIMENSIONS[name].__doc__, "points": rows}
    outside = [point.outside_ms.median for point in points]
    if min(outside) <= 0:
        return {**what, "fit": None, "note": "nothing to explain: some points take no longer than their encoder alone"}
    fit = fitted([point.bytes for point in points], outside)
    for row, measured in zip(rows, outside, strict=True):
        row["explained_ms"] = fit.ms(row["bytes"])
        row["deviation"] = row["explained_ms"] / measured - 1
    worst = max(rows, key=lambda row: abs(row["deviation"]))
    return {
        **what,
        "fit": {**asdict(fit), "largest_deviation": worst["deviation"], "at": worst["label"]},
        "note": in_words(fit, points, worst),
    }


def in_words(fit: Fit, points: Sequence[Point], worst: dict[str, Any]) -> str:
    """What bytes explain of a curve, and what they do not."""
    end = f"the largest deviation is {worst['deviation']:+.0%}, at {worst['label']}"
    if fit.gb_per_s is None:
        same = len({point.bytes for point in points}) == 1
        why = "every point touches the same bytes" if same else "whatever is touched"
        return f"the same {fit.fixed_ms:.2f} ms everywhere, {why}; {end}"
    share = fit.fixed_ms / max(point.outside_ms.median for point in points)
    fixed = f"{fit.fixed_ms:.2f} ms of each point don't depend on its bytes, {share:.0%} of the largest"
    return f"{fixed}; the rest passes at {fit.gb_per_s:.1f} GB/s; {end}"


def timed(inspect: Callable[[], Inspection], encode: Callable[[], object]) -> tuple[Spread, Spread, Spread, int]:
    """Encoder alone, whole inspection and what of it is not the encoder, by turns; and how often."""
    alone, total, outside = [], [], []
    until = float("inf")
    for number in range(WARM + MOST):
        if number == WARM:
            until = time.monotonic() + SECONDS
        if number >= WARM + LEAST and time.monotonic() > until:
            break
        started = time.perf_counter()
        encode()
        took_ms = (time.perf_counter() - started) * 1e3
        ms = inspect().ms
        if number >= WARM:
            alone.append(took_ms)
            total.append(ms["total"])
            outside.append(ms["total"] - ms["encode"])
    return Spread.of(alone), Spread.of(total), Spread.of(outside), len(alone)


def whole_frame(
    inspector: Inspector, encode: Callable[[], object], frame: NDArray[np.uint8], x: float, label: str
) -> Point:
    """A point of frames that are looked at at once."""
    spreads = timed(functools.partial(inspector.inspect, frame), encode)
    batch, manifest = inspector.backend.infer([frame]), inspector.package.manifest
    height, width = frame.shape[:2]
    size = (batch.anomaly.shape[2], batch.anomaly.shape[1])
    channels = batch.patch_probs.shape[1]
    before = preprocess_bytes(Cut(1, width, height), manifest.image_size)
    before += probability_bytes(tokens_of(inspector, frame).shape, channels)
    contending = contending_pixels(batch.patch_probs[0], *manifest.map.tables(size))
    return Point(
        x,
        label,
        before + map_bytes(size, contending),
        before + map_bytes(size, all_channel_pixels(size, channels)),
        *spreads,
    )


def image_sizes() -> Iterator[Point]:
    """ViT-B/16 in FP32 at several image sizes: a 1080p frame to a map of the image's size, 18 defect types."""
    frame = belt_frame(FRAME_SIZE)
    for size in IMAGE_SIZES:
        recipe = vit_b16().model_copy(update={"image_size": size})
        package = cached(f"vit-b16-{size}.dapo", functools.partial(build, recipe))
        with opened(package, "fp32") as inspector:
            inspector.set_bank(bank_around(tokens_of(inspector, frame), len(package.bank().names) - 1))
            yield whole_frame(inspector, bare_encoder(package, "fp32"), frame, size, f"{size} px")


def defect_types() -> Iterator[Point]:
    """ViT-B/16 at 224 px in INT8: a 1080p frame to a 1080p map of so many defect types."""
    frame, package = belt_frame(FRAME_SIZE), vit_package()
    encode = bare_encoder(package, "int8")
    with opened(package, "int8", FRAME_SIZE) as inspector:
        tokens = tokens_of(inspector, frame)
        for types in DEFECT_TYPES:
            inspector.set_bank(bank_around(tokens, types))
            yield whole_frame(inspector, encode, frame, types, f"K = {types}")


def map_sizes() -> Iterator[Point]:
    """ViT-B/16 at 224 px in INT8, 20 types: frames to maps of their size, and a 1080p frame to one of the model's."""
    package = vit_package()
    encode = bare_encoder(package, "int8")
    for size in (None, *MAP_SIZES):
        frame = belt_frame(size or FRAME_SIZE)
        side = package.manifest.image_size
        pixels = size[0] * size[1] if size else side * side
        with opened(package, "int8", size or "model") as inspector:
            inspector.set_bank(bank_around(tokens_of(inspector, frame), TYPES))
            label = f"{size[0]}x{size[1]}" if size else f"model, {side}x{side}"
            yield whole_frame(inspector, encode, frame, pixels / 1e6, label)


def cameras() -> Iterator[Point]:
    """720p cameras on one package, the reference model in FP32: milliseconds of the line per frame of any of them."""
    package, feed = reference_package(), open_feed("synthetic://1280x720@30")
    cut, size = Cut(1, feed.width, feed.height), package.manifest.image_size
    model = compiled(package.encoder_bytes(), "fp32", "THROUGHPUT")
    with Inspector(package, precision="fp32", throughput=True) as inspector:
        batch = inspector.backend.infer([feed.frames[0].image])
        tokens = tokens_of(inspector, feed.frames[0].image).shape
        touched = preprocess_bytes(cut, size) + probability_bytes(tokens, batch.patch_probs.shape[1])
        touched += map_bytes((size, size), all_channel_pixels((size, size), batch.patch_probs.shape[1]))
        for count in CAMERAS:
            alone, line = [], []
            for _ in range(CAMERA_ROUNDS):
                alone.append(1e3 / encoder_fps(model, CAMERA_SECONDS))
                fps = flat_out(inspector, feed, cameras=count, seconds=CAMERA_SECONDS)
                if fps is None:
                    raise KeyboardInterrupt
                line.append(1e3 / fps)
            rate = LOAD * 1e3 / statistics.median(line) / count
            run = at_rate(inspector, feed, fps=rate, cameras=count, seconds=LOAD_SECONDS)
            more = {
                "fps": 1e3 / statistics.median(line),
                "load": LOAD,
                "waiting_p99_ms": float(np.percentile(run.samples.of("wait"), 99)),
                "interval_ms": 1e3 / rate,
            }
            outside = [ours - encoder for ours, encoder in zip(line, alone, strict=True)]
            spreads = (Spread.of(alone), Spread.of(line), Spread.of(outside))
            yield Point(count, plural(count, "camera"), touched, touched, *spreads, CAMERA_ROUNDS, more)


def tiles() -> Iterator[Point]:
    """The reference model in FP32 on a frame of 4000x3000, in tiles without overlap."""
    package, frame = reference_package(), belt_frame(LARGE)
    encode, spec = bare_encoder(package, "fp32"), package.manifest.map
    with opened(package, "fp32") as inspector:
        for count, tile in TILES.items():
            views = Views((), tile)
            plan = inspector.plan(views, LARGE)
            if len(plan.boxes) != count:
                raise RecipeError(f"tiles of {tile} px are {len(plan.boxes)}, not {count}", "Mend TILES")
            (grid,) = plan.grids
            batch = inspector.backend.infer(plan.cut(frame), map_size="model")
            probs = grid.side_by_side(list(batch.patch_probs))
            shape = (count, *tokens_of(inspector, frame).shape[1:])
            side, channels = (spec.image_size, spec.image_size), len(probs)
            each = map_bytes(side, all_channel_pixels(side, channels))  # which `look_at` asks for, and nobody needs
            before = preprocess_bytes(Cut(count, *grid.boxes[0][2:]), spec.image_size) + count * each
            before += probability_bytes(shape, channels)
            spreads = timed(functools.partial(inspector.inspect, frame, views), repeated(encode, count))
            yield Point(
                count,
                plural(count, "tile"),
                before + map_bytes(plan.map_size, contending_pixels(probs, grid.rows, grid.columns)),
                before + map_bytes(plan.map_size, all_channel_pixels(plan.map_size, channels)),
                *spreads,
                {"tile": list(tile), "map": list(plan.map_size)},
            )


DIMENSIONS: dict[str, Callable[[], Iterator[Point]]] = {
    "image size": image_sizes,
    "defect types": defect_types,
    "map size": map_sizes,
    "cameras": cameras,
    "tiles": tiles,
}


def repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    """So many calls as one."""

    def all_of_them() -> None:
        for _ in range(times):
            call()

    return all_of_them


def plural(count: int, what: str) -> str:
    """A number of things, e.g. 2 tiles."""
    return f"{count} {what}{'s' * (count > 1)}"


def encoder_fps(model: Any, seconds: float) -> float:
    """Images per second of a compiled encoder with as many at once as OpenVINO finds best."""
    requests, image = require("openvino").AsyncInferQueue(model), fixed_input(model)
    requests.start_async([image], share_inputs=True)
    requests.wait_all()
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        requests.start_async([image], share_inputs=True)
        done += 1
    requests.wait_all()
    return done / (time.perf_counter() - started)


if __name__ == "__main__":
    end_with(main)
