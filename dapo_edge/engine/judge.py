"""One build's accuracy gate: eager torch's answers on held-out frames, and what each precision makes of the same."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from dapo_edge import gate
from dapo_edge.backends.base import Backend, MapBatch, View
from dapo_edge.data import protocol
from dapo_edge.engine.accuracy import Accuracy, GateAccuracy, drops
from dapo_edge.engine.gate_frames import GateFrames, gate_frames
from dapo_edge.engine.job import Job
from dapo_edge.engine.package_report import DriftExample, LargestDrifts
from dapo_edge.engine.range_probe import RangeProbe
from dapo_edge.engine.reference_data import RecordingBackend
from dapo_edge.errors import BackendError
from dapo_edge.gate import Drift, Drops, Expected
from dapo_edge.package import EnginePackage, Thresholds
from dapo_edge.reference_data import ReferenceData

FLOAT_FRAMES, INT8_FRAMES = 8, 200  # INT8 may change a decision in 1 of 200; a float type only has to be near
FEW_FRAMES = 50  # below it, what INT8 does to one frame in a hundred is not seen

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """What the gate found about one precision."""

    drift: Drift
    accuracy: Accuracy | None  # None without labels
    drops: Drops | None
    broken: tuple[str, ...]  # limits, in words; none when it passes


class Judge:
    """Runs eager torch once over the gate's frames, and then any number of candidates."""

    def __init__(self, job: Job, draft: EnginePackage, thresholds: Thresholds) -> None:
        """Runs eager torch. Raises `GateError` for activations that are no numbers, and what frames raise."""
        self._job, self._thresholds = job, thresholds
        self.frames = open_gate_frames(job)
        count = len(self.frames)
        done = itertools.count(1)
        job.progress("reference", 0, count)
        probe = _range_probe(draft)
        with RecordingBackend(job.method, job.bank, job.spec, probe, min(gate.TOKEN_FRAMES, count)) as eager:
            self._expected = gate.expectations(
                eager, self.frames.views, count, thresholds, lambda: job.progress("reference", next(done), count)
            )
            self.reference: ReferenceData = eager.recorded()
        self.accuracy: Accuracy | None = None  # of eager torch, once anything was judged
        self._examples: dict[str, tuple[DriftExample, ...]] = {}

    @property
    def encode_ms(self) -> float:
        """Median milliseconds of eager torch's encoder."""
        return statistics.median(one.encode_ms for one in self._expected)

    @property
    def blind_spots(self) -> tuple[str, ...]:
        """What these frames can't tell about a precision, in words; to be asked after something was judged."""
        found, count, max_flips = [], len(self.frames), self._job.recipe.gate.max_flips
        if self._thresholds.image is None:
            found.append("verdict flips, because the package has no thresholds")
        elif 0 < max_flips < 1 / count:
            found.append(f"flips as rare as {max_flips:.2%}: of {count} frames, a single one is {1 / count:.2%}")
        if self.accuracy is None:
            found.append("AUROC and AUPRO, because the frames have no labels")
        elif self.accuracy.image_auroc is None:
            found.append("image AUROC, because good or defective frames are missing")
        if self.accuracy is not None and self.accuracy.pixel_auroc is None:
            found.append("pixel AUROC and AUPRO, because no defective pixels are known")
        if count < FEW_FRAMES:
            found.append(f"what happens to fewer than one frame in {count}: there are no more")
        return tuple(found)

    @property
    def examples(self) -> tuple[DriftExample, ...]:
        """The frames with the largest drift of each precision, as it was judged last."""
        return tuple(itertools.chain.from_iterable(self._examples.values()))

    def judge(self, backends: Mapping[str, Backend]) -> dict[str, Judged]:
        """Run precisions, by name (fp32, fp16, int8), over all frames."""
        accuracy, examples, count = GateAccuracy(), LargestDrifts(), len(self.frames)
        step = f"accuracy gate of {' and '.join(backends)}"
        self._job.progress(step, 0, count)

        def on_found(index: int, view: View, expected: Expected, batches: Mapping[str, MapBatch]) -> None:
            frame = self.frames[index]
            accuracy.add(frame, expected, batches)
            for precision, batch in batches.items():
                examples.offer(precision, frame.title, frame.view, expected.anomaly, batch.anomaly[0])
            self._job.progress(step, index + 1, count)

        drifts = gate.measure_drift(self._expected, backends, self.frames.views, self._thresholds, on_found)
        labelled = accuracy.precisions
        if labelled:
            self.accuracy = accuracy.reference
        found = {}
        for precision, drift in drifts.items():
            own = labelled.get(precision)
            drop = drops(accuracy.reference, own) if own else None
            broken = gate.broken_limits(drift, drop, self._job.recipe.gate)
            found[precision] = Judged(drift, own, drop, broken)
            self._examples[precision] = examples.of(precision)
        return found


def open_gate_frames(job: Job) -> GateFrames:
    """The held-out frames of a build."""
    recipe = job.recipe
    count = recipe.gate.count or (INT8_FRAMES if recipe.precision in ("int8", "auto") else FLOAT_FRAMES)
    return gate_frames(recipe.gate, count, protocol.first_picture(protocol.GATE, recipe.seed, count))


def _range_probe(draft: EnginePackage) -> RangeProbe | None:
    """What measures the activations, or None for an encoder that no GPU engine can be made of: a CPU still runs it."""
    try:
        return RangeProbe(draft.encoder_bytes())
    except BackendError as error:
        log.warning("this package will run on CPUs only: %s", error.cause)
        return None
