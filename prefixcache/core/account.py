"""An account: what one namespace, or one tenant with all of its own, holds and may hold.

```
blocks of a namespace    quarantined ─ private ──── indexed, protected ──── indexed, evictable
                         └───────────────── held ─────────────────┘
                         └─────────────────────────── stored ─────────────────────────────┘
max_held                 held may not grow beyond it: the request is refused, or waits
guaranteed               stored blocks up to it are evicted only when no others are left
```
"""

from __future__ import annotations

from typing import Protocol

from prefixcache.core.worth import Rate
from prefixcache.types import Namespace, QuotaInfo

_FEW_ROOTS = 8


class Sums:
    """Blocks of many roots, counted as they come and go, so that nobody adds them up."""

    __slots__ = ("evictable", "num_blocks")

    def __init__(self) -> None:
        self.num_blocks = 0
        self.evictable = 0


class Accounted(Protocol):
    """What an account sees of the root of a tree."""

    namespace: Namespace
    num_blocks: int
    evictable: int
    num_leases: int
    lock_ref: int
    retired: bool
    sums: Sums
    account: Account | None


class Account:
    """What one namespace, or one tenant with all its namespaces, holds; and what it may."""

    __slots__ = (
        "_many_roots",
        "above",
        "forgotten",
        "found",
        "guaranteed",
        "max_held",
        "namespaces",
        "private",
        "quarantined",
        "rate",
        "roots",
        "scope",
    )

    def __init__(self, scope: Namespace | str, above: Account | None) -> None:
        self.scope = scope
        """A namespace, or the name of a tenant."""
        self.above = above
        """The tenant's account; None for that itself."""
        self.namespaces: dict[Namespace, Account] = {}
        """Of a tenant: those of its namespaces."""
        self.found = Sums()
        """Of a tenant: blocks of the present roots of its namespaces."""
        self.forgotten = Sums()
        """Of a tenant: blocks of the roots that were reset."""
        self.roots: list[Accounted] = []
        """Of a namespace: the present one, and those that were reset while leases were out."""
        self._many_roots = _FEW_ROOTS
        self.private = 0
        """Blocks that its leases own."""
        self.quarantined = 0
        """Blocks that its leases owned, and their workers may still write to."""
        self.max_held: int | None = None
        self.guaranteed = 0
        self.rate: Rate | None = None
        """Of a namespace: how long its leases take to compute, where that is of use."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.scope if isinstance(self.scope, str) else self.scope.tenant

    @property
    def num_held(self) -> int:
        """Blocks that leases own or protect, or workers may write to after their leases' end.

        O(1), for a namespace O(its resets).

        The last block that forks share counts once they have copies of their own.
        """
        own = self.private + self.quarantined
        return own + sum(one.num_blocks - one.evictable for one in self._counted())

    @property
    def num_stored(self) -> int:
        """All blocks, cached ones included.  O(1), for a namespace O(its resets).

        What was reset and is held by nobody does not count: it goes before all else.
        """
        if isinstance(self.scope, str):
            return self.num_held + self.found.evictable
        return self.num_held + sum(root.evictable for root in self.roots if not root.retired)

    def _counted(self) -> tuple[Sums, Sums] | list[Accounted]:
        return (self.found, self.forgotten) if isinstance(self.scope, str) else self.roots

    def count_quarantined(self, more: int) -> None:
        """Count that workers may write to `more` blocks after the end of leases.  O(1)."""
        self.quarantined += more
        if self.above is not None:
            self.above.quarantined += more

    def adopt(self, root: Accounted) -> None:
        """Answer for a new root of a namespace.  Amortised O(1)."""
        if len(self.roots) >= self._many_roots:
            self.roots = [old for old in self.roots if old.num_blocks or old.lock_ref > 1]
            self._many_roots = 2 * len(self.roots) + _FEW_ROOTS
        self.roots.append(root)
        root.account = self
        if self.above is not None:
            root.sums = self.above.found

    def retire(self, root: Accounted) -> None:
        """Count a root of a namespace among those that were reset.  O(1)."""
        if self.above is not None:
            for sums, sign in ((self.above.found, -1), (self.above.forgotten, 1)):
                sums.num_blocks += sign * root.num_blocks
                sums.evictable += sign * root.evictable
            root.sums = self.above.forgotten

    @property
    def has_quota(self) -> bool:
        """Whether anything was said about it."""
        return self.max_held is not None or self.guaranteed > 0

    def info(self) -> QuotaInfo:
        """Give its numbers."""
        namespace = None if isinstance(self.scope, str) else self.scope
        return QuotaInfo(
            self.tenant, namespace, self.max_held, self.guaranteed, self.num_held, self.num_stored
        )

    def __str__(self) -> str:
        if isinstance(self.scope, Namespace):
            return f"namespace {Namespace(self.scope.model, self.scope.adapter, self.scope.tenant)}"
        return f"tenant {self.scope!r}" if self.scope else "the nameless tenant"
