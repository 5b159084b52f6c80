"""What the pages of all reports share: one HTML file that needs nothing else, its plots and its pictures."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dapo_edge.extras import require

INFERNO = 14  # OpenCV's number of the colour table
THUMBNAIL_PX = 320
JPEG_QUALITY = 85


def environment(templates: Path, **filters: Callable[..., Any]) -> Any:
    """The jinja2 environment of a folder of templates, which extend `page.html.j2`; everything put in is escaped."""
    jinja2 = require("jinja2")
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(percent=percent, **filters)
    return found


def percent(share: float | None) -> str:
    """`97.3`, or a dash where there is no number."""
    return "–" if share is None else f"{100 * share:.1f}"


def new_figure(size: tuple[float, float] = (5.2, 3.7), panels: tuple[int, int] = (1, 1), **options: Any) -> Any:
    """A figure of so many inches, and its axes; as an array where there are several rows or columns of panels."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*panels, **options)
    for axis in np.ravel(axes):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def plain(text: str) -> str:
    """A name for matplotlib, which takes what stands between dollars for mathematics and hides labels after a line."""
    return "\u200b" + text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def as_svg(figure: Any) -> str:
    """A figure as SVG text, to be put into a page. Its ground is transparent, so that the page's own shows."""
    import matplotlib

    text = io.StringIO()
    # Text stays text: it can be searched, and costs a fraction of its outlines.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dapo-edge"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's browser brings the fonts
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    found = text.getvalue()
    return found[found.index("<svg") :]


def coloured(shares: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Numbers in [0, 1], [H, W], as colours from black over red to yellow, [H, W, 3] BGR; NaN is the brightest."""
    levels = np.round(255 * np.clip(np.nan_to_num(shares, nan=1.0), 0, 1)).astype(np.uint8)
    found: NDArray[np.uint8] = require("cv2").applyColorMap(levels, INFERNO)
    return found


def thumbnail(picture: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A picture at THUMBNAIL_PX, with the proportions of `shape`, which begins with height and width."""
    cv2, scale = require("cv2"), THUMBNAIL_PX / max(shape[:2])
    size = (max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale)))
    found: NDArray[np.uint8] = cv2.resize(
        picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    )
    return found


def jpeg(picture: NDArray[np.uint8], shape: tuple[int, ...]) -> str:
    """Base64 of a picture's thumbnail with the proportions of `shape`."""
    cv2 = require("cv2")
    _, data = cv2.imencode(".jpg", thumbnail(picture, shape), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return base64.b64encode(data.tobytes()).decode()
