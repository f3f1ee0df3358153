"""One step through the model: packed on tables that stay, with what its sequences share.

```
pieces ──► DeviceBatch of their store ──► Batch, with its GroupPlan ──► model ──► logits
            tables, lengths, plan           └──► what decoding read of the pool, per job
```
Sequences are read where their blocks lie, never through contiguous views: on a CPU attention in C
does that as fast as any other reads a view, which has to be mapped first (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prefixcache_kernels.groups import NEVER
from prefixcache_worker.batch import Batch, Piece
from prefixcache_worker.device_batch import DeviceBatch
from prefixcache_worker.job import Job
from prefixcache_worker.model import Model
from prefixcache_worker.reads import decode_reads
from prefixcache_worker.store import Store


class Forward:
    """Runs pieces of jobs through a model, and remembers their tables from step to step.

    Args:
        model: what computes.
        max_batch: jobs in hand at a time.
        grouped: read what sequences share once a step, where that pays.
    """

    def __init__(self, model: Model, max_batch: int, *, grouped: bool = True) -> None:
        self.model = model
        self.max_batch = max_batch
        self.grouped = grouped and not model.invariant
        self._batches: dict[int, tuple[Store, DeviceBatch]] = {}
        """By the store's id."""

    def run(
        self, store: Store, jobs: Sequence[Job], pieces: Sequence[tuple[Job, Piece]]
    ) -> tuple[list[tuple[Job, Piece]], Tensor]:
        """Run a step; fills the slots of its tokens.

        Args:
            store: where all of the jobs have their blocks.
            jobs: all that are in hand there, also those that wait in this step.
            pieces: what runs, each with its job.

        Returns:
            The pieces in the order in which they lay side by side, and float32 logits `[R, vocab]`
            of those that want them, in that order.
        """
        tables = self._tables(store)
        tables.keep(jobs)
        batch, order = tables.pack([job for job, _ in pieces], [piece for _, piece in pieces])
        ordered = [pieces[at] for at in order]
        logits = self.model.forward(batch, store.pool)
        self._count(batch, ordered, store.pool.block_size)
        return ordered, logits

    def keep(self, stores: Sequence[Store | None]) -> None:
        """Forget the tables of all other stores."""
        kept = {id(store) for store in stores}
        self._batches = {key: known for key, known in self._batches.items() if key in kept}

    def _tables(self, store: Store) -> DeviceBatch:
        if id(store) not in self._batches:
            pool = store.pool
            longest = -(-self.model.max_tokens // pool.block_size) or pool.num_blocks
            cost = self.model.sharing_cost(pool.block_size) if self.grouped else NEVER
            width = min(longest, pool.num_blocks)
            made = DeviceBatch(self.max_batch, width, pool.block_size, cost)
            self._batches[id(store)] = store, made
        return self._batches[id(store)][1]

    def _count(self, batch: Batch, pieces: Sequence[tuple[Job, Piece]], block_size: int) -> None:
        lengths = [piece.start + len(piece.tokens) for _, piece in pieces]
        model = self.model
        reads = decode_reads(lengths, batch.groups, block_size, model.layout, model.windows)
        for (job, piece), read in zip(pieces, reads, strict=True):
            if len(piece.tokens) == 1 + piece.num_drafts:
                job.kv_reads += read
