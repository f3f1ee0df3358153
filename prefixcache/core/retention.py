"""Retention: how much a namespace, or what one lease stored, is wished to be kept.

For the policy `priority`; the others know no levels.  In the core only: the service has no words
for it on the wire yet.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from prefixcache.core.policies.priority import HIGHEST, LOWEST, Priority
from prefixcache.errors import InvalidRequest

if TYPE_CHECKING:
    from prefixcache.core.cache import PrefixCache
    from prefixcache.types import LeaseId, Namespace, WorkerId


def rank(cache: PrefixCache, namespace: Namespace, level: int, *, ttl_s: float = inf) -> None:
    """Give all that is used in a namespace from now on a level, for `ttl_s` after each use.  O(1).

    Raises:
        InvalidRequest: the level is out of range, or the cache's policy has no levels.

    >>> from prefixcache.core.cache import PrefixCache
    >>> from prefixcache.types import Namespace
    >>> rank(PrefixCache(8, 4, policy="priority"), Namespace("system-prompts"), 8, ttl_s=3600.0)
    """
    _policy(cache, level).rank(namespace, level, ttl_s)


def retain(
    cache: PrefixCache, worker: WorkerId, lease: LeaseId, level: int, *, ttl_s: float, now: float
) -> None:
    """Give what a lease uses and has stored so far a level until `now + ttl_s`.

    O(nodes on the path).  Call it after the commit and before the release.

    Raises:
        InvalidRequest: the level is out of range, or the cache's policy has no levels.
        NotFound, LeaseExpired: the lease is not there (any more).
    """
    policy = _policy(cache, level)
    own = cache._desk.leases.get(worker, lease, now)
    policy.retain(own.tail or own.node, level, now + ttl_s)


def _policy(cache: PrefixCache, level: int) -> Priority:
    policy = cache._desk.tree.policy
    if not isinstance(policy, Priority):
        raise InvalidRequest(f"policy {policy.name!r} has no levels; serve with --policy priority")
    if not LOWEST <= level <= HIGHEST:
        raise InvalidRequest(f"level {level} is not one of {LOWEST} (goes first) to {HIGHEST}")
    return policy
