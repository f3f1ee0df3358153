"""Holdings: what each tenant has of a tier, and whose oldest goes next.

```
             kept   has    oldest ghosts, by the number of their burial
a             400   900    12  31  90 …      above what is kept for it
b             400   300     3   7  40 …
c               0    20     8              above: nothing is kept for it

next: c's 8, then a's 12, 31 … until it has 400; 3 of b's goes when nobody is above
```

Of those who have more than is kept for them the oldest goes first, and of nobody else anything; if
there are none, the oldest of all.  So with one tenant it is the oldest, whatever is kept; and what
one does not use others may.

Ghosts of a tenant are removed wherever they stand, and added behind all others: the first of a
tenant only becomes younger.  Two heaps have each tenant once, by what was its first once, and are
corrected when they are asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from heapq import heapify, heappop, heappush, heapreplace
from typing import TypeAlias

from prefixcache.core.node import Node

_FEW = 64


class Holding:
    """What one tenant has."""

    __slots__ = ("ghosts", "in_line", "in_line_above", "is_passed", "kept", "num_blocks", "tenant")

    def __init__(self, tenant: str, kept: int) -> None:
        self.tenant = tenant
        self.ghosts: OrderedDict[int, Node] = OrderedDict()
        """By the number of their burial, oldest first."""
        self.num_blocks = 0
        self.kept = kept
        """Blocks up to which nothing is taken from it while others have more than is theirs."""
        self.in_line = self.in_line_above = False
        """Whether it stands in the line of all, and in that of those above what is kept."""
        self.is_passed = False

    def __lt__(self, other: Holding) -> bool:
        """Say no: of the same ghost, which left and came back, either may stand first in a line."""
        return False

    @property
    def excess(self) -> int:
        """Give how many blocks it has beyond what is kept for it.  O(1)."""
        return max(0, self.num_blocks - self.kept)


_Line: TypeAlias = "list[tuple[int, Holding]]"


class Holdings:
    """What all tenants have, and what is kept for whom."""

    __slots__ = ("_above", "_all", "_aside", "_aside_above", "_holdings", "_kept", "_passed")

    def __init__(self) -> None:
        self._holdings: dict[str, Holding] = {}
        self._kept: Mapping[str, int] = {}
        self._all: _Line = []
        self._above: _Line = []
        self._passed: list[Holding] = []
        self._aside: _Line = []
        self._aside_above: _Line = []
        """What stood in the two lines of those that are passed over."""

    def keep(self, kept: Mapping[str, int]) -> None:
        """Say how many blocks are kept for whom; for others none.  O(tenants)."""
        self._kept = kept
        for holding in self._holdings.values():
            holding.kept = kept.get(holding.tenant, 0)
            self._line_up(holding)

    def kept(self, tenant: str) -> int:
        """Give how many blocks are kept for a tenant.  O(1)."""
        return self._kept.get(tenant, 0)

    def num_blocks(self, tenant: str) -> int:
        """Give how many blocks a tenant has.  O(1)."""
        holding = self._holdings.get(tenant)
        return 0 if holding is None else holding.num_blocks

    def tenants(self) -> Collection[str]:
        """Give all that have something."""
        return self._holdings.keys()

    def counts(self) -> dict[str, int]:
        """Give how many blocks each tenant has.  O(tenants)."""
        return {name: one.num_blocks for name, one in self._holdings.items() if one.num_blocks}

    def add(self, tenant: str, num_blocks: int) -> None:
        """Count blocks that a tenant has from now on, or no more.  O(log tenants), amortised."""
        holding = self._get(tenant)
        holding.num_blocks += num_blocks
        if num_blocks > 0:
            self._line_up(holding)
        else:
            self._drop_empty(holding)

    def put(self, ghost: Node) -> None:
        """Take in a ghost of a tenant: buried last, or in the place of one of the same number.

        O(log tenants), amortised.
        """
        holding = self._get(ghost.root.namespace.tenant)
        holding.ghosts[ghost.burial] = ghost
        self._line_up(holding)

    def remove(self, tenant: str, serial: int) -> None:
        """Take out the ghost of a number, if there is one.  O(1)."""
        holding = self._holdings.get(tenant)
        if holding is not None and holding.ghosts.pop(serial, None) is not None:
            self._drop_empty(holding)

    def ghost(self, tenant: str, serial: int) -> Node | None:
        """Give a tenant's ghost of a number.  O(1)."""
        holding = self._holdings.get(tenant)
        return None if holding is None else holding.ghosts.get(serial)

    def next(self) -> Holding | None:
        """Give the one whose oldest ghost goes next; None if nobody has any.

        O(log tenants), amortised.
        """
        return self._first(self._above, above=True) or self._first(self._all, above=False)

    def pass_over(self, holding: Holding) -> None:
        """Have `next` give others, until `recall`.  O(1)."""
        holding.is_passed = True
        self._passed.append(holding)

    def recall(self) -> None:
        """Have those that were passed over stand in line as before.  O(log tenants) for each."""
        for holding in self._passed:
            holding.is_passed = False
        self._passed = []
        for line, aside in ((self._all, self._aside), (self._above, self._aside_above)):
            for one in aside:
                heappush(line, one)
            aside.clear()

    def all_ghosts(self) -> list[Node]:
        """Give all ghosts, oldest first.  O(ghosts log ghosts)."""
        ghosts = [ghost for one in self._holdings.values() for ghost in one.ghosts.values()]
        return sorted(ghosts, key=lambda ghost: ghost.burial)

    def _get(self, tenant: str) -> Holding:
        holding = self._holdings.get(tenant)
        if holding is None:
            holding = self._holdings[tenant] = Holding(tenant, self._kept.get(tenant, 0))
        return holding

    def _drop_empty(self, holding: Holding) -> None:
        """Forget a tenant that has nothing.  What stands for it in line is dropped in time."""
        if not holding.ghosts and not holding.num_blocks:
            del self._holdings[holding.tenant]

    def _line_up(self, holding: Holding) -> None:
        """Have a holding stand in the lines in which it should."""
        if not holding.ghosts:
            return
        first = next(iter(holding.ghosts))
        if not holding.in_line:
            holding.in_line = True
            self._all = self._tidied(self._all, above=False)
            heappush(self._all, (first, holding))
        if not holding.in_line_above and holding.num_blocks > holding.kept:
            holding.in_line_above = True
            self._above = self._tidied(self._above, above=True)
            heappush(self._above, (first, holding))

    def _tidied(self, line: _Line, *, above: bool) -> _Line:
        """Give a line without those that have gone, if it is much longer than it need be."""
        if len(line) <= 2 * len(self._holdings) + _FEW:
            return line
        left = []
        for one in line:
            if one[1].ghosts:
                left.append(one)
            else:
                self._stand_aside(one[1], above=above)
        heapify(left)
        return left

    @staticmethod
    def _stand_aside(holding: Holding, *, above: bool) -> None:
        """Note that a holding stands in a line no more."""
        if above:
            holding.in_line_above = False
        else:
            holding.in_line = False

    def _first(self, line: _Line, *, above: bool) -> Holding | None:
        """Give the first in a line that is there by right, and have it stand first."""
        while line:
            serial, holding = line[0]
            if not holding.ghosts or (above and holding.num_blocks <= holding.kept):
                heappop(line)
                self._stand_aside(holding, above=above)
                continue
            if holding.is_passed:
                (self._aside_above if above else self._aside).append(heappop(line))
                continue
            first = next(iter(holding.ghosts))
            if first == serial:
                return holding
            heapreplace(line, (first, holding))
        return None

    def check(self) -> None:
        """Assert that lines and orders are what they should be.  O(ghosts)."""
        for tenant, holding in self._holdings.items():
            assert holding.tenant == tenant, f"{tenant!r} has the holding of {holding.tenant!r}"
            assert holding.ghosts or holding.num_blocks, f"{tenant!r} has nothing"
            assert holding.kept == self._kept.get(tenant, 0), f"kept for {tenant!r}"
            serials = list(holding.ghosts)
            assert serials == sorted(serials), f"ghosts of {tenant!r} out of order"
            for serial, ghost in holding.ghosts.items():
                assert ghost.burial == serial, f"ghost {ghost.burial} stands as {serial}"
                assert ghost.root.namespace.tenant == tenant, f"another's ghost has {tenant!r}"
            in_line = [serial for serial, one in self._all if one is holding]
            above = [serial for serial, one in self._above if one is holding]
            assert len(in_line) == holding.in_line >= bool(serials), f"{tenant!r} in line"
            is_above = bool(serials) and holding.excess > 0
            assert len(above) == holding.in_line_above >= is_above, f"{tenant!r} in line above"
            if serials:
                assert all(one <= serials[0] for one in in_line + above), f"{tenant!r} too late"
