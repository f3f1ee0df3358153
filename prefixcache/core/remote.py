"""Remote: a store that several machines share: what it is asked, and what is stored there.

```
prompt ─► question ─► answer: its next blocks, as far as they are there ─► a restore like any other
lease  ─► in line  ─► question ─► answer: which of its blocks are not there ─► copied, then stored
```
What lies there is not known here, since others store and the store forgets: so it is asked.  Names
of objects are nothing to the cache: whoever answers gives them, and gets them back with the blocks.

**A question** is the lease of a restore whose length is not known yet.  So all who want that prefix
wait for the one question, and for a moment only: a store that does not answer in time is not asked
again for a while, and nothing is stored there meanwhile.  What was not there is not asked for again
for a while, either.  Who only wants to know what lies there has it asked, too, with nobody to wait
for the answer: it is remembered for a while, for who wants to know it then.

**What is computed is stored**, not what is evicted: it is of use to other machines now, and is
still there when this one is gone.  Sixteen blocks at a time, or when the lease ends; all of a
prefix is looked at, so that what the store has lost comes to be there again.  A lease of the
porter's keeps the blocks from being evicted meanwhile.  There is one such at a time, of a sixteenth
of the pool at most, and what waits in line has a limit: what is over it is not stored.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, NamedTuple, NewType

from prefixcache.core.block_keys import Generations, PassingGenerations
from prefixcache.core.lease import KeptBytes, Lease
from prefixcache.core.node import Root
from prefixcache.core.shares import Shares
from prefixcache.errors import PoolExhausted
from prefixcache.types import TOKEN_BYTES, Namespace

QuestionId = NewType("QuestionId", int)

REMOTE: Final = 2
"""Which tier it is: memory of the host and disk come before it, whether they are there or not."""
NAME_BYTES: Final = 32
"""Of an object's name."""

_ANSWER_S: Final = 0.05
"""How long a request waits for an answer …"""
_NAMED_S: Final = 5e-6
"""… and for each block of its prefix, which has to be named."""
_HELD_S: Final = 1.0
"""How long a store that has not answered is not asked, and what was not there is not asked for."""
_LEAST_TOKENS: Final = 64
"""A request that lacks fewer does not ask."""
_MOST_ASKED: Final = 512
"""Blocks of one question."""
_MOST_ASKING: Final = 64
"""Questions of requests that may be out at the same time."""
_MOST_ABSENT: Final = 4096
"""Prefixes of which is remembered that they were not there."""
_MOST_SEEN: Final = 256
"""Prompts of which is remembered what of them was there, when somebody wanted to know it."""
_MOST_STORED: Final = 64
"""Blocks that are on their way to the store at the same time."""
_LINE_BYTES: Final = 32 << 20
"""Of the tokens of what waits to be stored."""


class Question(NamedTuple):
    """Which blocks of a prefix lie in the store."""

    id: QuestionId
    namespace: Namespace
    resets: int
    """How often it was reset: what was stored before has other names."""
    tokens: bytes
    """Packed; whole blocks, from the first one on."""
    first: int
    """How many of these blocks are not asked for."""
    is_to_store: bool
    """Whether nobody waits for the answer."""


class Waiting(NamedTuple):
    """What is to be stored, in line."""

    root: Root
    tokens: bytes
    """Packed; whole blocks, from the first one on."""
    first: int
    """How many of these blocks have been looked at before."""


@dataclass(slots=True, eq=False)
class Storing:
    """What is being stored."""

    waiting: Waiting
    question: QuestionId | None
    """Which of its blocks are there, while that is not known."""
    lease: Lease | None = None
    """Keeps the blocks, once it is known which."""
    num_left: int = 0
    """Hauls that have not ended."""
    seen: int = 0
    """Blocks of the prefix that need not be looked at again when they have."""


class Remote:
    """What the store is asked, and what waits to be stored there.

    Args:
        num_blocks: Of the pool.
        block_size: Tokens of a block.
        piece: Blocks of a haul at most.
    """

    __slots__ = (
        "_absent",
        "_asked",
        "_block_bytes",
        "_held_until",
        "_line",
        "_looks",
        "_new",
        "_next",
        "_seen",
        "asking",
        "generations",
        "is_there",
        "kept",
        "least_stored",
        "most_stored",
        "num_late",
        "num_stored",
        "num_unstored",
        "num_wrong",
        "piece",
        "storing",
    )

    def __init__(self, num_blocks: int, block_size: int, piece: int) -> None:
        self.piece = piece
        self._block_bytes = block_size * TOKEN_BYTES
        self.is_there = False
        """Whether anybody answers questions."""
        self._held_until = -math.inf
        self.asking: dict[QuestionId, Lease] = {}
        """The leases of restores that a question is out for."""
        self._asked = Shares(_MOST_ASKING, "what may be asked at the same time", "questions")
        self._new: list[Question] = []
        self._next = 0
        self._absent: OrderedDict[tuple[Namespace, int], float] = OrderedDict()
        """Until when prefixes are not asked for."""
        self._looks: dict[QuestionId, tuple[Namespace, int]] = {}
        """Of which prompts it is asked what lies there, for nobody who waits."""
        self._seen: OrderedDict[tuple[Namespace, int], tuple[float, int]] = OrderedDict()
        """How many blocks of a prompt were there, and until when that is believed."""
        self._line: deque[Waiting] = deque()
        self.kept = KeptBytes(
            _LINE_BYTES, "the line of what is to be stored", "bytes of tokens that wait"
        )
        self.storing: Storing | None = None
        self.most_stored = max(1, min(_MOST_STORED, num_blocks // 16))
        self.least_stored = 16
        """Blocks that a lease has stored together, before it ends."""
        self.num_stored = self.num_unstored = self.num_wrong = self.num_late = 0
        """Since the start: blocks that were stored; that were not, though they should have been;
        that came and were not what they should be; and questions without an answer in time."""
        self.generations: Generations = PassingGenerations()
        """How often namespaces were reset: what they store after that has other names."""

    # ------------------------------------------------------------------ whether to ask

    def is_open(self, now: float) -> bool:
        """Whether anything is asked or stored now.  O(1)."""
        return self.is_there and now >= self._held_until

    def hold_until(self, when: float) -> None:
        """Ask and store nothing before that time.  O(1)."""
        self._held_until = max(self._held_until, when)

    def hold(self, now: float) -> None:
        """Take note that an answer has not come in time: nothing is asked for a while.  O(1)."""
        self.num_late += 1
        self.hold_until(now + _HELD_S)

    def serves(self, namespace: Namespace) -> bool:
        """Whether its blocks may lie there: a name that says the weights, and nothing approximate.

        O(1).
        """
        return "@" in namespace.model and not namespace.approximate

    def reach(self, start: int, num_bytes: int) -> int:
        """Say up to where a prompt is asked for of which the first bytes are there.

        O(1).

        Args:
            start: Bytes that are there; whole blocks.
            num_bytes: Of the prompt.

        Returns:
            A whole number of blocks; `start`, if so little is lacking that nobody asks.
        """
        width = self._block_bytes
        end = (num_bytes - TOKEN_BYTES) // width * width
        if end - start < _LEAST_TOKENS * TOKEN_BYTES:
            return start
        return min(end, start + _MOST_ASKED * width)

    def is_absent(self, root: Root, tokens: bytes, start: int, now: float) -> bool:
        """Whether the block behind a prefix was not there a moment ago.  O(start), a copy."""
        until = self._absent.get(self._named(root, tokens, start))
        return until is not None and now < until

    def note_absent(self, root: Root, tokens: bytes, start: int, now: float) -> None:
        """Remember for a while that the block behind a prefix was not there.  O(start), a copy."""
        named = self._named(root, tokens, start)
        self._absent[named] = now + _HELD_S
        self._absent.move_to_end(named)
        if len(self._absent) > _MOST_ABSENT:
            self._absent.popitem(last=False)

    def _named(self, root: Root, tokens: bytes, start: int) -> tuple[Namespace, int]:
        return root.namespace, hash(tokens[: start + self._block_bytes])

    # ------------------------------------------------------------------ questions

    def may_ask(self, tenant: str) -> bool:
        """Whether another request of a tenant may ask.  O(1)."""
        try:
            self._asked.check(tenant)
        except PoolExhausted:
            return False
        return True

    def patience_s(self, tokens: bytes) -> float:
        """Say how long who wants these tokens waits for an answer.  O(1)."""
        return _ANSWER_S + _NAMED_S * (len(tokens) // self._block_bytes)

    def ask(self, lease: Lease, tokens: bytes) -> QuestionId:
        """Ask for the blocks behind a lease's own.  O(tokens), a copy."""
        question = self._ask(lease.root, tokens, lease.start * TOKEN_BYTES, is_to_store=False)
        self.asking[question.id] = lease
        self._asked.force(lease.namespace.tenant)
        return question.id

    def take_back(self, question: QuestionId) -> Lease | None:
        """Have a question asked no more: it is answered, or too late.  O(1).

        Returns:
            The lease for which it was asked; None if it is not out.
        """
        lease = self.asking.pop(question, None)
        if lease is not None:
            self._asked.give(lease.namespace.tenant)
        return lease

    def look(self, root: Root, tokens: bytes, start: int, now: float) -> int:
        """Say how many blocks behind a prefix were there a moment ago; ask, if nobody has.

        0 while that is not known: no answer has come yet, too much is asked at once, or the store
        is not asked just now.  Nobody waits.  O(tokens), a copy.

        Args:
            root: Whose.
            tokens: Up to the end of what is asked for; whole blocks.
            start: Bytes of them that are not asked for.
            now: The time.
        """
        tenant, named = root.namespace.tenant, (root.namespace, hash((tokens, start)))
        until, count = self._seen.get(named, (-math.inf, 0))
        if now < until:
            return count
        if self.is_open(now) and named not in self._looks.values() and self.may_ask(tenant):
            question = self._ask(root, tokens, start, is_to_store=True)
            self._looks[question.id] = named
            self._asked.force(tenant)
        return 0

    def note_seen(self, question: QuestionId, count: int, now: float) -> bool:
        """Remember for a while how many blocks of what was looked for are there.  O(1).

        Returns:
            Whether that question was one for nobody who waits.
        """
        named = self._looks.pop(question, None)
        if named is None:
            return False
        self._asked.give(named[0].tenant)
        self._seen[named] = (now + _HELD_S, count)
        self._seen.move_to_end(named)
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return True

    def _ask(self, root: Root, tokens: bytes, start: int, *, is_to_store: bool) -> Question:
        self._next += 1
        question = Question(
            QuestionId(self._next),
            root.namespace,
            self.generations.of(root.namespace),
            tokens,
            start // self._block_bytes,
            is_to_store,
        )
        self._new.append(question)
        return question

    def take_new(self, now: float) -> list[Question]:
        """Take the questions to ask now.  O(these)."""
        if self._line and self.storing is None and self.is_open(now):
            self._begin_storing()
        new, self._new = self._new, []
        return new

    # ------------------------------------------------------------------ what is to be stored

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part of the line is kept.  O(tenants)."""
        self.kept.set_tenants(tenants)
        self._asked.set_tenants(tenants)

    def line_up(self, root: Root, tokens: bytes, first: int) -> None:
        """Have the blocks of a prefix stored that are not there.  O(1).

        Args:
            root: Whose.
            tokens: Packed; whole blocks, from the first one on.
            first: How many of these were looked at before.
        """
        tenant = root.namespace.tenant
        try:
            self.kept.admit(tenant, len(tokens))
        except PoolExhausted:
            self.num_unstored += len(tokens) // self._block_bytes - first
            return
        self.kept.add(tenant, len(tokens))
        self._line.append(Waiting(root, tokens, first))

    def _begin_storing(self) -> None:
        waiting = self._line.popleft()
        width = self._block_bytes
        end = min(len(waiting.tokens), waiting.first * width + _MOST_ASKED * width)
        tokens, start = waiting.tokens[:end], waiting.first * width
        self.storing = Storing(waiting, self._ask(waiting.root, tokens, start, is_to_store=True).id)

    def end_storing(self) -> Lease | None:
        """Take note that what was being stored is stored, or cannot be; go on with the next.  O(1).

        What has not been looked at of the same prefix comes next.

        Returns:
            The lease that kept the blocks; it has still to be ended.
        """
        storing = self.storing
        if storing is None:
            return None
        self.storing, waiting = None, storing.waiting
        if waiting.first < storing.seen < len(waiting.tokens) // self._block_bytes:
            self._line.appendleft(waiting._replace(first=storing.seen))
        else:
            self._forget(waiting)
        return storing.lease

    def _forget(self, waiting: Waiting) -> None:
        self.kept.remove(waiting.root.namespace.tenant, len(waiting.tokens))

    def drop_all(self) -> None:
        """Forget what waits to be stored, and what was to be asked.  O(these)."""
        self._new = []
        for waiting in self._line:
            self._forget(waiting)
            self.num_unstored += len(waiting.tokens) // self._block_bytes - waiting.first
        self._line.clear()
        self._absent.clear()
        self._seen.clear()
        for space, _ in self._looks.values():
            self._asked.give(space.tenant)
        self._looks.clear()

    @property
    def num_in_line(self) -> int:
        """Prefixes that wait to be stored.  O(1)."""
        return len(self._line)

    def check(self) -> None:
        """Assert that what is counted is what waits.  O(line)."""
        kept: dict[str, int] = {}
        now = [] if self.storing is None else [self.storing.waiting]
        for waiting in [*self._line, *now]:
            tenant = waiting.root.namespace.tenant
            kept[tenant] = kept.get(tenant, 0) + len(waiting.tokens)
            assert len(waiting.tokens) % self._block_bytes == 0, "a part of a block in line"
            assert waiting.first * self._block_bytes < len(waiting.tokens), "nothing to store"
        self.kept.check(kept)
        num_asked = len(self.asking) + len(self._looks)
        assert self._asked.total == num_asked, f"{self._asked.total} questions"
