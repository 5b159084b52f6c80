"""benchmarks/scaling.py: bytes are those of the shapes, a line through them is found again, the rest is told."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dapo_edge.bench.feed import open_feed
from dapo_edge.errors import RecipeError
from dapo_edge.kernels import reference
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.kernels.resample import upsample
from dapo_edge.package import EnginePackage
from dapo_edge.runtime.inspector import Inspector

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import packages
import scaling
import touched_bytes
from common import bank_around
from scaling import Point, Spread, curve_of
from scaling_page import in_markdown
from touched_bytes import Cut, Fit, all_channel_pixels, contending_pixels, fitted, map_bytes

SPEC = MapSpec(image_size=96, grid=(6, 6), temperature=0.07, align_corners=True, smoothing_px=2, score="max")


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch, package: EnginePackage) -> None:
    """All curves of the tiny package, one look at each point."""
    for name, value in {
        "WARM": 0,
        "LEAST": 2,
        "SECONDS": 0.0,
        "IMAGE_SIZES": (96, 128),
        "DEFECT_TYPES": (1, 3),
        "MAP_SIZES": ((96, 72), (320, 240)),
        "FRAME_SIZE": (160, 120),
        "LARGE": (400, 300),
        "TILES": {1: (400, 300), 4: (200, 150)},
        "CAMERAS": (1, 2),
        "CAMERA_ROUNDS": 1,
        "CAMERA_SECONDS": 0.3,
        "LOAD_SECONDS": 0.5,
    }.items():
        monkeypatch.setattr(scaling, name, value)
    monkeypatch.setattr(scaling, "reference_package", lambda: package)
    monkeypatch.setattr(scaling, "vit_package", lambda: package)
    monkeypatch.setattr(scaling, "cached", lambda name, made: package)
    # The tiny package has no INT8 encoder, and what is looked at here does not depend on the precision.
    monkeypatch.setattr(scaling, "bare_encoder", lambda own, precision: packages.bare_encoder(own, "fp32"))
    opened = packages.opened
    monkeypatch.setattr(scaling, "opened", lambda own, precision, size="model": opened(own, "fp32", size))
    monkeypatch.setattr(scaling, "open_feed", lambda uri: open_feed("synthetic://160x120@30"))


def points(outside: list[float], touched: list[int]) -> list[Point]:
    """Of given times and bytes."""
    one = Spread(1.0, 1.0, 1.0)
    return [
        Point(x, f"p{x}", size, size, one, one, Spread(ms, ms, ms), 3)
        for x, (ms, size) in enumerate(zip(outside, touched, strict=True))
    ]


@pytest.mark.usefixtures("_quick")
def test_every_curve_is_measured_explained_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--out", str(tmp_path / "scaling.json")])
    document = json.loads((tmp_path / "scaling.json").read_text())
    assert document["schema"] == "dapo-edge scaling 1"
    assert document["command"] == "python benchmarks/scaling.py"
    assert list(document["curves"]) == ["image size", "defect types", "map size", "cameras", "tiles"]
    for name, curve in document["curves"].items():
        assert curve["what"] and curve["note"], name
        for point in curve["points"]:
            assert 0 < point["bytes"] <= point["bytes_of_all_channels"]
            assert point["total_ms"]["low"] <= point["total_ms"]["median"] <= point["total_ms"]["high"]
            assert point["encoder_ms"]["median"] > 0 and point["n"] >= 1
    by_tiles = document["curves"]["tiles"]["points"]
    assert [point["more"]["map"] for point in by_tiles] == [[96, 96], [192, 192]]
    assert by_tiles[1]["bytes"] > by_tiles[0]["bytes"]
    of_cameras = document["curves"]["cameras"]["points"]
    assert of_cameras[0]["bytes"] == of_cameras[1]["bytes"]
    assert all(point["more"]["waiting_p99_ms"] >= 0 and point["more"]["fps"] > 0 for point in of_cameras)
    content = (tmp_path / "scaling.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 900  # px wide, as pages show it
    capsys.readouterr()


@pytest.mark.usefixtures("_quick")
def test_a_part_of_the_curves(tmp_path: Path) -> None:
    scaling.main(["--out", str(tmp_path / "scaling.json"), "--only", "tiles"])
    document = json.loads((tmp_path / "scaling.json").read_text())
    assert list(document["curves"]) == ["tiles"]
    assert document["command"] == "python benchmarks/scaling.py --only tiles"


def test_an_unknown_curve_is_refused() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'cameras'"):
        scaling.main(["--only", "camera"])


def test_bytes_that_were_planted_are_found() -> None:
    """2 ms and 10 GB/s."""
    touched = [10_000_000, 50_000_000, 200_000_000]
    curve = curve_of("tiles", points([2 + size / 10e6 for size in touched], touched))
    assert curve["fit"]["fixed_ms"] == pytest.approx(2)
    assert curve["fit"]["gb_per_s"] == pytest.approx(10)
    assert abs(curve["fit"]["largest_deviation"]) < 1e-9
    assert curve["points"][1]["explained_ms"] == pytest.approx(7)
    assert "2.00 ms of each point don't depend on its bytes, 9% of the largest" in curve["note"]
    assert "10.0 GB/s" in curve["note"]


def test_the_largest_deviation_is_named() -> None:
    touched = [10_000_000, 50_000_000, 100_000_000, 200_000_000]
    outside = [3.0, 7.0, 24.0, 22.0]
    curve = curve_of("tiles", points(outside, touched))
    assert curve["fit"]["at"] == "p2"
    assert curve["fit"]["largest_deviation"] < -0.2
    assert curve["note"].endswith("at p2")


def test_a_curve_without_growth_has_no_bandwidth() -> None:
    flat = curve_of("cameras", points([3.0, 3.1, 2.9], [5_000_000] * 3))
    assert flat["fit"]["gb_per_s"] is None
    assert flat["fit"]["fixed_ms"] == pytest.approx(3.0, rel=0.02)
    assert flat["note"].startswith("the same 3.00 ms everywhere")
    assert fitted([1e6, 2e6], [5.0, 4.0]).gb_per_s is None


def test_a_fixed_time_is_never_negative() -> None:
    fit = fitted([10e6, 20e6, 30e6], [1.0, 4.0, 7.0])
    assert fit.fixed_ms == 0
    assert fit.gb_per_s and 4 < fit.gb_per_s < 11
    assert Fit(1.0, 10.0).ms(20e6) == pytest.approx(3.0)


def test_curves_that_all_touch_the_same_are_not_explained_by_it() -> None:
    same = curve_of("cameras", points([3.0, 3.1, 2.9], [5_000_000] * 3))
    assert "every point touches the same bytes" in same["note"]
    falling = curve_of("tiles", points([3.0, 2.9], [5_000_000, 6_000_000]))
    assert "whatever is touched" in falling["note"]


def test_every_curve_has_a_row() -> None:
    touched = [10_000_000, 50_000_000]
    curves = {
        "tiles": curve_of("tiles", points([3.0, 7.0], touched)),
        "cameras": curve_of("cameras", points([3.0, 3.0], touched[:1] * 2)),
        "map size": curve_of("map size", points([-1.0, 3.0], touched)),
    }
    rows = in_markdown({"curves": curves}).splitlines()[2:]
    assert rows[0].startswith("| tiles | 2.00 | 10.0 GB/s | ")
    assert rows[1].startswith("| cameras | 3.00 | - | ")
    assert rows[2] == "| map size | - | - | - |"


def test_the_page_has_the_table_that_was_measured() -> None:
    folder = Path(scaling.__file__).parent
    document = json.loads((folder / "results/amd-epyc-2-cores/scaling.json").read_text(encoding="utf-8"))
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert in_markdown(document) in page
    of_types = [point["outside_ms"]["median"] for point in document["curves"]["defect types"]["points"]]
    assert f"64 types cost {of_types[-1] / of_types[0]:.1f} times as much as one" in page
    assert f"{document['curves']['cameras']['fit']['fixed_ms']:.1f} ms of the machine for each" in page


def test_points_at_their_encoders_own_time_are_told() -> None:
    curve = curve_of("cameras", points([-0.1, 2.0], [10, 10]))
    assert curve["fit"] is None
    assert "no longer than their encoder alone" in curve["note"]


@pytest.mark.parametrize(("touched", "ms"), [([1e6], [1.0]), ([1e6, 2e6], [1.0, 0.0]), ([1e6, 2e6], [1.0])])
def test_what_is_no_line_is_refused(touched: list[float], ms: list[float]) -> None:
    with pytest.raises(ValueError, match="two points at least"):
        fitted(touched, ms)


def test_bytes_grow_with_what_is_touched() -> None:
    small, large = Cut(1, 192, 192), Cut(1, 384, 384)
    # Boxes of 2 x 2 leave as many means as the small one has pixels.
    assert touched_bytes.preprocess_bytes(large, 96) == touched_bytes.preprocess_bytes(small, 96) + 3 * 384 * 384
    assert touched_bytes.preprocess_bytes(Cut(3, 640, 480), 96) == 3 * touched_bytes.preprocess_bytes(
        Cut(1, 640, 480), 96
    )
    assert touched_bytes.preprocess_bytes(Cut(1, 96, 96), 96) == 2 * 3 * 96 * 96
    assert touched_bytes.probability_bytes((2, 4, 36, 48), 5) == 2 * 4 * 36 * 4 * (2 * 48 + 15 * 5)
    assert map_bytes((10, 20), 0) == 200 * (4 * 6 + 2)
    assert map_bytes((10, 20), 300) - map_bytes((10, 20), 0) == 300 * 29


def test_channels_that_can_win_nowhere_are_not_counted() -> None:
    """Left half normal, right half one defect type; two more types are nowhere."""
    probs = np.zeros((4, 6, 6), np.float32)
    probs[0, :, :3], probs[1, :, 3:] = 1, 1
    probs = 0.96 * probs + 0.01
    size = (960, 960)
    rows, columns = SPEC.tables(size)
    counted = contending_pixels(probs, rows, columns)
    everything = all_channel_pixels(size, 4)
    assert 0 < counted < everything / 2
    types = reference.defect_map(probs[None], rows, columns).types[0]
    contested = (types[:, 1:] != types[:, :-1]).sum()
    assert counted >= 2 * contested  # along the border both channels must be looked at
    flat = np.full((4, 6, 6), 0.25, np.float32)
    assert contending_pixels(flat, rows, columns) == everything
    normal = np.stack([np.full((6, 6), 0.97, np.float32), *[np.full((6, 6), 0.01, np.float32)] * 3])
    assert contending_pixels(normal, rows, columns) == 0


def test_small_maps_have_all_channels() -> None:
    table = upsample(6, 24, align_corners=True, sigma=1.0)
    probs = np.zeros((3, 6, 6), np.float32)
    assert contending_pixels(probs, table, table) == 3 * 24 * 24


def test_a_bank_around_tokens(package: EnginePackage, picture: np.ndarray) -> None:
    with packages.opened(package, "fp32") as inspector:
        tokens = packages.tokens_of(inspector, picture)
        for types in (1, 20):
            bank = bank_around(tokens, types)
            assert bank.rows.shape == (types + 1, 48)
            assert np.linalg.norm(bank.rows, axis=1) == pytest.approx(1, abs=1e-5)
            inspector.set_bank(bank)
            assert np.ptp(inspector.inspect(picture).anomaly_map) > 0.1
    assert (bank_around(tokens, 3).rows == bank_around(tokens, 3).rows).all()


def test_times_are_taken_by_turns(package: EnginePackage, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SECONDS", 0.0)
    order: list[str] = []
    with Inspector(package) as inspector:
        result = dataclasses.replace(inspector.inspect(picture), ms={"preprocess": 1.0, "encode": 5.0, "total": 8.0})

    def inspect() -> object:
        order.append("inspect")
        return result

    alone, total, outside, n = scaling.timed(inspect, lambda: order.append("encode"))  # type: ignore[arg-type]
    assert order == ["encode", "inspect"] * (scaling.WARM + scaling.LEAST)
    assert (total.median, outside.median, n) == (8.0, 3.0, scaling.LEAST)
    assert 0 <= alone.low <= alone.high


def test_other_code_makes_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: EnginePackage
) -> None:
    monkeypatch.setattr(packages, "CACHE", tmp_path / "cache")
    made: list[str] = []

    def make(path: Path) -> None:
        import shutil

        made.append(path.parent.name)
        shutil.copytree(package.path, path)

    for digest in ("one", "one", "two"):
        monkeypatch.setattr(packages, "_code_digest", lambda digest=digest: digest)
        assert packages.cached("tiny.dapo", make).manifest.name == "tiny"
    assert made == ["one", "two"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["two"]
