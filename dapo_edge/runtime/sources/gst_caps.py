"""What GStreamer says about a pipeline's frames, as the layout of their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dapo_edge.kernels.pixels import PixelFormat
from dapo_edge.runtime.sources.layout import Layout

# What our appsink takes. NV12 of other colours is left to an earlier videoconvert, which knows how to change them.
CAPS = (
    "video/x-raw,format=(string){BGR,RGB,GRAY8};video/x-raw,format=NV12,colorimetry=bt601;"
    "video/x-bayer,format=(string)rggb"
)
OURS: dict[str, PixelFormat] = {"BGR": "BGR8", "RGB": "RGB8", "GRAY8": "GRAY8", "NV12": "NV12"}
# GST_VIDEO_COLOR_RANGE_16_235 and GST_VIDEO_COLOR_MATRIX_BT601; the first one's name is no name in Python.
LIMITED_BT601 = (2, 4)


class NotTaken(Exception):
    """Frames of this kind can't be used; the text says of which."""


@dataclass(frozen=True)
class Stream:
    """The frames of a pipeline."""

    layout: Layout
    fps: float | None


def stream_of(caps: Any, video: Any) -> Stream:
    """What `caps` say; `video` is GstVideo's module. Raises `NotTaken`."""
    structure = caps.get_structure(0)
    done, above, below = structure.get_fraction("framerate")
    fps = above / below if done and above > 0 and below > 0 else None
    kind, name = structure.get_name(), structure.get_string("format")
    if kind == "video/x-bayer":
        return Stream(_bayer(structure, name), fps)
    if kind != "video/x-raw" or name not in OURS:
        raise NotTaken(f"pixels of the format {name or kind}")
    info = video.VideoInfo.new_from_caps(caps)
    colours = info.colorimetry
    if name == "NV12" and (int(colours.range), int(colours.matrix)) != LIMITED_BT601:
        raise NotTaken(f"NV12 with the colours {colours.to_string()}, not BT.601 with limited range")
    return Stream(Layout.of(OURS[name], info.width, info.height, info.offset, info.stride), fps)


def _bayer(structure: Any, pattern: str) -> Layout:
    if pattern != "rggb":
        raise NotTaken(f"the Bayer pattern {pattern}, not rggb")
    width, height = structure.get_int("width")[1], structure.get_int("height")[1]
    # Rows of GStreamer's Bayer buffers begin at multiples of four bytes, see gst-plugins-bad, gstbayer2rgb.c.
    return Layout.of("BayerRG8", width, height, [0], [-(-width // 4) * 4])
