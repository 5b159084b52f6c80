"""Where tiles lie, and that their maps become one without a seam."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from field_backend import SPEC, FieldBackend, waves, with_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dapo_edge import Inspector
from dapo_edge.errors import FrameError, RecipeError
from dapo_edge.kernels.map_spec import MapSize
from dapo_edge.kernels.pixels import PixelView
from dapo_edge.package import EnginePackage
from dapo_edge.runtime.regions import RegionOfInterest
from dapo_edge.runtime.tiling import MAX_TILES, Views, plan
from dapo_edge.structures import Inspection

FRAME = (4000, 3000)
LID = RegionOfInterest.of((600, 500, 1500, 1200), "lid")
SEAL = RegionOfInterest.of([(1800, 900), (3700, 1300), (2500, 2900)], "seal")


def inspected(
    package: EnginePackage, views: Views | None, map_size: MapSize = "frame", size: tuple[int, int] = FRAME, **how: Any
) -> Inspection:
    frame = np.zeros((size[1], size[0], 3), np.uint8)
    made = with_spec(package)
    with Inspector.on(made, FieldBackend(made, frame, **how), map_size=map_size) as inspector:
        return inspector.inspect(frame, views)


def truth(size: tuple[int, int], map_size: tuple[int, int]) -> NDArray[np.float64]:
    """The field at the centres of the map's pixels, [H, W]."""
    (width, height), (across, down) = size, map_size
    x = (np.arange(across)[None] + 0.5) * width / across
    y = (np.arange(down)[:, None] + 0.5) * height / down
    return waves(x, y)


def test_tiles_of_a_12_mp_frame_make_the_map_of_the_whole(package: EnginePackage) -> None:
    """Equal to 1e-3 everywhere but at the frame's own rim, where half a patch has no neighbour to the outside."""
    result = inspected(package, Views(tile=(1000, 900), overlap=200))
    assert result.anomaly_map.shape == (3000, 4000)
    difference = np.abs(result.anomaly_map - truth(FRAME, FRAME))
    rim = 1000 // 24
    assert difference[rim:-rim, rim:-rim].max() < 1e-3
    assert difference.max() < 0.02
    assert (result.type_map[result.anomaly_map > 0.5] == 1).all()
    assert result.score == result.anomaly_map.max()
    assert result.type_scores["scratch"] == pytest.approx(result.score, abs=1e-6)


@pytest.mark.parametrize("map_size", ["model", (500, 400), "frame"])
@pytest.mark.parametrize(("tile", "bound"), [((400, 350), 3e-3), ((250, 600), 3e-3), ((250, 2000), 8e-3)])
def test_maps_of_other_sizes_lie_in_the_same_place(
    package: EnginePackage, map_size: MapSize, tile: tuple[int, int], bound: float
) -> None:
    """An axis that is not divided keeps the package's aligned corners, which stretch it by a patch."""
    result = inspected(package, Views(tile=tile, overlap=90), map_size, (1203, 801))
    height, width = result.anomaly_map.shape
    # A pixel of the map may be several of the frame, and a tile's cut is rounded to one of those.
    difference = np.abs(result.anomaly_map - truth((1203, 801), (width, height)))
    assert difference[height // 12 : -height // 12, width // 12 : -width // 12].max() < bound


def test_a_tile_is_shown_at_the_encoders_size_on_a_map_of_the_models(package: EnginePackage) -> None:
    views = Views(tile=(1000, 750), overlap=100)
    assert plan(views, FRAME, SPEC, "model").map_size == (384, 384)  # 96 px for each tile
    assert plan(views, (60, 50), SPEC, "model").map_size == (60, 50), "never more than there is"
    assert plan(Views((LID,)), FRAME, SPEC, "model").map_size == (256, 240)
    assert plan(views, FRAME, SPEC, (70, 80)).map_size == (70, 80)


def steepest(result: Inspection, axis: int) -> float:
    return float(np.abs(np.diff(result.anomaly_map, axis=axis)).max())


def test_what_two_tiles_see_differently_passes_slowly_from_one_to_the_other(package: EnginePackage) -> None:
    """Every second tile is 0.1 more anomalous: over 200 px of overlap that is 5e-4 a pixel, as steep as the field."""
    plain, hard = Views(tile=(1000, 3000), overlap=200), Views(tile=(1000, 3000), overlap=0)
    own = steepest(inspected(package, plain), axis=1)
    assert steepest(inspected(package, plain, bias=(0.0, 0.1)), axis=1) < 1.3 * (own + 0.1 / 200)
    # The last tile overlaps more than the others.
    narrow = RegionOfInterest.of((0, 0, 1900, 3000))
    biased = inspected(package, Views((narrow,), (1000, 3000), 200), bias=(0.0, 0.1))
    assert steepest(biased, axis=1) > 0.02, "outside of a region there is nothing"
    assert float(np.abs(np.diff(biased.anomaly_map[:, :1900], axis=1)).max()) < 1.3 * (own + 0.1 / 100)
    # Without an overlap the smoothing alone is left.
    assert steepest(inspected(package, hard, bias=(0.0, 0.1)), axis=1) > 1.6 * (own + 0.1 / 200)


def test_outside_of_the_regions_everything_is_exactly_good(package: EnginePackage) -> None:
    result = inspected(package, Views((LID, SEAL), (700, 600), 150))
    anomaly, types = result.anomaly_map, result.type_map
    seal = plan(Views((SEAL,)), FRAME, SPEC, "frame").grids[0]
    assert seal.inside is not None
    inside = np.zeros(anomaly.shape, np.bool_)
    inside[500:1700, 600:2100] = True
    inside[900:2900, 1800:3700] |= seal.inside
    assert not anomaly[~inside].any()
    assert not types[~inside].any()
    assert anomaly[inside].min() > 0.05
    difference = np.abs(anomaly - truth(FRAME, FRAME))[inside]
    assert np.quantile(difference, 0.9) < 1e-3, "the rest are the rims of the regions"
    assert difference.max() < 0.02
    assert result.score == anomaly.max()


def test_where_regions_overlap_the_higher_anomaly_counts(package: EnginePackage) -> None:
    one, other = RegionOfInterest.of((0, 0, 400, 300)), RegionOfInterest.of((200, 0, 400, 300))
    for bias, low, high in (((0.0, 0.3), 150, 250), ((0.3, 0.0), 450, 350)):
        result = inspected(package, Views((one, other)), "frame", (600, 300), bias=bias)
        assert result.anomaly_map[150, low] == pytest.approx(waves(np.array(low), np.array(150)), abs=0.02)
        assert result.anomaly_map[150, high] == pytest.approx(waves(np.array(high), np.array(150)) + 0.3, abs=0.02)


@pytest.mark.parametrize(("rule", "inside_only"), [("max", True), ("top", True), ("image", False)])
def test_scores_do_not_look_outside_of_a_polygon(package: EnginePackage, rule: Any, inside_only: bool) -> None:
    """A peak right of the triangle's slanted edge, within its box."""
    from dataclasses import replace

    made = with_spec(package, replace(SPEC, score=rule, smoothing_px=0.0))
    frame = np.zeros((480, 480, 3), np.uint8)

    def peak(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        return 0.1 + 0.8 * ((x > 400) & (y < 80))

    triangle = RegionOfInterest.of([(0, 0), (480, 480), (0, 480)])
    for views in (Views((triangle,)), Views((triangle,), (200, 200), 60)):
        with Inspector.on(made, FieldBackend(made, frame, peak), map_size="frame") as inspector:
            result = inspector.inspect(frame, views)
        assert result.type_scores["scratch"] == pytest.approx(0.1, abs=1e-3)
        if inside_only or views.tile:  # the tile in the corner holds nothing of the triangle
            assert result.score == pytest.approx(0.1, abs=1e-3)


def test_tiles_that_nothing_depends_on_are_not_looked_at(package: EnginePackage) -> None:
    triangle = RegionOfInterest.of([(0, 0), (3000, 3000), (0, 3000)])
    made = with_spec(package)
    frame = np.zeros((3000, 4000, 3), np.uint8)
    backend = FieldBackend(made, frame)
    with Inspector.on(made, backend, map_size="frame") as inspector:
        views = Views((triangle,), (600, 600), 100)
        result = inspector.inspect(frame, views)
        own = inspector.plan(views, FRAME)
    assert len(backend.boxes) == len(own.boxes) == own.grids[0].used.sum() < len(own.grids[0].boxes) == 36
    assert tuple(backend.boxes) == own.boxes
    inside = own.grids[0].inside
    assert inside is not None
    difference = np.abs(result.anomaly_map - truth(FRAME, FRAME))[:, :3000]
    deep = inside.copy()
    deep[:, :25] = deep[-25:] = False  # the region's own rim
    assert difference[deep].max() < 1e-3


def test_one_tile_is_the_crop_itself(package: EnginePackage, picture: NDArray[np.uint8]) -> None:
    """A region without tiles, or smaller than a tile, gives what the cut-out picture gives, bit for bit."""
    x, y, width, height = box = (10, 20, 70, 90)
    with Inspector(package, map_size="frame") as inspector:
        alone = inspector.inspect(picture[y : y + height, x : x + width])
        for views in (Views((RegionOfInterest.of(box),)), Views((RegionOfInterest.of(box),), (90, 100), 20)):
            result = inspector.inspect(picture, views)
            np.testing.assert_array_equal(result.anomaly_map[y : y + height, x : x + width], alone.anomaly_map)
            np.testing.assert_array_equal(result.type_map[y : y + height, x : x + width], alone.type_map)
            assert result.score == alone.score
            assert result.frame_size == (picture.shape[1], picture.shape[0])
        whole = inspector.inspect(picture, Views((RegionOfInterest.of((0, 0, *picture.shape[1::-1])),)))
        np.testing.assert_array_equal(whole.anomaly_map, inspector.inspect(picture).anomaly_map)
        np.testing.assert_array_equal(inspector.inspect(picture, Views()).anomaly_map, whole.anomaly_map)


@pytest.mark.parametrize("pixel_format", ["BayerRG8", "NV12", "GRAY8", "RGB8"])
def test_tiles_of_a_camera_s_own_bytes(package: EnginePackage, pixel_format: Any) -> None:
    """As of the converted picture: at a tile's border colours are made of the neighbours beyond it."""
    columns, rows = {"RGB8": (360, 90), "NV12": (120, 135)}.get(pixel_format, (120, 90))
    data = np.random.default_rng(3).integers(0, 256, (rows, columns), np.uint8)
    raw = PixelView(data, pixel_format, 120, 90)
    views = Views((RegionOfInterest.of((11, 7, 101, 77)),), (41, 37), 9)
    with Inspector(package) as inspector:
        of_bytes, of_bgr = inspector.inspect(raw, views), inspector.inspect(raw.bgr(), views)
    np.testing.assert_array_equal(of_bytes.anomaly_map, of_bgr.anomaly_map)
    parts = plan(views, (120, 90), SPEC, "model").cut(raw)
    assert pixel_format == "NV12" or all(isinstance(p, PixelView) and np.shares_memory(p.data, data) for p in parts)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(100, 5000),
    st.integers(16, 5000),
    st.floats(0, 0.9),
    st.floats(0.003, 1),
    st.sampled_from(["scaled", "frame"]),
)
@example(153, 16, 0.0, 1 / 64, "scaled")  # two tiles of 76.5 px
def test_tiles_cover_a_region_without_gaps(length: int, tile: int, share: float, scale: float, kind: str) -> None:
    overlap = int(share * tile)
    if tile < length and (length - tile) / (tile - overlap) > 300:
        return
    region = RegionOfInterest.of((40, 8, length, 32))
    size: MapSize = "frame" if kind == "frame" else (max(1, round(scale * (length + 90))), 7)
    found = plan(Views((region,), (tile, max(32, overlap + 1)), overlap), (length + 90, 48), SPEC, size)
    (grid,) = found.grids
    _, _, width, _ = grid.window
    assert grid.windows[0][0] == 0
    assert grid.windows[-1][0] + grid.windows[-1][2] == width
    for one, other in zip(grid.windows, grid.windows[1:], strict=False):
        assert one[0] < other[0] <= one[0] + one[2]
    assert len(grid.boxes) <= (1 if tile >= length else 1 + -(-(length - tile) // (tile - overlap)))
    assert {box[2] for box in grid.boxes} == {grid.boxes[0][2]}, "one size"
    assert min(box[0] for box in grid.boxes) == 40
    assert max(box[0] + box[2] for box in grid.boxes) == 40 + length
    assert grid.columns.size_in == SPEC.grid[1] * len(grid.boxes)
    np.testing.assert_allclose(grid.columns.dense().sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (lambda: Views(tile=(100, 100), overlap=100), "are not larger than their overlap of 100 px"),
        (lambda: Views(tile=(300, 100), overlap=200), "tiles of 300 x 100 px are not larger than their overlap"),
        (lambda: Views(tile=(0, 100)), r"\(0, 100\) is no tile size"),
        (lambda: Views(tile=(15, 100)), "is no tile size.*16 or more"),
        (lambda: Views(tile=(100.0, 100)), "is no tile size"),  # type: ignore[arg-type]
        (lambda: Views(tile=100), "100 is no tile size"),  # type: ignore[arg-type]
        (lambda: Views(tile=(100, 100), overlap=-1), "an overlap of -1 is impossible"),
        (lambda: Views(tile=(100, 100), overlap=1.5), "an overlap of 1.5 is impossible"),  # type: ignore[arg-type]
        (lambda: Views(overlap=10), "there is an overlap, but no tile size"),
        (lambda: Views(((0, 0, 50, 50),)), "made of regions of interest"),  # type: ignore[arg-type]
    ],
)
def test_views_that_fit_no_frame(views: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        views()


def test_views_that_do_not_fit_this_frame(package: EnginePackage) -> None:
    views = Views((LID,))
    views.check(2100, 1700)
    message = r"the region of interest 'lid' reaches to \(2100, 1700\), outside of the frame of 2099 x 1700 px"
    with pytest.raises(RecipeError, match=message):
        views.check(2099, 1700)
    with Inspector.on(with_spec(package), FieldBackend(package, np.zeros((9, 9, 3), np.uint8))) as inspector:
        with pytest.raises(FrameError, match=r"outside of the frame of 640 x 480 px\. Make it smaller"):
            inspector.inspect(np.zeros((480, 640, 3), np.uint8), views)
        with pytest.raises(RecipeError, match="outside of the frame"):
            inspector.plan(views, (640, 480))
        with pytest.raises(RecipeError, match=f"tiles would be cut out.*{MAX_TILES} at most"):
            inspector.plan(Views(tile=(20, 20), overlap=10), (640, 480))
        tiny = RegionOfInterest.of([(0, 0), (20, 0), (0, 20)])
        with pytest.raises(RecipeError, match="is smaller than a pixel of the map"):
            plan(Views((tiny,)), FRAME, SPEC, (4, 3))


def test_the_warning_about_thresholds() -> None:
    assert Views().warning is None
    assert "those of whole frames do not hold for tiles" in str(Views(tile=(100, 100)).warning)
    assert "regions of interest" in str(Views((LID,)).warning)
