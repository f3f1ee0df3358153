"""Kept answers: what unary calls with a request id were told, for who asks again.

An id stands for one request: with another one it is refused, and changes nothing.  Bounded for each
worker and in all, in number and in bytes: over either, the oldest go first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final, NamedTuple

MOST_ANSWERS: Final = 64
"""Of one worker."""
WORKER_BYTES: Final = 4 << 20
"""Of one worker; its newest answer is kept however large it is."""
ALL_BYTES: Final = 64 << 20
"""Of all workers."""

_ASKED: Final = {
    "commit": ("lease", "num_tokens", "new_tokens"),
    "extend": ("lease", "num_tokens"),
    "fork": ("lease", "count", "shared_table"),
    "truncate": ("lease", "num_tokens"),
}
"""What a request asks for, by verb; how long it would wait is no part of it."""

REPEATABLE: Final = frozenset(_ASKED)
"""Verbs whose second run would do something else: their last answers are kept by request id."""


class Question(NamedTuple):
    """A request that may be repeated."""

    key: str
    """Of its worker."""
    verb: str
    request_id: str
    lease: int
    asks: int
    """Digest of what it asks for."""


def question(key: str, verb: str, request: Any) -> Question | None:
    """Give what a worker asks, if it may be repeated: with an id, and by such a verb.  O(bytes)."""
    if verb not in REPEATABLE or not request.request_id:
        return None
    asks = hash(tuple([getattr(request, name) for name in _ASKED[verb]]))
    return Question(key, verb, request.request_id, request.lease, asks)


class Kept(NamedTuple):
    """What a worker asked, and was told."""

    question: Question
    answer: Any
    num_bytes: int


class _Shelf(OrderedDict[str, Kept]):
    """The answers of one worker by request id, oldest first."""

    num_bytes = 0

    def drop(self, request_id: str) -> int:
        """Forget one; say how many bytes that were."""
        size = self.pop(request_id).num_bytes
        self.num_bytes -= size
        return size

    def drop_oldest(self) -> int:
        """Forget the oldest; say how many bytes that were."""
        return self.drop(next(iter(self)))


class KeptAnswers:
    """The answers of all workers of one trust domain.

    What a worker that left was told stays until others need the room.
    """

    def __init__(self) -> None:
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()
        """By worker key; who was answered last comes last."""
        self.num_bytes = 0

    def get(self, key: str, request_id: str) -> Kept | None:
        """Give what a worker asked and was told under an id; None if nothing is kept.  O(1)."""
        shelf = self._shelves.get(key)
        return None if shelf is None else shelf.get(request_id)

    def forget(self, asked: Question) -> None:
        """Forget what a worker was told: its lease has ended.  O(1).  Idempotent."""
        shelf = self._shelves.get(asked.key)
        if shelf is not None and asked.request_id in shelf:
            self.num_bytes -= shelf.drop(asked.request_id)

    def keep(self, asked: Question, answer: Any) -> None:
        """Keep an answer.  Amortised O(1)."""
        size = answer.ByteSize()
        shelf = self._shelves.setdefault(asked.key, _Shelf())
        self._shelves.move_to_end(asked.key)
        if asked.request_id in shelf:
            self.num_bytes -= shelf.drop(asked.request_id)
        shelf[asked.request_id] = Kept(asked, answer, size)
        shelf.num_bytes += size
        self.num_bytes += size
        while len(shelf) > 1 and (len(shelf) > MOST_ANSWERS or shelf.num_bytes > WORKER_BYTES):
            self.num_bytes -= shelf.drop_oldest()
        while self.num_bytes > ALL_BYTES and len(self._shelves) > 1:
            longest_silent = next(iter(self._shelves.values()))
            self.num_bytes -= longest_silent.drop_oldest()
            if not longest_silent:
                self._shelves.popitem(last=False)
