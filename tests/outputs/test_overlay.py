"""What the overlay promises: good areas stay clear, colours mean types, labels stay inside and apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dapo_edge.errors import OutputError
from dapo_edge.outputs import labels as labels_module
from dapo_edge.outputs.labels import Label, contrast, fitted, ink, place
from dapo_edge.outputs.overlay import banner_height, contact_sheet, draw
from dapo_edge.outputs.palette import HEAT_FROM, TYPE_COLOURS, VERDICT_COLOURS, type_colour
from dapo_edge.outputs.sheet import letterbox
from dapo_edge.structures import Box, DefectMap, Frame, Inspection, Region, Verdict

NAMES = ("good", "scratch", "missing part", "stain", "rust", "hole")
SIZES = [(320, 240), (641, 479), (1920, 1080), (64, 200)]


def noise(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def inspection(
    width: int, height: int, verdict: Verdict = "ng", index: int = 3, map_size: tuple[int, int] = (56, 42)
) -> Inspection:
    """One round defect of type `index` in the middle of a map of its own size."""
    w, h = map_size
    y, x = np.mgrid[:h, :w]
    anomaly = 0.95 * np.exp(-(((x - w / 2) / (w / 8)) ** 2) - ((y - h / 2) / (h / 8)) ** 2) + 0.04
    types = np.where(anomaly > 0.5, index, 0).astype(np.uint8)
    box = (width // 3, height // 3, width // 3, height // 3)
    region = Region(NAMES[index], 0.87, 100, box)
    defect_map = DefectMap(anomaly.astype(np.float32), types, NAMES)
    return Inspection(0.912, verdict, defect_map, (region,), (width, height), ms={"total": 38.21})


def count_of(image: NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    return int((image == np.array(colour, np.uint8)).all(axis=2).sum())


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_shape_type_and_the_frame_is_left_alone(width: int, height: int) -> None:
    image = noise(width, height)
    image.flags.writeable = False
    shown = draw(image, inspection(width, height))
    assert shown.dtype == np.uint8
    assert shown.shape == (height + banner_height(height, width), width, 3)
    assert banner_height(height, width) % 2 == 0
    assert draw(image, inspection(width, height), banner=False).shape == image.shape
    frame = Frame(image, 0, 0, "image:///a.png")
    np.testing.assert_array_equal(draw(frame, inspection(width, height)), shown)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_good_areas_stay_clear_and_defects_do_not(width: int, height: int) -> None:
    image = noise(width, height)
    shown = draw(image, inspection(width, height), banner=False)
    corner = (slice(0, height // 8), slice(0, width // 8))
    np.testing.assert_array_equal(shown[corner], image[corner])
    middle = (slice(height * 15 // 32, height * 17 // 32), slice(width * 15 // 32, width * 17 // 32))
    assert (shown[middle][..., 2].astype(int) - shown[middle][..., 0]).mean() > 60


def test_heat_follows_the_anomaly() -> None:
    grey = np.full((64, 256, 3), 128, np.uint8)
    ramp = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (64, 1))
    result = Inspection(0.5, "ok", DefectMap(ramp, np.zeros((64, 256), np.uint8), NAMES), (), (256, 64))
    row = draw(grey, result, banner=False)[32].astype(int)
    change = np.abs(row - 128).sum(axis=1)
    assert (change[: int(255 * HEAT_FROM)] == 0).all()
    assert (change[int(255 * HEAT_FROM) + 8 :] > 0).all()
    assert change[255] > change[128] > change[80]


def test_heat_starts_at_the_threshold_of_a_calibrated_package() -> None:
    grey = np.full((64, 256, 3), 128, np.uint8)
    ramp = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (64, 1))
    calm = DefectMap(ramp, np.zeros((64, 256), np.uint8), NAMES)
    row = draw(grey, Inspection(0.5, "ok", calm, (), (256, 64), pixel_threshold=0.8), banner=False)[32].astype(int)
    change = np.abs(row - 128).sum(axis=1)
    assert (change[: int(255 * 0.8)] == 0).all()
    assert (change[int(255 * 0.8) + 4 :] > 0).all()


def test_maps_of_odd_values_are_drawn() -> None:
    result = inspection(64, 64)
    bad = np.array([[np.nan, np.inf], [-np.inf, 7.0]], np.float32)
    result = Inspection(0.5, "ok", DefectMap(bad, np.zeros((2, 2), np.uint8), NAMES), result.regions, (64, 64))
    draw(noise(64, 64), result)


@pytest.mark.parametrize("index", range(1, 6))
def test_a_type_keeps_its_colour(index: int) -> None:
    grey = np.full((240, 320, 3), 90, np.uint8)
    shown = draw(grey, inspection(320, 240, index=index), banner=False)
    assert count_of(shown, type_colour(index)) > 300  # the label's box and the contour
    for other in set(range(1, 6)) - {index}:
        assert count_of(shown, type_colour(other)) < 5


def test_the_contour_follows_the_type_map_or_else_the_box() -> None:
    grey = np.full((240, 320, 3), 90, np.uint8)
    result = inspection(320, 240)
    round_one = draw(grey, result, banner=False)
    empty = DefectMap(result.anomaly_map, np.zeros_like(result.type_map), NAMES)
    box_one = draw(grey, Inspection(0.9, "ng", empty, result.regions, (320, 240)), banner=False)
    x, y, w, h = result.regions[0].box
    corner = (slice(y + h - 2, y + h), slice(x + w - 2, x + w))
    assert count_of(box_one[corner], type_colour(3)) > 0
    assert count_of(round_one[corner], type_colour(3)) == 0


def test_an_unknown_type_and_a_box_beyond_the_edge() -> None:
    result = inspection(320, 240)
    for box in ((-10, -10, 30, 30), (310, 230, 50, 50), (400, 300, 10, 10), (5, 5, 0, 0)):
        regions = (Region("surprise", 0.5, 1, box), Region("good", 0.5, 1, box))
        draw(noise(320, 240), Inspection(0.5, "ng", result.defect_map, regions, (320, 240)))


@pytest.mark.parametrize("verdict", ["ok", "ng", "unsure"])
def test_the_verdict_has_its_colour(verdict: Verdict) -> None:
    image = np.zeros((240, 320, 3), np.uint8)
    strip = draw(image, inspection(320, 240, verdict))[: banner_height(240, 320)]
    assert tuple(strip[1, 1]) == VERDICT_COLOURS[verdict]
    assert sum(count_of(strip, colour) > 50 for colour in VERDICT_COLOURS.values()) == 1


def test_a_wrong_frame_is_refused() -> None:
    with pytest.raises(OutputError, match="320x240, its inspection belongs to one of 640x480"):
        draw(noise(320, 240), inspection(640, 480))
    for image in (noise(320, 240)[..., 0], noise(320, 240) / 255, np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(OutputError, match="uint8 in BGR"):
            draw(image, inspection(320, 240))


def test_the_palette() -> None:
    assert len(TYPE_COLOURS) >= 20
    assert len(set(TYPE_COLOURS)) == len(TYPE_COLOURS)
    first = np.array(TYPE_COLOURS[:12], float)
    assert min(np.abs(a - b).sum() for a, b in itertools.combinations(first, 2)) > 60
    assert type_colour(1) == type_colour(1 + len(TYPE_COLOURS))
    for colour in (*TYPE_COLOURS, *VERDICT_COLOURS.values()):
        assert _contrast_ratio(colour, contrast(colour)) > 3.0


def _contrast_ratio(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """WCAG 2."""

    def luminance(colour: tuple[int, ...]) -> float:
        blue, green, red = ((c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


boxes = st.tuples(st.integers(-20, 330), st.integers(-20, 250), st.integers(1, 340), st.integers(1, 260))


@given(areas=st.lists(boxes, max_size=30), size=st.sampled_from([(320, 240), (64, 64), (16, 16), (40, 400)]))
@settings(max_examples=60, deadline=None)
def test_labels_stay_inside_and_never_overlap(areas: list[Box], size: tuple[int, int]) -> None:
    drawn: list[tuple[int, int, int]] = []
    image = np.zeros((size[1], size[0], 3), np.uint8)
    # Every label has a colour of its own and no letters: where it is drawn, its box is one full rectangle.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels_module, "write", lambda *_: None)
        for number, area in enumerate(areas):
            drawn.append((number + 1, 200, 7))
            areas[number] = area
        place(image, tuple(Label("stain 87 %", colour, area) for colour, area in zip(drawn, areas, strict=True)))
    sizes = set()
    for colour in drawn:
        ys, xs = np.nonzero((image == np.array(colour, np.uint8)).all(axis=2))
        if len(ys):
            w, h = int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1
            assert len(ys) == w * h  # nothing lies over it
            sizes.add((w, h))
    assert len(sizes) <= 1  # nothing was cut off at an edge
    if areas and size == (320, 240):
        assert sizes


def test_text_is_shortened_to_fit_and_stays_printable() -> None:
    assert fitted("stain", 12, 500) == "stain"
    short = fitted("an extraordinarily long defect name 87 %", 12, 80)
    assert short.endswith("..")
    assert ink(short, 12).shape[1] <= 80
    assert fitted("stain", 12, 1) == ""
    np.testing.assert_array_equal(ink("Größe é", 14), ink("Grosse e", 14))
    np.testing.assert_array_equal(ink("部\n", 14), ink("??", 14))
    assert ink("", 14).shape[1] == 1


def test_a_contact_sheet() -> None:
    images = [noise(64, 48), noise(30, 48), noise(64, 20)]
    plain = contact_sheet(images, 2)
    labelled = contact_sheet(images, 2, ["a", "b", "c"])
    assert labelled.shape[0] > plain.shape[0] > 2 * 48
    assert labelled.shape[1] == plain.shape[1]
    assert 2 * 64 < plain.shape[1] < 3 * 64
    assert contact_sheet(images[:1], 9).shape[1] < 2 * 64
    np.testing.assert_array_equal(plain[6:54, 6:70], images[0])
    for bad in (
        lambda: contact_sheet([], 2),
        lambda: contact_sheet(images, 0),
        lambda: contact_sheet(images, 1, ["a"]),
    ):
        with pytest.raises(OutputError):
            bad()


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_letterbox_always_fits(width: int, height: int, to_width: int, to_height: int) -> None:
    image = np.full((height, width, 3), 255, np.uint8)
    framed = letterbox(image, to_width, to_height)
    assert framed.shape == (to_height, to_width, 3)
    assert (framed == 255).any()
