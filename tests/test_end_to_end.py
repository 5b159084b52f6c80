"""The demo as `make demo` runs it, shorter; its video can be inspected again."""

from __future__ import annotations

import json
from pathlib import Path

from test_cli import dapo_edge


def test_demo_leaves_package_video_sheet_and_results(tmp_path: Path) -> None:
    demo = dapo_edge("demo", "--engines", tmp_path, "--frames", 12, "--json")
    assert demo.returncode == 0, demo.stderr
    result = json.loads(demo.stdout)
    assert result["summary"]["inspected"] == 12
    assert sum(sum(counts.values()) for counts in result["confusion"]["verdicts"].values()) == 12
    assert sorted(Path(path).name for path in result["files"]) == ["belt.mp4", "contact-sheet.png", "results.jsonl"]
    results = (tmp_path / "surface-tiny-demo" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in results] == list(range(12))

    video = dapo_edge("run", tmp_path / "surface-tiny.dapo", tmp_path / "surface-tiny-demo" / "belt.mp4", "--json")
    assert video.returncode == 0, video.stderr
    assert json.loads(video.stdout.splitlines()[-1])["summary"]["inspected"] == 12
