"""A cell: machines that share requests, each with the real core; who gets which, what is known.

    python -m prefixcache_bench.experiments.cell [--nodes 64] [--chats 2500] [--seed 1] [--json]

```
chats ──► router ──► node: pool and HOST, the real core ──► events ──► the router's index
                         └ what no node has: REMOTE, if there is one, else computed
```
Chats (a system prompt of some hundreds, several turns with pauses) arrive at random; all is drawn
from a seed, and every way of routing gets the same.  What each node finds is what the core finds:
blocks are granted, committed, evicted to the tier below and restored from it.  The router knows
what the events say.  Four ways to route:

```
anywhere      at random
by a key      a ring of the nodes, by the first 256 tokens: grpc's ring_hash
by events     the longest prefix that the events tell, then the least load: docs/router.py
by cost       the least of what is queued and what would have to be computed
              (of nodes that are alike in both, any)
```
**Modelled, not measured**: time (a node computes, or fetches, one prompt after the other, at the
rates below; decoding takes none), copies between tiers (they take no time), and REMOTE, which this
project does not have: all that is committed lies there too, in objects of 256 tokens, and the least
recently used go.  At two thirds of the requests one node is lost, with all that it had.
"""

from __future__ import annotations

import argparse
import random
import sys
from bisect import bisect
from collections import Counter, OrderedDict
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import accumulate
from typing import Final

from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import TierSizes
from prefixcache.core.tiers import Places
from prefixcache.plain_json import json_text
from prefixcache.types import (
    TOKEN_BYTES,
    BlockId,
    BlockTable,
    Grant,
    Namespace,
    Partial,
    Waiting,
    WorkerId,
)
from prefixcache_bench.experiments.generators import Kind, Shape, generate
from prefixcache_bench.experiments.traces import Request
from prefixcache_bench.reports.provenance import provenance

SIZE: Final = 16
WIDTH: Final = SIZE * TOKEN_BYTES
OBJECT: Final = 16
"""Blocks of an object in REMOTE."""
PREFILL, HOST, REMOTE = 10_000.0, 200_000.0, 50_000.0
"""Tokens a second that a node computes, restores, fetches."""
KEY: Final = 256 * TOKEN_BYTES
POINTS: Final = 128
"""Of each node on the ring."""
ME: Final = WorkerId(1)
WAYS: Final = ("anywhere", "by a key", "by events", "by cost")
KEY_BYTES, EVENT_BYTES = 9, 40
"""Of a message: of each hash, and of an event beside its hashes; without token ids."""


@dataclass(frozen=True, slots=True)
class Cell:
    """How large all is."""

    nodes: int = 64
    chats: int = 2500
    seed: int = 1
    pool: int = 2048
    """Blocks of a node's pool."""
    host: int = 4096
    remote: int = 8192
    """Blocks of REMOTE for each node."""
    rate: float = 3.0
    """Requests a second for each node, about."""
    prompts: int = 400
    turns: int = 4

    def requests(self) -> list[Request]:
        """Draw all requests, in order of time."""
        shape = Shape(
            count=self.chats,
            seed=self.seed,
            rate=self.rate * self.nodes / self.turns,
            turns=self.turns,
            prefixes=self.prompts,
            prefix_tokens=1200,
            think_s=20.0,
            popularity=0.8,
        )
        return generate(Kind.CHATS, shape).requests


class Index:
    """What a router knows of a cell: for each block the nodes that have it, a bit for each."""

    def __init__(self) -> None:
        self.nodes: dict[int, int] = {}
        self.num_stored = self.num_removed = self.num_events = 0
        """Blocks that were told as stored and as removed; events."""

    def put(self, one: int, node: int) -> None:
        """Note that a node has a block."""
        self.nodes[one] = self.nodes.get(one, 0) | 1 << node

    def drop(self, one: int, node: int) -> None:
        """Note that it has not any more."""
        left = self.nodes[one] & ~(1 << node)
        if left:
            self.nodes[one] = left
        else:
            del self.nodes[one]

    def forget(self, node: int) -> None:
        """Note that a node is gone."""
        for one in [one for one, nodes in self.nodes.items() if nodes >> node & 1]:
            self.drop(one, node)

    def matched(self, chain: list[int]) -> dict[int, int]:
        """Give the leading blocks that each node has, for those that have any."""
        found: dict[int, int] = {}
        left = -1
        for at, one in enumerate(chain):
            still = left & self.nodes.get(one, 0)
            gone = left & ~still if at else 0
            while gone:
                low = gone & -gone
                found[low.bit_length() - 1] = at
                gone ^= low
            if not still:
                return found
            left = still
        while left > 0:
            low = left & -left
            found[low.bit_length() - 1] = len(chain)
            left ^= low
        return found

    @property
    def entry_bytes(self) -> float:
        """What an entry takes in this process."""
        sizes = sum(sys.getsizeof(one) + sys.getsizeof(nodes) for one, nodes in self.nodes.items())
        return (sys.getsizeof(self.nodes) + sizes) / max(1, len(self.nodes))


class Node:
    """One machine: the real core, and what it tells."""

    def __init__(self, number: int, cell: Cell, index: Index, space: Namespace) -> None:
        self.number, self.index, self.space = number, index, space
        self.cache = PrefixCache(
            cell.pool,
            SIZE,
            partial=Partial.OFF,
            ttl_s=1e9,
            tiers=TierSizes.of(cell.pool, host=cell.host),
        )
        self.cache.set_porter(is_there=True, now=0.0)
        self.cache.attach(ME, space, now=0.0)
        self.cache.observe(self, below=self)
        self.free_at = self._now = 0.0
        self.num_requests = 0
        self._hashes: dict[int, int] = {}
        self._copies: Counter[int] = Counter()

    # ------------------------------------------------------------------ what the core tells

    def _put(self, places: Places | BlockTable, hashes: list[int]) -> None:
        index = self.index
        index.num_stored += len(hashes)
        index.num_events += 1
        for place, one in zip(places, hashes, strict=True):
            self._hashes[place] = one
            self._copies[one] += 1
            index.put(one, self.number)

    def _drop(self, places: Places | BlockTable) -> None:
        self.index.num_removed += len(places)
        self.index.num_events += 1
        for place in places:
            one = self._hashes.pop(place)
            self._copies[one] -= 1
            if not self._copies[one]:
                del self._copies[one]
                self.index.drop(one, self.number)

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        """Hear of a run in the pool.  Of what came back was told already."""
        known = next((at for at, one in enumerate(blocks) if one not in self._hashes), len(blocks))
        if known < len(blocks):
            before = blocks[known - 1] if known else parent
            start = 0 if before is None else self._hashes[before]
            self._put(blocks[known:], chain_of(tokens[known * WIDTH :], start))

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        """Hear of blocks that leave the pool."""
        self._drop(blocks)

    def copied(self, namespace: Namespace, sources: Places, places: Places) -> None:
        """Hear of blocks that lie elsewhere, too."""
        self._put(places, [self._hashes[one] for one in sources])

    def lost(self, places: Places) -> None:
        """Hear of places that hold nothing any more."""
        self._drop(places)

    def found(
        self, namespace: Namespace, parent: int | None, tokens: bytes, places: Places
    ) -> None:
        """Hear nothing: who listens from the start is told nothing again."""

    def cleared(self, namespace: Namespace) -> None:
        """Hear nothing: nothing is reset here."""

    left = cleared

    # ------------------------------------------------------------------ a request

    def _carry(self) -> None:
        while hauls := self.cache.hauls(now=self._now):
            for haul in hauls:
                count = len(haul.slots)
                self.cache.hauled(haul.id, count, count * SIZE / HOST, now=self._now)

    def serve(self, request: Request) -> tuple[int, int]:
        """Serve a request; give its tokens that were in the pool, and below it.

        By a clock that goes on while it computes: from it the core learns how long that takes.
        """
        end = request.prompt * TOKEN_BYTES
        answer = request.tokens[end:]
        reserve = len(answer) // TOKEN_BYTES
        told: Grant | Waiting = self.cache.acquire(
            ME, self.space, request.tokens[:end], now=self._now, reserve=reserve, wait_s=1e6
        )
        self._carry()
        if isinstance(told, Waiting):
            ((_, outcome),) = self.cache.take_outcomes()
            assert isinstance(outcome, Grant), outcome
            told = outcome
        self._now += (request.prompt - told.num_cached) / PREFILL
        self.cache.commit(ME, told.lease, request.prompt, now=self._now)
        self.cache.commit(ME, told.lease, request.prompt + reserve, answer, now=self._now)
        self.cache.release(ME, told.lease, now=self._now)
        self._carry()
        self.num_requests += 1
        restored = told.ledger.restored
        return told.num_cached - restored, restored


class Remote:
    """What all nodes share, in the model: objects by the hash at their end; the oldest go."""

    def __init__(self, num_blocks: int) -> None:
        self.most = num_blocks // OBJECT
        self.objects: OrderedDict[int, None] = OrderedDict()

    def put(self, chain: list[int]) -> None:
        """Keep the whole objects of a prefix."""
        for one in chain[OBJECT - 1 :: OBJECT]:
            self.objects[one] = None
            self.objects.move_to_end(one)
        while len(self.objects) > self.most:
            self.objects.popitem(last=False)

    def matched(self, chain: list[int], start: int) -> int:
        """Give how many blocks of a prefix can be had, if `start` are there already."""
        at = start // OBJECT * OBJECT
        while at + OBJECT <= len(chain) and chain[at + OBJECT - 1] in self.objects:
            at += OBJECT
        return max(start, at)


@dataclass(slots=True)
class Seen:
    """What a way of routing made of all requests, in tokens."""

    way: str
    has_remote: bool
    tokens: int = 0
    pool: int = 0
    host: int = 0
    remote: int = 0
    first_s: list[float] = field(default_factory=list)
    """Until the first token of each request, by the model."""
    moved_tokens: int = 0
    moved_computed: int = 0
    """Of the next requests of chats that were at the node that was lost."""
    kept_tokens: int = 0
    kept_computed: int = 0
    """Of the requests of all other chats since then, as many at most."""
    entries: int = 0
    entry_bytes: float = 0.0
    nodes_of_a_block: float = 0.0
    index_bytes: float = 0.0
    """Of a node's tree, about."""
    stored: int = 0
    removed: int = 0
    events: int = 0
    seconds: float = 0.0
    busiest: float = 0.0
    """Requests of the node with most of them, times the mean."""

    @property
    def computed(self) -> int:
        """Tokens that no node, nor REMOTE, had."""
        return self.tokens - self.pool - self.host - self.remote


def chain_of(tokens: bytes, start: int = 0) -> list[int]:
    """Name each whole block by all up to its end: 64 bits, as on the wire."""
    whole = range(0, len(tokens) // WIDTH * WIDTH, WIDTH)
    return list(accumulate((tokens[at : at + WIDTH] for at in whole), _linked, initial=start))[1:]


def _linked(before: int, block: bytes) -> int:
    return int.from_bytes(
        blake2b(block, digest_size=8, key=before.to_bytes(8, "little")).digest(), "little"
    )


class Ring:
    """Nodes on a ring, each at many points: a key belongs to the next one."""

    def __init__(self, nodes: list[int]) -> None:
        points = [(_linked(node, bytes([at])), node) for node in nodes for at in range(POINTS)]
        self._points = sorted(points)
        self._at = [at for at, _ in self._points]

    def node(self, key: bytes) -> int:
        """Give the node of a key."""
        at = bisect(self._at, _linked(0, key)) % len(self._points)
        return self._points[at][1]


def run(
    cell: Cell, requests: list[Request], chains: list[list[int]], way: str, *, has_remote: bool
) -> Seen:
    """Serve all requests in one way; `chains` names the whole blocks of each."""
    draw, index, seen = random.Random(cell.seed), Index(), Seen(way, has_remote)
    space = requests[0].namespace
    nodes = {number: Node(number, cell, index, space) for number in range(cell.nodes)}
    remote = Remote(cell.remote * cell.nodes if has_remote else 0)
    ring = Ring(list(nodes))
    lose_at, lost = len(requests) * 2 // 3, 0
    was_at: dict[int, int] = {}
    """Where the last turn of each chat was, by the hash of its last block."""
    moved: set[int] = set()
    for number, request in enumerate(requests):
        if number == lose_at and len(nodes) > 1:
            lost = max(nodes, key=lambda one: nodes[one].num_requests)
            _weigh(seen, index, nodes)
            index.forget(lost)
            del nodes[lost]
            ring = Ring(list(nodes))
            moved = {last for last, node in was_at.items() if node == lost}
        chain = chains[number]
        askable = (request.prompt - 1) // SIZE
        matched = index.matched(chain[:askable])
        node = nodes[_route(way, request, nodes, matched, askable, ring, draw)]
        pool, host = node.serve(request)
        there = (pool + host) // SIZE
        fetched = SIZE * (remote.matched(chain[:askable], there) - there) if has_remote else 0
        remote.put(chain)
        computed = request.prompt - pool - host - fetched
        took = computed / PREFILL + host / HOST + fetched / REMOTE
        begins = max(request.t, node.free_at)
        node.free_at = begins + took
        seen.first_s.append(begins + took - request.t)
        seen.tokens += request.prompt
        seen.pool += pool
        seen.host += host
        seen.remote += fetched
        known = chain[:askable]
        before = next((one for one in reversed(known) if one in was_at), None)
        if number >= lose_at:
            if before is not None and before in moved:
                seen.moved_tokens += request.prompt
                seen.moved_computed += computed
            elif before is not None:
                seen.kept_tokens += request.prompt
                seen.kept_computed += computed
        if before is not None:
            del was_at[before]
            moved.discard(before)
        if chain:
            was_at[chain[-1]] = node.number
    if len(nodes) == cell.nodes:
        _weigh(seen, index, nodes)
    seen.stored, seen.removed, seen.events = index.num_stored, index.num_removed, index.num_events
    half = len(requests) // 2
    middle = requests[len(requests) * 3 // 4].t - requests[len(requests) // 4].t
    seen.seconds = middle * len(requests) / half  # as if all came as often as those in the middle
    return seen


def _route(
    way: str,
    request: Request,
    nodes: dict[int, Node],
    matched: dict[int, int],
    askable: int,
    ring: Ring,
    draw: random.Random,
) -> int:
    if way == "anywhere":
        return draw.choice(list(nodes))
    if way == "by a key":
        return ring.node(request.tokens[:KEY])

    def queued(one: int) -> float:
        return max(0.0, nodes[one].free_at - request.t)

    if way == "by events":
        return min(nodes, key=lambda one: (-matched.get(one, 0), queued(one), draw.random()))
    missing = SIZE / PREFILL
    return min(
        nodes,
        key=lambda one: (queued(one) + (askable - matched.get(one, 0)) * missing, draw.random()),
    )


def _weigh(seen: Seen, index: Index, nodes: dict[int, Node]) -> None:
    """Note how much is known, and where, while all nodes are there."""
    seen.entries, seen.entry_bytes = len(index.nodes), index.entry_bytes
    places = sum(one.bit_count() for one in index.nodes.values())
    seen.nodes_of_a_block = places / max(1, len(index.nodes))
    seen.index_bytes = sum(one.cache.counts(now=0.0).index_bytes for one in nodes.values()) / len(
        nodes
    )
    counts = [one.num_requests for one in nodes.values()]
    seen.busiest = max(counts) * len(counts) / sum(counts)


def report(cell: Cell, seen: list[Seen]) -> list[str]:
    """Write what was seen, and what follows for more machines."""
    num_requests = len(seen[0].first_s)
    lines = [
        f"{cell.nodes} nodes, each {cell.pool:,} blocks of {SIZE} tokens, {cell.host:,} in HOST;",
        f"{num_requests:,} requests of {seen[0].tokens / num_requests:,.0f} tokens, "
        f"{num_requests / seen[0].seconds:,.0f} a second; REMOTE, where there is one, "
        f"{cell.remote * cell.nodes:,} blocks",
        "",
        "                       of the prompts' tokens, %           first token, s     busiest",
        "                     pool    HOST  REMOTE  computed      median      99 %       node",
    ]
    for one in seen:
        name = one.way + (" + REMOTE" if one.has_remote else "")
        parts = [100 * part / one.tokens for part in (one.pool, one.host, one.remote, one.computed)]
        times = sorted(one.first_s)
        lines.append(
            f"{name:<19}{parts[0]:6.1f}  {parts[1]:6.1f}  {parts[2]:6.1f}  {parts[3]:8.1f}"
            f"  {times[len(times) // 2]:10.3f}{times[len(times) * 99 // 100]:10.3f}"
            f"  {one.busiest:8.2f}x"
        )
    lines += ["", "one node lost at two thirds: of the tokens of the next turn, % computed"]
    for one in seen:
        name = one.way + (" + REMOTE" if one.has_remote else "")
        moved = 100 * one.moved_computed / max(1, one.moved_tokens)
        kept = 100 * one.kept_computed / max(1, one.kept_tokens)
        lines.append(f"{name:<19}{moved:6.1f} of chats that were there, {kept:.1f} of the others")
    one = next(one for one in seen if one.way == "by events" and not one.has_remote)
    rate = one.events / one.seconds
    told = (one.stored + one.removed) / one.seconds
    sent = told * KEY_BYTES + rate * EVENT_BYTES
    held = cell.pool + cell.host
    lines += [
        "",
        f"the router's index: {one.entries:,} blocks, {one.entry_bytes:.0f} B each here, "
        f"{one.entries * one.entry_bytes / 1e6:.1f} MB;",
        f"each lies on {one.nodes_of_a_block:.2f} nodes. A node's own index: "
        f"{one.index_bytes / 1e6:.2f} MB for {held:,} blocks",
        f"events: {rate:,.0f} a second with {told:,.0f} blocks, about {sent / 1e3:,.0f} kB/s; "
        f"{told / len(one.first_s) * one.seconds:,.0f} blocks a request",
        "",
        "for as many nodes, as busy as these:   blocks known   index, GB   blocks told/s   MB/s",
    ]
    for count in (cell.nodes, 1_000, 10_000):
        times_more = count / cell.nodes
        lines.append(
            f"{count:>10,} in one index {one.entries * times_more:>25,.0f}"
            f"{one.entries * times_more * one.entry_bytes / 1e9:>12.2f}"
            f"{told * times_more:>16,.0f}{sent * times_more / 1e6:>7.1f}"
        )
    cells = -(-10_000 // cell.nodes)
    lines.append(
        f"{10_000:>10,} in {cells:,} cells: as the first line, {cells:,} times side by side"
    )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run all ways, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.experiments.cell",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Cell()
    for name, about in (
        ("nodes", "machines of the cell, 2 to 1,000"),
        ("chats", "how many there are"),
        ("seed", "of all that is drawn"),
        ("pool", "blocks of a node's pool"),
        ("host", "blocks of memory below it"),
        ("remote", "blocks of REMOTE for each node"),
    ):
        told = f"{about} ({getattr(defaults, name):,})"
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name), help=told)
    parser.add_argument("--json", action="store_true", help="figures as JSON, one object")
    options = parser.parse_args(argv)
    least = {"nodes": 2, "chats": 10, "seed": 0, "pool": 512, "host": 16, "remote": OBJECT}
    for name, at_least in least.items():
        if getattr(options, name) < at_least:
            parser.error(f"--{name} {getattr(options, name)}: at least {at_least}")
    if options.nodes > 1000:
        parser.error(f"--nodes {options.nodes}: at most 1,000")
    cell = Cell(**{name: getattr(options, name) for name in least})
    requests = cell.requests()
    chains = [chain_of(request.tokens) for request in requests]
    seen = [
        run(cell, requests, chains, way, has_remote=has_remote)
        for has_remote in (False, True)
        for way in WAYS
    ]
    made = provenance()
    if options.json:
        figures = [asdict(one) | {"computed": one.computed} for one in seen]
        print(json_text({"run": made, "cell": asdict(cell), "ways": figures}))
        return 0
    print("\n".join(report(cell, seen)))
    print(f"{made['time']} · commit {made['commit']} · {made['machine']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
