"""Send each prompt to the machine that has most of it: an example, to be read and changed.

    python docs/router.py cache-1:50051 cache-2:50051 cache-3:50051

Follows the events of the service on each machine, and reads what happens from its input, in JSON:

    {"id": 7, "model": "m", "tokens": [1, 2, 3]}   a request; it answers {"id", "machine", "cached"}
    {"done": "cache-1:50051"}                      this machine has answered one
"""

from __future__ import annotations

import asyncio
import json
import sys

import prefixcache
from prefixcache.service.events.event_log import block_hash, namespace_hash
from prefixcache.types import Namespace, pack
from prefixcache.v1.prefixcache_pb2 import WatchResponse


class Machine:
    """What one machine has, and how much it has to do."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.is_there, self.load, self.sent, self.block_size = False, 0, 0, 0
        self.media: dict[tuple[str, ...], dict[bytes, set[str]]] = {}

    async def follow(self) -> None:
        """Know what it has, whatever connection breaks."""
        place = 0
        while True:
            try:
                async with await prefixcache.connect_async(self.address) as client:
                    async for told in client.watch(place):
                        self.hear(told)
                        place, self.is_there = told.next_sequence, True
            except prefixcache.CacheError:
                self.is_there = False
                await asyncio.sleep(0.5)

    def hear(self, told: WatchResponse) -> None:
        """Take in what is stored, in which medium, and what is not any more."""
        if told.is_snapshot and not told.events:
            self.media.clear()
        for event in told.events:
            space = (event.namespace.model, event.namespace.adapter, event.namespace.tenant)
            known = self.media.setdefault(space, {})
            if event.HasField("cleared"):
                del self.media[space]
            self.block_size = event.stored.block_size or self.block_size
            for one in event.stored.block_hashes:
                known.setdefault(one, set()).add(event.stored.medium)
            for one in event.removed.block_hashes:
                known.get(one, set()).discard(event.removed.medium)
                if not known.get(one):
                    known.pop(one, None)

    def matched(self, space: Namespace, tokens: list[int]) -> int:
        """Count the tokens of a prompt that it has from the first one on, in whole blocks."""
        known, link = self.media.get(space[:3]), namespace_hash(space)
        end = 0
        while known and self.block_size and end + self.block_size < len(tokens):
            link = block_hash(link, pack(tokens[end : end + self.block_size]))
            if link not in known:
                break
            end += self.block_size
        return end


async def main(addresses: list[str]) -> None:
    """Route until the input ends."""
    machines = {one: Machine(one) for one in addresses}
    async with asyncio.TaskGroup() as group:
        following = [group.create_task(one.follow()) for one in machines.values()]
        await route(machines)
        for task in following:
            task.cancel()


async def route(machines: dict[str, Machine]) -> None:
    """Say where each goes: to the longest prefix; of those alike, to who has least to do."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        if "done" in asked:
            machines[asked["done"]].load -= 1
            continue
        space, tokens = Namespace(asked["model"]), asked["tokens"]
        there = [one for one in machines.values() if one.is_there] or [*machines.values()]
        matched = {one.address: one.matched(space, tokens) for one in there}
        chosen = max(there, key=lambda one: (matched[one.address], -one.load, -one.sent))
        chosen.load, chosen.sent = chosen.load + 1, chosen.sent + 1
        answer = {"id": asked["id"], "machine": chosen.address, "cached": matched[chosen.address]}
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
