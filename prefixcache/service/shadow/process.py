"""The process beside the service that plays the live requests in other caches.

Started by `caches.py`, which describes the pipe.  It reads chunks of the log of operations from its
standard input, plays them in up to four caches without any memory behind them, and writes one JSON
object per second to its standard output: what each would have reused, and what the service did
reuse, of the same requests.  It ends with its input, that is, with the service.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from contextlib import suppress
from time import monotonic
from typing import IO, Any

from prefixcache.core.cache import PrefixCache
from prefixcache.core.oplog import COMMITTED, ENDED, FORKED, GRANTED, RESET, TRUNCATED
from prefixcache.errors import CacheError, NotFound
from prefixcache.plain_json import json_text
from prefixcache.service.shadow.oplog_codec import CUT, read_chunk
from prefixcache.types import Grant, LeaseId, Namespace, Partial, WorkerId

_ME = WorkerId(1)
_FOREVER_S = 1e12
_MINUTES = 60
_EVERY_S = 1.0
_NICENESS = 5


class Sums:
    """What was asked of a cache and what it gave, of the same requests as the service."""

    __slots__ = ("actual", "refused", "requests", "reused", "tokens")

    def __init__(self) -> None:
        self.requests = self.tokens = self.reused = self.actual = self.refused = 0

    def add(self, tokens: int, reused: int, actual: int, *, refused: bool) -> None:
        """Count one request."""
        self.requests += 1
        self.tokens += tokens
        self.reused += reused
        self.actual += actual
        self.refused += refused

    def fields(self) -> dict[str, int]:
        """Give all of it."""
        return {name: getattr(self, name) for name in self.__slots__}


class ShadowCache:
    """One cache that lives the service's life in another configuration.

    Args:
        name: what it is called.
        cache: empty.
    """

    def __init__(self, name: str, cache: PrefixCache) -> None:
        self.name = name
        self.cache = cache
        self.whole = Sums()
        self._minutes: deque[tuple[int, Sums]] = deque(maxlen=_MINUTES)
        self._leases: dict[int, tuple[LeaseId, int, int]] = {}
        """By the service's lease: ours, the tokens it has room for, and those it has committed."""

    def play(
        self, kind: int, lease: int, number: int, data: bytes, space: Namespace | None, now: float
    ) -> None:
        """Do what the service did.  A lease for which there is no room here has no consequences."""
        with suppress(CacheError):
            if kind == GRANTED and space is not None:
                self._grant(lease, number, data, space, now)
            elif kind == COMMITTED and lease in self._leases:
                self._commit(lease, number, data, now)
            elif kind == ENDED and (held := self._leases.pop(lease, None)):
                self.cache.release(_ME, held[0], now=now)
            elif kind == FORKED and (held := self._leases.get(number)):
                (child,) = self.cache.fork(_ME, held[0], 1, now=now)
                room = len(child.block_table) * self.cache.block_size
                self._leases[lease] = (child.lease, room, child.num_cached)
            elif kind == TRUNCATED and (held := self._leases.get(lease)):
                self.cache.truncate(_ME, held[0], number, now=now)
                self._leases[lease] = (held[0], held[1], min(held[2], number))
            elif kind == RESET and space is not None:
                self.cache.reset(space)
            elif kind == CUT:
                for held in self._leases.values():
                    self.cache.release(_ME, held[0], now=now)
                self._leases.clear()

    def _grant(self, lease: int, actual: int, data: bytes, space: Namespace, now: float) -> None:
        reused, refused = 0, False
        try:
            self.cache.attach(_ME, space, now=now)
            grant = self.cache.acquire(_ME, space, data, now=now)
        except CacheError:
            refused = True
        else:
            assert isinstance(grant, Grant)  # it did not ask to wait
            reused = grant.ledger.reused
            room = len(grant.block_table) * self.cache.block_size
            self._leases[lease] = (grant.lease, room, grant.num_cached)
            self.cache.quit(_ME, space)  # what is cached or held keeps it, nothing else
        minute = int(now / 60)
        if not self._minutes or self._minutes[-1][0] != minute:
            self._minutes.append((minute, Sums()))
        for sums in (self.whole, self._minutes[-1][1]):
            sums.add(len(data) // 4, reused, actual, refused=refused)

    def _commit(self, lease: int, num_tokens: int, data: bytes, now: float) -> None:
        own, room, committed = self._leases[lease]
        num_tokens = max(num_tokens, committed)
        try:
            if num_tokens > room:
                self.cache.extend(_ME, own, num_tokens, now=now)
                room = -(-num_tokens // self.cache.block_size) * self.cache.block_size
            elif data or num_tokens > committed:
                self.cache.extend(_ME, own, num_tokens, now=now)  # a fork's last block is its own
            self.cache.commit(_ME, own, num_tokens, data, now=now)
        except CacheError:
            # No room to go on: what it has stays cached, and it is not played any further.
            with suppress(NotFound):
                self.cache.release(_ME, own, now=now)
            del self._leases[lease]
            return
        self._leases[lease] = (own, room, num_tokens)

    def told(self, now: float) -> dict[str, Any]:
        """Give the sums of the last hour and of the whole time."""
        hour = Sums()
        since = int(now / 60) - _MINUTES
        recent = [(minute, sums) for minute, sums in self._minutes if minute > since]
        for _, sums in recent:
            for name in Sums.__slots__:
                setattr(hour, name, getattr(hour, name) + getattr(sums, name))
        counts = self.cache.counts(now=now)
        return {
            "name": self.name,
            "hour": hour.fields(),
            "whole": self.whole.fields(),
            "num_blocks": counts.num_blocks,
            "block_size": counts.block_size,
            "evicted": counts.evicted,
        }


def make(configuration: dict[str, Any]) -> ShadowCache:
    """Make one shadow of what the service wrote on the command line."""
    return ShadowCache(
        configuration["name"],
        PrefixCache(
            configuration["num_blocks"],
            configuration["block_size"],
            policy=configuration["policy"],
            partial=Partial(configuration["partial"]),
            ttl_s=_FOREVER_S,
        ),
    )


def run(shadows: list[ShadowCache], oplog: IO[bytes], told: IO[bytes]) -> None:
    """Play until the log ends."""
    due = monotonic()
    while (chunk := read_chunk(oplog)) is not None:
        spaces = chunk.namespaces
        at = 0
        view = chunk.payload
        for kind, lease, number, length, space in zip(
            chunk.kinds, chunk.leases, chunk.numbers, chunk.lengths, chunk.spaces, strict=True
        ):
            data = view[at : at + length]
            at += length
            where = spaces[space] if space >= 0 else None
            for shadow in shadows:
                shadow.play(kind, lease, number, data, where, chunk.now)
        if monotonic() >= due:
            due = monotonic() + _EVERY_S
            fields = {"now": chunk.now, "shadows": [shadow.told(chunk.now) for shadow in shadows]}
            told.write(json_text(fields).encode() + b"\n")
            told.flush()


def main() -> None:
    """Be the process."""
    with suppress(OSError):
        os.nice(_NICENESS)
    shadows = [make(configuration) for configuration in json.loads(sys.argv[1])]
    with suppress(BrokenPipeError, KeyboardInterrupt):
        run(shadows, sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
