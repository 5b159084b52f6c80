"""What the tests of every camera ask of a source."""

from __future__ import annotations

import threading
import time

import pytest

from dapo_edge.errors import SourceError, SourceRefused
from dapo_edge.runtime.sources import Source, open_source
from dapo_edge.structures import Frame


def read(source: Source) -> Frame:
    """A frame, which comes within 2 s."""
    frame = source.read(2)
    assert frame is not None
    return frame


def open_fails(address: str, kind: type[SourceError] = SourceRefused) -> str:
    """The message of opening in vain, which is an error of exactly this kind."""
    with pytest.raises(SourceError) as caught, open_source(address):
        pass
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


def failure(uri: str, wait_s: float = 2.0) -> SourceError:
    """The error of opening and reading in vain, whose message is one line."""
    with pytest.raises(SourceError) as caught, open_source(uri) as source:
        source.read(wait_s)
    assert "\n" not in str(caught.value)
    return caught.value


def woken_by_close(source: Source) -> float:
    """Close an open source while another thread waits for a frame that does not come: seconds until it has no more."""
    seen: list[object] = []
    reader = threading.Thread(target=lambda: seen.append(source.read()))
    reader.start()
    time.sleep(0.1)
    began_s = time.monotonic()
    source.close()
    reader.join(5)
    assert seen == [None]
    return time.monotonic() - began_s
