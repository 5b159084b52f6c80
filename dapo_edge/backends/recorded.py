"""Eager torch where there is no torch: what it made of some views at build time, played back to judge an encoder by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from dapo_edge import gate
from dapo_edge.backends.base import Backend, MapBatch, MapSize, View, map_pixels
from dapo_edge.backends.host import make_maps
from dapo_edge.errors import PackageIncompatible
from dapo_edge.gate import Drift
from dapo_edge.package import EnginePackage, Thresholds
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.reference_data import ReferenceData

NO_REFERENCE = "Build it again with this dapo-edge: dapo-edge build RECIPE"


class RecordedBackend:
    """Plays back what eager torch made of the stored views, through the map arithmetic of `reference.py`."""

    name = "recorded"
    device = "recorded at build time"
    concurrency = 1
    takes_camera_bytes = False
    precision = "fp32"

    def __init__(self, package: EnginePackage, data: ReferenceData) -> None:
        self.bank = package.bank()
        self._spec = package.manifest.map
        self._data = data
        self._place = {view.tobytes(): place for place, view in enumerate(data.views)}

    @classmethod
    def open(
        cls, package: EnginePackage, *, map_size: MapSize, precision: str | None = None, throughput: bool = False
    ) -> Self:
        """Of a package that has a reference."""
        data = package.reference()
        if data is None:
            raise PackageIncompatible(f"'{package.path}' carries no reference", NO_REFERENCE)
        return cls(package, data)

    def encode(self, views: Sequence[View]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Tokens and embeddings of stored views; raises `KeyError` for any other."""
        places = [self._place[np.ascontiguousarray(view).tobytes()] for view in views]
        return self._data.tokens[places].astype(np.float32), self._data.embeddings[places]

    def infer(self, views: Sequence[View], *, map_size: MapSize | None = None) -> MapBatch:
        """Maps of stored views, at the encoder's size unless `map_size` says otherwise."""
        tokens, embedding = self.encode(views)
        size = map_pixels(map_size or "model", self._spec.image_size, views)
        return make_maps(tokens, embedding, self.bank, self._spec, size).batch(self.bank, {"encode": 0.0})

    def set_bank(self, bank: PromptBank) -> None:
        """Compare with other words from the next call on."""
        self.bank = bank

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def drift_on_reference(
    package: EnginePackage,
    data: ReferenceData,
    backend: Backend,
    thresholds: Thresholds,
    on_view: Callable[[int], None] = lambda done: None,
) -> Drift:
    """How far a backend is from eager torch on the views that travel with the package."""
    views = list(data.views)
    with RecordedBackend(package, data) as recorded:
        expected = gate.expectations(recorded, views, len(views), thresholds)
    found = gate.measure_drift(
        expected, {"it": backend}, views, thresholds, lambda index, view, truth, batches: on_view(index + 1)
    )
    return found["it"]
