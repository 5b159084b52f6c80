"""The patch kernel on the CPU against `reference.patch_probabilities`, on the same FP16 tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_runs import BARRIERS, check_barrier, check_sanitized, patch_run
from numpy.typing import NDArray

from dapo_edge.kernels import launch, reference

# The bank is kept in FP16 on the GPU. With the same rounded bank only the order of the sums differs.
BOUND = 2e-3
ROUNDING = 5e-6
# Batch, layers, patches, dimensions, types, temperature
SHAPES = [
    (1, 1, 1, 8, 1, 0.07),
    (3, 2, 30, 48, 20, 0.01),
    (1, 3, 16, 48, 64, 0.07),
    (1, 4, 33, 512, 20, 0.01),
    (3, 4, 7, 768, 1, 0.01),
    (1, 4, 37, 768, 20, 0.07),
    (1, 4, 50, 1280, 64, 0.01),
    (1, 8, 17, 1280, 20, 0.07),
    (2, 1, 100, 8, 64, 0.07),
]


def tokens_of(*shape: int) -> NDArray[np.float16]:
    return (3 * np.random.default_rng(shape).standard_normal(shape)).astype(np.float16)


def bank_of(types: int, dimensions: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(types).standard_normal((types + 1, dimensions))
    return reference.normalise(rows.astype(np.float32))


def expected(tokens: NDArray[np.float16], bank: NDArray[Any], temperature: float) -> NDArray[np.float32]:
    """[B, K+1, N]"""
    grid = (1, tokens.shape[2])
    return reference.patch_probabilities(tokens.astype(np.float32), bank.astype(np.float32), temperature, grid)[:, :, 0]


def check(found: NDArray[np.float32], tokens: NDArray[np.float16], bank: NDArray[Any], temperature: float) -> None:
    np.testing.assert_allclose(found, expected(tokens, bank, temperature), rtol=0, atol=BOUND)
    np.testing.assert_allclose(
        found, expected(tokens, bank.astype(np.float16), temperature), rtol=0, atol=ROUNDING, err_msg="same bank"
    )
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("batch", "layers", "patches", "dimensions", "types", "temperature"), SHAPES)
def test_probabilities_are_the_references(
    batch: int, layers: int, patches: int, dimensions: int, types: int, temperature: float
) -> None:
    tokens, bank = tokens_of(batch, layers, patches, dimensions), bank_of(types, dimensions)
    check(patch_run(tokens, bank, temperature).here()[0], tokens, bank, temperature)


@pytest.mark.parametrize("layers", range(1, launch.MAX_LAYERS + 1))
def test_the_mean_is_over_every_layer(layers: int) -> None:
    tokens, bank = tokens_of(1, layers, 19, 40), bank_of(5, 40)
    check(patch_run(tokens, bank, 0.07).here()[0], tokens, bank, 0.07)


def test_a_clear_answer_is_near_one() -> None:
    """Tokens that are rows of the bank: the type is found, so the columns of tokens and bank belong together."""
    bank = bank_of(20, 136)
    tokens = np.broadcast_to(bank[:20] * 5, (1, 2, 20, 136)).astype(np.float16)
    found = patch_run(tokens, bank, 0.01).here()[0][0]
    np.testing.assert_array_equal(found.argmax(axis=0), np.arange(20))
    assert found.max(axis=0).min() > 0.99


def test_zero_tokens_say_nothing() -> None:
    tokens, bank = tokens_of(1, 3, 20, 48), bank_of(6, 48)
    tokens[0, :, 4] = 0
    tokens[0, 1, 5] = 0  # in one layer only
    found = patch_run(tokens, bank, 0.01).here()[0]
    np.testing.assert_allclose(found[0, :, 4], 1 / 7, rtol=0, atol=1e-6)
    check(found, tokens, bank, 0.01)


@pytest.mark.parametrize("size", [6e4, 1e-6])
@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_the_length_of_a_token_does_not_matter(size: float, temperature: float) -> None:
    """6e4 is near the largest half, 1e-6 has one or two bits."""
    signs = np.sign(np.random.default_rng(3).standard_normal((1, 2, 18, 1280)))
    tokens, bank = (size * signs).astype(np.float16), bank_of(20, 1280)
    found = patch_run(tokens, bank, temperature).here()[0]
    check(found, tokens, bank, temperature)
    ordinary = patch_run(signs.astype(np.float16), bank, temperature).here()[0]
    np.testing.assert_allclose(found, ordinary, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("patch", [0, 17, 20])
def test_a_broken_token_stays_visible_and_spoils_no_other(value: float, patch: int) -> None:
    tokens, bank = tokens_of(2, 4, 21, 48), bank_of(20, 48)
    whole = patch_run(tokens, bank, 0.07).here()[0]
    tokens[1, 2, patch, 33] = value
    found = patch_run(tokens, bank, 0.07).here()[0]
    broken = np.zeros(found.shape, np.bool_)
    broken[1, :, patch] = True
    assert np.isnan(found[broken]).all()
    np.testing.assert_array_equal(found[~broken], whole[~broken])


@pytest.mark.parametrize("layers", [1, 3, 4])
@pytest.mark.parametrize("patches", [17, 33, 64])
def test_both_block_shapes_give_the_same_bits(layers: int, patches: int) -> None:
    tokens, bank = tokens_of(2, layers, patches, 72), bank_of(20, 72)
    one, two = patch_run(tokens, bank, 0.07, together=1), patch_run(tokens, bank, 0.07, together=2)
    assert (one.launch.block, two.launch.block) == ((32, layers, 1), (32, layers, 2))
    np.testing.assert_array_equal(one.here()[0], two.here()[0])


def test_the_order_of_threads_does_not_matter() -> None:
    tokens, bank = tokens_of(2, 4, 37, 136), bank_of(64, 136)
    for together in (1, 2):
        first, *others = (patch_run(tokens, bank, 0.07, together).here(order)[0] for order in (0, 1, 7))
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_a_bank_is_swapped_under_the_same_job() -> None:
    """As under a captured graph: number of types, rows and temperature are read from the buffer."""
    tokens = tokens_of(2, 3, 21, 48)
    run = patch_run(tokens, bank_of(64, 48), 0.07)
    probs, _, buffer = run.buffers
    for types, temperature in ((64, 0.07), (3, 0.01), (20, 0.05), (64, 0.07)):
        bank = bank_of(types, 48)
        buffer[...] = np.frombuffer(launch.bank_bytes(bank, temperature), np.uint8)
        probs[...] = np.nan
        run.here()
        count = 2 * (types + 1) * 21
        check(probs.ravel()[:count].reshape(2, types + 1, 21), tokens, bank, temperature)
        assert np.isnan(probs.ravel()[count:]).all()


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize(("patches", "types", "together"), [(17, 64, 1), (33, 9, 2)])
def test_sanitizers_find_nothing(patches: int, types: int, together: int, sanitizer: str) -> None:
    """168 dimensions: two parts of the bank, the second one not full. 64 types: up to the bank's last row."""
    check_sanitized(patch_run(tokens_of(1, 2, patches, 168), bank_of(types, 168), 0.07, together), sanitizer)


@pytest.mark.parametrize("barrier", [name for name in BARRIERS if name.startswith("patch")])
def test_without_a_barrier_threads_race(barrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_barrier(patch_run(tokens_of(1, 2, 49, 168), bank_of(9, 168), 0.07), barrier, monkeypatch)
