"""Pictures of different sizes brought together: one into a given frame, many onto one sheet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dapo_edge.errors import OutputError
from dapo_edge.extras import require
from dapo_edge.outputs.labels import Image, fitted, ink, text_size, write
from dapo_edge.outputs.palette import CAPTION_COLOUR, STRIP_COLOUR


def checked(image: NDArray[np.uint8]) -> Image:
    """`image` when it can be drawn on, else an `OutputError`."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        cause = f"a picture of shape {list(image.shape)} and type {image.dtype} can't be drawn"
        raise OutputError(cause, "Use [height, width, 3] uint8 in BGR order")
    return image


def letterbox(image: Image, width: int, height: int) -> Image:
    """`image` centred in [height, width, 3], as large as its proportions allow, with dark bars around it."""
    cv2 = require("cv2")
    own_height, own_width = image.shape[:2]
    if (own_width, own_height) == (width, height):
        return image
    # A missing pixel, as from an odd to an even size, is filled up: resampling would blur the whole picture for it.
    if not (0 <= width - own_width < 2 and 0 <= height - own_height < 2):
        scale = min(width / own_width, height / own_height)
        size = (max(1, min(width, round(own_width * scale))), max(1, min(height, round(own_height * scale))))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    framed = np.full((height, width, 3), STRIP_COLOUR, np.uint8)
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    framed[top : top + image.shape[0], left : left + image.shape[1]] = image
    return framed


def contact_sheet(images: Sequence[Image], columns: int, labels: Sequence[str] | None = None) -> Image:
    """Pictures side by side, row by row, [H, W, 3] uint8 BGR. All cells are as large as the largest picture.

    Smaller pictures are enlarged as far as their proportions allow. A label stands below its picture.
    """
    if not images or columns < 1:
        raise OutputError("a contact sheet needs pictures and columns", "Pass at least one picture and columns=1")
    if labels is not None and len(labels) != len(images):
        raise OutputError(f"{len(labels)} labels for {len(images)} pictures", "Pass one label for each picture")
    height, width = (max(checked(image).shape[axis] for image in images) for axis in (0, 1))
    size = text_size(height, width)
    gap = max(4, size // 2)
    caption = 2 * size if labels else 0
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    shape = (rows * (height + caption + gap) + gap, columns * (width + gap) + gap, 3)
    sheet = np.full(shape, STRIP_COLOUR, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = gap + row * (height + caption + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = letterbox(image, width, height)
        if labels:
            text = fitted(labels[number], size, width)
            lead = (width - ink(text, size).shape[1]) // 2
            write(sheet, text, left + lead, top + height + size // 4, size, CAPTION_COLOUR)
    return sheet
