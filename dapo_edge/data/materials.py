"""The materials of the generated world, one small function each, and `MATERIALS`, which binds them to their names.

A material function draws its texture upright: `(rng, shape [H, W], unit in pixels) -> float32 [H, W, 3] BGR`.
`draw_material` turns and zooms it. Grey levels stay between about 50 and 235, so dark and bright flaws both show.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dapo_edge.data.brushes import (
    Colour,
    Image,
    Plane,
    Points,
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
# B, G, R of the chips in terrazzo.
STONES = ((84, 84, 86), (92, 108, 150), (110, 150, 190), (96, 120, 92), (204, 208, 210), (148, 132, 112), (74, 82, 128))


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


def _lit(height: Plane, unit: float) -> Plane:
    """Slopes of a relief (units) that face a lamp at the upper left, as rise per unit."""
    kernel = np.diag(np.array([-0.35, 0, 0.35], np.float32)) * unit
    return cv2().filter2D(height, -1, kernel)


def glass(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """A smooth greenish sheet with a bevelled edge, which reflects a window and a strip lamp."""
    x, y = _coordinates(shape, unit)
    size_x, size_y = shape[1] / unit, shape[0] / unit
    wobble = 0.7 * field(rng, shape, unit, 30)
    across = x - size_x * rng.uniform(0.3, 0.75) + (y - size_y / 2) * rng.uniform(-0.4, 0.4) + wobble
    down = y - size_y * rng.uniform(0.3, 0.7) + wobble
    # Two by two panes; the bars between them stay dark.
    half_x, half_y, bar = rng.uniform(13, 22), rng.uniform(17, 28), 1.6
    panes_x = np.clip(0.5 * np.minimum(half_x - np.abs(across), np.abs(across) - bar) + 0.5, 0, 1)
    panes_y = np.clip(0.5 * np.minimum(half_y - np.abs(down), np.abs(down) - bar) + 0.5, 0, 1)
    slant = (across + down * rng.uniform(0.5, 1.2)) / rng.uniform(40, 60) + rng.uniform(0, 6.3)
    grain = panes_x * panes_y * (34 + 0.4 * down) + 12 * np.sin(slant) + 16 * np.exp(-90 * np.cos(slant / 2) ** 2)
    inside = x - rng.uniform(14, 26)  # units from the rim of the sheet
    bevel = rng.uniform(6, 9)
    grain += np.where(inside < bevel, -14 - 3 * (bevel - inside), 0) + 45 * np.exp(-(((inside - bevel) / 0.6) ** 2))
    tint = rng.uniform(152, 178) + colour(rng.uniform(0, 10), rng.uniform(4, 9), rng.uniform(-16, -8))
    rim = np.clip(0.5 - inside, 0, 1) * np.ones_like(grain)
    behind = between(colour(84, 108, 76), colour(128, 128, 128), np.clip(-inside / 3 - 1, 0, 1) * np.ones_like(grain))
    return blend(tinted(tint, grain), rim, behind)


def rubber(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """A matt dark mat, moulded with lozenges, studs or ribs."""
    x, y = _coordinates(shape, unit)
    # Below 6 pixels per stud the relief would turn into moiré.
    pitch = max(rng.uniform(9, 13), 6 / unit)
    x, y = x / pitch + rng.uniform(0, 1), y / pitch + rng.uniform(0, 1)
    column, row = (x + 0.5 * (np.floor(y) % 2)) % 1 - 0.5, y % 1 - 0.5
    kind = rng.integers(3)
    if kind == 0:  # bars that lean left and right by turns, as on chequer plate
        lean = np.where((np.floor(x) + np.floor(y)) % 2 > 0, 1, -1)
        bar = x % 1 - 0.5
        inside = 0.5 - np.abs(bar + lean * row) * 2.1 - np.abs(bar - lean * row) * 0.55
    elif kind == 1:
        inside = 0.34 - np.sqrt(column**2 + row**2)
    else:
        inside = 0.27 - np.abs(row) + 0 * x
    relief = 1.5 * np.clip(inside * 7, 0, 1).astype(np.float32)
    grain = 6 * relief + 38 * _lit(softened(relief, 0.35 * unit), unit) + 3 * field(rng, shape, unit, 1.5, 2)
    base = rng.uniform(62, 78)
    return tinted(
        colour(base + rng.uniform(0, 4), base, base - rng.uniform(0, 3)), grain + 2 * field(rng, shape, unit, 30)
    )


def carpet(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Rows of coarse yarn loops, each of its own shade between two dyes."""
    x, y = _coordinates(shape, unit)
    # Below 4 pixels per loop the rows would turn into moiré.
    pitch = max(rng.uniform(4.2, 5.5), 4 / unit)
    bend = field(rng, shape, unit, 8)
    row = y / pitch + 0.13 * bend
    tuft = np.floor(row).astype(np.intp) % 64
    table = child(rng).normal(0, 1, (65, 64)).astype(np.float32)
    along = 0.8 * x / pitch + 0.6 * table[64][tuft] + 0.12 * bend
    loop = np.floor(along).astype(np.intp) % 64
    across, down = along - np.floor(along) - 0.5, row - np.floor(row) - 0.5
    # Loops lean over, and their upper side catches the light.
    pile = 1 - 2.6 * (across + 0.35 * down) ** 2 - 3 * down**2 - 0.45 * down
    shade = table[tuft, loop]
    share = np.clip(0.5 + 0.45 * shade + 0.25 * field(rng, shape, unit, 24, 2), 0, 1)
    dye = _paint(rng) * 0.5 + 85
    second = dye * 0.6 + 25 if rng.random() < 0.5 else colour(150, 168, 178)
    pile = pile + 0.05 * shade + 0.1 * field(rng, shape, unit, (1, 2), 2)
    return between(dye, second, share) * np.clip(pile, 0.45, 1.15)[..., None]


def machined_part(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Bare metal with turned or milled tool marks, and hexagon socket screws around a shallow pocket or slot."""
    x, y = _coordinates(shape, unit)
    middle = rng.uniform(0.38, 0.62, 2) * [shape[1] / unit, shape[0] / unit]
    x, y = x - float(middle[0]), y - float(middle[1])
    sunk = np.zeros(shape, np.uint8)

    def fixed(points: Points) -> NDArray[np.int32]:
        return np.round((points + middle) * unit * 16).astype(np.int32)

    def disc(at: Points, radius: float, depth: int, line: float = 0) -> None:
        thickness = max(1, round(line * unit)) if line else -1
        cv2().circle(sunk, fixed(at).tolist(), round(radius * unit * 16), depth, thickness, cv2().LINE_AA, 4)

    marks = rng.normal(0, 1, 1024).astype(np.float32)
    turns = np.linspace(0, 2 * np.pi, 6, endpoint=False) + rng.uniform(0, 1)
    circle = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    if rng.random() < 0.5:
        travel = np.sqrt(x**2 + y**2)
        sheen = 14 * np.sin(2 * np.arctan2(y, x) + rng.uniform(0, 6.3))
        bolts = circle * rng.uniform(32, 40)
        disc(np.zeros(2), rng.uniform(13, 18), 80)
        disc(np.zeros(2), rng.uniform(5, 9), 120, 1.2)
        disc(np.zeros(2), rng.uniform(46, 56), 110, 1.5)
    else:
        swath = rng.uniform(24, 34)
        travel = 1000 + x - np.sqrt(swath**2 - (y % swath - swath / 2) ** 2)
        sheen = 5 * np.sin(2.4 * np.floor(y / swath)) + 0 * x
        bolts = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)]) * rng.uniform(28, 38, 2)
        ends = fixed(np.array([(-16, 0), (16, 0)]))
        cv2().polylines(sunk, [ends], False, 80, max(1, round(12 * unit)), cv2().LINE_AA, 4)
    for bolt in bolts:
        disc(bolt, 8, 90)
        disc(bolt, 6.6, 30)
        cv2().fillPoly(sunk, [fixed(bolt + 3.4 * circle)], 160, cv2().LINE_AA, 4)
    relief = softened(sunk.astype(np.float32), 0.4 * unit)
    grain = (9 * marks[(travel / 0.8).astype(np.intp) % 1024] + sheen) * (1 - relief / 200)
    base = rng.uniform(158, 188)
    grain += 2.5 * field(rng, shape, unit, 1.5) - 0.36 * relief - 0.7 * _lit(relief, unit)
    return tinted(colour(base + rng.uniform(0, 8), base, base - rng.uniform(0, 6)), grain)


def terrazzo(rng: np.random.Generator, shape: Shape, unit: float) -> Image:
    """Polished stone: angular chips of several colours and sizes in a light cement."""
    pitch = rng.uniform(7.5, 10) * max(unit, 0.5)
    rows, columns = math.ceil(shape[0] / pitch) + 1, math.ceil(shape[1] / pitch) + 1
    # One table, repeated: the chips of a scene do not depend on how many fit into it.
    numbers = child(rng).uniform(-0.48, 0.48, (32, 32, 3)).astype(np.float32)
    table = numbers[np.arange(rows)[:, None] % 32, np.arange(columns) % 32]
    seeds = (np.moveaxis(np.mgrid[:rows, :columns], 0, -1) + table[..., :2]) * pitch
    seeds = np.clip(np.round(seeds), 0, np.array(shape) - 1).astype(np.intp)
    empty = np.ones(shape, np.uint8)
    empty[seeds[..., 0], seeds[..., 1]] = 0
    _, cells = cv2().distanceTransformWithLabels(empty, cv2().DIST_L2, 5, labelType=cv2().DIST_LABEL_PIXEL)
    # One number 0..1 per cell: its first digit chooses the stone, its later digits the chip's size and shade.
    draw = np.zeros(cells.max() + 1, np.float32)
    draw[cells[seeds[..., 0], seeds[..., 1]]] = table[..., 2] / 0.96 + 0.5
    inner = np.ones(shape, np.uint8)
    inner[:, 1:] &= cells[:, 1:] == cells[:, :-1]
    inner[1:] &= cells[1:] == cells[:-1]
    depth = cv2().distanceTransform(inner, cv2().DIST_L2, 5) / unit
    chip = np.clip((depth + 0.5 / unit - 0.6 - 2.6 * (draw * 37 % 1)[cells] ** 2) * max(unit, 1), 0, 1)
    stones = colour(*rng.uniform(0.95, 1.05, 3)) * np.array(STONES, np.float32)
    stones = stones[rng.permutation(len(STONES))[:5]]
    paint = stones[np.minimum((draw * 5).astype(np.intp), 4)] * (0.9 + 0.2 * (draw * 91 % 1))[:, None]
    cement = tinted(colour(186, 196, 200) * rng.uniform(0.93, 1.05), 3 * field(rng, shape, unit, 12, 3))
    grit = np.clip(1.5 * field(rng, shape, unit, 1.8) - 1.9, 0, 0.6)
    cement = blend(cement, grit, colour(112, 122, 130))
    return blend(cement, chip, paint[cells] + 4 * field(rng, shape, unit, 2, 2)[..., None])


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
    "glass": glass,
    "rubber": rubber,
    "carpet": carpet,
    "machined part": machined_part,
    "terrazzo": terrazzo,
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
