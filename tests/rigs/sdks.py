"""The cameras' SDKs, imported before a test that asks for warnings as errors: in C code such an error is a crash."""

from __future__ import annotations

import contextlib
import importlib
import warnings


def preload() -> None:
    """Import those that are installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SWIG's types have no module; Debian's gi has an old importer
        for module in ("gi", "pypylon.pylon"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        with contextlib.suppress(ImportError, ValueError):
            importlib.import_module("gi").require_version("Aravis", "0.8")
            for name in ("Aravis", "GLib"):
                importlib.import_module(f"gi.repository.{name}")
        with contextlib.suppress(ImportError):
            importlib.import_module("harvesters.core")  # last, because it changes the filters
