"""What an installed wheel holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    copy = tmp_path / "source"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):  # build from the tracked files only, and leave no build folder here
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files if ".dist-info" not in name} == {"dapo_edge"}
    for needed in (
        "dapo_edge/models/configs/surface-tiny.json",
        "dapo_edge/assets/surface-tiny.yaml",
        "dapo_edge/assets/surface-tiny-surfaces-v1.safetensors",
        "dapo_edge/assets/surface-tiny-dapo.safetensors",
        "dapo_edge/assets/MODEL_CARD.md",
        "dapo_edge/bench/report.html.j2",
        "dapo_edge/data/captions.yaml",
        "dapo_edge/data/surfaces-v1.yaml",
        "dapo_edge/data/defects/visa.yaml",
        "dapo_edge/models/ensemble.yaml",
        "dapo_edge/engine/package_report.html.j2",
        "dapo_edge/evaluation/report.html.j2",
        "dapo_edge/kernels/common.cuh",
        "dapo_edge/kernels/defect_map.cu",
        "dapo_edge/kernels/patch_probabilities.cu",
        "dapo_edge/kernels/preprocess.cu",
        "dapo_edge/page.html.j2",
        "dapo_edge/py.typed",
    ):
        assert needed in files
