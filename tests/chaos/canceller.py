"""An honest caller with the asynchronous client: cancels at any moment, and takes the time.

Arguments: target, seed, log, tenant.  Runs until SIGTERM.  A line of the log for every probe (how
long one look-up took, on a session of its own) and for every session that ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from random import Random
from typing import Any

from chaos.universe import LAYOUT, MODELS, TOKENS, tokens_of
from prefixcache.client import connect_async
from prefixcache.client.async_client import AsyncClient
from prefixcache.client.async_session import AsyncSession
from prefixcache.errors import CacheError

PATIENCE_S = 20.0
PROBE_S = 0.03
MOST = 60
"""Tokens of what is asked for: what was given up is held until the next sign of life, and the pool
must not be full of it."""


class Canceller:
    """One process."""

    def __init__(self, target: str, seed: int, log: str, tenant: str) -> None:
        self.target, self.tenant = target, tenant
        self.random = Random(seed)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.cancelled = 0
        self.is_told = False
        """To end: a session that breaks in that moment may take the cancellation's place."""

    def tell(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "t": time.monotonic()} | fields)
        os.write(self.log, line.encode() + b"\n")

    async def run(self) -> None:
        task = asyncio.current_task()
        assert task is not None

        def end() -> None:
            self.is_told = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
        with contextlib.suppress(asyncio.CancelledError):
            while not self.is_told:
                try:
                    client = await connect_async(
                        self.target, timeout_s=PATIENCE_S, token=TOKENS[self.tenant]
                    )
                    async with client:
                        await self.live(client)
                except CacheError as error:
                    self.tell("lost", patience=PATIENCE_S, why=str(error)[:200])
                    await asyncio.sleep(0.1)
        self.tell("counts", cancelled=self.cancelled)

    async def live(self, client: AsyncClient) -> None:
        """Work until a session breaks."""
        session = await client.attach(self.random.choice(MODELS), LAYOUT, name="canceller")
        apart = await client.attach(self.random.choice(MODELS), LAYOUT, name="probe")
        async with asyncio.TaskGroup() as group:
            group.create_task(self.probe(apart))
            group.create_task(self.cancel(session))

    async def probe(self, session: AsyncSession) -> None:
        whole = tokens_of(0, 0)
        while True:
            begun = time.monotonic()
            await session.lookup(whole)
            self.tell("probe", took=time.monotonic() - begun)
            await asyncio.sleep(PROBE_S)

    async def cancel(self, session: AsyncSession) -> None:
        while True:
            whole = tokens_of(self.random.randrange(4), self.random.randrange(48))[: 4 * MOST]
            try:
                async with asyncio.timeout(self.random.random() * 0.006):
                    async with await session.acquire(whole, reserve=20, wait_s=1.0) as lease:
                        await lease.extend(len(whole) // 4 + 4)
            except TimeoutError:
                self.cancelled += 1
            except CacheError:
                if not session.alive:
                    raise
            await asyncio.sleep(0.04)


def main() -> None:
    canceller = Canceller(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
    while True:
        try:
            asyncio.run(canceller.run())
        except* CacheError as several:  # of the tasks of a session that broke
            canceller.tell("lost", patience=PATIENCE_S, why=str(several.exceptions[0])[:200])
            time.sleep(0.1)
        else:
            return


if __name__ == "__main__":
    main()
