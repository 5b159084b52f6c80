"""The materials of the generated world, one small function each, and `MATERIALS`, which binds them to their names.

A material function draws its texture upright: `(rng, shape [H, W], unit in pixels) -> float32 [H, W, 3] BGR`.
`draw_material` turns and zooms it. Grey levels stay between about 50 and 235, so dark and bright flaws both show.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dapo_edge.data.brushes import (
    Colour,
    Image,
    Plane,
    Shape,
    between,
    blend,
    child,
    colour,
    cv2,
    field,
    softened,
    tinted,
    unit_of,
)

# B, G, R of things that come in any colour: saturated, none of them dark.
PAINTS = ((190, 120, 40), (60, 150, 70), (60, 70, 190), (50, 170, 215), (175, 165, 70), (150, 90, 150), (60, 125, 225))


def _coordinates(shape: Shape, unit: float) -> tuple[Plane, Plane]:
    """x [1, W] and y [H, 1] in units."""
    y = np.arange(shape[0], dtype=np.float32)[:, None] / unit
    x = np.arange(shape[1], dtype=np.float32)[None, :] / unit
    return x, y


def _paint(rng: np.random.Generator) -> Colour:
    return colour(*PAINTS[rng.integers(len(PAINTS))]) * rng.uniform(0.85, 1.1) + colour(*rng.uniform(-12, 12, 3))


def brushed_metal(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Fine parallel streaks under a broad sheen."""
    _, y = _coordinates(shape, unit)
    base = rng.uniform(135, 180)
    sheen = 16 * np.sin(y * rng.uniform(0.02, 0.05) + rng.uniform(0, 6.3))
    streaks = 15 * field(rng, shape, unit, (1, 100)) + 8 * field(rng, shape, unit, (3, 200))
    return tinted(colour(base + rng.uniform(0, 10), base, base - rng.uniform(0, 8)), streaks + sheen)


def wood(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Growth rings, stretched along the trunk, and short dark fibres."""
    _, y = _coordinates(shape, unit)
    depth = y * rng.uniform(0.25, 0.4) + 3.2 * field(rng, shape, unit, (36, 120)) + rng.uniform(0, 6.3)
    rings = 0.5 + 0.5 * np.sin(depth + np.sin(depth))
    fibres = np.minimum(field(rng, shape, unit, (1.2, 22)), 0)
    dark, light = colour(52, 92, 138), colour(96, 152, 205)
    return between(dark, light, (0.85 * rings + 0.3 * fibres + 0.15) * rng.uniform(0.8, 1.0))


def woven_fabric(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """A plain weave: warp and weft pass over each other like a chequerboard."""
    x, y = _coordinates(shape, unit)
    # Below 4 pixels per thread the weave would turn into moiré.
    pitch = max(rng.uniform(4.5, 7), 4 / unit)
    column, row = x / pitch, y / pitch
    warp_over = (np.floor(column) + np.floor(row)) % 2
    across_warp, across_weft = np.abs(column % 1 - 0.5), np.abs(row % 1 - 0.5)
    warp = 1 - 2.4 * across_warp**2 - 0.9 * across_weft**2
    weft = 0.82 - 2.4 * across_weft**2 - 0.9 * across_warp**2
    share = np.where(warp_over > 0, warp, weft) + 0.07 * field(rng, shape, unit, (3, 3), 2)
    dyed = _paint(rng) * 0.5 + 110
    return between(dyed * 0.35, dyed, share)


def leather(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Pebbles between creases: the distance to the nearest of many scattered points."""
    pitch = rng.uniform(3.6, 5.2) * max(unit, 0.6)
    rows, columns = math.ceil(shape[0] / pitch) + 1, math.ceil(shape[1] / pitch) + 1
    own = child(rng)
    seeds = np.moveaxis(np.mgrid[:rows, :columns], 0, -1) + own.uniform(-0.45, 0.45, (rows, columns, 2))
    seeds = np.clip(np.round(seeds * pitch), 0, np.array(shape) - 1).astype(np.intp)
    empty = np.ones(shape, np.uint8)
    empty[seeds[..., 0], seeds[..., 1]] = 0
    dome = cv2().distanceTransform(empty, cv2().DIST_L2, 5) / pitch
    folds = np.clip(0.16 - np.abs(field(rng, shape, unit, 30, 2)), 0, 1)
    share = 0.9 - 1.7 * dome**3 - 2.5 * folds + 0.1 * field(rng, shape, unit, 40)
    hide = (colour(52, 86, 148), colour(74, 74, 150), colour(92, 112, 140))[rng.integers(3)] * rng.uniform(0.95, 1.25)
    return between(hide * 0.45, hide * 1.05, softened(share, 0.3 * unit))


def ceramic_tile(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Glazed squares, each of a slightly different tone, with bevelled edges and dark joints."""
    x, y = _coordinates(shape, unit)
    pitch = rng.uniform(34, 48)
    x, y = (x + rng.uniform(0, pitch)) / pitch, (y + rng.uniform(0, pitch)) / pitch
    column, row = x - np.floor(x) - 0.5, y - np.floor(y) - 0.5
    edge = np.maximum(np.abs(column), np.abs(row)) * pitch - pitch / 2  # units; 0 in the middle of the joint
    tones = rng.normal(0, 7, (7, 7)).astype(np.float32)
    grain = tones[np.floor(y).astype(np.intp) % 7, np.floor(x).astype(np.intp) % 7]
    grain += np.where(edge > -4, 26 * np.sign(-column - row), 0) * np.clip((edge + 4) / 4, 0, 1)
    grain += 3 * field(rng, shape, unit, 16, 2)
    glaze = colour(*(rng.uniform(175, 212) + rng.uniform(-22, 12, 3)))
    joint = np.clip(edge + 1.9, 0, 1)
    return blend(tinted(glaze, grain), joint, tinted(colour(96, 100, 104), 8 * field(rng, shape, unit, 2)))


def plastic(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """A smooth coloured moulding with soft ribs and a broad gloss."""
    x, y = _coordinates(shape, unit)
    phase = (y + rng.uniform(0, 40)) / rng.uniform(26, 36)
    rib = 22 * np.exp(-(((phase % 1 - 0.5) * 9) ** 2)) * np.sign(phase % 1 - 0.5)
    slant = (x - y) / rng.uniform(60, 80) + rng.uniform(0, 6.3)
    gloss = 30 * np.exp(-6 * np.sin(slant) ** 2)
    return tinted(_paint(rng), rib + gloss + 1.5 * field(rng, shape, unit, 3))


def concrete(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Cloudy grey with grit and pores."""
    base = rng.uniform(125, 160)
    clouds = 11 * field(rng, shape, unit, 40, 3)
    grit = 13 * field(rng, shape, unit, 2.2, 2)
    pores = -55 * np.clip(field(rng, shape, unit, 4) - 1.25, 0, 0.8)
    return tinted(colour(base - 6, base, base + 2), clouds + grit + pores)


def paper(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Off-white, ruled in pale blue, with a fine felt of fibres."""
    _, y = _coordinates(shape, unit)
    sheet = tinted(
        colour(208, 220, 226) - rng.uniform(0, 14),
        2.5 * field(rng, shape, unit, (1.2, 4)) + 2.5 * field(rng, shape, unit, (4, 1.2)),
    )
    pitch = rng.uniform(13, 18)
    line = np.clip(1.1 - np.abs((y + rng.uniform(0, pitch)) % pitch - pitch / 2), 0, 1) * np.ones_like(sheet[..., 0])
    return blend(sheet, 0.55 * line, colour(205, 160, 120))


def circuit_board(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Green lacquer, parallel traces with 45 degree bends, plated pads, and chips with pins."""
    height, width = shape
    board = tinted(colour(52, rng.uniform(92, 118), 38), 3 * field(rng, shape, unit, 5, 2))
    bits = 4
    to_fixed = unit * 2**bits
    copper = np.zeros(shape, np.uint8)
    plated = np.zeros(shape, np.uint8)
    trace = max(1, round(1.6 * unit))
    span = max(height, width) / unit
    for start in np.arange(rng.uniform(3, 8), height / unit, rng.uniform(17, 24)).tolist():
        bend, jump = rng.uniform(0.15, 0.75) * span, rng.choice([-1, 1]) * rng.uniform(5, 11)
        for lane in range(3):
            y = start + 4 * lane
            shift = bend + lane * 4 * math.copysign(1, -jump)
            path = np.array([(0, y), (shift, y), (shift + abs(jump), y + jump), (span, y + jump)])
            cv2().polylines(
                copper, [np.round(path * to_fixed).astype(np.int32)], False, 255, trace, cv2().LINE_AA, bits
            )
    pads = round(12 * height * width / (128 * unit) ** 2)
    for x, y in rng.uniform(0, 1, (pads, 2)) * [width / unit, height / unit]:
        centre = (round(x * to_fixed), round(y * to_fixed))
        cv2().circle(plated, centre, round(2.8 * to_fixed), 255, -1, cv2().LINE_AA, bits)
        cv2().circle(plated, centre, round(1.1 * to_fixed), 0, -1, cv2().LINE_AA, bits)
    board = blend(board, copper.astype(np.float32) / 255, colour(78, 165, 70))
    board = blend(board, plated.astype(np.float32) / 255, colour(120, 195, 215))
    for x, y in rng.uniform(0.08, 0.7, (2, 2)) * [width / unit, height / unit]:
        _solder_chip(board, x, y, rng.uniform(17, 30), rng.uniform(12, 18), unit)
    return board


def _solder_chip(board: Image, x: float, y: float, width: float, height: float, unit: float) -> None:
    """Draw a chip and its two rows of pins in place; all lengths in units."""

    def box(left: float, top: float, right: float, bottom: float, bgr: tuple[int, int, int]) -> None:
        board[round(top * unit) : round(bottom * unit), round(left * unit) : round(right * unit)] = bgr

    for pin in np.arange(x + 1.5, x + width - 2, 4).tolist():
        box(pin, y - 3, pin + 2, y + height + 3, (205, 208, 205))
    box(x, y, x + width, y + height, (58, 56, 54))
    box(x + 1.5, y + 1.5, x + 4, y + 4, (120, 120, 120))


def painted_steel(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Panels of orange-peel paint, joined by a seam with a row of rivets on either side."""
    x, y = _coordinates(shape, unit)
    pitch = rng.uniform(64, 84)
    off_seam = (y + rng.uniform(0, pitch)) % pitch - pitch / 2
    seam = -75 * np.exp(-((off_seam / 0.9) ** 2)) + 28 * np.exp(-(((off_seam - 2) / 0.9) ** 2))
    along = (x + rng.uniform(0, 16)) % 16 - 8
    beside = np.abs(off_seam) - 7
    distance = np.sqrt(along**2 + beside**2) / 2.6
    lit = -(along + beside * np.sign(off_seam)) / 2.6
    rivets = np.where(distance < 1, 30 * lit + 6, -24 * np.exp(-(((distance - 1.15) / 0.3) ** 2)))
    return tinted(_paint(rng) * 0.9, 4.5 * field(rng, shape, unit, 2.6, 2) + seam + rivets)


MATERIALS: dict[str, Callable[[np.random.Generator, Shape, float], Image]] = {
    "brushed metal": brushed_metal,
    "wood": wood,
    "woven fabric": woven_fabric,
    "leather": leather,
    "ceramic tile": ceramic_tile,
    "plastic": plastic,
    "concrete": concrete,
    "paper": paper,
    "circuit board": circuit_board,
    "painted steel": painted_steel,
}


def draw_material(name: str, rng: np.random.Generator, shape: Shape) -> Image:
    """A material seen at a random scale and rotation, float32 [H, W, 3] BGR."""
    zoom = rng.uniform(0.85, 1.2)
    angle = math.radians(90 * int(rng.integers(4)) + rng.uniform(-12, 12))
    cos, sin = math.cos(angle), math.sin(angle)
    height, width = shape
    # The canvas is the box around the turned view, so that no corner of the view is left empty.
    canvas_width = math.ceil(abs(cos) * width + abs(sin) * height) + 2
    canvas_height = math.ceil(abs(sin) * width + abs(cos) * height) + 2
    canvas = MATERIALS[name](rng, (canvas_height, canvas_width), zoom * unit_of(shape))
    shift_x = (canvas_width - 1 - cos * (width - 1) + sin * (height - 1)) / 2
    shift_y = (canvas_height - 1 - sin * (width - 1) - cos * (height - 1)) / 2
    to_canvas = np.array([[cos, -sin, shift_x], [sin, cos, shift_y]])
    flags = cv2().INTER_LINEAR | cv2().WARP_INVERSE_MAP
    view = cv2().warpAffine(canvas, to_canvas, (width, height), flags=flags, borderMode=cv2().BORDER_REPLICATE)
    return np.clip(view, 45, 240, out=view)
