"""GenICam without hardware: the producer that comes with the genicam package, three cameras named red, green, blue."""

from __future__ import annotations

from pathlib import Path

import pytest
from rigs import sdks

INSTALL = "run: pip install -c constraints.txt -e '.[genicam]'"
GREEN = "VikyTL_DEV_green"


def producer() -> Path:
    """The path of the .cti, or the test is skipped."""
    sdks.preload()
    pytest.importorskip("harvesters.core", reason=f"harvesters is not installed; {INSTALL}")
    genicam = pytest.importorskip("genicam", reason=f"genicam is not installed; {INSTALL}")
    path = Path(genicam.__file__).parent / "viky.cti"
    if not path.exists():
        pytest.skip(f"this genicam has no viky.cti; {INSTALL}")
    return path


def uri(name: str = GREEN, **features: object) -> str:
    """The address of a camera, with features in the order given."""
    return "&".join([f"genicam://{name}?cti={producer()}", *(f"{key}={value}" for key, value in features.items())])
