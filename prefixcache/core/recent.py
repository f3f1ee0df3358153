"""Recent requests: what was granted lately, so that a miss can be explained after the fact.

Bounded in number and in bytes of prompts: over the bytes, the oldest lose their tokens first and
keep their ledger.  A namespace that is reset is forgotten here too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from prefixcache.types import LeaseId, Ledger, Namespace

_MOST_REQUESTS = 2048
_MOST_BYTES = 16 << 20


@dataclass(slots=True, eq=False)
class Recent:
    """One request, as it was when it was granted."""

    request_id: str
    worker: str
    """Its name."""
    lease: LeaseId
    namespace: Namespace
    tokens: bytes
    """The prompt; empty once there are too many younger ones."""
    ledger: Ledger
    at: float
    parted_at: int | None
    stored_next: bytes
    """What was stored from there on, its first tokens."""
    extra_blocks: int | None
    """How many more would have kept what was evicted of it."""

    def is_called(self, name: str) -> bool:
        """Whether that names this request: its id, without its last part, or worker#lease.

        A tenant may stand before the worker, for who sees several.
        """
        own = self.request_id
        lease = f"{self.worker}#{self.lease}"
        return name in (own, lease, f"{self.namespace.tenant}/{lease}") or (
            own.startswith(name) and own[len(name) : len(name) + 1] == "/"
        )


class Recents:
    """The last requests, youngest first."""

    __slots__ = ("_bytes", "_requests", "_whole")

    def __init__(self) -> None:
        self._requests: deque[Recent] = deque(maxlen=_MOST_REQUESTS)
        self._whole: deque[Recent] = deque()
        """Those that still have their tokens."""
        self._bytes = 0

    def __iter__(self) -> Iterator[Recent]:
        return reversed(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Recent) -> None:
        """Remember a request.  Amortised O(1); its tokens are not copied."""
        self._requests.append(request)
        self._whole.append(request)
        self._bytes += len(request.tokens)
        while self._bytes > _MOST_BYTES or len(self._whole) > _MOST_REQUESTS:
            old = self._whole.popleft()
            self._bytes -= len(old.tokens)
            old.tokens = b""

    def forget(self, namespace: Namespace) -> None:
        """Forget all requests of a namespace.  O(requests)."""
        kept = [one for one in self._requests if one.namespace != namespace]
        if len(kept) == len(self._requests):
            return
        self._requests = deque(kept, maxlen=_MOST_REQUESTS)
        self._whole = deque(one for one in kept if one.tokens)
        self._bytes = sum(len(one.tokens) for one in kept)
