"""Several lives of a service on one disk: what each finds there, and whose bytes that really is."""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import numpy as np

from prefixcache.core.cache import PrefixCache
from prefixcache.core.found import Remains
from prefixcache.core.hauls import Haul, TierSizes
from prefixcache.errors import PoolExhausted
from prefixcache.types import Grant, LeaseId, Namespace, Partial, TicketId, WorkerId, pack

ME = WorkerId(1)
SPACES = (Namespace("model", salt="secret"), Namespace("other"), Namespace("model"))
SIZE = 2


class Content(NamedTuple):
    """What a block holds: computed by whom, after how many resets, from which tokens."""

    space: Namespace
    epoch: int
    tokens: tuple[int, ...]


class Slot(NamedTuple):
    """A slot, and what was written beside it."""

    content: Content | None
    told: Content | None
    """What the content was that was summed up."""
    stamp: int
    key: tuple[int, ...]
    tokens: bytes


class Counted:
    """Resets, which outlive each life."""

    def __init__(self) -> None:
        self.counts: Counter[Namespace] = Counter()

    def of(self, namespace: Namespace) -> int:
        return self.counts[namespace]

    def advance(self, namespace: Namespace) -> None:
        self.counts[namespace] += 1


class Lives:
    """A worker, who reads what he is granted, and a porter, who dies in the middle of what he does.

    Args:
        draw: Of all that is drawn.
        num_disk: Slots on the disk.
        is_plain: Whether all lives have the same pool, and no memory above the disk.
    """

    def __init__(self, draw: random.Random, num_disk: int, *, is_plain: bool = False) -> None:
        self.draw = draw
        self.num_disk = num_disk
        self.is_plain = is_plain
        self.waits: dict[TicketId, tuple[PrefixCache, Namespace, list[int]]] = {}
        self.disk: dict[int, Slot] = {}
        self.resets = Counted()
        self.epochs: Counter[Namespace] = Counter()
        self.seen: Counter[str] = Counter()
        self.begin()

    def begin(self) -> int:
        """Begin a life; give how many blocks it finds."""
        draw = self.draw
        self.num_host = 0 if self.is_plain else draw.choice([0, 0, draw.randrange(1, 9)])
        self.host: dict[int, Slot] = {}
        num_blocks = 12 if self.is_plain else draw.randrange(8, 24)
        ahead = 5 if self.is_plain else draw.randrange(1, num_blocks // 2)
        host_ahead = draw.randrange(1, self.num_host + 1) if self.num_host else 0
        self.cache = PrefixCache(
            num_blocks,
            SIZE,
            partial=Partial.OFF,
            num_ghosts=draw.choice([None, 0, 3]),
            tiers=TierSizes(
                self.num_host,
                ahead,
                2,
                self.num_disk,
                host_ahead,
                most_ahead=draw.choice([0, num_blocks // 2]),
            ),
        )
        self.most = num_blocks * SIZE
        self.pool: dict[int, Content] = {}
        self.queue: list[Haul] = []
        self.noted: dict[int, int] = {}
        """By the block that it begins with, the last haul that was abandoned."""
        self.held: list[LeaseId] = []
        found = self.cache.keep_below(b"secret" * 5, self.resets, self.remains(), self.note)
        self.first_stamp = max((one.stamp for one in self.disk.values()), default=0) + 1
        self.cache.set_porter(is_there=True, now=0.0)
        if not self.is_plain and draw.random() < 0.2:
            self.cache.hold_disk(until=1.0)  # it fails, for all of this life
        for space in SPACES:
            self.cache.attach(ME, space, now=0.0)
        self.cache.check()
        self.seen["lives"] += 1
        self.seen["found"] += found
        return found

    def note(self, haul: Haul) -> None:
        """Take note of a haul that is abandoned."""
        self.noted[haul.blocks[0]] = haul.id

    def remains(self) -> Remains:
        """Give what stands on the disk."""
        slots = list(self.disk)
        self.draw.shuffle(slots)
        found = [self.disk[slot] for slot in slots]
        keys = np.array([one.key for one in found], np.uint64).reshape(-1, 2)
        stamps = np.array([one.stamp for one in found], np.int64)
        return Remains(keys, np.array(slots, np.int32), stamps)

    def kill(self) -> int:
        """End a life in the middle of whatever it does, and begin another one."""
        if self.queue and self.draw.random() < 0.7:
            self.carry(self.draw.randrange(3))
        return self.begin()

    # ------------------------------------------------------------------ what the porter does

    def carry(self, num_heads: int | None = None) -> None:
        """Do the first haul; dying, before it is told, with only so many heads written."""
        haul = self.queue.pop(0)
        if haul.id % 2 and self.cache.spare(haul.id):
            return
        good = self.rise(haul) if haul.is_up else self.sink(haul, num_heads)
        if num_heads is None:
            self.cache.hauled(haul.id, good, 0.01, now=0.0)

    def sink(self, haul: Haul, num_heads: int | None) -> int:
        told = []
        for at, slot in enumerate(haul.slots):
            self.put(slot, None)
            if haul.sources:
                told.append(self.host.get(haul.sources[at]))
                continue
            content = self.pool.get(haul.blocks[at])
            key = tuple(np.frombuffer(haul.keys, np.uint64).reshape(-1, 2)[at].tolist())
            width = len(haul.tokens) // len(haul.slots)
            tokens = haul.tokens[at * width : (at + 1) * width]
            told.append(Slot(content, content, haul.stamps[at], key, tokens))
        if haul.blocks and self.noted.get(haul.blocks[0], 0) >= haul.id:
            self.seen["abandoned"] += 1
            return 0
        for at, one in enumerate(told[:num_heads]):
            self.put(haul.slots[at], one)
        return len(told)

    def put(self, slot: int, held: Slot | None) -> None:
        there, at = (self.host, slot) if slot < self.num_host else (self.disk, slot - self.num_host)
        there.pop(at, None)
        if held is not None:
            there[at] = held

    def rise(self, haul: Haul) -> int:
        width = len(haul.tokens) // len(haul.slots)
        for at, slot in enumerate(haul.slots):
            found = self.host.get(slot) if slot < self.num_host else None
            found = found or self.disk.get(slot - self.num_host)
            if found is not None and found.content is not None:
                self.pool[haul.blocks[at]] = found.content
            tokens = haul.tokens[at * width : (at + 1) * width]
            if (
                found is None
                or (found.stamp, found.tokens) != (haul.stamps[at], tokens)
                or found.content != found.told
            ):
                self.seen["spoilt"] += 1
                return at
            self.seen["restored"] += 1
            self.seen["from before"] += found.stamp < self.first_stamp
        return len(haul.slots)

    def spoil(self) -> None:
        """Something happens to what lies on the disk."""
        draw = self.draw
        if len(self.disk) < 2:
            return
        one, other = draw.sample(sorted(self.disk), 2)
        kind = draw.randrange(4)
        here, there = self.disk[one], self.disk[other]
        if kind == 0:
            del self.disk[one]
        elif kind == 1:  # bytes that are another block's
            self.disk[one] = here._replace(content=there.content)
        elif kind == 2:
            self.disk[one], self.disk[other] = there, here
        else:
            self.disk[one] = there

    # ------------------------------------------------------------------ what the worker does

    def step(self) -> None:
        """Do one thing."""
        draw, cache = self.draw, self.cache
        kind = draw.random()
        if kind < 0.2:
            self.queue += cache.hauls(now=0.0)
        elif kind < 0.5:
            if self.queue:
                self.carry()
        elif kind < 0.503:
            self.reset(draw.choice(SPACES))
        elif kind < 0.506:
            if self.queue:
                self.carry(draw.randrange(3))
            late, self.queue = self.queue, []
            cache.set_porter(is_there=False, now=0.0)
            for haul in late:
                cache.hauled(haul.id, len(haul.slots), 0.0, now=0.0)
            cache.set_porter(is_there=True, now=0.0)
        elif kind < 0.55:
            self.settle()
        elif self.held and (len(self.held) > 2 or kind < 0.75):
            cache.release(ME, self.held.pop(draw.randrange(len(self.held))), now=0.0)
        else:
            self.ask()
        self.take()

    def reset(self, space: Namespace) -> None:
        self.cache.reset(space)
        self.epochs[space] += 1

    def ask(self) -> None:
        draw = self.draw
        size = draw.randrange(1, self.most // draw.choice([1, 2, 4]))
        prompt = [*(draw.randrange(2) for _ in range(2)), *[draw.randrange(2)] * size][:size]
        self.ask_for(draw.choice(SPACES), prompt, draw.choice([0.0, 9.0, 9.0]))

    def ask_for(self, space: Namespace, prompt: list[int], wait_s: float = 0.0) -> None:
        try:
            grant = self.cache.acquire(ME, space, pack(prompt), wait_s=wait_s, now=0.0)
        except PoolExhausted:
            return
        if isinstance(grant, Grant):
            self.have(space, prompt, grant)
        else:
            self.waits[grant.ticket] = (self.cache, space, prompt)

    def take(self) -> None:
        """Take what has become of those that waited."""
        for ticket, outcome in self.cache.take_outcomes():
            cache, space, prompt = self.waits.pop(ticket)
            if isinstance(outcome, Grant) and cache is self.cache:
                self.have(space, prompt, outcome)

    def have(self, space: Namespace, prompt: list[int], grant: Grant) -> None:
        """Read what is cached, compute the rest, and store it."""
        self.held.append(grant.lease)
        epoch = self.epochs[space]
        for at, block in enumerate(grant.block_table[: len(prompt) // SIZE]):
            due = Content(space, epoch, tuple(prompt[: (at + 1) * SIZE]))
            if (at + 1) * SIZE <= grant.num_cached:
                assert self.pool.get(block) == due, f"block {block} holds {self.pool.get(block)}"
                self.seen["read"] += 1
            else:
                self.pool[block] = due
        for block in grant.block_table[len(prompt) // SIZE :]:
            self.pool[block] = Content(space, epoch, (-1,))
        self.cache.commit(ME, grant.lease, len(prompt), now=0.0)

    def settle(self) -> None:
        """End all leases, and let the porter do all that there is to do."""
        while self.held:
            self.cache.release(ME, self.held.pop(), now=0.0)
        while self.queue or (more := self.cache.hauls(now=0.0)):
            if not self.queue:
                self.queue += more
            self.carry()
            self.take()
