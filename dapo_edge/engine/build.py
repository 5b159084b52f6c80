"""Recipe in, engine package out: encode the words, export the encoder, calibrate, pass the gate, move into place."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dapo_edge import __version__, gate
from dapo_edge.backends.openvino import OpenVinoBackend, fast_float_type
from dapo_edge.calibration.ranges import ActivationRanges
from dapo_edge.calibration.run import recording_of
from dapo_edge.calibration.thresholds import threshold_at
from dapo_edge.config import Recipe
from dapo_edge.data import protocol
from dapo_edge.device import cpu_name
from dapo_edge.engine.export import export_encoder
from dapo_edge.engine.frames import build_frames
from dapo_edge.engine.gate_frames import check_gate_frames
from dapo_edge.engine.int8 import Int8, build_int8, check_int8_inputs, remove_int8
from dapo_edge.engine.job import Job, Progress
from dapo_edge.engine.judge import Judge, Judged
from dapo_edge.engine.package_report import write_report
from dapo_edge.engine.speed import encode_latencies, fastest
from dapo_edge.errors import GateError, OutputError, RecipeError
from dapo_edge.extras import require
from dapo_edge.folders import writing_to
from dapo_edge.kernels.map_spec import MapSize, MapSpec
from dapo_edge.models.method import Method, method_class, method_of
from dapo_edge.package import (
    ENCODER,
    PROMPTS,
    REFERENCE,
    REPORT,
    REPORT_PAGE,
    SUFFIX,
    THRESHOLDS,
    EnginePackage,
    PackageWriter,
    Thresholds,
)

REPORT_SCHEMA = "dapo-edge report 2"
MIN_CALIBRATION_FRAMES = 8
log = logging.getLogger(__name__)

REFUSED = ".refused.html"  # behind the package's name: the report of a build that the gate refused


def build(
    recipe: Recipe, destination: str | Path | None = None, on_progress: Progress = lambda step, done, of: None
) -> EnginePackage:
    """Build an engine package at `destination` (default: engines/<name>.dapo), replacing an older one at the end.

    Raises `RecipeError`, `DependencyMissing`, `GateError` or `OutputError`; then nothing is left behind but, where the
    accuracy gate refused, its report (`<package>.refused.html`), and an older package stays as it was.
    """
    destination = Path(destination or Path("engines") / f"{recipe.name}{SUFFIX}")
    method_class(recipe.method)  # an unknown one shows before anything is written
    _check_inputs(recipe)
    with PackageWriter(destination) as writer:
        job = _started(recipe, writer, on_progress)
        if recipe.precision in ("int8", "auto"):
            check_int8_inputs(job, (writer.folder / ENCODER).read_bytes())
        thresholds = _calibrated(job, writer.draft(_manifest_fields(job, "fp32")))
        writer.write(THRESHOLDS, _as_bytes(thresholds.model_dump(mode="json")))
        judge = Judge(job, writer.draft(_manifest_fields(job, "fp32")), thresholds)
        writer.write(REFERENCE, judge.reference.to_bytes())
        judged, int8 = _judged(job, writer, judge)
        precision, document = _decided(job, writer, judge, judged, int8)
        writer.write(REPORT, _as_bytes(document))
        with writing_to(writer.folder / REPORT_PAGE):
            write_report(writer.folder / REPORT_PAGE, document, judge.examples)
        on_progress("writing the package", 0, 1)
        package = writer.commit(_manifest_fields(job, precision))
        with contextlib.suppress(OSError):
            _refused_page(destination).unlink(missing_ok=True)
        on_progress("writing the package", 1, 1)
        return package


def _check_inputs(recipe: Recipe) -> None:
    """Look for everything that the recipe names, before minutes are spent.

    Raises `RecipeError`, `SourceError` or `DependencyMissing`.
    """
    for package in ("jinja2", "matplotlib"):
        require(package)
    for key, path in (
        ("backbone.checkpoint", recipe.backbone.checkpoint),
        ("prompts.tuned", recipe.prompts.tuned),
    ):
        if path is not None and not path.is_file():
            raise RecipeError(f"'{path}' does not exist", f"Check '{key}' in the recipe")
    if recipe.thresholds.frames is not None:
        build_frames(recipe.thresholds.frames, 1, good_only=True, seed=0)
    check_gate_frames(recipe.gate)
    if recipe.precision in ("int8", "auto"):
        recording_of(recipe.calibration, recipe.seed)
        if recipe.calibration.ranges is not None:
            ActivationRanges.read(recipe.calibration.ranges)
        if recipe.calibration.frames == recipe.gate.frames and Path(recipe.gate.frames).exists():
            log.warning("the accuracy gate will look at the frames that INT8 is calibrated with: name others for it")


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


def _started(recipe: Recipe, writer: PackageWriter, progress: Progress) -> Job:
    """Load the method and write its words and its encoder."""
    progress("loading the backbone", 0, 1)
    method = method_of(recipe)
    progress("encoding the words", 0, 1)
    bank = method.bank(recipe.prompts.defects, recipe.prompts.object)
    writer.write(PROMPTS, bank.to_bytes())
    progress("exporting the encoder", 0, 1)
    with writing_to(writer.folder / ENCODER):
        export_encoder(method, writer.folder / ENCODER, recipe.batch)
    writer.write(REPORT, b"{}")
    writer.write(THRESHOLDS, _as_bytes(Thresholds().model_dump(mode="json")))
    return Job(recipe, method, bank, map_spec(recipe, method), method.clip.preprocessing, progress)


def _manifest_fields(job: Job, precision: str) -> dict[str, Any]:
    recipe, method = job.recipe, job.method
    return {
        "name": recipe.name,
        "method": recipe.method,
        "backbone": method.clip.name,
        "weights": method.clip.weights,
        "trained": method.clip.trained,
        "tuned": method.tuned,
        "precision": precision,
        "batch": recipe.batch,
        "image_size": method.image_size,
        "feature_layers": method.feature_layers,
        "dimensions": job.bank.dimensions,
        "map_size": recipe.map.size,
        "map": job.spec,
        "preprocessing": job.preprocessing,
        "recipe": recipe.model_dump(mode="json"),
        "versions": _versions(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _calibrated(job: Job, draft: EnginePackage) -> Thresholds:
    """Run good frames through the FP32 encoder, which stands for all precisions, and set the limits behind them.

    The gate then says of every other precision how many verdicts it changes at these very limits.
    """
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
    with _open(draft, "fp32", job.recipe.map.size) as backend:
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


def _judged(job: Job, writer: PackageWriter, judge: Judge) -> tuple[dict[str, Judged], Int8 | None]:
    """Put every precision that the recipe may end in through the gate, from the most to the least precise.

    Raises `GateError` when FP32 is not what eager torch computes.
    """
    wanted = job.recipe.precision

    def draft() -> EnginePackage:
        return writer.draft(_manifest_fields(job, "fp32"))

    floats = ["fp32"]
    if wanted == "fp16" or (wanted != "fp32" and fast_float_type()):
        floats.append("fp16")
    with contextlib.ExitStack() as stack:
        judged = judge.judge({name: stack.enter_context(_open(draft(), name)) for name in floats})
    gate.check_export(judged["fp32"].drift)
    if wanted not in ("int8", "auto"):
        return judged, None
    for spot in judge.blind_spots:
        log.warning("the accuracy gate can't tell %s", spot)
    int8 = build_int8(job, writer, draft, judge)
    return {**judged, "int8": int8.judged}, int8


def _decided(
    job: Job, writer: PackageWriter, judge: Judge, judged: Mapping[str, Judged], int8: Int8 | None
) -> tuple[str, dict[str, Any]]:
    """The package's precision, and the report. Raises `GateError` if the one that was asked for fails."""
    wanted = job.recipe.precision
    passing = [name for name, found in judged.items() if not found.broken]
    draft = writer.draft(_manifest_fields(job, "fp32"))
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(_open(draft, name)) for name in judged}
        job.progress("measuring the encoder's speed", 0, 1)
        latencies = encode_latencies(opened, judge.frames[0].view)
    candidates = {name: latencies[name] for name in passing or ["fp32"]}
    precision = fastest(candidates) if wanted == "auto" else wanted
    sizes = {name: draft.encoder_path(name).stat().st_size for name in judged}
    document = _document(job, judge, judged, int8, precision, latencies, sizes)
    if precision not in passing:
        _refuse(writer.destination, judge, judged[precision], int8, precision, document)
    if int8 and "int8" not in passing:
        remove_int8(writer)
    return precision, document


def _document(
    job: Job,
    judge: Judge,
    judged: Mapping[str, Judged],
    int8: Int8 | None,
    precision: str,
    latencies: Mapping[str, float],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    recipe = job.recipe
    return {
        "schema": REPORT_SCHEMA,
        "name": recipe.name,
        "device": cpu_name(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "precision": precision,
        "reference": {
            "backend": "eager torch fp32",
            "encode_ms": judge.encode_ms,
            "accuracy": asdict(judge.accuracy) if judge.accuracy else None,
        },
        "frames": {"source": recipe.gate.frames, "count": len(judge.frames), "labelled": judge.frames.labelled},
        "not_judged": list(judge.blind_spots),
        "limits": recipe.gate.model_dump(mode="json"),
        "precisions": {
            name: {
                **asdict(found.drift),
                "encode_ms": latencies[name],
                "size_bytes": sizes[name],
                "accuracy": asdict(found.accuracy) if found.accuracy else None,
                "drops": asdict(found.drops) if found.drops else None,
                "failed": list(found.broken),
            }
            for name, found in judged.items()
        },
        "quantization": int8.as_json() if int8 else None,
    }


def _refuse(
    destination: Path, judge: Judge, found: Judged, int8: Int8 | None, precision: str, document: dict[str, Any]
) -> None:
    page = _refused_page(destination)
    with contextlib.suppress(OutputError):  # the gate's own verdict matters more than its page
        write_report(page, document, judge.examples)
    passing = [name for name, entry in document["precisions"].items() if not entry["failed"]]
    other = f"Build with precision: {' or '.join(passing)}, or " if passing else "Look at its pictures, or "
    hurting = f"; {int8.hurting}" if int8 and precision == "int8" else ""
    more = " Other scales, or more of the line's own calibration frames, may pass." if hurting else ""
    raise GateError(
        f"precision {precision} failed the accuracy gate: {'; '.join(found.broken)}{hurting}",
        f"No package was written, only the report '{page}'. {other}widen the limits under 'gate' if the drift is "
        f"acceptable.{more}",
    )


def _refused_page(destination: Path) -> Path:
    return destination.with_name(destination.name + REFUSED)


def _open(draft: EnginePackage, precision: str, map_size: MapSize = "model") -> OpenVinoBackend:
    """A backend for the draft, whose compiled model is not kept: a draft is never opened again."""
    return OpenVinoBackend.open(draft, map_size=map_size, precision=precision, cache=False)


def _versions() -> dict[str, str]:
    packages = ("torch", "open_clip_torch", "onnx", "openvino", "numpy", "pillow")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"dapo-edge": __version__, "python": platform.python_version(), **versions}


def _as_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
