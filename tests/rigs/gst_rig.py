"""GStreamer in the test process itself: `videotestsrc` is the camera."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pytest

from dapo_edge.runtime.sources.gst import compilers_unwinder_first

INSTALL = (
    "run: apt-get install -y --no-install-recommends python3-gi gir1.2-gst-plugins-base-1.0 "
    "gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad"
)
SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")  # where Debian puts gi for its own Python


def need() -> None:
    """Skip the test when a part is missing."""
    sys.path.append(str(SYSTEM_PACKAGES))  # a venv of the system's Python can use the system's gi, and nothing else
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)  # of Debian's gi, whose importer is an old one
            compilers_unwinder_first()
            gi = importlib.import_module("gi")
            for name in ("Gst", "GstApp", "GstVideo", "GLib"):
                gi.require_version(name, "2.0" if name == "GLib" else "1.0")
                module = importlib.import_module(f"gi.repository.{name}")
                if name == "Gst":
                    module.init(None)
                    lacking = [
                        part for part in ("videotestsrc", "videoconvert") if not module.ElementFactory.find(part)
                    ]
    except (ImportError, ValueError) as error:
        pytest.skip(f"GStreamer's Python binding is missing ({error}); {INSTALL}")
    finally:
        sys.path.remove(str(SYSTEM_PACKAGES))
    if lacking:
        pytest.skip(f"GStreamer has no {' '.join(lacking)}; {INSTALL}")
