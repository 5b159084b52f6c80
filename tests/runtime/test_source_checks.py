"""What is wrong with an address shows by itself: before anything is opened, and where no camera and no SDK is."""

from __future__ import annotations

import builtins
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from dapo_edge.errors import SourceError, SourceRefused
from dapo_edge.runtime.sources import SOURCES, open_source, v4l2_api
from dapo_edge.runtime.sources.stills import FolderSource
from dapo_edge.runtime.sources.video import VideoSource
from dapo_edge.runtime.sources.watch import WatchedFolder

OUR_KEYS = "Valid keys: dapo.transport (tcp or udp), dapo.latency"
MISTAKES = [
    ("synthetic://63x480", SourceError, "Use 64 to 8192 pixels"),
    ("synthetic://640x480@0", SourceError, "Use 0.01 to 1000 frames per second"),
    ("synthetic://640", SourceError, "Write it like synthetic://640x480@30"),
    ("synthetic://?frame=3", SourceRefused, "Did you mean 'frames'? Valid keys: seed (a whole number from 0), frames"),
    (
        "synthetic://?materials=wood,ice",
        SourceError,
        "unknown material: 'ice'. Use a sequence of different names out of",
    ),
    ("dir:///none?watch=7", SourceRefused, "The value of 'watch' is 0 or 1"),
    ("dir:///none?size=3", SourceRefused, "Valid keys: watch (0 or 1)"),
    ("dir:///none?watch=1&settle_s=0", SourceRefused, "The value of 'settle_s' is 0.02 to 60 seconds"),
    ("dir:///none?watch=1&delte=1", SourceRefused, "Did you mean 'delete'? Valid keys: watch (0 or 1), settle_s"),
    ("dir://?watch=1", SourceError, "holds no path"),
    ("image:///none.png?watch=7", SourceRefused, "Leave out the '?' and what follows"),
    ("image://", SourceError, "holds no path"),
    ("rtsp://", SourceRefused, "'rtsp://' names no host. Write rtsp://host:554/path"),
    ("rtsp:///path", SourceRefused, "'rtsp:///path' names no host"),
    ("rtsp:// /path", SourceRefused, "names no host"),
    ("rtsp://[::1/path", SourceRefused, "is not an address"),
    ("rtsp://host:99999/x", SourceRefused, "has a port that is not a whole number from 1 to 65535"),
    ("RTSPS://host:0/x", SourceRefused, "has a port that is not a whole number from 1 to 65535"),
    ("rtsp://me:hu/sh@host/x", SourceRefused, "special characters of a password are percent-encoded"),
    ("rtsp://me:hush@host/x?dapo.foo=1", SourceRefused, OUR_KEYS),
    ("rtsp://me:hush@host/x?a=1&dapo.transport=http", SourceRefused, "The value of 'dapo.transport' is tcp or udp"),
    ("v4l2:///none?width=-1", SourceRefused, "The value of 'width' is a whole number from 16 to 16384 pixels"),
    ("v4l2:///none?fps=0", SourceRefused, "The value of 'fps' is 0.1 to 1000 frames per second"),
    ("v4l2:///none?brightness=3&buffers=many", SourceRefused, "The value of 'buffers' is a whole number from 2 to 32"),
    ("v4l2:///none?fourcc=toolong", SourceRefused, "four characters such as MJPG"),
    ("v4l2:///none?width=64&width=64", SourceRefused, "twice"),
    ("v4l2://", SourceError, "holds no path"),
    ("csi://x", SourceRefused, "Write csi://0"),
    ("csi://0?widht=3", SourceRefused, "Did you mean 'width'? Valid keys: width (a whole number from 16 to 16384"),
    ("csi://0?fps=0", SourceRefused, "The value of 'fps' is a whole number from 1 to 1000"),
    ("gst://", SourceRefused, "'gst://' holds no pipeline. Write one, as in gst://v4l2src"),
    ("gst://%20", SourceRefused, "holds no pipeline"),
    ("genicam://1?trigger=Line 1", SourceRefused, "The value of 'trigger' is off, software, or the line it comes by"),
    ("genicam://1?cti=", SourceRefused, "The value of 'cti' is the path of a GenTL producer"),
    ("basler://1?grab=latest", SourceRefused, "The value of 'grab' is all, or newest"),
    ("basler://1?Gain=2&timeout=0", SourceRefused, "The value of 'timeout' is the seconds"),
    ("aravis://1?buffers=0", SourceRefused, "The value of 'buffers' is how many frames"),
    ("aravis://1?trigger=off&trigger=off", SourceRefused, "twice"),
]
RIGHT = [
    "synthetic://640x480@30?seed=1&materials=wood",
    "dir:///none?watch=0",
    "dir:///none?watch=1&settle_s=1&delete=1",
    "image:///none.png",
    "rtsp://me:hush@[::1]:8554/x?channel=1&dapo.latency=default",
    "rtsps://host/x",
    "v4l2:///none?width=640&fps=7.5&brightness=3",
    "csi://1?width=640&gain=2",
    "gst://no_such_element",
    "genicam://1?cti=/none.cti&Gain=2",
    "basler://?grab=newest&NoSuchFeature=x",
    "aravis://?trigger=Line1",
]


@pytest.fixture
def _nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for a device, a file, a host or an SDK fails the test."""

    def touched(*arguments: object, **_: object) -> NoReturn:
        pytest.fail(f"touched {arguments}")

    for module, name in ((os, "open"), (os, "stat"), (os, "scandir"), (os, "access"), (builtins, "open")):
        monkeypatch.setattr(module, name, touched)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, touched)
    monkeypatch.setattr(v4l2_api, "Device", touched)


@pytest.mark.parametrize(("uri", "kind", "words"), MISTAKES)
def test_a_mistake_is_told_before_anything_is_opened(
    uri: str, kind: type[SourceError], words: str, request: pytest.FixtureRequest
) -> None:
    source = open_source(uri)
    if not uri.startswith("synthetic"):  # which imports the names of its materials
        request.getfixturevalue("_nothing_there")
    with pytest.raises(SourceError) as caught:
        source.check()
    with pytest.raises(SourceError) as opened:
        source.open()
    assert type(caught.value) is type(opened.value) is kind
    assert str(caught.value) == str(opened.value)
    assert words in str(caught.value)
    assert "hush" not in str(caught.value)
    assert "hu/sh" not in str(caught.value)
    assert not source.is_open


@pytest.mark.parametrize("uri", RIGHT)
def test_what_only_a_device_can_know_is_no_mistake_yet(uri: str, request: pytest.FixtureRequest) -> None:
    source = open_source(uri)
    if not uri.startswith("synthetic"):
        request.getfixturevalue("_nothing_there")
    source.check()
    assert not source.is_open


def test_all_kinds_are_checked() -> None:
    schemes = {uri.partition("://")[0].lower() for uri, _, _ in MISTAKES}
    assert schemes | {"file"} == set(SOURCES)


@pytest.mark.usefixtures("_nothing_there")
def test_a_video() -> None:
    VideoSource("file:///none.mp4").check()
    with pytest.raises(SourceRefused, match="unknown key 'watch'"):
        VideoSource("file:///none.mp4?watch=7").check()
    with pytest.raises(SourceError, match="holds no path"):
        VideoSource("file://").check()


def test_a_folder_as_a_file_keeps_its_keys(tmp_path: Path) -> None:
    assert isinstance(open_source(f"file://{tmp_path}"), FolderSource)
    assert isinstance(open_source(f"file://{tmp_path}?watch=1"), WatchedFolder)
    with pytest.raises(SourceRefused, match=r"Valid keys: watch \(0 or 1\)"):
        open_source(f"file://{tmp_path}?size=3").check()


def test_checking_imports_no_sdk() -> None:
    program = f"""
import sys
from dapo_edge.runtime.sources import open_source
for uri in {RIGHT}:
    open_source(uri).check()
heavy = ("cv2", "gi", "harvesters", "genicam", "pypylon", "PIL")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
