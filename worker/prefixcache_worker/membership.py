"""Whether a worker shares a pool now: it may lose its service, go on alone, and join again.

```
shared ── session lost ──► alone, on a pool of its own ── every half second: join? ──► shared
   └ what is in flight finishes in the lost pool if its owner is dead, and begins again if not,
     or as soon as another service takes that pool over
```
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from prefixcache.client import Session
from prefixcache.errors import CacheError
from prefixcache.pool import memory_is_abandoned
from prefixcache.types import Layout
from prefixcache_kernels import SharedPool
from prefixcache_worker.request import Alone, Event, Joined
from prefixcache_worker.store import PrivateStore, SharedStore, Store

Join = Callable[[], tuple[Session, SharedPool]]
"""Connects, attaches and maps the pool; raises CacheError while there is no service."""

REJOIN_S: Final = 0.5
"""How often a worker without its service looks whether it is back."""

BLOCK_SIZE: Final = 16
"""Of the pool of a worker that never shared one."""

_OWNER_ENDS_S: Final = 0.1  # a killed service's socket may close before its lock is dropped


class Membership:
    """The store for new requests, and what is left of earlier ones.

    Args:
        layout: of the model.
        shared: the pool to begin with; None: alone.
        join: how to find the service again when it is lost; None: never.
        private_tokens: size of the pool for the time alone.
        wake: called when the service was found again, from another thread.
    """

    def __init__(
        self,
        layout: Layout,
        shared: SharedStore | None,
        join: Join | None,
        private_tokens: int,
        wake: Callable[[], None],
    ) -> None:
        self.shared = shared
        self.private: PrivateStore | None = None
        self.old: list[SharedStore] = []
        """Lost pools in which sequences still finish."""
        self._layout = layout
        self._join = join
        self._private_tokens = private_tokens
        self._wake = wake
        self._found: deque[tuple[Session, SharedPool]] = deque()
        self._closed = threading.Event()

    @property
    def sharing(self) -> bool:
        """Whether new requests go to the shared pool."""
        return self.shared is not None and self.shared.alive

    def home(self) -> Store:
        """Give the store for new requests."""
        if self.shared is not None and self.shared.alive:
            return self.shared
        if self.private is None:
            size = self.old[-1].pool.block_size if self.old else BLOCK_SIZE
            self.private = PrivateStore(self._layout, -(-self._private_tokens // size), size)
        return self.private

    def watch(self) -> tuple[list[Event], SharedStore | None]:
        """See whether the service went or came back.

        Returns:
            What to tell; and the store whose sequences must begin again, if there is one.
        """
        events: list[Event] = []
        unsafe = None
        if self.shared is not None and not self.shared.alive:
            store, self.shared = self.shared, None
            self.old.append(store)
            events.append(Alone("the service is gone; going on without sharing until it is back"))
            unsafe = None if _outlives(store) else store
            if self._join is not None:
                threading.Thread(target=self._look, name="rejoin", daemon=True).start()
        while self._found:
            session, pool = self._found.popleft()
            self.shared = SharedStore(session, pool)
            worker = str(session.attachment.worker)
            events.append(Joined(worker, pool.num_blocks, pool.block_size))
        return events, unsafe

    def forget(self, used: set[int]) -> None:
        """Let go of lost pools, except those whose store's `id` is in `used`."""
        for store in [store for store in self.old if id(store) not in used]:
            self.old.remove(store)
            store.session.close()
            store.pool.close()

    def close(self) -> None:
        """Stop looking for a service.  Idempotent."""
        self._closed.set()

    def _look(self) -> None:
        assert self._join is not None
        while not self._closed.wait(REJOIN_S):
            try:
                found = self._join()
            except CacheError:
                continue
            self._found.append(found)
            self._wake()
            return


def _outlives(store: SharedStore) -> bool:
    """Tell whether a lost pool stays as it is.

    If its owner is dead, nobody will ever lend its blocks to others: their holders may go on.  If
    the owner lives and only the session broke, prefixes are protected no longer.
    """
    deadline = time.monotonic() + _OWNER_ENDS_S
    while not memory_is_abandoned(store.pool.handle):
        if time.monotonic() > deadline:
            return False
        time.sleep(_OWNER_ENDS_S / 10)
    return True
