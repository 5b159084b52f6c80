"""Every kind of image file becomes the same kind of array, and every bad one a one-line error."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dapo_edge.data.pictures import MAX_PIXELS, MIN_SIDE_PX, read_image
from dapo_edge.errors import DependencyMissing, FrameError

RGB = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def refused(path: Path, *words: str) -> str:
    with pytest.raises(FrameError) as caught:
        read_image(path)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.cause
    assert caught.value.remedy
    for word in words:
        assert word in message
    return message


def announcing(path: Path, width: int, height: int) -> Path:
    """A PNG whose header promises a size and whose data is not there."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 99) + b"IDAT")
    return path


def test_rgb_becomes_bgr(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "a.tif", "a.ppm"):
        Image.fromarray(RGB).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert image.flags.writeable
        np.testing.assert_array_equal(image, RGB[..., ::-1])


def test_grey_is_replicated(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "l.png")
    np.testing.assert_array_equal(read_image(tmp_path / "l.png"), np.stack([GREY] * 3, axis=2))
    Image.fromarray(GREY > 99).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "bits.png"))[..., 1], (GREY > 99) * 255)


def test_alpha_is_dropped_and_the_colours_below_it_stay(tmp_path: Path) -> None:
    alpha = np.zeros_like(GREY)
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), RGB[..., ::-1])
    Image.fromarray(np.dstack([GREY, alpha])).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png")[..., 2], GREY)


@pytest.mark.parametrize("transparency", [None, 0, bytes(range(256))])
def test_palette(tmp_path: Path, transparency: int | bytes | None) -> None:
    image = Image.fromarray(RGB).quantize(256)
    expected = np.asarray(image.convert("RGB"))[..., ::-1]
    image.save(tmp_path / "p.png", **({} if transparency is None else {"transparency": transparency}))
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), expected)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "c.tif")
    blue, green, red = read_image(tmp_path / "c.tif")[5, 5]
    assert red > 200 > 60 > max(blue, green)


@pytest.mark.parametrize("name", ["w.png", "w.tif", "w.pgm"])
def test_sixteen_bits_lose_the_lower_eight_whatever_the_data(tmp_path: Path, name: str) -> None:
    for low, high in ((0, 65536), (300, 900)):
        wide = np.linspace(low, high - 1, 24 * 40).reshape(24, 40).astype(np.uint16)
        Image.fromarray(wide).save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name), np.stack([wide >> 8] * 3, axis=2))


def test_big_endian_sixteen_bits(tmp_path: Path) -> None:
    wide = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 60
    Image.frombytes("I;16B", (40, 24), wide.astype(">u2").tobytes()).save(tmp_path / "be.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "be.tif")[..., 0], wide >> 8)


def test_thirty_two_bits_are_shifted_or_refused(tmp_path: Path) -> None:
    wide = np.full((20, 20), 0x1234, np.int32)
    Image.fromarray(wide).save(tmp_path / "i.tif")
    assert (read_image(tmp_path / "i.tif") == 0x12).all()
    Image.fromarray(wide << 12).save(tmp_path / "i.tif")
    refused(tmp_path / "i.tif", "beyond 16 bits")


def test_floats_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((20, 20), np.float32)).save(tmp_path / "f.tif")
    refused(tmp_path / "f.tif", "mode 'F'", "8 bits")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:8, :24] = 255  # a bar at the top left
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(upright))).save(tmp_path / "e.jpg", quality=95, exif=exif)
    image = read_image(tmp_path / "e.jpg")
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 4


def test_only_the_first_picture_of_many(tmp_path: Path) -> None:
    first, second = Image.fromarray(RGB), Image.new("RGB", (40, 24))
    first.save(tmp_path / "m.tif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_image(tmp_path / "m.tif"), RGB[..., ::-1])


@pytest.mark.parametrize("name", ["t.png", "t.jpg", "t.tif", "t.bmp", "t.webp"])
def test_truncated(tmp_path: Path, name: str) -> None:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(data[: int(len(data) * share)])
        refused(tmp_path / name, name, "damaged")


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_in_a_png_is_noticed_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    Image.fromarray(RGB).save(tmp_path / "d.png")
    raw = bytearray((tmp_path / "d.png").read_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "d.png").write_bytes(raw)
    try:
        image = read_image(tmp_path / "d.png")
    except FrameError:
        return
    np.testing.assert_array_equal(image, RGB[..., ::-1])


@given(junk=st.binary(max_size=200))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_junk_after_a_valid_start_is_a_frame_error(tmp_path: Path, junk: bytes) -> None:
    starts = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM", b"P6 ", b"RIFF\0\0\0\0WEBP")
    for start in starts:
        (tmp_path / "junk").write_bytes(start + junk)
        refused(tmp_path / "junk")


def test_what_is_no_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "zero.png").touch()
    refused(tmp_path / "zero.png", "empty (0 bytes)")
    (tmp_path / "text.png").write_text("I am a letter, not a picture.")
    refused(tmp_path / "text.png", "in no known format", "PNG")
    refused(tmp_path, "not a regular file")
    refused(Path("/dev/zero"), "not a regular file")
    refused(tmp_path / "none.png", "does not exist")
    refused(tmp_path / ("x" * 999 + ".png"), "too long")


def test_a_missing_pillow_is_no_fault_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DependencyMissing, match=r"'PIL' can't be imported.*pip install pillow") as caught:
        read_image(tmp_path / "a.png")
    assert caught.value.exit_code == 7


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")  # a real one can't be made as root

    monkeypatch.setattr(Path, "open", denied)
    refused(tmp_path / "a.png", "Permission denied", "permissions")


def test_too_small(tmp_path: Path) -> None:
    for size in ((1, 1), (MIN_SIDE_PX - 1, 400), (400, MIN_SIDE_PX - 1)):
        Image.new("RGB", size).save(tmp_path / "s.png")
        refused(tmp_path / "s.png", f"{size[0]}x{size[1]}", f"at least {MIN_SIDE_PX}")
    Image.new("RGB", (MIN_SIDE_PX, MIN_SIDE_PX)).save(tmp_path / "s.png")
    assert read_image(tmp_path / "s.png").shape == (MIN_SIDE_PX, MIN_SIDE_PX, 3)


def test_too_large_is_refused_by_the_header(tmp_path: Path) -> None:
    refused(announcing(tmp_path / "bomb.png", 30000, 30000), "30000x30000", str(MAX_PIXELS))
    refused(announcing(tmp_path / "bomb.png", 10001, 10000), "10001x10000", str(MAX_PIXELS))
    # Between Pillow's warning (89 million pixels) and the limit, only the missing data is wrong.
    refused(announcing(tmp_path / "bomb.png", 9500, 9999), "damaged")
