"""Kept answers: what unary calls with a request id were told, for who asks again.

Bounded for each worker and in all, in number and in bytes: over either, the oldest go first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final, TypeAlias

MOST_ANSWERS: Final = 64
"""Of one worker."""
WORKER_BYTES: Final = 4 << 20
"""Of one worker; its newest answer is kept however large it is."""
ALL_BYTES: Final = 64 << 20
"""Of all workers."""

_Name: TypeAlias = "tuple[str, str]"
"""Verb and request id."""


class _Shelf(OrderedDict[_Name, tuple[Any, int]]):
    """The answers of one worker, oldest first, with their bytes."""

    num_bytes = 0

    def drop_oldest(self) -> int:
        """Forget one; say how many bytes that were."""
        _, (_, size) = self.popitem(last=False)
        self.num_bytes -= size
        return size


class KeptAnswers:
    """The answers of all workers of one trust domain.

    What a worker that left was told stays until others need the room.
    """

    def __init__(self) -> None:
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()
        """By worker key; who was answered last comes last."""
        self.num_bytes = 0

    def get(self, key: str, name: _Name) -> Any:
        """Give what a worker was told; None if nothing is kept.  O(1)."""
        shelf = self._shelves.get(key)
        found = None if shelf is None else shelf.get(name)
        return None if found is None else found[0]

    def keep(self, key: str, name: _Name, answer: Any) -> None:
        """Keep an answer.  Amortised O(1)."""
        size = answer.ByteSize()
        shelf = self._shelves.setdefault(key, _Shelf())
        self._shelves.move_to_end(key)
        if name in shelf:
            _, before = shelf.pop(name)
            shelf.num_bytes -= before
            self.num_bytes -= before
        shelf[name] = (answer, size)
        shelf.num_bytes += size
        self.num_bytes += size
        while len(shelf) > 1 and (len(shelf) > MOST_ANSWERS or shelf.num_bytes > WORKER_BYTES):
            self.num_bytes -= shelf.drop_oldest()
        while self.num_bytes > ALL_BYTES and len(self._shelves) > 1:
            longest_silent = next(iter(self._shelves.values()))
            self.num_bytes -= longest_silent.drop_oldest()
            if not longest_silent:
                self._shelves.popitem(last=False)
