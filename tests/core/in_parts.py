"""A cache whose long steps are made in the smallest parts, with a check after each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefixcache.core.cache import PrefixCache
from prefixcache.types import Ended, WorkerId


class InParts:
    """As `PrefixCache`; what a step leaves to later ones is done before it returns.

    Not a subclass of it: there can be none where the core is compiled.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._cache = PrefixCache(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def detach(self, worker: WorkerId, *, now: float, gone: bool, most: int | None = None) -> Ended:
        """End one lease after the other."""
        ended = self._cache.detach(worker, now=now, gone=gone, most=1)
        while self.is_leaving(worker):
            self.check()
            ended = Ended.total([ended, *self._lessor.end_leaving(now, 1)])
            self._lessor.serve(now)
        return self._rest(lambda: ended, now)

    def expire(self, *, now: float, most: int | None = None) -> Ended:
        """End one lease, pin and wait after the other."""
        ended = self._cache.expire(now=now, most=1)
        while (due := self.next_deadline()) is not None and due < now:
            self.check()
            ended = Ended.total((ended, self._cache.expire(now=now, most=1)))
        return ended

    def worker_gone(self, worker: WorkerId, *, now: float) -> int:
        """End one lease after the other, as `detach` does."""
        member = self._lessor.leases.workers.get(worker)
        if member is not None and member.is_gone is None:
            return self.detach(worker, now=now, gone=True).num_freed
        return self._rest(lambda: self._cache.worker_gone(worker, now=now), now)

    def _rest(self, verb: Callable[[], Any], now: float) -> Any:
        answer = verb()
        while self._lessor.is_behind:
            self.check()
            self._lessor.go_on(now)
        return answer


def _to_the_end(name: str) -> Callable[..., Any]:
    verb = getattr(PrefixCache, name)

    def run(self: InParts, *arguments: Any, now: float, **others: Any) -> Any:
        return self._rest(lambda: verb(self._cache, *arguments, now=now, **others), now)

    return run


for _name in ("acquire", "cancel", "commit", "release", "truncate", "set_quota"):
    setattr(InParts, _name, _to_the_end(_name))
