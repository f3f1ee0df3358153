"""A random packed batch over a paged pool, for the kernel benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of a model's attention."""

    query: int
    key: int
    dim: int

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.dim**-0.5)

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.key * self.dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Batch:
    """What `paged_attention` takes; tables are a random permutation of the pool."""

    heads: Heads
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor
    contexts: list[int]
    queries: int
    """Of each sequence."""

    @classmethod
    def random(
        cls,
        heads: Heads,
        contexts: list[int],
        size: int,
        *,
        queries: int = 1,
        shared: int = 0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Make one.

        Args:
            heads: Of the model.
            contexts: Keys of each sequence, its queries included.
            size: Tokens of a block.
            queries: Of each sequence, its last tokens.
            shared: First blocks that all have in common.
            dtype: Of everything.
            device: Of everything.
        """
        num_seqs = len(contexts)
        width = -(-max(contexts) // size)
        own = width - shared
        ids = torch.randperm(shared + num_seqs * own, dtype=torch.int32, device=device)
        tables = torch.empty(num_seqs, width, dtype=torch.int32, device=device)
        tables[:, :shared] = ids[:shared]
        tables[:, shared:] = ids[shared:].view(num_seqs, own)
        shape = (len(ids), size, heads.key, heads.dim)
        key, value = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        for cache in (key, value):
            cache.normal_()
        starts = torch.arange(0, num_seqs + 1, dtype=torch.int32, device=device) * queries
        query = torch.randn(num_seqs * queries, heads.query, heads.dim, dtype=dtype, device=device)
        lens = torch.tensor(contexts, dtype=torch.int32, device=device)
        return cls(heads, query, key, value, tables, starts, lens, contexts, queries)

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `paged_attention`, in order."""
        return (
            *(self.query, self.key_cache, self.value_cache),
            *(self.block_tables, self.query_start, self.context_lens),
        )

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.key_cache.shape[1]

    @property
    def bytes_read(self) -> int:
        """Keys and values of all sequences, each counted for itself."""
        return sum(self.contexts) * self.heads.token_bytes(self.key_cache.dtype)

    def dense(self, row: int) -> tuple[Tensor, Tensor]:
        """Give one sequence's keys and values, `[context, kv_heads, dim]`: a copy."""
        table, context = self.block_tables[row].long(), self.contexts[row]
        key = self.key_cache[table].flatten(0, 1)[:context]
        return key, self.value_cache[table].flatten(0, 1)[:context]

    def plain(self, row: int) -> Tensor:
        """Give one decoding sequence's answer, `[heads, dim]`, by torch's attention in float32."""
        key, value = (x.float().transpose(0, 1)[None] for x in self.dense(row))
        query = self.query[row].float()[None, :, None]
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return out[0, :, 0]
