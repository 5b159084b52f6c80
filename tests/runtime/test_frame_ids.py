"""Lost frames by a camera's own counter, and its clock."""

from __future__ import annotations

import time

import pytest

from dapo_edge.runtime.sources.frame_ids import FrameIds, lost_between, wall_clock


def lost(*frame_ids: int | None) -> list[int]:
    ids = FrameIds()
    return [ids.lost_before(frame_id) for frame_id in frame_ids]


@pytest.mark.parametrize(
    ("frame_ids", "expected"),
    [
        ((1, 2, 3), [0, 0, 0]),
        ((5, 7, 20), [0, 1, 12]),  # what was before the first frame is not our loss
        ((65534, 65535, 1, 2), [0, 0, 0, 0]),  # GigE Vision has no block 0
        ((65535, 0, 1), [0, 0, 0]),  # some cameras do
        ((65530, 3), [0, 7]),  # lost over the wrap
        ((65535, 65536, 65537), [0, 0, 0]),  # extended ids do not wrap
        ((40000, 1, 2), [0, 0, 0]),  # the camera began anew
        ((900, 1), [0, 0]),
        ((0, 0, 0), [0, 0, 0]),  # no count at all
        ((None, None), [0, 0]),
        ((3, None, 9), [0, 0, 0]),
        ((10, 2**64 - 1, 11, 12), [0, 0, 0, 0]),  # no camera loses so many at once
        ((0, 10_001, 20_003), [0, 10_000, 0]),
    ],
)
def test_lost_frames_by_their_ids(frame_ids: tuple[int | None, ...], expected: list[int]) -> None:
    assert lost(*frame_ids) == expected


@pytest.mark.parametrize("failed_id", [0, None, 2**64 - 1, 9])
def test_what_a_failed_buffer_calls_itself_counts_only_where_it_can_be(failed_id: int | None) -> None:
    ids = FrameIds()
    assert ids.lost_before(failed_id, failed=True) == 0
    assert ids.lost_before(10) == 0
    assert ids.lost_before(failed_id, failed=True) == 0
    assert ids.lost_before(13) == 1  # the failed one was the eleventh
    assert ids.lost_before(16, failed=True) == 2
    assert ids.lost_before(17) == 0


@pytest.mark.parametrize(
    ("last", "number", "expected"),
    [
        (4, 5, 0),
        (4, 7, 2),
        (2**32 - 1, 0, 0),
        (2**32 - 2, 2, 3),
        (4, 4, 0),  # it stands still
        (5000, 0, 0),  # set anew
        (0, 10_001, 10_000),
        (0, 10_002, 0),
    ],
)
def test_lost_frames_by_a_counter_of_32_bits(last: int, number: int, expected: int) -> None:
    assert lost_between(last, number, 2**32) == expected


def test_a_cameras_clock_counts_only_as_time_of_day() -> None:
    now_ns = time.time_ns()
    assert wall_clock(now_ns - 20_000_000, now_ns) == now_ns - 20_000_000
    assert wall_clock(86_400_000_000_000, now_ns) is None  # a day after it was switched on
    assert wall_clock(now_ns - 37_000_000_000, now_ns) is None  # atomic time would be a lie of 37 s
    assert wall_clock(None, now_ns) is None
