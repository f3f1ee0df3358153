"""A cache with a tier below, in which everything comes and goes."""

from __future__ import annotations

import random
from collections.abc import Callable

from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import Haul, TierSizes
from prefixcache.errors import PoolExhausted
from prefixcache.types import Grant, LeaseId, Namespace, Partial, WorkerId, pack

ME = WorkerId(1)
SPACES = (Namespace("model", salt="secret"), Namespace("other"))


class Churn:
    """One worker who stores and asks, and a porter who is late, fails, dies, and is replaced.

    Args:
        draw: Of all that is drawn.
        num_blocks: Of the pool.
        host: Slots below it.
        policy: Which goes down first.
        disk: Slots below those.
    """

    def __init__(
        self,
        draw: random.Random,
        num_blocks: int,
        host: int,
        policy: str = "lru",
        disk: int = 0,
    ) -> None:
        self.draw = draw
        host_ahead = draw.randrange(1, host + 1) if disk else 0
        ahead = draw.randrange(1, num_blocks // 2)
        self.cache = PrefixCache(
            num_blocks,
            2,
            policy=policy,
            partial=draw.choice(list(Partial)),
            num_ghosts=draw.choice([None, 0, 3]),
            tiers=TierSizes(host, ahead, 2, disk, host_ahead),
        )
        self.cache.set_porter(is_there=True, now=0.0)
        for space in SPACES:
            self.cache.attach(ME, space, now=0.0)
        self.held: list[LeaseId] = []
        self.queue: list[Haul] = []
        self.most = num_blocks
        self.after: Callable[[], None] = lambda: None
        """Is called after whatever has changed anything."""

    def step(self) -> None:
        """Do one thing."""
        draw, cache = self.draw, self.cache
        kind = draw.random()
        if kind < 0.25:
            self.queue += cache.hauls(now=0.0)
        elif kind < 0.45:
            self.carry()
        elif kind < 0.455:
            cache.reset(draw.choice(SPACES))
        elif kind < 0.465:
            late, self.queue = self.queue, []
            cache.set_porter(is_there=False, now=0.0)
            self.after()
            for haul in late:  # what he says last comes too late
                cache.hauled(haul.id, len(haul.slots), 0.0, now=0.0)
            cache.set_porter(is_there=True, now=0.0)
        elif self.held and (len(self.held) > 2 or kind < 0.7):
            cache.release(ME, self.held.pop(draw.randrange(len(self.held))), now=0.0)
        else:
            self.ask()
        self.after()
        for _, outcome in cache.take_outcomes():
            if isinstance(outcome, Grant):
                self.held.append(outcome.lease)

    def carry(self) -> None:
        """End the oldest haul, as a rule a good one."""
        if self.queue:
            haul = self.queue.pop(0)
            if haul.id % 2 and self.cache.spare(haul.id):
                return
            good = self.draw.choice([0, 1, 9, 9, 9, 9, 9, 9])
            self.cache.hauled(haul.id, min(good, len(haul.slots)), 0.01, now=0.0)

    def ask(self) -> None:
        """Ask for a prompt; commit all of it, or a part."""
        draw, cache = self.draw, self.cache
        size = draw.randrange(1, self.most)
        prompt = [*(draw.randrange(2) for _ in range(3)), *[draw.randrange(3)] * size][:size]
        try:
            space, wait_s = draw.choice(SPACES), draw.choice([0.0, 9.0])
            grant = cache.acquire(ME, space, pack(prompt), wait_s=wait_s, now=0.0)
        except PoolExhausted:
            return
        if isinstance(grant, Grant):
            self.held.append(grant.lease)
            self.after()
            cache.commit(ME, grant.lease, max(grant.num_cached, draw.randrange(size + 1)), now=0.0)
