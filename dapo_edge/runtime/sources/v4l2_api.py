"""The part of Linux' video interface that is used here: its structures and calls, as ctypes.

Source: include/uapi/linux/videodev2.h, https://docs.kernel.org/userspace-api/media/v4l/v4l2.html
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import select
from collections.abc import Iterator
from ctypes import c_int32, c_uint8, c_uint32
from dataclasses import dataclass
from fractions import Fraction

CAPTURE, MMAP = 1, 1  # V4L2_BUF_TYPE_VIDEO_CAPTURE, V4L2_MEMORY_MMAP
CAP_CAPTURE, CAP_MULTIPLANAR, CAP_STREAMING, CAP_OF_NODE = 0x1, 0x1000, 0x04000000, 0x80000000
FLAG_ERROR, FLAG_CLOCK, FLAG_MONOTONIC = 0x40, 0xE000, 0x2000  # of a buffer
CONTROL_DISABLED, CONTROL_READ_ONLY = 0x1, 0x4
CONTROL_NUMBERS = (1, 2, 3, 9)  # integer, boolean, menu, menu of integers
NEXT_CONTROL = 0x80000000


class Capability(ctypes.Structure):
    _fields_ = (
        ("driver", ctypes.c_char * 16),
        ("card", ctypes.c_char * 32),
        ("bus_info", ctypes.c_char * 32),
        ("version", c_uint32),
        ("capabilities", c_uint32),
        ("device_caps", c_uint32),
        ("reserved", c_uint32 * 3),
    )


class FormatDescription(ctypes.Structure):
    _fields_ = (
        ("index", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("description", ctypes.c_char * 32),
        ("fourcc", c_uint32),
        ("mbus_code", c_uint32),
        ("reserved", c_uint32 * 3),
    )


class Format(ctypes.Structure):
    _fields_ = (
        ("type", c_uint32),
        ("_to_eight", c_uint32),
        ("width", c_uint32),
        ("height", c_uint32),
        ("fourcc", c_uint32),
        ("field", c_uint32),
        ("bytes_per_line", c_uint32),
        ("size", c_uint32),
        ("colorspace", c_uint32),
        ("priv", c_uint32),
        ("flags", c_uint32),
        ("encoding", c_uint32),
        ("quantization", c_uint32),
        ("transfer", c_uint32),
        ("_rest", c_uint8 * 152),
    )


class StreamParameters(ctypes.Structure):
    _fields_ = (
        ("type", c_uint32),
        ("capability", c_uint32),
        ("mode", c_uint32),
        ("numerator", c_uint32),  # of the time between two frames, in seconds
        ("denominator", c_uint32),
        ("_rest", c_uint8 * 184),
    )


class BufferRequest(ctypes.Structure):
    _fields_ = (
        ("count", c_uint32),
        ("type", c_uint32),
        ("memory", c_uint32),
        ("capabilities", c_uint32),
        ("flags", c_uint32),
    )


class Buffer(ctypes.Structure):
    _fields_ = (
        ("index", c_uint32),
        ("type", c_uint32),
        ("bytes_used", c_uint32),
        ("flags", c_uint32),
        ("field", c_uint32),
        ("seconds", ctypes.c_long),
        ("microseconds", ctypes.c_long),
        ("timecode", c_uint8 * 16),
        ("sequence", c_uint32),
        ("memory", c_uint32),
        ("offset", c_uint32),
        ("_to_eight", c_uint32),
        ("length", c_uint32),
        ("reserved", c_uint32 * 2),
    )


class ControlQuery(ctypes.Structure):
    _fields_ = (
        ("id", c_uint32),
        ("type", c_uint32),
        ("name", ctypes.c_char * 32),
        ("minimum", c_int32),
        ("maximum", c_int32),
        ("step", c_int32),
        ("default", c_int32),
        ("flags", c_uint32),
        ("reserved", c_uint32 * 2),
    )


class ControlValue(ctypes.Structure):
    _fields_ = (("id", c_uint32), ("value", c_int32))


def _code(direction: int, number: int, kind: type[ctypes.Structure] | type[ctypes.c_int]) -> int:
    """_IOC of the kernel's ioctl.h."""
    return direction << 30 | ctypes.sizeof(kind) << 16 | ord("V") << 8 | number


_WRITE, _READ, _BOTH = 1, 2, 3
QUERY_CAPABILITY = _code(_READ, 0, Capability)
LIST_FORMATS = _code(_BOTH, 2, FormatDescription)
GET_FORMAT, SET_FORMAT = _code(_BOTH, 4, Format), _code(_BOTH, 5, Format)
REQUEST_BUFFERS = _code(_BOTH, 8, BufferRequest)
QUERY_BUFFER, QUEUE, DEQUEUE = _code(_BOTH, 9, Buffer), _code(_BOTH, 15, Buffer), _code(_BOTH, 17, Buffer)
STREAM_ON, STREAM_OFF = _code(_WRITE, 18, ctypes.c_int), _code(_WRITE, 19, ctypes.c_int)
GET_PARAMETERS, SET_PARAMETERS = _code(_BOTH, 21, StreamParameters), _code(_BOTH, 22, StreamParameters)
GET_CONTROL, SET_CONTROL = _code(_BOTH, 27, ControlValue), _code(_BOTH, 28, ControlValue)
QUERY_CONTROL = _code(_BOTH, 36, ControlQuery)


@dataclass(frozen=True)
class Control:
    """A setting of a camera, by the name that `v4l2-ctl --list-ctrls` gives it."""

    id: int
    name: str
    minimum: int
    maximum: int
    writable: bool


def fourcc_name(code: int) -> str:
    """`MJPG` for 0x47504A4D."""
    return code.to_bytes(4, "little").decode("latin-1").rstrip()


def fourcc_code(name: str) -> int:
    """0x47504A4D for `MJPG`."""
    return int.from_bytes(name.ljust(4).encode("latin-1"), "little")


class Device:
    """An open /dev/video*. What the driver refuses is an `OSError`."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.descriptor)

    def call(self, code: int, argument: ctypes.Structure | ctypes.c_int) -> None:
        fcntl.ioctl(self.descriptor, code, argument)  # changes the argument

    def node_capabilities(self) -> int:
        capability = Capability()
        self.call(QUERY_CAPABILITY, capability)
        every = int(capability.capabilities)
        return int(capability.device_caps) if every & CAP_OF_NODE else every

    def formats(self) -> list[str]:
        """Four-character codes of the pixel formats."""
        found: list[str] = []
        try:
            while True:
                description = FormatDescription(index=len(found), type=CAPTURE)
                self.call(LIST_FORMATS, description)
                found.append(fourcc_name(description.fourcc))
        except OSError:
            return found

    def format(self) -> Format:
        current = Format(type=CAPTURE)
        self.call(GET_FORMAT, current)
        return current

    def interval(self) -> Fraction | None:
        """Seconds between two frames, as the driver announces them."""
        parameters = StreamParameters(type=CAPTURE)
        try:
            self.call(GET_PARAMETERS, parameters)
        except OSError:
            return None
        if not parameters.numerator or not parameters.denominator:
            return None
        return Fraction(parameters.numerator, parameters.denominator)

    def set_interval(self, interval: Fraction) -> None:
        parameters = StreamParameters(type=CAPTURE, numerator=interval.numerator, denominator=interval.denominator)
        self.call(SET_PARAMETERS, parameters)

    def controls(self) -> Iterator[Control]:
        """Everything that can be set to a number."""
        query = ControlQuery(id=NEXT_CONTROL)
        while True:
            try:
                self.call(QUERY_CONTROL, query)
            except OSError:
                return
            if query.type in CONTROL_NUMBERS and not query.flags & CONTROL_DISABLED:
                name = re.sub("[^a-z0-9]+", "_", query.name.decode("latin-1").lower()).strip("_")
                writable = not query.flags & CONTROL_READ_ONLY
                yield Control(query.id, name, query.minimum, query.maximum, writable)
            query = ControlQuery(id=query.id | NEXT_CONTROL)

    def set_control(self, control: Control, value: int) -> int:
        """The value that the control has afterwards."""
        argument = ControlValue(id=control.id, value=value)
        self.call(SET_CONTROL, argument)
        try:
            self.call(GET_CONTROL, argument)
        except OSError as error:
            if error.errno != errno.EACCES:  # a control that can only be written
                raise
        return int(argument.value)

    def wait(self, seconds: float) -> bool:
        """Whether a filled buffer, or an error, is there within so long."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1e3))
