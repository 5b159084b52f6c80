"""Every pixel format of an industrial camera against a picture that is known, packed by the rules written out here."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from dapo_edge.errors import FrameError, SourceRefused
from dapo_edge.kernels.pixels import Bytes, PixelView
from dapo_edge.runtime.sources.pixel_formats import PixelReader
from dapo_edge.structures import Frame

WIDTH, HEIGHT = 20, 14
RNG = np.random.default_rng(3)


def values(bits: int) -> NDArray[np.uint16]:
    return RNG.integers(0, 1 << bits, (HEIGHT, WIDTH)).astype(np.uint16)


def dense(rows: NDArray[np.uint16], bits: int) -> Bytes:
    """The lowest bit of the first value is the lowest bit of the first byte, and so on."""
    stream = (rows[..., None] >> np.arange(bits) & 1).reshape(HEIGHT, -1).astype(np.uint8)
    return np.packbits(stream, axis=1, bitorder="little").ravel()


def gige_packed(rows: NDArray[np.uint16], bits: int) -> Bytes:
    first, second = rows[:, 0::2], rows[:, 1::2]
    low = bits - 8
    middle = (first & ((1 << low) - 1)) | (second & ((1 << low) - 1)) << 4
    return np.stack([first >> low, middle, second >> low], axis=2).astype(np.uint8).ravel()


def read(name: str, data: Bytes, pitch: int | None = None) -> Bytes:
    pixels = PixelReader(name, "genicam://x").read(data, WIDTH, HEIGHT, pitch)
    return Frame(pixels, 0, 0, "genicam://x").image


def grey(plane: NDArray[np.integer]) -> NDArray[np.integer]:
    return np.repeat(plane[..., None], 3, axis=2)


@pytest.mark.parametrize(("bits", "name"), [(8, "8"), (10, "10"), (12, "12"), (14, "14"), (16, "16")])
def test_grey_keeps_the_upper_eight_bits(bits: int, name: str) -> None:
    rows = values(bits)
    data = rows.astype(np.uint8).ravel() if bits == 8 else rows.astype("<u2").view(np.uint8).ravel()
    np.testing.assert_array_equal(read(f"Mono{name}", data), grey(rows >> (bits - 8)))


@pytest.mark.parametrize("bits", [10, 12])
def test_packed_grey(bits: int) -> None:
    rows = values(bits)
    np.testing.assert_array_equal(read(f"Mono{bits}p", dense(rows, bits)), grey(rows >> (bits - 8)))
    np.testing.assert_array_equal(read(f"Mono{bits}Packed", gige_packed(rows, bits)), grey(rows >> (bits - 8)))


def test_depth_is_never_stretched_by_content() -> None:
    dark = np.full((HEIGHT, WIDTH), 100, "<u2")
    assert read("Mono12", dark.view(np.uint8).ravel()).max() == 100 >> 4
    dark[0, 0] = 4095
    assert read("Mono12", dark.view(np.uint8).ravel())[5, 5, 0] == 100 >> 4


# OpenCV names a pattern by the second row's second and third pixel.
PATTERNS = {
    "RG": cv2.COLOR_BayerBG2BGR,
    "GR": cv2.COLOR_BayerGB2BGR,
    "GB": cv2.COLOR_BayerGR2BGR,
    "BG": cv2.COLOR_BayerRG2BGR,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("depth", ["8", "10", "12", "16", "10p", "12p", "12Packed"])
def test_bayer_is_opencvs_inside(pattern: str, depth: str) -> None:
    bits = int(depth.rstrip("pPacked"))
    rows = values(bits)
    packed = dense if depth.endswith("p") else gige_packed
    if depth == "8":
        data = rows.astype(np.uint8).ravel()
    else:
        data = rows.astype("<u2").view(np.uint8).ravel() if depth.isdigit() else packed(rows, bits)
    image = read(f"Bayer{pattern}{depth}", data)
    expected = cv2.cvtColor((rows >> (bits - 8)).astype(np.uint8), PATTERNS[pattern])
    np.testing.assert_array_equal(image[1:-1, 1:-1], expected[1:-1, 1:-1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bayer_keeps_a_colour_up_to_the_border(pattern: str) -> None:
    blue, green, red = 50, 120, 200
    first = {"RG": (red, green, green, blue), "GR": (green, red, blue, green)}
    first |= {"GB": (green, blue, red, green), "BG": (blue, green, green, red)}
    mosaic = np.tile(np.array(first[pattern], np.uint8).reshape(2, 2), (HEIGHT // 2, WIDTH // 2))
    image = read(f"Bayer{pattern}8", mosaic.ravel())
    np.testing.assert_array_equal(image, np.broadcast_to([blue, green, red], (HEIGHT, WIDTH, 3)))


@pytest.mark.parametrize(("name", "order"), [("BGR8", [0, 1, 2]), ("RGB8", [2, 1, 0]), ("BGR8Packed", [0, 1, 2])])
def test_colour_orders(name: str, order: list[int]) -> None:
    image = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    np.testing.assert_array_equal(read(name, image.ravel()), image[..., order])


@pytest.mark.parametrize(("name", "order"), [("BGRa8", [0, 1, 2]), ("RGBa8", [2, 1, 0]), ("RGBA8Packed", [2, 1, 0])])
def test_transparency_is_dropped(name: str, order: list[int]) -> None:
    image = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
    np.testing.assert_array_equal(read(name, image.ravel()), image[..., order])


@pytest.mark.parametrize("name", ["YUV422_8", "YCbCr422_8", "YUV422_8_UYVY", "YUV422Packed"])
def test_yuv_uses_all_256_values(name: str) -> None:
    """Black is 0 and white 255, unlike in video; colours come back within the rounding of two conversions."""
    colours = np.array([[0, 0, 0], [255, 255, 255], [200, 100, 50], [30, 180, 90], [10, 20, 240]], np.uint8)
    image = np.repeat(np.resize(colours, (HEIGHT, WIDTH // 2, 3)), 2, axis=1)
    luma, red, blue = np.moveaxis(cv2.cvtColor(image, cv2.COLOR_BGR2YCrCb), 2, 0)
    order = (luma[:, ::2], blue[:, ::2], luma[:, 1::2], red[:, ::2])
    if name in ("YUV422_8_UYVY", "YUV422Packed"):
        order = (blue[:, ::2], luma[:, ::2], red[:, ::2], luma[:, 1::2])
    found = read(name, np.stack(order, axis=2).ravel())
    assert np.abs(found.astype(int) - image).max() <= 2


@pytest.mark.parametrize("name", ["NV12", "YCbCr601_420_8_YY_CbCr_Semiplanar"])
def test_nv12(name: str) -> None:
    data = RNG.integers(0, 256, (HEIGHT * 3 // 2, WIDTH), np.uint8)
    np.testing.assert_array_equal(read(name, data.ravel()), cv2.cvtColor(data, cv2.COLOR_YUV2BGR_NV12))


@pytest.mark.parametrize("name", ["Mono8", "BayerGB12", "Mono12p", "RGB8", "BGR8", "RGBa8", "YUV422_8", "NV12"])
def test_rows_may_be_longer_than_the_picture(name: str) -> None:
    reader = PixelReader(name, "genicam://x")
    rows = HEIGHT * 3 // 2 if name == "NV12" else HEIGHT
    tight = RNG.integers(0, 256, (rows, reader.row_bytes(WIDTH)), np.uint8)
    padded = np.pad(tight, ((0, 0), (0, 6)), constant_values=99)
    np.testing.assert_array_equal(read(name, padded.ravel(), padded.shape[1]), read(name, tight.ravel()))


def test_the_cameras_own_bytes_stay() -> None:
    views = {"Mono12": "GRAY8", "BayerBG8": "BayerRG8", "RGB8": "RGB8", "NV12": "NV12"}
    for name, kept in views.items():
        pixels = PixelReader(name, "x").read(np.zeros(WIDTH * HEIGHT * 3, np.uint8), WIDTH, HEIGHT)
        assert isinstance(pixels, PixelView)
        assert pixels.format == kept
        assert pixels.shape == (HEIGHT, WIDTH, 3)


def test_buffers_are_copied_and_used_again() -> None:
    reader = PixelReader("Mono8", "x")
    data = np.full(WIDTH * HEIGHT, 7, np.uint8)
    kept = reader.read(data, WIDTH, HEIGHT)
    data[:] = 9
    assert isinstance(kept, PixelView)
    assert kept.data[0, 0] == 7
    for _ in range(50):
        reader.read(data, WIDTH, HEIGHT)
    assert reader._pool.made == 2  # the kept one, and one for all the others


@pytest.mark.parametrize("name", ["Coord3D_C16", "Mono1p", "RGB10p32", "", "mono8"])
def test_an_unsupported_format_names_those_that_are(name: str) -> None:
    with pytest.raises(SourceRefused, match=rf"'{name}', which is not supported. .*\?PixelFormat=Mono8.*BayerRG.*YUV"):
        PixelReader(name, "genicam://x")


@pytest.mark.parametrize(
    ("name", "size", "pitch", "message"),
    [
        ("Mono8", WIDTH * HEIGHT - 1, None, "279 bytes doesn't hold 20 x 14 px of Mono8"),
        ("Mono16", WIDTH * HEIGHT, None, "280 bytes doesn't hold"),
        ("Mono8", WIDTH * HEIGHT, WIDTH - 1, "doesn't hold"),
        ("NV12", WIDTH * HEIGHT, None, "doesn't hold"),
    ],
)
def test_a_buffer_that_is_too_short_fails_alone(name: str, size: int, pitch: int | None, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        PixelReader(name, "x").read(np.zeros(size, np.uint8), WIDTH, HEIGHT, pitch)


@pytest.mark.parametrize(("name", "multiple"), [("Mono10p", 4), ("Mono12p", 2), ("Mono12Packed", 2)])
def test_packed_rows_fill_whole_bytes(name: str, multiple: int) -> None:
    with pytest.raises(FrameError, match=f"multiple of {multiple}"):
        PixelReader(name, "x").read(np.zeros(10_000, np.uint8), 21, 14)


def test_pairs_of_yuv_are_whole() -> None:
    with pytest.raises(FrameError, match="an even number"):
        PixelReader("YUV422_8", "x").read(np.zeros(10_000, np.uint8), 21, 14)


def test_twelve_megapixels_of_bayer_cost_milliseconds() -> None:
    """NumPy's definition takes more than a second for one; the bound leaves room for a busy machine."""
    reader = PixelReader("BayerGB12", "x")
    data = np.zeros(4096 * 3000 * 2, np.uint8)
    start = time.perf_counter()
    Frame(reader.read(data, 4096, 3000), 0, 0, "x").image  # noqa: B018
    assert time.perf_counter() - start < 0.6
