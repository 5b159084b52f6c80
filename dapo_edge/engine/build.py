"""Recipe in, engine package out: encode the words, export the encoder, calibrate, pass the gate, move into place."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import logging
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dapo_edge import __version__, gate
from dapo_edge.backends.base import Backend
from dapo_edge.backends.openvino import OpenVinoBackend
from dapo_edge.calibration.thresholds import threshold_at
from dapo_edge.config import Recipe
from dapo_edge.data import protocol
from dapo_edge.device import cpu_name
from dapo_edge.engine.export import export_encoder
from dapo_edge.engine.frames import build_frames
from dapo_edge.engine.ranges import RangeProbe
from dapo_edge.engine.reference_data import RecordingBackend
from dapo_edge.errors import BackendError, RecipeError
from dapo_edge.folders import writing_to
from dapo_edge.kernels.map_spec import MapSize, MapSpec
from dapo_edge.models.method import Method, method_class, method_of
from dapo_edge.package import (
    ENCODER,
    PROMPTS,
    REFERENCE,
    REPORT,
    SUFFIX,
    THRESHOLDS,
    EnginePackage,
    PackageWriter,
    Preprocessing,
    Thresholds,
)
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.reference_data import ReferenceData

REPORT_SCHEMA = "dapo-edge report 1"
MIN_CALIBRATION_FRAMES = 8

Progress = Callable[[str, int, int], None]  # step in words, done, of

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Job:
    recipe: Recipe
    method: Method
    bank: PromptBank
    spec: MapSpec
    progress: Progress


def build(
    recipe: Recipe, destination: str | Path | None = None, on_progress: Progress = lambda step, done, of: None
) -> EnginePackage:
    """Build an engine package at `destination` (default: engines/<name>.dapo), replacing an older one at the end.

    Raises `RecipeError`, `DependencyMissing`, `GateError` or `OutputError`; then nothing is left behind and an older
    package stays as it was.
    """
    destination = Path(destination or Path("engines") / f"{recipe.name}{SUFFIX}")
    method_class(recipe.method)  # an unknown one shows before anything is written
    _check_inputs(recipe)
    with PackageWriter(destination) as writer:
        on_progress("loading the backbone", 0, 1)
        method = method_of(recipe)
        on_progress("encoding the words", 0, 1)
        job = _Job(
            recipe,
            method,
            method.bank(recipe.prompts.defects, recipe.prompts.object),
            map_spec(recipe, method),
            on_progress,
        )
        writer.write(PROMPTS, job.bank.to_bytes())
        on_progress("exporting the encoder", 0, 1)
        with writing_to(writer.folder / ENCODER):
            export_encoder(method, writer.folder / ENCODER, recipe.batch)
        writer.write(REPORT, b"{}")
        writer.write(THRESHOLDS, _as_bytes(Thresholds().model_dump(mode="json")))
        draft = writer.draft(_manifest_fields(job))
        thresholds = _calibrated(job, draft)
        writer.write(THRESHOLDS, _as_bytes(thresholds.model_dump(mode="json")))
        report, reference = _passed_gate(job, draft, thresholds)
        writer.write(REPORT, _as_bytes(report))
        writer.write(REFERENCE, reference.to_bytes())
        on_progress("writing the package", 0, 1)
        package = writer.commit(_manifest_fields(job))
        on_progress("writing the package", 1, 1)
        return package


def _check_inputs(recipe: Recipe) -> None:
    """Look for every file that the recipe names, before minutes are spent. Raises `RecipeError` or `SourceError`."""
    for key, path in (("backbone.checkpoint", recipe.backbone.checkpoint), ("prompts.tuned", recipe.prompts.tuned)):
        if path is not None and not path.is_file():
            raise RecipeError(f"'{path}' does not exist", f"Check '{key}' in the recipe")
    for frames in (recipe.thresholds.frames, recipe.gate.frames):
        if frames is not None:
            build_frames(frames, 1, good_only=True, seed=0)


def map_spec(recipe: Recipe, method: Method) -> MapSpec:
    """How the recipe's maps are made from the method's tokens."""
    return MapSpec(
        image_size=method.image_size,
        grid=method.grid,
        temperature=method.temperature,
        align_corners=method.align_corners,
        smoothing_px=recipe.map.smoothing_px,
        score=recipe.map.score,
    )


def _manifest_fields(job: _Job) -> dict[str, Any]:
    recipe, method = job.recipe, job.method
    return {
        "name": recipe.name,
        "method": recipe.method,
        "backbone": method.clip.name,
        "weights": method.clip.weights,
        "trained": method.clip.trained,
        "tuned": method.tuned,
        "precision": recipe.precision,
        "batch": recipe.batch,
        "image_size": method.image_size,
        "feature_layers": method.feature_layers,
        "dimensions": job.bank.dimensions,
        "map_size": recipe.map.size,
        "map": job.spec,
        "preprocessing": Preprocessing(mean=method.clip.mean, std=method.clip.std, resize="pillow-bicubic"),
        "recipe": recipe.model_dump(mode="json"),
        "versions": _versions(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _calibrated(job: _Job, draft: EnginePackage) -> Thresholds:
    """Run the good frames through what will really run on the line, and set the limits behind them."""
    wanted = job.recipe.thresholds
    if wanted.frames is None:
        return Thresholds()
    first = protocol.first_picture(protocol.THRESHOLDS, job.recipe.seed, wanted.count)
    views = build_frames(wanted.frames, wanted.count, good_only=True, seed=first)
    if len(views) < MIN_CALIBRATION_FRAMES:
        raise RecipeError(
            f"'{wanted.frames}' holds {len(views)} frames of good parts, thresholds need {MIN_CALIBRATION_FRAMES}",
            "Add more good parts, or set thresholds.frames: null to build without thresholds",
        )
    scores, highest = [], []
    with _open(draft, job.recipe.precision, job.recipe.map.size) as backend:
        for done, view in enumerate(views):
            job.progress("calibrating thresholds", done, len(views))
            batch = backend.infer([view])
            scores.append(float(batch.image_scores[0]))
            highest.append(float(batch.anomaly[0].max()))
    return Thresholds(
        image=threshold_at(scores, wanted.false_reject_rate),
        pixel=threshold_at(highest, wanted.false_reject_rate),
        source=wanted.frames,
        frames=len(views),
        bank=job.bank.digest,
    )


def _passed_gate(job: _Job, draft: EnginePackage, thresholds: Thresholds) -> tuple[dict[str, Any], ReferenceData]:
    """Compare FP32, and the recipe's precision, with eager torch. Raises `GateError`.

    Returns the report, and what a device needs to compare its own encoder with eager torch.
    """
    recipe = job.recipe
    first = protocol.first_picture(protocol.GATE, recipe.seed, recipe.gate.count)
    views = build_frames(recipe.gate.frames, recipe.gate.count, good_only=False, seed=first)
    done = itertools.count(1)
    job.progress("accuracy gate", 0, len(views))
    with contextlib.ExitStack() as stack:
        probe = _range_probe(draft)
        eager = stack.enter_context(RecordingBackend(job.method, job.bank, job.spec, probe, len(views)))
        compiled: dict[str, Backend] = {
            precision: stack.enter_context(_open(draft, precision))
            for precision in dict.fromkeys(("fp32", recipe.precision))
        }
        drifts, eager_ms = gate.measure_drift(
            eager, compiled, views, thresholds, lambda: job.progress("accuracy gate", next(done), len(views))
        )
    gate.check_export(drifts["fp32"])
    remedy = (
        "Nothing was written. Build with precision: fp32, or widen the limits under 'gate' if the drift is acceptable"
    )
    gate.check_limits(f"precision {recipe.precision}", drifts[recipe.precision], recipe.gate, remedy)
    report = {
        "schema": REPORT_SCHEMA,
        "device": cpu_name(),
        "reference": {"backend": "eager torch fp32", "encode_ms": eager_ms},
        "frames": {"source": recipe.gate.frames, "count": len(views)},
        "limits": recipe.gate.model_dump(mode="json"),
        "precisions": {precision: asdict(drift) for precision, drift in drifts.items()},
    }
    return report, eager.recorded()


def _range_probe(draft: EnginePackage) -> RangeProbe | None:
    """What measures the activations, or None for an encoder that no GPU engine can be made of: a CPU still runs it."""
    try:
        return RangeProbe(draft.encoder_bytes())
    except BackendError as error:
        log.warning("this package will run on CPUs only: %s", error.cause)
        return None


def _open(draft: EnginePackage, precision: str, map_size: MapSize = "model") -> OpenVinoBackend:
    """A backend for the draft, whose compiled model is not kept: a draft is never opened again."""
    return OpenVinoBackend.open(draft, map_size=map_size, precision=precision, cache=False)


def _versions() -> dict[str, str]:
    packages = ("torch", "open_clip_torch", "onnx", "openvino", "numpy", "pillow")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"dapo-edge": __version__, "python": platform.python_version(), **versions}


def _as_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
