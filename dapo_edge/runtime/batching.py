"""Views of several frames in as few engine calls as there is memory for, and what each frame gets of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dapo_edge.backends.base import Backend, MapBatch, View
from dapo_edge.kernels.map_spec import MapSize, MapSpec
from dapo_edge.package import Manifest
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.runtime.decide import MapPart
from dapo_edge.runtime.stitching import FrameMap, TileResult, stitch
from dapo_edge.runtime.tiling import Plan

CALL_BYTES = 256 << 20  # what one engine call may take for the tokens and maps of its views


class Task:
    """One frame: what is looked at, and what was seen."""

    def __init__(self, frame: View, plan: Plan | None) -> None:
        """`plan`: None for the whole frame at once."""
        self.size = (frame.shape[1], frame.shape[0])  # px
        self.views = [frame] if plan is None else plan.cut(frame)
        self.ms: dict[str, float] = {}  # by engine stage: this frame's share of the calls that it was in
        self._plan = plan
        self._whole: MapBatch | None = None
        self._index = 0  # of the whole frame in that batch
        self._tiles: dict[int, TileResult] = {}
        self._bank: PromptBank | None = None

    @property
    def is_cut(self) -> bool:
        """Whether its map is made of tiles or regions."""
        return self._plan is not None

    @property
    def bank(self) -> PromptBank:
        """What the frame was compared with."""
        assert self._bank is not None, "a task is asked when all of its views were looked at"
        return self._bank

    def take(self, number: int, batch: MapBatch, index: int) -> None:
        """View `number` was at place `index` of an engine call."""
        self._bank = batch.bank
        share = 1 / len(batch.anomaly)
        for stage, ms in batch.stage_ms.items():
            self.ms[stage] = self.ms.get(stage, 0.0) + share * ms
        if self._plan is None:
            self._whole, self._index = batch, index
        else:
            self._tiles[number] = TileResult(batch.patch_probs[index], float(batch.image_scores[index]))

    def frame_map(self, spec: MapSpec) -> FrameMap:
        """The frame's map. Values that are no numbers stay in it."""
        if self._plan is not None:
            return stitch(self._plan, [self._tiles[number] for number in range(len(self.views))], spec.score)
        batch, index = self._whole, self._index
        assert batch is not None, "a task is asked when all of its views were looked at"
        anomaly = batch.anomaly[index]
        part = MapPart(batch.patch_probs[index], *spec.tables((anomaly.shape[1], anomaly.shape[0])))
        score = float(batch.image_scores[index])
        return FrameMap(anomaly, batch.types[index], batch.type_scores[index], score, (part,))


def look_at(tasks: Iterable[Task], backend: Backend, manifest: Manifest, map_size: MapSize) -> None:
    """Show all views of all tasks to the engine, and hand out what it made of them."""
    groups: dict[tuple[MapSize, tuple[int, ...]], list[tuple[Task, int]]] = {}
    for task in tasks:
        for number, view in enumerate(task.views):
            # Of a cut frame only the patches are asked for: its map is made of all views together.
            size = "model" if task.is_cut else map_size
            # With maps of the views' own sizes, only views of one size make one array.
            kind = (size, view.shape[:2] if size == "frame" else ())
            groups.setdefault(kind, []).append((task, number))
    for (size, _), group in groups.items():
        task, number = group[0]
        most = views_per_call(manifest, size, task.views[number])
        for start in range(0, len(group), most):
            chunk = group[start : start + most]
            batch = backend.infer([task.views[number] for task, number in chunk], map_size=size)
            for index, (task, number) in enumerate(chunk):
                task.take(number, batch, index)


def views_per_call(manifest: Manifest, map_size: MapSize, view: View) -> int:
    """How many such views may share a call: whole batches of the encoder, one at least."""
    if map_size == "frame":
        pixels = view.shape[0] * view.shape[1]
    elif map_size == "model":
        pixels = manifest.image_size**2
    else:
        pixels = map_size[0] * map_size[1]
    rows, columns = manifest.map.grid
    tokens = len(manifest.feature_layers) * rows * columns * manifest.dimensions
    # Tokens of many calls are put together, which holds them twice; a pixel is an anomaly and a type.
    each = 2 * tokens * np.dtype(np.float32).itemsize + pixels * (np.dtype(np.float32).itemsize + 1)
    return max(1, CALL_BYTES // each // manifest.batch) * manifest.batch
