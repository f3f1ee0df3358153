"""What decoding reads of the pool: keys and values, with sharing and as it would be without.

```
alone    every sequence reads all of its keys
read     its own part, and of each run its share: blocks of the run / sequences that read it
```
Summed over a batch, the second is what attention really reads; layers with a window that cuts some
sequence count as unshared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prefixcache.types import Layout
from prefixcache_kernels import GroupPlan


@dataclass(frozen=True, slots=True)
class KvReads:
    """Bytes of keys and values.

    >>> KvReads(70.0, 100) + KvReads(30.0, 100)
    KvReads(read_bytes=100.0, alone_bytes=200)
    """

    read_bytes: float = 0.0
    alone_bytes: int = 0

    def __add__(self, other: KvReads) -> KvReads:
        """Sum up."""
        return KvReads(self.read_bytes + other.read_bytes, self.alone_bytes + other.alone_bytes)


def decode_reads(
    lengths: Sequence[int],
    groups: GroupPlan,
    block_size: int,
    layout: Layout,
    windows: Sequence[int | None],
) -> list[KvReads]:
    """Tell what each sequence of a step reads in all layers, by position.  O(sequences).

    Args:
        lengths: keys of each sequence, by position.
        groups: what the step shares.
        block_size: tokens of a block.
        layout: of the model.
        windows: for each layer, how many tokens it sees; None is all of them.
    """
    layer_bytes = layout.token_bytes // layout.num_layers
    longest = max(lengths, default=0)
    cut = Counter(window for window in windows if window is not None and window < longest)
    whole = layout.num_layers - cut.total()
    found = []
    for length, own, share in zip(lengths, groups.own, groups.shares(), strict=True):
        windowed = sum(min(length, window) * layers for window, layers in cut.items())
        alone = whole * length + windowed
        read = whole * (length - (own - share) * block_size) + windowed
        found.append(KvReads(read * layer_bytes, alone * layer_bytes))
    return found
