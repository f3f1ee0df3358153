"""Shares: who has how much of one limit that all tenants share.

```
limit    kept for a ─ kept for b ─ kept for c │ for whoever comes first
         limit // 2N  limit // 2N  limit // 2N│ the other half
```

Each of N known tenants finds its part free whatever the others do; the rest goes to who comes
first.  Without identities there is one tenant, and it may have all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from prefixcache.errors import PoolExhausted


class Shares:
    """The use of one limit, by tenant.  Every method but `set_tenants` is O(1).

    Args:
        limit: How many there may be in all.
        flag: The setting that says so, as the operator writes it.
        noun: What is counted, in the plural.

    >>> leases = Shares(8, "--max-leases", "leases")
    >>> leases.set_tenants(["red", "blue"])
    >>> leases.take("red", 6)
    >>> leases.take("red")
    Traceback (most recent call last):
        ...
    prefixcache.errors.PoolExhausted: tenant 'red' has 6 leases and asks for 1 more; of the 8 of --max-leases 2 are kept for the other tenant. Give some back, or have the limit raised.
    >>> leases.take("blue", 2)
    """  # noqa: E501 - one line of output

    __slots__ = ("_beyond", "_kept", "_known", "_used", "flag", "limit", "noun", "total")

    def __init__(self, limit: int, flag: str, noun: str) -> None:
        self.limit = limit
        self.flag = flag
        self.noun = noun
        self.total = 0
        """Taken by all together."""
        self._used: dict[str, int] = {}
        self._known: frozenset[str] = frozenset()
        self._kept = 0
        self._beyond = 0
        """Taken by all together, beyond what is kept for each."""

    @classmethod
    def between(
        cls, tenants: Collection[str], limit: int, flag: str, noun: str, used: Mapping[str, int]
    ) -> Shares | None:
        """Give the shares of tenants that have so many already.  O(tenants).

        For who keeps counts of its own and need not ask while there is one tenant.

        Returns:
            None if there is only one tenant: it may have all.
        """
        if len(tenants) < 2:
            return None
        shares = cls(limit, flag, noun)
        for tenant, count in used.items():
            shares.force(tenant, count)
        shares.set_tenants(tenants)
        return shares

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part is kept: nobody, if there is only one.  O(tenants).

        What is taken stays taken, also where it is more than a smaller share allows.
        """
        known = frozenset(tenants)
        self._known = known if len(known) > 1 else frozenset()
        self._kept = self.limit // (2 * len(self._known)) if self._known else 0
        self._beyond = sum(self._excess(tenant, used) for tenant, used in self._used.items())

    def used(self, tenant: str) -> int:
        """Give how many a tenant has."""
        return self._used.get(tenant, 0)

    def beyond(self, tenant: str) -> int:
        """Give how many a tenant has beyond what is kept for it."""
        return self._excess(tenant, self._used.get(tenant, 0))

    def check(self, tenant: str, count: int = 1) -> None:
        """Check that a tenant may have `count` more.  Changes nothing.

        Raises:
            PoolExhausted: it may not; the message has the numbers.
        """
        used = self._used.get(tenant, 0)
        if not self._known and self.total + count <= self.limit:
            return
        more = self._excess(tenant, used + count) - self._excess(tenant, used)
        free = self.limit - self._kept * len(self._known) - self._beyond
        if self.total + count > self.limit or more > max(0, free):
            raise PoolExhausted(self._refusal(tenant, used, count))

    def take(self, tenant: str, count: int = 1) -> None:
        """Count `count` more for a tenant.

        Raises:
            PoolExhausted: it may not have them; nothing is changed.
        """
        self.check(tenant, count)
        self.force(tenant, count)

    def force(self, tenant: str, count: int = 1) -> None:
        """Count `count` more without asking: they are there, whatever the share says."""
        used = self._used.get(tenant, 0)
        self._used[tenant] = used + count
        if self._known:
            count_beyond = self._excess(tenant, used + count) - self._excess(tenant, used)
        else:
            count_beyond = count
        self._beyond += count_beyond
        self.total += count

    def give(self, tenant: str, count: int = 1) -> None:
        """Count `count` fewer."""
        used = self._used.get(tenant, 0)
        assert used >= count, f"{tenant!r} gives back {count} {self.noun} of {used}"
        if used > count:
            self._used[tenant] = used - count
        else:
            self._used.pop(tenant, None)
        if self._known:
            count_beyond = self._excess(tenant, used) - self._excess(tenant, used - count)
        else:
            count_beyond = count
        self._beyond -= count_beyond
        self.total -= count

    def check_counts(self) -> None:
        """Assert that the sums are those of the tenants.  O(tenants)."""
        assert all(used > 0 for used in self._used.values()), f"{self.noun}: an empty entry"
        assert self.total == sum(self._used.values()), f"{self.noun}: {self.total} in all"
        beyond = sum(self._excess(tenant, used) for tenant, used in self._used.items())
        assert self._beyond == beyond, f"{self.noun}: {self._beyond} beyond shares, not {beyond}"

    def _excess(self, tenant: str, used: int) -> int:
        return max(0, used - self._kept) if tenant in self._known else used

    def _refusal(self, tenant: str, used: int, count: int) -> str:
        others = len(self._known - {tenant})
        if not others:
            return (
                f"{self._so_many(self.total)}, and {count:,} more {_are(count)} asked for; "
                f"{self.flag} allows {self.limit:,}"
            )
        who = f"tenant {tenant!r}" if tenant else "the nameless tenant"
        kept = self._kept * others
        kept_for = f"{kept:,} {_are(kept)} kept for the {_others(others)}"
        return (
            f"{who} has {self._so_many(used)} and asks for {count:,} more; of the "
            f"{self.limit:,} of {self.flag} {kept_for}. Give some back, or have the limit raised."
        )

    def _so_many(self, count: int) -> str:
        return f"1 of the {self.noun}" if count == 1 else f"{count:,} {self.noun}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _others(number: int) -> str:
    return "other tenant" if number == 1 else f"{number:,} other tenants"
