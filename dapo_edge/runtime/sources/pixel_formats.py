"""From an industrial camera's pixel format, by its name in GenICam, and a buffer's bytes to what a frame holds.

Names: Pixel Format Naming Convention 2.1 (https://www.emva.org/standards-technology/genicam), and the ones before it in
GigE Vision 1. Grey, Bayer and RGB stay as they are (`PixelView`), so that a backend may convert them on the GPU; all
other colours become BGR. Components deeper than 8 bits keep their upper 8: never the picture's own range, which would
make the same grey of the part another one as soon as something bright comes into view.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from dapo_edge.errors import FrameError, SourceRefused
from dapo_edge.extras import require
from dapo_edge.kernels.pixels import Bytes, PixelView
from dapo_edge.runtime.buffers import BufferPool

_OLD_NAMES = {
    "RGB8Packed": "RGB8",
    "BGR8Packed": "BGR8",
    "RGBA8Packed": "RGBa8",
    "BGRA8Packed": "BGRa8",
    "YUV422Packed": "YUV422_8_UYVY",
    "YUV422_YUYV_Packed": "YUV422_8",
    "YCbCr422_8": "YUV422_8",  # the same bytes: both use all 256 values
    "YCbCr422_8_CbYCrY": "YUV422_8_UYVY",
    "YCbCr601_420_8_YY_CbCr_Semiplanar": "NV12",
}
_COLOURS = {"RGB8": 24, "BGR8": 24, "RGBa8": 32, "BGRa8": 32, "YUV422_8": 16, "YUV422_8_UYVY": 16, "NV12": 8}
# Bits per pixel as they are sent. "p": one after the other without gaps; "Packed": the older way, 2 pixels in 3 bytes.
_DEPTHS = {"8": 8, "10": 16, "12": 16, "14": 16, "16": 16, "10p": 10, "12p": 12, "10Packed": 12, "12Packed": 12}
_FIRST_RED = {"BayerRG": (0, 0), "BayerGR": (1, 0), "BayerGB": (0, 1), "BayerBG": (1, 1)}  # columns, rows to its left
SUPPORTED = (
    f"Mono and BayerRG, GR, GB, BG with {', '.join(_DEPTHS)}; RGB8, BGR8, RGBa8, BGRa8, YUV422_8, YCbCr422_8 and NV12"
)


class PixelReader:
    """Copies a camera's buffers into memory that is used again."""

    def __init__(self, name: str, uri: str) -> None:
        """`name`: the camera's PixelFormat. Raises `SourceRefused` when it is none that can be read."""
        self.name = _OLD_NAMES.get(name, name)
        match = re.fullmatch(rf"(Mono|BayerRG|BayerGR|BayerGB|BayerBG)({'|'.join(_DEPTHS)})", self.name)
        if match is None and self.name not in _COLOURS:
            cause = f"'{uri}' delivers the pixel format '{name}', which is not supported"
            raise SourceRefused(cause, f"Choose another in the URI, as in ?PixelFormat=Mono8. Supported: {SUPPORTED}")
        self._family, self._depth = (match[1], match[2]) if match else (self.name, "")
        self._bits = _DEPTHS[self._depth] if match else _COLOURS[self.name]
        self._pool = BufferPool()
        self._scratch = np.empty((0, 0, 3), np.uint8)

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` pixels without padding."""
        return -(-(width + (width % 2 if self.name == "NV12" else 0)) * self._bits // 8)

    def read(self, data: Bytes, width: int, height: int, pitch: int | None = None) -> Bytes | PixelView:
        """Pixels of a picture in memory of their own: [H, W, 3] BGR or a view of the camera's bytes.

        `data` is flat; a row begins every `pitch` bytes (None: right after the one before). Raises `FrameError` when
        it is too short.
        """
        row_bytes = self.row_bytes(width)
        rows = height + (-(-height // 2) if self.name == "NV12" else 0)
        pitch = pitch or row_bytes
        if min(width, height) < 2 or pitch < row_bytes or data.size < pitch * rows:
            cause = f"a buffer of {data.size} bytes doesn't hold {width} x {height} px of {self.name}"
            raise FrameError(cause, "Check the camera's Width, Height and PixelFormat")
        lines = data[: pitch * rows].reshape(rows, pitch)[:, :row_bytes]
        if self._depth:
            return self._single(lines, width, height)
        return self._colour(lines, width, height)

    def _single(self, lines: Bytes, width: int, height: int) -> PixelView:
        """Grey or Bayer, one value per pixel. Every Bayer pattern is the one with red first, a column or a row on."""
        right, down = _FIRST_RED.get(self._family, (0, 0))
        plane = self._pool.take((height + down, width + right))
        _unpack(lines, self._depth, plane[down:, right:])
        if self._family == "Mono":
            return PixelView(plane, "GRAY8", width, height)
        # What is put before the picture mirrors it, as demosaicing does at every border.
        if right:
            plane[:, 0] = plane[:, 2]
        if down:
            plane[0] = plane[2]
        crop = (right, down, width, height) if right or down else None
        return PixelView(plane, "BayerRG8", width + right, height + down, crop)

    def _colour(self, lines: Bytes, width: int, height: int) -> Bytes | PixelView:
        if self.name in ("RGB8", "NV12"):
            plane = self._pool.take(lines.shape)
            np.copyto(plane, lines)
            return PixelView(plane, "RGB8" if self.name == "RGB8" else "NV12", width, height)
        image = self._pool.take((height, width, 3))
        if self.name == "BGR8":
            np.copyto(image, lines.reshape(height, width, 3))
            return image
        cv2 = require("cv2")
        if self.name in ("RGBa8", "BGRa8"):
            code = cv2.COLOR_RGBA2BGR if self.name == "RGBa8" else cv2.COLOR_BGRA2BGR
            cv2.cvtColor(lines.reshape(height, width, 4), code, dst=image)
            return image
        cv2.cvtColor(self._spread(lines, width, height), cv2.COLOR_YCrCb2BGR, dst=image)
        return image

    def _spread(self, lines: Bytes, width: int, height: int) -> Bytes:
        """YUV 4:2:2 as [H, W, 3] Y, Cr, Cb.

        OpenCV's own conversion of YUYV is for video, black at 16 and white at 235; GenICam's uses all 256 values.
        """
        if width % 2:
            raise FrameError(f"{width} columns of {self.name} are no pairs", "Set the camera's Width to an even number")
        if self._scratch.shape != (height, width, 3):
            self._scratch = np.empty((height, width, 3), np.uint8)
        luma, blue, red = (0, 1, 3) if self.name == "YUV422_8" else (1, 0, 2)
        self._scratch[..., 0] = lines[:, luma::2]
        for column in (0, 1):
            self._scratch[:, column::2, 1] = lines[:, red::4]
            self._scratch[:, column::2, 2] = lines[:, blue::4]
        return self._scratch


def _unpack(lines: Bytes, depth: str, out: Bytes) -> None:
    """The upper 8 bits of every value: rows of bytes as they are sent to [H, W] uint8."""
    if depth == "8":
        np.copyto(out, lines)
    elif depth in _UNPACK:
        width, pixels = out.shape[1], _GROUPS[depth]
        if width % pixels:
            cause = f"{width} columns of packed {depth} don't fill whole bytes"
            raise FrameError(cause, f"Set the camera's Width to a multiple of {pixels}")
        _UNPACK[depth](lines, out)
    else:
        np.right_shift(lines.view("<u2"), int(depth) - 8, out=out, casting="unsafe")


def _unpack_dense(lines: Bytes, out: Bytes, bits: int) -> None:
    """PFNC's "p": the lowest bit first, a value begins where the one before ends."""
    pixels = _GROUPS[f"{bits}p"]
    size = pixels * bits // 8
    for pixel in range(pixels):
        byte, shift = divmod((pixel + 1) * bits - 8, 8)
        out[:, pixel::pixels] = lines[:, byte::size] >> shift
        if shift:
            out[:, pixel::pixels] |= lines[:, byte + 1 :: size] << np.uint8(8 - shift)


def _unpack_old(lines: Bytes, out: Bytes) -> None:
    """GigE Vision 1: upper bits of one pixel, lower bits of both, upper bits of the other."""
    out[:, 0::2], out[:, 1::2] = lines[:, 0::3], lines[:, 2::3]


_GROUPS = {"10p": 4, "12p": 2, "10Packed": 2, "12Packed": 2}  # pixels that fill whole bytes
_UNPACK: Mapping[str, Callable[[Bytes, Bytes], None]] = {
    "10p": lambda lines, out: _unpack_dense(lines, out, 10),
    "12p": lambda lines, out: _unpack_dense(lines, out, 12),
    "10Packed": _unpack_old,
    "12Packed": _unpack_old,
}
