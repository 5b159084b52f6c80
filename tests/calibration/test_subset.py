"""The pool of far-apart frames against farthest-point clustering with every frame at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from dapo_edge.calibration.subset import FarthestPool, diverse_subset, in_groups

View = NDArray[np.uint8]


def numbered(count: int) -> list[View]:
    return [np.full((1, 1, 3), number, np.uint8) for number in range(count)]


def vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Embeddings in clusters of uneven size, not of unit length."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, 16))
    chosen = rng.choice(12, count, p=np.arange(1, 13) / 78)
    return ((centres[chosen] + 0.2 * rng.standard_normal((count, 16))) * rng.uniform(0.5, 9, (count, 1))).astype(
        np.float32
    )


def nearest(embeddings: NDArray[np.float32], members: Sequence[int]) -> float:
    """Smallest distance (1 - cosine) between two members."""
    units = embeddings[list(members)] / np.linalg.norm(embeddings[list(members)], axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -1)
    return float(1 - cosines.max())


def greedy(embeddings: NDArray[np.float32], count: int) -> list[int]:
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    members, distance = [0], 1 - units @ units[0]
    while len(members) < count:
        members.append(int(distance.argmax()))
        distance = np.minimum(distance, 1 - units @ units[members[-1]])
    return members


def members_of(pool: FarthestPool) -> list[int]:
    return [int(view[0, 0, 0]) for view in pool.views()]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [2, 3, 12, 40])
def test_the_smallest_distance_never_falls_and_ends_near_the_best(seed: int, capacity: int) -> None:
    embeddings = vectors(250, seed)
    pool, last = FarthestPool(capacity), 0.0
    for number, view in enumerate(numbered(250)):
        pool.offer(view, embeddings[number])
        members = members_of(pool)
        assert members == sorted(set(members))
        if number >= capacity:
            distance = nearest(embeddings, members)
            assert distance >= last - 1e-6
            last = distance
    assert len(pool) == capacity
    assert last >= 0.5 * nearest(embeddings, greedy(embeddings, capacity))
    if capacity >= 12:  # three frames may be far apart by chance
        assert last > nearest(embeddings, [place * 250 // capacity for place in range(capacity)])


def test_every_cluster_is_represented() -> None:
    rng = np.random.default_rng(1)
    rare = np.eye(10, dtype=np.float32)[1:]
    common = np.eye(10, dtype=np.float32)[0] + 0.02 * rng.standard_normal((191, 10)).astype(np.float32)
    embeddings = np.concatenate([common[:100], rare, common[100:]])
    pool = FarthestPool(12)
    for number, view in enumerate(numbered(200)):
        pool.offer(view, embeddings[number])
    assert set(range(100, 109)) < set(members_of(pool))


def test_equal_frames_change_nothing() -> None:
    pool = FarthestPool(3)
    for view in numbered(20):
        pool.offer(view, np.array([0.3, 0.4], np.float32))
    assert members_of(pool) == [0, 1, 2]


@pytest.mark.parametrize(("capacity", "count"), [(1, 5), (7, 7), (9, 4), (5, 0)])
def test_small_numbers(capacity: int, count: int) -> None:
    embeddings = vectors(9)
    found = diverse_subset(numbered(count), capacity, lambda views: embeddings[[int(view[0, 0, 0]) for view in views]])
    assert [int(view[0, 0, 0]) for view in found] == list(range(min(capacity, count)))


def test_the_batch_does_not_change_the_choice() -> None:
    embeddings, sizes = vectors(100), []

    def embed(views: Sequence[View]) -> NDArray[np.float32]:
        sizes.append(len(views))
        return embeddings[[int(view[0, 0, 0]) for view in views]]

    alone = diverse_subset(iter(numbered(100)), 8, embed)
    assert sizes == [1] * 100
    together = diverse_subset(iter(numbered(100)), 8, embed, batch=32)
    assert sizes[100:] == [32, 32, 32, 4]
    np.testing.assert_array_equal(alone, together)


def test_groups() -> None:
    assert [len(group) for group in in_groups(numbered(7), 3)] == [3, 3, 1]
    assert list(in_groups([], 3)) == []
