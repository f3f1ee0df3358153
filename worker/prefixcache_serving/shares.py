"""Shares: places of which each tenant has a part that the others cannot take.

```
half of all places, in equal parts        the other half
[ a's ][ b's ][ c's ][ d's ]              [ whoever comes first ]
```
The queue, the requests under way and the bytes of their bodies are shared like this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class Shares:
    """So many places for some tenants.

    Args:
        total: places.
        tenants: who may take them.

    >>> shares = Shares(8, ["a", "b"])
    >>> shares.room("a", {}), shares.room("a", {"a": 6}), shares.room("b", {"a": 6})
    (6, 0, 2)
    """

    def __init__(self, total: int, tenants: Iterable[str]) -> None:
        self.total = total
        self._tenants = set(tenants) or {""}

    def room(self, tenant: str, held: Mapping[str, int]) -> int:
        """Say how many places a tenant still finds.  O(tenants).

        Args:
            tenant: who asks.
            held: places that are taken, by tenant; who is missing there holds none.
        """
        part = self.total // (2 * len(self._tenants))
        kept = sum(max(0, part - held.get(other, 0)) for other in self._tenants if other != tenant)
        return max(0, self.total - kept - sum(held.values()))
