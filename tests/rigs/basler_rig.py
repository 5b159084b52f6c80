"""Basler cameras without hardware: the emulation inside pypylon, with pictures of our own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from rigs import sdks

INSTALL = "run: pip install -c constraints.txt -e '.[basler]'"
SERIALS = ("0815-0000", "0815-0001")


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pypylon find the cameras of `SERIALS` during this test, or skip it. The variable is read at every search."""
    sdks.preload()
    pytest.importorskip("pypylon.pylon", reason=f"pypylon is not installed; {INSTALL}")
    monkeypatch.setenv("PYLON_CAMEMU", str(len(SERIALS)))


def search_only_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the network alone during this test: each search of it takes up to half a second."""
    pylon = importlib.import_module("pypylon.pylon")
    emulated, everywhere = pylon.DeviceInfo(), pylon.TlFactory.EnumerateDevices
    emulated.SetDeviceClass("BaslerCamEmu")
    monkeypatch.setattr(pylon.TlFactory, "EnumerateDevices", lambda factory: everywhere(factory, [emulated]))


def uri(serial: str = SERIALS[0], **features: object) -> str:
    """The address of a camera, with features in the order given."""
    return f"basler://{serial}?" + "&".join(f"{key}={value}" for key, value in features.items())


def showing(folder: Path, pixel_format: str = "BGR8Packed") -> dict[str, object]:
    """Features of a camera that shows the pictures of a folder in a circle."""
    return {
        "TestImageSelector": "Off",
        "ImageFilename": folder,
        "ImageFileMode": "On",
        "PixelFormat": pixel_format,
    }


def node(source: Any, name: str) -> Any:
    """A feature of an open source's camera, past the source."""
    return source._camera.GetNodeMap().GetNode(name)
