"""Calls without proof: some are answered each second; whose are more, hangs up on.

```
call without proof ─┬─ of the first 16 of its connection, and one of 64 a second of all ─► answered
                    └─ beyond ─► its connection is shut, and what it has sent is not read
```
To answer a call costs the event loop a tenth of a millisecond, whatever the answer, and gRPC hands
out what was sent in the order in which it came.  So whoever sends without a pause would take all of
the loop's time, and a line of his calls would lie before everybody else's.  A connection that is
shut has no line: gRPC drops what lies in it before anybody looks at it.

A connection over which somebody has proven himself is never shut for this: what it sends without
proof is that caller's own doing.  Neither is one at a Unix socket, where gRPC tells no callers
apart; the kernel let in there one user alone.
"""

from __future__ import annotations

from time import monotonic

from prefixcache.service.auth.connections import Connections

PER_CONNECTION = 16
"""Calls that are answered over one connection that has proven nothing."""
PER_SECOND = 64
"""Calls that are answered over all of these."""


class UnprovenCalls:
    """Counts the calls of one kind that bring no proof, at all endpoints.

    Args:
        connections: Those that they come over.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._left = float(PER_SECOND)
        self._counted_at = monotonic()

    def allow(self, peer: str) -> bool:
        """Say whether a call is answered; if not, its connection has been shut.  O(1).

        To find a connection that has just come is O(open files), a fifth of the time at most.

        Args:
            peer: gRPC's name of its caller.
        """
        count = self._connections.count_unproven(peer)
        if not count:
            return True
        now = monotonic()
        self._left = min(PER_SECOND, self._left + PER_SECOND * (now - self._counted_at))
        self._counted_at = now
        if self._left >= 1 and count <= PER_CONNECTION:
            self._left -= 1
            return True
        self._connections.shut(peer)
        return False
