"""Memory of a video's frames; what else videos do is in test_sources.py."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from dapo_edge.runtime.sources import open_source
from dapo_edge.runtime.sources.video import VideoSource


def test_frames_need_no_new_memory_and_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for level in range(0, 200, 10):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    with open_source(path) as source:
        assert isinstance(source, VideoSource)
        kept = [source.read() for _ in range(3)]
        for frame in source:
            last = frame
        assert last.index == 19
        assert source._pool.made <= 4  # those that are kept, and one for all others
    levels = [int(frame.image[5, 5, 0]) for frame in (*kept, last) if frame]
    np.testing.assert_allclose(levels, [0, 10, 20, 190], atol=3)
