"""Kept answers: what unary calls with a request id were told, for who asks again.

An id stands for one request: with another one it is refused, and changes nothing.  Bounded for each
worker, tenant and in all, in number, bytes and age.

```
all answers of a domain        64 MiB: over it, the oldest go of who has more than is kept for it
 └ a tenant                    half of them are kept for all tenants, in equal parts
    └ a worker                 64 answers, 4 MiB, ten minutes: over one of these, its oldest go;
                               all of them once it has left
```
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from time import monotonic
from typing import Any, Final, NamedTuple

from prefixcache.core.shares import Shares

MOST_ANSWERS: Final = 64
"""Of one worker."""
WORKER_BYTES: Final = 4 << 20
"""Of one worker; its newest answer is kept however large it is."""
ALL_BYTES: Final = 64 << 20
"""Of all workers."""
MOST_AGE_S: Final = 600.0
"""Who asks again does so sooner."""

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
    at: float
    """When."""


class _Shelf(OrderedDict[str, Kept]):
    """The answers of one worker by request id, oldest first."""

    def __init__(self, tenant: str) -> None:
        super().__init__()
        self.tenant = tenant
        self.num_bytes = 0

    def drop(self, request_id: str) -> int:
        """Forget one; say how many bytes that were."""
        size = self.pop(request_id).num_bytes
        self.num_bytes -= size
        return size

    @property
    def oldest(self) -> Kept:
        """The oldest answer."""
        return next(iter(self.values()))


class KeptAnswers:
    """The answers of all workers of one trust domain."""

    def __init__(self) -> None:
        self._shelves: dict[str, _Shelf] = {}
        """By worker key."""
        self._tenants: dict[str, OrderedDict[str, _Shelf]] = {}
        """The same by tenant; who was answered last comes last."""
        self._room = Shares(ALL_BYTES, "the room for kept answers", "bytes of answers")
        self._greedy: dict[str, None] = {}
        """Tenants with more than is kept for them; who has been so the longest comes first."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return self._room.total

    def used(self, tenant: str) -> int:
        """Give how many bytes a tenant's answers have."""
        return self._room.used(tenant)

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part of the room is kept.  O(tenants)."""
        self._room.set_tenants(tenants)
        self._greedy = {one: None for one in self._tenants if self._room.beyond(one)}

    def get(self, key: str, request_id: str) -> Kept | None:
        """Give what a worker asked and was told under an id; None if nothing is kept.  O(1)."""
        shelf = self._shelves.get(key)
        return None if shelf is None else shelf.get(request_id)

    def forget(self, asked: Question) -> None:
        """Forget what a worker was told: its lease has ended.  O(1).  Idempotent."""
        shelf = self._shelves.get(asked.key)
        if shelf is not None and asked.request_id in shelf:
            self._drop(shelf, asked.key, asked.request_id)

    def forget_worker(self, key: str) -> None:
        """Forget all that a worker was told: nobody can ask for it again.  Idempotent."""
        if (shelf := self._shelves.get(key)) is not None:
            while shelf:
                self._drop_oldest(shelf)

    def keep(self, asked: Question, answer: Any, tenant: str = "") -> None:
        """Keep an answer of a tenant's worker.  Amortised O(1).

        Whatever has to go for it, other tenants keep what is kept for them.
        """
        size, now = answer.ByteSize(), monotonic()
        self.forget(asked)
        shelf = self._shelves.setdefault(asked.key, _Shelf(tenant))
        shelf[asked.request_id] = Kept(asked, answer, size, now)
        shelf.num_bytes += size
        shelves = self._tenants.setdefault(tenant, OrderedDict())
        shelves[asked.key] = shelf
        shelves.move_to_end(asked.key)
        self._count(tenant, size)
        while len(shelf) > 1 and (
            len(shelf) > MOST_ANSWERS
            or shelf.num_bytes > WORKER_BYTES
            or now - shelf.oldest.at > MOST_AGE_S
        ):
            self._drop_oldest(shelf)
        silent = next(iter(shelves.values()))
        while silent is not shelf and now - silent.oldest.at > MOST_AGE_S:
            self._drop_oldest(silent)
            silent = next(iter(shelves.values()))
        while self._room.total > ALL_BYTES:
            has_more = len(shelf) > 1 or len(shelves) > 1
            others = (one for one in self._greedy if one != tenant)
            greedy = tenant if has_more and tenant in self._greedy else next(others, None)
            if greedy is None:
                break  # the newest, however large
            self._drop_oldest(next(iter(self._tenants[greedy].values())))

    def _drop_oldest(self, shelf: _Shelf) -> None:
        asked = shelf.oldest.question
        self._drop(shelf, asked.key, asked.request_id)

    def _drop(self, shelf: _Shelf, key: str, request_id: str) -> None:
        size, tenant = shelf.drop(request_id), shelf.tenant
        if not shelf:
            del self._shelves[key]
            shelves = self._tenants[tenant]
            del shelves[key]
            if not shelves:
                del self._tenants[tenant]
        self._count(tenant, -size)

    def _count(self, tenant: str, size: int) -> None:
        if size > 0:
            self._room.force(tenant, size)
        elif size:
            self._room.give(tenant, -size)
        if self._room.beyond(tenant):
            self._greedy[tenant] = None
        else:
            self._greedy.pop(tenant, None)
