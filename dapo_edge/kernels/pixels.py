"""What a camera delivers, and how it becomes the encoder's input: the definition of `preprocess.cu` in NumPy."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import DependencyMissing, FrameError
from dapo_edge.extras import require
from dapo_edge.kernels.resample import pillow_bicubic

Bytes = NDArray[np.uint8]
FloatArray = NDArray[np.float32]

# In the order of `Format` in preprocess.cu. BayerRG8 is GenICam's name: red at the top left, then green.
PixelFormat = Literal["BGR8", "RGB8", "GRAY8", "BayerRG8", "NV12"]
FORMATS: tuple[PixelFormat, ...] = get_args(PixelFormat)
_HALF = np.float32(0.5 + 2**-16)  # float sums may leave a half a little below itself
_PATTERNS = (("RGGB", "GRBG"), ("GBRG", "BGGR"))  # that begin on an even or odd row and column of RGGB
_BYTES_PER_PIXEL = {"BGR8": 3, "RGB8": 3, "GRAY8": 1, "BayerRG8": 1, "NV12": 1}


@dataclass(frozen=True, eq=False)
class PixelView:
    """A camera's own bytes, and the part of the picture that is looked at. Nothing is copied.

    `data` holds one row of the picture per row; its rows may be longer than the picture (pitch). NV12 has its chroma
    rows, ceil(height / 2) of them, below the luma rows. Raises `FrameError` where these don't fit together.
    """

    data: Bytes  # [rows, pitch]
    format: PixelFormat
    width: int  # of the whole picture, px
    height: int
    crop: tuple[int, int, int, int] | None = None  # left, top, width, height; None: all of it

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or self.format not in FORMATS:
            raise FrameError(f"unknown pixel format {self.format!r:.40}", f"Use one of {', '.join(FORMATS)}")
        data = self.data
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
            raise FrameError("a camera's bytes must be a uint8 array [rows, pitch]", "Reshape the buffer first")
        # Plain numbers from here on: NumPy's small ones would wrap around in what is computed of them.
        (width, height), crop = _whole("width and height", (self.width, self.height), 2), self.crop
        object.__setattr__(self, "width", width)
        object.__setattr__(self, "height", height)
        object.__setattr__(self, "crop", None if crop is None else _whole("a crop", crop, 4))
        self._check_bytes()
        left, top, across, down = self.window
        if min(left, top) < 0 or min(across, down) < 1 or left + across > width or top + down > height:
            raise FrameError(f"the crop {self.crop} leaves the picture of {width} x {height} px", "Make it smaller")

    def _check_bytes(self) -> None:
        data, row_bytes, rows = self.data, self.width * _BYTES_PER_PIXEL[self.format], self.height
        if self.format == "NV12":
            row_bytes += self.width % 2
            rows += -(-self.height // 2)
        if min(self.width, self.height) < 2 or data.shape[0] < rows or data.shape[1] < row_bytes:
            raise FrameError(
                f"{list(data.shape)} bytes don't hold {self.width} x {self.height} px of {self.format}, which need "
                f"[{rows}, {row_bytes}] and 2 px per side",
                "Check the camera's width, height, pitch and pixel format",
            )

    @property
    def window(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the part that is looked at, px."""
        return self.crop or (0, 0, self.width, self.height)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the part that is looked at, as an image: height, width, 3."""
        return self.window[3], self.window[2], 3

    def trimmed(self) -> PixelView:
        """The same view over as few bytes as its pixels need: what is worth copying.

        Bayer keeps a pixel around it, because colours are made of neighbours, and its phase; NV12 its pairs.
        """
        left, top, width, height = self.window
        if self.crop is None or min(width, height) < 2:
            return self
        if self.format == "NV12":
            return self._trimmed_nv12()
        per_pixel = _BYTES_PER_PIXEL[self.format]
        rim = 1 if self.format == "BayerRG8" else 0
        first_x, first_y = (max(place - rim, 0) // (1 + rim) * (1 + rim) for place in (left, top))
        end_x, end_y = min(left + width + rim, self.width), min(top + height + rim, self.height)
        data = self.data[first_y:end_y, first_x * per_pixel : end_x * per_pixel]
        inside = (left - first_x, top - first_y, width, height)
        return PixelView(data, self.format, end_x - first_x, end_y - first_y, inside)

    def _trimmed_nv12(self) -> PixelView:
        left, top, width, height = self.window
        first_x, first_y = left // 2 * 2, top // 2 * 2
        across, down = left + width - first_x, top + height - first_y
        columns = slice(first_x, first_x + across + across % 2)
        first_pair = self.height + first_y // 2
        luma, chroma = self.data[first_y : first_y + down], self.data[first_pair : first_pair + -(-down // 2)]
        data = np.vstack([luma[:, columns], chroma[:, columns]])
        return PixelView(data, "NV12", across, down, (left - first_x, top - first_y, width, height))

    def bgr(self, out: Bytes | None = None) -> Bytes:
        """The part that is looked at, [H, W, 3] BGR, contiguous: what `rgb` defines, by OpenCV where it is installed.

        `out`, of the same shape and contiguous, is written and returned instead of new memory. The bits are the same;
        12 megapixels of Bayer take OpenCV milliseconds and the definition more than a second.
        """
        if out is None and self.format == "BGR8":
            return np.ascontiguousarray(self.rgb()[..., ::-1])
        bgr = np.empty(self.shape, np.uint8) if out is None else out
        if bgr.shape != self.shape or bgr.dtype != np.uint8 or not bgr.flags.c_contiguous:
            cause = f"{list(bgr.shape)} of {bgr.dtype} can't hold the picture"
            raise FrameError(cause, f"Give contiguous uint8 of {list(self.shape)}")
        cv2 = _opencv()
        if cv2 is None or min(self.width, self.height) < 4:
            np.copyto(bgr, self.rgb()[..., ::-1])
        else:
            _to_bgr(cv2, self, bgr)
        return bgr

    def rgb(self) -> Bytes:
        """The part that is looked at, [H, W, 3] RGB."""
        left, top, width, height = self.window
        return to_rgb(self.data, self.format, self.width, self.height)[top : top + height, left : left + width]


def _whole(what: str, values: object, count: int) -> tuple[int, ...]:
    """Plain integers, or a `FrameError`."""
    try:
        numbers = tuple(operator.index(value) for value in values)  # type: ignore[attr-defined]
    except TypeError:
        numbers = ()
    if len(numbers) != count:
        raise FrameError(f"{what} must be {count} whole numbers of pixels, not {values!r:.80}", "Round them first")
    return numbers


def to_rgb(data: Bytes, pixel_format: PixelFormat, width: int, height: int) -> Bytes:
    """A whole picture, `data` [rows, pitch] to [height, width, 3] RGB uint8.

    BayerRG8 is demosaiced bilinearly, mirrored at the border; NV12 is BT.601 with limited range, each chroma pair for
    its four pixels, in the fixed point of OpenCV (https://docs.opencv.org/4.x/de/d25/imgproc_color_conversions.html).
    """
    if pixel_format in ("BGR8", "RGB8"):
        pixels = data[:height, : 3 * width].reshape(height, width, 3)
        return pixels if pixel_format == "RGB8" else pixels[..., ::-1]
    plane = data[:height, :width]
    if pixel_format == "GRAY8":
        return np.repeat(plane[..., None], 3, axis=2)
    if pixel_format == "NV12":
        return _from_nv12(plane, data[height:, : width + width % 2])
    return _demosaic(plane)


def _opencv() -> ModuleType | None:
    try:
        return require("cv2")
    except DependencyMissing:
        return None


def _to_bgr(cv2: ModuleType, view: PixelView, out: Bytes) -> None:
    """`view.bgr(out)` without copies of the camera's bytes: OpenCV takes rows that are longer than the picture."""
    left, top, across, down = view.window
    if view.format == "NV12":
        _nv12_to_bgr(cv2, view, out)
    elif view.format == "BayerRG8":
        _bayer_to_bgr(cv2, view, out)
    elif view.format == "GRAY8":
        cv2.cvtColor(view.data[top : top + down, left : left + across], cv2.COLOR_GRAY2BGR, dst=out)
    else:
        pixels = view.data[top : top + down, 3 * left : 3 * (left + across)].reshape(down, across, 3)
        if view.format == "BGR8":
            np.copyto(out, pixels)
        else:
            cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR, dst=out)


def _nv12_to_bgr(cv2: ModuleType, view: PixelView, out: Bytes) -> None:
    """OpenCV takes pairs of rows and columns only: as many as hold the window, then the window of these."""
    left, top, across, down = view.window
    first_x, first_y = left // 2 * 2, top // 2 * 2
    columns, rows = -(-(left + across - first_x) // 2) * 2, -(-(top + down - first_y) // 2) * 2
    first_pair = view.height + first_y // 2
    luma = view.data[first_y : first_y + rows, first_x : first_x + columns]
    chroma = view.data[first_pair : first_pair + rows // 2, first_x : first_x + columns]
    fits = (down, across) == (rows, columns)
    pairs = chroma.reshape(rows // 2, columns // 2, 2)
    bgr = cv2.cvtColorTwoPlane(luma, pairs, cv2.COLOR_YUV2BGR_NV12, dst=out if fits else None)
    if not fits:
        np.copyto(out, bgr[top - first_y : top - first_y + down, left - first_x : left - first_x + across])


def _bayer_to_bgr(cv2: ModuleType, view: PixelView, out: Bytes) -> None:
    part = view.trimmed()
    left, top, across, down = part.window
    if min(across, down) < 4:
        np.copyto(out, part.rgb()[..., ::-1])
        return
    mosaic = part.data[: part.height, : part.width]
    code = getattr(cv2, f"COLOR_Bayer{_PATTERNS[top % 2][left % 2]}2BGR")
    cv2.cvtColor(mosaic[top : top + down, left : left + across], code, dst=out)
    # OpenCV makes the outermost pixels from what is inside: here from all of the mosaic, by strips that keep its phase.
    for row, y in ((0, top), (-1, top + down - 1)):
        first = max(y - 1, 0) // 2 * 2
        out[row] = _demosaic(mosaic[first : y + 2])[y - first, left : left + across, ::-1]
    for column, x in ((0, left), (-1, left + across - 1)):
        first = max(x - 1, 0) // 2 * 2
        out[:, column] = _demosaic(mosaic[:, first : x + 2])[top : top + down, x - first, ::-1]


def preprocess(
    rgb: Bytes,  # [H, W, 3]
    size: int,
    mean: tuple[float, float, float],  # of RGB in [0, 1]
    std: tuple[float, float, float],
) -> FloatArray:
    """The encoder's input [3, S, S] float32: reduced, columns, rows, each rounded to bytes as in Pillow, normalised."""
    rows, columns = pillow_bicubic(rgb.shape[0], size), pillow_bicubic(rgb.shape[1], size)
    pixels = reduce_boxes(rgb, rows.factor, columns.factor).astype(np.float32)
    narrow = to_levels(columns.table.apply(pixels, axis=1))
    small = to_levels(rows.table.apply(narrow, axis=0))
    normalised = (small / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), np.float32)


def to_levels(values: FloatArray) -> FloatArray:
    """Rounded to whole numbers from 0 to 255, halves up as in Pillow; written over the input."""
    values += _HALF
    np.floor(values, out=values)
    return np.clip(values, 0, 255, out=values)


def reduce_boxes(rgb: Bytes, down: int, across: int) -> Bytes:
    """Means of boxes of `down` x `across` pixels, the last ones of what is left: Pillow's `Image.reduce`, bit for bit.

    Source: `ImagingReduceNxN` (https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Reduce.c), which
    divides by a rounded-down reciprocal.
    """
    height, width = rgb.shape[:2]
    tops, lefts = np.arange(0, height, down), np.arange(0, width, across)
    sums = np.add.reduceat(np.add.reduceat(rgb.astype(np.int64), tops, axis=0), lefts, axis=1)
    counts = np.minimum(down, height - tops)[:, None, None] * np.minimum(across, width - lefts)[:, None]
    means = (sums + counts // 2) * ((1 << 24) // counts) >> 24
    return np.where(counts == 1, sums, means).astype(np.uint8)


def _demosaic(mosaic: Bytes) -> Bytes:
    """RGGB to RGB: of each pixel's colours one is there, the others are means of the nearest ones, rounded up."""
    padded = np.pad(mosaic, 1, mode="reflect").astype(np.int32)
    height, width = mosaic.shape

    def shifted(down: int, right: int) -> NDArray[np.int32]:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    centre = shifted(0, 0)
    beside = (shifted(0, -1) + shifted(0, 1) + 1) // 2
    upright = (shifted(-1, 0) + shifted(1, 0) + 1) // 2
    cross = (shifted(0, -1) + shifted(0, 1) + shifted(-1, 0) + shifted(1, 0) + 2) // 4
    corners = (shifted(-1, -1) + shifted(-1, 1) + shifted(1, -1) + shifted(1, 1) + 2) // 4
    odd_row = np.arange(height)[:, None] % 2 == 1
    odd_column = np.arange(width)[None] % 2 == 1
    green_here = odd_row != odd_column
    red = np.where(green_here, np.where(odd_row, upright, beside), np.where(odd_row, corners, centre))
    green = np.where(green_here, centre, cross)
    blue = np.where(green_here, np.where(odd_row, beside, upright), np.where(odd_row, centre, corners))
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def _from_nv12(luma: Bytes, chroma: Bytes) -> Bytes:
    height, width = luma.shape
    pairs = chroma[: -(-height // 2)].reshape(-1, chroma.shape[1] // 2, 2).astype(np.int32) - 128
    spread = pairs.repeat(2, axis=0)[:height].repeat(2, axis=1)[:, :width]
    blue, red = spread[..., 0], spread[..., 1]
    bright = np.maximum(luma.astype(np.int32) - 16, 0) * 1220542
    channels = (1673527 * red, -852492 * red - 409993 * blue, 2116026 * blue)
    fixed = np.stack([(bright + channel + (1 << 19)) >> 20 for channel in channels], axis=2)
    return np.clip(fixed, 0, 255).astype(np.uint8)
