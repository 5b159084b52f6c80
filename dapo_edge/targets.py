"""Compiled targets of an engine package: `<package>/targets/<id>/`, made on the device that runs them.

A target is no part of the package's manifest: the package stays the same on every device, and its digest with it.
`target.json` names every file of the target with size and SHA-256, and carries the seal of this device's key.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from dapo_edge import seal
from dapo_edge.errors import OutputError, PackageDamaged, PackageError, PackageIncompatible
from dapo_edge.fingerprint import Fingerprint, missing_here
from dapo_edge.fingerprint import fingerprint_here as fingerprint_here
from dapo_edge.folders import FolderWriter, open_file, sha256_of
from dapo_edge.package import (
    ENCODER,
    ENCODER_INT8,
    MANIFEST,
    PRECISIONS,
    REFERENCE,
    EnginePackage,
    FileEntry,
    Precision,
    _entry,
)

FORMAT = 1
MAX_BYTES = 4 << 20  # of target.json
FOLDER = "targets"
TARGET, PLAN, KERNELS, TIMING = "target.json", "encoder.plan", "kernels.cubin", "timing.cache"

log = logging.getLogger(__name__)

Verdict = Literal["load", "compile again", "refuse"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


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
    encoder_sha256: str  # of the package's encoder for this precision: encoder.onnx, or encoder.int8.onnx for int8
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
        with self._writing(self.folder):
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
        if os.path.lexists(package / FOLDER) and not (package / FOLDER).is_dir():
            raise OutputError(f"'{package / FOLDER}' is not a folder", "Move it away, or copy the package without it")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,199}", id) or self.destination.parent.name != FOLDER:
            raise OutputError(f"{id!a} is not the name of a target", "Use target_id()")

    def _still_there(self) -> None:
        package = self.destination.parent.parent
        if not self.folder.is_dir():
            raise OutputError(f"'{package}' was replaced while this target was compiled", _remedy(package))

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Unlike other results, a target has no other place than its package.
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "opy the package to a place where you may write, and compile it there"
            remedy = f"Free some space, or c{remedy}" if full else f"C{remedy}"
            raise OutputError(OutputError.refused(path, error).cause, remedy) from error

    @property
    def _locks(self) -> str:
        return f".*.{self.work}-*.lock"  # of every target: after an update the next one has another name


def target_id(fingerprint: Fingerprint, precision: str) -> str:
    """A readable name: "nvidia-h200-sm90-trt10.3.0-fp16"."""
    sm = fingerprint.sm.replace(".", "")
    return "-".join([_slug(fingerprint.gpu), f"sm{_slug(sm)}", f"trt{_slug(fingerprint.tensorrt)}", _slug(precision)])


def judge(folder: Path, package: EnginePackage, here: Fingerprint | None) -> Judgement:
    """Whether the target in `folder` can be loaded on this machine. Reads every file; raises nothing."""
    judgement = _judge_document(folder, package, here)
    return judgement if judgement.target is None else _judge_files(folder, judgement, judgement.target)


def judge_all(package: EnginePackage, here: Fingerprint | None) -> tuple[Judgement, ...]:
    """Every target of a package, sorted by id. Raises `PackageError` when its targets can't be listed."""
    return tuple(judge(folder, package, here) for folder in _folders(package))


def best(package: EnginePackage, here: Fingerprint | None, precision: str | None = None) -> LoadableTarget:
    """The target to run here: of `precision` only, else of the package's own, else the most exact one.

    Warns where there is one of the package's own precision and another runs, because that one can't be loaded. Raises
    `PackageIncompatible`, which says of every target why not.
    """
    folders = {folder.name: folder for folder in _folders(package)}
    judgements = [_judge_document(folder, package, here) for folder in folders.values()]
    # The most exact one first: without the package's own precision, no speed is bought with accuracy.
    order = [precision] if precision else [package.manifest.precision, *PRECISIONS]
    refused: list[Judgement] = []
    for judgement in sorted(judgements, key=lambda judgement: _rank(judgement, order)):
        target = judgement.target
        if judgement.verdict == "load" and target:
            if target.precision not in order:
                judgement = replace(judgement, reason=f"its precision is {target.precision}, not {precision}")
            else:
                judgement = _judge_files(folders[judgement.id], judgement, target)
                if judgement.verdict == "load":
                    _tell_instead(package, refused, judgement.id, target)
                    return LoadableTarget(folders[judgement.id], target)
        refused.append(judgement)
    raise _nothing_loads(package, here, precision, _reasons(refused))


def how_to_compile(package: EnginePackage) -> str:
    """What brings a target for this machine: the command, or why it would refuse this package."""
    if REFERENCE in package.manifest.files:
        return _remedy(package.path)
    return f"Build the package again with this dapo-edge, it has no {REFERENCE} to judge a plan by, and compile that"


def read_file(folder: Path, target: Target, name: str) -> bytes:
    """One file of a target: the very bytes that were verified. Raises `PackageDamaged`."""
    entry, path = target.files.get(name), folder / name
    if entry is None:
        raise PackageDamaged(f"'{folder}' has no {name}", _remedy(folder.parent.parent))
    try:
        with open_file(path) as file:
            data = file.read(entry.size + 1)
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
        with open_file(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            return judged("refuse", f"'{path}' is larger than {MAX_BYTES >> 20} MB: it is none of a target")
        content = json.loads(data)
        found, version = content.pop("seal", None), content.get("format")
    except FileNotFoundError:
        return judged("refuse", f"'{path}' is missing")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return judged("refuse", f"'{path}' can't be read ({type(error).__name__}: {error})")
    if broken := seal.broken(content, found):
        return judged("refuse", broken)
    if version != FORMAT:
        named = repr(version)[:20] if isinstance(version, int | float | str | None) else "of no kind"
        return judged("compile again", f"it has target format {named}, this dapo-edge reads {FORMAT}")
    try:
        target = Target.model_validate(content)
    except RecursionError:
        return judged("refuse", f"'{path}' is nested too deeply")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return judged("refuse", f"'{path}': {'.'.join(map(str, first['loc']))}: {first['msg']}")
    if here is None:
        return judged("refuse", missing_here(), target)
    # The INT8 one names the float one and its quantization at once, of which an int8 plan was made.
    encoder = package.manifest.files.get(ENCODER_INT8 if target.precision == "int8" else ENCODER)
    if encoder is None or target.encoder_sha256 != encoder.sha256:
        return judged("compile again", "made from another build of this package", target)
    if difference := target.fingerprint.difference(here):
        return judged("compile again", difference, target)
    return judged("load", _note(target, here), target)


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
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry.size:
                    reason = f"'{path}' has {size} bytes instead of {entry.size}: it was truncated or edited"
                elif sha256_of(file) != entry.sha256:
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
        remedy = "Move it away" if isinstance(error, NotADirectoryError) else "Check its permissions"
        raise PackageError(f"'{package.path / FOLDER}' can't be read ({error.strerror})", remedy) from error


def _precision_of(judgement: Judgement) -> str:
    """As its document says, else, where that can't be trusted, its name."""
    return judgement.target.precision if judgement.target else judgement.id.rpartition("-")[2]


def _rank(judgement: Judgement, order: Sequence[str]) -> tuple[int, str]:
    precision = _precision_of(judgement)
    return (order.index(precision) if precision in order else len(order), judgement.id)


def _reasons(judgements: Sequence[Judgement]) -> list[str]:
    return [f"{judgement.id}: {judgement.reason}" for judgement in judgements]


def _tell_instead(package: EnginePackage, refused: Sequence[Judgement], id: str, target: Target) -> None:
    """Warn where a target of the package's own precision was passed over for the one that runs."""
    own = package.manifest.precision
    passed = [judgement for judgement in refused if _precision_of(judgement) == own != target.precision]
    if passed:
        reasons = "; ".join(_reasons(passed))
        log.warning(
            "no %s target can be loaded (%s), so %s runs in %s instead: %s",
            own,
            reasons,
            id,
            target.precision,
            how_to_compile(package),
        )


def _nothing_loads(
    package: EnginePackage, here: Fingerprint | None, precision: str | None, reasons: list[str]
) -> PackageIncompatible:
    remedy = how_to_compile(package)
    if precision == "int8" and ENCODER_INT8 not in package.manifest.files:
        remedy = "Build the package with precision: int8, or auto, in the recipe, and compile that"
    elif precision and REFERENCE in package.manifest.files:
        remedy = f"{remedy} --precision {precision}"
    if here is None:
        remedy = f"Run it on the CPU: --backend openvino, or on a machine with GPU and TensorRT: {remedy}"
        reasons = reasons or [missing_here()]
    what = f"of '{package.path}' no target can be loaded here" if reasons else f"'{package.path}' is not compiled yet"
    return PackageIncompatible(f"{what}{': ' if reasons else ''}{'; '.join(reasons)}", remedy)


def _remedy(package: Path) -> str:
    return f"dapo-edge compile {shlex.quote(str(package))}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"
