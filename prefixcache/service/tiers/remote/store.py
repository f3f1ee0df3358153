"""RemoteTier: what a carrier needs of a store that several machines share."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final, Protocol

from prefixcache.core.remote import NAME_BYTES

PREFIX: Final = "pc1/"
"""What the keys of our objects begin with in a store."""


class RemoteError(OSError):
    """A store cannot be reached, or refuses; the message says what and why."""


class Got(IntEnum):
    """What became of an object that was to be fetched."""

    NOTHING = 0
    """It is not there, or no more."""
    GOOD = 1
    """It fills its slot."""
    WRONG = 2
    """What is there under its name cannot be it: it has another size, or is no string."""


class RemoteTier(Protocol):
    """A store of objects by name.  Blocking; each thread has one of its own.

    Every method raises `RemoteError` if the store as a whole does not work.  What becomes of one
    object never becomes of another.
    """

    def connect(self) -> None:
        """Connect, unless that is done: so that the first errand does not wait for it."""

    def exists(self, names: Sequence[str]) -> bytes:
        """Say which of these it has: a byte for each, 0 for no."""

    def get_into(self, names: Sequence[str], slots: Sequence[memoryview]) -> Sequence[Got]:
        """Fetch objects, each into its slot, which it fills exactly.

        O(bytes).
        """

    def put_from(self, names: Sequence[str], slots: Sequence[memoryview]) -> Sequence[bool]:
        """Store what lies in slots; say of which it did.  O(bytes)."""

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, those that are not there as well."""


def object_names(names: bytes) -> list[str]:
    """Give what objects are called in a store, from their names in a row."""
    return [PREFIX + names[at : at + NAME_BYTES].hex() for at in range(0, len(names), NAME_BYTES)]
