"""What a camera's own counter and clock say about a frame."""

from __future__ import annotations

LAST_16_BIT = 0xFFFF  # GigE Vision counts blocks from 1 to this, then from 1 again, unless extended ids are on
WRAP_ZONE = 1024  # an id that falls back from this near the end has wrapped; from elsewhere, the camera began anew
MOST_LOST = 10_000  # in one gap; a counter that jumps further was set anew
SAME_CLOCK_S = 10.0  # a camera's time this near to ours is set (PTP); a counter since power-on is years away


class FrameIds:
    """Counts the frames between two that arrived, by the ids that the camera gives them."""

    def __init__(self) -> None:
        self._last: int | None = None

    def lost_before(self, frame_id: int | None, *, failed: bool = False) -> int:
        """Frames that are missing between the one before and this one; 0 where ids say nothing (None, or no count).

        `failed`: of a buffer that may hold anything. An id that can't follow is taken for the next one then.
        """
        last = self._last
        missing = None if last is None or frame_id is None else _missing(last, frame_id)
        if missing is None and failed:
            self._last = None if last is None else last + 1
        else:
            self._last = frame_id
        return missing or 0


def _missing(last: int, frame_id: int) -> int | None:
    """Ids between two; None: the second does not follow the first."""
    if LAST_16_BIT - WRAP_ZONE < last <= LAST_16_BIT and frame_id < WRAP_ZONE:
        return LAST_16_BIT - last + max(frame_id - 1, 0)
    missing = frame_id - last - 1
    return missing if 0 <= missing <= MOST_LOST else None


def lost_between(last: int, number: int, modulus: int) -> int:
    """Frames missing between two numbers of a counter that goes on at 0 after `modulus` - 1.

    0 where the counter stands still, or was set anew: it fell back, or jumped by more than `MOST_LOST`.
    """
    missing = (number - last - 1) % modulus
    return missing if missing <= MOST_LOST else 0


def wall_clock(camera_ns: int | None, now_ns: int) -> int | None:
    """A camera's timestamp where it is time of day, nanoseconds since 1970; None: it counts from somewhere else.

    `now_ns`: this machine's time, when the frame arrived.
    """
    if camera_ns is None or abs(now_ns - camera_ns) > SAME_CLOCK_S * 1e9:
        return None
    return camera_ns
