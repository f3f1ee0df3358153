"""History: what a cache remembers for people, of requests that are over.

```
before the lock   look ──► seen: where it parts, and from what; how deep the ghosts were
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

All of it has one budget of bytes.  Over it, the oldest requests lose their prompts first and keep
their ledger, then they go.  A namespace that is reset is forgotten here too.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from itertools import islice
from math import ceil
from typing import Final, NamedTuple, TypeAlias

from prefixcache.core.node import Match, Node, Place, Root
from prefixcache.core.radix_tree import RadixTree
from prefixcache.types import TOKEN_BYTES, Grant, LeaseId, Ledger, Namespace

WINDOW_S: Final = 3600.0
_STEP_S: Final = 60.0
_MOST_PLACES: Final = 1024
"""Places that are counted in one minute; further ones are not."""
_PLACE_BYTES: Final = 224
"""What a place that is counted in one minute takes: entries here and at its node.  Measured."""
_MOST_PER_NODE: Final = 32
"""Places at a node from which on those that nobody parts at any more are dropped."""


class Divergence:
    """The counts of the last hour, or of as many minutes of it as `max_bytes` have room for."""

    __slots__ = ("_counts", "_most", "_most_earlier", "_num_earlier", "_step", "_steps")

    def __init__(self, max_bytes: int) -> None:
        self._most = min(_MOST_PLACES, max_bytes // _PLACE_BYTES // 2)
        """Places that are counted in one minute."""
        self._most_earlier = max_bytes // _PLACE_BYTES - self._most
        self._num_earlier = 0
        """Places that were counted in the minutes before this one, minute by minute."""
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
            if len(counts) >= self._most:
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

    @property
    def num_bytes(self) -> int:
        """About what it takes now.  O(1)."""
        return (self._num_earlier + len(self._counts)) * _PLACE_BYTES

    def _begin(self, step: int) -> None:
        """Begin a minute, and take off those that are too old or too many.  Amortised O(1)."""
        self._step = step
        self._num_earlier += len(self._counts)
        self._counts = {}
        self._steps.append((step, self._counts))
        oldest = _oldest_step(step)
        while self._steps[0][0] < oldest or self._num_earlier > self._most_earlier:
            counts = self._steps.popleft()[1]
            self._num_earlier -= len(counts)
            for place, count in counts.items():
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
_FEWEST_READINGS = 256
_READING_BYTES = 16


class IdleClock:
    """Readings of the tree's clock, at most one a second.

    As many as there is room for, at least four minutes: of 128 KiB, more than an hour.

    >>> ages = IdleClock(max_bytes=1 << 17)
    >>> for stamp, now in ((1, 10.0), (2, 20.0), (3, 30.0)):
    ...     ages.note(stamp, now)
    >>> ages.idle_s(2, now=35.0)
    15.0
    """

    __slots__ = ("_most", "_stamps", "_times")

    def __init__(self, max_bytes: int) -> None:
        self._most = max(2 * _FEWEST_READINGS, max_bytes // _READING_BYTES)
        self._stamps = array("q")
        self._times = array("d")

    @property
    def num_bytes(self) -> int:
        """What it takes now.  O(1)."""
        return len(self._times) * _READING_BYTES

    def note(self, stamp: int, now: float) -> None:
        """Take a reading.  Amortised O(1)."""
        times = self._times
        if times and now - times[-1] < _READ_EVERY_S:
            return
        self._stamps.append(stamp)
        times.append(now)
        if len(times) > self._most:
            half = self._most // 2
            del times[:half], self._stamps[:half]

    def idle_s(self, stamp: int, now: float) -> float | None:
        """Say how long ago the clock showed `stamp`, to a second; None if nobody remembers.

        Changes nothing.  O(log readings).
        """
        if not self._times:
            return None
        # A stamp after the last reading is less than a second younger than that.
        at = min(bisect_left(self._stamps, stamp), len(self._times) - 1)
        if at == 0 and stamp < self._stamps[0] and len(self._times) > self._most // 2:
            return None
        return now - self._times[at]


_MOST_REQUESTS = 2048
_RECORD_BYTES = 560
"""What a record takes beside its strings: a tuple of nine, its ledger, lease and time, and what
lists refer to it.  Measured; objects that others hold too are not counted."""


class GrantRecord(NamedTuple):
    """One request, as it was when it was granted.  Its prompt is kept apart, and goes first."""

    request_id: str
    worker: str
    """Its name."""
    lease: LeaseId
    namespace: Namespace
    ledger: Ledger
    at: float
    parted_at: int | None
    stored_next: bytes
    """What was stored from there on, its first tokens."""
    extra_blocks: int | None
    """How many more would have kept what was evicted of it."""
    num_bytes: int
    """What remembering it costs, without its prompt."""

    def is_called(self, name: str) -> bool:
        """Whether that names this request: its id, without its last part, or worker#lease.

        A tenant may stand before the worker, for who sees several.
        """
        own = self.request_id
        lease = f"{self.worker}#{self.lease}"
        return name in (own, lease, f"{self.namespace.tenant}/{lease}") or (
            own.startswith(name) and own[len(name) : len(name) + 1] == "/"
        )


_Row: TypeAlias = (
    "tuple[str, str, LeaseId, Namespace, Ledger, float, int | None, bytes, int | None, int]"
)
"""A `GrantRecord` as it is kept: hardly one is ever looked at, and made when it is."""
_NAMESPACE: Final = 3
_NUM_BYTES: Final = 9


class RequestLog:
    """The last requests, youngest first, within a budget of bytes.

    ```
    records   oldest ──────────────────────────────────── youngest    at most half of the budget
    prompts                    oldest kept ────────────── youngest    what is left of it
    ```

    >>> log = RequestLog(max_bytes=0)
    >>> log.add(GrantRecord("r", "w", 1, Namespace("m"), Ledger(), 0.0, None, b"", None, 9), b"")
    >>> len(log), log.num_bytes
    (0, 0)
    """

    __slots__ = ("_prompts", "_records", "max_bytes", "prompt_bytes", "record_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.record_bytes = 0
        self.prompt_bytes = 0
        self._records: deque[_Row] = deque()
        self._prompts: deque[bytes] = deque()
        """Those of the youngest records."""

    def __iter__(self) -> Iterator[tuple[GrantRecord, bytes]]:
        prompts = reversed(self._prompts)
        for row in reversed(self._records):
            yield GrantRecord(*row), next(prompts, b"")

    def __len__(self) -> int:
        return len(self._records)

    @property
    def num_bytes(self) -> int:
        """What it takes now."""
        return self.record_bytes + self.prompt_bytes

    def add(self, record: _Row, prompt: bytes) -> None:
        """Remember a request.  Amortised O(1); the prompt is not copied."""
        records, size = self._records, self.record_bytes + record[_NUM_BYTES]
        records.append(record)
        self._prompts.append(prompt)
        self.record_bytes = size
        self.prompt_bytes += len(prompt)
        most = self.max_bytes
        if size > most >> 1 or size + self.prompt_bytes > most or len(records) > _MOST_REQUESTS:
            self._trim()

    def _trim(self) -> None:
        """Let go of the oldest, and of an eighth of the budget more: each has long been cold.

        Over the budget they lose their prompts; over half of it, or their number, they go.
        """
        records, prompts, limit = self._records, self._prompts, self.max_bytes
        size, prompt_bytes = self.record_bytes, self.prompt_bytes
        if size > limit >> 1 or size + prompt_bytes > limit:
            limit -= limit >> 3
        while size > limit >> 1 or len(records) > _MOST_REQUESTS:
            if len(prompts) == len(records):
                prompt_bytes -= len(prompts.popleft())
            size -= records.popleft()[_NUM_BYTES]
        while size + prompt_bytes > limit:
            prompt_bytes -= len(prompts.popleft())
        self.record_bytes, self.prompt_bytes = size, prompt_bytes

    def forget(self, namespace: Namespace) -> None:
        """Forget all requests of a namespace.  O(requests)."""
        kept = [pair for pair in self if pair[0].namespace != namespace]
        if len(kept) == len(self._records):
            return
        num_prompts = sum(
            row[_NAMESPACE] != namespace
            for row in islice(reversed(self._records), len(self._prompts))
        )
        self._records = deque(record for record, _ in reversed(kept))
        self._prompts = deque(prompt for _, prompt in reversed(kept[:num_prompts]))
        self.record_bytes = sum(row[_NUM_BYTES] for row in self._records)
        self.prompt_bytes = sum(map(len, self._prompts))


SHOWN_TOKENS: Final = 64
"""How much of a stored continuation is told."""

Seen: TypeAlias = "tuple[int | None, int, bytes, int | None]"
"""What a request looked like before anything was locked for it: `parted_at`, tokens from the end of
the whole blocks to there, `stored_next` and `extra_blocks`."""


class History:
    """Divergence, shortage, recent requests and the clock's readings of one cache.

    ```
    max_bytes    ├── the clock 1/8 ──┼── divergence 1/4 ──┼── recent requests 5/8 ──┤
    ```

    Args:
        num_blocks: Blocks in the pool.
        max_bytes: What all of it may take; 0 remembers nothing but a few readings of the clock.
    """

    __slots__ = ("divergence", "idle_clock", "is_kept", "max_bytes", "miss_depths", "request_log")

    def __init__(self, num_blocks: int, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.is_kept = bool(max_bytes)
        """Whether anything is remembered of requests."""
        self.idle_clock = IdleClock(max_bytes // 8)
        self.divergence = Divergence(max_bytes // 4)
        self.request_log = RequestLog(max_bytes - max_bytes // 4 - max_bytes // 8)
        self.miss_depths = MissDepths(num_blocks)

    @property
    def num_bytes(self) -> int:
        """What all of it takes now: counted for requests, estimated for places.  O(1)."""
        return self.idle_clock.num_bytes + self.divergence.num_bytes + self.request_log.num_bytes

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
            return None, 0, b"", extra
        into = match.partial_tokens
        return match.end // TOKEN_BYTES + into, into, run[into * TOKEN_BYTES :], extra

    def note(
        self,
        seen: Seen,
        root: Root,
        node: Node,
        worker: str,
        request_id: str,
        prompt: bytes,
        grant: Grant,
        now: float,
    ) -> None:
        """Remember a granted request.  O(1).  `node`: where its whole blocks end, locked."""
        parted_at, into, stored_next, extra_blocks = seen
        if parted_at is not None:
            self.divergence.note(node, into, now)
        self.request_log.add(
            (
                request_id,
                worker,
                grant.lease,
                root.namespace,
                grant.ledger,
                now,
                parted_at,
                stored_next,
                extra_blocks,
                _RECORD_BYTES + len(request_id) + len(stored_next) + root.name_size,
            ),
            prompt,
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
