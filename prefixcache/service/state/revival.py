"""Revival: what of an earlier life's manifest still holds.

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

from prefixcache.core.graft import Run as Graft
from prefixcache.service.state.keeper import Stored, describe
from prefixcache.service.state.manifest import Manifest, Run
from prefixcache.service.state.stamps import Stamps
from prefixcache.service.state.sums import Sums
from prefixcache.types import TOKEN_BYTES, Namespace

_Sizes = npt.NDArray[np.int64]


class Revival(NamedTuple):
    """What was found."""

    runs: list[Graft]
    """For the tree, parents first."""
    kept: list[tuple[int, npt.NDArray[np.int32]]]
    """The rows that these are, and which of their blocks hold."""
    lost: list[int]
    """Rows of which nothing holds."""
    num_doubtful: int
    """Blocks whose stamp holds and whose checksum does not: damaged."""
    namespaces: dict[int, Namespace]


def revive(
    manifest: Manifest, stamps: Stamps, sums: Sums, block_size: int, *, tails: bool
) -> Revival:
    """Read the manifest and check every entry of it against the pool.  Reads all that is kept.

    Args:
        manifest: of this pool.
        stamps: of this pool.
        sums: over this pool.
        block_size: tokens of a block.
        tails: whether partly filled blocks are wanted.

    Raises:
        sqlite3.Error: the manifest cannot be read.
    """
    width = block_size * TOKEN_BYTES
    namespaces = manifest.namespaces()
    rows = manifest.runs()
    num_blocks = len(stamps.blocks)
    resets = stamps.resets
    sound = [
        Run(*row)
        for row in rows
        if _is_sound(row, width, num_blocks) and row[1] in namespaces and row[2] == resets[row[1]]
    ]
    by_fill: dict[int, list[Run]] = {}
    for run in sound:
        by_fill.setdefault(min(len(run.tokens), width) // TOKEN_BYTES, []).append(run)
    sizes: dict[int, int] = {}
    num_doubtful = 0
    for fill, group in by_fill.items():
        if fill < block_size and not tails:
            continue
        lengths, doubtful = _check(group, fill, stamps, sums)
        num_doubtful += doubtful
        sizes.update(zip((run.id for run in group), lengths.tolist(), strict=True))
    runs, kept = [], []
    seen = np.zeros(num_blocks, bool)
    for run in sound:
        size = sizes.get(run.id, 0)
        blocks = np.frombuffer(run.blocks, np.int32)[:size]
        if not size or seen[blocks].any():
            continue  # two rows for one block: nobody wrote that
        seen[blocks] = True
        graft = Graft(
            namespaces[run.namespace],
            run.parent,
            run.tokens[: size * width],
            array("i", run.blocks[: 4 * size]),
        )
        runs.append(graft)
        kept.append((run.id, blocks))
    holding = {number for number, _ in kept}
    lost = [row[0] for row in rows if row[0] not in holding]
    return Revival(runs, kept, lost, num_doubtful, namespaces)


def _is_sound(row: tuple[Any, ...], width: int, num_blocks: int) -> bool:
    """Whether a row has the types and lengths that were written."""
    number, namespace, resets, parent, parent_stamp, tokens, blocks, stamps, sums = row
    for value in (number, namespace, resets, parent, parent_stamp):
        if value.__class__ is not int:
            return False
    for part in (tokens, blocks, stamps, sums):
        if part.__class__ is not bytes:
            return False
    size = len(blocks)
    return (
        0 < size == len(stamps)
        and len(sums) == 2 * size
        and size == 4 * -(-len(tokens) // width)
        and (len(tokens) % width == 0 or (size == 4 and len(tokens) % TOKEN_BYTES == 0))
        and -1 <= parent < num_blocks
        and 0 <= parent_stamp < 2**32
    )


def _check(group: list[Run], fill: int, stamps: Stamps, sums: Sums) -> tuple[_Sizes, int]:
    """Check rows whose blocks are filled alike.

    Returns:
        How many leading blocks of each hold, and how many blocks are damaged.
    """
    facts, tokens = describe([Stored(*run[1:8]) for run in group], fill)
    noted = np.frombuffer(b"".join([run.sums for run in group]), np.uint64)
    num_blocks = len(stamps.blocks)
    blocks = facts[:, 0]
    holds = blocks < num_blocks
    holds &= stamps.blocks[np.where(holds, blocks, 0)] == facts[:, 1]
    holds &= facts[:, 1] % 2 == 0
    due = np.flatnonzero(holds)
    wrong = sums.of_many(facts[due], tokens[due]) != noted[due]
    holds[due[wrong]] = False
    counts = np.array([len(run.blocks) // 4 for run in group], np.int64)
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    places = np.where(holds, len(holds), np.arange(len(holds)))
    first_bad = np.minimum.reduceat(places, starts)
    lengths = np.minimum(first_bad - starts, counts)
    parents = np.array([run.parent for run in group], np.int64)
    parent_stamps = np.array([run.parent_stamp for run in group], np.int64)
    orphans = (parents >= 0) & (stamps.blocks[np.maximum(parents, 0)] != parent_stamps)
    lengths[orphans] = 0
    return lengths, int(wrong.sum())
