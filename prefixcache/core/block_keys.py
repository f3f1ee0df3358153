"""Block keys: what a block below the pool is known by in another life, without a tree.

```
tokens        7 7 7 7 │ 9 9 1 2 │ 5 …         a block's key sums up all tokens up to its end
weights       a b c d │ e f g h │ i …         one pair for each position, secret
key           start(namespace) + Σ (token + 1) · weight      two sums, each modulo 2**64
```
Multilinear hashing (Lemire and Kaser 2014): whoever does not know the weights finds no two prefixes
with the same key but by guessing, at 2**-33 for each sum and try.  All blocks of a run are summed
by a few calls of numpy, and a run that goes on is summed from where it was left: a chain of
digests would be a loop over blocks.

**What was reset is under other keys** from then on: how often that has happened (`Generations`)
goes into the start.  So who remembers that number for a namespace, and no more, keeps what was
there before from being found ever again.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b, shake_256
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from prefixcache.core.node import Node
from prefixcache.errors import InvalidRequest
from prefixcache.types import TOKEN_BYTES, Namespace

Keys: TypeAlias = npt.NDArray[np.uint64]
"""`[blocks, 2]`."""

KEY_BYTES: Final = 16
_LEAST_WEIGHTS: Final = 8192
_LEAST_SECRET: Final = 16
_ROWS: Final = 256
_COLUMNS: Final = 256


class Generations(Protocol):
    """Who counts the resets of each namespace, for longer than the service lives."""

    def of(self, namespace: Namespace) -> int:
        """Give a number that is another one after each reset.  O(1)."""

    def advance(self, namespace: Namespace) -> None:
        """Note a reset.  O(1)."""

    def advance_all(self, tenant: str | None) -> None:
        """Note a reset of every namespace of a tenant, whatever it is called; None: of all."""


class PassingGenerations:
    """Counts resets for as long as this life, where nobody keeps them for the next one.

    Several namespaces of a tenant share a word, so nobody can make this grow: where one is reset,
    what the others have stored is not found any more either.  Tenants have rows, as far as there
    are; a reset of all that one has counts for what nobody has named yet, too.

    >>> counts = PassingGenerations()
    >>> counts.advance_all("a")
    >>> counts.of(Namespace("m", tenant="a")), counts.of(Namespace("m", tenant="b"))
    (1, 0)
    """

    __slots__ = ("_all", "_rows", "_words")

    def __init__(self) -> None:
        self._words = array("I", bytes(4 * _ROWS * _COLUMNS))
        self._rows = array("I", bytes(4 * _ROWS))
        self._all = 0

    def of(self, namespace: Namespace) -> int:
        """Give a number that is another one after each reset.  O(1)."""
        row = _row(namespace.tenant)
        return self._words[_word(row, namespace)] + self._rows[row] + self._all

    def advance(self, namespace: Namespace) -> None:
        """Note a reset.  O(1)."""
        at = _word(_row(namespace.tenant), namespace)
        self._words[at] = (self._words[at] + 1) % 2**32

    def advance_all(self, tenant: str | None) -> None:
        """Note a reset of every namespace of a tenant; None: of all tenants.  O(1)."""
        if tenant is None:
            self._all += 1
        else:
            row = _row(tenant)
            self._rows[row] = (self._rows[row] + 1) % 2**32


def _row(tenant: str) -> int:
    return hash(tenant) % _ROWS


def _word(row: int, namespace: Namespace) -> int:
    return row * _COLUMNS + hash(namespace) % _COLUMNS


class BlockKeys:
    """Computes keys.

    Args:
        secret: What the weights are drawn from: at least 16 bytes that nobody else knows.
        block_size: Tokens of a block.
        generations: Who counts resets.

    Raises:
        InvalidRequest: The secret is too short.
    """

    __slots__ = ("_block_size", "_ends", "_secret", "_weights", "generations")

    def __init__(self, secret: bytes, block_size: int, generations: Generations) -> None:
        if len(secret) < _LEAST_SECRET:
            raise InvalidRequest(f"a secret of {len(secret)} bytes: at least {_LEAST_SECRET}")
        self._secret = secret
        self._block_size = block_size
        self._weights: Keys = np.empty((0, 2), np.uint64)
        self.generations = generations
        self._ends: dict[Node, tuple[int, Keys]] = {}

    def start(self, namespace: Namespace) -> Keys:
        """Give the key of no tokens at all: `[1, 2]`.  O(length of its names)."""
        digest = blake2b(digest_size=KEY_BYTES, key=self._secret[:64], person=b"prefixcache keys")
        for field in (namespace.model, namespace.adapter, namespace.tenant, namespace.salt):
            raw = field.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little") + raw)
        digest.update(bytes([namespace.approximate]))
        digest.update(self.generations.of(namespace).to_bytes(8, "little"))
        return np.frombuffer(digest.digest(), "<u8").reshape(1, 2).astype(np.uint64)

    def go_on(self, key: Keys, at: int, tokens: bytes) -> Keys:
        """Give the keys of the blocks that follow a prefix.  O(tokens), in C.

        Args:
            key: Of the prefix: `[1, 2]`.
            at: How many tokens it has.
            tokens: Of the blocks, all full.
        """
        own, weights = self._summands(at, tokens)
        blocks = own.reshape(-1, self._block_size)
        sums = np.einsum("bs,bsk->bk", blocks, weights.reshape(*blocks.shape, 2))
        keys: Keys = np.cumsum(sums, axis=0) + key
        return keys

    def end(self, key: Keys, at: int, tokens: bytes) -> Keys:
        """Give the key of a prefix that goes on with these tokens: `[1, 2]`.  O(tokens), in C."""
        own, weights = self._summands(at, tokens)
        ended: Keys = np.einsum("s,sk->k", own, weights) + key
        return ended

    def behind(self, node: Node, tokens: bytes) -> Keys:
        """Give the keys of blocks that follow the end of a node.

        O(tokens of its path), in C; what was seen of it since `forget` is not summed again.
        """
        path: list[Node] = []
        at, key = 0, None
        above: Node | None = node
        while above is not None:
            if (known := self._ends.get(above)) is not None:
                at, key = known
                break
            path.append(above)
            above = above.parent
        for one in reversed(path):
            if key is None:
                key = self.start(one.root.namespace)
            else:
                key = self.end(key, at, one.tokens)
                at += len(one.tokens) // TOKEN_BYTES
            self._ends[one] = (at, key)
        assert key is not None
        return self.go_on(key, at, tokens)

    def forget(self) -> None:
        """Forget where nodes end: from now on the tree may change in any way.  O(nodes seen)."""
        self._ends.clear()

    def _summands(self, at: int, tokens: bytes) -> tuple[npt.NDArray[np.uint64], Keys]:
        """Give tokens as they are summed, and the weights of where they stand."""
        own = np.frombuffer(tokens, np.uint32).astype(np.uint64)
        own += np.uint64(1)
        end = at + len(own)
        if end > len(self._weights):
            count = max(_LEAST_WEIGHTS, 1 << (end - 1).bit_length())
            # What was drawn before is how it begins.
            drawn = shake_256(b"weights" + self._secret).digest(count * KEY_BYTES)
            self._weights = np.frombuffer(drawn, "<u8").astype(np.uint64).reshape(-1, 2)
            self._weights |= np.uint64(1)
        return own, self._weights[at:end]
