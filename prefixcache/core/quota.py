"""Quotas: what a tenant or a namespace may hold at most, and the share that others leave to it.

A namespace answers to two accounts, its own and its tenant's; both limits count.
"""

from __future__ import annotations

from prefixcache.core.account import Account
from prefixcache.core.node import Root
from prefixcache.errors import InvalidRequest, QuotaExceeded
from prefixcache.texts import many
from prefixcache.types import Namespace, QuotaInfo

MAX_QUOTAS = 1024
"""Accounts with a quota, in all: each one with a share is looked at when something is evicted."""


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

    def guaranteed(self) -> dict[str, int]:
        """Give how many blocks are guaranteed to each tenant and its namespaces.  O(shares)."""
        blocks: dict[str, int] = {}
        for one in self.shares:
            blocks[one.tenant] = blocks.get(one.tenant, 0) + one.guaranteed
        return blocks

    def tenants(self) -> list[Account]:
        """Give the accounts of all tenants."""
        return list(self._tenants.values())

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
