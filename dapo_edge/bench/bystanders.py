"""Who else used the processors while something was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from dapo_edge.bench.gauges import in_words

_IDLE, _IOWAIT, _GUEST = 3, 4, 8  # columns of /proc/stat; guests' time is counted among the users' already


class Bystanders:
    """Processor time of everybody but this process and the children that it waited for, from when it is made."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._path = root / "proc" / "stat"
        self._problem: str | None = None
        self._others_s, self._at_s = self._read()

    def summary(self) -> dict[str, Any]:
        """`{"share"}` of all processors that others took since then, in [0, 1]; or `{"unavailable": why}`.

        Counts time that a hypervisor gave to other guests, where it tells. In a container this is the whole machine.
        """
        others_s, at_s = self._read()
        if self._problem:
            return {"unavailable": self._problem}
        available_s = (at_s - self._at_s) * (os.cpu_count() or 1)
        share = (others_s - self._others_s) / available_s if available_s > 0 else 0.0
        return {"share": min(1.0, max(0.0, share))}

    def _read(self) -> tuple[float, float]:
        """Seconds of others so far, and when."""
        try:
            jiffies = [int(word) for word in self._path.read_text().split("\n", 1)[0].split()[1:]]
            busy = sum(jiffies[:_GUEST]) - jiffies[_IDLE] - jiffies[_IOWAIT]
        except (OSError, ValueError, IndexError) as error:
            self._problem = in_words(error)
            return 0.0, time.monotonic()
        own = os.times()
        own_s = own.user + own.system + own.children_user + own.children_system
        return busy / os.sysconf("SC_CLK_TCK") - own_s, time.monotonic()
