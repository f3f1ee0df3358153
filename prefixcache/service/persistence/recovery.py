"""Recovery: what of an earlier life's manifest still holds.

```
rows ─► sound? ─► stamps as noted? ─► checksums right? ─► each run up to its first doubtful block
```
What is torn, foreign, evicted since or written to since falls out on this way, and becomes a miss.
All checks but the first are a few calls over all blocks at once.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prefixcache.core.bulk_load import StoredRun
from prefixcache.service.persistence.checksums import Checksums
from prefixcache.service.persistence.manifest import MAX_RUN, Manifest
from prefixcache.service.persistence.stamps import MAX_NAMESPACES, Stamps
from prefixcache.service.persistence.writer import describe
from prefixcache.types import TOKEN_BYTES, Namespace

_Sizes = npt.NDArray[np.int64]


class Recovery(NamedTuple):
    """What was found."""

    runs: list[StoredRun]
    """For the tree, parents first."""
    kept: list[tuple[int, npt.NDArray[np.int32]]]
    """The rows that these are, and which of their blocks hold."""
    lost: list[int]
    """Rows of which nothing holds."""
    num_doubtful: int
    """Blocks whose stamp holds and whose checksum does not: damaged."""
    namespaces: dict[int, Namespace]


class _Columns(NamedTuple):
    """Rows as columns, so that a check is one call for all of them."""

    heads: _Sizes
    """`[rows, 5]`: id, namespace, its resets, the block before, that block's stamp."""
    counts: _Sizes
    """Blocks of each row."""
    tokens: list[bytes]
    blocks: npt.NDArray[np.uint32]
    stamps: npt.NDArray[np.uint32]
    sums: npt.NDArray[np.uint64]

    def take(self, wanted: npt.NDArray[np.bool_]) -> _Columns:
        """Give some of the rows."""
        of_blocks = np.repeat(wanted, self.counts)
        tokens = [part for part, one in zip(self.tokens, wanted.tolist(), strict=True) if one]
        return _Columns(
            self.heads[wanted],
            self.counts[wanted],
            tokens,
            self.blocks[of_blocks],
            self.stamps[of_blocks],
            self.sums[of_blocks],
        )


def recover(
    manifest: Manifest,
    stamps: Stamps,
    sums: Checksums,
    block_size: int,
    *,
    first_block: int = 0,
    tails: bool,
) -> Recovery:
    """Read the manifest and check every entry of it against the pool.  Reads all that is kept.

    Args:
        manifest: of this pool.
        stamps: of this pool.
        sums: over this pool.
        block_size: tokens of a block.
        first_block: blocks below are never lent.
        tails: whether partly filled blocks are wanted.

    Raises:
        sqlite3.Error: the manifest cannot be read.
    """
    width = block_size * TOKEN_BYTES
    namespaces = manifest.namespaces()
    rows = manifest.runs()
    columns = _read([row for row in rows if _is_sound(row, width)])
    known = np.zeros(MAX_NAMESPACES, bool)
    known[list(namespaces)] = True
    fills = np.array([min(len(part), width) // TOKEN_BYTES for part in columns.tokens], np.int64)
    numbers, resets, parents, parent_stamps = columns.heads[:, 1:].T
    wanted = known[numbers] & (stamps.resets[numbers] == resets) & (parents < len(stamps.blocks))
    safe = np.where(wanted & (parents >= 0), parents, 0)
    wanted &= (parents < 0) | (stamps.blocks[safe] == parent_stamps)
    if not tails:
        wanted &= fills == block_size
    columns, fills = columns.take(wanted), fills[wanted]
    holds = np.zeros(len(columns.blocks), bool)
    num_doubtful = 0
    for fill in np.unique(fills).tolist():
        group = fills == fill
        found, doubtful = _check(columns.take(group), fill, stamps, sums, first_block)
        holds[np.repeat(group, columns.counts)] = found
        num_doubtful += doubtful
    blocks, times = np.unique(columns.blocks[holds], return_counts=True)
    if (times > 1).any():  # two entries for one block: nobody wrote that
        holds &= ~np.isin(columns.blocks, blocks[times > 1])
    return _gather(columns, holds, width, namespaces, rows, num_doubtful)


def _is_sound(row: tuple[Any, ...], width: int) -> bool:
    """Whether a row has the types and lengths that were written."""
    number, namespace, resets, parent, parent_stamp, tokens, blocks, stamps, sums = row
    if not (
        number.__class__ is namespace.__class__ is resets.__class__ is int
        and parent.__class__ is parent_stamp.__class__ is int
        and tokens.__class__ is blocks.__class__ is stamps.__class__ is sums.__class__ is bytes
    ):
        return False
    size, filled = len(blocks), len(tokens)
    return (
        0 < size == len(stamps)
        and len(sums) == 2 * size
        and size == 4 * -(-filled // width)
        and (filled % width == 0 or (size == 4 and filled % TOKEN_BYTES == 0))
        and 0 < number < MAX_RUN
        and 0 <= namespace < MAX_NAMESPACES
        and 0 <= resets < 2**32
        and 0 <= parent_stamp < 2**32
        and -1 <= parent < 2**31
    )


def _read(rows: list[tuple[Any, ...]]) -> _Columns:
    blocks = [row[6] for row in rows]
    heads = np.array([row[:5] for row in rows], np.int64).reshape(len(rows), 5)
    return _Columns(
        heads,
        np.array([len(part) for part in blocks], np.int64) // 4,
        [row[5] for row in rows],
        np.frombuffer(b"".join(blocks), np.uint32),
        np.frombuffer(b"".join([row[7] for row in rows]), np.uint32),
        np.frombuffer(b"".join([row[8] for row in rows]), np.uint64),
    )


def _check(
    rows: _Columns, fill: int, stamps: Stamps, sums: Checksums, first_block: int
) -> tuple[npt.NDArray[np.bool_], int]:
    """Check rows whose blocks are filled alike.

    Returns:
        Which blocks hold, and how many are damaged: as stamped, but other bytes.
    """
    facts, tokens = describe(
        rows.heads[:, 1:], rows.counts, rows.blocks, rows.stamps, b"".join(rows.tokens), fill
    )
    holds = (rows.blocks >= first_block) & (rows.blocks < len(stamps.blocks))
    holds &= stamps.blocks[np.where(holds, rows.blocks, 0)] == rows.stamps
    holds &= rows.stamps % 2 == 0
    due = np.flatnonzero(holds)
    wrong = sums.of_many(facts[due], tokens[due]) != rows.sums[due]
    holds[due[wrong]] = False
    return holds, int(wrong.sum())


def _gather(
    columns: _Columns,
    holds: npt.NDArray[np.bool_],
    width: int,
    namespaces: dict[int, Namespace],
    rows: list[tuple[Any, ...]],
    num_doubtful: int,
) -> Recovery:
    """Cut each row before its first block that does not hold."""
    ends = np.cumsum(columns.counts)
    starts = ends - columns.counts
    places = np.where(holds, len(holds), np.arange(len(holds)))
    sizes = columns.counts
    if len(sizes):
        sizes = np.minimum(np.minimum.reduceat(places, starts) - starts, sizes)
    ids, numbers, _, parents, _ = columns.heads.T.tolist() if len(sizes) else ([],) * 5
    blocks = columns.blocks.astype(np.int32)
    raw = blocks.tobytes()
    runs, kept = [], []
    for number, space, parent, tokens, size, start in zip(
        ids, numbers, parents, columns.tokens, sizes.tolist(), starts.tolist(), strict=True
    ):
        if size:
            end = start + size
            table = array("i", raw[4 * start : 4 * end])
            runs.append(StoredRun(namespaces[space], parent, tokens[: size * width], table))
            kept.append((number, blocks[start:end]))
    holding = {number for number, _ in kept}
    lost = [row[0] for row in rows if row[0] not in holding]
    return Recovery(runs, kept, lost, num_doubtful, namespaces)
