"""What all industrial cameras share, against a camera and an SDK that do as they are told."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Any

import numpy as np
import pytest

from dapo_edge.errors import FrameError, FrameTimeout, SourceError, SourceRefused
from dapo_edge.runtime.sources import industrial
from dapo_edge.runtime.sources.features import frame_rate, set_features, set_trigger
from dapo_edge.runtime.sources.industrial import OPTIONS, Found, Grab, IndustrialSource, choose
from dapo_edge.runtime.sources.uri import split_query
from dapo_edge.structures import Frame

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
        self.is_gone = False

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

    def _check_alive(self) -> None:
        self.calls.append("alive")
        if self.is_gone:
            raise SdkError("no answer")

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


def test_an_unanswered_trigger_is_told_before_a_run_gives_the_camera_up() -> None:
    for query, silence_s in (("", 3.0), ("&timeout=10", 11.0)):
        with FakeCamera(f"fake://x?trigger=software{query}", **TRIGGER) as source:
            assert source.properties.silence_s == silence_s
    with FakeCamera("fake://x?trigger=Line1", **TRIGGER) as source:
        assert source.properties.silence_s is None
    with FakeCamera("fake://x?trigger=software&timeout=0.4", **TRIGGER) as source:
        began_s, limit_s = time.monotonic(), source.properties.silence_s
        with pytest.raises(FrameError, match="answered a software trigger with no frame"):
            while True:
                with contextlib.suppress(FrameTimeout):
                    source.read(0.05)
        assert limit_s is not None
        assert 0.4 <= time.monotonic() - began_s < limit_s - 0.5


def test_a_triggered_camera_is_asked_whether_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(industrial, "ALIVE_EVERY_S", 0.1)
    with FakeCamera("fake://x?trigger=Line1", **TRIGGER) as source:
        assert isinstance(source, FakeCamera)
        with pytest.raises(FrameTimeout):
            source.read(0.25)
        assert source.calls.count("alive") == 2
        source.queue += [grab() for _ in range(50)]
        while source.queue:
            source.read(1)
        assert source.calls.count("alive") == 2  # whoever delivers is there
        source.is_gone = True
        with pytest.raises(SourceError, match=r"does not answer any more \(no answer\)") as caught:
            source.read()
        assert type(caught.value) is SourceError


# --- closing while another thread opens ---


def test_an_opening_that_is_no_longer_wanted_lets_go() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(FakeCamera):
        def _connect(self, name: str) -> FakeNodes:
            entered.set()
            go_on.wait(5)
            return super()._connect(name)

    source, errors = Slow("fake://x"), []

    def open_it() -> None:
        try:
            source.open()
        except SourceError as error:
            errors.append(str(error))

    thread = threading.Thread(target=open_it)
    thread.start()
    assert entered.wait(5)
    began_s = time.monotonic()
    source.close()
    assert time.monotonic() - began_s < 1.0  # it does not wait
    go_on.set()
    thread.join(5)
    assert len(errors) == 1
    assert "was closed before it was open" in errors[0]
    assert not source.is_open
    assert source.calls[-1] == "disconnect"
    with source:  # and may be opened again
        assert source.is_open


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
