"""PrefixCache: all verbs.  Each is one atomic, synchronous step; a failed one changes nothing.

| verbs | file |
|---|---|
| attach, renew, detach, worker_gone | `membership.py` |
| acquire, settled, cancel, commit, extend, fork, truncate, release, expire | `leasing.py` |
| reset, pin, unpin, quota | `steering.py` |
| lookup, explain, snapshot, check | here |

The service, the client's contract tests and the experiments all run this very class.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from itertools import islice

from prefixcache.core import explanations, views
from prefixcache.core.blockmap import block_map
from prefixcache.core.blocks import BlockPool, Rights
from prefixcache.core.desk import Desk
from prefixcache.core.eviction import policy_named
from prefixcache.core.graft import Run, graft
from prefixcache.core.journal import Journal, Journals
from prefixcache.core.leasing import Leasing
from prefixcache.core.membership import Membership
from prefixcache.core.node import blocks_below
from prefixcache.core.outline import Walk
from prefixcache.core.radix import RadixTree
from prefixcache.core.recital import Recital
from prefixcache.core.steering import Steering
from prefixcache.core.tape import Put
from prefixcache.core.tenure import Wipe
from prefixcache.core.vitals import FlightInfo, Vitals, flights, vitals
from prefixcache.errors import InvalidRequest, NotFound
from prefixcache.outline import Order, Outline
from prefixcache.types import (
    BlockTable,
    Explanation,
    LeaseInfo,
    Lookup,
    Namespace,
    Partial,
    Snapshot,
    WorkerId,
)

_LOOKED_AT = 16


class PrefixCache(Membership, Leasing, Steering):
    """Which blocks hold which prefix, and who may use them.

    Pure: no clock, no I/O, no thread.  `now` is any clock in seconds that never goes back.

    Args:
        num_blocks: Blocks in the pool.
        block_size: Tokens per block: a power of two, 1 to 1024.
        policy: Order of eviction, by name.
        partial: How much of a partly matching block is reused.
        num_ghosts: Evicted blocks to remember; if not given, what the policy asks for: for most, as
            many as the pool has.
        ttl_s: How long a lease lives without a sign of life.
        max_pinned: Blocks that may be pinned at the same time; by default a quarter.
        max_line: Requests that may wait for room at the same time.
        max_leases: Leases that may be out at the same time.
        max_namespaces: Namespaces that there may be at the same time: where there are more, the
            next one takes the place of one that is only cached.
        remember: Whether requests that are over are remembered for people, for `explain` and the
            views.  It decides nothing: experiments, which only count, do without.

    Raises:
        InvalidRequest: an argument is out of range.

    >>> from prefixcache.types import Namespace, WorkerId, pack
    >>> cache, me, space = PrefixCache(64, 4), WorkerId(1), Namespace("tiny-model")
    >>> cache.attach(me, space, now=0.0)
    >>> first = cache.acquire(me, space, pack(range(10)), now=0.0)
    >>> cache.commit(me, first.lease, 10, now=0.1).num_indexed
    3
    >>> cache.release(me, first.lease, now=0.2).num_freed
    0
    >>> cache.acquire(me, space, pack([*range(10), 99]), now=0.3).ledger
    Ledger(hit=8, partial=2, joined=0, cold=1, evicted=0, granularity=0, resumed=0)
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        policy: str = "lru",
        partial: Partial = Partial.TAILS,
        num_ghosts: int | None = None,
        ttl_s: float = 30.0,
        max_pinned: int | None = None,
        max_line: int = 4096,
        max_leases: int = 1 << 40,
        max_namespaces: int = 1 << 40,
        remember: bool = True,
    ) -> None:
        if num_blocks < 1:
            raise InvalidRequest(f"a pool of {num_blocks} blocks holds nothing; give at least 1")
        if not 1 <= block_size <= 1024 or block_size & (block_size - 1):
            raise InvalidRequest(f"block size {block_size} is not a power of two from 1 to 1024")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.partial = Partial(partial)
        order = policy_named(policy, num_blocks)
        tree = RadixTree(
            block_size,
            policy=order,
            num_ghosts=int(order.ghosts * num_blocks) if num_ghosts is None else num_ghosts,
        )
        self._desk = Desk(
            tree,
            BlockPool(num_blocks),
            self.partial,
            ttl_s=ttl_s,
            max_pinned=num_blocks // 4 if max_pinned is None else min(max_pinned, num_blocks),
            max_line=max_line,
            max_leases=max_leases,
            max_namespaces=max_namespaces,
            remember=remember,
        )

    @property
    def num_indexed(self) -> int:
        """Blocks that the tree holds.  O(1)."""
        return self._desk.tree.num_blocks

    @property
    def num_leases(self) -> int:
        """Leases that are out.  O(1)."""
        return self._desk.leases.count

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part of each limit is kept; by default for nobody.  O(tenants)."""
        desk = self._desk
        for shares in (
            desk.leases.shares,
            desk.spaces.shares,
            desk.room.line.shares,
            *desk.pins.shares,
            desk.holdings.aside,
        ):
            shares.set_tenants(tenants)

    def make_way(self, namespace: Namespace) -> None:
        """Let a namespace be attached next; see `attach`.

        Raises:
            PoolExhausted: there are too many namespaces, and none that only caches.
        """
        self._desk.make_way(namespace)

    def count_leases(self, worker: WorkerId) -> int:
        """Give how many leases a worker has out; 0 if it is not attached.  O(1)."""
        member = self._desk.leases.workers.get(worker)
        return 0 if member is None else len(member.leases)

    def uncommitted_since(self, worker: WorkerId) -> float | None:
        """Give when a worker was granted the oldest lease that has tokens to compute; else None.

        Looks at its 16 oldest leases.  O(1).
        """
        member = self._desk.leases.workers.get(worker)
        oldest = () if member is None else islice(member.leases.values(), _LOOKED_AT)
        return next((one.since for one in oldest if one.committed < one.num_tokens), None)

    def count_quarantined(self, worker: WorkerId) -> int:
        """Give how many blocks are set aside since a worker may still write to them.  O(1)."""
        return self._desk.holdings.pool.count_quarantined(worker)

    def knows(self, namespace: Namespace) -> bool:
        """Whether anybody has attached it, or it stores something.  O(1)."""
        return namespace in self._desk.roots

    def namespaces(self) -> list[Namespace]:
        """Give the namespaces that anybody has attached, or that store something."""
        return list(self._desk.roots)

    def observe(self, journal: Journal, rights: Rights | None = None) -> None:
        """Tell `journal` of every change of the index from now on, beside those told already.

        Args:
            journal: Hears of the index.
            rights: Hears of the rights to write; at most one does.
        """
        tree = self._desk.tree
        tree.journal = journal if tree.journal is None else Journals(tree.journal, journal)
        if rights is not None:
            self._desk.holdings.pool.rights = rights

    def wipe_with(self, wipe: Wipe) -> None:
        """Have blocks overwritten with zeros before they are lent to another tenant than before."""
        self._desk.holdings.tenure.wipe = wipe

    def recite(self, journal: Journal) -> Recital:
        """Prepare to tell `journal` what is indexed, as if it was stored just now.  O(1)."""
        return Recital(self._desk, journal)

    def record(self, put: Put | None) -> None:
        """Put on a tape what happens from now on, so that another cache can play it again.

        Args:
            put: Takes an entry of `core.tape`; None ends it.
        """
        self._desk.tape = put

    def restore(self, runs: Sequence[Run], aside: BlockTable, worker: WorkerId) -> int:
        """Take over what an earlier life of the pool left.  Only while the cache is empty.

        O(num_blocks + runs · log siblings).

        Args:
            runs: What is indexed, parents first; each block in one run only.
            aside: Blocks that processes of that life may still write to: quarantined.
            worker: Under whose number they are, which nobody else has; `worker_gone` frees them.

        Returns:
            How many blocks are indexed now.
        """
        desk = self._desk
        for run in runs:
            desk.root(run.namespace)
        count = graft(desk.tree, desk.roots, runs)
        indexed = array("i")
        for root in desk.roots.values():
            indexed.extend(blocks_below(root))
        desk.holdings.pool.restore(indexed, aside, worker)
        desk.holdings.tenure.restore(
            (root.namespace.tenant, blocks_below(root)) for root in desk.roots.values()
        )
        return count

    # ------------------------------------------------------------------ looking

    def lookup(self, namespace: Namespace, tokens: bytes) -> Lookup:
        """Say what `acquire` would find.  Changes nothing, takes no reference.

        Raises:
            InvalidRequest: no tokens, or a torn token.
        """
        self._check_prompt(tokens)
        return views.lookup(self._desk, self._desk.roots.get(namespace), tokens)

    def explain(self, namespace: Namespace, tokens: bytes, *, now: float) -> Explanation:
        """Say what would become of each token, and where the prompt parts from what is stored.

        Changes nothing, takes no reference.  O(nodes on the path + other namespaces).

        Raises:
            InvalidRequest: no tokens, or a torn token.
        """
        self._check_prompt(tokens)
        return explanations.explain(self._desk, namespace, tokens, now)

    def recount(
        self, request: str, may_see: Callable[[Namespace], bool], *, now: float
    ) -> Explanation:
        """Say why a recent request was answered as it was.  Changes nothing.  O(recent requests).

        Args:
            request: Its request id (or that without its last `/part`), or `worker#lease`.
            may_see: Whether the caller may know of a namespace.
            now: The time.

        Raises:
            NotFound: there is none, or the caller may not know of it.
        """
        recents = self._desk.history.recents
        for one in recents:
            if one.is_called(request) and may_see(one.namespace):
                return explanations.recount(self._desk, one, now)
        raise NotFound(
            f"no recent request {request!r} (the last {len(recents):,} are remembered); "
            "name it by its request id, or as worker#lease"
        )

    def outline(
        self,
        namespaces: Iterable[Namespace] | None = None,
        *,
        order: Order = Order.TOKENS,
        max_branches: int = 1000,
        max_depth: int | None = None,
        ghosts: bool = True,
        sees: Callable[[Namespace], bool] | None = None,
        max_namespaces: int | None = None,
        now: float,
    ) -> Generator[None, None, Outline]:
        """Sum the trees up, and keep their largest or hottest branches.  Changes nothing.

        O(runs + namespaces), in steps of some hundred: between them other verbs may be called.

        Args:
            namespaces: Which; all, if None.  One that stores nothing is left out.
            order: Which branches are kept, and which comes first.
            max_branches: How many are kept in all.
            max_depth: Runs below the root beyond which all is summed up.
            ghosts: Whether evicted runs are shown.
            sees: Which of the namespaces are shown, as the walk comes to them; None: all.
            max_namespaces: How many are shown, the first by the order; the rest is summed up.
                None: all.
            now: The time.

        Raises:
            InvalidRequest: a bound below 1.
        """
        if max_branches < 1 or (max_depth is not None and max_depth < 1):
            raise InvalidRequest(f"{max_branches} branches to depth {max_depth}: give at least 1")
        chosen = list(self._desk.roots) if namespaces is None else namespaces
        walk = Walk(self._desk, order, max_branches, max_depth, ghosts=ghosts)
        return walk.run(chosen, sees, max_namespaces, now)

    def snapshot(
        self,
        *,
        now: float,
        tenant: str | None = None,
        sees: Callable[[Namespace], bool] | None = None,
    ) -> Snapshot:
        """Give the numbers of this moment, and who holds what.  O(namespaces + pins).

        Args:
            now: The time.
            tenant: Whose leases, namespaces, pins and quotas are listed and counted; None:
                everybody's.
            sees: Whether those of a namespace are; None: all.
        """
        steps = self.snapshot_in_steps(now=now, tenant=tenant, sees=sees)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                told: Snapshot = end.value
                return told

    def snapshot_in_steps(
        self,
        *,
        now: float,
        tenant: str | None = None,
        sees: Callable[[Namespace], bool] | None = None,
    ) -> Generator[None, None, Snapshot]:
        """Give what `snapshot` gives, in steps of some hundred rows.

        Between them other verbs may be called.  The numbers are those of the first step's moment;
        each row is as it is when its turn comes, and what has ended by then is left out.
        """
        return views.snapshot(self._desk, now, tenant, sees)

    def oldest_leases(self, most: int, *, now: float) -> list[LeaseInfo]:
        """Tell up to `most` leases, oldest first.  O(most)."""
        return views.oldest_leases(self._desk, most, now)

    def vitals(self, *, now: float) -> Vitals:
        """Give the numbers that are cheap enough for every second.  O(1)."""
        return vitals(self._desk, now)

    def flights(self, most: int = 1000) -> list[FlightInfo]:
        """Give up to `most` of the prompts that leases are computing."""
        return flights(self._desk, most)

    def block_map(self, num_cells: int = 1024) -> Generator[None, None, tuple[int, ...]]:
        """Draw the pool: per cell the index in `blockmap.STATES` of what most of its blocks are.

        O(runs + blocks), in steps of some hundred runs: between them other verbs may be called.
        """
        return block_map(self._desk, num_cells)

    def check(self) -> None:
        """Walk everything and assert that every invariant holds.  O(everything).

        Raises:
            AssertionError: one does not; the message has the tree.
        """
        views.check(self._desk)
