"""ONNX → TensorRT plan on this device, judged by the package's own reference before it may be used."""

from __future__ import annotations

import contextlib
import datetime
import logging
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dapo_edge import cache, gate, seal, targets
from dapo_edge.backends import onnx_flavours, onnx_quantized, trt_api
from dapo_edge.backends.cuda import Cuda
from dapo_edge.backends.kernel_check import check_kernels
from dapo_edge.backends.recorded import NO_REFERENCE, drift_on_reference
from dapo_edge.backends.tensorrt import TensorRtBackend, check_limits
from dapo_edge.backends.trt_report import Attention, attention_fused
from dapo_edge.config import packaged_recipe
from dapo_edge.errors import BackendError, PackageIncompatible, RecipeError
from dapo_edge.extras import require
from dapo_edge.kernels.compile import Cubin, compile_kernels
from dapo_edge.package import PRECISIONS, EnginePackage
from dapo_edge.reference_data import ReferenceData
from dapo_edge.targets import KERNELS, PLAN, TIMING, Fingerprint, Target, TargetWriter, target_id

CACHE_KIND = "tensorrt"

Progress = Callable[[str, int, int], None]  # step in words, done, of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compiled:
    """A new target in its package."""

    folder: Path
    target: Target


@dataclass(frozen=True, eq=False)
class _Device:
    cuda: Cuda
    trt: trt_api.TensorRT
    fingerprint: Fingerprint


def compile_package(
    package: EnginePackage,
    *,
    precision: str | None = None,
    workspace_bytes: int | None = None,
    optimization_level: int = 3,
    on_progress: Progress = lambda step, done, of: None,
) -> Compiled:
    """Compile a package for this device's GPU, in the package's own precision or another (fp32, fp16, int8).

    Takes minutes; a timing cache makes the next time shorter. Raises `BackendError` without a GPU or where TensorRT
    gives up, `DependencyMissing` without TensorRT, pycuda or a CUDA compiler, `GateError` when the plan computes
    something else than the package's reference, `PackageIncompatible` for a package without one, `RecipeError` beyond
    the kernels' limits and for int8 of a package without INT8. Then nothing is written, and an older target stays.
    """
    started = time.monotonic()
    precision = precision or package.manifest.precision
    if precision not in PRECISIONS:
        raise RecipeError(f"unknown precision '{precision}'", f"Use one of: {', '.join(PRECISIONS)}")
    options = trt_api.BuildOptions(precision, workspace_bytes, optimization_level)
    reference = _checked(package, precision)
    with _opened_device() as device:
        id = target_id(device.fingerprint, precision)
        with TargetWriter(package.path, id) as writer:
            cubin = _write_kernels(writer, device, on_progress)
            on_progress("preparing the encoder", 0, 1)
            flavour = _flavour(package, precision, reference, device.trt.major)
            built = _build(package, device, flavour, replace(options, fp32_nodes=flavour.islands), on_progress)
            writer.write(PLAN, built.plan)
            writer.write(TIMING, built.timing_cache)
            attention = attention_fused(built.layers, flavour.attention_blocks)
            _tell_attention(attention, precision)
            drift = _passed_gate(package, device, cubin, built.plan, precision, reference, on_progress)
            about = _about_plan(package, device, cubin, built, flavour, precision)
            target = writer.commit(
                {
                    **about,
                    "options": {"workspace_bytes": workspace_bytes, "optimization_level": optimization_level},
                    "attention": asdict(attention),
                    "gate": asdict(drift),
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
        on_progress("writing the target", 1, 1)
        return Compiled(writer.destination, target)


def _write_kernels(writer: TargetWriter, device: _Device, on_progress: Progress) -> Cubin:
    on_progress("compiling the kernels", 0, 1)
    # Afresh, because what is sealed as this device's own must not come out of a folder that others may write.
    cubin = compile_kernels(device.cuda.sm, driver_cuda=device.cuda.driver_cuda, use_cache=False)
    writer.write(KERNELS, cubin.data)
    return cubin


def _about_plan(
    package: EnginePackage,
    device: _Device,
    cubin: Cubin,
    built: trt_api.BuiltPlan,
    flavour: onnx_flavours.Flavour,
    precision: str,
) -> dict[str, Any]:
    """What a target says about what it was made from."""
    return {
        "fingerprint": device.fingerprint,
        "precision": precision,
        "batch": package.manifest.batch,
        "encoder_sha256": package.encoder_sha256(precision),
        "kernels": {"source_sha256": cubin.source_sha256, "toolkit": cubin.toolkit},
        "islands": flavour.islands,
        "layers": _summary(built, flavour),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _checked(package: EnginePackage, precision: str) -> ReferenceData:
    """Everything that would stop a compile at its end, looked at before it begins; the package's reference."""
    check_limits(package.manifest, package.bank())
    if precision == "int8":
        package.quantization()
    reference = package.reference()
    if reference is None:
        raise PackageIncompatible(
            f"'{package.path}' was built before packages carried a reference to judge a plan by", NO_REFERENCE
        )
    require("onnx", extra="gpu")
    seal.prepare()
    return reference


@contextlib.contextmanager
def _opened_device() -> Any:
    with Cuda.open() as cuda:
        trt = trt_api.load()
        fingerprint = targets.fingerprint_here()
        if fingerprint is None:
            raise BackendError(targets.missing_here(), "See what this machine lacks: dapo-edge doctor")
        yield _Device(cuda, trt, fingerprint)


def _flavour(package: EnginePackage, precision: str, reference: ReferenceData, major: int) -> onnx_flavours.Flavour:
    model, ranges = package.encoder_bytes(), reference.ranges
    if precision == "fp32":
        return onnx_flavours.fp32_flavour(model)
    if precision == "fp16":
        flavour = onnx_flavours.fp16_flavour(model, ranges)
    else:
        between: onnx_flavours.Precision = "fp16" if major >= 10 else "fp32"
        flavour = onnx_quantized.int8_flavour(model, package.quantization(), ranges, precision=between)
    if flavour.islands:
        log.warning("%d operators compute in fp32, because their values don't fit into fp16", len(flavour.islands))
    return flavour


def _build(
    package: EnginePackage,
    device: _Device,
    flavour: onnx_flavours.Flavour,
    options: trt_api.BuildOptions,
    on_progress: Progress,
) -> trt_api.BuiltPlan:
    """Build with the timings of earlier builds on this very kind of device, from the cache or the older target."""
    here = device.fingerprint
    key = cache.key_of(here.gpu, here.sm, here.multiprocessors, here.tensorrt, here.driver_cuda, platform.machine())
    on_progress("building the plan", 0, 1)
    built = trt_api.build_plan(
        device.trt,
        flavour.model,
        options,
        cache.load(CACHE_KIND, key) or _timings_of_target(package, device, options.precision),
        lambda phase, done, total: on_progress(f"building the plan: {phase}", done, total),
    )
    cache.store(CACHE_KIND, key, built.timing_cache)
    return built


def _timings_of_target(package: EnginePackage, device: _Device, precision: str) -> bytes | None:
    folder = package.path / targets.FOLDER / target_id(device.fingerprint, precision)
    judgement = targets.judge(folder, package, device.fingerprint)
    if judgement.verdict == "refuse" or judgement.target is None or TIMING not in judgement.target.files:
        return None
    return targets.read_file(folder, judgement.target, TIMING)


def _tell_attention(attention: Attention, precision: str) -> None:
    if not attention.known:
        log.warning("this TensorRT does not tell whether attention runs as fused kernels")
    elif attention.fused < attention.of:
        hope = "--precision fp16, or a newer TensorRT," if precision == "fp32" else "a newer TensorRT"
        log.warning(
            "attention fused: %d/%d; a block that is not runs several times slower: %s may fuse it",
            attention.fused,
            attention.of,
            hope,
        )


def _passed_gate(
    package: EnginePackage,
    device: _Device,
    cubin: Cubin,
    plan: bytes,
    precision: str,
    reference: ReferenceData,
    on_progress: Progress,
) -> gate.Drift:
    """Compare the plan, on the GPU, with what eager torch made of the same views. Raises `GateError`."""
    on_progress("accuracy gate", 0, len(reference.views))
    count = len(reference.views)
    with TensorRtBackend(package, device.cuda, cubin.data, plan, map_size="model", precision=precision) as compiled:
        drift = drift_on_reference(
            package, reference, compiled, package.thresholds(), lambda done: on_progress("accuracy gate", done, count)
        )
        on_progress("checking the kernels", 0, 1)
        check_kernels(compiled, package)
    remedy = "No target was written. Compile with --precision fp32, or build with wider limits under 'gate'"
    gate.refuse(f"the plan in {precision}", _broken(package, precision, drift), remedy)
    return drift


def _broken(package: EnginePackage, precision: str, drift: gate.Drift) -> tuple[str, ...]:
    """INT8 passed the gate when it was built, on many frames; here it must do to these few what it did to them then."""
    if precision == "int8":
        return gate.broken_repeat(drift, package.report())
    return gate.broken_limits(drift, None, packaged_recipe(package.manifest.recipe).gate)


def _summary(built: trt_api.BuiltPlan, flavour: onnx_flavours.Flavour) -> dict[str, Any]:
    kinds = Counter(layer.kind or "unknown" for layer in built.layers)
    return {
        "count": len(built.layers),
        "kinds": dict(sorted(kinds.items())),
        "int8_linears": len(flavour.quantized),
        "build_seconds": round(built.seconds, 1),
        "peak_device_bytes": built.peak_device_bytes,
    }
