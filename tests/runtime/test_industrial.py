"""What all industrial cameras share, against a camera and an SDK that do as they are told."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import pytest

from dapo_edge.errors import FrameError, FrameTimeout, SourceError, SourceRefused
from dapo_edge.runtime.sources.features import frame_rate, set_features, set_trigger, split_query
from dapo_edge.runtime.sources.frame_ids import FrameIds, wall_clock
from dapo_edge.runtime.sources.industrial import OPTIONS, Found, Grab, IndustrialSource, choose
from dapo_edge.structures import Frame

# --- frame ids and clocks ---


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
    ],
)
def test_lost_frames_by_their_ids(frame_ids: tuple[int | None, ...], expected: list[int]) -> None:
    assert lost(*frame_ids) == expected


def test_a_cameras_clock_counts_only_as_time_of_day() -> None:
    now_ns = time.time_ns()
    assert wall_clock(now_ns - 20_000_000, now_ns) == now_ns - 20_000_000
    assert wall_clock(86_400_000_000_000, now_ns) is None  # a day after it was switched on
    assert wall_clock(now_ns - 37_000_000_000, now_ns) is None  # atomic time would be a lie of 37 s
    assert wall_clock(None, now_ns) is None


# --- features ---


class FakeNodes:
    """A camera's features: name -> value; writing keeps a log."""

    def __init__(self, **values: str) -> None:
        self.values = {"PixelFormat": "Mono8", "Width": "4", "Height": "2"} | values
        self.log: list[tuple[str, str]] = []

    def names(self) -> list[str]:
        return list(self.values)

    def has(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str) -> str | None:
        return self.values.get(name)

    def set(self, name: str, text: str) -> None:
        if text == "bad":
            raise ValueError("it is bad")
        self.log.append((name, text))
        self.values[name] = text

    def valid(self, name: str) -> str:
        return "good"


TRIGGER = {"TriggerSelector": "AcquisitionStart", "TriggerMode": "Off", "TriggerSource": "Line1"}


def test_own_keys_and_features_are_told_apart() -> None:
    own, features = split_query("x://", "Gain=2&trigger=Line1&Gain=3&Name=a%26b+c&buffers=4", OPTIONS)
    assert own == {"trigger": "Line1", "buffers": 4}
    assert features == [("Gain", "2"), ("Gain", "3"), ("Name", "a&b c")]


def test_the_first_refusal_ends_it() -> None:
    nodes = FakeNodes(Gain="1")
    with pytest.raises(SourceRefused, match=r"refuses Gain=bad \(it is bad\). Gain is good"):
        set_features("x://", nodes, [("Width", "2"), ("Gain", "bad"), ("Height", "9")], ())
    assert nodes.log == [("Width", "2")]
    with pytest.raises(SourceRefused, match=r"no feature 'Gian'\. Did you mean 'Gain'"):
        set_features("x://", nodes, [("Gian", "2")], ("trigger",))


@pytest.mark.parametrize(
    ("wanted", "before", "becomes", "log"),
    [
        (None, {}, "off", []),
        (None, TRIGGER | {"TriggerMode": "On"}, "hardware", []),
        (None, TRIGGER | {"TriggerMode": "On", "TriggerSource": "Software"}, "software", []),
        ("off", {}, "off", []),
        ("off", TRIGGER | {"TriggerMode": "On"}, "off", ["TriggerSelector=FrameStart", "TriggerMode=Off"]),
        (
            "software",
            TRIGGER,
            "software",
            ["TriggerSelector=FrameStart", "TriggerSource=Software", "TriggerMode=On"],
        ),
        ("Line2", {"TriggerMode": "Off"}, "hardware", ["TriggerSource=Line2", "TriggerMode=On"]),
    ],
)
def test_triggers(wanted: str | None, before: dict[str, str], becomes: str, log: list[str]) -> None:
    nodes = FakeNodes(**before)
    nodes.values.setdefault("TriggerSource", "Line1")
    assert set_trigger("x://", nodes, wanted) == becomes
    assert [f"{name}={text}" for name, text in nodes.log] == log


def test_a_camera_without_trigger_can_not_be_triggered() -> None:
    with pytest.raises(SourceRefused, match="no TriggerMode"):
        set_trigger("x://", FakeNodes(), "software")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"AcquisitionFrameRate": "30.0"}, 30.0),
        ({"AcquisitionFrameRate": "30.0", "AcquisitionFrameRateEnable": "0"}, None),
        ({"AcquisitionFrameRate": "30.0", "ResultingFrameRate": "24.5"}, 24.5),
        ({"AcquisitionFrameRateAbs": "12"}, 12.0),
        ({"AcquisitionFrameRate": "?"}, None),
    ],
)
def test_the_announced_rate(values: dict[str, str], expected: float | None) -> None:
    assert frame_rate(FakeNodes(**values)) == expected


# --- the source ---


class SdkError(Exception):
    pass


class FakeCamera(IndustrialSource):
    """Delivers the grabs in `queue`; None is silence, an exception is raised."""

    def __init__(self, uri: str, **features: str) -> None:
        super().__init__(uri)
        self.nodes = FakeNodes(**features)
        self.queue: deque[Any] = deque()
        self.calls: list[str] = []

    def _connect(self, name: str) -> FakeNodes:
        self.calls.append(f"connect {name}")
        return self.nodes

    def _start(self, buffers: int) -> None:
        self.calls.append(f"start {buffers}")

    def _poll(self, wait_s: float) -> Frame | None:
        entry = self.queue.popleft() if self.queue else None
        if isinstance(entry, Exception):
            raise entry
        if entry is None:
            time.sleep(min(wait_s, 0.005))
            return None
        return self._deliver(entry)

    def _execute_trigger(self) -> None:
        self.calls.append("trigger")

    def _disconnect(self) -> None:
        self.calls.append("disconnect")

    def _sdk_errors(self) -> tuple[type[Exception], ...]:
        return (SdkError,)


def grab(frame_id: int | None = None, **fields: Any) -> Grab:
    return Grab(np.arange(8, dtype=np.uint8), 4, 2, frame_id=frame_id, **fields)


def test_open_sets_up_and_close_lets_go() -> None:
    source = FakeCamera("fake://cam%201?Gain=3&buffers=5", Gain="1", AcquisitionMode="SingleFrame")
    with source:
        assert source.calls == ["connect cam 1", "start 5"]
        assert source.nodes.log == [("AcquisitionMode", "Continuous"), ("Gain", "3")]
        assert source.properties.width == 4
        assert source.pixel_format == "Mono8"
    assert source.calls[-1] == "disconnect"


def test_a_refused_feature_lets_go_too() -> None:
    source = FakeCamera("fake://x?Gain=bad", Gain="1")
    with pytest.raises(SourceRefused):
        source.open()
    assert source.calls == ["connect x", "disconnect"]


def test_every_frame_is_counted_once() -> None:
    with FakeCamera("fake://x") as source:
        assert isinstance(source, FakeCamera)
        source.queue += [grab(10), grab(13), grab(14, failed="torn"), grab(17, failed="torn"), grab(18), grab(19)]
        story: list[tuple[str, int | None, int]] = []
        for _ in range(6):
            try:
                frame = source.read(1)
                assert frame is not None
                story.append(("good", frame.index, frame.lost))
            except FrameError as error:
                story.append(("failed", error.index, 0))
    # 11 and 12 are lost, 15 and 16, too; 14 and 17 failed, and are not lost besides.
    assert story == [
        ("good", 0, 0),
        ("good", 1, 2),
        ("failed", 2, 0),
        ("failed", 3, 0),
        ("good", 4, 2),
        ("good", 5, 0),
    ]


def test_skipped_frames_are_not_counted_twice() -> None:
    with FakeCamera("fake://x") as source:
        assert isinstance(source, FakeCamera)
        source.queue += [grab(0), grab(5, skipped=4), grab(9, skipped=2), grab(None, skipped=3)]
        assert [source.read(1).lost for _ in range(4)] == [0, 4, 3, 3]  # type: ignore[union-attr]


def test_a_new_opening_begins_anew() -> None:
    source = FakeCamera("fake://x")
    for _ in range(2):
        with source:
            source.queue += [grab(700)]
            frame = source.read(1)
            assert frame is not None
            assert (frame.index, frame.lost) == (0, 0)


def test_the_cameras_time_of_day_is_the_frames() -> None:
    captured_ns = time.time_ns() - 30_000_000
    with FakeCamera("fake://x") as source:
        assert isinstance(source, FakeCamera)
        source.queue += [grab(camera_ns=captured_ns), grab(camera_ns=5_000)]
        frame = source.read(1)
        assert frame is not None
        assert frame.timestamp_ns == captured_ns
        assert source.has_camera_clock
        frame = source.read(1)
        assert frame is not None
        assert time.time_ns() - frame.timestamp_ns < 1e9
        assert not source.has_camera_clock


def test_a_buffer_that_is_too_small_fails_alone() -> None:
    with FakeCamera("fake://x") as source:
        assert isinstance(source, FakeCamera)
        source.queue += [Grab(np.zeros(5, np.uint8), 4, 2), grab()]
        with pytest.raises(FrameError, match="5 bytes doesn't hold 4 x 2 px") as caught:
            source.read(1)
        assert caught.value.index == 0
        assert source.read(1)


def test_what_the_sdk_raises_ends_it() -> None:
    with FakeCamera("fake://user:word@x") as source:
        assert isinstance(source, FakeCamera)
        source.queue += [SdkError("gone : RuntimeException thrown in node 'x' (file 'y.h', line 3)")]
        with pytest.raises(SourceError, match=r"broke down \(gone\)") as caught:
            source.read(1)
        assert type(caught.value) is SourceError
        assert "word" not in str(caught.value)


def test_a_silent_camera_is_a_timeout() -> None:
    with FakeCamera("fake://x") as source, pytest.raises(FrameTimeout, match=r"within 0\.05 s"):
        source.read(0.05)


def test_a_software_trigger_is_given_once_for_each_frame() -> None:
    with FakeCamera("fake://x?trigger=software&timeout=0.1", **TRIGGER) as source:
        assert isinstance(source, FakeCamera)
        with pytest.raises(FrameTimeout):
            source.read(0.02)
        source.queue += [grab()]
        assert source.read(1)  # the one that was asked for before
        assert source.calls.count("trigger") == 1
        source.queue += [grab()]
        assert source.read(1)
        assert source.calls.count("trigger") == 2


def test_a_frame_that_comes_after_its_trigger_was_given_up_belongs_to_no_other() -> None:
    with FakeCamera("fake://x?trigger=software&timeout=0.05", **TRIGGER) as source:
        assert isinstance(source, FakeCamera)
        with pytest.raises(FrameError, match="answered a software trigger with no frame") as caught:
            source.read(1)
        assert caught.value.index == 0
        source.queue += [grab(1), grab(2, failed="torn"), None, grab(3)]  # two late ones, silence, then the right one
        frame = source.read(1)
        assert frame is not None
        assert (frame.index, frame.lost) == (1, 0)
        assert source.calls.count("trigger") == 2


# --- choosing ---

CAMERAS = [Found("a://1", "Left", "1"), Found("a://2", "Right", "2")]
KEYS = [("1", "belt"), ("2", "belt")]


def test_choosing_a_camera() -> None:
    assert choose(CAMERAS, "2", KEYS, "a://2") == 1
    assert choose(CAMERAS[:1], "", KEYS[:1], "a://") == 0
    with pytest.raises(SourceRefused, match=r"several cameras are there \(Left 1, Right 2\)"):
        choose(CAMERAS, "", KEYS, "a://")
    with pytest.raises(SourceRefused, match="several cameras are called 'belt'"):
        choose(CAMERAS, "belt", KEYS, "a://belt")
    with pytest.raises(SourceError, match=r"not there; found: Left 1, Right 2") as caught:
        choose(CAMERAS, "3", KEYS, "a://3")
    assert type(caught.value) is SourceError
    with pytest.raises(SourceError, match="found: none"):
        choose([], "", [], "a://")
