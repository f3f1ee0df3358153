"""A machine beside a store that forgets and lies, whose porter and carrier die: at random.

What a block holds is known: whoever is granted one reads the prefix that he asked for, or it was
not granted to him as cached.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from core.test_remote import ME, OTHER, SIZE, SPACE, name_of
from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import Haul, TierSizes
from prefixcache.core.remote import NAME_BYTES
from prefixcache.errors import CacheError
from prefixcache.types import TOKEN_BYTES, Grant, Partial, TicketId, WorkerId, pack

WIDTH = SIZE * TOKEN_BYTES


class World:
    """A cache, what its blocks really hold, and what the store does."""

    def __init__(self, seed: int, store: dict[bytes, bytes], *, host: int) -> None:
        self.random = Random(seed)
        self.store = store
        self.named: dict[bytes, bytes] = {}
        """The prefix that each object is to hold."""
        sizes = TierSizes.of(160, host=host, remote=4)
        self.cache = PrefixCache(160, SIZE, partial=Partial.OFF, tiers=sizes, ttl_s=1e6)
        self.memory: dict[int, bytes] = {}
        self.slots: dict[int, tuple[int, bytes]] = {}
        self.queue: list[Haul] = []
        self.asked = []  # type: ignore[var-annotated]
        self.leases: list[tuple[WorkerId, Grant, bytes]] = []
        self.waiting: dict[int, tuple[WorkerId, bytes]] = {}
        self.now = 0.0
        self.seen: Counter[str] = Counter()
        for worker in (ME, OTHER):
            self.cache.attach(worker, SPACE, now=0.0)
        self.cache.set_porter(is_there=True, now=0.0)
        self.cache.set_remote(is_there=True, now=0.0)

    def prompt(self) -> bytes:
        """One of some prompts that begin alike."""
        chat, turns = self.random.randrange(6), self.random.randint(9, 20)
        return pack([7] * 16 + [chat * 1000 + at for at in range(turns * 8)] + [1])

    def take(self, worker: WorkerId, prompt: bytes, grant: Grant) -> None:
        """Look at what is cached, and compute the rest."""
        for at in range(len(prompt) // WIDTH):
            block, prefix = grant.block_table[at], prompt[: (at + 1) * WIDTH]
            if at < grant.num_cached // SIZE:
                assert self.memory[block] == prefix, "read what is not its prefix"
            else:
                self.memory[block] = prefix
        self.seen["restored"] += grant.ledger.restored
        self.leases.append((worker, grant, prompt))

    def acquire(self) -> None:
        worker, prompt = self.random.choice((ME, OTHER)), self.prompt()
        wait_s = self.random.choice((0.0, 5.0, 60.0))
        try:
            told = self.cache.acquire(worker, SPACE, prompt, wait_s=wait_s, now=self.now)
        except CacheError:
            return
        if isinstance(told, Grant):
            self.take(worker, prompt, told)
        else:
            self.waiting[told.ticket] = (worker, prompt)

    def settle(self) -> None:
        for ticket, outcome in self.cache.take_outcomes():
            worker, prompt = self.waiting.pop(ticket)
            if isinstance(outcome, Grant):
                self.take(worker, prompt, outcome)

    def commit(self) -> None:
        if self.leases:
            worker, grant, prompt = self.random.choice(self.leases)
            whole = len(prompt) // WIDTH * SIZE
            self.cache.commit(worker, grant.lease, whole, now=self.now)

    def release(self) -> None:
        if self.leases:
            at = self.random.randrange(len(self.leases))
            worker, grant, _ = self.leases.pop(at)
            self.cache.release(worker, grant.lease, now=self.now)

    def ask(self) -> None:
        self.asked += self.cache.questions(now=self.now)

    def answer(self) -> None:
        if not self.asked:
            return
        question = self.asked.pop(self.random.randrange(len(self.asked)))
        count = len(question.tokens) // WIDTH
        names = []
        for at in range(question.first, count):
            names.append(name_of(question, at))
            self.named[names[-1]] = question.tokens[: (at + 1) * WIDTH]
        there = bytearray(name in self.store for name in names)
        if there and self.random.random() < 0.1:
            there[self.random.randrange(len(there))] ^= 1  # it says what is not so
        if self.random.random() < 0.1:
            there = there[: self.random.randrange(len(there) + 1)]
        self.cache.answered(question.id, bytes(there), b"".join(names), now=self.now)
        self.seen["answered"] += 1

    def carry(self) -> None:
        self.queue += self.cache.hauls(now=self.now)
        if not self.queue:
            return
        haul = self.queue.pop(0)
        good = sum(self._copy(haul, at) for at in range(len(haul.slots or haul.blocks)))
        self.cache.hauled(haul.id, good, self.random.random() / 100, now=self.now)

    def _copy(self, haul: Haul, at: int) -> bool:
        """Copy a block of a haul; whether all is as it should be, up to and with it."""
        if haul.names:
            name = haul.names[at * NAME_BYTES : (at + 1) * NAME_BYTES]
            if not haul.is_up:
                held = self.memory[haul.blocks[at]]
                assert held == self.named[name], "stored what is not its prefix"
                self.store[name] = held
                self.seen["stored"] += 1
                return True
            self.memory[haul.blocks[at]] = self.store.get(name, b"")
            is_good = self.memory[haul.blocks[at]] == self.named[name]
        elif not haul.is_up:
            self.slots[haul.slots[at]] = (haul.stamps[at], self.memory[haul.blocks[at]])
            return True
        else:
            stamp, held = self.slots[haul.slots[at]]
            self.memory[haul.blocks[at]] = held
            is_good = stamp == haul.stamps[at]
        if not is_good:
            self.seen["not as it should be"] += 1
            self.bad = haul.id
        return is_good and getattr(self, "bad", None) != haul.id

    def lie(self) -> None:
        if self.store:
            name = self.random.choice(list(self.store))
            if self.random.random() < 0.5:
                del self.store[name]
            else:
                self.store[name] = self.random.choice(list(self.store.values()))

    def end_porter(self) -> None:
        self.queue.clear()
        self.cache.set_porter(is_there=False, now=self.now)
        self.cache.check()
        self.settle()
        self.cache.set_porter(is_there=True, now=self.now)

    def end_carrier(self) -> None:
        self.asked.clear()
        self.cache.set_remote(is_there=False, now=self.now)
        for haul in [one for one in self.queue if one.names]:
            self.queue.remove(haul)
            self.cache.hauled(haul.id, 0, 0.0, now=self.now)
        self.cache.check()
        self.settle()
        self.cache.set_remote(is_there=True, now=self.now)

    def pause(self) -> None:
        self.now += self.random.choice((0.001, 0.01, 0.1, 2.0))
        self.cache.expire(now=self.now)

    def reset(self) -> None:
        self.cache.reset(SPACE)

    def cancel(self) -> None:
        if self.waiting:
            ticket = self.random.choice(list(self.waiting))
            worker, _ = self.waiting.pop(ticket)
            self.cache.cancel(worker, TicketId(ticket), now=self.now)

    def step(self) -> None:
        often = (self.acquire, self.commit, self.release, self.ask, self.answer, self.carry)
        seldom = (
            *(
                self.lie,
                self.lie,
                self.lie,
                self.end_porter,
                self.end_carrier,
                self.pause,
                self.pause,
            ),
            *(self.reset, self.cancel),
        )
        rare = self.random.random() < 0.04
        step = self.random.choice(seldom if rare else often)
        step()
        self.settle()
        self.cache.check()


@pytest.mark.walk
@pytest.mark.parametrize("host", [0, 200])
def test_nobody_reads_what_is_not_his_prefix(host: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(5):
        store: dict[bytes, bytes] = {}
        for life in range(3):  # of machines that come after each other, and find the store as it is
            world = World(100 * seed + life, store, host=host)
            for _ in range(600):
                world.step()
            seen += world.seen
            seen["restored from there"] += world.cache.counts(now=world.now).remote_restored
    for what in ("stored", "restored from there", "answered", "not as it should be"):
        assert seen[what], seen
