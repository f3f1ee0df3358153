"""Descriptors: how many files and connections the service may have open, and who gets how many.

```
the hard limit ─┬─ 64        its own: pool, state, recording, events …
                ├─ an eighth (64 at most)    connections to the page and the metrics
                ├─ a 16th (32 at most)       connections to each address of events, if there is one
                ├─ half of the rest          callers' connections: half for the addresses of
                │                            --listen, the other half for the sockets of identities,
                │                            each address and socket as many
                └─ the other half            workers' processes, which are watched by one each
```
So whoever opens connections, at whichever endpoint, takes none that others need.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

from prefixcache.errors import InvalidRequest

_OWN = 64
_HTTP = 64
_EVENTS = 32
_LEAST = 128
"""Descriptors without which a service is of no use."""


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Who gets how many."""

    total: int
    http: int
    """Connections to the page and the metrics."""
    front: int
    """Connections to each address of `--listen`."""
    own: int
    """Connections to each socket of an identity's own."""
    events: int = 0
    """Connections to each address of `--events` and `--events-replay`."""

    @classmethod
    def split(
        cls, total: int, num_sockets: int, num_addresses: int = 1, num_published: int = 0
    ) -> Descriptors:
        """Split `total` among the addresses of `--listen`, of events, and identities' sockets.

        >>> Descriptors.split(1024, num_sockets=0)
        Descriptors(total=1024, http=64, front=448, own=0, events=0)
        >>> Descriptors.split(1024, num_sockets=0, num_addresses=2)
        Descriptors(total=1024, http=64, front=224, own=0, events=0)
        >>> Descriptors.split(256, num_sockets=4)
        Descriptors(total=256, http=32, front=40, own=10, events=0)
        >>> Descriptors.split(256, num_sockets=0, num_published=2)
        Descriptors(total=256, http=32, front=64, own=0, events=16)
        """
        http = min(_HTTP, total // 8)
        events = min(_EVENTS, total // 16) if num_published else 0
        callers = (total - _OWN - http - events * num_published) // 2
        if not num_sockets:
            return cls(total, http, max(1, callers // num_addresses), 0, events)
        front, own = callers // 2 // num_addresses, callers // 2 // num_sockets
        return cls(total, http, max(1, front), max(1, own), events)

    def __str__(self) -> str:
        own = f", {self.own} at each socket of an identity" if self.own else ""
        return f"{self.total:,} open files: up to {self.front:,} connections at each address{own}"


def raise_limit() -> int:
    """Raise the limit of open files as far as this process may; give it.

    Raises:
        InvalidRequest: so few are not enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return 1 << 20
    if hard < _LEAST:
        raise InvalidRequest(
            f"this process may open {hard} files, and needs {_LEAST}: raise the limit (ulimit -n, "
            "or LimitNOFILE= of its unit)"
        )
    return hard
