"""Counting what was found against what is there: hand-made maps and truths, exact counts."""

from __future__ import annotations

import numpy as np
import pytest

from dapo_edge.runtime.confusion import Confusion, true_defects
from dapo_edge.structures import NORMAL, Box, DefectMap, Inspection, Region, Truth, Verdict

WIDTH, HEIGHT = 640, 480
TRUE_NAMES = (NORMAL, "scratch", "spot", "glue")
WORDS = (NORMAL, "spot", "scratch", "cut")  # of the inspection: another order, and no glue
Marked = tuple[str, Box]


def truth(*marked: Marked, names: tuple[str, ...] = TRUE_NAMES) -> Truth:
    """Rectangles on a frame of 640 x 480."""
    types = np.zeros((HEIGHT, WIDTH), np.uint8)
    for name, (x, y, w, h) in marked:
        types[y : y + h, x : x + w] = names.index(name)
    return Truth(types, names)


def inspection(*found: Marked, verdict: Verdict = "ng", in_map: bool = True, per_pixel: int = 4) -> Inspection:
    """Rectangles found in a map of which each pixel is `per_pixel` of the frame's; without `in_map` only boxes."""
    shape = (HEIGHT // per_pixel, WIDTH // per_pixel)
    anomaly = np.full(shape, 0.1, np.float32)
    for _, box in found if in_map else ():
        x, y, w, h = (value // per_pixel for value in box)
        anomaly[y : y + h, x : x + w] = 0.9
    regions = tuple(Region(name, 0.9, box[2] * box[3], box) for name, box in found)
    defect_map = DefectMap(anomaly, np.zeros(shape, np.uint8), WORDS)
    return Inspection(0.8, verdict, defect_map, regions, (WIDTH, HEIGHT), pixel_threshold=0.5)


def counted(inspected: Inspection, known: Truth) -> Confusion:
    confusion = Confusion()
    confusion.add(inspected, known)
    return confusion


def test_a_defect_found_and_named_right() -> None:
    confusion = counted(inspection(("scratch", (96, 96, 48, 48))), truth(("scratch", (100, 100, 40, 40))))
    result = confusion.as_json()
    assert result["frames"] == 1
    assert result["verdicts"]["defective"] == {"ok": 0, "ng": 1, "unsure": 0}
    assert result["words"] == ["spot", "scratch", "cut"]
    assert result["types"] == {
        "scratch": {"word": True, "regions": 1, "found": 1, "right": 1, "called": {"scratch": 1}}
    }
    assert result["false_alarms"] == 0


def test_a_wrong_word_and_a_word_that_the_bank_lacks() -> None:
    known = truth(("scratch", (100, 100, 40, 40)), ("glue", (300, 300, 40, 40)))
    result = counted(inspection(("cut", (96, 96, 48, 48)), ("spot", (296, 296, 48, 48))), known).as_json()
    assert result["types"]["scratch"] == {"word": True, "regions": 1, "found": 1, "right": 0, "called": {"cut": 1}}
    assert result["types"]["glue"] == {"word": False, "regions": 1, "found": 1, "right": 0, "called": {"spot": 1}}


def test_the_region_that_covers_most_of_a_defect_names_it() -> None:
    known = truth(("scratch", (100, 100, 200, 20)))
    found = (("spot", (100, 100, 60, 20)), ("scratch", (180, 100, 120, 20)))
    for order in (found, found[::-1]):
        assert counted(inspection(*order), known).called == {"scratch": {"scratch": 1}}


def test_one_region_over_many_defects_finds_them_all() -> None:
    known = truth(*(("spot", (100 + 30 * n, 100, 15, 15)) for n in range(5)))
    confusion = counted(inspection(("spot", (96, 96, 152, 24))), known)
    assert confusion.called == {"spot": {"spot": 5}}
    assert confusion.false_alarms == 0


def test_defects_of_two_types_that_touch_are_two() -> None:
    known = truth(("scratch", (100, 100, 40, 40)), ("spot", (140, 100, 40, 40)))
    assert counted(inspection(("spot", (100, 100, 80, 40))), known).called == {
        "scratch": {"spot": 1},
        "spot": {"spot": 1},
    }


def test_a_missed_defect_beside_a_false_alarm() -> None:
    known = truth(("scratch", (100, 100, 40, 40)))
    result = counted(inspection(("cut", (400, 300, 40, 40)), verdict="ok"), known).as_json()
    assert result["types"]["scratch"] == {"word": True, "regions": 1, "found": 0, "right": 0, "called": {"missed": 1}}
    assert result["verdicts"]["defective"]["ok"] == 1
    assert result["false_alarms"] == 1


@pytest.mark.parametrize(("distance", "alarms"), [(4, 0), (8, 0), (12, 1)])
def test_a_region_just_beside_a_defect_is_no_false_alarm(distance: int, alarms: int) -> None:
    known = truth(("scratch", (100, 100, 40, 40)))
    # Between its nearest pixel and the defect's, 139, lie `distance` steps.
    confusion = counted(inspection(("scratch", (139 + distance, 100, 40, 40)), per_pixel=1), known)
    assert confusion.false_alarms == alarms
    assert confusion.called == {"scratch": {"missed": 1}}


def test_a_good_frame() -> None:
    confusion = counted(inspection(verdict="ok"), truth())
    confusion.add(inspection(("spot", (0, 0, 40, 40)), ("cut", (100, 0, 40, 40)), verdict="unsure"), truth())
    result = confusion.as_json()
    assert result["verdicts"]["good"] == {"ok": 1, "ng": 0, "unsure": 1}
    assert result["types"] == {}
    assert (result["false_alarms"], result["false_alarms_per_frame"]) == (2, 1.0)


@pytest.mark.parametrize(
    ("box", "visible"),
    [
        ((0, 100, 20, 200), False),  # all that is left of it
        ((620, 100, 20, 200), False),
        ((100, 460, 200, 20), False),
        ((0, 100, 24, 200), True),
        ((1, 100, 20, 200), True),  # narrow, but whole
        ((100, 100, 9, 11), False),  # 99 px
        ((100, 100, 10, 10), True),
    ],
)
def test_slivers_and_splinters_are_not_asked_for(box: Box, visible: bool) -> None:
    known = truth(("spot", box))
    (defect,) = true_defects(known)
    assert defect.visible is visible
    confusion = counted(inspection(verdict="ok"), known)
    assert confusion.verdicts["defective" if visible else "barely"] == {"ok": 1}
    assert sum(map(len, confusion.called.values())) == int(visible)
    x, y, w, h = box
    around = (x // 4 * 4, y // 4 * 4, w // 4 * 4 + 4, h // 4 * 4 + 4)
    assert counted(inspection(("spot", around)), known).false_alarms == 0


def test_a_region_is_its_pixels_not_its_box() -> None:
    """The box of an L holds the defect and another region; neither is the L's."""
    found = inspection(("cut", (100, 100, 200, 20)), ("cut", (100, 100, 20, 200)), ("spot", (200, 200, 40, 40)))
    regions = (Region("cut", 0.9, 7600, (100, 100, 200, 200)), found.regions[2])
    found = Inspection(0.8, "ng", found.defect_map, regions, found.frame_size, found.pixel_threshold)
    known = truth(("spot", (205, 205, 30, 30)), ("glue", (150, 250, 30, 30)))
    confusion = counted(found, known)
    assert confusion.called == {"spot": {"spot": 1}, "glue": {"missed": 1}}
    assert confusion.false_alarms == 1  # the L


def test_a_region_the_map_does_not_show_counts_with_its_box() -> None:
    known = truth(("scratch", (100, 100, 40, 40)))
    assert counted(inspection(("scratch", (96, 96, 48, 48)), in_map=False), known).called == {"scratch": {"scratch": 1}}


def test_a_map_of_another_size_than_the_frame() -> None:
    """As the runtime makes it: boxes rounded from a map of 56 x 56."""
    anomaly = np.zeros((56, 56), np.float32)
    anomaly[10:20, 30:40] = 0.9
    box = (round(30 * WIDTH / 56), round(10 * HEIGHT / 56), round(10 * WIDTH / 56), round(10 * HEIGHT / 56))
    defect_map = DefectMap(anomaly, np.zeros((56, 56), np.uint8), WORDS)
    found = Inspection(0.8, "ng", defect_map, (Region("spot", 0.9, 9000, box),), (WIDTH, HEIGHT), 0.5)
    confusion = counted(found, truth(("spot", (380, 100, 30, 30))))
    assert confusion.called == {"spot": {"spot": 1}}


def test_a_truth_of_another_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="does not belong"):
        Confusion().add(inspection(), Truth(np.zeros((480, 480), np.uint8), TRUE_NAMES))


def test_nothing_counted_yet() -> None:
    result = Confusion().as_json()
    assert result["frames"] == result["false_alarms"] == result["false_alarms_per_frame"] == 0
    assert result["verdicts"]["good"] == {"ok": 0, "ng": 0, "unsure": 0}
