"""What benchmarks/peers.py says of its rounds: bounds, ratios, claims, file and table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_edge.errors import BackendError, RecipeError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import peers
from peer_results import Difference, bound_of, claims, difference, merged, strongest, table, times, times_faster

DEVICE = {"line": "One CPU, 2 cores"}


def test_differences_are_shares_of_what_the_maps_span() -> None:
    expected = {"anomaly": np.full((2, 4, 4), 0.4), "types": np.zeros((2, 4, 4), np.uint8)}
    expected["anomaly"][1, 1, 1] = 0.9
    found = {name: values.copy() for name, values in expected.items()}
    found["anomaly"][0, 0, 0], found["types"][0, 0, 0] = 0.56, 3
    apart = difference(found, expected)
    assert (apart.max_difference, apart.mean_difference, apart.span) == pytest.approx((0.32, 0.01, 0.5))
    assert apart.type_agreement == 31 / 32
    assert difference(found, expected, span=1.0).max_difference == pytest.approx(0.16)
    inside = difference(found, expected, border=1)
    assert (inside.max_difference, inside.mean_difference, inside.type_agreement) == (0, 0, 1)
    assert difference({"anomaly": found["anomaly"]}, expected).type_agreement is None
    with pytest.raises(BackendError, match="can't be compared"):
        difference({"anomaly": np.zeros((1, 4, 4))}, expected)
    with pytest.raises(BackendError, match="flat maps agree with anything"):
        difference(found, {"anomaly": np.zeros((2, 4, 4))})


def test_bounds_are_of_a_precision() -> None:
    assert bound_of("int8+bf16") == bound_of("int8") != bound_of("fp32")
    assert bound_of("bf16") == bound_of("fp16")
    with pytest.raises(BackendError, match="runs as fp4, for which there is no bound"):
        bound_of("fp4")
    bound = bound_of("fp32")
    assert Difference(bound.max_difference, bound.mean_difference, bound.type_agreement, 1).within(bound)
    assert Difference(0, 0, None, 1).within(bound)
    assert not Difference(float("nan"), 0, 1, 1).within(bound)
    assert not Difference(0, 0.1, 1, 1).within(bound)
    assert not Difference(0, 0, 0.5, 1).within(bound)


ROUNDS: list[dict[str, dict[str, list[float]]]] = [
    {"eager-fp32": {"raw": [40, 42, 99]}, "ours-int8": {"raw": [10, 10, 11]}},
    {"eager-fp32": {"raw": [80, 84, 90]}, "ours-int8": {"raw": [20, 20, 20]}, "ort-fp32": {"raw": [30, 30, 30]}},
    {"eager-fp32": {"raw": [60, 60, 60]}, "ours-int8": {"raw": [10, 10, 10]}},
]


def test_ratios_are_of_one_round() -> None:
    faster = times_faster(ROUNDS, "ours-int8", "eager-fp32", "raw")
    assert faster == {"median": 4.2, "min": 4.2, "max": 6}
    assert times_faster(ROUNDS, "ours-int8", "ort-fp32", "raw") == {"median": 1.5, "min": 1.5, "max": 1.5}
    assert times_faster(ROUNDS, "ours-int8", "openvino", "raw") is None
    taken = times(ROUNDS, "eager-fp32", "raw")
    assert taken is not None
    assert (taken["n"], taken["rounds"], taken["median"]) == (9, 3, 60)
    assert (taken["lowest_round"], taken["highest_round"]) == (42, 84)
    assert taken["p95"] == pytest.approx(np.percentile([40, 42, 99, 80, 84, 90, 60, 60, 60], 95))
    assert times(ROUNDS, "openvino", "raw") is None


def rows_with(**medians: float | None) -> dict[str, dict[str, Any]]:
    """Rows by name (with _ for -) whose frames take so many ms where ours take 10; None: wrong."""
    rows = {}
    for name, ms in medians.items():
        ratio = {"median": (ms or 0) / 10, "min": 1.0, "max": 9.0}
        taken = {"median": ms, "p95": ms, "lowest_round": ms, "highest_round": ms, "n": 3, "rounds": 1}
        apart = {"max_difference": 0.5, "mean_difference": 0.1, "type_agreement": 0.7}
        timed = {"ms": {"raw": taken, "jpeg": taken}, "ours_times_faster": {"raw": ratio, "jpeg": ratio}}
        row = {"status": "wrong"} if ms is None else {"status": "timed", **timed}
        rows[name.replace("_", "-")] = {**row, "runs_as": "fp32", "difference": apart}
    return rows


ALL = {
    "eager_fp32": 45.0,
    "eager_bf16": None,
    "compile_fp32": 44.0,
    "compile_bf16": 20.0,
    "ort_fp32": 30.0,
    "ort_int8_qdq": 30.0,
    "ort_int8_dynamic": 13.0,
    "openvino": 14.0,
    "anomalib_winclip": 5.0,
    "ours_fp32": 12.0,
    "ours_int8": 10.0,
    "cuda_eager": 1.0,
}
ASKED = {"eager-fp32": 4.0, "ort-int8": 1.4, "best": 1.2}


def test_claims_are_against_the_best_that_computes_the_same() -> None:
    found = {claim["over"]: claim for claim in claims(rows_with(**ALL), ASKED)}
    assert [found[over]["contender"] for over in ASKED] == ["eager-fp32", "ort-int8-dynamic", "ort-int8-dynamic"]
    assert [found[over]["holds"] for over in ASKED] == [True, False, True]
    assert found["ort-int8"]["times_faster"]["median"] == 1.3
    unasked = claims(rows_with(**ALL), {})
    assert [claim["holds"] for claim in unasked] == [None] * 3
    assert strongest(rows_with(eager_fp32=None), ["eager-fp32"]) is None
    assert [claim["holds"] for claim in claims({}, ASKED)] == [None] * 3


def test_who_was_not_timed_might_have_been_the_best() -> None:
    rows = rows_with(**{**ALL, "ort_int8_dynamic": 16.0})
    assert [claim["holds"] for claim in claims(rows, ASKED)] == [True, True, True]
    del rows["ort-int8-dynamic"]
    rows["compile-fp32"] = {"status": "missing", "reason": "no compiler"}
    found = {claim["over"]: claim for claim in claims(rows, ASKED)}
    assert found["eager-fp32"]["not_timed"] == []
    assert found["ort-int8"]["not_timed"] == ["ort-int8-dynamic"]
    assert found["best"]["not_timed"] == ["compile-fp32", "ort-int8-dynamic"]
    assert [found[over]["holds"] for over in ASKED] == [True, None, None]
    too_slow = claims(rows, {**ASKED, "ort-int8": 3.1})
    assert too_slow[1]["holds"] is False, "another one could only be worse for us"
    lines = table({"configurations": {"b16-224": {**configuration_of(rows), "claims": list(found.values())}}})
    assert "over ONNX Runtime INT8, our Q/DQ encoder: 3.00x (asked: 1.4x). Not timed: ONNX Runtime INT8, qu" in lines
    assert "over the best peer that was timed, OpenVINO, compile_model: 1.40x" in lines
    assert "Not timed: torch.compile FP32; ONNX Runtime INT8, quantize_dynamic." in lines


def configuration_of(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"date": "2026-11-21T00:00:00", "defect_types": 18, "contenders": rows, "claims": claims(rows, ASKED)}


def test_the_table_shows_everyone() -> None:
    rows = rows_with(**ALL)
    rows["cuda-graph"] = {"status": "not measured yet: no GPU"}
    rows["anomalib-winclip"] = {"status": "missing", "reason": "no module | named anomalib"}
    lines = table({"configurations": {"b16-224": configuration_of(rows)}}).splitlines()
    assert lines[0] == "**ViT-B/16 at 224 px**, 18 defect types, 2026-11-21"
    body = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in body} == {10}, "every row has all cells"
    assert len(body) == 2 + len(rows)
    assert "| torch eager FP32 | fp32 | 45.0 | 45.0 | 45.0 to 45.0 | 45.0 | 4.50x (1.00 to 9.00) |" in lines[4]
    assert any("torch eager BF16 | fp32 | wrong | -" in line and "50.00 %, 10.000 % | 70.0 %" in line for line in body)
    assert any("CUDA graph | - | not measured yet: no GPU |" in line for line in body)
    assert any("missing: no module / named anomalib" in line for line in body)
    assert "- dapo-edge INT8 over torch eager FP32: 4.50x (asked: 4x). Holds." in lines
    assert any("ONNX Runtime, ONNX" in line and "**Does not hold.**" in line for line in lines)


def test_the_file_keeps_other_configurations_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    path.write_text(json.dumps(merged(path, DEVICE, {"reference": {"one": 1}})))
    found = merged(path, DEVICE, {"b16-224": {"two": 2}})
    assert list(found["configurations"]) == ["b16-224", "reference"]
    assert merged(path, DEVICE, {"reference": {}})["configurations"] == {"reference": {}}
    for text in (path.read_text().replace("One CPU", "Another"), "[]", '{"schem', '{"schema": "dapo-edge peers 1"}'):
        path.write_text(text)
        with pytest.raises(RecipeError, match="another machine or format"):
            merged(path, DEVICE, {})


def test_another_machine_s_file_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "peers.json"
    path.write_text("{}")
    monkeypatch.setattr(peers, "measured", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(RecipeError, match="another machine or format"):
        peers.main(["--out", str(path)])
    assert path.read_text() == "{}"


def test_each_configuration_is_written_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(name: str, folders: tuple[Path, ...], options: peers.Options) -> dict[str, Any]:
        if name == "reference":
            raise KeyboardInterrupt
        assert options.command(name) == "python benchmarks/peers.py --configs b16-224 --rounds 7 --budget-s 2"
        return configuration_of(rows_with(**ALL))

    path = tmp_path / "new" / "peers.json"
    monkeypatch.setattr(peers, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        peers.main(["--configs", "b16-224,reference", "--out", str(path)])
    assert list(json.loads(path.read_text())["configurations"]) == ["b16-224"]
    peers.main(["--configs", "b16-224", "--out", str(path)])
    assert capsys.readouterr().out.startswith("**ViT-B/16 at 224 px**")
