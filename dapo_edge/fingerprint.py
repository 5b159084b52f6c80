"""What a TensorRT plan depends on, and what this machine is in these terms."""

from __future__ import annotations

import importlib
import platform

from pydantic import BaseModel, ConfigDict, Field

from dapo_edge.device import driver_problem, gpus


class Fingerprint(BaseModel):
    """What a plan depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    gpu: str  # the driver's name of it
    sm: str  # compute capability, "8.7"
    multiprocessors: int = Field(ge=1)  # every Orin board has the same name and compute capability
    tensorrt: str
    driver_cuda: str  # the CUDA version that the driver brings, "12.6"
    system: str  # "Linux aarch64"

    def difference(self, here: Fingerprint) -> str | None:
        """What keeps a plan made for this one from running on `here`."""
        if self.system != here.system:
            return f"compiled on {self.system}, here is {here.system}"
        if (self.gpu, self.sm) != (here.gpu, here.sm):
            return f"compiled for {self.gpu} (sm {self.sm}), here is {here.gpu} (sm {here.sm})"
        if self.multiprocessors != here.multiprocessors:
            counts = f"{self.multiprocessors} multiprocessors, here it has {here.multiprocessors}"
            return f"compiled for {self.gpu} with {counts}: another board, or another power mode"
        if self.tensorrt != here.tensorrt:
            old, new = (version.partition(".")[0] for version in (self.tensorrt, here.tensorrt))
            rule = f"a plan of TensorRT {old} can't run with {new}" if old != new else "a plan runs with its own only"
            return f"compiled by TensorRT {self.tensorrt}, here is {here.tensorrt}: {rule}"
        return None


def fingerprint_here() -> Fingerprint | None:
    """The first GPU of this machine and its TensorRT; None without one of them, which `missing_here` names."""
    version = tensorrt_version()
    if version is None:
        return None
    gpu = gpus()[0]
    system = f"{platform.system()} {platform.machine()}"
    return Fingerprint(
        gpu=gpu.name,
        sm=gpu.sm,
        multiprocessors=gpu.multiprocessors,
        tensorrt=version,
        driver_cuda=gpu.driver_cuda,
        system=system,
    )


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
