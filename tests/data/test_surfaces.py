import subprocess
import sys

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")

from dapo_edge.data.brushes import unit_of  # noqa: E402
from dapo_edge.data.flaws import DEFECTS  # noqa: E402
from dapo_edge.data.materials import MATERIALS, draw_material  # noqa: E402
from dapo_edge.data.surfaces import VISIBLE_LEVELS, make_surface, stream  # noqa: E402
from dapo_edge.errors import RecipeError  # noqa: E402

SIZES = [(32, 32), (128, 128), (200, 75), (48, 310)]


def grown(mask, px):
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * px + 1, 2 * px + 1), np.uint8)) > 0


def with_and_without(seed, size, material, defect):
    both = {"materials": (material,), "defects": (defect,)}
    return make_surface(seed, size, **both, good_share=0), make_surface(seed, size, **both, good_share=1)


@pytest.mark.parametrize("size", SIZES)
def test_same_seed_same_surface_whatever_happened_before(size):
    first = make_surface(7, size, max_defects=3)
    np.random.default_rng().random()
    make_surface(8, size)
    second = make_surface(7, size, max_defects=3)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.types, second.types)
    assert (first.material, first.caption, first.names) == (second.material, second.caption, second.names)
    assert not np.array_equal(first.image, make_surface(9, size).image)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("material", MATERIALS)
def test_good_surface(material, size):
    surface = make_surface(3, size, materials=(material,), good_share=1)
    assert surface.image.shape == (size[1], size[0], 3)
    assert surface.image.dtype == np.uint8
    assert surface.types.shape == (size[1], size[0])
    assert surface.types.dtype == np.uint8
    assert surface.material == material
    assert surface.caption.defects == ()
    assert surface.caption.material in (material, None)
    assert surface.image.std() > 2
    assert not surface.mask.any()
    assert surface.defects == ()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_mask_is_exactly_what_the_defect_altered(defect, size):
    for seed, material in enumerate(MATERIALS):
        damaged, good = with_and_without(seed, size, material, defect)
        change = np.abs(damaged.image.astype(int) - good.image).max(axis=2)
        assert damaged.defects == (defect,)
        assert damaged.material == good.material == material
        # The camera's blur spreads an edge over two or three pixels.
        near = grown(damaged.mask, 3)
        assert change[~near].max(initial=0) <= 2 * VISIBLE_LEVELS
        assert (change[damaged.mask] > 4).mean() > 0.6, material
        assert change[damaged.mask].mean() > 10, material
        strong = change > 40
        assert (strong & grown(damaged.mask, 1)).sum() >= 0.9 * strong.sum(), material


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_function_keeps_its_contract(defect):
    shape = (90, 140)
    for seed, material in enumerate(MATERIALS):
        image = draw_material(material, stream(seed), shape)
        before = image.copy()
        altered, mask = DEFECTS[defect](stream(seed), image, unit_of(shape))
        assert image.dtype == altered.dtype == mask.dtype == np.float32
        assert altered.shape == image.shape
        assert mask.shape == shape
        assert 0 <= mask.min() <= mask.max() <= 1 + 1e-6
        assert np.array_equal(image, before)
        assert np.array_equal(altered[mask == 0], image[mask == 0])


@pytest.mark.parametrize("defect", DEFECTS)
def test_same_seed_shows_the_same_scene_at_any_size(defect):
    small = make_surface(5, (128, 128), defects=(defect,), good_share=0)
    large = make_surface(5, (384, 384), defects=(defect,), good_share=0)
    assert large.material == small.material
    shrunk = cv2.resize(large.mask.astype(np.float32), (128, 128), interpolation=cv2.INTER_AREA) > 0.5
    assert (shrunk & grown(small.mask, 2)).sum() > 0.9 * shrunk.sum()
    assert (small.mask & grown(shrunk, 2)).sum() > 0.9 * small.mask.sum()
    view = cv2.resize(large.image, (128, 128), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(cv2.blur(view - small.image, (15, 15))).mean() < 12


def test_full_hd():
    surface = make_surface(1, (1920, 1080), good_share=0)
    assert surface.image.shape == (1080, 1920, 3)
    assert surface.mask.any()


def test_types_are_bound_by_name():
    seen = set()
    for seed in range(30):
        surface = make_surface(seed, defects=("burn", "scratch"), good_share=0)
        assert surface.names == ("normal", "burn", "scratch")
        (kind,) = set(np.unique(surface.types)) - {0}
        assert surface.defects == (surface.names[kind],)
        assert surface.caption.defects == (surface.names[kind],)
        seen.add(surface.names[kind])
    assert seen == {"burn", "scratch"}


def test_several_defects_on_one_surface():
    counts = [len(make_surface(seed, good_share=0, max_defects=4).defects) for seed in range(60)]
    assert set(counts) == {1, 2, 3, 4}
    assert max(len(make_surface(seed, (64, 64), good_share=0).defects) for seed in range(60)) == 1
    some = make_surface(2, defects=("hole", "thread"), good_share=0, max_defects=9)
    assert set(some.defects) <= {"hole", "thread"}


def test_good_share():
    good = sum(not make_surface(seed, (32, 32), good_share=0.3).mask.any() for seed in range(400))
    assert 85 < good < 155


def test_every_material_and_defect_comes_up():
    surfaces = [make_surface(seed, (32, 32)) for seed in range(300)]
    assert {surface.material for surface in surfaces} == set(MATERIALS)
    assert {name for surface in surfaces for name in surface.defects} == set(DEFECTS)
    assert len({surface.caption for surface in surfaces}) > 100


def test_caption_claims_what_is_visible():
    surface = make_surface(0, materials=("wood",), defects=("rust", "hole", "cut"), good_share=0, max_defects=3)
    assert surface.caption.defects == surface.defects
    assert surface.caption.material in ("wood", None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"materials": ("wood", "would")}, "brushed metal"),
        ({"materials": "wood"}, "brushed metal"),
        ({"materials": ()}, "brushed metal"),
        ({"defects": ("scrach",)}, "missing piece"),
        ({"defects": ("hole", "hole")}, "twice"),
        ({"defects": ()}, "good_share=1"),
        ({"size": (31, 64)}, "32"),
        ({"size": (64, 31)}, "32"),
        ({"good_share": 1.1}, "between 0"),
        ({"good_share": -0.1}, "between 0"),
        ({"good_share": float("nan")}, "between 0"),
        ({"max_defects": 0}, "at least 1"),
        ({"seed": -1}, "positive"),
        ({"framing": "parts"}, "surface, part"),
    ],
)
def test_impossible_worlds_are_refused(options, named):
    with pytest.raises(RecipeError, match=named):
        make_surface(**{"seed": 0, **options})


def test_import_does_not_need_opencv():
    code = "import sys; import dapo_edge.data.surfaces, dapo_edge.data.belt; sys.exit('cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
