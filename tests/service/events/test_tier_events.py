"""Events of what lies below the pool: whoever follows them knows where each block lies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from core.follower import Follower
from patience import PATIENCE_S
from prefixcache.core import kv_events
from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import TierSizes
from prefixcache.core.tiers import LEVEL_BITS
from prefixcache.errors import PoolExhausted
from prefixcache.service import turns
from prefixcache.service.backing import Backing
from prefixcache.service.events.event_log import (
    Batch,
    Cleared,
    EventLog,
    Removed,
    Stored,
    block_hash,
    namespace_hash,
)
from prefixcache.types import Grant, Namespace, PoolHandle, WorkerId, pack

SPACE, ME = Namespace("model", salt="secret"), WorkerId(1)
SIZE = 2


class Tiered(Backing):
    """A pool with a tier below, and a porter who takes no time."""

    cache: PrefixCache

    def __init__(
        self,
        num_blocks: int = 8,
        host: int = 8,
        kind: str = "cuda-ipc",
        size: int = SIZE,
        space: Namespace = SPACE,
        disk: int = 0,
    ) -> None:
        self.space = space
        self.handle = PoolHandle(kind, "", num_blocks, size, None, 0, 0)  # type: ignore[arg-type]
        tiers = TierSizes(host, num_blocks // 4, 2, disk, host // 2 if disk else 0)
        self.cache = PrefixCache(num_blocks, size, tiers=tiers)
        self.cache.set_porter(is_there=True, now=0.0)
        self.cache.attach(ME, space, now=0.0)

    def store(self, *tokens: int) -> None:
        grant = self.cache.acquire(ME, self.space, pack(tokens), now=0.0)
        assert isinstance(grant, Grant)
        self.cache.commit(ME, grant.lease, len(tokens), now=0.0)
        self.cache.release(ME, grant.lease, now=0.0)

    def carry(self, good: int = 1000) -> None:
        """Have what is to be moved moved, up to `good` blocks of each haul."""
        while hauls := self.cache.hauls(now=0.0):
            for haul in hauls:
                self.cache.hauled(haul.id, min(good, len(haul.slots)), 0.01, now=0.0)

    def bring_back(self, *tokens: int) -> None:
        """Ask for what lies below, and wait for it."""
        self.cache.acquire(ME, self.space, pack(tokens), wait_s=9.0, now=0.0)
        self.carry()
        for _, grant in self.cache.take_outcomes():
            assert isinstance(grant, Grant)
            self.cache.release(ME, grant.lease, now=0.0)

    def truth(self) -> set[tuple[str, bytes]]:
        """Medium and hash of every block, by brute force."""
        found = set()
        for place, (space, tokens) in Follower(self.cache).truth().items():
            link = namespace_hash(space)
            for at in range(0, len(tokens), SIZE):
                link = block_hash(link, pack(tokens[at : at + SIZE]))
            found.add(((self.medium, "CPU", "STORAGE")[place >> LEVEL_BITS], link))
        return found


class Router:
    """What a router knows, from events alone: which hashes lie in which medium."""

    def __init__(self) -> None:
        self.stored: dict[tuple[str, bytes], bytes | None] = {}
        self.heard: list[tuple[str, str, int]] = []
        self.is_strict = True
        """Whether each block follows one that is known; behind a gap it does not."""

    def hear(self, batch: Batch) -> None:
        if batch.is_snapshot and not batch.events:
            self.stored.clear()
        for event in batch.events:
            self.heard.append((type(event).__name__, event.medium, len(event.hashes)))
            if isinstance(event, Stored):
                before = event.parent
                known = {one for _, one in self.stored}
                assert not self.is_strict or before is None or before in known
                for one in event.hashes:
                    assert (event.medium, one) not in self.stored, "told twice"
                    self.stored[event.medium, one] = before
                    before = one
            else:
                assert isinstance(event, Removed | Cleared)
                for one in event.hashes:
                    del self.stored[event.medium, one]


async def follow(log: EventLog, router: Router, pause_s: float = 0.0) -> None:
    with log.watching():
        async for batch in log.batches(0):
            router.hear(batch)
            await asyncio.sleep(pause_s)


async def end(log: EventLog, *tasks: asyncio.Task[None]) -> None:
    """Let those go who follow a log, of whom none had an end of its own."""
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(ended, asyncio.CancelledError)
    log.close()


def heard_of(story: Callable[[Tiered, Callable[[], Awaitable[Any]]], Awaitable[None]], **kind: Any):
    """Run a story over a tiered cache; give what was heard from its begin on, and the router."""
    tiered, router = Tiered(**kind), Router()
    log = EventLog(tiered)

    async def quiet() -> list[tuple[str, str, int]]:
        """Give what was heard since, once no more comes."""
        await asyncio.sleep(0.05)
        while log._raw or log._digest is not None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)
        heard, router.heard = router.heard, []
        return heard

    async def run() -> None:
        task = asyncio.create_task(follow(log, router))
        await quiet()
        await story(tiered, quiet)
        await quiet()
        await end(log, task)

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))
    assert set(router.stored) == tiered.truth()


def test_a_block_is_told_below_before_it_is_removed_above_and_above_before_below() -> None:
    async def story(tiered: Tiered, quiet: Callable[[], Awaitable[Any]]) -> None:
        tiered.store(1, 1, 2, 2, 3, 3)
        assert await quiet() == [("Stored", "GPU", 3)]
        tiered.store(4, 4, 5, 5, 6, 6)
        tiered.store(7, 7)
        tiered.carry()
        told = await quiet()
        assert told == [
            ("Stored", "GPU", 3),
            ("Stored", "GPU", 1),
            ("Stored", "CPU", 1),
            ("Removed", "GPU", 1),
        ]
        tiered.bring_back(1, 1, 2, 2, 3, 3, 9)
        told = await quiet()
        assert told.index(("Stored", "GPU", 1)) < told.index(("Removed", "CPU", 1))

    heard_of(story)


def test_between_two_levels_of_one_medium_nothing_is_told() -> None:
    async def story(tiered: Tiered, quiet: Callable[[], Awaitable[Any]]) -> None:
        tiered.store(1, 1, 2, 2, 3, 3)
        tiered.store(4, 4, 5, 5, 6, 6)
        tiered.store(7, 7)
        await quiet()
        tiered.carry()
        assert await quiet() == []
        tiered.bring_back(1, 1, 2, 2, 3, 3, 9)
        assert await quiet() == []

    heard_of(story, kind="shm")


def test_what_lies_on_a_disk_is_told_as_storage() -> None:
    async def story(tiered: Tiered, quiet: Callable[[], Awaitable[Any]]) -> None:
        tiered.store(1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)
        await quiet()
        tiered.carry()
        assert await quiet() == [("Stored", "STORAGE", 1), ("Removed", "GPU", 1)]

    heard_of(story, host=0, disk=8)


def test_what_goes_on_to_disk_is_told_there_before_it_is_removed_above() -> None:
    async def story(tiered: Tiered, quiet: Callable[[], Awaitable[Any]]) -> None:
        for first in (1, 4, 7, 10, 13):
            tiered.store(first, first, first + 1, first + 1)
            tiered.carry()
        told = await quiet()
        assert ("Stored", "STORAGE", 1) in told
        assert told.index(("Stored", "STORAGE", 1)) < told.index(("Removed", "CPU", 1))
        tiered.bring_back(1, 1, 2, 2, 9)
        told = [one[:2] for one in await quiet()]
        assert told.index(("Stored", "GPU")) < told.index(("Removed", "STORAGE"))

    heard_of(story, host=2, disk=8)


def test_a_copy_that_failed_and_what_is_given_up_are_removed_below() -> None:
    async def story(tiered: Tiered, quiet: Callable[[], Awaitable[Any]]) -> None:
        tiered.store(1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)
        await quiet()
        tiered.carry(good=0)
        told = [("Stored", "CPU", 1), ("Removed", "GPU", 1), ("Removed", "CPU", 1)]
        assert await quiet() == told
        tiered.store(8, 8, 9, 9, 10, 10)
        tiered.carry()
        await quiet()
        tiered.store(11, 11, 12, 12, 13, 13)
        tiered.carry()
        told = await quiet()
        assert ("Removed", "CPU", 2) in told

    heard_of(story, host=2)


def test_a_reset_is_told_of_all_levels() -> None:
    async def story(tiered: Tiered, quiet: Callable[[], Awaitable[Any]]) -> None:
        for first in range(1, 13, 3):
            tiered.store(first, first, first + 1, first + 1, first + 2, first + 2)
            tiered.carry()
        await quiet()
        assert {"GPU", "CPU"} == {medium for medium, _ in tiered.truth()}
        tiered.cache.reset(SPACE)
        told = await quiet()
        assert [name for name, *_ in told] == ["Removed", "Cleared"]
        tiered.store(1, 1, 2, 2)
        tiered.carry()

    heard_of(story)


def disturb(tiered: Tiered, draw: random.Random, steps: int, held: list[Any]) -> None:
    """Store, let go, go down, come back, fail, and now and then reset."""
    cache = tiered.cache
    for _ in range(steps):
        if held and (len(held) > 3 or draw.random() < 0.4):
            cache.release(ME, held.pop(draw.randrange(len(held))), now=0.0)
        elif draw.random() < 0.01:
            cache.reset(SPACE)
        elif draw.random() < 0.3:
            tiered.carry(draw.choice([0, 1, 1000, 1000]))
        else:
            prompt = [draw.randrange(3) for _ in range(4)] * draw.randrange(1, 4)
            prompt += [draw.randrange(2) for _ in range(draw.randrange(1, 20))]
            wait_s = draw.choice([0.0, 9.0])
            try:
                grant = cache.acquire(ME, SPACE, pack(prompt), wait_s=wait_s, now=0.0)
            except PoolExhausted:
                continue
            if isinstance(grant, Grant):
                held.append(grant.lease)
                cache.commit(ME, grant.lease, len(prompt), now=0.0)
        for _, outcome in cache.take_outcomes():
            if isinstance(outcome, Grant):
                held.append(outcome.lease)


@pytest.mark.parametrize("kind", ["cuda-ipc", "shm"])
@pytest.mark.parametrize("seed", range(10))
def test_events_give_where_all_lies_to_early_late_and_slow_watchers(
    seed: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And while the first one is told what there is, everything changes."""
    monkeypatch.setattr(kv_events, "_PAUSE_EVERY", 1)
    monkeypatch.setattr(turns, "_OTHERS_NS", 0)
    draw, tiered = random.Random(seed), Tiered(48, 60, kind)
    log = EventLog(tiered, ring=64)
    held: list[Any] = []

    async def story() -> tuple[Router, ...]:
        routers = Router(), Router(), Router()
        for one in routers:
            one.is_strict = False  # what is evicted at need leaves a gap before what is below
        disturb(tiered, draw, 100, held)
        tasks = [asyncio.create_task(follow(log, routers[0]))]
        tasks.append(asyncio.create_task(follow(log, routers[2], 0.03)))
        await asyncio.sleep(0)
        while log._replay is not None:
            disturb(tiered, draw, 2, held)
            await asyncio.sleep(0.001 if log._digest is None else 0)
        for round_ in range(12):
            disturb(tiered, draw, 40, held)
            await asyncio.sleep(0.015)
            if round_ == 6:
                tasks.append(asyncio.create_task(follow(log, routers[1])))
        await asyncio.sleep(0.5)
        await end(log, *tasks)
        return routers

    truth_of = [set(one.stored) for one in asyncio.run(story())]
    truth = tiered.truth()
    assert truth_of == [truth] * 3
    assert log.num_gaps


def test_who_comes_late_is_told_of_a_block_after_the_one_before_it() -> None:
    """Though leaves go down before what they follow."""
    tiered = Tiered(16, 60)
    log = EventLog(tiered)
    for first in range(1, 19, 3):
        tiered.store(1, 1, 2, 2, first, first + 7, first + 1, first + 8, first + 2, first + 9)
        tiered.carry()

    async def story() -> list[Router]:
        routers = [Router(), Router()]
        tasks = [asyncio.create_task(follow(log, routers[0]))]
        await asyncio.sleep(0.2)
        for first in range(20, 40, 3):
            tiered.store(1, 1, 2, 2, first, first + 7, first + 1, first + 8, first + 2, first + 9)
            tiered.carry()
        await asyncio.sleep(0.2)
        tasks.append(asyncio.create_task(follow(log, routers[1])))
        await asyncio.sleep(0.2)
        await end(log, *tasks)
        return routers

    for router in asyncio.run(story()):
        assert set(router.stored) == tiered.truth()


def test_what_is_between_two_levels_of_one_medium_is_told_once_to_who_comes_then() -> None:
    tiered = Tiered(kind="shm")
    log = EventLog(tiered)

    async def story() -> list[bytes]:
        with log.watching():
            await anext(log.batches(0))
            tiered.store(1, 1, 2, 2, 3, 3)
            tiered.store(4, 4, 5, 5, 6, 6)
            tiered.store(7, 7)
            await asyncio.sleep(0.1)
            tiered.carry()
            assert [entry[0] for entry in log._raw] == ["copied", "removed"]
            log._take(log._raw.popleft())
            told = [one for batch in log._snapshot(None) for one in batch.events]
        log.close()
        return [one for event in told for one in event.hashes]

    hashes = asyncio.run(asyncio.wait_for(story(), PATIENCE_S))
    assert sorted(hashes) == sorted(one for _, one in tiered.truth())
