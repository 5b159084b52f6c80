"""Compiled targets with made-up files, and what may be done to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dapo_edge import seal
from dapo_edge.package import ENCODER, ENCODER_INT8, QUANTIZATION, EnginePackage, Manifest
from dapo_edge.targets import KERNELS, PLAN, TARGET, TIMING, Fingerprint, TargetWriter, target_id

HERE = Fingerprint(
    gpu="NVIDIA H200", sm="9.0", multiprocessors=132, tensorrt="10.3.0", driver_cuda="12.6", system="Linux x86_64"
)
FILES = {PLAN: b"plan" * 1000, KERNELS: b"cubin", TIMING: b"timing"}


def fields(package: EnginePackage, **changes: Any) -> dict[str, Any]:
    precision = changes.get("precision", "fp16")
    return {
        "fingerprint": HERE,
        "precision": precision,
        "batch": 1,
        "encoder_sha256": package.encoder_sha256(precision),
        "kernels": {"source_sha256": "0" * 64, "toolkit": "nvcc 12.6"},
        "options": {"optimization_level": 3, "workspace_bytes": None},
        "attention": {"fused": 5, "of": 5, "known": True},
        "islands": ("blocks.2/residual",),
        "gate": {"token_cosine_min": 0.99991, "flips": 0},
        "layers": {"count": 41},
        "created": "2026-01-02T03:04:05+00:00",
        "seconds": 12.5,
        **changes,
    }


def compile_target(package: EnginePackage, **changes: Any) -> Path:
    """A target with made-up files, written as `dapo-edge compile` writes it."""
    values = fields(package, **changes)
    with TargetWriter(package.path, target_id(values["fingerprint"], values["precision"])) as writer:
        for name, data in FILES.items():
            writer.write(name, data)
        writer.commit(values)
    return writer.destination


def edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / TARGET).read_text())
    (folder / TARGET).write_text(json.dumps({**content, **changes}))


def reseal(folder: Path, **changes: Any) -> None:
    """What only the device itself can do."""
    edit(folder, **changes)
    content = json.loads((folder / TARGET).read_text())
    content.pop("seal")
    edit(folder, seal=seal.seal(content))


def with_files(package: EnginePackage, **sha256: str) -> EnginePackage:
    """The package as if its manifest named these files (encoder, int8, quantization), by their hashes."""
    names = {"encoder": ENCODER, "int8": ENCODER_INT8, "quantization": QUANTIZATION}
    files = {names[key]: {"sha256": digest, "size": 1} for key, digest in sha256.items()}
    fields = package.manifest.model_dump()
    return EnginePackage(package.path, Manifest(**{**fields, "files": {**fields["files"], **files}}))
