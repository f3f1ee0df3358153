"""A router in small: what lies where, in the pool and below, from what is told alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeAlias

from core.innards import indexed_below
from core.oracle import Tokens
from prefixcache.core.cache import PrefixCache
from prefixcache.core.kv_events import Replay
from prefixcache.core.node import Node
from prefixcache.core.tiers import NOWHERE, Places
from prefixcache.types import BlockId, BlockTable, Namespace, unpack

Prefix: TypeAlias = tuple[Namespace, Tokens]


class Follower:
    """Hears of all levels; whole blocks only.  One that comes late is told by a replay."""

    def __init__(self, cache: PrefixCache, *, late: bool = False) -> None:
        self.cache = cache
        self.block_size = cache.block_size
        self.prefixes: dict[int, Prefix] = {}
        """Of each place that holds a block: all tokens up to its end."""
        self.vanished: set[Prefix] = set()
        """What was nowhere for a moment, since this was emptied."""
        self._copies: Counter[Prefix] = Counter()
        self.replay: Replay | None = None
        self.telling: Generator[None, None, None] | None = None
        if late:
            self.replay = cache.replay(self, self)
            self.telling = self.replay.run()

    def go_on(self) -> bool:
        """Hear of some more of what was there before; say whether there is more."""
        if self.telling is not None and next(self.telling, self) is self:
            self.telling = self.replay = None
        return self.telling is not None

    def _put(self, place: int, prefix: Prefix) -> None:
        assert place not in self.prefixes, f"{place:#x} holds {self.prefixes[place]} already"
        self.prefixes[place] = prefix
        self._copies[prefix] += 1

    def _drop(self, place: int) -> None:
        prefix = self.prefixes.pop(place)
        self._copies[prefix] -= 1
        if not self._copies[prefix]:
            del self._copies[prefix]
            self.vanished.add(prefix)

    def _run(self, namespace: Namespace, before: Tokens, tokens: bytes, places: list[int]) -> None:
        run, size = tuple(unpack(tokens)), self.block_size
        for at in range(len(run) // size):
            prefix = (namespace, before + run[: (at + 1) * size])
            if places[at] != NOWHERE and self.prefixes.get(places[at]) != prefix:
                self._put(places[at], prefix)  # of what comes back it was told before

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        if self.replay is not None and not self.replay.is_stored(namespace, parent, blocks):
            return
        before = () if parent is None else self.prefixes[parent][1]
        self._run(namespace, before, tokens, blocks.tolist())

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        if self.replay is not None:
            blocks = self.replay.removed(namespace, blocks)
        for block in blocks:
            if block in self.prefixes:  # a tail is not
                self._drop(block)

    def cleared(self, namespace: Namespace) -> None:
        if self.replay is not None:
            self.replay.cleared(namespace)
        for place in [at for at, (space, _) in self.prefixes.items() if space == namespace]:
            self._drop(place)

    def left(self, namespace: Namespace) -> None:
        found = [space for space, _ in self.prefixes.values() if space == namespace]
        assert not found, f"{namespace} has gone, {len(found)} blocks of it lie somewhere"

    def copied(self, namespace: Namespace, sources: Places, places: Places) -> None:
        if self.replay is not None:
            sources, places = self.replay.copied(namespace, sources, places)
        for source, place in zip(sources, places, strict=True):
            assert self.prefixes[source][0] == namespace
            self._put(place, self.prefixes[source])

    def lost(self, places: Places) -> None:
        if self.replay is not None:
            places = self.replay.lost(places)
        for place in places:
            if place in self.prefixes:  # of what was reset, all is forgotten at once
                self._drop(place)

    def found(
        self, namespace: Namespace, parent: int | None, tokens: bytes, places: Places
    ) -> None:
        before = () if parent is None else self.prefixes[parent][1]
        self._run(namespace, before, tokens, places.tolist())

    def truth(self) -> dict[int, Prefix]:
        """What the trees say lies where."""
        size, found = self.block_size, {}
        lessor = self.cache._lessor
        for namespace, root in lessor.roots.items():
            for entry in indexed_below(root, size):
                if entry.num_tokens == size:
                    found[int(entry.block)] = (namespace, entry.prefix)
            stack: list[tuple[Node, Tokens]] = [(root, ())]
            while stack:
                node, before = stack.pop()
                run = before + tuple(unpack(node.tokens))
                if node.places is not None:
                    assert lessor.hauls is not None
                    for at, place in enumerate(lessor.hauls.tier.told(node.places)):
                        if place != NOWHERE:
                            found[place] = (namespace, run[: len(before) + (at + 1) * size])
                below = [*node.children, *(node.ghosts or {}).values()]
                stack.extend((one, run) for one in below)
        return found

    def verify(self) -> None:
        """What was told lies there, and nothing that did so all the time was nowhere between."""
        if self.telling is None:
            told, truth = self.prefixes.items(), self.truth().items()
            assert not told ^ truth, f"told, not true: {told - truth}; untold: {truth - told}"
        assert not self.vanished & self._copies.keys(), "was nowhere for a moment"
        self.vanished.clear()


class Ears:
    """Passes on what is told to all followers that there are at that moment."""

    def __init__(self, followers: Callable[[], Iterable[Follower]]) -> None:
        self._followers = followers

    def __getattr__(self, name: str) -> Any:
        def tell(*what: Any) -> None:
            for one in self._followers():
                getattr(one, name)(*what)

        return tell
