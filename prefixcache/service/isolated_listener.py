"""Who hears of others' steps, and is spared them once he has failed.

```
step of a request ─► core ─► IsolatedListener ─► listener: an error ends it, never the step
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefixcache.core.tiers import Places
from prefixcache.types import BlockId, BlockTable, Namespace


class IsolatedListener:
    """A journal, or one that hears of rights too, whose first error ends it and nothing else.

    Args:
        ear: What hears.
        ended: Called with the error, once; puts the ear out of use in order.
    """

    def __init__(self, ear: Any, ended: Callable[[Exception], None]) -> None:
        self._ear: Any = ear
        self._ended = ended

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        """Pass it on."""
        if self._ear is not None:
            try:
                self._ear.stored(namespace, parent, tokens, blocks)
            except Exception as error:  # noqa: BLE001 - whatever it is, the step is another's
                self._end(error)

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        """Pass it on."""
        if self._ear is not None:
            try:
                self._ear.removed(namespace, blocks)
            except Exception as error:  # noqa: BLE001 - as above
                self._end(error)

    def cleared(self, namespace: Namespace) -> None:
        """Pass it on."""
        if self._ear is not None:
            try:
                self._ear.cleared(namespace)
            except Exception as error:  # noqa: BLE001 - as above
                self._end(error)

    def left(self, namespace: Namespace) -> None:
        """Pass it on."""
        if self._ear is not None:
            try:
                self._ear.left(namespace)
            except Exception as error:  # noqa: BLE001 - as above
                self._end(error)

    def copied(self, namespace: Namespace, sources: Places, places: Places) -> None:
        """Pass it on."""
        if self._ear is not None:
            try:
                self._ear.copied(namespace, sources, places)
            except Exception as error:  # noqa: BLE001 - as above
                self._end(error)

    def lost(self, places: Places) -> None:
        """Pass it on."""
        if self._ear is not None:
            try:
                self._ear.lost(places)
            except Exception as error:  # noqa: BLE001 - as above
                self._end(error)

    def found(
        self, namespace: Namespace, parent: int | None, tokens: bytes, places: Places
    ) -> None:
        """Pass it on."""
        if self._ear is not None:
            try:
                self._ear.found(namespace, parent, tokens, places)
            except Exception as error:  # noqa: BLE001 - as above
                self._end(error)

    def given(self, blocks: BlockTable) -> None:
        """Pass it on."""
        if self._ear is not None:
            try:
                self._ear.given(blocks)
            except Exception as error:  # noqa: BLE001 - as above
                self._end(error)

    def ended(self, blocks: BlockTable) -> None:
        """Pass it on."""
        if self._ear is not None:
            try:
                self._ear.ended(blocks)
            except Exception as error:  # noqa: BLE001 - as above
                self._end(error)

    def _end(self, error: Exception) -> None:
        self._ear = None
        self._ended(error)
