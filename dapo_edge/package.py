"""The engine package: a folder `<name>.dapo/` in which the workshop leaves what the line needs.

Every file is verified by size and SHA-256 when the package is opened. A package appears at its place complete or not at
all. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dapo_edge.errors import DapoEdgeError, OutputError, PackageDamaged, PackageError, PackageIncompatible, RecipeError
from dapo_edge.folders import FolderWriter, sha256_of
from dapo_edge.kernels.map_spec import MapSize, MapSpec, check_map_size
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.quantization import Quantization
from dapo_edge.reference_data import ReferenceData

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")  # from the most to the least precise
FORMAT = 1
SUFFIX = ".dapo"
MANIFEST, ENCODER, PROMPTS = "manifest.json", "encoder.onnx", "prompts.safetensors"
THRESHOLDS, REPORT, REFERENCE = "thresholds.json", "report.json", "reference.safetensors"
ENCODER_INT8, QUANTIZATION = "encoder.int8.onnx", "quantization.safetensors"  # both or neither
REPORT_PAGE = "report.html"
_REBUILD = "Copy the package again from where it was built, or build it again: dapo-edge build RECIPE"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class FileEntry(_Part):
    """One file of the package."""

    sha256: str
    size: int  # bytes


class Preprocessing(_Part):
    """How a BGR uint8 view becomes the encoder's input."""

    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    resize: Literal["pillow-bicubic"]  # Pillow: resize(BICUBIC, reducing_gap=2.0), aspect ratio not kept


def _checked_map_size(size: MapSize) -> MapSize:
    try:
        check_map_size(size)
    except RecipeError as error:
        raise ValueError(error.cause) from error
    return size


class Manifest(_Part):
    """`manifest.json`: what the package is and what belongs to it."""

    format: int
    name: str
    method: str
    backbone: str
    weights: str  # where the backbone's weights come from
    trained: bool  # False for seeded weights: such a package shows how everything runs, and decides nothing
    tuned: bool  # whether prompts and adapters were tuned
    precision: Precision  # the package's own: what runs unless another one is asked for
    batch: int = Field(ge=1)
    image_size: int = Field(ge=1)
    feature_layers: tuple[int, ...]
    dimensions: int = Field(ge=1)  # D of patch tokens and bank rows
    map_size: Annotated[MapSize, AfterValidator(_checked_map_size)]
    map: MapSpec
    preprocessing: Preprocessing
    recipe: dict[str, Any]
    versions: dict[str, str]
    created: str  # ISO 8601, UTC
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        outside = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
        if outside:
            raise ValueError(f"{outside[0]!r} is not the name of a file in the package")
        missing = {ENCODER, PROMPTS, THRESHOLDS, REPORT} - files.keys()
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} does not belong to the package")
        of_int8 = {ENCODER_INT8, QUANTIZATION}
        if files.keys() & of_int8 and not files.keys() >= of_int8 | {REFERENCE}:
            raise ValueError(f"{ENCODER_INT8}, {QUANTIZATION} and {REFERENCE} belong together")
        return files

    @model_validator(mode="after")
    def _holds_its_precision(self) -> Manifest:
        if self.precision == "int8" and ENCODER_INT8 not in self.files:
            raise ValueError(f"its precision is int8, but {ENCODER_INT8} does not belong to it")
        return self


class Threshold(_Part):
    """A limit above which something is not good, and how sure its false-reject rate is."""

    value: float
    false_reject_rate: float  # share of the good frames that lie above the value
    confidence_95: tuple[float, float]  # Clopper-Pearson interval of that share


class Thresholds(_Part):
    """`thresholds.json`. `image` and `pixel` are None while the package is not calibrated."""

    image: Threshold | None = None  # of the image score
    pixel: Threshold | None = None  # of the anomaly map's maximum
    source: str = "not calibrated"
    frames: int = 0
    bank: str | None = None  # digest of the prompt bank that they were made with

    def for_bank(self, bank: PromptBank) -> Thresholds:
        """These limits, or none when they were made with other words."""
        return self if self.bank in (None, bank.digest) else Thresholds(source="not calibrated for this prompt bank")


@dataclass(frozen=True)
class EnginePackage:
    """An opened, verified package."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> EnginePackage:
        """Open and verify. Raises `PackageError`, `PackageDamaged` or `PackageIncompatible`."""
        path = Path(path)
        try:
            is_package = (path / MANIFEST).is_file()
        except OSError as error:
            raise PackageError(
                f"'{path}' can't be read ({error.strerror})", "Check the path and its permissions"
            ) from error
        if not is_package:
            raise _not_a_package(path)
        try:
            return cls(path, _verified(path))
        except PackageDamaged:
            # A package that is being replaced at this moment looks damaged; the second look meets the new one.
            return cls(path, _verified(path))

    def encoder_path(self, precision: str = "fp32") -> Path:
        """The portable encoder that runs in a precision. Raises `RecipeError` without INT8 in the package."""
        if precision != "int8":
            return self.path / ENCODER
        if not self.holds_int8:
            raise RecipeError(
                f"'{self.path}' holds no INT8 encoder", "Build it with precision: int8, or auto, in the recipe"
            )
        return self.path / ENCODER_INT8

    def encoder_sha256(self, precision: str = "fp32") -> str:
        """Names the portable encoder that runs in a precision. Raises `RecipeError` without INT8 in the package."""
        return self.manifest.files[self.encoder_path(precision).name].sha256

    def encoder_bytes(self, precision: str = "fp32") -> bytes:
        """The portable encoder that runs in a precision, read and verified in one go."""
        return self._verified_bytes(self.encoder_path(precision).name)

    @property
    def holds_int8(self) -> bool:
        """Whether there is an INT8 encoder."""
        return ENCODER_INT8 in self.manifest.files

    def quantization(self) -> Quantization:
        """How the INT8 encoder came out of the FP32 one. Raises `RecipeError` without INT8 in the package."""
        self.encoder_path("int8")
        return Quantization.from_bytes(self._verified_bytes(QUANTIZATION), str(self.path / QUANTIZATION))

    def bank(self) -> PromptBank:
        """The prompt bank that the package was built with."""
        bank = PromptBank.read(self.path / PROMPTS)
        if bank.dimensions != self.manifest.dimensions:
            raise PackageDamaged(
                f"the prompt bank of '{self.path}' has {bank.dimensions} dimensions, its encoder "
                f"{self.manifest.dimensions}",
                _REBUILD,
            )
        return bank

    def thresholds(self) -> Thresholds:
        """Where the good parts end."""
        try:
            return Thresholds.model_validate(self._json(THRESHOLDS))
        except ValidationError as error:
            raise PackageDamaged(f"'{self.path / THRESHOLDS}' holds no thresholds", _REBUILD) from error

    def reference(self) -> ReferenceData | None:
        """What eager torch made of some gate frames; None in packages that were built before there was any."""
        if REFERENCE not in self.manifest.files:
            return None
        path, manifest = self.path / REFERENCE, self.manifest
        rows, columns = manifest.map.grid
        tokens = (len(manifest.feature_layers), rows * columns, manifest.dimensions)
        return ReferenceData.read(path).check_fit(path, manifest.image_size, tokens)

    def report(self) -> dict[str, Any]:
        """What the accuracy gate measured at build time."""
        return self._json(REPORT)

    @property
    def digest(self) -> str:
        """SHA-256 over the manifest, and so over every file: names this very package."""
        return _digest(self._json(MANIFEST))

    def _verified_bytes(self, name: str) -> bytes:
        path = self.path / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PackageDamaged(f"'{path}' can't be read any more ({error})", _REBUILD) from error
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise PackageDamaged(f"'{path}' was replaced after the package was opened", "Open it again")
        return data

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise PackageDamaged(f"'{self.path / name}' can't be read any more ({error})", _REBUILD) from error
        if not isinstance(content, dict):
            raise PackageDamaged(f"'{self.path / name}' holds no keys", _REBUILD)
        return content


class PackageWriter(FolderWriter):
    """Writes a package beside its destination and moves it into place at the end, or leaves no trace."""

    def draft(self, fields: dict[str, Any]) -> EnginePackage:
        """The package as it stands now, to be run before it is committed."""
        files = {path.relative_to(self.folder).as_posix(): _entry(path) for path in self._written()}
        return EnginePackage(self.folder, Manifest(format=FORMAT, files=files, **fields))

    def commit(self, fields: dict[str, Any]) -> EnginePackage:
        """Write the manifest over all files that are there now, and move the package into place."""
        manifest = self.draft(fields).manifest
        content = manifest.model_dump(mode="json")
        text = json.dumps({**content, "digest": _digest(content)}, indent=2, ensure_ascii=False)
        self._finish(MANIFEST, (text + "\n").encode())
        return EnginePackage(self.destination, manifest)

    def _check(self) -> None:
        if self.destination.is_symlink():
            self.destination = Path(os.path.realpath(self.destination))
        if not str(self.destination).isprintable():
            raise OutputError(f"the name {str(self.destination)!a} can't be printed", "Use another name with -o")
        if (self.destination.parent / MANIFEST).is_file():
            raise OutputError(f"'{self.destination}' lies inside another package", "Name another place with -o")
        if self.destination.exists() and not (self.destination / MANIFEST).is_file():
            raise OutputError(
                f"'{self.destination}' exists and is not an engine package",
                "Name another place with -o, or move it away",
            )


def _verified(path: Path) -> Manifest:
    manifest = _read_manifest(path / MANIFEST)
    for name, entry in manifest.files.items():
        _verify(path / name, entry)
    return manifest


def _not_a_package(path: Path) -> DapoEdgeError:
    if path.is_file():
        return PackageError(f"'{path}' is a file, an engine package is a folder", "Unpack it first: unzip FILE")
    if path.is_dir():
        return PackageError(f"'{path}' is not an engine package: it has no {MANIFEST}", _REBUILD)
    folder = path.parent if path.parent.is_dir() else Path()
    there = ", ".join(sorted(str(other) for other in folder.glob(f"*{SUFFIX}") if other.is_dir())) or "none here yet"
    return PackageError(f"there is no engine package '{path}'", f"Packages in that folder: {there}")


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_bytes())
        version = content["format"]
    except PermissionError as error:
        raise PackageError(f"'{path}' can't be read ({error.strerror})", "Check its permissions") from error
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise PackageDamaged(f"'{path}' can't be read ({type(error).__name__}: {error})", _REBUILD) from error
    if type(version) is not int or version < 1:
        raise PackageDamaged(f"'{path}' names no package format: {version!r:.40}", _REBUILD)
    if version > FORMAT:
        raise PackageIncompatible(
            f"'{path.parent}' has package format {version}, this dapo-edge reads up to {FORMAT}",
            "Update dapo-edge: pip install --upgrade dapo-edge",
        )
    if content.pop("digest", None) != _digest(content):
        raise PackageDamaged(f"'{path}' was edited or truncated after the build", _REBUILD)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise PackageDamaged(f"'{path}': {'.'.join(map(str, first['loc']))}: {first['msg']}", _REBUILD) from error


def _verify(path: Path, entry: FileEntry) -> None:
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise PackageDamaged(
                f"'{path}' has {size} bytes instead of {entry.size}: it was truncated or edited", _REBUILD
            )
        found = _entry(path)
    except FileNotFoundError as error:
        raise PackageDamaged(f"'{path}' is missing", _REBUILD) from error
    except OSError as error:
        raise PackageError(f"'{path}' can't be read ({error.strerror})", "Check its permissions") from error
    if found.sha256 != entry.sha256:
        raise PackageDamaged(f"'{path}' is not the file of the build: its SHA-256 differs", _REBUILD)


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(sha256=sha256_of(file), size=path.stat().st_size)


def _digest(content: dict[str, Any]) -> str:
    content = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
