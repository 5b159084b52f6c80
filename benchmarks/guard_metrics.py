"""What the guard watches: for each metric our own work, and beside it a yardstick that we can't slow down.

Both sides run on the same cores within milliseconds of each other, so their ratio stays while the machine's speed does
not. Yardsticks call OpenVINO, NumPy and Pillow directly, with fixed inputs.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from common import bank_around, belt_frame, timed
from numpy.typing import NDArray
from packages import bare_encoder, compiled, fixed_input, opened, reference_package, vit_package
from PIL import Image
from threadpoolctl import threadpool_limits

from dapo_edge import Inspector
from dapo_edge.backends.host import make_maps, resize_view
from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.extras import require
from dapo_edge.runtime.pipeline import Pipeline
from dapo_edge.runtime.plan import CameraPlan

WARM = 1  # pairs
FRAME, MAP, TYPES = (1280, 720), (640, 480), 20
CAMERAS, FRAMES_EACH = 4, 8

Side = Callable[[], float]  # does the work once, and returns its milliseconds


@dataclass(frozen=True)
class Metric:
    """Two kinds of work that are done by turns."""

    ours: Side
    yardstick: Side
    pairs: int  # of one visit


@dataclass(frozen=True)
class Reading:
    """One metric: our time in times of the yardstick's."""

    ratio: float  # more is worse
    spread: float  # between the quartiles of the pairs, as a share of the median
    ours_ms: float
    yardstick_ms: float


def read(metric: Metric) -> Reading:
    """Do both sides by turns, each first in every other pair.

    The ratio is that of the lower quartiles: what disturbs a machine only ever adds time.
    """
    ours, yardstick = [], []
    for number in range(WARM + metric.pairs):
        if number % 2:
            own, other = metric.ours(), metric.yardstick()
        else:
            other, own = metric.yardstick(), metric.ours()
        if number >= WARM:
            ours.append(own)
            yardstick.append(other)
    ratios = np.divide(ours, yardstick)
    low, middle, high = (float(value) for value in np.percentile(ratios, (25, 50, 75)))
    own, other = (float(np.percentile(series, 25)) for series in (ours, yardstick))
    return Reading(own / other, (high - low) / middle, own, other)


def together(visits: Sequence[Reading]) -> Reading:
    """Several visits to one metric as one reading."""
    middle = [statistics.median(values) for values in zip(*map(astuple, visits), strict=True)]
    return Reading(*middle)


def slowed(call: Callable[..., Any], share: float) -> Callable[..., Any]:
    """The same call, but that it takes longer by a share of its time, which a busy core spends on nothing."""

    @functools.wraps(call)
    def slow(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments, **options)
        end = time.perf_counter() + share * (time.perf_counter() - started)
        while time.perf_counter() < end:
            pass
        return result

    return slow if share > 0 else call


@contextlib.contextmanager
def inspect_reference(plant: float) -> Iterator[Metric]:
    """A 720p frame inspected by the reference model in FP32, against its encoder alone."""
    package = reference_package()
    with Inspector(package, precision="fp32") as inspector:
        inspect = slowed(functools.partial(inspector.inspect, belt_frame(FRAME)), plant)
        yield Metric(timed(inspect), timed(bare_encoder(package, "fp32")), 80)


@contextlib.contextmanager
def inspect_vit_b16_int8(plant: float) -> Iterator[Metric]:
    """A 720p frame inspected by ViT-B/16 at 224 px in INT8, against its encoder alone."""
    package = vit_package()
    with opened(package, "int8") as inspector:
        inspect = slowed(functools.partial(inspector.inspect, belt_frame(FRAME)), plant)
        yield Metric(timed(inspect), timed(bare_encoder(package, "int8")), 24)


@contextlib.contextmanager
def preprocess(plant: float) -> Iterator[Metric]:
    """A 720p frame resized to 224 px, against its halves copied and resized by Pillow on two threads."""
    size, frame = 224, belt_frame(FRAME)
    halves = [(half, half.copy(), Image.fromarray(half)) for half in np.array_split(frame, 2)]

    def work(half: NDArray[np.uint8], copy: NDArray[np.uint8], picture: Image.Image) -> None:
        np.copyto(copy, half)
        picture.resize((size, size // 2), Image.Resampling.BILINEAR)

    def yardstick() -> None:
        # As many threads as our own resize: what else runs on the machine then costs both alike.
        helper = threading.Thread(target=work, args=halves[1])
        helper.start()
        work(*halves[0])
        helper.join()

    resize = slowed(functools.partial(resize_view, frame, size), plant)
    yield Metric(timed(resize, 5), timed(yardstick, 5), 60)


@contextlib.contextmanager
def map_vga(plant: float) -> Iterator[Metric]:
    """Patch tokens to a map of 640x480 and 20 defect types, against small products and comparisons of that size.

    Not larger: the time of a 1080p map differs by a tenth from process to process.
    """
    package = reference_package()
    with Inspector(package) as inspector:
        assert isinstance(inspector.backend, OpenVinoBackend)
        tokens, embedding = inspector.backend.encode([belt_frame(FRAME)])
    bank, spec = bank_around(tokens, TYPES), package.manifest.map
    make = slowed(functools.partial(make_maps, tokens, embedding, bank, spec, MAP), plant)
    size = 8, 120, 160  # about what a map is made in: blocks, each from a few patches
    left, right = np.ones((size[1], size[0]), np.float32), np.ones((size[0], size[2]), np.float32)
    share, best = (np.empty(size[1:], np.float32) for _ in range(2))
    above, whole = np.empty(share.shape, np.bool_), np.empty((MAP[1], MAP[0]), np.float32)

    def yardstick() -> None:
        # The same mix of memory and arithmetic as in a map, so that what else runs on the machine costs both alike.
        for top in range(0, MAP[1], size[1]):
            for start in range(0, MAP[0], size[2]):
                for _ in range(size[0]):
                    np.matmul(left, right, out=share)
                    np.greater(share, best, out=above)
                    np.maximum(share, best, out=best)
                np.copyto(whole[top : top + size[1], start : start + size[2]], best)

    with threadpool_limits(1, "blas"):
        yield Metric(timed(make, 4), timed(yardstick, 4), 60)


@contextlib.contextmanager
def four_cameras(plant: float) -> Iterator[Metric]:
    """A frame of four 720p cameras through the whole line, reference model, against its encoder with all cores busy."""
    package = reference_package()
    frames = CAMERAS * FRAMES_EACH
    model = compiled(package.encoder_bytes(), "fp32", "THROUGHPUT")
    requests, image = require("openvino").AsyncInferQueue(model), fixed_input(model)

    def encode_all() -> None:
        for _ in range(frames):
            requests.start_async([image], share_inputs=True)
        requests.wait_all()

    with Inspector(package, precision="fp32", throughput=True) as inspector:
        inspector.inspect_batch = slowed(inspector.inspect_batch, plant)  # type: ignore[method-assign]

        def line() -> float:
            options = f"@1000?loop=4&frames={FRAMES_EACH}"
            size = f"{FRAME[0]}x{FRAME[1]}"
            plans = [
                CameraPlan(f"c{number}", f"synthetic://{size}{options}&seed={number}", policy="wait")
                for number in range(CAMERAS)
            ]
            pipeline = Pipeline(inspector, plans)
            pipeline.run()  # draws its frames before its own clock starts
            return frames * 1e3 / pipeline.as_json()["fps"]

        yield Metric(line, timed(encode_all), 3)


@contextlib.contextmanager
def int8_encoder(plant: float) -> Iterator[Metric]:
    """The INT8 encoder of ViT-B/16 at 224 px, against its FP32 encoder."""
    package = vit_package()
    encode = slowed(bare_encoder(package, "int8"), plant)
    yield Metric(timed(encode), timed(bare_encoder(package, "fp32")), 12)


@dataclass(frozen=True)
class Watched:
    """A metric, and in how many processes it is read."""

    opened: Callable[[float], contextlib.AbstractContextManager[Metric]]
    visits: int = 2


# What takes a millisecond depends on where in memory a process' arrays lie: these differ by 4 % between processes.
OF_MEMORY = 7
METRICS: dict[str, Watched] = {
    "inspect, surface-tiny fp32": Watched(inspect_reference),
    "inspect, ViT-B/16 int8": Watched(inspect_vit_b16_int8),
    "preprocess 720p": Watched(preprocess, OF_MEMORY),
    "map 640x480, K = 20": Watched(map_vga, OF_MEMORY),
    "line, 4 cameras": Watched(four_cameras),
    "encode int8 / fp32": Watched(int8_encoder),
}
