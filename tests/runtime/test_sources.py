"""Opening by address, files, folders and videos; what is wrong with an address is said in one line."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dapo_edge.errors import FrameError, SourceError
from dapo_edge.runtime import sources
from dapo_edge.runtime.sources import Properties, Source, open_source, redact
from dapo_edge.runtime.sources.stills import FolderSource, ImageSource, natural_key
from dapo_edge.runtime.sources.uri import path_of, redact_message, split, uri_of
from dapo_edge.runtime.sources.video import VideoSource
from dapo_edge.structures import Frame


def picture(path: Path, value: int = 100, size: tuple[int, int] = (32, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


def video(path: Path, count: int = 30, code: str = "mp4v", noise: bool = False) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 20.0, (64, 48))
    assert writer.isOpened()
    rng = np.random.default_rng(0)
    for index in range(count):
        flat = np.full((48, 64, 3), 8 * index % 256, np.uint8)
        writer.write(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) if noise else flat)
    writer.release()
    return path


def refused(uri: str | Path, *words: str) -> str:
    with pytest.raises(SourceError) as caught, open_source(uri) as source:
        source.read()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def drain(source: Source) -> tuple[list[Frame], list[str]]:
    frames, errors = [], []
    while True:
        try:
            frame = source.read()
        except SourceError as error:
            errors.append(str(error))
            continue
        if frame is None:
            return frames, errors
        frames.append(frame)


# --- the contract ---


class Fake(Source):
    def _open(self) -> Properties:
        self.left: list[Exception | None] = [None, FrameError("bad", "skip"), None, SourceError("dead", "stop"), None]
        self.closed = 0
        return Properties(self.uri)

    def _read(self, timeout_s: float | None) -> Frame | None:
        if not self.left:
            return None
        error = self.left.pop(0)
        if error:
            raise error
        return Frame(np.zeros((16, 16, 3), np.uint8), 0, 0, self.uri)

    def _close(self) -> None:
        self.closed += 1


def test_a_frame_error_is_passed_over_and_a_source_error_ends() -> None:
    with Fake("fake://x") as source:
        frames, errors = drain(source)
        assert (len(frames), errors) == (2, ["bad. skip.", "dead. stop."])
        assert source.read() is None


def test_iteration_goes_on_after_a_frame_error() -> None:
    with Fake("fake://x") as source:
        seen = []
        for _ in range(2):
            try:
                seen += [frame.index for frame in source]
            except FrameError:
                seen.append(-1)
            except SourceError:
                seen.append(-2)
        assert seen == [-1, -2]  # a comprehension loses what it had; the source itself does not start again


def test_open_and_close_count() -> None:
    source = Fake("fake://user:secret@x")
    source.close()
    with pytest.raises(SourceError, match="not open"):
        source.read()
    with source as opened:
        assert opened.open() is source
    source.close()
    assert source.closed == 1
    assert "secret" not in repr(source)
    with pytest.raises(SourceError, match="not open"):
        _ = source.properties


def test_a_failed_open_is_cleaned_up() -> None:
    class Broken(Fake):
        def _open(self) -> Properties:
            super()._open()
            raise SourceError("half open", "close it")

    source = Broken("fake://x")
    with pytest.raises(SourceError):
        source.open()
    assert source.closed == 1


def test_importing_the_sources_is_cheap() -> None:
    code = (
        "import dapo_edge.runtime.sources, sys; bad = {'cv2', 'PIL', 'dapo_edge.data.belt', 'dapo_edge.data.surfaces'}"
    )
    subprocess.run([sys.executable, "-c", f"{code} & set(sys.modules); assert not bad, bad"], check=True, timeout=60)


# --- addresses ---


def test_plain_paths_are_told_apart(tmp_path: Path) -> None:
    assert isinstance(open_source(picture(tmp_path / "a.PNG")), ImageSource)
    assert isinstance(open_source(str(tmp_path)), FolderSource)
    assert isinstance(open_source(video(tmp_path / "v.mp4", 1)), VideoSource)
    assert isinstance(open_source(f"file://{tmp_path}/a.PNG"), ImageSource)
    assert isinstance(open_source(f"file://{tmp_path}"), FolderSource)
    assert isinstance(open_source(f"FILE://{tmp_path}/v.mp4"), VideoSource)
    assert list(sources.SOURCES) == sorted(sources.SOURCES)
    assert sources.__all__ == sorted(sources.__all__, key=lambda name: (not name.isupper(), name))


def test_a_path_that_looks_like_a_uri_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "synthetic:" / "a.png")
    with open_source(Path("synthetic:/a.png")) as source:
        assert source.read() is not None


@pytest.mark.parametrize(
    "name", ["größe.png", "部品 1.png", "100%.png", "a%20b.png", "what?.png", "a#b&c=d.png", "x@y:z.png"]
)
def test_any_name_survives_the_way_through_a_uri(tmp_path: Path, name: str) -> None:
    path = picture(tmp_path / "ä b" / name)
    with open_source(path) as source:
        frame = source.read()
    assert frame is not None
    with open_source(frame.source) as again:  # a frame's source opens the same picture
        same = again.read()
    assert same is not None
    np.testing.assert_array_equal(frame.image, same.image)
    address = split(uri_of("image", path))
    assert address is not None
    assert path_of(address.body) == path


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png").rename(tmp_path / "\udcff.png")
    with open_source(path) as source:
        frame = source.read()
    assert frame is not None
    assert frame.source == f"image://{tmp_path}/%FF.png"
    with open_source(frame.source) as source:
        assert source.read() is not None
    video(tmp_path / "v.mp4", 1).rename(tmp_path / "\udcff.mp4")
    refused(tmp_path / "\udcff.mp4", "not text", "Rename")


def test_percent_encoded_addresses(tmp_path: Path) -> None:
    picture(tmp_path / "größe 1.png")
    with open_source(f"image://{tmp_path}/gr%C3%B6%C3%9Fe%201.png") as source:
        assert source.read() is not None


def test_addresses_that_lead_nowhere(tmp_path: Path) -> None:
    refused("", "empty")
    refused(tmp_path / "none.png", "No such file")
    refused(tmp_path / ("x" * 999), "too long")
    refused(f"image://{tmp_path}/none.png", "No such file")
    refused(f"image://{tmp_path}", "folder", "dir:///")
    refused(f"dir://{tmp_path}/none", "No such file")
    refused(f"dir://{picture(tmp_path / 'a.png')}", "not a folder", "image:///")
    refused(f"file://{tmp_path}/none.mp4", "No such file")
    refused("image://", "holds no path")
    refused("image:///a%00b", "holds no path")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "extension", ".png", ".mp4")
    refused(f"image://{tmp_path}/a.png?size=3", "unknown key 'size'", "%3F")


def test_an_unknown_kind_names_the_nearest_and_all() -> None:
    refused("synthetc://640x480", "Did you mean 'synthetic'?", ", ".join(f"{kind}://" for kind in sources.SOURCES))
    assert "Did you mean" not in refused("qqqqqqq://x", "Known: ")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("rtsp://user:pw@host:554/x?channel=1", "rtsp://***@host:554/x?channel=1"),
        ("rtsp://user:p@ss:w@host/x", "rtsp://***@host/x"),
        ("rtsp://user:pa/ss?w@host/x", "rtsp://***@host/x"),
        ("RTSP://token@host/x", "RTSP://***@host/x"),
        ("http://host/x?user=a&password=b;c&n=1", "http://host/x?user=***&password=***;c&n=1"),
        ("http://h/x?access_token=a&api_key=b&n=1", "http://h/x?access_token=***&api_key=***&n=1"),
        ("http://h/x?loginuse=a&loginpas=b&usr=c&psw=d", "http://h/x?loginuse=***&loginpas=***&usr=***&psw=***"),
        ("http://h/x?auth=a&UserPwd=b&PW=c;signature=d", "http://h/x?auth=***&UserPwd=***&PW=***;signature=***"),
        ("rtsp://h/user=a_password=b_channel=1_stream=0.sdp?x", "rtsp://h/user=***_channel=1_stream=0.sdp?x"),
        ("rtsp://h/user=a&password=b&channel=1", "rtsp://h/user=***&password=***&channel=1"),
        ("basler://1?UserSetSelector=Default&Width=8", "basler://1?UserSetSelector=Default&Width=8"),
        ("file:///data/user=1/a.mp4", "file:///data/user=1/a.mp4"),
        ("rtsp:/user:pw@host/x", "***@host/x"),
        ("user:pw@host", "***@host"),
        ("rtsp://host:554/x", "rtsp://host:554/x"),
        ("synthetic://640x480@30?seed=1", "synthetic://640x480@30?seed=1"),
        ("image:///a:b@c.png", "image:///a:b@c.png"),
        ("/data/a:b@c.png", "/data/a:b@c.png"),
    ],
)
def test_redact(uri: str, shown: str) -> None:
    assert redact(uri) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ('gst://a extra-headers="h,Authorization=(string)\\"Bearer hush\\"" ! b', "gst://a extra-headers=*** ! b"),
        ('gst://a extra-headers=h,Authorization=(string)"Bearer hush" ! b', "gst://a extra-headers=*** ! b"),
        ("gst://a location=http://h/x?access_token=hush ! b", "gst://a location=http://h/x?access_token=*** ! b"),
        ("gst://x264enc key-int-max=3 ! b", "gst://x264enc key-int-max=3 ! b"),
    ],
)
def test_redacted_pipelines(uri: str, shown: str) -> None:
    assert redact(uri) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("'rtsp://me:hush@h/x' can't be opened", "'rtsp://***@h/x' can't be opened"),
        ("[rtsp://me:hu@sh@h/x] and 'me:hush@h'", "[rtsp://***@h/x] and '***@h'"),
        ("'http://h/x?token=hush' is gone; password=hush too", "'http://h/x?token=***' is gone; password=*** too"),
        ("'rtsp://h/user=a_password=hush_channel=1' can't", "'rtsp://h/user=***_channel=1' can't"),
        ("gst://a%20location%3Drtsp%3A%2F%2Fme%3Ahush%40h", "gst://a location=rtsp://***@h"),
        ("Write rtsp://user:password@host/path", "Write rtsp://user:password@host/path"),
        (
            "'synthetic://64x64@30' at 10:30, 'image:///a:b@c.png'",
            "'synthetic://64x64@30' at 10:30, 'image:///a:b@c.png'",
        ),
        ("'/data/a:b@c.png' and sources.0.fps=10, see a@b", "'/data/a:b@c.png' and sources.0.fps=10, see a@b"),
    ],
)
def test_messages_are_redacted(text: str, shown: str) -> None:
    assert redact_message(text) == shown
    assert redact_message(shown) == shown


def test_passwords_are_in_no_message() -> None:
    for uri in ("rtspx://user:hush@host/x", "rtsp:/user:hush@host/x", "user:hush@host", "http://h/x?password=hush"):
        assert "hush" not in refused(uri)


# --- stills ---


def test_one_image(tmp_path: Path) -> None:
    before = time.time_ns()
    with open_source(picture(tmp_path / "a.png")) as source:
        assert source.properties == Properties(uri=f"image://{tmp_path}/a.png", length=1)
        (frame,) = source
        assert source.read() is None
    assert (frame.index, frame.source, frame.truth) == (0, f"image://{tmp_path}/a.png", None)
    assert before <= frame.timestamp_ns <= time.time_ns()
    assert frame.image.shape == (24, 32, 3)


def test_a_folder_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 9, 1, 2):
        picture(tmp_path / f"part{number}.png", number)
    picture(tmp_path / "deeper" / "part3.png")
    picture(tmp_path / ".part4.png")
    (tmp_path / "notes.txt").write_text("x")
    with open_source(tmp_path) as source:
        assert source.properties.length == 4
        frames = list(source)
    assert [int(frame.image[0, 0, 2]) for frame in frames] == [1, 2, 9, 10]
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    assert frames[3].source == f"image://{tmp_path}/part10.png"
    assert sorted(["b", "A1", "a01", "a1", "10", "9"], key=natural_key) == ["9", "10", "A1", "a01", "a1", "b"]


def test_a_bad_file_in_a_folder_fails_alone(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "2.png").touch()
    picture(tmp_path / "3.png")
    picture(tmp_path / "4.png")
    with open_source(tmp_path) as source:
        (tmp_path / "4.png").unlink()
        frames, errors = drain(source)
    assert [frame.index for frame in frames] == [0, 2]
    assert [("2.png" in errors[0], "4.png" in errors[1])] == [(True, True)]


def test_a_folder_without_images_names_the_extensions(tmp_path: Path) -> None:
    refused(tmp_path, "holds no image", ".png", ".tiff")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, "among its 1 entries")


# --- videos ---


def test_a_video_from_beginning_to_end(tmp_path: Path) -> None:
    path = video(tmp_path / "größe 1.mp4")
    before = time.time_ns()
    with open_source(path) as source:
        assert source.properties == Properties(uri_of("file", path), 64, 48, 20.0, 30)
        frames = list(source)
        assert source.read() is None
    assert [frame.index for frame in frames] == list(range(30))
    assert abs(int(frames[20].image.mean()) - 160) < 6
    assert before <= frames[0].timestamp_ns <= time.time_ns()
    steps = np.diff([frame.timestamp_ns for frame in frames])
    assert np.abs(steps - 50_000_000).max() < 1_000_000
    with source:  # a closed source opens again from its beginning
        frame = source.read()
    assert frame is not None
    assert frame.index == 0


def test_videos_that_can_not_be_opened(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zero.mp4").touch()
    refused(tmp_path / "zero.mp4", "empty (0 bytes)")
    (tmp_path / "text.mp4").write_text("I am a letter, not a film.")
    refused(tmp_path / "text.mp4", "can't be opened", "damaged")
    data = video(tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut.mp4", "cut off")
    (tmp_path / "folder.mp4").mkdir()
    assert isinstance(open_source(tmp_path / "folder.mp4"), FolderSource)
    with pytest.raises(SourceError, match="not a video file"):
        VideoSource(f"file://{tmp_path}/folder.mp4").open()
    assert "WARN" not in capfd.readouterr().err


def test_a_video_that_breaks_off_says_where(tmp_path: Path) -> None:
    data = video(tmp_path / "v.avi", 60, "MJPG", noise=True).read_bytes()
    (tmp_path / "v.avi").write_bytes(data[: len(data) // 2])
    with open_source(tmp_path / "v.avi") as source:
        assert source.properties.length == 60
        frames, errors = drain(source)
        assert source.read() is None
    assert 20 < len(frames) < 40
    assert len(errors) == 1
    assert f"breaks off after {len(frames)} of 60 frames" in errors[0]


def test_a_damaged_stretch_of_a_video_loses_its_frames_and_no_others(tmp_path: Path) -> None:
    data = bytearray(video(tmp_path / "v.mp4", 60, noise=True).read_bytes())
    start = len(data) // 3
    data[start : start + len(data) // 6] = b"\xa5" * (len(data) // 6)
    (tmp_path / "v.mp4").write_bytes(data)
    with open_source(tmp_path / "v.mp4") as source:
        frames, errors = drain(source)
    assert errors
    assert all("is damaged" in error for error in errors)
    assert len(frames) + len(errors) == 60
    assert frames[-1].index == 59
    offset = frames[-1].timestamp_ns - frames[0].timestamp_ns
    assert abs(offset - 59 * 50_000_000) < 1_000_000


def test_a_tiny_video_is_refused(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "t.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 20.0, (8, 8))
    writer.write(np.zeros((8, 8, 3), np.uint8))
    writer.release()
    refused(tmp_path / "t.avi", "8x8", "at least 16")
