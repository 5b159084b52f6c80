"""One image file to one BGR picture or one mask, by fixed rules, so that equal files always give equal pixels.

Nothing depends on the data: a stretch to the darkest and brightest pixel would make a defect change the whole picture.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import DependencyMissing, FrameError
from dapo_edge.structures import MAX_PIXELS, MIN_SIDE_PX

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP")
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
INDEX_MODES = ("1", "L", "P", *SIXTEEN_BIT_MODES)  # a mask's grey levels or numbers; 0 is good
SHIFT_BITS = 8  # 16-bit grey to 8-bit
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # of EXIF
IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


T = TypeVar("T")


def _upright(image: Image) -> Image:
    """All pixels, turned as the EXIF data say."""
    from PIL import ImageOps

    image.load()
    # The colour table's transparency is dropped like any alpha; left there, Pillow warns about it.
    image.info.pop("transparency", None)
    return ImageOps.exif_transpose(image)


def _upright_size(image: Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION, 1) in SIDEWAYS else (width, height)


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """The picture in an image file as [H, W, 3] uint8 BGR, or a `FrameError` that says what is wrong with the file.

    EXIF orientation is applied, grey is replicated, 16-bit grey loses its lower 8 bits. Of a file with several
    pictures the first one is taken. Alpha is dropped, not blended: there is no background to blend with that belongs
    to the part, and a defect below a transparent pixel must stay visible.
    """
    path = Path(path)
    return _to_bgr(_load(path, "image", _upright), path)


def read_mask(path: str | Path) -> NDArray[np.bool_]:
    """Defective pixels of a mask file, [H, W] bool: those that are not 0. Raises `FrameError` as `read_image`."""
    image = _load(Path(path), "mask", _upright)
    if image.mode in INDEX_MODES:
        return np.asarray(image) > 0
    levels: NDArray[np.uint8] = np.asarray(image.convert("RGB")).max(axis=2)
    return levels > 0


def picture_size(path: str | Path, kind: str = "image") -> tuple[int, int]:
    """Width and height in pixels of the picture that `read_image` or `read_mask` would give, from the header alone.

    Raises `FrameError` as they do, as far as the header tells.
    """
    return _load(Path(path), kind, _upright_size)


def _load(path: Path, kind: str, take: Callable[[Image], T]) -> T:
    """What `take` makes of a file, or a `FrameError` that calls it a `kind`. Raises `DependencyMissing`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FrameError(f"the {kind} '{path}' is not a regular file", "Give the path of an image file")
        if status.st_size == 0:
            raise FrameError(f"the {kind} '{path}' is empty (0 bytes)", "Write the file again")
        with path.open("rb") as file:
            return take(_opened(file, path, kind))
    except FrameError:
        raise
    except ImportError as error:
        cause = f"the Python package 'PIL' can't be imported ({error})"
        raise DependencyMissing(cause, "Install it: pip install pillow") from error
    except MemoryError as error:
        raise FrameError(f"the {kind} '{path}' does not fit into memory", "Use a smaller image") from error
    except FileNotFoundError as error:
        raise FrameError(f"the {kind} '{path}' does not exist", "Check the path") from error
    except PermissionError as error:
        raise FrameError(f"the {kind} '{path}' can't be read ({error.strerror})", "Check its permissions") from error
    except Exception as error:  # on damaged data decoders raise nearly anything: struct.error, KeyError, ValueError ...
        cause = f"the {kind} '{path}' can't be decoded ({error})"
        raise FrameError(cause, "It is truncated or damaged: write the file again") from error


def _opened(file: IO[bytes], path: Path, kind: str) -> Image:
    """An image that can be used, its pixels not read yet."""
    image = _identify(file)
    if image is None:
        cause = f"the {kind} '{path}' is in no known format"
        raise FrameError(cause, f"Known formats: {', '.join(FORMATS)}")
    _check_size(image.size, path, kind)
    if image.mode not in EIGHT_BIT_MODES + SIXTEEN_BIT_MODES:
        cause = f"the {kind} '{path}' has pixels of mode '{image.mode}', which have no fixed range"
        raise FrameError(cause, "Save it with 8 bits per channel, or as 16-bit grey")
    return image


def _identify(file: IO[bytes]) -> Image | None:
    """The image with its header read and its pixels not, or None when no format claims it.

    `Image.open` does the same and then warns above 89 million pixels, which has to be turned off for the whole process
    or not at all. The limit here is checked by the caller, so the formats are asked directly.
    """
    from PIL import Image

    Image.init()
    prefix = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            file.seek(0)
            return factory(file, "")
    return None


def _check_size(size: tuple[int, int], path: Path, kind: str) -> None:
    """Refuse by the header alone, before memory is taken for pixels."""
    width, height = size
    if min(size) < MIN_SIDE_PX:
        cause = f"the {kind} '{path}' is {width}x{height}, too small to inspect"
        raise FrameError(cause, f"Use at least {MIN_SIDE_PX} pixels on each side")
    if width * height > MAX_PIXELS:
        cause = f"the {kind} '{path}' is {width}x{height}, more than {MAX_PIXELS} pixels"
        raise FrameError(cause, f"Cut it into parts of at most {MAX_PIXELS} pixels")


def _to_bgr(image: Image, path: Path) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 BGR."""
    if image.mode in SIXTEEN_BIT_MODES:
        wide = np.asarray(image)  # [H, W] uint16, or int32 for mode I
        if wide.min() < 0 or wide.max() > 0xFFFF:
            cause = f"the image '{path}' has 32-bit values beyond 16 bits"
            raise FrameError(cause, "Save it as 16-bit grey")
        grey = (wide >> SHIFT_BITS).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    rgb = np.asarray(image.convert("RGB"))  # [H, W, 3]
    return np.ascontiguousarray(rgb[..., ::-1])
