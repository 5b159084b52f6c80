"""Who else used the processors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapo_edge.bench.bystanders import Bystanders

LINE = "cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 2 3 4\n"


def machine(root: Path, **jiffies: int) -> Path:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "stat").write_text(LINE.format(**jiffies))
    return root


def test_a_share_of_all_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dapo_edge.bench.bystanders.time.monotonic", lambda: now[0])

    def times() -> os.times_result:
        """All of ours together are busy on one processor; what a child took counts once it was waited for."""
        return os.times_result([(now[0] - 99) / 4] * 4 + [0.0])

    monkeypatch.setattr("dapo_edge.bench.bystanders.os.times", times)
    monkeypatch.setattr("dapo_edge.bench.bystanders.os.cpu_count", lambda: 4)
    monkeypatch.setattr("dapo_edge.bench.bystanders.os.sysconf", lambda name: 100)
    others = Bystanders(machine(tmp_path, user=1000, idle=5000, steal=10))
    now[0] += 10
    machine(tmp_path, user=1000 + 10 * 100 + 600, idle=9000, steal=10 + 200)  # 10 s ours, 6 s theirs, 2 s stolen
    assert others.summary() == {"share": pytest.approx(8 / 40)}


def test_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    assert "unavailable" in Bystanders(tmp_path).summary()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "stat").write_text("")
    assert "unavailable" in Bystanders(tmp_path).summary()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat on this system")
def test_a_busy_neighbour_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        time.sleep(0.3)
        others = Bystanders()
        time.sleep(1)
        found = others.summary()
        neighbour.kill()
    assert found["share"] > 0.1
