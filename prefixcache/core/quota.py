"""Quotas: what a tenant or a namespace may hold at most, and the share that others leave to it.

```
blocks of a namespace    quarantined ─ private ──── indexed, protected ──── indexed, evictable
                         └───────────────── held ─────────────────┘
                         └─────────────────────────── stored ─────────────────────────────┘
max_held                 held may not grow beyond it: the request is refused, or waits
guaranteed               stored blocks up to it are evicted only when no others are left
```

A namespace answers to two accounts, its own and its tenant's; both limits count.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from prefixcache.core.lease import Lease
from prefixcache.core.node import Root, Sums
from prefixcache.errors import InvalidRequest, QuotaExceeded
from prefixcache.texts import many
from prefixcache.types import Namespace, QuotaInfo

_FEW_ROOTS = 8

MAX_QUOTAS = 1024
"""Accounts with a quota, in all: each one with a share is looked at when something is evicted."""


class Account:
    """What one namespace, or one tenant with all its namespaces, holds; and what it may."""

    __slots__ = (
        "_many_roots",
        "above",
        "forgotten",
        "found",
        "guaranteed",
        "leases",
        "max_held",
        "namespaces",
        "private",
        "quarantined",
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
        self.leases: OrderedDict[int, Lease] = OrderedDict()
        """Of a tenant: its living leases, oldest first."""
        self.roots: list[Root] = []
        """Of a namespace: the present one, and those that were reset while leases were out."""
        self._many_roots = _FEW_ROOTS
        self.private = 0
        """Blocks that its leases own."""
        self.quarantined = 0
        """Blocks that its leases owned, and their workers may still write to."""
        self.max_held: int | None = None
        self.guaranteed = 0

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

    def _counted(self) -> tuple[Sums, Sums] | list[Root]:
        return (self.found, self.forgotten) if isinstance(self.scope, str) else self.roots

    def count_private(self, more: int) -> None:
        """Count that leases of a namespace own `more` blocks than before.  O(1)."""
        self.private += more
        if self.above is not None:
            self.above.private += more

    def count_quarantined(self, more: int) -> None:
        """Count that workers may write to `more` blocks after the end of leases.  O(1)."""
        self.quarantined += more
        if self.above is not None:
            self.above.quarantined += more

    def adopt(self, root: Root) -> None:
        """Answer for a new root of a namespace.  Amortised O(1)."""
        if len(self.roots) >= self._many_roots:
            self.roots = [old for old in self.roots if old.num_blocks or old.lock_ref > 1]
            self._many_roots = 2 * len(self.roots) + _FEW_ROOTS
        self.roots.append(root)
        root.account = self
        if self.above is not None:
            root.sums, root.leases = self.above.found, self.above.leases

    def retire(self, root: Root) -> None:
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


class Quotas:
    """The accounts of all namespaces and tenants of one pool."""

    __slots__ = ("_limited", "_namespaces", "_num_blocks", "_tenants", "any_limit", "shares")

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._namespaces: dict[Namespace, Account] = {}
        self._tenants: dict[str, Account] = {}
        self._limited: dict[Account, None] = {}
        """The accounts with a quota, in the order of their quotas."""
        self.any_limit = False
        """Whether some account has a `max_held`: otherwise admission need not look."""
        self.shares: list[Account] = []
        """The accounts with a guaranteed share."""

    def account(self, namespace: Namespace) -> Account:
        """Give a namespace's account; make it if it is new.  O(1)."""
        found = self._namespaces.get(namespace)
        if found is None:
            tenant = self.tenant(namespace.tenant)
            found = self._namespaces[namespace] = Account(namespace, tenant)
            tenant.namespaces[namespace] = found
        return found

    def open(self, root: Root) -> None:
        """Let a new root belong to its namespace's account."""
        self.account(root.namespace).adopt(root)

    def is_needed(self, namespace: Namespace) -> bool:
        """Whether there are leases in a namespace, or blocks held, or a quota.  O(its resets)."""
        account = self._namespaces[namespace]
        leased = any(root.num_leases for root in account.roots)
        return leased or account.has_quota or account.num_held > 0

    def close(self, namespace: Namespace) -> None:
        """Forget a namespace that is not needed, and nothing of which can be found.  O(its resets).

        What is still cached of it ends by itself, and waits for no garbage collector.
        """
        account = self._namespaces.pop(namespace)
        for root in account.roots:
            root.account = None
        account.roots.clear()
        tenant = self._tenants[namespace.tenant]
        del tenant.namespaces[namespace]
        self._leave(tenant)

    def _leave(self, tenant: Account) -> None:
        """Forget a tenant, if nothing is left of it.  O(1)."""
        if not (tenant.namespaces or tenant.has_quota or tenant.num_held):
            del self._tenants[tenant.tenant]

    def admit(self, account: Account, extra: int) -> None:
        """Check that `extra` more blocks may be held.  Changes nothing.

        Raises:
            QuotaExceeded: they may not; the message has the arithmetic.
        """
        at: Account | None = account
        while at is not None:
            if at.max_held is not None and (held := at.num_held) + extra > at.max_held:
                raise QuotaExceeded(
                    f"needs {many(extra, 'more block')}, and {at} holds {held:,} of at most "
                    f"{at.max_held:,}"
                )
            at = at.above

    def allows(self, account: Account, extra: int) -> bool:
        """Whether `extra` more blocks may be held.  O(its resets)."""
        at: Account | None = account
        while at is not None:
            if at.max_held is not None and at.num_held + extra > at.max_held:
                return False
            at = at.above
        return True

    def refuse_hopeless(self, account: Account, total: int) -> None:
        """Check that `total` blocks could be held if nothing else was.  Changes nothing.

        Raises:
            QuotaExceeded: not even then; waiting would not help.
        """
        at: Account | None = account
        while at is not None:
            if at.max_held is not None and total > at.max_held:
                raise QuotaExceeded(
                    f"needs {many(total, 'block')}, and {at} may hold at most {at.max_held:,}. "
                    "Send less, or have the quota raised."
                )
            at = at.above

    def set(self, scope: Namespace | str, max_held: int | None, share: int) -> QuotaInfo:
        """Set both numbers of an account; None is no limit, 0 no share.  O(quotas).

        Raises:
            InvalidRequest: a number is out of range, or all shares together exceed the pool.
        """
        if (max_held is not None and max_held < 0) or share < 0:
            raise InvalidRequest(
                f"a quota of {max_held} and a share of {share} blocks: give 0 or more"
            )
        account = self._known(scope)
        others = sum(one.guaranteed for one in self.shares if one is not account)
        if share + others > self._num_blocks:
            raise InvalidRequest(
                f"{share} guaranteed blocks and {others} of others are more than the pool's "
                f"{self._num_blocks}"
            )
        limited = len(self._limited) - (account in self._limited)
        if limited >= MAX_QUOTAS and (max_held is not None or share):
            raise InvalidRequest(f"{limited} accounts have a quota; the limit is {MAX_QUOTAS}")
        account = self.account(scope) if isinstance(scope, Namespace) else self.tenant(scope)
        account.max_held, account.guaranteed = max_held, share
        if not account.has_quota:
            self._limited.pop(account, None)
        else:
            self._limited[account] = None
        self.any_limit = any(one.max_held is not None for one in self._limited)
        self.shares = [one for one in self._limited if one.guaranteed]
        told = account.info()
        if isinstance(scope, Namespace) and not account.roots and not account.has_quota:
            self.close(scope)  # nothing is there, and nothing is said about it any more
        elif isinstance(scope, str):
            self._leave(account)
        return told

    def tenant_leases(self, tenant: str) -> OrderedDict[int, Lease]:
        """Give the living leases of a tenant, oldest first.  O(1)."""
        found = self._tenants.get(tenant)
        return OrderedDict() if found is None else found.leases

    def get(self, scope: Namespace | str) -> QuotaInfo:
        """Give the numbers of an account, all zero if it is unknown.  Changes nothing."""
        account = self._known(scope)
        return (account or Account(scope, None)).info()

    def limited(self) -> list[Account]:
        """Give the accounts that have a quota, tenants first.  O(quotas)."""
        return sorted(self._limited, key=lambda one: isinstance(one.scope, Namespace))

    def namespaces(self, tenant: str | None) -> list[Account]:
        """Give the accounts of a tenant's namespaces; None: of all."""
        if tenant is None:
            return list(self._namespaces.values())
        found = self._tenants.get(tenant)
        return [] if found is None else list(found.namespaces.values())

    def check(self, leases: list[Lease]) -> None:
        """Assert that the counts are those of the leases.  O(leases + namespaces)."""
        private: dict[Account, int] = {}
        in_root = Counter(lease.node.root for lease in leases)
        for tenant in self._tenants.values():
            own = [lease.serial for lease in leases if lease.namespace.tenant == tenant.scope]
            assert list(tenant.leases) == own, f"{tenant}: leases"
            below = list(tenant.namespaces.values())
            for what in ("private", "quarantined", "num_held", "num_stored"):
                there, summed = getattr(tenant, what), sum(getattr(one, what) for one in below)
                assert there == summed, f"{tenant}: {what} {there}, not {summed}"
            for root in (root for one in below for root in one.roots):
                counted = in_root[root]
                assert root.num_leases == counted, f"{root.namespace}: {root.num_leases} leases"
        for lease in leases:
            assert lease.num_private == lease.count_private(), f"lease {lease.id}: private blocks"
            private[lease.account] = private.get(lease.account, 0) + lease.num_private
        for account in self._namespaces.values():
            counted = private.pop(account, 0)
            assert account.private == counted, f"{account}: {account.private}, not {counted}"
        assert not private, "a lease of an account that nobody knows"
        known = (*self._tenants.values(), *self._namespaces.values())
        limited = {account for account in known if account.has_quota}
        assert set(self._limited) == limited, "the accounts with a quota"

    def _known(self, scope: Namespace | str) -> Account | None:
        if isinstance(scope, Namespace):
            return self._namespaces.get(scope)
        return self._tenants.get(scope)

    def tenant(self, name: str) -> Account:
        """Give a tenant's account; make it if it is new.  O(1)."""
        found = self._tenants.get(name)
        if found is None:
            found = self._tenants[name] = Account(name, None)
        return found
