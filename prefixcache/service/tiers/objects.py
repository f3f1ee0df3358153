"""Objects: what a block looks like in a store that other machines have, too, and on its way there.

```
object   magic │ name │ check │ tokens, and a gap up to 64 bytes │ pages of the block, in a row
```
An object's **name** is a hash of all tokens up to the block's end, of what they belong to (the
model and its weights, adapter, tenant, salt), of the layout, and of how often that was reset: who
has other weights, or another prefix, asks for something else.

The **check** is a sum over pages and tokens, which finds accidents; with a secret it is a keyed
hash over name, tokens and pages, which nobody makes who has not the secret.  It is computed where
the bytes have arrived, in the pool, before anybody may read them.

Objects pass through slots of memory that whoever talks to the store has mapped: nothing else has
he.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from prefixcache.core.remote import NAME_BYTES
from prefixcache.errors import PoolExhausted
from prefixcache.pool import PoolFile, map_pool, pages_of
from prefixcache.service.persistence.checksums import Checksums
from prefixcache.service.tiers.slab import describe, read_handle
from prefixcache.types import Layout, Namespace, PoolHandle

MAGIC: Final = b"PCOBJ001"
CHECK_BYTES: Final = 32
_FORMAT: Final = "prefixcache-objects"
_ALIGN: Final = 64
_MOST_SLOTS: Final = 64
_STAGE_BYTES: Final = 64 << 20
"""What the slots take at most, unless so few are not enough."""
_LEAST_SLOTS: Final = 4
_SEED: Final = 0x5052_4546_4958
"""Of the sums' weights: the same on all machines."""
_PERSON_NAME: Final = b"prefixcache/ob"
_PERSON_CHECK: Final = b"prefixcache/mac"


def head_type(block_size: int) -> np.dtype[Any]:
    """Give the form of what stands before the pages, for blocks of so many tokens."""
    fields = [
        ("magic", "u1", (len(MAGIC),)),
        ("name", "u1", (NAME_BYTES,)),
        ("check", "u1", (CHECK_BYTES,)),
        ("tokens", "<u4", (block_size,)),
    ]
    size = np.dtype(fields).itemsize
    return np.dtype([*fields, ("gap", "u1", (-size % _ALIGN,))])


def head_bytes(block_size: int) -> int:
    """Give what stands before the pages, for blocks of so many tokens."""
    return head_type(block_size).itemsize


def object_bytes(pool: PoolHandle) -> int:
    """Give what a block of that pool takes as an object."""
    return head_bytes(pool.block_size) + pool.block_bytes


def num_stage_slots(size: int) -> int:
    """Give how many objects of that size are on their way at the same time."""
    return min(max(_STAGE_BYTES // size, _LEAST_SLOTS), _MOST_SLOTS)


class Stage:
    """The service's end of the slots through which objects go.

    Args:
        pool: Of which pool.

    Raises:
        PoolExhausted: shared memory has no room for them.
    """

    def __init__(self, pool: PoolHandle) -> None:
        size = object_bytes(pool)
        self.num_slots = num_stage_slots(size)
        layout = Layout(planes=1, page_bytes=size, format=_FORMAT)
        try:
            self._file = PoolFile.create(layout, self.num_slots, pool.block_size)
        except PoolExhausted as error:
            raise PoolExhausted(f"--remote: {error}") from None

    def order(self) -> dict[str, Any]:
        """Say where they are, as `map_stage` wants to be told."""
        return describe(self._file.handle)

    def close(self) -> None:
        """Remove the file.  Idempotent."""
        self._file.close()


def map_stage(order: dict[str, Any]) -> tuple[mmap.mmap, npt.NDArray[np.uint8]]:
    """Map the slots: `[slot, bytes of an object]`."""
    handle = read_handle(order)
    memory = map_pool(handle)
    return memory, pages_of(memory, handle)[0]


class Namer:
    """Names objects.

    Args:
        layout: How the bytes of a block lie, as text.
        block_size: Tokens of a block.
        secret: If given, nobody can make these names, or guess a prompt from one, without it.
    """

    def __init__(self, layout: str, block_size: int, secret: bytes = b"") -> None:
        self._width = 4 * block_size
        self._secret = secret
        self._layout = self._hash(
            b"".join(map(_field, (MAGIC, layout.encode(), b"%d" % block_size)))
        )

    def _hash(self, text: bytes) -> bytes:
        return blake2b(text, digest_size=NAME_BYTES, key=self._secret, person=_PERSON_NAME).digest()

    def base(self, namespace: Namespace, resets: bytes) -> bytes:
        """Name what all prompts of a namespace begin with.

        >>> namer = Namer("2x2x8:float32", 4)
        >>> namer.base(Namespace("m@1", "a"), b"") == namer.base(Namespace("m@1a"), b"")
        False
        """
        fields = (namespace.model, namespace.adapter, namespace.tenant, namespace.salt)
        told = [self._layout, *(one.encode() for one in fields), resets]
        return self._hash(b"".join(map(_field, told)))

    def names(self, base: bytes, tokens: bytes, first: int) -> bytes:
        """Name the blocks of a prefix from number `first` on.  O(blocks): a loop."""
        return b"".join(self.parts(base, tokens, first, len(tokens)))

    def parts(self, base: bytes, tokens: bytes, first: int, most: int) -> Iterator[bytes]:
        """Name the blocks of a prefix from number `first` on, `most` of them in a step.

        The names of blocks before `first` are needed, too, and steps may give none.  O(blocks).
        """
        name, width, at = base, self._width, 0
        end = len(tokens) // width * width
        while at < end:
            names, stop = [], min(at + most * width, end)
            for start in range(at, stop, width):
                name = self._hash(name + tokens[start : start + width])
                names.append(name)
            yield b"".join(names[max(0, first - at // width) :])
            at = stop


def _field(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


class Packer:
    """The porter's end: writes blocks of the pool into slots, and back.

    Args:
        memory: The pool, mapped.
        pool: Its handle.
        order: What `Stage.order` gives.
        secret: If given, objects are signed with it.
    """

    def __init__(
        self, memory: mmap.mmap, pool: PoolHandle, order: dict[str, Any], secret: bytes = b""
    ) -> None:
        self._map, self._slots = map_stage(order)
        self._pool = pages_of(memory, pool)
        self._type = head_type(pool.block_size)
        self._at = self._type.itemsize
        self._secret = secret
        self._sums = Checksums(memory, pool, _SEED)

    def _checks(
        self,
        blocks: npt.NDArray[np.uint32],
        names: npt.NDArray[np.uint8],
        tokens: npt.NDArray[np.uint32],
    ) -> npt.NDArray[np.uint8]:
        """Compute what stands beside blocks, from what the pool holds: `[n, CHECK_BYTES]`."""
        checks = np.zeros((len(blocks), CHECK_BYTES), np.uint8)
        if not self._secret:
            sums = self._sums.of_contents(blocks, tokens)
            checks[:, :8] = sums.view(np.uint8).reshape(-1, 8)
            return checks
        for at, block in enumerate(blocks):
            told = blake2b(
                names[at].tobytes() + tokens[at].tobytes(),
                digest_size=CHECK_BYTES,
                key=self._secret,
                person=_PERSON_CHECK,
            )
            for page in self._pool[:, block]:
                told.update(page)
            checks[at] = np.frombuffer(told.digest(), np.uint8)
        return checks

    def pack(
        self, blocks: npt.NDArray[np.uint32], slots: list[int], names: bytes, tokens: bytes
    ) -> int:
        """Write blocks of the pool into slots, as objects.  O(their bytes).

        Returns:
            How many: all.
        """
        named, told = self._read(len(slots), names, tokens)
        heads = np.zeros(len(slots), self._type)
        heads["magic"] = np.frombuffer(MAGIC, np.uint8)
        heads["name"], heads["tokens"] = named, told
        heads["check"] = self._checks(blocks, named, told)
        shape = self._pool[:, 0].shape
        for at, slot in enumerate(slots):
            self._slots[slot, : self._at] = heads[at : at + 1].view(np.uint8)
            self._slots[slot, self._at :].reshape(shape)[:] = self._pool[:, blocks[at]]
        return len(slots)

    def unpack(
        self, blocks: npt.NDArray[np.uint32], slots: list[int], names: bytes, tokens: bytes
    ) -> int:
        """Write objects from slots into blocks of the pool; compare what has arrived there.

        Returns:
            How many, from the first on, are what they should be.
        """
        named, told = self._read(len(slots), names, tokens)
        heads, shape = np.zeros(len(slots), self._type), self._pool[:, 0].shape
        for at, slot in enumerate(slots):
            heads[at : at + 1].view(np.uint8)[:] = self._slots[slot, : self._at]
            self._pool[:, blocks[at]] = self._slots[slot, self._at :].reshape(shape)
        good = (
            (heads["magic"] == np.frombuffer(MAGIC, np.uint8)).all(axis=1)
            & (heads["name"] == named).all(axis=1)
            & (heads["tokens"] == told).all(axis=1)
            & (heads["check"] == self._checks(blocks, named, told)).all(axis=1)
        )
        return len(slots) if good.all() else int(good.argmin())

    def _read(
        self, count: int, names: bytes, tokens: bytes
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
        named = np.frombuffer(names, np.uint8).reshape(count, NAME_BYTES)
        return named, np.frombuffer(tokens, np.uint32).reshape(count, -1)
