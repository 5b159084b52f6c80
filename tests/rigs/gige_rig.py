"""A GigE Vision camera without hardware: Aravis' fake one, which talks GVCP and GVSP on the loopback interface."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import pytest
from rigs import sdks

from dapo_edge.errors import DependencyMissing, SourceError
from dapo_edge.runtime.sources import aravis, open_source

INSTALL = "run: apt-get install -y --no-install-recommends aravis-tools gir1.2-aravis-0.8 python3-gi"
SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")  # where Debian puts gi for its own Python
PROGRAM = "arv-fake-gv-camera-0.8"
ADDRESS = "127.0.0.1"
UDP = Path("/proc/net/udp")
CONTROL_PORT = f":{3956:04X} "  # of GigE Vision, as Linux lists it
SERIAL = "RIG01"


def need() -> None:
    """Skip the test when a part is missing."""
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"{PROGRAM} is not installed; {INSTALL}")
    sys.path.append(str(SYSTEM_PACKAGES))  # a venv of the system's Python can use the system's gi, and nothing else
    try:
        sdks.preload()
        aravis.library()
    except DependencyMissing as error:
        pytest.skip(f"{error} {INSTALL}")
    finally:
        sys.path.remove(str(SYSTEM_PACKAGES))


def uri(**features: object) -> str:
    """The address of the fake camera, with features in the order given."""
    return f"aravis://{ADDRESS}?" + "&".join(f"{key}={value}" for key, value in features.items())


class FakeCamera:
    """The camera's process. `lost_per_mille`: packets that never leave it."""

    def __init__(self, lost_per_mille: int = 0) -> None:
        self._arguments = [PROGRAM, "-i", ADDRESS, "-s", SERIAL, "-r", str(lost_per_mille)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> FakeCamera:
        """Run it until it answers."""
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._arguments, stdout=quiet, stderr=quiet)
        end_s = time.monotonic() + 5
        while CONTROL_PORT not in UDP.read_text() and time.monotonic() < end_s:
            time.sleep(0.01)
        for attempt in range(3):  # opening fails after 2.5 s where nobody answers
            try:
                open_source(uri(trigger="off")).open().close()
                break
            except SourceError:
                if attempt == 2 or self._process.poll() is not None:
                    self.kill()
                    pytest.skip(f"{PROGRAM} does not answer on {ADDRESS}: another one may hold its port")
        return self

    def kill(self) -> None:
        """Take it away without a word, as when the cable is pulled."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> FakeCamera:
        need()
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
