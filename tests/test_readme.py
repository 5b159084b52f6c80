"""What the README says is true: links, snippet, recipe, commands, and the measured figures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dapo_edge.config import parse_recipe
from dapo_edge.package import EnginePackage

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "engines/README.md",
    "calibration/README.md",
    "benchmarks/README.md",
    "docs/line.md",
    "docs/bench.md",
]


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)[0]


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_python_snippet_runs(package: EnginePackage, capsys: pytest.CaptureFixture[str]) -> None:
    code = block("python")
    assert "engines/surface-tiny.dapo" in code
    exec(code.replace("engines/surface-tiny.dapo", str(package.path)), {})
    assert "(96, 96)" in capsys.readouterr().out


def test_the_recipe_is_valid() -> None:
    recipe = parse_recipe(yaml.safe_load(block("yaml")))
    assert recipe.prompts.defects[2].phrase == "dried glue strip"


def test_commands_and_options_exist() -> None:
    from dapo_edge.cli import commands

    for command, rest in re.findall(r"^    dapo-edge (\w+)([^#\n]*)", README, re.MULTILINE):
        options = {option for parameter in commands.commands[command].params for option in parameter.opts}
        for option in re.findall(r"--[\w-]+", rest):
            assert option in options, f"{command} {option}"


def test_figures_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/spine.json").read_text())
    vit, start = measured["vit_b16_224_1080p"], measured["start_up"]

    def three(parity: dict[str, float]) -> str:
        cosine = np.floor(parity["token_cosine_min"] * 1e7) / 1e7
        return f"| {cosine:.7f}, {parity['map_difference_max']:.1e}, 100 % |".replace("e-0", "e-")

    for text in (
        f"| {vit['ours_ms']['total']['p50']:.1f} ms |",
        f"| {vit['eager_ms']['p50']:.1f} ms, so {vit['times_faster']['median']:.2f} times slower |",
        f"| {100 * vit['share_outside_encoder']:.1f} % |",
        f"| {measured['belt']['fp32']['fps']:.0f} / {measured['belt']['fp16']['fps']:.0f} frames/s |",
        *(three(measured["parity"][name]) for name in ("ViT-B-16", "ViT-L-14-336-quickgelu at 518 px")),
        f"| {measured['memory']['growth_mb']:.1f} MB |",
        f"| {start['import_ms']:.0f} / {start['help_ms']:.0f} / {start['first_result_ms']:.0f} ms |",
        f"; {measured['date'][:10]};",
        measured["device"]["line"].partition(", Linux")[0],
    ):
        assert text in README, text


def test_the_figures_of_each_precision_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/int8.json").read_text())["vit_b16_224"]
    for stage in ("encode", "total"):
        medians = (measured["precisions"][name]["ms"][stage]["p50"] for name in ("fp32", "fp16", "int8"))
        assert f"| {' / '.join(f'{ms:.1f}' for ms in medians)} ms |" in README


def test_the_promises_hold_where_they_were_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/spine.json").read_text())
    vit, start = measured["vit_b16_224_1080p"], measured["start_up"]
    assert vit["times_faster"]["min"] >= 2
    assert vit["regions_per_frame"] >= 1
    assert f"{vit['defect_types']}-type map and regions out" in README
    assert vit["share_outside_encoder"] <= 0.10
    assert measured["memory"]["growth_mb"] <= 20
    assert all(belt["fps"] >= 60 for belt in measured["belt"].values())
    assert start["import_ms"] <= 150
    assert start["help_ms"] <= 500
    assert start["first_result_without_cache_ms"] <= 2000
    for parity in measured["parity"].values():
        assert parity["token_cosine_min"] >= 0.99999
        assert parity["map_difference_max"] <= 1e-3
        assert parity["type_agreement_min"] >= 0.999


def test_streaming_metrics_are_as_fast_and_as_right_as_promised() -> None:
    measured = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/metrics.json").read_text())
    ours, usual, memory = measured["streaming"], measured["usual"], measured["peak_memory_mb"]
    assert measured["maps"] == {"count": 500, "side_px": 518}
    assert measured["ratio"] >= 50
    assert abs(memory["2000"] - memory["200"]) <= 20
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1_max"):
        assert ours["metrics"][name] == pytest.approx(usual["metrics"][name], abs=1e-4)
    # 200 even thresholds are a coarse integral.
    assert ours["metrics"]["aupro"] == pytest.approx(usual["metrics"]["aupro"], abs=0.01)
    assert f"| {ours['seconds']:.1f} s |" in README
    assert f"| {usual['seconds']:.0f} s, {measured['ratio']:.0f} times as long |" in README


def test_the_table_is_that_of_the_results() -> None:
    from dapo_edge.evaluation.comparison import VARIANTS, claims, markdown

    results = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/surfaces-v1.json").read_text())["results"]
    page = (ROOT / "benchmarks/README.md").read_text()
    assert set(results) == set(VARIANTS)
    assert all(set(runs) == {"0", "1", "2"} for runs in results.values())
    assert markdown(results) in page
    for claim in claims(results).values():
        assert (
            f"| {claim['dapo']:.1f} | {claim['its']:.1f} ({claim['best_baseline']}) | {claim['margin']:+.1f} |" in page
        )

    def mean(test: str, metric: str) -> float:
        return float(np.mean([run[test][metric] for run in results["dapo"].values()]))

    assert mean("b", "pixel_auroc") >= 0.95
    assert mean("b", "aupro") >= 0.85
    assert mean("b", "image_auroc") >= 0.95
    assert mean("c", "pixel_auroc") >= 0.90
    assert mean("c", "type_accuracy") >= 2 / 6


def test_the_run_config_of_the_line_is_valid(package: EnginePackage, tmp_path: Path) -> None:
    from dapo_edge.runtime.run_config import Overrides, load_run_config

    text = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/line.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    (tmp_path / "line.yaml").write_text(text.replace("engines/surface-tiny.dapo", str(package.path)), encoding="utf-8")
    config = load_run_config(tmp_path / "line.yaml", Overrides(), {})
    assert [camera.name for camera in config.cameras] == ["belt", "side", "camera3"]


def test_the_lines_figures_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/line.json").read_text())
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    tiny, vit = (measured["throughput"][name] for name in ("surface-tiny, batch 1", "ViT-B/16 at 224 px, batch 1"))
    assert f"the encoder alone | {vit['line_to_encoder']['median']:.2f} |" in README
    loop = f"{tiny['line_fps']:.0f} against {tiny['one_by_one_fps']:.0f}"
    assert f"| {tiny['line_to_encoder']['median']:.2f}; {loop} |" in README
    load = measured["load"]
    assert f"| {load['waiting_ms']['p99']:.0f} ms, {load['p99_in_intervals']:.1f} of their interval |" in README
    assert f"demo model | {measured['tiles']['ms']['total']:.0f} ms |" in README
    for row in (tiny, vit):
        assert (
            f"| {row['line_to_encoder']['median']:.2f} | {row['one_by_one_fps']:.{0 if row is tiny else 1}f} |" in page
        )


def test_the_peers_figures_are_those_that_were_measured() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peer_results import table

    measured = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/peers.json").read_text())
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert table(measured).strip() in page
    b16, large = (
        {claim["over"]: claim["times_faster"]["median"] for claim in measured["configurations"][name]["claims"]}
        for name in ("b16-224", "l14-518")
    )
    assert f"| {b16['eager-fp32']:.1f} / {b16['ort-int8']:.1f} / {b16['best']:.1f} times |" in README
    assert f"| {large['eager-fp32']:.1f} times |" in README
    assert b16["eager-fp32"] >= 4
    assert b16["ort-int8"] >= 1.4
    assert b16["best"] >= 1.2
    assert large["eager-fp32"] >= 4


def test_the_shares_outside_the_encoder_are_those_that_were_measured() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from outside import in_markdown

    measured = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/outside.json").read_text())
    assert in_markdown(measured) in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    int8, fp32, large_map, _, *vit_l = (found["share_outside_encoder"] for found in measured["shares"].values())
    assert int8 <= 0.12
    assert fp32 <= 0.06
    assert large_map <= 0.25
    assert len(vit_l) == 2
    assert max(vit_l) <= 0.03


def test_the_guard_did_its_duty_where_it_was_tested() -> None:
    measured = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/guard.json").read_text())
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    tested = measured["self_test"]
    assert tested["planted"] == 0.1
    assert tested["caught"] == list(measured["metrics"])
    assert (tested["missed"], tested["clean_runs"], tested["clean_runs_flagged"]) == ([], 10, 0)
    for name, metric in measured["metrics"].items():
        spread = f"{100 * metric['spread_between_reruns']:.1f} %"
        assert f"| {name} | {metric['ratio']:.3f} | {spread} | {100 * metric['band']:.0f} % |" in page
