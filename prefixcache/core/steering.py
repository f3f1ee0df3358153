"""The verbs of who runs the machine: reset, pin, unpin, quota."""

from __future__ import annotations

from math import inf

from prefixcache.core.desk import Desk
from prefixcache.core.node import Root
from prefixcache.core.shelter import Shelter
from prefixcache.core.tape import RESET
from prefixcache.errors import InvalidRequest
from prefixcache.texts import many
from prefixcache.types import TOKEN_BYTES, Namespace, Pinned, QuotaInfo, Reset, Unpinned


class Steering:
    """What is kept, for whom, and what is forgotten."""

    _desk: Desk

    def reset(self, namespace: Namespace) -> Reset:
        """Forget a namespace's prefixes.  Amortised O(1), also while leases are out.

        Leases keep their blocks until they end; all other blocks of the namespace are the first to
        be reused.
        """
        desk = self._desk
        root = desk.roots.get(namespace)
        if root is None:
            return Reset(0, 0)
        desk.history.recents.forget(namespace)
        unpinned = desk.pins.unpin(namespace.tenant, root, None)
        desk.tree.retire(root)
        desk.roots[namespace] = fresh = Root(namespace)
        desk.holdings.quotas.open(fresh)
        if desk.tape is not None:
            desk.tape((RESET, 0, 0, b"", namespace))
        return Reset(
            num_blocks=root.num_blocks,
            num_leased=root.num_blocks - root.evictable,
            num_leases=root.num_leases,
            num_pins=unpinned.num_pins,
        )

    def pin(self, namespace: Namespace, tokens: bytes, *, ttl_s: float, now: float) -> Pinned:
        """Let what is stored of a prefix, in whole blocks, be evicted last until `now + ttl_s`.

        Takes no reference: what leases need they get, also from pinned blocks, so pins can never
        wedge the pool.  Pinning the same again prolongs.  O(nodes on the path).

        Returns:
            What is pinned; zeros if nothing of the prefix is stored.

        Raises:
            InvalidRequest: no tokens, a torn token, or no time.
            PoolExhausted: more blocks would be pinned than the cap; the message has the arithmetic.

        >>> from prefixcache.core.cache import PrefixCache
        >>> from prefixcache.types import WorkerId, pack
        >>> cache, me, space = PrefixCache(64, 4), WorkerId(1), Namespace("tiny-model")
        >>> cache.attach(me, space, now=0.0)
        >>> lease = cache.acquire(me, space, pack(range(10)), now=0.0).lease
        >>> _ = cache.commit(me, lease, 10, now=0.0)
        >>> pinned = cache.pin(space, pack(range(10)), ttl_s=3600.0, now=0.0)
        >>> pinned.num_tokens, pinned.num_blocks, pinned.max_pinned
        (8, 2, 16)
        """
        desk = self._desk
        _check_tokens(tokens)
        if not 0 < ttl_s < inf:
            raise InvalidRequest(f"cannot pin for {ttl_s:g} s; give a time above 0")
        root = desk.roots.get(namespace)
        if root is None:
            pins = desk.pins
            pinned = pins.num_pinned_of(namespace.tenant)
            return Pinned(0, 0, 0, 0, 0.0, pinned, pins.max_pinned)
        answer = desk.pins.pin(desk.tree.match(root, tokens), ttl_s, now)
        if answer.num_blocks:
            self._shelter()
        return answer

    def unpin(self, namespace: Namespace, tokens: bytes = b"") -> Unpinned:
        """End the pin of exactly this prefix; without tokens, all pins of the namespace.

        Its blocks stay cached, in the usual order of eviction.  O(nodes on the path).

        Raises:
            InvalidRequest: a torn token.
        """
        desk = self._desk
        root = desk.roots.get(namespace)
        if not tokens:
            return desk.pins.unpin(namespace.tenant, root, None)
        _check_tokens(tokens)
        return desk.pins.unpin(
            namespace.tenant, root, None if root is None else desk.tree.match(root, tokens)
        )

    def set_quota(
        self, scope: Namespace | str, *, max_held: int | None, guaranteed: int, now: float
    ) -> QuotaInfo:
        """Say what a namespace, or a tenant (its name) with all its namespaces, may hold.

        Nothing is taken away: who holds more than `max_held` gets nothing new until it holds less.

        Args:
            scope: Whose quota.
            max_held: Most blocks that its leases may hold; None is no limit.
            guaranteed: Stored blocks up to which nothing of it is evicted while others have
                evictable ones.
            now: The time.

        Raises:
            InvalidRequest: a number is out of range, or all shares together exceed the pool.
        """
        desk = self._desk
        answer = desk.holdings.quotas.set(scope, max_held, guaranteed)
        if guaranteed or desk.holdings.quotas.shares:
            self._shelter()
        if isinstance(desk.tree.queue, Shelter):
            desk.tree.queue.let_all_go()
        desk.serve(now)
        return answer

    def quota(self, scope: Namespace | str) -> QuotaInfo:
        """Say what a namespace or a tenant may hold, and holds.  Changes nothing."""
        return self._desk.holdings.quotas.get(scope)

    def _shelter(self) -> None:
        tree = self._desk.tree
        if not isinstance(tree.queue, Shelter):
            tree.queue = Shelter(tree, self._desk.holdings.quotas)


def _check_tokens(tokens: bytes) -> None:
    if not tokens or len(tokens) % TOKEN_BYTES:
        raise InvalidRequest(
            f"a prefix of {many(len(tokens), 'byte')} is not one or more tokens of "
            f"{TOKEN_BYTES} bytes"
        )
