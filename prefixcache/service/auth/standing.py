"""Standing: whether the caller of an open call still is who it was found to be.

```
call ─► Authenticator ─► Standing(identity, edition)
          ├─ each message: the same edition?                         O(1)
          └─ patrol, every second: a new edition? look at all
file changed ─► its proof proves nobody, or somebody else, or may less ─► the call ends
```
A session or a watch lives for days; its caller proved himself when it began.  Who is taken out of
the file of identities, or is changed in it, is out of his open calls within two looks at the file:
his session ends as that of a lost worker does, and what it leased is quarantined.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from prefixcache.errors import CacheError, Unauthenticated
from prefixcache.service.auth.authenticator import LOOK_EVERY_S, Authenticator, IdentityFile
from prefixcache.service.auth.identity import Identities, Identity, Proof

_AT_A_TIME = 16
"""Calls whose proof is looked at in one go."""


class Standing:
    """The standing of one call.

    Args:
        authenticator: Through which it came.
        context: What it brought to prove itself.

    Raises:
        Unauthenticated: nobody known.
    """

    __slots__ = ("_authenticator", "_context", "_edition", "_task", "error", "identity")

    def __init__(self, authenticator: Authenticator, context: Any) -> None:
        self._authenticator = authenticator
        self._context = context
        self.identity: Identity = authenticator.identify(context)
        self._edition = authenticator.identity_file.edition
        self._task: asyncio.Task[Any] | None = None
        self.error: CacheError | None = None
        """Why it stands no more."""

    def check(self) -> None:
        """Check that it stands.  O(1), unless the file has changed since the last time.

        Raises:
            Unauthenticated: it does not.
        """
        if self._edition == self._authenticator.identity_file.edition and self.error is None:
            return
        if self.error is None:
            self._edition = self._authenticator.identity_file.edition
            self.error = self._doubt()
        if self.error is not None:
            raise self.error

    def _doubt(self) -> CacheError | None:
        try:
            now = self._authenticator.identify(self._context)
        except CacheError as error:
            return error
        if now == self.identity:
            return None
        return Unauthenticated(
            f"what the file of identities says of {self.identity.name} has changed: call again"
        )

    @property
    def proof(self) -> Proof | None:
        """What its caller showed."""
        return self._authenticator.proof(self._context)

    def begin(self, task: asyncio.Task[Any]) -> None:
        """Have `task` cancelled when it stands no more; `error` then says why."""
        self._task = task

    def settle(self) -> None:
        """Let nothing end the call any more: its answer is made, and is being written."""
        self._task = None

    def look(self) -> None:
        """Look for a call that says nothing: end it if it stands no more."""
        try:
            self.check()
        except CacheError:
            if self._task is not None:
                self._task.cancel()


STANDING: ContextVar[Standing | None] = ContextVar("standing", default=None)
"""That of the call that runs in this task; None where nobody has to prove anything."""


class OpenCalls:
    """The standings of all calls of a service, all its endpoints together.

    Args:
        identity_file: The file of identities.
    """

    def __init__(self, identity_file: IdentityFile) -> None:
        self._identity_file = identity_file
        self._standings: set[Standing] = set()

    def __len__(self) -> int:
        return len(self._standings)

    def add(self, standing: Standing) -> None:
        """Keep an eye on a call.  O(1)."""
        self._standings.add(standing)

    def remove(self, standing: Standing) -> None:
        """Forget it: it has ended.  O(1).  Idempotent."""
        self._standings.discard(standing)

    async def patrol(self, changed: Callable[[Identities], None]) -> None:
        """Look at all calls whenever the file has changed, for ever.

        O(1) where it has not; else O(calls), a few at a time.

        Args:
            changed: Hears of each change, once the calls have been ended that it ends.
        """
        seen = self._identity_file.edition
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            current = self._identity_file.current
            if current is None or seen == self._identity_file.edition:
                continue
            seen = self._identity_file.edition
            for number, standing in enumerate(tuple(self._standings)):
                if standing in self._standings:
                    standing.look()
                if number % _AT_A_TIME == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(0)  # what was cancelled last hears of it first
            changed(current)
