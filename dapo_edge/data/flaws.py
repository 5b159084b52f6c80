"""The defects of the generated world, one small function each, and `DEFECTS`, which binds them to their names.

A defect function takes `(rng, image float32 [H, W, 3] BGR, unit in pixels)` and returns the altered image and a soft
mask, float32 [H, W] in [0, 1]. Where the mask is 0 the image is untouched, bit for bit; above one half lies what a
person would outline. The input is never written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dapo_edge.data.brushes import (
    Image,
    Plane,
    Points,
    between,
    blend,
    colour,
    cv2,
    field,
    filled,
    outline,
    place,
    ribbon,
    shape_of,
    softened,
    stroked,
    tone,
    walk,
    window,
)

Drawn = tuple[Image, Plane]
LIGHT_FROM = math.radians(225)  # upper left: every dome, dent and rim is lit from there
_OVER_DARK = 120  # grey level below which a flaw that may be light or dark is drawn light


def _angle(rng: np.random.Generator) -> float:
    return rng.uniform(0, 2 * math.pi)


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _line(rng: np.random.Generator, centre: tuple[float, float], length_px: float, bend: float) -> Points:
    """A gently bent line of 13 points through `centre`."""
    path = walk(rng, (0, 0), _angle(rng), 12, length_px / 12, bend)
    return path - path[6] + centre


def scratch(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """One to three thin, nearly parallel lines, bright on dark ground and dark on bright ground."""
    shape = shape_of(image)
    first = _line(rng, place(rng, shape), rng.uniform(55, 90) * unit, 0.03)
    normal = (first[-1] - first[0])[::-1] * [-1, 1] / np.linalg.norm(first[-1] - first[0])
    mask = ribbon(shape, first, max(rng.uniform(1.3, 2) * unit, 1.4))
    for number in range(1, int(rng.integers(1, 4))):
        part = first[int(rng.integers(0, 4)) : int(rng.integers(8, 13))] + normal * number * rng.uniform(3, 5) * unit
        mask = np.maximum(mask, ribbon(shape, part, max(rng.uniform(1, 1.5) * unit, 1.2)))
    level = tone(image, mask)
    paint = level + 85 if level < _OVER_DARK + 25 else level - 85
    return blend(image, mask, colour(paint, paint, paint)), mask


def hole(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A drilled black disc: a bright chamfer around it, and light on the far inner wall."""
    centre, radius = place(rng, shape_of(image)), max(rng.uniform(7, 13) * unit, 3)
    area, dx, dy = window(shape_of(image), centre, radius)
    distance = np.sqrt(dx**2 + dy**2)
    edge = 1 / radius
    whole = np.clip((1 - edge - distance) / edge + 0.5, 0, 1)
    inside = np.minimum(np.clip((0.84 - distance) / edge + 0.5, 0, 1), whole)
    towards_light = dx * math.cos(LIGHT_FROM) + dy * math.sin(LIGHT_FROM)
    wall = 10 + 45 * np.clip(-towards_light - 0.35, 0, 1)
    altered, mask = image.copy(), np.zeros(shape_of(image), np.float32)
    chamfer = np.where(towards_light < 0, 1.0, 0.0)[..., None] * colour(230, 230, 230) + 25
    altered[area] = blend(blend(image[area], whole * 0.8, chamfer.astype(np.float32)), inside, wall[..., None])
    mask[area] = whole
    return altered, mask


def stain(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A dried liquid: the material shows through, tinted, with a darker rim."""
    shape = shape_of(image)
    centre, radius = place(rng, shape), rng.uniform(17, 27) * unit
    mask = filled(shape, outline(rng, centre, radius, 0.3))
    rim = mask * np.clip(1.25 - 1.25 * softened(mask, 1.7 * unit), 0, 1)
    clouds = 0.07 * field(rng, shape, unit, 12)
    dyes = ((0.3, 0.55, 0.8), (0.8, 0.5, 0.3), (0.5, 0.35, 0.75), (0.35, 0.7, 0.55))
    dye = colour(*dyes[rng.integers(len(dyes))])
    return blend(image, mask * np.clip(0.62 + clouds + 0.7 * rim, 0.4, 1), image * dye), mask


def crack(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A jagged dark line that forks."""
    shape = shape_of(image)
    trunk = walk(rng, (0, 0), _angle(rng), 18, 4.5 * unit, 0.12)
    trunk += rng.normal(0, 1.7 * unit, trunk.shape)
    trunk += place(rng, shape) - trunk[9]
    branches = [trunk]
    for node, side in zip(rng.choice(np.arange(3, 15), 3, replace=False).tolist(), (1, -1, 1), strict=True):
        ahead = trunk[node + 1] - trunk[node]
        angle = math.atan2(ahead[1], ahead[0]) + side * rng.uniform(0.6, 1.1)
        branch = walk(rng, tuple(trunk[node]), angle, 6, 4 * unit, 0.35)
        branches.append(branch)
    mask = np.maximum(stroked(shape, [trunk], 1.6 * unit), stroked(shape, branches[1:], unit))
    return blend(image, 0.88 * mask, colour(12, 14, 16)), mask


def dent(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A smooth hollow: dark on the side of the light, bright on the other, no edge."""
    centre, radius = place(rng, shape_of(image)), rng.uniform(15, 24) * unit
    area, dx, dy = window(shape_of(image), centre, radius)
    towards_light = dx * math.cos(LIGHT_FROM) + dy * math.sin(LIGHT_FROM)
    bowl = np.clip(1 - dx**2 - dy**2, 0, 1) ** 1.5
    shade = -bowl * (rng.uniform(1.2, 1.6) * towards_light + 0.25)
    altered, mask = image.copy(), np.zeros(shape_of(image), np.float32)
    # Mostly a factor, which keeps the hue; the constant part makes it show on dark material too.
    altered[area] += shade[..., None] * (image[area] + 40)
    mask[area] = np.clip(4 * bowl, 0, 1)
    return altered, mask


def spot(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A cluster of small round specks, sharp and opaque."""
    shape = shape_of(image)
    x, y = place(rng, shape)
    specks = np.zeros(shape, np.uint8)
    for dx, dy, radius in rng.normal(0, 1, (int(rng.integers(6, 13)), 3)):
        centre = (round((x + 10 * dx * unit) * 16), round((y + 10 * dy * unit) * 16))
        size = max((1.9 + 0.6 * abs(radius)) * unit, 0.7)
        cv2().circle(specks, centre, round(size * 16), 255, -1, cv2().LINE_AA, 4)
    mask = specks.astype(np.float32) / 255
    paint = colour(235, 238, 240) if tone(image, mask) < _OVER_DARK else colour(28, 22, 22)
    return blend(image, mask, paint), mask


def cut(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A straight slit that gapes in the middle, its edge turned up and catching the light."""
    shape = shape_of(image)
    path = _line(rng, place(rng, shape), rng.uniform(36, 54) * unit, 0.02)
    width = max(rng.uniform(4.5, 6.5) * unit, 2)
    slit = ribbon(shape, path, width)
    lip = np.maximum(ribbon(shape, path + 0.35 * width, 1.25 * width) - slit, 0)
    return blend(blend(image, 0.9 * lip, colour(232, 236, 240)), 0.95 * slit, colour(8, 8, 10)), np.maximum(slit, lip)


def bubble(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """Blisters under the surface: small domes with a dark rim and a glint."""
    altered, mask = image.copy(), np.zeros(shape_of(image), np.float32)
    x, y = place(rng, shape_of(image))
    for _ in range(int(rng.integers(4, 8))):
        centre = (x + rng.normal(0, 11) * unit, y + rng.normal(0, 11) * unit)
        radius = max(rng.uniform(4, 9) * unit, 2)
        area, dx, dy = window(shape_of(image), centre, radius)
        distance = np.sqrt(dx**2 + dy**2)
        towards_light = dx * math.cos(LIGHT_FROM) + dy * math.sin(LIGHT_FROM)
        inside = np.clip((1 - distance) * radius, 0, 1)
        glint = 150 * np.exp(-((dx + 0.32) ** 2 + (dy + 0.32) ** 2) / 0.035)
        shade = 34 + 40 * towards_light - 75 * np.exp(-(((distance - 0.9) / 0.12) ** 2)) + glint
        altered[area] += (inside * shade)[..., None]
        mask[area] = np.maximum(mask[area], inside)
    return altered, mask


def rust(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A crumbly orange-brown patch that frays into grains."""
    shape = shape_of(image)
    patch = filled(shape, outline(rng, place(rng, shape), rng.uniform(15, 24) * unit, 0.3))
    inner = softened(patch, 4 * unit)
    grains = field(rng, shape, unit, 5, 3, 0.7)
    mask = np.clip((inner + 0.2 * grains - 0.38) * 9, 0, 1) * (inner > 0.1)
    flakes = np.clip(0.5 + 0.55 * field(rng, shape, unit, 3, 2), 0, 1)
    return blend(image, 0.95 * mask, between(colour(16, 38, 82), colour(40, 118, 218), flakes)), mask


def missing_piece(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A piece broken off the border: straight fractures, a raw edge, darkness behind."""
    height, width = shape = shape_of(image)
    side, along = int(rng.integers(4)), rng.uniform(0.2, 0.8)
    centre = ((along * width, 0), (width, along * height), (along * width, height), (0, along * height))[side]
    angles = np.linspace(0, 2 * np.pi, 10, endpoint=False) + rng.uniform(-0.25, 0.25, 10)
    radii = rng.uniform(20, 34, 10)[:, None] * unit
    ray = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = filled(shape, centre + radii * ray)
    gap = filled(shape, centre + (radii - 2.5 * unit) * ray)
    level = tone(image, mask)
    fracture = level + 80 if level < _OVER_DARK + 25 else level - 80
    return blend(blend(image, mask, colour(fracture, fracture, fracture)), gap, colour(20, 18, 18)), mask


def thread(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A loose fibre in loops, with its shadow."""
    shape = shape_of(image)
    # The curvature swings to and fro once or twice, which makes a loop or an S, never a closed ring.
    swing = np.linspace(0, rng.uniform(7, 12), 70) + _angle(rng)
    angles = _angle(rng) + np.cumsum(0.17 * np.sin(swing) + rng.normal(0, 0.06, 70))
    path = np.cumsum(np.stack([np.cos(angles), np.sin(angles)], axis=1), axis=0) * 2.2 * unit
    path += place(rng, shape) - path.mean(axis=0)
    fibre = stroked(shape, [path], 2 * unit)
    shadow = np.maximum(stroked(shape, [path + 1.6 * unit], 1.6 * unit) - fibre, 0)
    dyes = (colour(40, 40, 220), colour(215, 60, 40), colour(200, 40, 190), colour(240, 240, 240))
    local = colour(*cv2().mean(image, (fibre > 0).astype(np.uint8))[:3])
    # The two dyes that stand out most from this material; one of them by chance.
    strongest = sorted(dyes, key=lambda dye: -float(np.abs(dye - local).max()))[:2]
    dye = strongest[rng.integers(2)]
    return blend(blend(image, 0.5 * shadow, colour(0, 0, 0)), fibre, dye), np.maximum(fibre, shadow)


def burn(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A scorch mark: charred black within, brown and fading outwards."""
    shape = shape_of(image)
    patch = filled(shape, outline(rng, place(rng, shape), rng.uniform(15, 23) * unit, 0.25))
    heat = softened(patch, 5 * unit) + 0.05 * field(rng, shape, unit, 6, 2)
    heat = np.clip((heat - 0.12) / 0.88, 0, 1)
    char = np.clip((heat - 0.45) * 3, 0, 1)
    return blend(image, np.clip(1.6 * heat, 0, 0.96), between(colour(16, 52, 98), colour(8, 9, 10), char)), heat


def _moved(plane: Plane, step_px: float) -> Plane:
    """The plane, shifted to the lower right; its border is repeated."""
    shift = np.array([[1, 0, step_px], [0, 1, step_px]])
    return cv2().warpAffine(plane, shift, plane.shape[::-1], borderMode=cv2().BORDER_REPLICATE)


def bent(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A kink: the pattern is pushed aside along a straight crease, bright on one side and dark on the other."""
    centre, radius, angle = place(rng, shape_of(image)), rng.uniform(34, 44) * unit, _angle(rng)
    area, dx, dy = window(shape_of(image), centre, radius)
    along = dx * math.cos(angle) + dy * math.sin(angle)
    across = (dy * math.cos(angle) - dx * math.sin(angle)) / 0.7
    inside = np.clip(1 - along**2, 0, 1) * np.clip(1 - np.abs(across), 0, 1)
    push = inside * (_sign(rng) * rng.uniform(9, 12) * unit)
    from_x = dx * radius + centre[0] + push * math.cos(angle)
    from_y = dy * radius + centre[1] + push * math.sin(angle)
    pushed = cv2().remap(image, from_x, from_y, cv2().INTER_LINEAR, borderMode=cv2().BORDER_REFLECT)
    lit = -1 if math.sin(LIGHT_FROM - angle) < 0 else 1  # the side of the crease that faces the light
    flank = np.clip(across * 0.7 * radius / max(0.8 * unit, 0.7), -1, 1) * lit
    shade = np.clip(1.3 * inside, 0, 0.9) * flank * rng.uniform(0.42, 0.55)
    altered, mask = image.copy(), np.zeros(shape_of(image), np.float32)
    mask[area] = np.clip(5 * inside, 0, 1)
    altered[area] = blend(image[area], mask[area], pushed + shade[..., None] * (pushed + 45))
    return altered, mask


def contamination(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """Dirt of all kinds: angular crumbs, short bits of fibre and a haze of dust."""
    shape = shape_of(image)
    x, y = place(rng, shape)
    patch = softened(filled(shape, outline(rng, (x, y), rng.uniform(18, 24) * unit, 0.3)), 4 * unit)
    haze = np.clip(patch * (0.75 + 0.5 * field(rng, shape, unit, 6, 4, 0.8)), 0, 1)
    level = tone(image, patch)
    dust = colour(178, 190, 196) if level < _OVER_DARK + 15 else colour(84, 94, 100)
    altered, mask = blend(image, 0.6 * haze, dust), haze
    pale, dark = (colour(150, 190, 214), colour(228, 236, 238)), (colour(20, 28, 40), colour(28, 50, 84))
    paints = pale if level < _OVER_DARK - 20 else dark
    for number, paint in enumerate(paints):
        bits = np.zeros(shape, np.uint8)
        for _ in range(int(rng.integers(5, 8)) - 2 * number):
            angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
            radii = rng.uniform(1.2, 4.6) * unit * rng.uniform(0.6, 1.3, 7)
            spot_x, spot_y = x + 13 * rng.normal() * unit, y + 13 * rng.normal() * unit
            corners = np.stack([spot_x + radii * np.cos(angles), spot_y + radii * np.sin(angles)], axis=1)
            cv2().fillPoly(bits, [np.round(16 * corners).astype(np.int32)], 255, cv2().LINE_AA, 4)
        fibres = [
            _line(rng, (x, y), rng.uniform(9, 15) * unit, 0.2) + 12 * unit * rng.normal(0, 1, 2) for _ in range(2)
        ]
        cover = np.maximum(bits.astype(np.float32) / 255, stroked(shape, fibres, unit))
        altered, mask = blend(altered, cover, paint), np.maximum(mask, cover)
    return altered, mask


def misprint(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A code, bars or an arrow in ink, printed twice out of register or smeared."""
    shape = shape_of(image)
    plate = np.zeros((112, 176), np.uint8)  # two pixels per unit
    kind, code = int(rng.integers(3)), "".join(rng.choice(list("ABCDEFHKLMNPRSTUXYZ2345678"), 5))
    if kind == 0:
        cv2().putText(plate, "".join(rng.choice(list("0123456789"), 5)), (26, 52), 0, 1.4, 255, 4, cv2().LINE_AA)
    elif kind == 1:
        for left, wide in zip(range(28, 146, 9), rng.choice((2, 4, 6), 14).tolist(), strict=True):
            plate[12:60, left : left + wide] = 255
    else:
        cv2().arrowedLine(plate, (28, 36), (146, 36), 255, 7, cv2().LINE_AA, 0, 0.2)
    cv2().putText(plate, code, (26, 100), 0, 1.4, 255, 4, cv2().LINE_AA)
    shift = rng.uniform(7, 11), rng.uniform(6, 10) * _sign(rng)
    smear = cv2().blur(plate, (17, 1), anchor=(15, 0)) if rng.random() < 0.5 else plate
    ghost = cv2().warpAffine(smear, np.array([[1, 0, shift[0]], [0, 1, shift[1]]]), plate.shape[::-1])
    ink = np.maximum(plate, 0.7 * ghost).astype(np.float32) / 255
    turn = cv2().getRotationMatrix2D((88, 60), rng.uniform(-25, 25), unit / 2)
    turn[:, 2] += np.array(place(rng, shape)) - (88, 60)
    mask = cv2().warpAffine(softened(ink, 0.5 / unit), turn, shape[::-1])
    level = tone(image, mask)
    inks = (colour(30, 24, 24), colour(110, 24, 20)) if level > _OVER_DARK else (colour(240, 240, 240),) * 2
    return blend(image, 0.95 * mask, inks[rng.integers(2)]), mask


def chip(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A flake broken out of the surface: flat facets that meet in ridges, fine ripples, a raw rim."""
    shape, centre = shape_of(image), np.array(place(rng, shape_of(image)))
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False) + rng.uniform(-0.15, 0.15, 14)
    ray = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    edge = centre + (rng.uniform(14, 25, 7).repeat(2) * rng.uniform(0.8, 1.05, 14) * unit)[:, None] * ray
    corners, apex = edge[::2], centre + rng.uniform(-6, 6, 2) * unit
    mask = filled(shape, edge)
    level = tone(image, mask)
    hue = colour(*cv2().mean(image, (mask > 0).astype(np.uint8))[:3]) / max(level, 1)
    fracture = level + 45 if level < _OVER_DARK + 10 else level - 50
    facets = np.full(shape, fracture, np.float32)
    for first, second in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        side = (first + second) / 2 - apex
        facing = -math.cos(math.atan2(side[1], side[0]) - LIGHT_FROM)
        flat = filled(shape, np.stack([first, second, apex]))
        facets += flat * (fracture + 42 * facing + rng.uniform(-16, 16) - facets)
    area, dx, dy = window(shape, (corners[0][0], corners[0][1]), 48 * unit)
    facets[area] += 7 * np.sin(70 * np.sqrt(dx**2 + dy**2))
    far = np.maximum(mask - filled(shape, edge - 1.3 * unit), 0)
    near = np.maximum(mask - filled(shape, edge + 1.3 * unit), 0)
    flake = cv2().merge([facets * share for share in (0.4 + 0.6 * hue).tolist()])
    flake = blend(blend(flake, near, colour(16, 16, 18)), far, colour(238, 242, 244))
    return blend(image, mask, flake), mask


def discolouration(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A wide area of another tone, faded or yellowed, without an edge; the texture is all there."""
    shape = shape_of(image)
    area, dx, dy = window(shape, place(rng, shape), rng.uniform(36, 46) * unit)
    clouds = field(rng, shape, unit, 22)[area]
    share = np.clip(np.clip(1 - dx**2 - dy**2, 0, 1) * (1.3 + 0.55 * clouds), 0, 1)
    share = share * share * (3 - 2 * share)
    altered, mask = image.copy(), np.zeros(shape, np.float32)
    mask[area] = share
    bleach = ((58, 50, 40), (30, 48, 66), (64, 44, 62))
    fade = ((0.52, 0.8, 0.9), (0.7, 0.66, 0.84), (0.6, 0.74, 0.72), (0.82, 0.74, 0.64))
    pick = int(rng.integers(12))
    if tone(image, np.maximum(mask - 0.5, 0)) < _OVER_DARK:
        changed = 0.95 * image[area] + colour(*bleach[pick % 3])
    else:
        changed = image[area] * colour(*fade[pick % 4])
    altered[area] = blend(image[area], share, changed)
    return altered, mask


def glue(rng: np.random.Generator, image: Image, unit: float) -> Drawn:
    """A bead or a blob of dried glue: clear amber or milky, with wet white glints and a soft shadow."""
    shape = shape_of(image)
    length, width = ((60, 11), (14, 24))[rng.integers(2)]
    path = _line(rng, place(rng, shape), length * unit, 0.12)
    thick = softened(stroked(shape, [path], width * rng.uniform(0.9, 1.15) * unit), 2.5 * unit)
    lumps = 0.16 * field(rng, shape, unit, 11)
    body = np.clip((thick + lumps - 0.42) * max(4 * unit, 1.5), 0, 1) * (thick > 0.08)
    dome = softened(body, 2.2 * unit)
    slope = _moved(dome, -1.5 * unit) - dome
    glint = np.exp(-(((dome - 0.8) / 0.13) ** 2)) * np.clip(9 * slope - 0.3, 0, 1) * body
    kind = 0 if tone(image, body) > _OVER_DARK + 55 else int(rng.integers(2))  # milky glue does not show on white
    resin, clear = ((colour(34, 116, 196), 0.6), (colour(214, 224, 226), 0.55))[kind]
    shadow = np.maximum(softened(_moved(body, 2 * unit), 1.2 * unit) - body, 0)
    gel: Image = blend(image, clear * body, resin) - (body * (190 * slope + 45 * (1 - dome)))[..., None]
    gel = blend(blend(gel, 0.55 * shadow, colour(0, 0, 0)), glint, colour(255, 255, 255))
    return gel, np.maximum(body, shadow)


DEFECTS: dict[str, Callable[[np.random.Generator, Image, float], Drawn]] = {
    "scratch": scratch,
    "hole": hole,
    "stain": stain,
    "crack": crack,
    "dent": dent,
    "spot": spot,
    "cut": cut,
    "bubble": bubble,
    "rust": rust,
    "missing piece": missing_piece,
    "thread": thread,
    "burn": burn,
    "bent": bent,
    "contamination": contamination,
    "misprint": misprint,
    "chip": chip,
    "discolouration": discolouration,
    "glue": glue,
}
