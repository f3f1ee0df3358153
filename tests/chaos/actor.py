"""A worker in a storm: leases, verifies all it reads, writes, commits, extends, forks, rolls back.

Arguments: target, seed, log, tenant, patience.  Runs until SIGTERM; a line of the log per
event (see `history.py`).

A read counts when it is certain that the lease stood all the while: its own deadline has not
passed, the pool has not been taken over, and a sign of life sent *after* the read is answered.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from array import array
from random import Random
from typing import Any

import prefixcache
from chaos.pattern import Pool, prompt
from chaos.universe import (
    CHAT_TOKENS,
    LAYOUT,
    MODELS,
    NUM_CHATS,
    NUM_SYSTEMS,
    SYSTEM_TOKENS,
    TOKENS,
    space,
    tokens_of,
)
from prefixcache.client import Client, Lease, Session
from prefixcache.errors import CacheError, ServiceUnavailable
from prefixcache.pool import epoch_of, map_pool
from prefixcache.types import Namespace, Segment

PAUSE_S = 0.02
PIECE = 4
"""Tokens that are written at once."""
BACKOFF_S = (0.02, 0.3)
RESETS = 0.004
"""What part of the requests has a reset before it."""


class Actor:
    """One life of one worker process."""

    models: tuple[str, ...] = MODELS
    resets = RESETS

    def __init__(self, target: str, seed: int, log: str, tenant: str, patience_s: float) -> None:
        self.target = target
        self.tenant = tenant
        self.patience_s = patience_s
        self.random = Random(seed)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.ops = itertools.count(1)
        self.name = f"{os.getpid()}.{seed}"
        self.ending = False
        self.counts = dict.fromkeys(("unsure", "lost", "refused", "cancelled"), 0)

    def tell(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "t": time.monotonic()} | fields)
        os.write(self.log, line.encode() + b"\n")

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self.end)
        delay_s = BACKOFF_S[0]
        while not self.ending:
            try:
                with prefixcache.connect(
                    self.target, timeout_s=self.patience_s, token=TOKENS[self.tenant]
                ) as client:
                    self.live(client)
                delay_s = BACKOFF_S[0]
            except CacheError as error:
                self.counts["lost"] += 1
                self.tell("lost", patience=self.patience_s, why=str(error)[:200])
                time.sleep(delay_s * (0.5 + self.random.random()))
                delay_s = min(2 * delay_s, BACKOFF_S[1])
        self.tell("counts", **self.counts)

    def end(self, *_: object) -> None:
        self.ending = True

    def live(self, client: Client) -> None:
        """Work until the session breaks."""
        model = self.random.choice(self.models)
        session = client.attach(model, LAYOUT, name=f"actor{self.random.randrange(100)}")
        memory = map_pool(session.pool)
        pool = Pool(memory, session.pool)
        named = space(self.tenant, model)
        while not self.ending:
            if self.random.random() < self.resets:
                self.reset(client, model)
            try:
                if self.random.random() < 0.2:
                    self.think_better_of_it(session)
                self.serve(session, pool, named)
                if self.random.random() < 0.25 and session.segments is not None:
                    self.move(session, pool, named)
            except ServiceUnavailable:
                raise
            except CacheError:
                self.counts["refused"] += 1
                if not session.alive:
                    raise
            time.sleep(PAUSE_S * self.random.random())

    def reset(self, client: Client, model: str) -> None:
        op = f"{self.name}.{next(self.ops)}"
        self.tell("reset", op=op, model=space(self.tenant, model))
        client.reset(Namespace(model))
        self.tell("answer", op=op)

    def think_better_of_it(self, session: Session) -> None:
        """Ask for a lease, and hang up at any moment."""
        whole = tokens_of(self.random.randrange(NUM_SYSTEMS), self.random.randrange(NUM_CHATS))
        asked = session.acquire_later(whole, reserve=30, wait_s=1.0)
        time.sleep(self.random.choice((0.0, 0.0005, 0.003)))
        if not asked.cancel():
            asked.result(self.patience_s).release()
        self.counts["cancelled"] += 1

    def serve(self, session: Session, pool: Pool, model: str) -> None:
        """One request from its prompt to its release."""
        random = self.random
        system, chat = random.randrange(NUM_SYSTEMS), random.randrange(NUM_CHATS)
        whole = tokens_of(system, chat)
        count = SYSTEM_TOKENS + random.randrange(1, CHAT_TOKENS - 30)
        asked = time.monotonic()
        wait_s = 0.5 if random.random() < 0.3 else 0.0
        with session.acquire(whole[: 4 * count], reserve=30, wait_s=wait_s) as lease:
            told = time.monotonic()
            fields = {"model": model, "system": system, "chat": chat}
            self.tell("hit", asked=asked, count=lease.num_cached, **fields)
            pool.copy(lease.copies)
            self.read(session, pool, model, whole, lease)
            assert told >= asked
            self.write(pool, model, whole, lease, lease.num_cached, count)
            self.commit(lease, fields, count, b"")
            more = random.randrange(1, 30)
            for end in range(count + 1, count + more):  # decode
                if end % 7 == 0:
                    time.sleep(0.003)
                self.write(pool, model, whole, lease, end - 1, end)
                if end % 3 == 0 or end == count + more - 1:
                    known = count
                    self.commit(lease, fields, end, whole[4 * known : 4 * end])
                    count = end
            self.verify(session, pool, model, whole, lease, count)
            self.read_back(session, lease, whole, count, asked=asked, model=model)
            if random.random() < 0.15:
                self.fork(session, pool, model, whole, lease, count)
            if random.random() < 0.15:
                self.roll_back(pool, model, whole, lease, fields, count)

    def move(self, session: Session, pool: Pool, model: str) -> None:
        """A request with segments: what it copies is exact, and nobody else may find what it is."""
        random = self.random
        system, chat = random.randrange(NUM_SYSTEMS), random.randrange(NUM_CHATS)
        stored, beside = tokens_of(system, chat), f"{model} approximate"
        start = stored[: 4 * SYSTEM_TOKENS] if random.random() < 0.5 else b""
        asked = start + prompt((77 + random.randrange(3), 1 + random.randrange(6)))
        asked += stored[4 * SYSTEM_TOKENS : 4 * (SYSTEM_TOKENS + CHAT_TOKENS - 20)]
        count = len(asked) // 4
        with session.acquire(asked, reserve=4, segments=session.segments) as lease:
            if not lease.approximate:
                pool.copy(lease.copies)
                self.verify(session, pool, model, asked, lease, lease.num_cached)
                return
            self.tell("moved")
            size = pool.handle.block_size
            num_moved = 0
            for one in lease.segments:
                source = asked if one.is_exact else stored
                length = len(one.blocks) * size
                num_moved += 0 if one.is_exact else length
                self.verify_at(session, pool, model, source, lease, one, length)
            pool.copy(lease.copies)
            if lease.ledger.approximate + lease.ledger.resumed > num_moved:  # in place, beside
                self.verify(session, pool, beside, asked, lease, lease.num_cached)
                self.write(pool, beside, asked, lease, lease.num_cached, count)
            else:
                self.write(pool, beside, asked, lease, 0, count)
            lease.commit(count)
            self.verify(session, pool, beside, asked, lease, count)

    def verify_at(
        self,
        session: Session,
        pool: Pool,
        model: str,
        whole: bytes,
        lease: Lease,
        segment: Segment,
        length: int,
    ) -> None:
        """Read a donor's tokens at the place they were computed for."""
        end = segment.source + length
        table = array("i", [segment.blocks[0]]) * (segment.source // pool.handle.block_size)
        table.extend(segment.blocks)
        lease.check()
        wrong = pool.wrong(model, whole, table, end, start=segment.source)
        try:
            session.renew()
            certain = session.alive and epoch_of(pool.memory) == pool.handle.epoch
            lease.check()
        except CacheError:
            self.counts["unsure"] += 1
            raise
        if certain and wrong:
            self.tell("wrong", lease=lease.id, count=end, wrong=wrong, model=f"donor of {model}")

    def write(
        self, pool: Pool, model: str, whole: bytes, lease: Lease, start: int, end: int
    ) -> None:
        """Write as a device does: once begun, it asks nobody whether it still may."""
        lease.check()
        table = lease.block_table
        for at in range(start, end, PIECE):
            pool.write(model, whole, table, at, min(at + PIECE, end))
            time.sleep(0.003)

    def commit(self, lease: Lease, fields: dict[str, Any], count: int, new: bytes) -> None:
        op = f"{self.name}.{next(self.ops)}"
        self.tell("commit", op=op, count=count, **fields)
        lease.commit(count, new)
        self.tell("answer", op=op)

    def read(self, session: Session, pool: Pool, model: str, whole: bytes, lease: Lease) -> None:
        """Read what a lease was granted, and tell how much of it came back from below the pool."""
        is_certain = self.verify(session, pool, model, whole, lease, lease.num_cached)
        if is_certain and lease.ledger.restored:
            self.tell("restored", count=lease.ledger.restored)

    def verify(
        self, session: Session, pool: Pool, model: str, whole: bytes, lease: Lease, end: int
    ) -> bool:
        """Read all tokens below `end`, and say so if one is wrong although the lease stood.

        Returns:
            Whether all of them were certain, and right.
        """
        lease.check()
        wrong = self.look(pool, model, whole, lease, end)
        try:
            lease.check()
            taken_over = epoch_of(pool.memory) != pool.handle.epoch
            session.renew()
            certain = session.alive and not taken_over
        except CacheError:
            self.counts["unsure"] += 1
            raise
        if not certain:
            self.counts["unsure"] += 1
        elif wrong:
            self.tell("wrong", lease=lease.id, count=end, wrong=wrong, model=model)
        else:
            self.tell("seen", count=end)
            return True
        return False

    def look(self, pool: Pool, model: str, whole: bytes, lease: Lease, end: int) -> int:
        """Count the tokens below `end` that are wrong."""
        return pool.wrong(model, whole, lease.block_table, end)

    def read_back(
        self, session: Session, lease: Lease, whole: bytes, count: int, **fields: Any
    ) -> None:
        """What this very lease has committed and still protects is found by everybody."""
        found = session.lookup(whole[: 4 * count] + bytes(4))
        lease.check()
        self.tell("found", committed=count, found=found.num_hit + found.num_partial, **fields)

    def fork(
        self, session: Session, pool: Pool, model: str, whole: bytes, lease: Lease, count: int
    ) -> None:
        for child in lease.fork(2):
            with child:
                pool.copy(child.extend(count + 4).copies)
                self.verify(session, pool, model, whole, child, count)
                other = whole[: 4 * count] + bytes(16)
                self.write(pool, model, other, child, count, count + 4)

    def roll_back(
        self, pool: Pool, model: str, whole: bytes, lease: Lease, fields: dict[str, Any], count: int
    ) -> None:
        """Give tokens up, as after a wrong speculation, and write others in their place."""
        keep = self.random.randrange(1, count)
        pool.copy(lease.truncate(keep).copies)
        end = min(count, keep + 6)
        pool.copy(lease.extend(end).copies)
        self.write(pool, model, whole, lease, keep, end)
        self.commit(lease, fields, end, whole[4 * keep : 4 * end])


if __name__ == "__main__":
    Actor(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], float(sys.argv[5])).run()
