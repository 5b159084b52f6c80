"""Which blocks INT8 hurts, in the only currency that counts here: the defect map at every feature layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dapo_edge.backends.host import make_maps
from dapo_edge.engine.block_chain import BlockChain
from dapo_edge.errors import GateError
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.prompt_bank import PromptBank

Progress = Callable[[int, int], None]  # done, of


@dataclass(frozen=True)
class MapDifference:
    """How far anomaly maps, 0..1, are from those of the float encoder, over all search frames."""

    layers: tuple[float, ...]  # mean |difference| of the map of each feature layer alone
    combined: float  # mean |difference| of the map that the line sees, the mean over the layers
    largest: float  # |difference| of any pixel of the combined map

    @property
    def harm(self) -> float:
        """What candidates and blocks are ordered by: the mean over the feature layers.

        Layer by layer, because errors of two layers may cancel in the combined map of these few frames.
        """
        return float(np.mean(self.layers))


@dataclass(frozen=True)
class BlockSensitivity:
    """What one block in INT8, with all others in float, does to the maps."""

    block: int  # counted from 1
    difference: MapDifference

    @property
    def harm(self) -> float:
        """What blocks are ordered by."""
        return self.difference.harm


class MapMeter:
    """Measures mixtures of float and INT8 blocks against the float encoder, on the chain's own images."""

    def __init__(self, chain: BlockChain, bank: PromptBank, spec: MapSpec) -> None:
        """Raises `GateError` when the float encoder itself gives no numbers."""
        self.chain = chain
        self._bank = bank
        self._spec = spec
        self._float = self._maps(())
        if not np.isfinite(self._float).all():
            raise GateError(
                "the float encoder's maps hold NaN", "Check the weights of the backbone and of the tuned prompts"
            )

    def difference(self, int8: Collection[int]) -> MapDifference:
        """With these blocks, counted from 1, in INT8. NaN counts as a map that is wholly wrong."""
        found = np.abs(self._maps(int8) - self._float)
        np.nan_to_num(found, copy=False, nan=1.0)
        *layers, combined = found.mean(axis=(1, 2, 3), dtype=np.float64).tolist()
        return MapDifference(tuple(layers), combined, float(found[-1].max()))

    def _maps(self, int8: Collection[int]) -> NDArray[np.float32]:
        """Anomaly maps [L+1, F, S, S]: of each feature layer alone, then of all of them."""
        tokens, embedding = self.chain.encode(int8)
        size = (self._spec.image_size, self._spec.image_size)
        alone = [tokens[:, layer : layer + 1] for layer in range(tokens.shape[1])]
        return np.stack([make_maps(part, embedding, self._bank, self._spec, size).anomaly for part in (*alone, tokens)])


def block_sensitivities(meter: MapMeter, on_progress: Progress = lambda done, of: None) -> tuple[BlockSensitivity, ...]:
    """Put one block after the other into INT8, all others stay in float; blocks without INT8 are left out.

    The chain must know the INT8 encoder (`BlockChain.set_int8`).
    """
    blocks = meter.chain.quantized_blocks
    found = []
    for done, block in enumerate(blocks):
        on_progress(done, len(blocks))
        found.append(BlockSensitivity(block, meter.difference([block])))
    on_progress(len(blocks), len(blocks))
    return tuple(found)


def give_back_order(sensitivities: Iterable[BlockSensitivity]) -> tuple[int, ...]:
    """Blocks from the most to the least harmful; of equals the earlier one, which more feature layers see."""
    return tuple(item.block for item in sorted(sensitivities, key=lambda item: (-item.harm, item.block)))
