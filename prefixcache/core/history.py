"""History: what a cache remembers for people, of requests that are over.

```
before the lock   look ──► Seen: where it parts, and from what; how deep the ghosts were
after the lock    note ──► divergence · miss depths · request log
```

Two short calls per request, none of which looks at more than the request's own path.

**Divergence.**  How many requests of the last hour left the stored prefixes at which place.

```
node.divergence = {8: Place}   8 tokens into the block that follows the node's run
minutes       [.. | {Place: 3} | {Place: 9, …}]    place.count is the sum over the minutes kept
```

A place is where whole blocks end, and the tokens into the next one.  It stands at its node, and is
forgotten with it.  Counting is O(1): one dict entry in this minute's counts; a minute that is an
hour old is taken off again.

**Miss depths.**  How much larger the pool would have had to be for what came back too late.

```
eviction order   oldest ghost … ┊ ghost that a request asks for ┊ … youngest ghost ┊ resident
                                 └──────── its depth, in blocks ────────────────┘
```

An LRU with more room keeps all that the smaller one keeps, and the youngest of its ghosts: a ghost
at depth d would still be there if the pool had d blocks more.  Exact for LRU without leases in the
way; an estimate for other policies.  What no ghost remembers any more is not counted.

**Idle clock.**  When the logical clock showed what, so that people are told seconds.

**Request log.**  What was granted lately, so that a miss can be explained after the fact.

Bounded in number and in bytes of prompts: over the bytes, the oldest lose their tokens first and
keep their ledger.  A namespace that is reset is forgotten here too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Final, NamedTuple, Protocol

from prefixcache.core.node import Match, Node, Place
from prefixcache.core.radix_tree import RadixTree
from prefixcache.types import TOKEN_BYTES, Grant, LeaseId, Ledger, Namespace

WINDOW_S: Final = 3600.0
_STEP_S: Final = 60.0
_MOST_PLACES: Final = 1024
"""Places that are counted in one minute; further ones are not."""
_MOST_PER_NODE: Final = 32
"""Places at a node from which on those that nobody parts at any more are dropped."""


class Divergence:
    """The counts of the last hour."""

    __slots__ = ("_counts", "_step", "_steps")

    def __init__(self) -> None:
        self._step = -1
        self._counts: dict[Place, int] = {}
        self._steps: deque[tuple[int, dict[Place, int]]] = deque()

    def note(self, node: Node, into: int, now: float) -> None:
        """Count a request that left the stored prefixes `into` tokens after `node`.  O(1)."""
        step = int(now // _STEP_S)
        if step != self._step:
            self._begin(step)
        places = node.divergence
        if places is None:
            places = node.divergence = {}
        place = places.get(into)
        counts = self._counts
        if place is None or place not in counts:
            if len(counts) >= _MOST_PLACES:
                return
            if place is None:
                if len(places) >= _MOST_PER_NODE:
                    node.divergence = places = {at: one for at, one in places.items() if one.count}
                place = places[into] = Place()
            counts[place] = 0
        counts[place] += 1
        place.count += 1

    def at(self, node: Node, into: int, now: float) -> int:
        """Say how many requests of the last hour left there.  Changes nothing.  O(minutes)."""
        place = node.divergence.get(into) if node.divergence else None
        if place is None:
            return 0
        oldest = _oldest_step(int(now // _STEP_S))
        return place.count - sum(
            counts.get(place, 0) for step, counts in self._steps if step < oldest
        )

    def most(self, node: Node, now: float) -> tuple[int, int] | None:
        """Give where most requests left after `node`, as tokens into the next block, and how many.

        Changes nothing.  None if none did.
        """
        counts = [(self.at(node, into, now), into) for into in list(node.divergence or ())]
        count, into = max(counts, default=(0, 0))
        return (into, count) if count else None

    def _begin(self, step: int) -> None:
        """Begin a minute, and take off those that are too old.  Amortised O(1)."""
        self._step = step
        self._counts = {}
        self._steps.append((step, self._counts))
        oldest = _oldest_step(step)
        while self._steps[0][0] < oldest:
            for place, count in self._steps.popleft()[1].items():
                place.count -= count


def _oldest_step(step: int) -> int:
    return step - int(WINDOW_S // _STEP_S) + 1


_SHARES = (*(sixteenths / 16 for sixteenths in range(1, 17)), 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


class MissDepths:
    """Evicted tokens that were asked for again, by the extra blocks that would have kept them.

    >>> shortage = MissDepths(800)
    >>> shortage.note(90, num_tokens=64)
    >>> [(extra, tokens) for extra, tokens in shortage.steps() if tokens]
    [(100, 64)]
    """

    __slots__ = ("_extra", "_tokens")

    def __init__(self, num_blocks: int) -> None:
        self._extra = [ceil(share * num_blocks) for share in _SHARES]
        self._tokens = [0] * len(_SHARES)

    def note(self, depth: int, num_tokens: int) -> None:
        """Count tokens of a ghost at that depth.  O(1)."""
        at = bisect_left(self._extra, depth)
        self._tokens[min(at, len(self._tokens) - 1)] += num_tokens

    def steps(self) -> tuple[tuple[int, int], ...]:
        """Give (blocks, tokens that so many more blocks would have kept, and fewer not)."""
        return tuple(zip(self._extra, self._tokens, strict=True))


_READ_EVERY_S = 1.0
_MOST_READINGS = 8192


class IdleClock:
    """Readings of the tree's clock, at most one a second, the last two hours at least.

    >>> ages = IdleClock()
    >>> for stamp, now in ((1, 10.0), (2, 20.0), (3, 30.0)):
    ...     ages.note(stamp, now)
    >>> ages.idle_s(2, now=35.0)
    15.0
    """

    __slots__ = ("_stamps", "_times")

    def __init__(self) -> None:
        self._stamps: list[int] = []
        self._times: list[float] = []

    def note(self, stamp: int, now: float) -> None:
        """Take a reading.  Amortised O(1)."""
        times = self._times
        if times and now - times[-1] < _READ_EVERY_S:
            return
        self._stamps.append(stamp)
        times.append(now)
        if len(times) > 2 * _MOST_READINGS:
            del times[:_MOST_READINGS], self._stamps[:_MOST_READINGS]

    def idle_s(self, stamp: int, now: float) -> float | None:
        """Say how long ago the clock showed `stamp`, to a second; None if nobody remembers.

        Changes nothing.  O(log readings).
        """
        if not self._times:
            return None
        # A stamp after the last reading is less than a second younger than that.
        at = min(bisect_left(self._stamps, stamp), len(self._times) - 1)
        if at == 0 and stamp < self._stamps[0] and len(self._times) >= _MOST_READINGS:
            return None
        return now - self._times[at]


_MOST_REQUESTS = 2048
_MOST_BYTES = 16 << 20


@dataclass(slots=True, eq=False)
class GrantRecord:
    """One request, as it was when it was granted."""

    request_id: str
    worker: str
    """Its name."""
    lease: LeaseId
    namespace: Namespace
    tokens: bytes
    """The prompt; empty once there are too many younger ones."""
    ledger: Ledger
    at: float
    parted_at: int | None
    stored_next: bytes
    """What was stored from there on, its first tokens."""
    extra_blocks: int | None
    """How many more would have kept what was evicted of it."""

    def is_called(self, name: str) -> bool:
        """Whether that names this request: its id, without its last part, or worker#lease.

        A tenant may stand before the worker, for who sees several.
        """
        own = self.request_id
        lease = f"{self.worker}#{self.lease}"
        return name in (own, lease, f"{self.namespace.tenant}/{lease}") or (
            own.startswith(name) and own[len(name) : len(name) + 1] == "/"
        )


class RequestLog:
    """The last requests, youngest first."""

    __slots__ = ("_bytes", "_requests", "_whole")

    def __init__(self) -> None:
        self._requests: deque[GrantRecord] = deque(maxlen=_MOST_REQUESTS)
        self._whole: deque[GrantRecord] = deque()
        """Those that still have their tokens."""
        self._bytes = 0

    def __iter__(self) -> Iterator[GrantRecord]:
        return reversed(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: GrantRecord) -> None:
        """Remember a request.  Amortised O(1); its tokens are not copied."""
        self._requests.append(request)
        self._whole.append(request)
        self._bytes += len(request.tokens)
        while self._bytes > _MOST_BYTES or len(self._whole) > _MOST_REQUESTS:
            old = self._whole.popleft()
            self._bytes -= len(old.tokens)
            old.tokens = b""

    def forget(self, namespace: Namespace) -> None:
        """Forget all requests of a namespace.  O(requests)."""
        kept = [one for one in self._requests if one.namespace != namespace]
        if len(kept) == len(self._requests):
            return
        self._requests = deque(kept, maxlen=_MOST_REQUESTS)
        self._whole = deque(one for one in kept if one.tokens)
        self._bytes = sum(len(one.tokens) for one in kept)


SHOWN_TOKENS: Final = 64
"""How much of a stored continuation is told."""


class Asked(Protocol):
    """What is remembered of a request."""

    request_id: str
    namespace: Namespace
    tokens: bytes


class Seen(NamedTuple):
    """What a request looked like before anything was locked for it."""

    parted_at: int | None
    into: int
    """Tokens from the end of the whole blocks to the parting."""
    stored_next: bytes
    extra_blocks: int | None


class History:
    """Divergence, shortage, recent requests and the clock's readings of one cache."""

    __slots__ = ("divergence", "idle_clock", "miss_depths", "request_log")

    def __init__(self, num_blocks: int) -> None:
        self.idle_clock = IdleClock()
        self.divergence = Divergence()
        self.request_log = RequestLog()
        self.miss_depths = MissDepths(num_blocks)

    def look(self, tree: RadixTree, match: Match, tokens: bytes, ledger: Ledger) -> Seen:
        """See where a request parts from what is stored, and what it lacks.

        Counts the shortage.  O(log siblings + ghosts on the path).
        """
        extra = None
        if ledger.evicted:
            for depth, num_tokens in depths(tree, match, tokens, ledger.evicted):
                self.miss_depths.note(depth, num_tokens)
                extra = depth if extra is None or depth > extra else extra
        run = tree.parting(match, tokens, SHOWN_TOKENS * TOKEN_BYTES)
        if run is None:
            return Seen(None, 0, b"", extra)
        into = match.partial_tokens
        return Seen(match.end // TOKEN_BYTES + into, into, run[into * TOKEN_BYTES :], extra)

    def note(
        self,
        seen: Seen,
        node: Node,
        worker: str,
        request: Asked,
        grant: Grant,
        now: float,
    ) -> None:
        """Remember a granted request.  O(1).  `node`: where its whole blocks end, locked."""
        if seen.parted_at is not None:
            self.divergence.note(node, seen.into, now)
        self.request_log.add(
            GrantRecord(
                request.request_id,
                worker,
                grant.lease,
                request.namespace,
                request.tokens,
                grant.ledger,
                now,
                seen.parted_at,
                seen.stored_next,
                seen.extra_blocks,
            )
        )


def depths(tree: RadixTree, match: Match, tokens: bytes, num_evicted: int) -> list[tuple[int, int]]:
    """Give (extra blocks that would have kept them, tokens) of a prompt's evicted tokens.

    Changes nothing.  O(ghosts on the path).
    """
    found = []
    skip = match.partial_tokens  # those a resident sibling has too
    for count, serial in tree.trail(match, tokens):
        told = min(count - min(skip, count), num_evicted)
        skip -= min(skip, count)
        num_evicted -= told
        if told:
            found.append((tree.ghosts.depth(serial), told))
    return found
