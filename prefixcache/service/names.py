"""Names: what workers are called where people look; they decide nothing."""

from __future__ import annotations

from typing import Final

_STEMS: Final = 4096
"""Names that several workers wished for, whose next number is remembered."""


class Names:
    """What workers are called where people look: no two of a tenant are called the same at a time.

    Each tenant has names of its own, so that nobody learns from his what workers others have; who
    sees several tenants sees the tenant beside the name.  O(1) each, amortised.
    """

    def __init__(self) -> None:
        self._taken: set[tuple[str, str]] = set()
        self._counts: dict[tuple[str, str], int] = {}
        """Where to look for the next number of workers that wished for the same."""

    def take(self, tenant: str, wish: str) -> str:
        """Give a name that no worker of the tenant has; the one that is wished for, if it can."""
        found = wish
        if not wish or (tenant, wish) in self._taken:
            stem = f"{wish}~" if wish else "w"
            number = self._counts.pop((tenant, stem), 0) + 1
            while (tenant, found := f"{stem}{number}") in self._taken:
                number += 1
            self._counts[tenant, stem] = number
            if len(self._counts) > _STEMS:
                del self._counts[next(iter(self._counts))]
        self._taken.add((tenant, found))
        return found

    def free(self, tenant: str, name: str) -> None:
        """Let others have a name.  Idempotent."""
        self._taken.discard((tenant, name))
