"""A V4L2 device in memory, behind the same calls as a real one: for what a real driver does rarely, or only once."""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction

from dapo_edge.runtime.sources import v4l2_api as api

PAGE = 4096


@dataclass
class Shot:
    """One filled buffer."""

    data: bytes
    sequence: int
    flags: int = 0


@dataclass
class Driver:
    """What the camera can do, and what it will deliver. `open` takes the place of `v4l2_api.Device`."""

    width: int = 32
    height: int = 24
    fourcc: str = "BGR3"
    stride: int = 96
    encoding: int = 0
    quantization: int = 0
    fps: float = 30.0
    capabilities: int = api.CAP_CAPTURE | api.CAP_STREAMING
    shots: deque[Shot] = field(default_factory=deque)
    refused: dict[int, int] = field(default_factory=dict)  # call -> errno
    path_errno: int = 0
    opened: int = 0
    control: int = 5

    def open(self, path: str) -> Device:
        if self.path_errno:
            raise OSError(self.path_errno, os.strerror(self.path_errno), path)
        self.opened += 1
        return Device(self)


class Device:
    """An open camera. Its buffers lie one after the other in a file in memory."""

    formats = staticmethod(lambda: ["BGR3", "MJPG"])

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._bytes = -(-(driver.stride * driver.height * 2) // PAGE) * PAGE
        self._queued: deque[int] = deque()
        self.descriptor = os.memfd_create("camera")

    def close(self) -> None:
        self._driver.opened -= 1
        os.close(self.descriptor)

    def node_capabilities(self) -> int:
        self._refuse(api.QUERY_CAPABILITY)
        return self._driver.capabilities

    def format(self) -> api.Format:
        driver = self._driver
        return api.Format(
            type=api.CAPTURE,
            width=driver.width,
            height=driver.height,
            fourcc=api.fourcc_code(driver.fourcc),
            bytes_per_line=driver.stride,
            encoding=driver.encoding,
            quantization=driver.quantization,
        )

    def interval(self) -> Fraction | None:
        return 1 / Fraction(self._driver.fps) if self._driver.fps else None

    def set_interval(self, interval: Fraction) -> None:
        self._refuse(api.SET_PARAMETERS)

    def controls(self) -> list[api.Control]:
        return [api.Control(1, "gain", 0, 9, True), api.Control(2, "temperature", 0, 9, False)]

    def set_control(self, control: api.Control, value: int) -> int:
        self._refuse(api.SET_CONTROL)
        self._driver.control = min(value, 7)
        return self._driver.control

    def wait(self, seconds: float) -> bool:
        if not self._driver.shots:
            time.sleep(min(seconds, 0.01))
        return bool(self._driver.shots)

    def call(self, code: int, argument: ctypes.Structure | ctypes.c_int) -> None:
        self._refuse(code)
        if isinstance(argument, api.BufferRequest):
            os.ftruncate(self.descriptor, argument.count * self._bytes)
        elif isinstance(argument, api.Buffer) and code == api.QUERY_BUFFER:
            argument.length, argument.offset = self._bytes, argument.index * self._bytes
        elif isinstance(argument, api.Buffer) and code == api.QUEUE:
            self._queued.append(argument.index)
        elif isinstance(argument, api.Buffer) and code == api.DEQUEUE:
            shot = self._driver.shots.popleft()
            argument.index = self._queued.popleft()
            os.pwrite(self.descriptor, shot.data, argument.index * self._bytes)
            argument.bytes_used, argument.flags, argument.sequence = len(shot.data), shot.flags, shot.sequence

    def _refuse(self, code: int) -> None:
        number = self._driver.refused.get(code)
        if number:
            raise OSError(number, os.strerror(number))
