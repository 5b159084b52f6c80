"""Colours with a meaning. All are BGR."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dapo_edge.outputs.labels import Colour
from dapo_edge.structures import Verdict


def _bgr(code: str) -> Colour:
    red, green, blue = bytes.fromhex(code)
    return blue, green, red


# Okabe and Ito's set without black, then Paul Tol's "bright", "muted" and "light" without near repeats. Neighbours
# differ in lightness as well as in hue, so that they stay apart for colour-blind eyes; no set of 24 does for all pairs.
_TYPE_CODES = """
56B4E9 E69F00 009E73 F0E442 CC79A7 0072B2 D55E00 BBCC33
882255 44BB99 FFAABB 332288 CCBB44 AA4499 99DDFF 117733
EE8866 4477AA EEDD88 AA3377 228833 DDCC77 CC6677 999933
"""
TYPE_COLOURS: tuple[Colour, ...] = tuple(_bgr(code) for code in _TYPE_CODES.split())
NO_TYPE_COLOUR = _bgr("BBBBBB")
VERDICT_COLOURS: dict[Verdict, Colour] = {"ok": _bgr("1B8A4B"), "ng": _bgr("C62828"), "unsure": _bgr("F5A800")}
STRIP_COLOUR = _bgr("22262B")
CAPTION_COLOUR = _bgr("C9CFD6")

HEAT_FROM = 0.25  # anomaly below which the picture stays untouched, where no threshold says better
HEAT_OPACITY = 0.62  # at anomaly 1


def type_colour(index: int) -> Colour:
    """The colour of channel `index` of the defect map; row 0 is normal and has none."""
    return TYPE_COLOURS[(index - 1) % len(TYPE_COLOURS)] if index > 0 else NO_TYPE_COLOUR


def heat_table() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """For each level 0 .. 255: its colour times its opacity, and what is left of the picture; [256, 1, 3] uint8."""
    level = np.linspace(0, 1, 256)
    stops = (0.0, 1 / 3, 2 / 3, 1.0)
    colours = np.array([_bgr(code) for code in ("FFE680", "FFB000", "F2511B", "C4002F")], np.float64)
    hue = np.stack([np.interp(level, stops, channel) for channel in colours.T], axis=1)  # [256, 3]
    opacity = HEAT_OPACITY * level[:, None] ** 0.8
    keep = np.repeat(255 * (1 - opacity), 3, axis=1)
    return np.round(hue * opacity).astype(np.uint8)[:, None], np.round(keep).astype(np.uint8)[:, None]
