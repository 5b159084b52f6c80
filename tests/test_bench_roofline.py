"""benchmarks/roofline.py: what is counted, which limits follow, and that predictions are marked as such."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dapo_edge.config import Recipe, parse_recipe
from dapo_edge.engine.export import export_encoder
from dapo_edge.errors import BackendError, RecipeError
from dapo_edge.models.method import method_of
from dapo_edge.package import EnginePackage

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import ceilings
import roofline
from graph_work import Limit, Products, Work, count, limit_of
from roofline import RATINGS, against, by_turns, in_markdown, predicted, read_ratings

# Of the notes on edge devices, section 2.4: lower limits in ms, from GMAC and the share of attention in 2.3.
COLUMNS = {"B/16 at 224": (17.58, 0.04, 86), "B/16 at 512": (107, 0.18, 86.5), "L/14 at 336": (191.11, 0.09, 303.5)}
FP16 = {
    "Orin Nano 8 GB, 15 W": (3.5, 21.4, 38.2),
    "Orin Nano Super, 25 W": (2.1, 12.6, 22.5),
    "Orin NX 16 GB, 25 W": (2.3, 14.3, 25.5),
    "AGX Orin 64 GB, MAXN": (0.84, 5.0, 8.9),
    "AGX Orin 64 GB, 30 W": (3.4, 20.8, 37.1),
    "Thor T5000, 130 W": (0.63, 0.83, 2.2),
    "L4, 72 W": (0.57, 1.8, 3.2),
    "RTX 4090, 450 W": (0.21, 1.3, 2.3),
    "H200, 700 W": (0.04, 0.22, 0.39),
}
INT8 = {
    "Orin Nano Super, 25 W": (1.1, 7.6, 12.5),
    "Orin NX 16 GB, 25 W": (1.2, 8.4, 13.8),
    "AGX Orin 64 GB, MAXN": (0.43, 3.0, 4.9),
    "Thor T5000, 130 W": (0.31, 0.49, 1.1),
    "L4, 72 W": (0.29, 1.0, 1.7),
    "RTX 4090, 450 W": (0.09, 0.50, 0.73),
    "H200, 700 W": (0.02, 0.13, 0.21),
}


def plain_vit(gmac: float, attention: float, weights: float) -> Work:
    """As the notes count: everything but attention is a Linear."""
    return Work(
        Products(round(gmac * 1e9 * (1 - attention)), round(weights * 1e6)),
        Products(round(gmac * 1e9 * attention)),
        Products(),
    )


def vit_macs(size: int, patch: int, width: int, depth: int, mlp: int, extra: int, dimensions: int, taps: int) -> Work:
    """By the formula, for a ViT with `extra` tokens per block besides the patches."""
    patches = (size // patch) ** 2
    tokens = patches + extra
    block = 4 * width * width + 2 * width * mlp
    rest = patches * width * 3 * patch * patch + taps * patches * width * dimensions + width * dimensions
    return Work(Products(depth * tokens * block), Products(depth * 2 * tokens * tokens * width), Products(rest))


def test_the_graph_has_the_operations_of_the_formula(package: EnginePackage) -> None:
    work = count(package.encoder_bytes())
    formula = vit_macs(size=96, patch=16, width=64, depth=5, mlp=256, extra=1 + 4, dimensions=48, taps=3)
    for kind in ("linears", "attention", "rest"):
        assert getattr(work, kind).macs == getattr(formula, kind).macs, kind
    assert work.linears.weights == 5 * (4 * 64 * 64 + 2 * 64 * 256)
    assert work.attention.weights == 0
    assert work.rest.weights == 64 * 3 * 16 * 16 + 3 * 64 * 48 + 64 * 48
    assert work.flops == 2 * work.total.macs


def test_activations_are_read_and_written_once(package: EnginePackage) -> None:
    work, tokens = count(package.encoder_bytes()), 36 + 5
    assert work.linears.read == 5 * tokens * (64 + 64 + 64 + 256)
    assert work.linears.written == 5 * tokens * (192 + 64 + 256 + 64)
    heads = 4
    assert work.attention.read == 5 * (2 * tokens * 64 + heads * tokens**2 + tokens * 64)
    assert work.attention.written == 5 * (heads * tokens**2 + tokens * 64)


def test_bytes_follow_the_precision() -> None:
    work = Work(Products(1, 100, 10, 20), Products(1, 0, 5, 6), Products(1, 30, 2, 3))
    assert [work.weight_bytes(name) for name in ("fp32", "fp16", "int8")] == [520, 260, 100 + 60]
    assert work.weight_bytes("int8", "fp32") == 100 + 120
    assert work.activation_bytes("fp32") == 4 * (10 + 20 + 5 + 6 + 2 + 3)
    assert work.activation_bytes("int8") == 10 + 2 * (20 + 5 + 6 + 2 + 3)


def test_published_counts_of_clips_encoders() -> None:
    """timm's 17.58, 191.11 and 507.15 GMAC, by the formula that the graph is held against above."""
    b16 = vit_macs(224, 16, 768, 12, 3072, 1, 512, 0)
    l336, l518 = (vit_macs(size, 14, 1024, 24, 4096, 1, 768, 0) for size in (336, 518))
    for work, gmac in ((b16, 17.58), (l336, 191.11), (l518, 507.15)):
        assert work.total.macs / 1e9 == pytest.approx(gmac, rel=0.01)
    assert b16.total.macs / 1e9 == pytest.approx(17.6, rel=0.01)


@pytest.mark.slow
def test_the_graph_of_vit_b16_has_the_published_count(tmp_path: Path) -> None:
    """A ViT-B/16 without deep tokens; the adapters of its four feature layers are not in the published count."""
    fields = {"name": "b16", "backbone": {"model": "ViT-B-16"}, "options": {"visual_tokens": 0}}
    recipe: Recipe = parse_recipe({**fields, "prompts": {"defects": ["scratch"]}})
    export_encoder(method_of(recipe), tmp_path / "encoder.onnx")
    work = count((tmp_path / "encoder.onnx").read_bytes())
    adapters = 4 * 196 * 768 * 512
    assert (work.total.macs - adapters) / 1e9 == pytest.approx(17.6, rel=0.01)
    assert work.total.weights == pytest.approx(86e6, rel=0.03)


@pytest.mark.parametrize(("precision", "table"), [("fp16", FP16), ("int8", INT8)])
def test_predictions_agree_with_the_table_of_the_notes(precision: str, table: dict[str, tuple[float, ...]]) -> None:
    ratings = read_ratings(RATINGS)
    found = {
        (row["device"], name): row["limit_ms"]
        for name, column in COLUMNS.items()
        for row in predicted(name, plain_vit(*column), ratings)
        if row["precision"] == precision
    }
    for device, expected in table.items():
        for name, ms in zip(COLUMNS, expected, strict=True):
            last_digit = 10.0 ** -(len(str(ms).partition(".")[2]))
            assert found[device, name] == pytest.approx(ms, abs=0.51 * last_digit + 0.015 * ms), (device, name)


def test_every_prediction_says_that_it_is_one() -> None:
    rows = predicted("B/16", plain_vit(17.58, 0.04, 86), read_ratings(RATINGS))
    assert len(rows) == 2 * len(FP16)
    assert {row["kind"] for row in rows} == {"prediction"}
    by_key = {(row["device"], row["precision"]): row for row in rows}
    nano = by_key["Orin Nano Super, 25 W", "fp16"]
    assert nano["expected_ms"] == pytest.approx([nano["limit_ms"] / 0.36, nano["limit_ms"] / 0.33])
    assert nano["expected_ms"][0] < 6.2 < nano["expected_ms"][1]  # what was published: 161 FPS
    assert nano["expected_as_on"] == "Orin Nano"
    assert by_key["H200, 700 W", "int8"]["expected_ms"] is None
    assert by_key["AGX Orin 64 GB, MAXN", "fp16"]["binds"] == "bandwidth"


def test_the_longer_of_both_limits_binds() -> None:
    work = plain_vit(1, 0.1, 10)
    slow_memory = limit_of(work, "fp16", {"fp16": 1.0}, gb_per_s=1.0)
    assert (slow_memory.binds, slow_memory.ms) == ("bandwidth", pytest.approx(20.0))
    fast_memory = limit_of(work, "fp16", {"fp16": 1.0}, gb_per_s=1000.0)
    assert (fast_memory.binds, fast_memory.ms) == ("compute", pytest.approx(2.0))
    int8 = limit_of(work, "int8", {"fp16": 1.0, "int8": 2.0}, gb_per_s=1000.0)
    assert int8.compute_ms == pytest.approx(1e3 * (2 * 0.9e9 / 2e12 + 2 * 0.1e9 / 1e12))


@pytest.mark.parametrize(("peaks", "gb_per_s"), [({}, 1.0), ({"int8": 1.0}, 1.0), ({"int8": 1.0, "fp16": 1.0}, 0.0)])
def test_a_limit_without_a_rating_is_refused(peaks: dict[str, float], gb_per_s: float) -> None:
    with pytest.raises(RecipeError, match="a limit in int8 needs a bandwidth and the peak in"):
        limit_of(plain_vit(1, 0.1, 10), "int8", peaks, gb_per_s)


def test_measured_times_are_shares_of_the_limit() -> None:
    entry = against(Limit(compute_ms=8.0, weights_ms=2.0), [10.0, 16.0, 40.0])
    assert (entry["kind"], entry["n"], entry["median_ms"]) == ("measured", 3, 16.0)
    assert (entry["share_of_limit"], entry["share_of_bandwidth"], entry["binds"]) == (0.5, 0.125, "compute")


def test_calls_go_by_turns() -> None:
    order: list[str] = []
    times = by_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order[:6] == ["a", "b"] * 3
    assert len(times["a"]) == len(times["b"]) == roofline.MOST_ROUNDS


def test_a_configuration_is_described_and_tabled(package: EnginePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "MOST_ROUNDS", 3)
    monkeypatch.setattr(roofline, "LEAST_ROUNDS", 3)
    encoder = package.encoder_bytes()
    configuration = roofline.Configuration("tiny", count(encoder), {"fp32": encoder})
    entry = roofline.described(configuration, {"fp32": 0.4}, 40.0)
    assert entry["weight_mb"]["fp32"] == 4 * entry["weights"] / 1e6
    assert entry["measured"]["fp32"]["n"] == 3
    assert entry["measured"]["fp32"]["limit_ms"] == pytest.approx(
        max(entry["gflop"] / 0.4, entry["weight_mb"]["fp32"] / 40.0)
    )
    rows = predicted("tiny", configuration.work, read_ratings(RATINGS))
    page = in_markdown({"configurations": {"tiny": entry}, "predictions": rows})
    assert "Predictions, not measured" in page
    assert "| H200, 700 W | int8 |" in page
    assert json.loads(json.dumps(entry)) == entry


def test_the_page_has_the_tables_that_were_measured() -> None:
    folder = Path(roofline.__file__).parent
    document = json.loads((folder / "results/amd-epyc-2-cores/roofline.json").read_text(encoding="utf-8"))
    assert in_markdown(document) in (folder / "README.md").read_text(encoding="utf-8")


def test_another_file_is_not_counted() -> None:
    with pytest.raises(BackendError, match="not an ONNX file"):
        count(b"no encoder")


def test_damaged_ratings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ratings.yaml"
    text = RATINGS.read_text(encoding="utf-8")
    path.write_text(text.replace("efficiency: orin", "efficiency: orion", 1))
    with pytest.raises(RecipeError, match="no efficiency is called orion"):
        read_ratings(path)
    path.write_text(text.replace("gb_per_s: 68", "gb_per_s: fast", 1))
    with pytest.raises(RecipeError, match="gb_per_s"):
        read_ratings(path)
    with pytest.raises(RecipeError, match="can't be read"):
        read_ratings(tmp_path / "nothing.yaml")


def test_every_rating_names_its_source() -> None:
    ratings = read_ratings(RATINGS)
    assert len(ratings.devices) == 9
    assert all(len(device.source) >= len("from memory") for device in ratings.devices)
    assert all(0 < low <= high <= 1 for known in ratings.efficiency.values() for low, high in known.shares.values())


def test_ceilings_of_a_small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "TRIES", 2)
    found = ceilings.peaks(side=128)
    assert {"fp32", "int8"} <= set(found)
    assert [peak.by for peak in found["fp32"]] == ["torch", "numpy", "openvino"]
    assert all(peak.tera_per_s > 0 for several in found.values() for peak in several)
    (by_openvino,) = (peak for peak in found["int8"] if peak.by == "openvino")
    assert by_openvino.runs_as and by_openvino.runs_as.endswith("8")
    assert ceilings.copy_gb_per_s(1 << 20, threads=2) > 0


def test_products_of_a_gpu_are_products() -> None:
    """On the CPU, which computes them too: right operands in the right layout."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=draw) for _ in range(2))
    exact = (a @ b).numpy()
    products = ceilings.gpu_products(a, b)
    assert list(products) == ["fp16", "bf16", "tf32", "int8", "fp8"]
    for name, made in products.items():
        scale = 40 * 40 if name == "int8" else 1
        got = made()().float().numpy() / scale  # type: ignore[attr-defined]
        assert np.corrcoef(got.ravel(), exact.ravel())[0, 1] > 0.99, name
    torch.set_float32_matmul_precision("highest")


def test_without_a_gpu_there_are_no_figures() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert ceilings.gpu_ceilings() == "not measured yet: no GPU"
