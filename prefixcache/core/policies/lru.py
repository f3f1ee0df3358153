"""Least recently used."""

from __future__ import annotations

from typing import ClassVar

from prefixcache.core.eviction import EvictionPolicy, register


@register
class Lru(EvictionPolicy):
    """Least recently used: by the moment when the last lease on it ended.  The default.

    Source: folklore; as a bound, Sleator and Tarjan, *Amortized efficiency of list update and
    paging rules*, CACM 1985.  State: none beyond
    `node.last_used`, which the tree keeps.  O(log leaves).
    """

    name: ClassVar[str] = "lru"
