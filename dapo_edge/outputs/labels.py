"""Text on pictures: filled boxes that stay inside the picture, keep clear of each other and read on any background.

The letters come from the font inside Pillow, so they look the same on every machine. It holds ASCII only; other
letters lose their accents, and what is left without a counterpart becomes a question mark.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.structures import Box

Colour = tuple[int, int, int]  # blue, green, red
Image = NDArray[np.uint8]  # [H, W, 3] BGR

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (20, 20, 20)
MIN_TEXT_PX = 12  # below this the letters close up
_FINER = 3  # letters are drawn larger and reduced: at their own size, spaces would be rounded away


def text_size(height_px: int, width_px: int) -> int:
    """Size of letters for a picture, in pixels."""
    return max(MIN_TEXT_PX, round(min(height_px, width_px) / 42))


def contrast(colour: Colour) -> Colour:
    """Black or white, whichever reads better on `colour`."""
    blue, green, red = colour
    return BLACK if 0.114 * blue + 0.587 * green + 0.299 * red > 140 else WHITE


@lru_cache(maxsize=16)
def _font(size_px: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size_px)


def _printable(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.replace("ß", "ss"))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return "".join(letter if " " <= letter <= "~" else "?" for letter in plain)


@lru_cache(maxsize=512)
def ink(text: str, size_px: int) -> NDArray[np.uint8]:
    """The letters as coverage, [h, w] uint8; h depends on the size alone, so that base lines agree."""
    from PIL import Image, ImageDraw

    font = _font(size_px * _FINER)
    ascent, descent = font.getmetrics()
    width = round(font.getlength(_printable(text)) / _FINER)
    canvas = Image.new("L", (max(1, width) * _FINER, -(-(ascent + descent) // _FINER) * _FINER))
    ImageDraw.Draw(canvas).text((0, 0), _printable(text), font=font, fill=255)
    return np.asarray(canvas.reduce(_FINER))


def fitted(text: str, size_px: int, width_px: int) -> str:
    """`text`, shortened from its end until it is at most `width_px` wide."""
    if ink(text, size_px).shape[1] <= width_px:
        return text
    for count in range(len(text) - 1, 0, -1):
        short = text[:count].rstrip() + ".."
        if ink(short, size_px).shape[1] <= width_px:
            return short
    return ""


def write(image: Image, text: str, left: int, top: int, size_px: int, colour: Colour) -> None:
    """Put letters on `image`, which is changed; what lies outside is cut off."""
    cover = ink(text, size_px)[: max(0, image.shape[0] - top), : max(0, image.shape[1] - left)]
    area = image[top : top + cover.shape[0], left : left + cover.shape[1]]
    weight = cover[..., None].astype(np.uint16)
    area[:] = (area * (255 - weight) + np.array(colour, np.uint16) * weight + 127) // 255


@dataclass(frozen=True)
class Label:
    """A box of text that belongs to an area of the picture."""

    text: str
    colour: Colour
    beside: Box


def place(image: Image, labels: tuple[Label, ...]) -> None:
    """Draw the labels, the first ones first; one that finds no free place is left out. Changes `image`."""
    height, width = image.shape[:2]
    size = text_size(height, width)
    padding = max(2, size // 4)
    taken: list[Box] = []
    for label in labels:
        text = fitted(label.text, size, width - 2 * padding)
        cover = ink(text, size)
        box_size = (cover.shape[1] + 2 * padding, cover.shape[0] + padding)
        box = _free_place(label.beside, box_size, (width, height), taken) if text else None
        if box is None:
            continue
        taken.append(box)
        x, y, w, h = box
        image[y : y + h, x : x + w] = label.colour
        write(image, text, x + padding, y + padding // 2, size, contrast(label.colour))


def _free_place(beside: Box, size: tuple[int, int], picture: tuple[int, int], taken: list[Box]) -> Box | None:
    """Above the area, else below it, else as near to that as there is room."""
    x, y, _, area_height = beside
    w, h = size
    if w > picture[0] or h > picture[1]:
        return None
    left = min(max(x, 0), picture[0] - w)
    above, below = y - h - 1, y + area_height + 1
    tops = [above, below, *(side for n in range(1, 6) for side in (above - n * (h + 1), below + n * (h + 1)))]
    for shift in (0, -w // 2, w // 2, -w, w):
        column = min(max(left + shift, 0), picture[0] - w)
        for top in tops:
            box = (column, top, w, h)
            if 0 <= top <= picture[1] - h and not any(_overlap(box, other) for other in taken):
                return box
    inside = (left, min(max(y, 0), picture[1] - h), w, h)  # an area as high as the picture
    return None if any(_overlap(inside, other) for other in taken) else inside


def _overlap(one: Box, other: Box) -> bool:
    return (
        one[0] < other[0] + other[2]
        and other[0] < one[0] + one[2]
        and one[1] < other[1] + other[3]
        and other[1] < one[1] + one[3]
    )
