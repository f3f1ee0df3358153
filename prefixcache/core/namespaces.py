"""Namespaces: which namespaces there are, who uses them now, and whose part of the limit they are.

A namespace stays while a worker is attached to it, while it holds blocks, and while a quota or a
pin speaks for it.  Nobody sees to that at once: whenever another namespace comes, a few are looked
at in turn, so that at no moment many are; with a salt for each user, what users left goes away as
new ones come.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from prefixcache.core.shares import Shares
from prefixcache.types import Namespace

_MOST_NAMES = 1024
"""Names whose counts are kept after they have gone; those of further ones are kept per tenant, of
as many tenants, and those of all others together."""


class NamespaceTable:
    """All namespaces of one cache.

    Args:
        limit: How many there may be.
    """

    __slots__ = ("_departed", "_turns", "_users", "shares")

    def __init__(self, limit: int) -> None:
        self.shares = Shares(limit, "--max-namespaces", "namespaces")
        self._users: Counter[Namespace] = Counter()
        self._turns: deque[Namespace] = deque()
        self._departed: set[Namespace] = set()

    def __len__(self) -> int:
        return self.shares.total

    def open(self, namespace: Namespace) -> None:
        """Take note of a new one.  O(1)."""
        self.shares.force(namespace.tenant)
        self._turns.append(namespace)

    def close(self, namespace: Namespace) -> None:
        """Take note that one has gone, that `next` gave last.  O(1)."""
        gone = self._turns.pop()
        assert gone == namespace, f"{namespace} goes out of turn"
        self.shares.give(namespace.tenant)

    def next(self, most: int) -> Iterator[Namespace]:
        """Give up to `most` of them in turn, each of which may be closed before the next comes."""
        for _ in range(min(most, len(self._turns))):
            self._turns.rotate(-1)
            yield self._turns[-1]

    def join(self, namespace: Namespace) -> None:
        """Count a worker that is attached to it."""
        self._users[namespace] += 1

    def leave(self, namespace: Namespace) -> None:
        """Count one fewer."""
        self._users[namespace] -= 1
        if not self._users[namespace]:
            del self._users[namespace]

    def is_used(self, namespace: Namespace) -> bool:
        """Whether a worker is attached to it.  O(1)."""
        return namespace in self._users

    def depart(self, namespace: Namespace) -> Namespace:
        """Say under which name the counts of one that has gone are kept.  O(1)."""
        name = Namespace(namespace.model, namespace.adapter, namespace.tenant)
        if name not in self._departed:
            if len(self._departed) >= _MOST_NAMES:
                name = Namespace("", tenant=namespace.tenant)
                if name not in self._departed and len(self._departed) >= 2 * _MOST_NAMES:
                    return Namespace("")
            self._departed.add(name)
        return name
