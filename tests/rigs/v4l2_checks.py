"""What the V4L2 source does with a real driver: run inside the guest of `v4l2_guest`, prints one line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dapo_edge.errors import FrameError, FrameTimeout, SourceError
from dapo_edge.runtime.sources import open_source

DEVICE = "v4l2:///dev/video0"
FOURCCS = ("BGR3", "RGB3", "GREY", "NV12", "RGGB", "BA81", "GBRG", "GRBG", "YUYV", "UYVY")
MARK = "RESULT "


def control(name: str, value: int) -> None:
    subprocess.run(["v4l2-ctl", "-d", "/dev/video0", "-c", f"{name}={value}"], check=True)


def value_of(name: str) -> str:
    return subprocess.check_output(["v4l2-ctl", "-d", "/dev/video0", "-C", name], text=True).strip()


def failure(uri: str, read: bool = False) -> str:
    try:
        with open_source(uri) as source:
            for _ in range(30 if read else 0):
                source.read(2.0)
    except SourceError as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


def failure_of_nobody(uri: str) -> str:
    """What a user without rights is told."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setuid(65534)
        os.write(writer, failure(uri).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    return os.read(reader, 4096).decode()


def pictures() -> dict[str, list[float]]:
    """Colour of the first bar and of the whole test picture, for every format."""
    found = {}
    for fourcc in FOURCCS:
        with open_source(f"{DEVICE}?width=640&height=360&fourcc={fourcc}") as source:
            frame = source.read(5.0)
        assert frame is not None
        assert frame.image.shape == (360, 640, 3)
        corner = frame.image[200:300, 100:140].reshape(-1, 3)
        found[fourcc] = [float(value) for value in np.median(corner, axis=0)]
    return found


def pace() -> dict[str, float]:
    with open_source(f"{DEVICE}?width=320&height=180&fps=30&fourcc=BGR3") as source:
        fps = source.properties.fps
        source.read(5.0)
        began_s, lost, ages = time.monotonic(), 0, []
        for _ in range(60):
            frame = source.read(5.0)
            assert frame is not None
            lost += frame.lost
            ages.append((time.time_ns() - frame.timestamp_ns) / 1e9)
        took_s = time.monotonic() - began_s
    return {"announced": fps or 0.0, "measured": (60 + lost) / took_s, "lost": lost, "age_s": float(np.median(ages))}


def dropped() -> dict[str, float]:
    """The driver drops half of the frames: what was lost is known by number."""
    control("percentage_of_dropped_buffers", 50)
    with open_source(f"{DEVICE}?width=320&height=180&fps=30&fourcc=GREY") as source:
        source.read(5.0)
        began_s, lost = time.monotonic(), 0
        for _ in range(30):
            frame = source.read(5.0)
            assert frame is not None
            lost += frame.lost
        took_s = time.monotonic() - began_s
    control("percentage_of_dropped_buffers", 0)
    return {"lost": lost, "of": 30 + lost, "rate": (30 + lost) / took_s}


def silent() -> float:
    control("percentage_of_dropped_buffers", 100)
    with open_source(f"{DEVICE}?width=320&height=180&fourcc=GREY") as source:
        began_s = time.monotonic()
        try:
            source.read(0.5)
        except FrameTimeout:
            took_s = time.monotonic() - began_s
        finally:
            control("percentage_of_dropped_buffers", 0)
        frame = source.read(5.0)  # the same opening goes on
        assert frame is not None
    return took_s


def bad_buffer() -> list[str]:
    with open_source(f"{DEVICE}?width=320&height=180&fourcc=GREY") as source:
        source.read(5.0)
        control("inject_v4l2_buf_flag_error", 1)
        said = []
        for _ in range(10):
            try:
                source.read(5.0)
            except FrameError as error:
                said.append(str(error))
    return said


def broken(fault: str) -> list[str]:
    """What a reader is told, and what becomes of the next opening."""
    said = "nothing"
    with open_source(f"{DEVICE}?width=320&height=180&fourcc=GREY") as source:
        source.read(5.0)
        control(fault, 1)
        try:
            for _ in range(10):
                source.read(5.0)
        except SourceError as error:
            said = f"{type(error).__name__}: {error}"
    return [said, failure(DEVICE + "?fourcc=GREY", read=True)]


def steady() -> dict[str, int]:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = descriptors()
    for _ in range(20):
        with open_source(f"{DEVICE}?width=320&height=180&fourcc=BGR3") as source:
            source.read(5.0)
    with open_source(f"{DEVICE}?width=320&height=180&fourcc=BGR3") as source:
        for _ in range(30):
            source.read(5.0)
        made = source._pool.made
    return {"descriptors": descriptors() - before, "buffers_made": made}


def refusals() -> dict[str, str]:
    Path("/dev/video0").chmod(0o600)
    with open_source(f"{DEVICE}?width=320&height=180&fourcc=BGR3") as source:
        source.read(5.0)
        busy = failure(DEVICE + "?width=640&height=360")
    return {
        "forbidden": failure_of_nobody(DEVICE),
        "busy": busy,
        "size": failure(DEVICE + "?width=333&height=222"),
        "rate": failure(DEVICE + "?fps=29"),
        "fourcc": failure(DEVICE + "?fourcc=HSV3"),
        "unknown_fourcc": failure(DEVICE + "?fourcc=ABCD"),
        "control": failure(DEVICE + "?brightnes=3"),
        "range": failure(DEVICE + "?brightness=256"),
        "set": failure(DEVICE + "?brightness=200&test_pattern=6") + f", {value_of('brightness')}",
        "set_back": failure(DEVICE + "?brightness=128&test_pattern=0") + f", {value_of('brightness')}",
    }


CHECKS: dict[str, Callable[[], Any]] = {
    "refusals": refusals,
    "pictures": pictures,
    "pace": pace,
    "dropped": dropped,
    "silent": silent,
    "bad_buffer": bad_buffer,
    "steady": steady,
    "fatal": lambda: broken("inject_fatal_streaming_error"),
    "disconnected": lambda: broken("disconnect"),  # the last one: the device does not come back
}

if __name__ == "__main__":
    results: dict[str, Any] = {}
    for name, check in CHECKS.items():
        try:
            results[name] = check()
        except Exception as error:  # told, so that one failure does not hide the other checks
            results[name] = f"{type(error).__name__}: {error}"
        print(name, results[name], file=sys.stderr, flush=True)
    print(MARK + json.dumps(results), flush=True)
