"""What a camera's own counter and clock say about a frame."""

from __future__ import annotations

LAST_16_BIT = 0xFFFF  # GigE Vision counts blocks from 1 to this, then from 1 again, unless extended ids are on
WRAP_ZONE = 1024  # an id that falls back from this near the end has wrapped; from elsewhere, the camera began anew
SAME_CLOCK_S = 10.0  # a camera's time this near to ours is set (PTP); a counter since power-on is years away


class FrameIds:
    """Counts the frames between two that arrived, by the ids that the camera gives them."""

    def __init__(self) -> None:
        self._last: int | None = None

    def lost_before(self, frame_id: int | None) -> int:
        """Frames that are missing between the one before and this one; 0 where ids say nothing (None, or no count)."""
        last, self._last = self._last, frame_id
        if last is None or frame_id is None:
            return 0
        if frame_id > last:
            return frame_id - last - 1
        if LAST_16_BIT - WRAP_ZONE < last <= LAST_16_BIT and frame_id < WRAP_ZONE:
            return LAST_16_BIT - last + max(frame_id - 1, 0)
        return 0


def wall_clock(camera_ns: int | None, now_ns: int) -> int | None:
    """A camera's timestamp where it is time of day, nanoseconds since 1970; None: it counts from somewhere else.

    `now_ns`: this machine's time, when the frame arrived.
    """
    if camera_ns is None or abs(now_ns - camera_ns) > SAME_CLOCK_S * 1e9:
        return None
    return camera_ns
