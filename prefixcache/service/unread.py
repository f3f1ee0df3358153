"""Unread answers: what unary calls were told and nobody has taken yet; so much, and no more.

```
call ─► has its tenant 16 MiB unread? ── waits
     └► its answer is long, and 8 of its tenant's are made or unread? ── waits
          └► made ─► counted ─► its caller has taken it, or hung up ─► counted no more
              waited 10 s in vain ─► refused with the number
```
A question of a few bytes may have an answer of a megabyte, and gRPC keeps what a caller does not
read.  Sessions write one part after the other, each once the one before is taken; a unary call has
one answer, and somebody may make thousands of calls and read none.  A long answer is one that is
made in steps: while it is, it takes more than its bytes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from prefixcache.errors import PoolExhausted
from prefixcache.texts import many

MOST_BYTES: Final = 16 << 20
"""Of a tenant's unread answers, beyond which its next calls wait."""
MOST_LONG: Final = 8
"""Long answers of a tenant that are made or unread at the same time."""
_COUNTED_FROM: Final = 16 << 10
"""Bytes of an answer that is counted at all."""
_WAIT_S: Final = 10.0


class _Tenant:
    """What one tenant has."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.num_long = 0
        self.lines: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())
        """Who waits to make an answer, and who to make a long one, the first of them first."""

    def has_room(self, *, is_long: bool) -> bool:
        return self.num_bytes < MOST_BYTES and not (is_long and self.num_long >= MOST_LONG)

    def call_next(self) -> None:
        """Let the first in each line look again, if there is room.  Amortised O(1)."""
        for is_long, line in enumerate(self.lines):
            while line and self.has_room(is_long=bool(is_long)):
                if not (first := line.popleft()).done():
                    first.set_result(None)
                    break


class Unread:
    """The unread answers of one trust domain."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}

    def used(self, tenant: str) -> tuple[int, int]:
        """Give how many bytes of a tenant's are unread, and how many long answers."""
        found = self._tenants.get(tenant)
        return (0, 0) if found is None else (found.num_bytes, found.num_long)

    async def room(self, tenant: str, *, is_long: bool = False) -> Callable[[], None] | None:
        """Wait until an answer may be made.  O(1) where it may be at once.

        Args:
            tenant: Whose answer it is.
            is_long: Whether it is made in steps.

        Returns:
            What to call once a long answer is taken, or nobody will take it.  Idempotent.

        Raises:
            PoolExhausted: it waited in vain; the message has the numbers.
        """
        found = self._tenants.get(tenant)
        if found is not None and not found.has_room(is_long=is_long):
            found = await self._wait(tenant, found, is_long=is_long)
        if not is_long:
            return None
        if found is None:
            found = self._tenants.setdefault(tenant, _Tenant())
        found.num_long += 1
        return self._once(tenant, found, 0, 1)

    def hold(self, tenant: str, num_bytes: int) -> Callable[[], None] | None:
        """Count an answer that has been made; give what to call once it is taken.

        None for one that is too small to be counted.
        """
        if num_bytes < _COUNTED_FROM:
            return None
        found = self._tenants.setdefault(tenant, _Tenant())
        found.num_bytes += num_bytes
        return self._once(tenant, found, num_bytes, 0)

    async def _wait(self, tenant: str, found: _Tenant, *, is_long: bool) -> _Tenant:
        line = found.lines[is_long]
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            async with asyncio.timeout(_WAIT_S):
                while True:
                    await turn
                    if found.has_room(is_long=is_long):
                        break
                    turn = asyncio.get_running_loop().create_future()
                    line.appendleft(turn)  # who came later was faster
        except TimeoutError:
            who = f"tenant {tenant!r} has" if tenant else "there are"
            long = f", {many(found.num_long, 'long one')} of {MOST_LONG:,}" if is_long else ""
            raise PoolExhausted(
                f"{who} {found.num_bytes:,} bytes of answers that nobody has read, of "
                f"{MOST_BYTES:,}{long}: read them, or hang up",
                retry_after_s=1.0,
            ) from None
        finally:
            # The next one's turn, too, if this one made no use of it or left some room.
            asyncio.get_running_loop().call_soon(found.call_next)
        return self._tenants.setdefault(tenant, found)

    def _once(
        self, tenant: str, found: _Tenant, num_bytes: int, num_long: int
    ) -> Callable[[], None]:
        is_held = True

        def let_go() -> None:
            nonlocal is_held
            if not is_held:
                return
            is_held = False
            found.num_bytes -= num_bytes
            found.num_long -= num_long
            found.call_next()
            if not (found.num_bytes or found.num_long) and self._tenants.get(tenant) is found:
                del self._tenants[tenant]

        return let_go
