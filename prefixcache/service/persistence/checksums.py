"""Checksums of blocks: over their pages in the pool, and over what is said of them.

Multilinear hashing (Lemire and Kaser, *Strongly universal string hashing is fast*, 2014): 32-bit
words times random 64-bit weights, summed modulo 2**64.  Two different contents agree with a
probability of at most 2**-33, whichever words differ.  It is a checksum against accidents, not a
signature; and unlike a CRC it is computed for many blocks in one call, at the speed of memory.

```
sum(block) = Σ planes  m[plane] · Σ words  w[word] · pool[plane][block][word]
           + Σ tokens  t[i] · token[i]  +  Σ facts  f[i] · fact[i]      place, stamps, namespace
```

A partly filled block is summed as a whole, too: where in a page its tokens lie, only those know who
wrote them.  That is sound, for it is summed when the last right to write to it has ended.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt

from prefixcache.pool import pages_of
from prefixcache.types import PoolHandle

Words = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]

NUM_FACTS: Final = 7
"""Block, stamp, parent, the parent's stamp, namespace, its resets, tokens in the block."""

_CHUNK_BYTES: Final = 8 * 2**20
"""What one call looks at: small enough for the caches that are shared with the workers."""


class Checksums:
    """Computes checksums over one mapped pool.  Safe to use from several threads.

    Args:
        memory: the mapped pool, with its header.
        handle: where and what the blocks are.
        seed: of the weights; the same for as long as the sums are kept.
    """

    def __init__(self, memory: mmap.mmap | bytearray, handle: PoolHandle, seed: int) -> None:
        odd = handle.page_bytes % 4
        word = np.uint32 if odd == 0 else np.uint16 if odd == 2 else np.uint8
        self._pool = pages_of(memory, handle).view(word)
        random = np.random.default_rng(seed)

        def weights(size: int) -> Hashes:
            drawn: Hashes = random.integers(0, 2**64, size, np.uint64)
            return drawn | np.uint64(1)

        self._words = weights(self._pool.shape[2])
        self._planes = weights(handle.planes)
        self._tokens = weights(handle.block_size)
        self._facts = weights(NUM_FACTS)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: its pages in all planes."""
        return int(self._pool.shape[0] * self._pool.shape[2] * self._pool.itemsize)

    def of(self, facts: Words, tokens: Words) -> Hashes:
        """Compute the sums of blocks that are filled alike.  Reads their pages; O(bytes).

        Args:
            facts: `[n, NUM_FACTS]`; the first column is the block.
            tokens: `[n, fill]`, the tokens in each block.
        """
        told: Hashes = np.einsum("ij,j->i", facts, self._facts, dtype=np.uint64, casting="safe")
        return told + self.of_contents(facts[:, 0], tokens)

    def of_contents(self, blocks: Words, tokens: Words) -> Hashes:
        """Compute the sums of blocks by what is in them alone, wherever they lie; as `of`.

        Args:
            blocks: `[n]`, their ids.
            tokens: `[n, fill]`, the tokens in each.
        """
        sums: Hashes = np.einsum(
            "ij,j->i", tokens, self._tokens[: tokens.shape[1]], dtype=np.uint64, casting="safe"
        )
        step = max(1, _CHUNK_BYTES // self.block_bytes)
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            low, high = int(part[0]), int(part[-1]) + 1
            ascends = high - low == len(part) and bool((np.diff(part.astype(np.int64)) == 1).all())
            for plane, weight in zip(self._pool, self._planes, strict=True):
                rows = plane[low:high] if ascends else plane[part]
                inner = np.einsum("ij,j->i", rows, self._words, dtype=np.uint64, casting="safe")
                sums[start : start + step] += inner * weight
        return sums

    def of_many(self, facts: Words, tokens: Words) -> Hashes:
        """Compute like `of`, on all cores, in the order of memory."""
        if len(facts) * self.block_bytes < _CHUNK_BYTES:
            return self.of(facts, tokens)
        order = np.argsort(facts[:, 0], kind="stable")
        sums = np.empty(len(order), np.uint64)
        cuts = max(1, min(len(order), 8 * (os.cpu_count() or 1)))

        def work(part: npt.NDArray[np.int64]) -> None:
            sums[part] = self.of(facts[part], tokens[part])

        with ThreadPoolExecutor(os.cpu_count(), "checksums") as threads:
            parts: Iterator[npt.NDArray[np.int64]] = iter(np.array_split(order, cuts))
            for _ in threads.map(work, (part for part in parts if len(part))):
                pass
        return sums

    def close(self) -> None:
        """Let go of the pool."""
        self._pool = self._pool[:0].copy()
