"""Where frames come from: one file per kind of source, and `open_source` to choose by address."""

from __future__ import annotations

import importlib
from pathlib import Path

from dapo_edge.data.pictures import IMAGE_EXTENSIONS
from dapo_edge.errors import SourceError, did_you_mean
from dapo_edge.runtime.sources.base import Properties, Source
from dapo_edge.runtime.sources.uri import Address, check_path, path_of, redact, split, uri_of
from dapo_edge.runtime.sources.video import VIDEO_EXTENSIONS

__all__ = ["SOURCES", "Properties", "Source", "open_source", "redact"]

SOURCES = {
    "aravis": "dapo_edge.runtime.sources.aravis:AravisSource",
    "basler": "dapo_edge.runtime.sources.basler:BaslerSource",
    "csi": "dapo_edge.runtime.sources.gst:CsiSource",
    "dir": "dapo_edge.runtime.sources.watch:folder_source",
    "file": "dapo_edge.runtime.sources.video:VideoSource",
    "genicam": "dapo_edge.runtime.sources.genicam:GenicamSource",
    "gst": "dapo_edge.runtime.sources.gst:GstSource",
    "image": "dapo_edge.runtime.sources.stills:ImageSource",
    "rtsp": "dapo_edge.runtime.sources.rtsp:RtspSource",
    "rtsps": "dapo_edge.runtime.sources.rtsp:RtspSource",
    "synthetic": "dapo_edge.runtime.sources.synthetic:SyntheticSource",
    "v4l2": "dapo_edge.runtime.sources.v4l2:V4l2Source",
}


def open_source(uri: str | Path) -> Source:
    """The source at a URI or a plain path, not yet opened: use it as `with open_source(uri) as source`."""
    text = str(uri)
    address = None if isinstance(uri, Path) else split(text)
    if address is None:
        text = _uri_of_path(text)
    elif address.scheme == "file":
        text = _uri_of_file(text, address)
    scheme = text.partition("://")[0].lower()
    if scheme not in SOURCES:
        known = ", ".join(f"{name}://" for name in SOURCES)
        raise SourceError(
            f"'{redact(text)}' is of an unknown kind", f"{did_you_mean(scheme, SOURCES)}Known: {known}, or a plain path"
        )
    module, _, name = SOURCES[scheme].partition(":")
    source: Source = getattr(importlib.import_module(module), name)(text)
    return source


def _scheme_of(path: Path) -> str | None:
    """The kind of source that reads `path`, by what it is and what it is called."""
    if path.is_dir():
        return "dir"
    extension = path.suffix.lower()
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "file" if extension in VIDEO_EXTENSIONS else None


def _uri_of_path(text: str) -> str:
    if not text:
        raise SourceError("the source is empty", "Give a path, or an address such as synthetic://640x480@30")
    path = Path(text)
    check_path(path, "source")
    scheme = _scheme_of(path)
    if scheme is None:
        known = " ".join((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
        raise SourceError(f"'{path}' has no extension of an image or a video", f"Known extensions: {known}")
    return uri_of(scheme, path)


def _uri_of_file(uri: str, address: Address) -> str:
    """`file://` is every path's URI elsewhere; only what is no folder and no image is left to the video decoder."""
    path = path_of(address.body)
    check_path(path, "file")
    scheme = _scheme_of(path) or "file"
    return uri if scheme == "file" else uri_of(scheme, path) + (f"?{address.query}" if address.query else "")
