"""From the bytes of a V4L2 buffer to pixels: as they are where the backends take them, else decoded by OpenCV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.extras import require
from dapo_edge.kernels.pixels import PixelFormat, PixelView
from dapo_edge.runtime.buffers import BufferPool
from dapo_edge.runtime.sources import v4l2_api as api
from dapo_edge.runtime.sources.layout import Layout

Bytes = NDArray[np.uint8]
Reader = Callable[[Bytes], "Bytes | PixelView | None"]  # a buffer's [N] bytes to pixels; None: it is damaged

# https://docs.kernel.org/userspace-api/media/v4l/pixfmt.html
AS_THEY_ARE: dict[str, PixelFormat] = {
    "BGR3": "BGR8",
    "RGB3": "RGB8",
    "GREY": "GRAY8",
    "NV12": "NV12",
    "RGGB": "BayerRG8",
}
COLOUR_CODES = {
    "YUYV": ("COLOR_YUV2BGR_YUYV", 2),  # OpenCV's name and bytes per pixel
    "UYVY": ("COLOR_YUV2BGR_UYVY", 2),
    "BA81": ("COLOR_BayerBGGR2BGR", 1),
    "GBRG": ("COLOR_BayerGBRG2BGR", 1),
    "GRBG": ("COLOR_BayerGRBG2BGR", 1),
}
JPEGS = ("MJPG", "JPEG")
DECODED = (*JPEGS, *COLOUR_CODES)
DEFAULT = 0  # of the three below
BT601, LIMITED, JPEG_SPACE = 1, 2, 7
OTHER_SPACES = (2, 3, 10, 12)  # SMPTE 240M, Rec. 709, BT.2020, DCI-P3
END_OF_JPEG = b"\xff\xd9"
TAIL = 4096  # bytes looked at at once


def reader_of(form: api.Format, pool: BufferPool) -> Reader | str:
    """What turns a buffer of this format into pixels, or why there is nothing, as text."""
    name = api.fourcc_name(form.fourcc)
    if name in ("NV12", "YUYV", "UYVY") and not _is_limited_bt601(form):
        return f"{name} with colours that are not BT.601 with limited range"
    if name in AS_THEY_ARE:
        layout = Layout.of(
            AS_THEY_ARE[name],
            form.width,
            form.height,
            [0, form.bytes_per_line * form.height],
            [form.bytes_per_line] * 2,
        )
        return lambda data: layout.taken(data, pool)
    if name in COLOUR_CODES:
        return lambda data: _converted(data, form, pool)
    if name in JPEGS:
        return lambda data: _decoded(data, form)
    return f"pixels of the format {name}, which is not known here"


def _is_limited_bt601(form: api.Format) -> bool:
    """By the rules for what the driver leaves open: V4L2_MAP_YCBCR_ENC_DEFAULT, V4L2_MAP_QUANTIZATION_DEFAULT."""
    encoding, space, quantization = form.encoding, form.colorspace, form.quantization
    bt601 = encoding == BT601 or (encoding == DEFAULT and space not in OTHER_SPACES)
    limited = quantization == LIMITED or (quantization == DEFAULT and space != JPEG_SPACE)
    return bt601 and limited


def _converted(data: Bytes, form: Any, pool: BufferPool) -> Bytes | None:
    cv2 = require("cv2")
    code, per_pixel = COLOUR_CODES[api.fourcc_name(form.fourcc)]
    stride, row_bytes = form.bytes_per_line, form.width * per_pixel
    if stride * (form.height - 1) + row_bytes > data.size:
        return None
    rows = np.lib.stride_tricks.as_strided(data, (form.height, row_bytes), (stride, 1), writeable=False)
    pixels = np.ascontiguousarray(rows).reshape(form.height, form.width, *([per_pixel] if per_pixel > 1 else []))
    image = pool.take((form.height, form.width, 3))
    cv2.cvtColor(pixels, getattr(cv2, code), dst=image)
    return image


def _decoded(data: Bytes, form: Any) -> Bytes | None:
    # Cut-off data decode, too: to a picture that is grey from there on.
    if not _is_whole(data):
        return None
    cv2 = require("cv2")
    # OpenCV 5.0 lends Python's imdecode no destination: the one kind of pixels that needs new memory for each frame.
    image: Bytes | None = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return image if image is not None and image.shape[:2] == (form.height, form.width) else None


def _is_whole(jpeg: Bytes) -> bool:
    """Whether it ends as a JPEG does; drivers fill buffers up with zeros, by up to megabytes."""
    for end in range(jpeg.size, 0, -TAIL):
        tail = jpeg[max(0, end - TAIL - 1) : end].tobytes().rstrip(b"\0")
        if len(tail) > 1 or end <= TAIL:
            return tail.endswith(END_OF_JPEG)
    return False
