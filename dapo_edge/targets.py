"""Compiled targets of an engine package: `<package>/targets/<id>/`, made on the device that runs them.

A target is no part of the package's manifest: the package stays the same on every device, and its digest with it.
`target.json` names every file of the target with size and SHA-256, and carries the seal of this device's key.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from dapo_edge import seal
from dapo_edge.device import driver_problem, gpus
from dapo_edge.errors import OutputError, PackageDamaged, PackageError, PackageIncompatible
from dapo_edge.folders import FolderWriter, writing_to
from dapo_edge.package import ENCODER, MANIFEST, EnginePackage, FileEntry, _entry

FORMAT = 1
FOLDER = "targets"
TARGET, PLAN, KERNELS, TIMING = "target.json", "encoder.plan", "kernels.cubin", "timing.cache"
# The most exact one first: without the package's own precision, no speed is bought with accuracy.
PRECISIONS = ("fp32", "fp16", "int8")

Precision = Literal["fp32", "fp16", "int8"]
Verdict = Literal["load", "compile again", "refuse"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Fingerprint(_Part):
    """What a plan depends on."""

    gpu: str  # the driver's name of it
    sm: str  # compute capability, "8.7"
    tensorrt: str
    driver_cuda: str  # the CUDA version that the driver brings, "12.6"
    system: str  # "Linux aarch64"


class KernelsOrigin(_Part):
    """What `kernels.cubin` was made from."""

    source_sha256: str
    toolkit: str  # "nvcc 12.6.68"


class Attention(_Part):
    """Attention blocks that run as one fused kernel."""

    fused: int = Field(ge=0)
    of: int = Field(ge=0)
    known: bool  # False: the plan's layer names don't tell


class Target(_Part):
    """`target.json`: what was compiled, from what, for what, and how it did."""

    format: int
    fingerprint: Fingerprint
    precision: Precision
    batch: int = Field(ge=1)
    encoder_sha256: str  # of the package's encoder.onnx
    kernels: KernelsOrigin
    options: dict[str, JsonValue]  # of the TensorRT builder
    attention: Attention
    islands: tuple[str, ...]  # what runs in fp32 inside a plan of another precision
    gate: dict[str, JsonValue]  # what the accuracy gate measured
    layers: dict[str, JsonValue]  # a summary of the plan's layers
    created: str  # ISO 8601, UTC
    seconds: float = Field(ge=0)  # that compiling took
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _plain(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        strange = [name for name in files if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", name) or name == TARGET]
        if strange:
            raise ValueError(f"{strange[0]!r} is not the name of a file of a target")
        if missing := {PLAN, KERNELS} - files.keys():
            raise ValueError(f"{', '.join(sorted(missing))} does not belong to the target")
        return files


@dataclass(frozen=True)
class Judgement:
    """Whether a compiled target can be loaded here, and why (not)."""

    id: str
    verdict: Verdict
    reason: str
    target: Target | None  # None where target.json can't be trusted


@dataclass(frozen=True)
class LoadableTarget:
    """A target that was judged to load here."""

    folder: Path
    target: Target


class TargetWriter(FolderWriter):
    """Writes a target beside its place in a package and moves it there when it is complete, or leaves no trace."""

    work = "compiling"

    def __init__(self, package: str | Path, id: str) -> None:
        super().__init__(Path(package) / FOLDER / id)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with contextlib.suppress(OSError):  # other targets are in it
            self.destination.parent.rmdir()

    def write(self, name: str, data: bytes) -> None:
        """Add one file."""
        self._still_there()
        super().write(name, data)

    def commit(self, fields: dict[str, Any]) -> Target:
        """Write and seal `target.json` over all files that are there now, and move the target into place.

        `fields` are those of `Target` without `format` and `files`. Raises `OutputError`.
        """
        self._still_there()
        with writing_to(self.folder):
            files = {path.relative_to(self.folder).as_posix(): _entry(path) for path in self._written()}
        target = Target(format=FORMAT, files=files, **fields)
        content = target.model_dump(mode="json")
        text = json.dumps({**content, "seal": seal.seal(content)}, indent=2)
        self._finish(TARGET, (text + "\n").encode("ascii"))
        return target

    def _check(self) -> None:
        package, id = self.destination.parent.parent, self.destination.name
        if not (package / MANIFEST).is_file():
            raise OutputError(f"'{package}' is not an engine package", "Name the package to compile")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,199}", id) or self.destination.parent.name != FOLDER:
            raise OutputError(f"{id!a} is not the name of a target", "Use target_id()")

    def _still_there(self) -> None:
        package = self.destination.parent.parent
        if not self.folder.is_dir():
            raise OutputError(f"'{package}' was replaced while this target was compiled", _remedy(package))

    @property
    def _locks(self) -> str:
        return f".*.{self.work}-*.lock"  # of every target: after an update the next one has another name


def target_id(fingerprint: Fingerprint, precision: str) -> str:
    """A readable name: "nvidia-h200-sm90-trt10.3.0-fp16"."""
    sm = fingerprint.sm.replace(".", "")
    return "-".join([_slug(fingerprint.gpu), f"sm{_slug(sm)}", f"trt{_slug(fingerprint.tensorrt)}", _slug(precision)])


def fingerprint_here() -> Fingerprint | None:
    """The first GPU of this machine and its TensorRT; None without one of them, which `missing_here` names."""
    version = tensorrt_version()
    if version is None:
        return None
    gpu = gpus()[0]
    system = f"{platform.system()} {platform.machine()}"
    return Fingerprint(gpu=gpu.name, sm=gpu.sm, tensorrt=version, driver_cuda=gpu.driver_cuda, system=system)


def tensorrt_version() -> str | None:
    """TensorRT's own version; None without it, and without a GPU: then it is not even imported."""
    if not gpus():
        return None
    try:
        # Not importlib.metadata: a JetPack's own package need not be known to pip.
        return str(importlib.import_module("tensorrt").__version__)
    except (ImportError, OSError, AttributeError):
        return None


def missing_here() -> str:
    """Why this machine runs no target at all, as `fingerprint_here` found."""
    problem = driver_problem()
    if problem:
        return f"the CUDA driver refuses: {problem}"
    return "no TensorRT on this machine" if gpus() else "no CUDA driver on this machine"


def judge(folder: Path, package: EnginePackage, here: Fingerprint | None) -> Judgement:
    """Whether the target in `folder` can be loaded on this machine. Reads every file; raises nothing."""
    judgement = _judge_document(folder, package, here)
    return judgement if judgement.target is None else _judge_files(folder, judgement, judgement.target)


def judge_all(package: EnginePackage, here: Fingerprint | None) -> tuple[Judgement, ...]:
    """Every target of a package, sorted by id. Raises `PackageError` when its targets can't be listed."""
    return tuple(judge(folder, package, here) for folder in _folders(package))


def best(package: EnginePackage, here: Fingerprint | None, precision: str | None = None) -> LoadableTarget:
    """The target to run here: of `precision` only, else of the package's own, else the most exact one.

    Raises `PackageIncompatible`, which says of every target why not.
    """
    folders = {folder.name: folder for folder in _folders(package)}
    judgements = [_judge_document(folder, package, here) for folder in folders.values()]
    order = [precision] if precision else [package.manifest.precision, *PRECISIONS]
    reasons = []
    for judgement in sorted(judgements, key=lambda judgement: _rank(judgement, order)):
        target = judgement.target
        if judgement.verdict == "load" and target:
            if target.precision not in order:
                judgement = replace(judgement, reason=f"its precision is {target.precision}, not {precision}")
            else:
                judgement = _judge_files(folders[judgement.id], judgement, target)
                if judgement.verdict == "load":
                    return LoadableTarget(folders[judgement.id], target)
        reasons.append(f"{judgement.id}: {judgement.reason}")
    raise _nothing_loads(package, here, precision, reasons)


def read_file(folder: Path, target: Target, name: str) -> bytes:
    """One file of a target: the very bytes that were verified. Raises `PackageDamaged`."""
    entry, path = target.files.get(name), folder / name
    if entry is None:
        raise PackageDamaged(f"'{folder}' has no {name}", _remedy(folder.parent.parent))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PackageDamaged(f"'{path}' can't be read ({error.strerror})", _remedy(folder.parent.parent)) from error
    if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise PackageDamaged(f"'{path}' is not the file that was compiled", _remedy(folder.parent.parent))
    return data


def read_plan(folder: Path, target: Target) -> bytes:
    """The plan: the very bytes that were verified. Raises `PackageDamaged`."""
    return read_file(folder, target, PLAN)


def _judge_document(folder: Path, package: EnginePackage, here: Fingerprint | None) -> Judgement:
    """Judge what `target.json` says, without looking at the other files."""

    def judged(verdict: Verdict, reason: str, target: Target | None = None) -> Judgement:
        return Judgement(folder.name, verdict, reason, target)

    path = folder / TARGET
    try:
        content = json.loads(path.read_bytes())
        found, version = content.pop("seal", None), content.get("format")
    except FileNotFoundError:
        return judged("refuse", f"'{path}' is missing")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return judged("refuse", f"'{path}' can't be read ({type(error).__name__}: {error})")
    if broken := seal.broken(content, found):
        return judged("refuse", broken)
    if version != FORMAT:
        return judged("compile again", f"it has target format {version!r:.20}, this dapo-edge reads {FORMAT}")
    try:
        target = Target.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return judged("refuse", f"'{path}': {'.'.join(map(str, first['loc']))}: {first['msg']}")
    if here is None:
        return judged("refuse", missing_here(), target)
    if target.encoder_sha256 != package.manifest.files[ENCODER].sha256:
        return judged("compile again", "made from another build of this package", target)
    if difference := _difference(target.fingerprint, here):
        return judged("compile again", difference, target)
    return judged("load", _note(target, here), target)


def _difference(then: Fingerprint, here: Fingerprint) -> str | None:
    """What keeps a plan of `then` from running on `here`."""
    if then.system != here.system:
        return f"compiled on {then.system}, here is {here.system}"
    if (then.gpu, then.sm) != (here.gpu, here.sm):
        return f"compiled for {then.gpu} (sm {then.sm}), here is {here.gpu} (sm {here.sm})"
    if then.tensorrt != here.tensorrt:
        old, new = (version.partition(".")[0] for version in (then.tensorrt, here.tensorrt))
        rule = f"a plan of TensorRT {old} can't run with {new}" if old != new else "a plan runs with its own only"
        return f"compiled by TensorRT {then.tensorrt}, here is {here.tensorrt}: {rule}"
    return None


def _note(target: Target, here: Fingerprint) -> str:
    note = f"{target.precision}, batch {target.batch}, TensorRT {here.tensorrt}"
    before = target.fingerprint.driver_cuda
    if before != here.driver_cuda:
        note += f"; the driver was changed since, from CUDA {before} to {here.driver_cuda}"
    return note


def _judge_files(folder: Path, judgement: Judgement, target: Target) -> Judgement:
    """The judgement, or a refusal that names the first file that is not the compiled one."""
    for name, entry in target.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry.size:
                reason = f"'{path}' has {size} bytes instead of {entry.size}: it was truncated or edited"
            elif _entry(path).sha256 != entry.sha256:
                reason = f"'{path}' is not the file that was compiled: its SHA-256 differs"
            else:
                continue
        except FileNotFoundError:
            reason = f"'{path}' is missing"
        except OSError as error:
            reason = f"'{path}' can't be read ({error.strerror})"
        return replace(judgement, verdict="refuse", reason=reason)
    return judgement


def _folders(package: EnginePackage) -> list[Path]:
    """The package's targets; what a process is working on, or has left, begins with a dot."""
    try:
        return sorted(path for path in (package.path / FOLDER).iterdir() if path.name[0] != "." and path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PackageError(
            f"'{package.path / FOLDER}' can't be read ({error.strerror})", "Check its permissions"
        ) from error


def _rank(judgement: Judgement, order: Sequence[str]) -> tuple[int, str]:
    precision = judgement.target.precision if judgement.target else ""
    return (order.index(precision) if precision in order else len(order), judgement.id)


def _nothing_loads(
    package: EnginePackage, here: Fingerprint | None, precision: str | None, reasons: list[str]
) -> PackageIncompatible:
    remedy = _remedy(package.path)
    if precision:
        remedy = f"{remedy} --precision {precision}"
    if here is None:
        remedy = f"Run it on the CPU: --backend openvino, or on a machine with GPU and TensorRT: {remedy}"
        reasons = reasons or [missing_here()]
    what = f"of '{package.path}' no target can be loaded here" if reasons else f"'{package.path}' is not compiled yet"
    return PackageIncompatible(f"{what}{': ' if reasons else ''}{'; '.join(reasons)}", remedy)


def _remedy(package: Path) -> str:
    return f"dapo-edge compile {package}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"
