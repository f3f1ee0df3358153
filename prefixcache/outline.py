"""The outline of a tree: its largest or hottest branches, the rest summed up.

Floor 0, beside `types`: what the core gives, the wire carries and the views draw.

```
tiny-model                     depth 0   the empty prefix; its sums are those of the namespace
├─ [SSSS|SSSS] 0 1             depth 1   own: 8 tokens; below: 8 + 4 + 4 + what was left out
│  ├─ [AAAA] 2                 depth 2
│  ├─ [BBBB] ghost             depth 2
│  └─ … 412 more                         `more` of the branch above: runs, blocks, tokens
```
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from prefixcache.types import Namespace


class Order(enum.StrEnum):
    """Which branches an outline keeps, and which of them comes first."""

    TOKENS = "tokens"
    """Those that hold most tokens."""
    HEAT = "heat"
    """Those that were used last; leased ones before all others."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How much a part of a tree holds."""

    runs: int = 0
    """Resident nodes."""
    blocks: int = 0
    tokens: int = 0
    """Of resident runs."""
    ghost_tokens: int = 0
    """Evicted, and still remembered."""

    def __add__(self, other: Extent) -> Extent:
        """Sum both up."""
        return Extent(
            self.runs + other.runs,
            self.blocks + other.blocks,
            self.tokens + other.tokens,
            self.ghost_tokens + other.ghost_tokens,
        )


@dataclass(frozen=True, slots=True)
class Branch:
    """One run of the tree, and what hangs below it."""

    depth: int
    """Runs above it; 0 for the empty prefix."""
    start: int
    """Tokens above it."""
    num_tokens: int
    """Of its own run."""
    num_blocks: int
    """Of its own run; 0 for a ghost and for the empty prefix."""
    tokens: bytes
    """Up to 32 packed tokens that its run begins with."""
    below: Extent
    """Of the whole branch, its own run included."""
    more: Extent
    """Of the branches below it that the outline leaves out."""
    num_more: int
    """How many branches that are, each with all that is below it."""
    num_locks: int
    """Locks on this very run, and locked runs directly below it; 0: it may be evicted."""
    is_ghost: bool
    is_pinned: bool
    idle_s: float | None
    """Seconds since the last lease on it ended; None for a ghost, and if nobody remembers."""
    heat: float
    """1 for what is leased or was used last, falling to 0 for what was not used the longest."""
    num_uses: int | None
    """Leases that used it, where the policy counts them."""
    parted_at: int | None
    """Index of the token at which most requests of the last hour left this branch, if any did."""
    num_parted: int
    """How many that were."""


@dataclass(frozen=True, slots=True)
class NamespaceOutline:
    """One namespace's tree: branches in the order in which they are drawn, the root first."""

    namespace: Namespace
    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """Answer of `outline`."""

    block_size: int
    namespaces: tuple[NamespaceOutline, ...]
    num_moved: int
    """Runs that were split, merged or evicted while the walk was under way, and are not counted."""
    num_more: int = 0
    """Namespaces that store something and are left out; 0 unless a bound was given."""
    more: Extent = Extent()
    """What they hold together."""
