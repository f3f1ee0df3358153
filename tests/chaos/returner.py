"""A worker in a storm that comes back to its chats when the pool has long evicted them.

Arguments as those of `chaos.actor`, and under which system its chats are.  They are more than the
pool holds, and nobody else's, so what they wait for is the tier below it and nothing else.  Waits
are told with what was predicted.
"""

from __future__ import annotations

import sys
import time

from chaos.actor import Actor
from chaos.pattern import Pool
from chaos.universe import LONG_MODEL, LONG_TOKENS, NUM_LONG, tokens_of
from prefixcache.client import Client, Session
from prefixcache.types import Namespace

WAIT_S = 60.0
"""Far longer than anybody may be kept waiting by a tier."""
STEP = 64
REST_S = 0.15
"""Tokens that are computed at once, and the rest after them: about what a processor takes for so
many.  What comes back is quicker, also on a crowded machine.
"""

EXPLAINED = 0.25
"""Share of the requests of which is asked before what will become of them: that takes longer than
what lies below the pool."""

ASKED_S = 0.02
"""By when the store has said what lies there to who wants to know it."""


class Returner(Actor):
    """One life of one worker process."""

    models = (LONG_MODEL,)
    resets = 0.001

    def __init__(
        self, target: str, seed: int, log: str, tenant: str, patience_s: float, system: int
    ) -> None:
        super().__init__(target, seed, log, tenant, patience_s)
        self.system = system
        self.client: Client | None = None
        self.cancelled = -1
        """The chat of which a request was given up last: what it began may be on its way."""

    def live(self, client: Client) -> None:
        self.client = client
        super().live(client)

    def think_better_of_it(self, session: Session) -> None:
        """Ask for what lies below, and hang up while it is on its way."""
        self.cancelled = self.random.randrange(NUM_LONG)
        asked = session.acquire_later(tokens_of(self.system, self.cancelled), wait_s=WAIT_S)
        time.sleep(self.random.choice((0.0, 0.001, 0.01)))
        if not asked.cancel():
            asked.result(WAIT_S).release()
        self.counts["cancelled"] += 1

    def serve(self, session: Session, pool: Pool, model: str) -> None:
        """One request, and what was predicted of it."""
        assert self.client is not None
        chat = self.random.randrange(NUM_LONG)
        whole = tokens_of(self.system, chat)
        predicted_s = 0.0
        if self.random.random() < EXPLAINED:
            predicted_s = self.predict(Namespace(model.partition("/")[2]), whole)
        asked = time.monotonic()
        with session.acquire(whole, wait_s=WAIT_S) as lease:
            told = time.monotonic()
            fields = {"model": model, "system": self.system, "chat": chat}
            self.tell("hit", asked=asked, count=lease.num_cached, **fields)
            if predicted_s and not lease.ledger.joined and chat != self.cancelled:
                session.lookup(whole)
                looked = time.monotonic() - told
                self.tell("waited", took=told - asked, predicted=predicted_s, looked=looked)
            pool.copy(lease.copies)
            self.read(session, pool, model, whole, lease)
            for at in range(lease.num_cached, LONG_TOKENS, STEP):
                lease.check()
                end = min(at + STEP, LONG_TOKENS)
                pool.write(model, whole, lease.block_table, at, end)
                time.sleep(REST_S)
            self.commit(lease, fields, LONG_TOKENS, b"")
            self.verify(session, pool, model, whole, lease, LONG_TOKENS)
            told_of = lease.ledger
            self.tell(
                "returned",
                tokens=LONG_TOKENS,
                hit=told_of.hit + told_of.partial,
                restored=told_of.restored,
                joined=told_of.joined,
                waited=told - asked,
                took=time.monotonic() - asked,
            )

    def predict(self, namespace: Namespace, tokens: bytes) -> float:
        """Say how long what lies below is to take, in the store as well; 0: nothing lies there."""
        assert self.client is not None
        self.client.explain(namespace, tokens)
        time.sleep(ASKED_S)
        told = self.client.explain(namespace, tokens)
        elsewhere = [part.fetch_s for part in told.below if part.tier == "remote"]
        return told.below_s + sum(elsewhere) if told.num_below else 0.0


if __name__ == "__main__":
    Returner(
        sys.argv[1],
        int(sys.argv[2]),
        sys.argv[3],
        sys.argv[4],
        float(sys.argv[5]),
        int(sys.argv[6]),
    ).run()
