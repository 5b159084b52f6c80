"""INT8 in a build: ranges, the search for scales, and as few blocks given back to float as the gate demands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.onnx_graph import PlainGraph, read_plain
from dapo_edge.backends.onnx_linears import ROLES, block_name, find_linears
from dapo_edge.backends.onnx_quantized import for_cpu
from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.backends.recorded import drift_on_reference
from dapo_edge.calibration.frames import Usable, calibration_frames
from dapo_edge.calibration.ranges import ActivationRanges
from dapo_edge.calibration.run import EncoderUnderTest, ranges_over, recording_of
from dapo_edge.engine.block_chain import BlockChain, frames_that_fit
from dapo_edge.engine.emulation import MAX_DIFFERENCE, emulation_difference
from dapo_edge.engine.job import Job
from dapo_edge.engine.judge import Judge, Judged
from dapo_edge.engine.quantize import FloatOperators, Search, best_quantization, float_operators, kept_names
from dapo_edge.engine.sensitivity import BlockSensitivity, MapMeter, block_sensitivities, give_back_order
from dapo_edge.errors import RecipeError, SourceError
from dapo_edge.models.eager import EagerBackend
from dapo_edge.package import ENCODER_INT8, QUANTIZATION, EnginePackage, PackageWriter, Thresholds
from dapo_edge.quantization import Quantization
from dapo_edge.reference_data import ReferenceData

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
    on_reference: Mapping[str, float]  # mean and largest map difference on the package's own reference frames
    left_in_float: tuple[FloatOperators, ...]  # operators that are no Linear of a block
    emulation_difference: float  # mean, of anomaly maps, between OpenVINO and the NumPy emulation

    @property
    def hurting(self) -> str:
        """The blocks that hurt the maps most, in words."""
        return f"the blocks that INT8 hurts most are {_listed(give_back_order(self.sensitivities)[:WORST])}"

    def _max_migrated(self, name: str) -> float | None:
        """The largest |value| of a Linear's input after migration; None for one that was not migrated."""
        migration = self.quantization.migrations.get(name)
        return None if migration is None else float((self.ranges.linears[name].channel_max / migration).max())

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
                    "max_migrated": self._max_migrated(name),
                    "histogram": list(seen.histogram),
                }
                for name, seen in self.ranges.linears.items()
            },
            "frames": self.ranges.frames.model_dump(mode="json"),
            "left_in_float": [asdict(operators) for operators in self.left_in_float],
            "on_reference": dict(self.on_reference),
            "emulation_difference": self.emulation_difference,
        }


def check_int8_inputs(job: Job, encoder: bytes) -> None:
    """Look at ranges and kept names before minutes are spent. Raises `RecipeError`."""
    graph, settings = read_plain(encoder), job.recipe.calibration
    if settings.ranges is not None:
        ActivationRanges.read(settings.ranges).check_fit(graph)
    linears = find_linears(graph)
    if len(set(kept_names(linears, settings.keep))) == len(linears):
        raise RecipeError("calibration.keep leaves nothing to quantise", "Keep fewer blocks, or set precision: fp16")


def build_int8(job: Job, writer: PackageWriter, draft: Callable[[], EnginePackage], judge: Judge) -> Int8:
    """Add the INT8 encoder to the package's draft, passing the gate if it can be made to.

    `draft` gives the package as its folder stands. What fails even with all blocks but one in float, or where OpenVINO
    computes INT8 otherwise than its definition says, is left as it is and says so in `judged.broken`. Raises
    `RecipeError` and `SourceError` for calibration frames or ranges that can't be used.
    """
    encoder = draft().encoder_bytes()
    graph = read_plain(encoder)
    ranges = _ranges(job, encoder, graph)
    images = _search_images(job, frames_that_fit(graph))
    meter = MapMeter(BlockChain(graph, images), job.bank, job.spec)
    search = best_quantization(
        encoder, graph, ranges, job.recipe.calibration, meter, lambda done, of: job.progress("INT8 scales", done, of)
    )
    sensitivities = block_sensitivities(meter, lambda done, of: job.progress("INT8 block by block", done, of))
    del meter  # both forms of every block, compiled
    order = give_back_order(sensitivities)
    attempts = _Attempts(job, writer, draft, judge, encoder, search.quantization, order)
    count = fewest(len(order) - 1, attempts.passes)
    chosen = attempts.settle(len(order) - 1 if count is None else count)
    if chosen.given_back and not chosen.judged.broken:
        log.warning("%s went back to float, or the accuracy gate would fail", _listed(chosen.given_back))
    job.progress("INT8 emulated", 0, 1)
    difference = emulation_difference(chosen.model, images[:1], job.bank, job.spec)
    return Int8(
        judged=_with_emulation(chosen.judged, difference),
        quantization=chosen.quantization,
        given_back=chosen.given_back,
        search=search,
        sensitivities=sensitivities,
        ranges=ranges,
        attempts={number: attempt.judged for number, attempt in sorted(attempts.made.items())},
        on_reference=_on_reference(draft(), judge.reference),
        left_in_float=float_operators(graph),
        emulation_difference=difference,
    )


@dataclass(frozen=True, eq=False)
class _Attempt:
    quantization: Quantization
    model: bytes
    given_back: tuple[int, ...]
    judged: Judged


class _Attempts:
    """Encoders with more and more blocks in float, each judged when it is asked for."""

    def __init__(
        self,
        job: Job,
        writer: PackageWriter,
        draft: Callable[[], EnginePackage],
        judge: Judge,
        encoder: bytes,
        quantization: Quantization,
        order: tuple[int, ...],
    ) -> None:
        self.made: dict[int, _Attempt] = {}
        self._job, self._writer, self._draft, self._judge = job, writer, draft, judge
        self._encoder, self._quantization, self._order = encoder, quantization, order

    def passes(self, count: int) -> bool:
        """Whether the encoder with the `count` most harmful blocks in float passes; it then lies in the draft."""
        blocks = self._order[:count]
        quantization = _without(self._quantization, blocks)
        model = for_cpu(self._encoder, quantization)
        self._writer.write(ENCODER_INT8, model)
        self._writer.write(QUANTIZATION, quantization.to_bytes())
        with OpenVinoBackend.open(self._draft(), map_size="model", precision="int8", cache=False) as backend:
            judged = self._judge.judge({"int8": backend})["int8"]
        self.made.pop(count, None)  # the last entry is what lies in the draft
        self.made[count] = _Attempt(quantization, model, blocks, judged)
        return not judged.broken

    def settle(self, count: int) -> _Attempt:
        """The attempt with `count` blocks in float, which lies in the draft afterwards."""
        if count != next(reversed(self.made)):
            self.passes(count)
        return self.made[count]


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


def _listed(blocks: tuple[int, ...]) -> str:
    return ", ".join(map(block_name, blocks))


def _without(quantization: Quantization, blocks: tuple[int, ...]) -> Quantization:
    names = (f"{block_name(block)}.{role}" for block in blocks for role in ROLES)
    return quantization.without({name: GIVEN_BACK for name in names if name in quantization.ranges})


def _with_emulation(judged: Judged, difference: float) -> Judged:
    if difference <= MAX_DIFFERENCE:
        return judged
    reason = (
        "OpenVINO computes the INT8 encoder otherwise than ONNX defines it, a fault of OpenVINO or this CPU and not of "
        f"the scales: mean map difference {difference:.2g} > {MAX_DIFFERENCE}"
    )
    return replace(judged, broken=(*judged.broken, reason))


def _on_reference(draft: EnginePackage, reference: ReferenceData) -> dict[str, float]:
    """What INT8 does to the frames that travel with the package: other machines must come near to it."""
    with OpenVinoBackend.open(draft, map_size="model", precision="int8", cache=False) as backend:
        drift = drift_on_reference(draft, reference, backend, Thresholds())
    return {"map_difference_mean": drift.map_difference_mean, "map_difference_max": drift.map_difference_max}
