"""A contender's process, seen from outside: start it, ask it, see that it sleeps, end it."""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

from peer_spec import Spec
from typing_extensions import Self

from dapo_edge.errors import BackendError

WORKER = Path(__file__).with_name("peer_worker.py")
LOAD_S, ANSWER_S, END_S = 3600.0, 1800.0, 20.0  # torch.compile and exports take minutes


class Process:
    """A context manager. `about` is what the contender said when it was ready."""

    def __init__(self, python: str, spec: Spec, log: Path, load_s: float = LOAD_S) -> None:
        """Start and wait until it is loaded. Raises `BackendError` with its reason when it can't be."""
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [python, str(WORKER), spec.to_text()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.about = self._reply(load_s)
        except BaseException:
            self.close()
            raise

    def ask(self, answer_s: float = ANSWER_S, **request: Any) -> dict[str, Any]:
        """Its reply. Raises `BackendError` when it fails, dies or does not answer in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._died() from error
        return self._reply(answer_s)

    @property
    def cpu_s(self) -> float:
        """Processor time that it has taken so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it, gently first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(END_S)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _reply(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        # One line per request: nothing can wait in the buffer that select does not see.
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            self._process.kill()
            raise BackendError(f"it gave no answer within {seconds:g} s", f"Look at {self._log}")
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # nothing, or what it could still say
            raise self._died()
        reply = json.loads(line)
        if "error" in reply:
            raise BackendError(reply["error"], f"Look at {self._log}")
        return reply

    def _died(self) -> BackendError:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        try:
            status: object = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            status = "unknown"
        last = lines[-1][:300] if lines else "it said nothing"
        return BackendError(f"its process ended (status {status}): {last}", f"Look at {self._log}")


def available_mb() -> float:
    """Memory that new processes can have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise BackendError("this kernel does not tell the available memory", "Use Linux 3.14 or newer")
