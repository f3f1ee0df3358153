"""What a token's keys and values are in these tests: bytes that follow from its whole prefix.

So every read can be verified, by whoever reads, without asking who wrote: a block that holds
anything else than exactly its own prefix, in its own namespace, is found out.
"""

from __future__ import annotations

import mmap
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from prefixcache.types import BlockTable, Copy, PoolHandle, pack

Slots = npt.NDArray[np.uint64]

_CHUNK = 64
"""Tokens that one digest covers."""


def expected(namespace: str, tokens: bytes, planes: int, words: int) -> Slots:
    """Give the pattern of each position: `[tokens, planes, words]`, 8 bytes a word.

    A running sum of products, seeded by digests over the prefix: equal only for equal prefixes.
    """
    ids = np.frombuffer(tokens, np.uint32).astype(np.uint64)
    count = len(ids)
    running = np.empty(count, np.uint64)
    digest = blake2b(namespace.encode(), digest_size=8)
    for start in range(0, count, _CHUNK):
        seed = np.uint64(int.from_bytes(digest.digest(), "little"))
        part = ids[start : start + _CHUNK]
        odd = np.arange(1, 2 * len(part), 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        running[start : start + _CHUNK] = seed + np.cumsum((part + np.uint64(1)) * odd)
        digest.update(tokens[4 * start : 4 * (start + _CHUNK)])
    spread = np.arange(1, planes * words + 1, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    return (running[:, None] ^ spread[None, :]).reshape(count, planes, words)


class Pool:
    """A mapped pool, read and written in patterns."""

    def __init__(self, memory: mmap.mmap, handle: PoolHandle) -> None:
        layout = handle.layout
        self.memory = memory
        self.handle = handle
        self.planes = 2 * layout.num_layers
        self.words = layout.token_bytes // self.planes // 8
        shape = (self.planes, handle.num_blocks * handle.block_size, self.words)
        count = shape[0] * shape[1] * shape[2]
        self.slots = np.frombuffer(memory, np.uint64, count, handle.offset).reshape(shape)

    def places(self, table: BlockTable, start: int, end: int) -> npt.NDArray[np.int64]:
        position = np.arange(start, end)
        size = self.handle.block_size
        blocks = np.frombuffer(table, np.int32).astype(np.int64)
        return blocks[position // size] * size + position % size

    def copy(self, copies: tuple[Copy, ...]) -> None:
        size = self.handle.block_size
        for copy in copies:
            source, target = copy.src * size, copy.dst * size
            count = copy.num_tokens
            self.slots[:, target : target + count] = self.slots[:, source : source + count]

    def write(self, namespace: str, tokens: bytes, table: BlockTable, start: int, end: int) -> None:
        wanted = expected(namespace, tokens[: 4 * end], self.planes, self.words)[start:]
        self.slots[:, self.places(table, start, end)] = wanted.transpose(1, 0, 2)

    def wrong(
        self, namespace: str, tokens: bytes, table: BlockTable, end: int, *, start: int = 0
    ) -> int:
        """Count the positions from `start` to `end` that hold anything but their own prefix."""
        slots = self.slots[:, self.places(table, start, end)]
        return self.wrong_in(slots, namespace, tokens[: 4 * end], start=start)

    def wrong_in(self, slots: Slots, namespace: str, tokens: bytes, *, start: int = 0) -> int:
        """Count the positions that hold anything else, of slots that lie in the tokens' order.

        From `start` on, which is that of the first slot.
        """
        wanted = expected(namespace, tokens, self.planes, self.words)[start:]
        return int((slots.transpose(1, 0, 2) != wanted).any((1, 2)).sum())


def prompt(*parts: tuple[int, int]) -> bytes:
    """Make tokens: for each part `(seed, count)`."""
    ids: list[int] = []
    for seed, count in parts:
        ids.extend(np.random.default_rng(seed).integers(0, 50_000, count).tolist())
    return pack(ids)
