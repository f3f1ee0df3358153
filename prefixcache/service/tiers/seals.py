"""Seals: a word over each slot's head, by which a start tells what is whole before it reads a slot.

What stands beside a slot says which prefix lies there, so it is believed only if all of it was
written together: one that is torn, has changed by itself, or is from another folder, whose weights
are others, is a slot that holds nothing.  As the sums over pages (`checksums.py`), it is a check
against accidents.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from prefixcache.service.tiers.slab import head_type

_OWN_WORDS: Final = 2
"""Words of the seal itself, at the beginning of a head."""


class Seals:
    """Seals heads, and looks at seals.

    Args:
        seed: Of the weights.
        block_size: Tokens of a block.
    """

    def __init__(self, seed: int, block_size: int) -> None:
        self._num_words = head_type(block_size).itemsize // 4
        drawn = np.random.PCG64([seed, 1]).random_raw(self._num_words)
        self._weights: npt.NDArray[np.uint64] = np.asarray(drawn, np.uint64) | np.uint64(1)
        self._weights[:_OWN_WORDS] = 0

    def put(self, heads: npt.NDArray[Any]) -> None:
        """Seal heads: `[n]`, in a row in memory.  O(n), in C."""
        heads["seal"] = self._of(heads)

    def hold(self, heads: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Say which heads are whole; one of zeros is.  Changes nothing.  O(n), in C."""
        found: npt.NDArray[np.bool_] = heads["seal"] == self._of(heads)
        return found

    def _of(self, heads: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        words = heads.view(np.uint32).reshape(len(heads), self._num_words)
        sums: npt.NDArray[np.uint64] = np.einsum(
            "ij,j->i", words, self._weights, dtype=np.uint64, casting="safe"
        )
        return sums
