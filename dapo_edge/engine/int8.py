"""INT8 in a build: ranges, the search for scales, and as few blocks given back to float as the gate demands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.onnx_graph import PlainGraph, read_plain
from dapo_edge.backends.onnx_linears import ROLES, block_name
from dapo_edge.backends.onnx_quantized import for_cpu
from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.calibration.frames import Usable, calibration_frames
from dapo_edge.calibration.ranges import ActivationRanges
from dapo_edge.calibration.run import EncoderUnderTest, ranges_over, recording_of
from dapo_edge.engine.block_chain import BlockChain, frames_that_fit
from dapo_edge.engine.emulation import MAX_DIFFERENCE, emulation_difference
from dapo_edge.engine.job import Job
from dapo_edge.engine.judge import Judge, Judged
from dapo_edge.engine.quantize import Search, best_quantization
from dapo_edge.engine.sensitivity import BlockSensitivity, MapMeter, block_sensitivities, give_back_order
from dapo_edge.errors import GateError, RecipeError, SourceError
from dapo_edge.models.eager import EagerBackend
from dapo_edge.package import ENCODER_INT8, QUANTIZATION, EnginePackage, PackageWriter
from dapo_edge.quantization import Quantization

GIVEN_BACK = "the accuracy gate failed with it in INT8"
WORST = 3  # blocks that an error names

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Int8:
    """The INT8 encoder that a build came to, which lies in the package's draft, and how."""

    judged: Judged
    quantization: Quantization
    given_back: tuple[int, ...]  # blocks that the gate forced back into float, most harmful first
    search: Search
    sensitivities: tuple[BlockSensitivity, ...]
    ranges: ActivationRanges
    attempts: Mapping[int, Judged]  # what the gate found, by the number of blocks in float
    emulation_difference: float  # mean, of anomaly maps, between OpenVINO and the NumPy emulation

    @property
    def hurting(self) -> str:
        """The blocks that hurt the maps most, in words."""
        order = give_back_order(self.sensitivities)[:WORST]
        return f"the blocks that INT8 hurts most are {', '.join(map(block_name, order))}"

    def as_json(self) -> dict[str, Any]:
        """The report's section."""
        best = self.search.quantization.settings
        return {
            **best,
            "quantized": list(self.quantization.ranges),
            "kept": dict(self.quantization.kept),
            "given_back": list(self.given_back),
            "attempts": [
                {"given_back": count, "failed": list(judged.broken)} for count, judged in self.attempts.items()
            ],
            "candidates": [
                {"estimator": trial.estimator, "alpha": trial.alpha, "map_difference": trial.difference.harm}
                for trial in self.search.trials
            ],
            "sensitivity": [
                {
                    "block": item.block,
                    "harm": item.harm,
                    "layers": list(item.difference.layers),
                    "largest": item.difference.largest,
                }
                for item in self.sensitivities
            ],
            "ranges": {
                name: {
                    "max": seen.max,
                    "chosen": self.quantization.ranges.get(name),
                    "percentile_99.9": seen.estimates["percentile_99.9"],
                }
                for name, seen in self.ranges.linears.items()
            },
            "frames": self.ranges.frames.model_dump(mode="json"),
            "emulation_difference": self.emulation_difference,
        }


def build_int8(job: Job, writer: PackageWriter, draft: Callable[[], EnginePackage], judge: Judge) -> Int8:
    """Add the INT8 encoder to the package's draft, passing the gate if it can be made to.

    `draft` gives the package as its folder stands. What fails even with all blocks but one in float is left as it is
    and says so in `judged.broken`. Raises `RecipeError` and `SourceError` for calibration frames or ranges that can't
    be used, and `GateError` where OpenVINO computes INT8 otherwise than its definition says.
    """
    encoder = draft().encoder_bytes()
    graph = read_plain(encoder)
    ranges = _ranges(job, encoder, graph)
    images = _search_images(job, frames_that_fit(graph))
    meter = MapMeter(BlockChain(graph, images), job.bank, job.spec)
    search = best_quantization(
        encoder, graph, ranges, job.recipe.calibration, meter, lambda done, of: job.progress("INT8 scales", done, of)
    )
    if not search.quantization.ranges:
        raise RecipeError("calibration.keep leaves nothing to quantise", "Keep fewer blocks, or set precision: fp16")
    sensitivities = block_sensitivities(meter, lambda done, of: job.progress("INT8 block by block", done, of))
    del meter  # both forms of every block, compiled
    difference = _emulated(job, search.encoder, images)
    attempts: dict[int, tuple[Quantization, Judged]] = {}
    order = give_back_order(sensitivities)

    def attempt(count: int) -> bool:
        """Judge the encoder with the `count` most harmful blocks in float."""
        quantization = _without(search.quantization, order[:count])
        _write(writer, quantization, for_cpu(encoder, quantization))
        with OpenVinoBackend.open(draft(), map_size="model", precision="int8", cache=False) as backend:
            judged = judge.judge({"int8": backend})["int8"]
        attempts[count] = quantization, judged
        return not judged.broken

    count = fewest(len(order) - 1, attempt)
    chosen = len(order) - 1 if count is None else count
    if chosen != next(reversed(attempts)):
        attempt(chosen)
    quantization, judged = attempts[chosen]
    found = {count: judged for count, (_, judged) in sorted(attempts.items())}
    if chosen and not judged.broken:
        log.warning("%d of %d blocks stay in float, because the accuracy gate failed with them", chosen, len(order))
    return Int8(judged, quantization, order[:chosen], search, sensitivities, ranges, found, difference)


def remove_int8(writer: PackageWriter) -> None:
    """Take the INT8 encoder out of the draft again."""
    for name in (ENCODER_INT8, QUANTIZATION):
        (writer.folder / name).unlink(missing_ok=True)


def fewest(most: int, passes: Callable[[int], bool]) -> int | None:
    """The smallest count in 0..most that passes, None if `most` itself does not.

    Looked for at 0, 1, 2, 4, ... and then in between, so that few counts are tried: what passes with some blocks given
    back is taken to pass with more.
    """
    failed, count = -1, 0
    while not passes(count):
        if count >= most:
            return None
        failed, count = count, min(most, max(1, 2 * count))
    while count - failed > 1:
        middle = (failed + count) // 2
        if passes(middle):
            count = middle
        else:
            failed = middle
    return count


def _ranges(job: Job, encoder: bytes, graph: PlainGraph) -> ActivationRanges:
    """As the recipe's file says, or measured now."""
    settings = job.recipe.calibration
    if settings.ranges is not None:
        return ActivationRanges.read(settings.ranges).check_fit(graph)
    recording = recording_of(settings, job.recipe.seed)
    return ranges_over(recording, EncoderUnderTest.of(job.method, encoder), settings.count, job.progress)


def _search_images(job: Job, count: int) -> NDArray[np.float32]:
    """A few calibration frames as the encoder's input [F, 3, S, S]. Raises `SourceError` if none can be used."""
    settings = job.recipe.calibration
    recording = calibration_frames(str(settings.frames), count, job.recipe.seed)
    views = list(Usable(job.method.image_size).of(recording.frames()))
    if not views:
        raise SourceError(f"none of {count} frames of '{recording.source}' can be used", "Check calibration.frames")
    with EagerBackend(job.method, job.bank, job.spec) as eager:
        return eager.preprocess(views).numpy()


def _without(quantization: Quantization, blocks: tuple[int, ...]) -> Quantization:
    names = (f"{block_name(block)}.{role}" for block in blocks for role in ROLES)
    return quantization.without({name: GIVEN_BACK for name in names if name in quantization.ranges})


def _write(writer: PackageWriter, quantization: Quantization, model: bytes) -> None:
    writer.write(ENCODER_INT8, model)
    writer.write(QUANTIZATION, quantization.to_bytes())


def _emulated(job: Job, model: bytes, images: NDArray[np.float32]) -> float:
    job.progress("INT8 emulated", 0, 1)
    difference = emulation_difference(model, images[:1], job.bank, job.spec)
    if not difference <= MAX_DIFFERENCE:
        raise GateError(
            f"OpenVINO computes the INT8 encoder otherwise than ONNX defines it: map difference {difference:.2g} > "
            f"{MAX_DIFFERENCE}, in the mean",
            "Nothing was written. This is a fault of the OpenVINO or the CPU, not of the scales: install the OpenVINO "
            "of constraints.txt, or build with precision: fp16",
        )
    return difference
