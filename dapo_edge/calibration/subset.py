"""A diverse subset of a long recording, picked in one pass: the frames whose image embeddings lie farthest apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Resized = NDArray[np.uint8]  # [S, S, 3] BGR
Embed = Callable[[Sequence[Resized]], NDArray[np.float32]]  # views to image embeddings [B, D]


class FarthestPool:
    """Keeps at most `capacity` views that are as different from each other as a single pass allows.

    The criterion is that of farthest-point clustering (Gonzalez, "Clustering to minimize the maximum intercluster
    distance", 1985), which needs every frame at once. Here the frames come one by one: a full pool takes a new one that
    is farther from all of its members than its two closest members are from each other, and drops one of these two. So
    the smallest distance within the pool never falls. Memory is that of the pool; a frame costs O(capacity) but for the
    few members whose nearest neighbour was dropped, each of which costs as much again.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._views: list[Resized] = []
        self._arrivals: list[int] = []
        self._offered = 0
        self._units: NDArray[np.float32] = np.empty((0, 0), np.float32)  # [capacity, D], unit rows
        self._nearest: NDArray[np.int64] = np.zeros(capacity, np.int64)  # which other member is closest to each
        self._cosine: NDArray[np.float32] = np.full(capacity, -np.inf, np.float32)  # and how close it is

    def __len__(self) -> int:
        return len(self._views)

    def offer(self, view: Resized, embedding: NDArray[np.float32]) -> None:
        """Look at a view and its image embedding [D], of any length but 0."""
        unit = embedding / np.linalg.norm(embedding)
        if not self._views:
            self._units = np.empty((self._capacity, len(unit)), np.float32)
        cosines = self._units[: len(self)] @ unit
        arrival, self._offered = self._offered, self._offered + 1
        if len(self) < self._capacity:
            self._views.append(view)
            self._arrivals.append(arrival)
            self._enter(len(self) - 1, unit, cosines)
        elif self._capacity > 1 and cosines.max() < self._cosine.max():
            place = self._to_drop()
            self._views[place], self._arrivals[place] = view, arrival
            cosines[place] = -np.inf
            self._enter(place, unit, cosines)
            for orphan in np.flatnonzero(self._nearest == place):
                if orphan != place:
                    self._look_again(int(orphan))

    def views(self) -> list[Resized]:
        """The members, in the order in which they were offered."""
        return [self._views[place] for place in np.argsort(self._arrivals)]

    def _enter(self, place: int, unit: NDArray[np.float32], cosines: NDArray[np.float32]) -> None:
        """Note a member at `place`, whose cosines with the members are known; its own entry, if any, is -inf."""
        self._units[place] = unit
        self._cosine[place] = cosines.max(initial=-np.inf)
        self._nearest[place] = int(cosines.argmax()) if len(cosines) else place
        closer = np.flatnonzero(cosines > self._cosine[: len(cosines)])
        self._nearest[closer], self._cosine[closer] = place, cosines[closer]

    def _look_again(self, place: int) -> None:
        cosines = self._others(place)
        self._nearest[place], self._cosine[place] = int(cosines.argmax()), cosines.max()

    def _to_drop(self) -> int:
        """Of the two closest members, the one that is also closer to a third."""
        first = int(self._cosine.argmax())
        second = int(self._nearest[first])
        thirds = []
        for place, other in ((first, second), (second, first)):
            cosines = self._others(place)
            cosines[other] = -np.inf
            thirds.append(cosines.max())
        return first if thirds[0] >= thirds[1] else second

    def _others(self, place: int) -> NDArray[np.float32]:
        cosines: NDArray[np.float32] = self._units[: len(self)] @ self._units[place]
        cosines[place] = -np.inf
        return cosines


def diverse_subset(views: Iterable[Resized], capacity: int, embed: Embed, batch: int = 1) -> list[Resized]:
    """At most `capacity` of the views, as different from each other as one pass allows, in their own order.

    `embed` is called with `batch` views at a time. Equal views give an equal choice.
    """
    pool = FarthestPool(capacity)
    for group in in_groups(views, batch):
        for view, embedding in zip(group, embed(group), strict=True):
            pool.offer(view, embedding)
    return pool.views()


def in_groups(views: Iterable[Resized], size: int) -> Iterator[list[Resized]]:
    """The views, `size` at a time; the last group may be smaller."""
    group: list[Resized] = []
    for view in views:
        group.append(view)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
