"""An engine's membership: what it leases, by a session that is looked for again when it is lost.

```
join ──► Leases ── session lost ──► look: every half second, in a thread ──► take ──► Leases
```
An engine that computes says when to look.  One that is idle notices nothing: where the service is
dead, a thread looks for another one all the same, so that it is there for the next request.
Whose the new session is, and whether the engine can use its pool, is for the engine to see.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from prefixcache.client import Client, Session
from prefixcache.errors import CacheError, LayoutMismatch, Unsupported
from prefixcache.movable_pool import check_shape
from prefixcache.types import PoolHandle
from prefixcache_vllm.joining import attach, group_of, join
from prefixcache_vllm.leases import Leases

log = logging.getLogger("vllm.prefixcache")

REJOIN_S: Final = 0.5
"""How often an engine without its service looks whether it is back."""
REFUSED_S: Final = 5.0
"""How often, while one answers whose pool it cannot use."""


class Link:
    """The scheduler's way to the service, whether it is there or not.

    Args:
        vllm_config: of the engine.
        kv_cache_config: of the engine.
        role: for people: appears in snapshots.
        in_place: whether vLLM computes in the pool itself: then only pools of one shape will do.
        make: makes leases of a session; may wait for the service.

    Attributes:
        group: of the engine's processes, as it has joined last.
        refusal: why the service that answers cannot be joined; empty if it can, or none answers.
    """

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        role: str,
        *,
        in_place: bool,
        make: Callable[[Session], Leases],
    ) -> None:
        self._configs = vllm_config, kv_cache_config, role
        self._in_place = in_place
        self._make = make
        self._client: Client | None = None
        self._pool: PoolHandle | None = None
        self._found: Leases | None = None
        self._is_closed = threading.Event()
        self._looking: threading.Thread | None = None
        self._beginning = threading.Lock()
        self._session: Session | None = None
        self._times = 0
        self.group = group_of(vllm_config)
        self.refusal = ""

    def join(self) -> Leases:
        """Connect, if that was not done, and attach.

        Raises:
            LayoutMismatch: the service has a pool of another format, or, in place, of another shape
                than the one before.
            Unsupported: the engine cannot be served from it.
            CacheError: that did not work.
        """
        if self._client is None:
            self._client, session = join(*self._configs, in_place=self._in_place)
        else:
            self._times += 1
            group = group_of(self._configs[0], self._times)
            session = attach(self._client, *self._configs, in_place=self._in_place, group=group)
            self.group = group
        try:
            if self._in_place and self._pool is not None and session.pool != self._pool:
                _check_movable(session.pool, self._pool)
            leases = self._make(session)
        except BaseException:
            session.close()
            raise
        self._pool = session.pool
        if self._session is None:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
        self._session = session
        return leases

    def look(self) -> None:
        """Begin to look for a service in the background, unless that was done."""
        with self._beginning:
            if self._looking is None and not self._is_closed.is_set():
                self._looking = threading.Thread(target=self._look, name="rejoin", daemon=True)
                self._looking.start()

    def _watch(self) -> None:
        while not self._is_closed.wait(REJOIN_S):
            session = self._session
            # One that lives hears first, by the engine, that nothing is written there any more.
            if session is not None and not session.alive and session.memory_is_abandoned:
                if (found := self._found) is not None and not found.session.alive:
                    self.take()  # that one has died as well
                self.look()

    def _look(self) -> None:
        wait_s = REJOIN_S
        while not self._is_closed.wait(wait_s):
            try:
                self._found = self.join()
            except (LayoutMismatch, Unsupported) as error:
                if self.refusal != str(error):
                    self.refusal = str(error)
                    log.warning("prefixcache: another pool answers, and is not shared: %s", error)
                wait_s = REFUSED_S
            except CacheError as error:
                log.debug("prefixcache: no service yet: %s", error)
                self.refusal, wait_s = "", REJOIN_S
            else:
                self.refusal = ""
                return

    def take(self) -> Leases | None:
        """Give the leases of the session that was found since, once."""
        if self._found is None:
            return None
        with self._beginning:
            found, self._found, self._looking = self._found, None, None
        return found

    def close(self) -> None:
        """End the session, and look no more."""
        self._is_closed.set()
        if self._client is not None:
            with suppress(CacheError):
                self._client.close()


def _check_movable(pool: PoolHandle, former: PoolHandle) -> None:
    """Refuse what cannot be put in the place of the pool that an engine computes in."""
    remedy = "start this engine again to join it"
    if pool.kind != "shm":
        raise Unsupported(
            f"its memory is on a GPU, where no other can be put in its place: {remedy}"
        )
    try:
        check_shape(pool, former)
    except LayoutMismatch as error:
        raise LayoutMismatch(f"{error}: {remedy}") from None
